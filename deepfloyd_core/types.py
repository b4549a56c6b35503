"""The legend for shapes and ranges, and the few types that every module shares.

B batch, H W pixels, C = 3 colours, T = 77 tokens (`tokenizer_max_length`), D = text width (4096 in the real models).
Pixels on disk: uint8 RGB, 0 to 255. Pixels in a model: float32 in [-1, 1]. Timesteps and noise levels: int64, 0 to 999.
Sizes are (width, height) as in Pillow; tensors are (B, C, H, W).
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

MadeConditioning = Literal["canny", "grayscale", "low_res"]  # what a ControlNet follows, made of the training picture
Conditioning = Literal["canny", "grayscale", "low_res", "paired"]  # paired: a picture of its own

Report = Callable[[int, int, str], None]  # done, total, one line for the eye


def no_report(done: int, total: int, line: str) -> None:
    """A Report that says nothing."""


def hash_seed(*parts: object) -> int:
    """A 63-bit seed that is a pure function of its arguments."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def caption_id(caption: str) -> str:
    """Name of a caption in shards and embeds: 16 hex digits of sha256 over its UTF-8 bytes."""
    return hashlib.sha256(caption.encode()).hexdigest()[:16]


class Identity(Protocol):
    """What a request needs to know of an input: of a finished artifact, or of one that is yet to be made."""

    @property
    def kind(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def spec(self) -> dict[str, Any]: ...
    @property
    def inputs(self) -> dict[str, str]: ...


def names_of(inputs: Mapping[str, Identity]) -> dict[str, str]:
    """The inputs of a request, where they are artifacts."""
    return {name: artifact.name for name, artifact in inputs.items()}

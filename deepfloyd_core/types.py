"""The legend for shapes and ranges, and the few types that every module shares.

B batch, H W pixels, C = 3 colours, T = 77 tokens (`tokenizer_max_length`), D = text width (4096 in the real models).
Pixels on disk: uint8 RGB, 0 to 255. Pixels in a model: float32 in [-1, 1]. Timesteps and noise levels: int64, 0 to 999.
Sizes are (width, height) as in Pillow; tensors are (B, C, H, W).
"""

from collections.abc import Callable
from typing import Any, Literal, Protocol

MadeConditioning = Literal[
    "canny", "grayscale", "low_res"
]  # a ControlNet's conditioning, computed from the training picture
Conditioning = Literal["canny", "grayscale", "low_res", "paired"]  # paired: a separate picture

Json = dict[str, Any]  # a JSON object that is stored, compared and printed as a whole; no code reads its parts

Report = Callable[[int, int, str], None]  # done, total, one line for people


def no_report(done: int, total: int, line: str) -> None:
    """A Report that says nothing."""


class Identity(Protocol):
    """What a request needs to know of an input: of a finished artifact, or of one that is yet to be made."""

    @property
    def kind(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def spec(self) -> Json: ...
    @property
    def inputs(self) -> dict[str, str]: ...

"""A picture that `generate` has drawn, by what its PNG records: enough to draw it again. No torch."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import ValidationError

from deepfloyd_core.config.base import Spec
from deepfloyd_core.config.keys import keys_of
from deepfloyd_core.config.run import RunConfig
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stage3 import STAGE3, TABLE, DrawnStage, Stage3Config
from deepfloyd_core.config.stages import STAGES
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.files import canonical_json, parsed_json
from deepfloyd_core.pictures.faults import PIXEL_ERRORS
from deepfloyd_core.sampling.stage3_jobs import LANCZOS
from deepfloyd_core.store.artifacts import Request
from deepfloyd_core.types import Json

RECORD = "deepfloyd"  # the PNG text
_OF_PICTURE = (
    "version",
    "control",
    "image",
    "mask",
    "strength",
    "loras",
    "style",
    "style_shares",
)  # in the settings, and no key of the run file


class _DrawnWith(Spec):
    settings: Json
    inputs: dict[str, str]


class DrawnPicture(Spec):
    """What a PNG says of how it was drawn."""

    path: Path
    prompt: str
    negative_prompt: str
    seed: int
    version: str  # a number, or `base`
    stage: DrawnStage  # that drew it
    size: tuple[int, int]  # (width, height) of Stage I's picture, px
    drawn_with: _DrawnWith

    @property
    def strength(self) -> float | None:
        """Of the noise on the picture that it started from; None: it started from noise."""
        found: float | None = self.drawn_with.settings.get("strength")
        return found

    @property
    def files(self) -> dict[str, str]:
        """The sha256 of each picture of the user's that it was drawn with, by the name of its option."""
        names = ("control", "image", "mask")
        return {name: self.drawn_with.settings[name] for name in names if name in self.drawn_with.settings}

    @property
    def loras(self) -> list[Any]:
        """What identifies each LoRA that it was drawn with: `MixedLora.identity`."""
        found: list[Any] = self.drawn_with.settings.get("loras", [])
        return found

    @property
    def style(self) -> str | None:
        """The text whose style it took."""
        found: str | None = self.drawn_with.settings.get("style")
        return found

    @property
    def stages(self) -> str:
        """The stages of the cascade that drew it, as `--stages` names them."""
        drew = [stage for stage in (*STAGES, STAGE3) if f"stage{stage}" in self.drawn_with.settings]
        return "-".join(str(stage) for stage in dict.fromkeys((*drew[:1], *drew[-1:])))

    @property
    def by_lanczos(self) -> bool:
        """Whether the cascade that drew it ended with Lanczos' filter."""
        return bool(self.drawn_with.settings.get(TABLE) == LANCZOS)

    def overrides(self) -> list[str]:
        """The settings as KEY=VALUE of the run file."""
        tables = {*(kind.table for kind in STAGES.values()), TABLE}
        return [*_overrides(self.drawn_with.settings, tables),
                f"validation_negative_prompt={json.dumps(self.negative_prompt)}"]  # fmt: skip

    def check(self, request: Request) -> None:
        """Raise ConfigError when another request than the one that drew this picture would be made."""
        known = self.drawn_with
        asked = {name: value for name, value in request.spec.items() if name != "asked"}
        differ = [*_differing(known.inputs, request.inputs), *_differing(known.settings, asked)]
        if differ:
            raise ConfigError(
                f"{self.path} cannot be drawn again: {', '.join(differ)} {'is' if len(differ) == 1 else 'are'} not what it "
                "was drawn with. Give the run file, the workspace and the models of that time."
            )


def drawn_picture(path: Path) -> DrawnPicture:
    """The record of a picture. Raises ConfigError for a file that is no picture of `generate`."""
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            text = picture.info.get(RECORD)
        found: dict[str, Any] = parsed_json(text or "{}")
        if "source" in found:
            raise ConfigError(
                f"{path} was made by `deepfloyd upscale`, whose pictures are not drawn again: it records no settings of the "
                "run file. Upscale its source again."
            )
        names = DrawnPicture.model_fields.keys() - {"path", "version"}
        known = {name: found[name] for name in names} | {"path": str(path), "version": found["variant"]}
        drawn = DrawnPicture.model_validate_json(json.dumps(known))
        if not (drawn.stages and _is_plain(drawn)) or {one.partition("=")[0] for one in drawn.overrides()} - _keys():
            raise ValueError("of no stage, or with keys that decide no picture")
        return drawn
    except (*PIXEL_ERRORS, ValidationError, Image.DecompressionBombError) as error:
        told = "it cannot be read" if isinstance(error, OSError) else "it has no record of that"
        raise ConfigError(f"{path} was not drawn by `deepfloyd generate`: {told}.") from None


def _is_plain(drawn: DrawnPicture) -> bool:
    """Whether what a picture says of the user's files are hashes, and of LoRAs their identities."""
    kinds = int, str, str | None, int | float, bool
    return all(isinstance(one, str) for one in drawn.files.values()) and all(
        isinstance(lora, list)
        and len(lora) == len(kinds)
        and all(isinstance(value, kind) for value, kind in zip(lora, kinds, strict=True))
        for lora in drawn.loras
    )


def _keys() -> set[str]:
    """Those that a record may set: who writes one by hand sets no folder with it."""
    of_stages = {
        f"{kind.table}.{key}" for kind in STAGES.values() for key in keys_of(StageConfig, "generated", kind.number)
    }
    of_stage3 = {f"{TABLE}.{key}" for key in keys_of(Stage3Config, "generated")}
    return {*keys_of(RunConfig, "generated"), *of_stages, *of_stage3}


def _differing(one: Json, other: Json) -> Iterator[str]:
    for name in sorted(one.keys() | other.keys()):
        if canonical_json(one.get(name)) != canonical_json(other.get(name)):
            yield name


def _overrides(settings: Json, tables: set[str]) -> Iterator[str]:
    for name, value in settings.items():
        if name in tables and not isinstance(value, dict):
            continue  # Stage III without a model
        if name in tables:
            yield from (f"{name}.{override}" for override in _overrides(value, set()))
        elif name not in _OF_PICTURE:
            yield f"{name}={'' if value is None else json.dumps(value)}"

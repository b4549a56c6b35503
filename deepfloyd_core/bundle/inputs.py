"""What the later artifacts of a run are made from: a record for each, its fields named as manifests and jobs name them.

A record holds artifacts, or the requests of artifacts that are yet to be made (`planned`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Generic, TypeVar

from deepfloyd_core.config.flavours import Stage
from deepfloyd_core.types import Identity

A = TypeVar("A", bound=Identity)


@dataclass(frozen=True)
class _Inputs(Generic[A]):
    @property
    def by_name(self) -> dict[str, A]:
        """The fields that are not None; `loras` by stage1_lora and stage2_lora."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        loras = {f"stage{stage}_lora": lora for stage, lora in values.pop("loras", {}).items()}
        return {name: value for name, value in values.items() if value is not None} | loras


@dataclass(frozen=True, kw_only=True)
class LowResInputs(_Inputs[A]):
    """Of Stage I's remakes of Stage II's low-res pictures."""

    pixels: A  # of Stage II
    stage1_lora: A
    text_embeds: A


@dataclass(frozen=True, kw_only=True)
class TrainingInputs(_Inputs[A]):
    """Of a stage's LoRA."""

    pixels: A
    text: A
    eval_set: A
    conditioning: A | None = (
        None  # what a ControlNet follows for each row of the pixels, where that is not made of them
    )
    eval_conditioning: A | None = None  # the same for the eval set
    low_res: A | None = None  # Stage I's remakes, for Stage II


@dataclass(frozen=True, kw_only=True)
class SampleInputs(_Inputs[A]):
    """Of the cascade samples."""

    text_embeds: A
    eval_set: A
    loras: Mapping[Stage, A]
    conditioning: A | None = None
    eval_conditioning: A | None = None


@dataclass(frozen=True, kw_only=True)
class BundleInputs(_Inputs[A]):
    """Of a bundle."""

    image_index: A
    cascade_samples: A
    loras: Mapping[Stage, A]

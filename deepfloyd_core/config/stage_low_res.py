"""How Stage II's low-res input is made in training."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from deepfloyd_core.config.base import Spec
from deepfloyd_core.config.keys import LORA, is_changed, key
from deepfloyd_core.config.stages import UPSCALERS

if TYPE_CHECKING:
    from deepfloyd_core.config.stage import StageConfig


class LowResKeys(Spec):
    """Stage II's low-res input in training."""

    noise_level_begin: int = key(
        0,
        ge=0,
        le=999,
        says="Lowest noise level of Stage II's low-res input that is drawn in training.",
        makes=LORA,
        stages=UPSCALERS,
    )
    noise_level_end: int = key(
        1000, ge=1, le=1000, says="Noise level after the highest one that is drawn.", makes=LORA, stages=UPSCALERS
    )
    low_res_blur: float = key(
        0.0,
        ge=0,
        le=4,
        says="Blur of Stage II's low-res input in training: largest deviation (low-res px).",
        makes=LORA,
        stages=UPSCALERS,
    )
    low_res_noise: float = key(
        0.0,
        ge=0,
        le=64,
        says="Grain of Stage II's low-res input in training: largest standard deviation (levels of 255).",
        makes=LORA,
        stages=UPSCALERS,
    )
    low_res_jpeg_quality: int | None = key(
        None,
        ge=1,
        le=100,
        says="JPEG compression of Stage II's low-res input in training: quality from this one to 100; unset: none.",
        makes=LORA,
        stages=UPSCALERS,
    )
    low_res_degraded_share: float = key(
        1.0,
        gt=0,
        le=1,
        says="Share of the samples with `low_res_blur`, `low_res_noise` and `low_res_jpeg_quality`.",
        makes=LORA,
        stages=UPSCALERS,
    )
    low_res_stage1_share: float = key(
        0.0,
        ge=0,
        le=1,
        says="Share of Stage II's samples trained on Stage I's remake of their low-res picture. Stage I is then "
        "trained first, and samples each crop once.",
        makes=LORA,
        stages=UPSCALERS,
    )
    low_res_stage1_strength: float = key(
        0.3,
        gt=0,
        le=1,
        says="How far Stage I noises the true low-res picture before it resamples it: share of "
        "`stage1.validation_num_inference_steps`; 1: to pure noise.",
        makes=("low_res",),
        stages=UPSCALERS,
    )
    stage2_patch: Literal[64, 128] | None = key(
        None,
        says="Train on a window of each Stage II crop, px a side: less memory and time; unset: all of it.",
        makes=LORA,
        stages=UPSCALERS,
    )


def low_res_faults(config: "StageConfig") -> Iterator[str]:
    """Why settings of Stage II's low-res input cannot be used together."""
    if config.noise_level_begin >= config.noise_level_end:
        yield (
            f"noise_level_begin ({config.noise_level_begin}) is not below noise_level_end ({config.noise_level_end}). "
            "Set a range within 0 to 1000"
        )
    if config.low_res_degraded_share != 1 and not config.degrades_low_res:
        yield (
            f"low_res_degraded_share is {config.low_res_degraded_share}, without effect while there is no low_res_blur, "
            "low_res_noise or low_res_jpeg_quality. Remove it, or set one of them"
        )
    if is_changed(config, "low_res_stage1_strength") and not config.low_res_stage1_share:
        yield (
            f"low_res_stage1_strength is {config.low_res_stage1_strength}, without effect while low_res_stage1_share is "
            "0. Remove it, or set low_res_stage1_share, for example to 0.5"
        )


def low_res_notes(config: "StageConfig") -> Iterator[str]:
    """A note for a level that Stage II is sampled or measured at, and not trained at."""
    begin, end = config.noise_level_begin, config.noise_level_end
    outside = [level for level in config.measured_noise_levels if not begin <= level < end]
    if outside and config.flavour.kind.is_upscaler:
        name = "validation_noise_level" + ("" if config.validation_noise_level in outside else "s")
        yield f"{name} is {outside[0]}; training draws {begin} to {end - 1} alone"

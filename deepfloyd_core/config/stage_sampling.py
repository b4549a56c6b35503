"""How a stage is sampled: in validations, for the bundle and by `generate`."""

from typing import Annotated

from pydantic import Field

from deepfloyd_core.config.base import Spec
from deepfloyd_core.config.keys import LORA, Reader, key
from deepfloyd_core.config.stages import UPSCALERS

SAMPLED: tuple[Reader, ...] = ("validation", "samples", "generated")


class SamplingKeys(Spec):
    """How samples are made, in validations and in use."""

    validation_step_interval: int | None = key(
        None,
        ge=0,
        says="Optimizer steps between validations: eval loss and samples, also at step 0; 0: none. Unset: previews of "
        "both, which are shown while it trains and not kept, as often as a tenth of its work allows, at most ten times.",
        makes=("validation",),
    )
    validation_num_inference_steps: int = key(
        50, ge=1, le=1000, says="DDPM steps of each sample.", makes=SAMPLED + ("low_res",)
    )
    validation_guidance: float = key(
        7.0, ge=1, says="Classifier-free guidance scale; 1 switches it off.", makes=SAMPLED + ("low_res",)
    )
    validation_noise_level: int = key(
        250, ge=0, le=999, says="Noise on Stage II's low-res input (0 to 999).", makes=SAMPLED + LORA, stages=UPSCALERS
    )
    validation_noise_levels: tuple[Annotated[int, Field(ge=0, le=999)], ...] = key(
        (),
        strict=False,
        says="Further levels (0 to 999) at which Stage II is measured on the held-out pictures.",
        makes=("samples",),
        stages=UPSCALERS,
    )
    validation_back_projection: bool = key(
        False,
        says="Back-projection: correct Stage II's picture in every sampling step by its difference from the low-res "
        "picture (Irani and Peleg 1991; Wang et al. 2022). False: the stock pipeline as it is.",
        makes=SAMPLED,
        stages=UPSCALERS,
    )

"""How a stage is sampled: in validations, for the bundle and by `generate`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from deepfloyd_core.config.base import Spec
from deepfloyd_core.config.keys import LORA, Reader, key
from deepfloyd_core.config.stages import UPSCALERS

NoiseScheduler = Literal["ddpm", "ddim", "dpm++", "unipc"]


@dataclass(frozen=True)
class SchedulerKind:
    """A scheduler of diffusers that samples a model of IF."""

    name: str  # of its class in diffusers
    title: str  # as PNGs name it
    changes: Mapping[str, Any] = field(default_factory=dict)  # to the settings of the model's own scheduler
    most_steps: int = 1000  # with more of them its result is not finite


# By the value of `validation_noise_scheduler`; what makes them is in `sampling.schedulers`. Those that are not DDPM have no
# use for the model's variance. lambda_min_clipped: for a cosine schedule (diffusers' own help of the scheduler).
_SOLVER = {"variance_type": None, "timestep_spacing": "linspace"}
SCHEDULER_KINDS: Mapping[NoiseScheduler, SchedulerKind] = {
    "ddpm": SchedulerKind("DDPMScheduler", "DDPM"),
    "ddim": SchedulerKind("DDIMScheduler", "DDIM", {"variance_type": None}),
    "dpm++": SchedulerKind("DPMSolverMultistepScheduler", "DPM++ 2M", _SOLVER | {"lambda_min_clipped": -5.1}, 990),
    "unipc": SchedulerKind("UniPCMultistepScheduler", "UniPC", _SOLVER, 999),
}
SAMPLED: tuple[Reader, ...] = ("validation", "samples", "generated")


def sampling_fault(scheduler: NoiseScheduler, steps: int) -> str:
    """Why a scheduler cannot take so many steps; empty: it can."""
    most = SCHEDULER_KINDS[scheduler].most_steps
    if steps <= most:
        return ""
    return f"validation_num_inference_steps is {steps}; validation_noise_scheduler = {scheduler} takes at most {most}"


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
        50, ge=1, le=1000, says="Sampling steps of each sample.", makes=SAMPLED + ("low_res",)
    )
    validation_noise_scheduler: NoiseScheduler = key(
        "ddpm",
        says="The scheduler of the sampling steps: `ddpm`, which IF was made with; `ddim` (Song et al. 2021), `dpm++` "
        "(DPM-Solver++ 2M, Lu et al. 2022) or `unipc` (Zhao et al. 2023), for fewer steps.",
        makes=SAMPLED + ("low_res",),
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

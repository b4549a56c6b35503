"""Stage III, which makes 1,024 px of 256 px: an upscaler of latents. It is sampled and not trained.

IF's own third stage was never published; in its place stands `stabilityai/stable-diffusion-x4-upscaler`, as in IF's library
and in diffusers' documentation of IF. It has a text encoder and a VAE of its own, so it is no entry of `stages.STAGES`.
"""

from typing import Literal

from deepfloyd_core.config.base import NameOrPath, Spec
from deepfloyd_core.config.flavours import STAGE3_REPOS
from deepfloyd_core.config.keys import CONTENT, Reader, key
from deepfloyd_core.config.stage_run import Precision
from deepfloyd_core.config.stages import STAGES, UPSCALE, Stage

DrawnStage = Literal[1, 2, 3]
STAGE3: Literal[3] = 3
SOURCE: Stage = 2  # whose pictures it upscales
TITLE, TABLE = "Stage III", "stage3"
IN_CHANNELS = 7  # of its UNet: latents, and the low-res picture beside them
SCALE = UPSCALE * STAGES[SOURCE].scale  # as `StageKind.scale`
UNIT_PX = 8  # by which edges of its low-res pictures divide: the UNet halves three times
PIPELINE = "StableDiffusionUpscalePipeline"  # in diffusers
# The folders that decide what it makes.
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "low_res_scheduler")
_GENERATED: tuple[Reader, ...] = ("generated",)


class Stage3Config(Spec):
    """How Stage III is sampled, by `generate --stages 1-3` and `upscale --stage 3`."""

    model_flavour: Literal["x4-upscaler", "random:x4-upscaler", "tiny-iii"] = key(
        "x4-upscaler",
        says="Which model: Stable Diffusion's x4 upscaler, the same with random weights, or that of the tiny cascade.",
        makes=_GENERATED,
    )
    pretrained_model_name_or_path: NameOrPath | None = key(
        None, says="Hub id or directory of the model, in place of the flavour's own.", makes=CONTENT
    )
    mixed_precision: Precision = key("bf16", says="dtype of the model.", makes=_GENERATED)
    validation_num_inference_steps: int = key(
        75, ge=1, le=999, says="Sampling steps of each picture, with the model's own scheduler.", makes=_GENERATED
    )
    validation_guidance: float = key(
        9.0, ge=1, says="Classifier-free guidance scale; 1 switches it off.", makes=_GENERATED
    )
    validation_noise_level: int = key(
        100,
        ge=0,
        le=350,
        says="Noise on its low-res input: 100 for pictures of Stage II, as in diffusers' documentation of IF; 20, the "
        "pipeline's own default, for pictures without faults.",
        makes=_GENERATED,
    )

    @property
    def model(self) -> str:
        """Hub id or directory of the model."""
        return self.pretrained_model_name_or_path or STAGE3_REPOS[self.model_flavour]


def title_of(stage: DrawnStage) -> str:
    """`Stage II`: of any stage that draws."""
    return TITLE if stage == STAGE3 else STAGES[stage].title


def scale_of(stage: DrawnStage) -> int:
    """Pixels of any stage that draws along one of Stage I."""
    return SCALE if stage == STAGE3 else STAGES[stage].scale

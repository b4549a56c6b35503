"""The one table of stages: the facts that tell one stage from another. No torch.

IF is a cascade: Stage I makes pictures of 64 px from text, Stage II upscales them to 256 px. No other module compares
the number of a stage: it asks the stage's record, or goes through the stages of a run. Functions that need torch are in
tables by stage beside them, and a stage that is not in such a table is a KeyError.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Stage = Literal[1, 2]
UPSCALE = 4  # an upscaler makes 4x4 pixels from each pixel of its low-res picture


@dataclass(frozen=True)
class StageKind:
    """The facts of a stage."""

    number: Stage
    roman: str
    size_px: int  # native edge of its pictures
    alignment_px: int  # every edge of its pictures must divide by this
    # Of its UNet: x_t, and for an upscaler the low-res picture beside it. `preflight.unet_sizes.check_unet` recognises a
    # stage's UNet by it: where two stages share it, that must compare another fact as well.
    in_channels: int
    pipeline: str  # its class in diffusers
    img2img: str  # the one that starts from a picture
    inpainting: str  # the one that draws a part of a picture anew
    sample_max: float  # `sample_max_value` of its scheduler
    sample_batch: int  # pictures that are sampled at once
    style_share: float  # of a style's part of the guidance (`sampling.styled`): IF's own `positive_mixer`
    sheet_px: int  # edge of a picture on the sheet of its validations
    colour: tuple[int, int, int]  # of its boxes and titles in the preview
    model_types: Mapping[str, str]  # SimpleTuner's values of model_type that name the stage as well: ours of each
    upscales: Stage | None = None  # the stage whose pictures it upscales; None: it makes pictures from text
    noising_scheduler: str | None = None  # folder of the scheduler that adds noise to its low-res picture
    takes_controlnet: bool = False
    text_encoder: str = "t5"  # the one whose hidden states its UNet takes, a name in `models.text_encoders`

    @property
    def title(self) -> str:
        """`Stage II`: in messages, sheets and model cards."""
        return f"Stage {self.roman}"

    @property
    def table(self) -> str:
        """`stage2`: its table in the run file, and the first part of the names of its artifacts, columns and files."""
        return f"stage{self.number}"

    @property
    def is_upscaler(self) -> bool:
        """Whether it upscales another stage's pictures."""
        return self.upscales is not None

    def starts_from_picture(self, has_style: bool) -> bool:
        """Whether its sampling starts from a picture that the user gives. In another style an upscaler's starts from noise:
        the picture's own detail would bring back the style it had.
        """
        return not (has_style and self.is_upscaler)

    @property
    def scale(self) -> int:
        """Its pixels along one pixel of the stage that the cascade starts with."""
        return 1 if self.upscales is None else UPSCALE * STAGES[self.upscales].scale

    @property
    def largest_px(self) -> int:
        """The largest shorter edge that it is trained or sampled at."""
        return 2 * self.size_px

    @property
    def schedulers(self) -> tuple[str, ...]:
        """The folders of its schedulers; first the one that samples."""
        return ("scheduler",) if self.noising_scheduler is None else ("scheduler", self.noising_scheduler)

    @property
    def parts(self) -> tuple[str, ...]:
        """The folders that decide what its base model makes, apart from the text encoder."""
        return ("unet", *self.schedulers)


_KINDS = (
    StageKind(
        number=1,
        roman="I",
        size_px=64,
        alignment_px=8,  # the UNet halves three times
        in_channels=3,
        pipeline="IFPipeline",
        img2img="IFImg2ImgPipeline",
        inpainting="IFInpaintingPipeline",
        sample_max=1.5,
        sample_batch=16,
        style_share=0.25,
        sheet_px=96,
        colour=(255, 40, 90),
        model_types={"deepfloyd-lora": "lora", "deepfloyd-full": "full"},
        takes_controlnet=True,
    ),
    StageKind(
        number=2,
        roman="II",
        size_px=256,
        alignment_px=32,  # four times an edge of Stage I
        in_channels=6,
        pipeline="IFSuperResolutionPipeline",
        img2img="IFImg2ImgSuperResolutionPipeline",
        inpainting="IFInpaintingSuperResolutionPipeline",
        sample_max=1.0,
        sample_batch=2,
        style_share=0.5,
        sheet_px=192,
        colour=(0, 125, 255),
        model_types={"deepfloyd-stage2-lora": "lora", "deepfloyd-stage2": "full"},
        upscales=1,
        noising_scheduler="image_noising_scheduler",
    ),
)
# Those that can be trained, in the order of the cascade.
STAGES: dict[Stage, StageKind] = {kind.number: kind for kind in _KINDS}
UPSCALERS = tuple(stage for stage, kind in STAGES.items() if kind.is_upscaler)
CONTROLLED = tuple(stage for stage, kind in STAGES.items() if kind.takes_controlnet)


def by_stage(record: object, suffix: str = "") -> dict[Stage, Any]:
    """The fields `stage1`, `stage2` of a record, or `stage1_lora` with a suffix, for the stages where they are not None."""
    fields = {stage: getattr(record, kind.table + suffix) for stage, kind in STAGES.items()}
    return {stage: value for stage, value in fields.items() if value is not None}


def titles(stages: tuple[Stage, ...]) -> str:
    """The titles of stages, in a list with `or`."""
    return " or ".join(STAGES[stage].title for stage in stages)


def tables(stages: tuple[Stage, ...]) -> str:
    """The tables of stages in the run file, in a list with `or`: `[stage1] or [stage2]`."""
    return " or ".join(f"[{STAGES[stage].table}]" for stage in stages)


def kind_for_edge(edge_px: float) -> StageKind:
    """The first stage that is trained at a shorter edge of so many px; the last stage for edges beyond them all."""
    *_, last = STAGES.values()
    return next((kind for kind in STAGES.values() if edge_px <= kind.largest_px), last)

"""The sampling jobs: their requests, their inputs and their reports. No torch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

from deepfloyd_core.adapters.mixed import MixedLora
from deepfloyd_core.config.base import Spec
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.run_text import TextKeys
from deepfloyd_core.config.run_validation import ValidationKeys
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stage3 import DrawnStage
from deepfloyd_core.config.stages import STAGES, Stage, by_stage
from deepfloyd_core.files import canonical_json
from deepfloyd_core.hashing import digest
from deepfloyd_core.measures.figures import UpscalingFigures
from deepfloyd_core.measures.tables import MeasureTable, measure_tables
from deepfloyd_core.models.identity import base_model
from deepfloyd_core.processes.jobs import JobRequest, S, part_requests
from deepfloyd_core.sampling.pictures import Picture
from deepfloyd_core.sampling.stage3_jobs import Stage3
from deepfloyd_core.store.artifacts import Artifact, Request
from deepfloyd_core.store.inputs import A, Inputs
from deepfloyd_core.store.manifest import Summary
from deepfloyd_core.store.pinned import PinnedFile
from deepfloyd_core.store.versions import stage_folder
from deepfloyd_core.text.embeds import embeds_to_draw_with, rows_identity
from deepfloyd_core.types import Json

PROBES_FILE = "probes.parquet"
# How probes are drawn, and at which timesteps they are measured.
PROBED: Json = {"steps": 10, "guidance": 1.0, "t": [100, 400, 700, 950]}


class SampledStage(Spec):
    """A stage to sample with."""

    stage: Stage
    settings: StageConfig
    model: Path  # folder of the base model


class Cascade(Spec):
    """The stages to sample with, in their order."""

    stages: tuple[SampledStage, ...]

    @property
    def text_to_image(self) -> SampledStage | None:
        """The stage that makes pictures from text; None: there are upscalers alone."""
        return next((one for one in self.stages if not STAGES[one.stage].is_upscaler), None)

    @property
    def upscaler(self) -> SampledStage | None:
        """The stage that upscales; None: there is none. Raises ValueError for several, as `SamplesSummary` has room for
        the measures of one.
        """
        found = [one for one in self.stages if STAGES[one.stage].is_upscaler]
        if len(found) > 1:
            raise ValueError(f"There are {len(found)} upscalers to measure, and a summary has room for one.")
        return found[0] if found else None


def cascade_of(run: Run, models: Mapping[Stage, Path]) -> Cascade:
    """The stages of a run whose base models are given, by their folders."""
    stages = [
        SampledStage(stage=stage, settings=run.config.stage(stage), model=models[stage])
        for stage in run.config.stages
        if stage in models
    ]
    return Cascade(stages=tuple(stages))


@dataclass(frozen=True, kw_only=True)
class LowResInputs(Inputs[A]):
    """The inputs of Stage I's remakes of an upscaler's low-res pictures."""

    pixels: A  # of the upscaler
    stage1_lora: A
    text_embeds: A


class LowResSummary(Summary):
    """The summary of Stage I's remakes."""

    shards: int
    rows: int
    sizes: tuple[str, ...]  # px, WIDTHxHEIGHT
    sampled_by_this_process: int


class RemakeRequest(JobRequest[LowResSummary]):
    """Remake the low-res picture of every row of an upscaler's pixels."""

    job = "remake"
    entry = "deepfloyd_core.sampling.remakes:remake_low_res"
    returns = LowResSummary
    upscaler: Stage
    source: SampledStage  # the stage that makes its low-res pictures
    strength: float  # of the noise, above 0 to 1: `low_res_stage1_strength`
    seed: int
    negative_prompt: str
    inputs: LowResInputs[Artifact]


@dataclass(frozen=True, kw_only=True)
class CascadeInputs(Inputs[A]):
    """Inputs with the LoRA of each trained stage."""

    stage1_lora: A | None = None
    stage2_lora: A | None = None

    @property
    def loras(self) -> dict[Stage, A]:
        """The LoRA of each stage that has one."""
        return by_stage(self, "_lora")


def lora_fields(loras: Mapping[Stage, A]) -> dict[str, A]:
    """LoRAs as keyword arguments of `CascadeInputs`."""
    return {f"stage{stage}_lora": lora for stage, lora in loras.items()}


@dataclass(frozen=True, kw_only=True)
class SampleInputs(CascadeInputs[A]):
    """The inputs of the cascade samples."""

    text_embeds: A
    eval_set: A
    conditioning: A | None = None
    eval_conditioning: A | None = None


class Probes(Spec):
    """What forgetting is measured on."""

    prompts: tuple[str, ...]
    conditions: str  # digest of all that decides a probe's figures beside the tuned model and the prompt


class SamplesSummary(Summary):
    """The summary of the cascade samples."""

    probe_loss_base: float | None = None  # see `sampling.forgetting`; None: there are no probes
    probe_loss_tuned: float | None = None

    control_error_base: float | None = None  # see `cascade.control_error`
    control_error_tuned: float | None = None
    concept_share_base: float | None = None  # of Stage I's samples, 0 to 1
    concept_share_tuned: float | None = None
    held_out: UpscalingFigures | None = None  # the upscaler on downscales of held-out pictures
    spoilt: UpscalingFigures | None = None  # on the same, degraded as in training
    samples: UpscalingFigures | None = None  # on samples of the stage before it

    def tables(self, stages: Iterable[Stage]) -> list[MeasureTable]:
        """The measures of the upscaler among the sampled stages, for the terminal, the UI and the model card."""
        figures = self.held_out, self.spoilt, self.samples
        return [table for stage in stages for table in measure_tables(STAGES[stage], *figures)]


class PartDrawn(Summary):
    """The summary of a part of a job that draws."""


class SamplesCascade(JobRequest[S], Generic[S]):
    """What both requests below have."""

    job = "sample"
    cascade: Cascade
    validation: ValidationKeys
    prompts: tuple[str, ...]
    probes: Probes
    inputs: SampleInputs[Artifact]


class SampleRequest(SamplesCascade[SamplesSummary]):
    """Sample the base and the tuned cascade, and measure the upscaler."""

    entry = "deepfloyd_core.sampling.cascade:sample_cascade"
    returns = SamplesSummary


class SamplePartRequest(SamplesCascade[PartDrawn]):
    """Draw every nth batch of the same samples, and nothing else, as one of n processes."""

    entry = "deepfloyd_core.sampling.cascade_draws:sample_part"
    returns = PartDrawn
    number: int  # 0 to parts - 1
    parts: int


def sample_parts(request: SampleRequest) -> list[SamplePartRequest]:
    """The requests that `sample_workers` processes run at once before the request itself; none for one process here."""
    return part_requests(SamplePartRequest, request, request.machine.parts(request.machine.sample_workers))


def remake_job(run: Run, stage: Stage, model: Path, inputs: LowResInputs[Artifact]) -> RemakeRequest:
    """The job that remakes the low-res pictures of an upscaler. model: the base of the stage before it."""
    config, source = run.config, STAGES[stage].upscales
    assert source is not None
    return RemakeRequest(
        machine=config, upscaler=stage, source=SampledStage(stage=source, settings=config.stage(source), model=model),
        seed=config.seed, strength=config.stage(stage).low_res_stage1_strength,
        negative_prompt=config.validation_negative_prompt, inputs=inputs,
    )  # fmt: skip


def sample_job(
    run: Run, prompts: Sequence[str], models: Mapping[Stage, Path], inputs: SampleInputs[Artifact]
) -> SampleRequest:
    """The job that makes the cascade samples."""
    return SampleRequest(
        machine=run.config, cascade=cascade_of(run, models), validation=run.config, prompts=tuple(prompts),
        probes=_probes(run, models, inputs.text_embeds), inputs=inputs,
    )  # fmt: skip


def _probes(run: Run, models: Mapping[Stage, Path], embeds: Artifact) -> Probes:
    prompts, first = run.config.probes, run.config.first_stage
    if not prompts:
        return Probes(prompts=(), conditions="")
    recipe = {**base_model(first, models[first]), "text": rows_identity(embeds), "drawn": PROBED}
    return Probes(prompts=prompts, conditions=digest(canonical_json(recipe)))


class GeneratedSummary(Summary):
    """The summary of generated pictures."""

    pictures: int  # of each stage
    stages: tuple[DrawnStage, ...]


class DrawRequest(JobRequest[S], Generic[S]):
    """What all requests to draw with a version or with the base models have."""

    texts: tuple[str, ...]  # all that it is drawn from, each once; a job of its own encodes them: `texts_jobs`
    text: TextKeys
    encoder_name: str  # of the text encoder, in TEXT_ENCODERS
    encoder: Path  # folder of the model that has it
    embeds: Artifact | None  # with texts that need not be encoded
    version: str  # its number, or `base`; written into the pictures
    bundle: Artifact | None = None  # what the version published

    def trained(self, stage: Stage) -> Path | None:
        """The folder with a stage's trained weights in the version; None if the version has none for it."""
        if self.bundle is None or f"stage{stage}_lora" not in self.bundle.inputs:
            return None
        return stage_folder(self.bundle.path, stage)


class StartPicture(Spec):
    """A picture of the user's own that all pictures start from."""

    image: PinnedFile
    strength: float  # of the noise, above 0, at most 1
    mask: PinnedFile | None = None  # white where it is drawn anew; None: everywhere

    @property
    def identity(self) -> Json:
        """What decides the bytes."""
        masked = {} if self.mask is None else {"mask": self.mask.sha256}
        return {"image": self.image.sha256, "strength": self.strength, **masked}


class DrawnFrom(Spec):
    """What pictures are drawn from beside texts, noise and a version."""

    control: PinnedFile | None = None  # the picture that a ControlNet follows
    start: StartPicture | None = None  # None: they start from noise
    loras: tuple[MixedLora, ...] = ()  # all at once, on the base models
    style: str | None = None  # the text whose style they take; with `start`

    def of_stage(self, stage: Stage) -> tuple[MixedLora, ...]:
        """The LoRAs of a stage."""
        return tuple(lora for lora in self.loras if lora.stage == stage)

    @property
    def identity(self) -> Json:
        """What decides the bytes."""
        found: Json = {} if self.control is None else {"control": self.control.sha256}
        found |= {} if self.start is None else self.start.identity
        loras = [one.identity for one in self.loras]
        found |= {"loras": loras} if loras else {}
        shares = {kind.table: kind.style_share for kind in STAGES.values()}
        return found | ({"style": self.style, "style_shares": shares} if self.style else {})


class GeneratesPictures(DrawRequest[S], Generic[S]):
    """What both requests below have."""

    job = "generate"
    cascade: Cascade
    pictures: tuple[Picture, ...]
    drawn_with: Json  # the settings and inputs that decide the bytes, as the pictures record them
    drawn_from: DrawnFrom = DrawnFrom()
    stage3: Stage3 | None = None  # None: the cascade ends before it


class GenerateRequest(GeneratesPictures[GeneratedSummary]):
    """Sample pictures with the weights of a version or with the base models."""

    entry = "deepfloyd_core.sampling.generate:generate_pictures"
    returns = GeneratedSummary


class GeneratePartRequest(GeneratesPictures[PartDrawn]):
    """Draw every nth batch of the same pictures, and nothing else, as one of n processes."""

    entry = "deepfloyd_core.sampling.generate:generate_part"
    returns = PartDrawn
    number: int  # 0 to parts - 1
    parts: int


def generate_parts(request: GenerateRequest) -> list[GeneratePartRequest]:
    """The requests that `sample_workers` processes run at once before the request itself; none for one process here."""
    parts = min(request.machine.parts(request.machine.sample_workers), len(request.pictures))
    return part_requests(GeneratePartRequest, request, parts)


def generate_job(
    run: Run, pictures: Sequence[Picture], version: str, models: Mapping[Stage, Path], request: Request,
    bundle: Artifact | None, drawn_from: DrawnFrom | None = None, stage3: Stage3 | None = None,
) -> GenerateRequest:  # fmt: skip
    """The job that makes generated pictures. models: of the stages that draw. request: their identity."""
    config, settings = run.config, {name: value for name, value in request.spec.items() if name != "asked"}
    given = drawn_from or DrawnFrom()
    texts = [*(one.prompt for one in pictures), *(one.negative_prompt for one in pictures)]
    return GenerateRequest(
        machine=config, cascade=cascade_of(run, models), text=config,
        texts=tuple(dict.fromkeys([*texts, *([given.style] if given.style else [])])),
        encoder_name=STAGES[config.first_stage].text_encoder, encoder=models[config.first_stage],
        embeds=embeds_to_draw_with(run, models[config.first_stage]),
        pictures=tuple(pictures), version=version, drawn_with={"settings": settings, "inputs": request.inputs},
        bundle=bundle, drawn_from=given, stage3=stage3,
    )  # fmt: skip

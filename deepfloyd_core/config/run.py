"""The run file: one frozen model for the whole pipeline, with SimpleTuner's key names and units.

Four groups of its keys have modules of their own, three of these for jobs that need only these keys. Training keys at
the top level apply to both stages; a `[stage1]` or `[stage2]` table overrides them. A flat file (SimpleTuner's
config.json) trains the one stage that its `model_type` or `model_flavour` names.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from deepfloyd_core.config.base import HomePath
from deepfloyd_core.config.bucket_workspace import folder_of, workspace_faults
from deepfloyd_core.config.cluster import cluster_fault
from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.config.extras import missing_extra, quantization_fault
from deepfloyd_core.config.flavours import PUBLISHED
from deepfloyd_core.config.keys import (
    CONTENT,
    CROPS,
    EVERY_STAGE,
    LORA,
    NOTHING,
    VERDICT,
    effects,
    idle_faults,
    is_changed,
    key,
)
from deepfloyd_core.config.run_machine import Machine
from deepfloyd_core.config.run_retrain import RetrainKeys
from deepfloyd_core.config.run_text import TextKeys
from deepfloyd_core.config.run_validation import ValidationKeys
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stage3 import Stage3Config
from deepfloyd_core.config.stage_run import device_fault, ranks_fault
from deepfloyd_core.config.stages import STAGES, UPSCALE, Stage, StageKind, by_stage, tables, titles
from deepfloyd_core.errors import ConfigError

GROUPS = (TextKeys, ValidationKeys, RetrainKeys, Machine)


class RunConfig(TextKeys, ValidationKeys, RetrainKeys, Machine):
    """One run of the pipeline."""

    workspace: HomePath = key(
        says="Directory that holds every artifact of the run, or s3://BUCKET/PREFIX.", makes=NOTHING
    )
    data_backend_config: HomePath | None = key(
        None,
        says="The data file (SimpleTuner's multidatabackend.json). Unset: nothing can be trained, only drawn.",
        makes=CONTENT,
    )
    seed: int = key(
        42,
        ge=0,
        lt=2**32,
        says="Every random draw of the run is a function of it.",
        makes=("pixels", "eval_set", "low_res", "lora"),
    )
    max_rejected_share: float = key(
        0.25, ge=0, le=1, says="The run fails if a larger share of the inputs is rejected.", makes=NOTHING
    )
    num_eval_images: int | None = key(
        None,
        ge=0,
        says="Pictures of each data set held out of training for evaluation. Unset: one in ten up to 4, at least 1 "
        "of 8, none of fewer. 0: none, and no measures on held-out pictures.",
        makes=("eval_set",),
    )
    eval_dataset_id: str | None = key(
        None,
        says="Hold out pictures of this data set only; if it has no more than `num_eval_images`, none of it is trained on.",
        makes=("eval_set",),
    )
    aspect_bucket_alignment: Literal[8, 16, 24, 32, 64] = key(
        8,
        says="Edges of Stage I's training sizes divide by this (px), those of Stage II by four times as much.",
        makes=CROPS,
    )
    aspect_bucket_rounding: int | None = key(
        None,
        ge=1,
        le=9,
        says="Decimals to which width / height is rounded before its size is chosen; unset: none.",
        makes=CROPS,
    )
    data_backend_sampling: Literal["auto-weighting", "uniform"] = key(
        "auto-weighting",
        says="What a data set's `probability` multiplies: its number of batches, or (`uniform`) one for each set.",
        makes=LORA,
    )
    shard_mib: float = key(
        64.0,
        ge=0.1,
        le=1024,
        says="Pixels (MiB) in one Parquet shard; one Prefect task makes one shard in memory.",
        makes=("pixels",),
    )
    decode_memory_mib: int = key(
        3072,
        ge=256,
        says="Memory limit (MiB) for judging one picture; a picture above it is rejected.",
        makes=VERDICT,
    )
    decode_timeout_s: float = key(
        60.0,
        gt=0,
        le=86_400,
        says="Time limit (s) for judging one picture; a picture above it is rejected until the limit is raised.",
        makes=NOTHING,
    )
    stage1: StageConfig | None = Field(None, description="Stage I (text to 64 px).")
    stage2: StageConfig | None = Field(None, description="Stage II (64 to 256 px).")
    stage3: Stage3Config | None = Field(None, description="Stage III (256 to 1,024 px), which is not trained.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if faults := list(self._contradictions()):
            raise ValueError("\n".join(faults))
        return self

    @property
    def workspace_folder(self) -> Path:
        """The workspace, or the folder of this machine that mirrors it."""
        return folder_of(self.workspace, self.workspace_cache_dir)

    def _contradictions(self) -> Iterator[str]:
        """Settings that contradict each other or this machine's packages; each text follows the name of the file."""
        if not self.stages:
            yield f"no stage to train: add a {tables(EVERY_STAGE)} table, or set model_flavour"
        for name, effect in effects(type(self)).items():
            stages = effect.stages
            if stages != EVERY_STAGE and not set(stages) & set(self.stages) and is_changed(self, name):
                yield f"{name} measures what {titles(stages)} makes, and there is no {tables(stages)}. Remove it"
        yield from idle_faults(self, {})
        yield from workspace_faults(self.workspace, self.task_runner_address)
        if fault := cluster_fault(self.task_runner, self.task_runner_address):
            yield fault
        for tracker in self.trackers:
            if missing := missing_extra([tracker], tracker):
                yield f"report_to is {self.report_to!r}, and {missing}"
        if fault := quantization_fault("text_encoder_quantization", self.text_encoder_quantization):
            yield fault
        for stage in self.stages:
            config = self.stage(stage)
            if config.flavour.stage != stage:
                yield (
                    f"stage{stage}.model_flavour is {config.model_flavour!r}, a {config.flavour.kind.title} model. "
                    f"Use one of {', '.join(name for name, entry in PUBLISHED.items() if entry.stage == stage)}"
                )
            if fault := device_fault(config, self.device):
                yield f"stage{stage}.{fault}"
            if self.num_processes != "auto" and (fault := ranks_fault(config, self.num_processes, self.exact_ranks)):
                yield f"stage{stage}: {fault}"
            if self.retrain_mode == "warm" and config.init_lora is not None:
                yield (
                    f"stage{stage}.init_lora is {config.init_lora!r}, and retrain_mode is warm, which itself chooses the "
                    "weights to start from. Remove one of them"
                )
        yield from self._sample_size_faults()

    def _sample_size_faults(self) -> Iterator[str]:
        try:
            sizes = self.sample_sizes_px
        except ValueError as error:
            yield str(error)
            return
        for size in sizes:
            if fault := self.size_fault(size):
                yield f"validation_resolution is {self.validation_resolution!r}; {fault}"

    def size_fault(self, size: tuple[int, int]) -> str:
        """Why no sample can have a size (px), without a full stop; empty when one can."""
        if self.upscalers and self.text_to_image is None:
            return _upscaler_size_fault(size, STAGES[self.first_stage], str(self.validation_resolution))
        if any(edge % 8 or not 8 <= edge <= 512 for edge in size):
            return "each edge must divide by 8 (IF-I halves three times) and be 8 to 512. Use for example 64 or 96x64"
        if self.text_to_image is not None and min(size) > STAGES[self.first_stage].largest_px:
            first = STAGES[self.first_stage]
            return (
                f"{first.title} makes {first.size_px} px, and the shorter edge must be at most twice that. "
                "Stage II makes four times as much of it. Use for example 64 or 96x64"
            )
        return ""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages that this run trains, in the order of the cascade."""
        return tuple(by_stage(self))

    @property
    def first_stage(self) -> Stage:
        """The stage that the run's cascade starts with. The folder of its base model has the text encoder."""
        return self.stages[0]

    @property
    def text_to_image(self) -> StageConfig | None:
        """The settings of the stage that makes pictures from text; None: the run has upscalers alone."""
        first = next(iter(self.stages), None)
        return None if first is None or STAGES[first].is_upscaler else self.stage(first)

    @property
    def probes(self) -> tuple[str, ...]:
        """The prompts on which forgetting is measured. A ControlNet leaves its base as it is, so there are none."""
        first = self.text_to_image
        return () if first is None or first.controlnet else first.flavour.probes[: self.forgetting_probes]

    @property
    def upscalers(self) -> tuple[Stage, ...]:
        """The stages of the run that upscale another one's pictures."""
        return tuple(stage for stage in self.stages if STAGES[stage].is_upscaler)

    @property
    def paired_stage(self) -> Stage | None:
        """The stage whose ControlNet uses pairs; None: there is none."""
        return next((stage for stage in self.stages if self.stage(stage).paired), None)

    @property
    def paired(self) -> bool:
        """Whether a ControlNet of the run uses pairs."""
        return self.paired_stage is not None

    def stage(self, stage: Stage) -> StageConfig:
        """The settings of a stage that is in `stages`."""
        config: StageConfig | None = getattr(self, STAGES[stage].table)
        if config is None:
            raise ConfigError(f"This run has no stage {stage}: add a [stage{stage}] table with a model_flavour.")
        return config


def _upscaler_size_fault(size: tuple[int, int], kind: StageKind, value: str) -> str:
    """`size_fault` for a run that starts with an upscaler, whose sizes are its own. Stage I's default is let through:
    many files have it.
    """
    unit, least = kind.alignment_px, kind.size_px
    assert kind.upscales is not None
    if value != RunConfig.model_fields["validation_resolution"].default and min(size) < least:
        return (
            f"{kind.title} makes {least} px of {least // UPSCALE} and nothing smaller. Use for example 256 or 384x256"
        )
    if any(edge % unit for edge in size):
        low = STAGES[kind.upscales].title
        return f"each edge of {kind.title} must divide by {unit}, as four times an edge of {low}. Use for example 256"
    return ""


@dataclass(frozen=True)
class Run:
    """A checked configuration: the run file, its data sets, and the keys that were ignored."""

    config: RunConfig
    datasets: tuple[ImageDataset, ...]
    notes: tuple[str, ...]
    conditioning: tuple[ImageDataset, ...] = ()  # places of pairs for a ControlNet
    file: str = ""  # the run file, absolute

    def pairs_of(self, dataset: ImageDataset) -> ImageDataset | None:
        """The place of the pairs of a data set's pictures; None if the conditioning is computed from the pictures."""
        stage = self.config.paired_stage
        if stage is None or dataset.factor(stage) is None:
            return None
        return next(place for place in self.conditioning if place.id == dataset.conditioning_data)

    @property
    def workspace(self) -> Path:
        """Directory of the artifacts; of a workspace in a bucket the folder that mirrors it here."""
        return self.config.workspace_folder

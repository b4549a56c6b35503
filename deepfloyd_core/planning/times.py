"""How long a run would take: by what earlier runs of this workspace took for the same work, else by a calibration.

Rates are read from manifests: how long an artifact took, and how much of it was made then. So nothing is kept beside them.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.crops.summary import CropsSummary
from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.index.summary import IndexSummary
from deepfloyd_core.models.device import Device
from deepfloyd_core.planning.calibrated import Amounts, Calibrated
from deepfloyd_core.planning.steps import StagePlan
from deepfloyd_core.planning.work import ArtifactPlan
from deepfloyd_core.store.artifacts import Artifact, Request, all_artifacts
from deepfloyd_core.text.embeds import EmbedsSummary
from deepfloyd_core.text.projection import ProjectionSummary
from deepfloyd_core.training.costs import StepCosts
from deepfloyd_core.training.jobs import TrainingSummary

By = Literal["earlier runs", "calibration"]
_SPEED = (
    "mixed_precision", "text_encoder_dtype", "text_encoder_quantization", "base_model_precision", "stage2_patch",
    "controlnet", "model_type", "use_dora", "sizes", "images", "upscaled",
)  # fmt: skip
START = "start"  # of a command and its flow, in place of a kind
_OF_DATA = ("image_index", "stage1_pixels", "stage2_pixels", "eval_set", "lora_bundle")  # no model makes them


@dataclass(frozen=True)
class Duration:
    """How long an artifact takes, and how that is known."""

    seconds: float
    by: By


def plan_times(
    run: Run, artifacts: list[ArtifactPlan], stages: list[StagePlan], costs: Mapping[Stage, StepCosts], amounts: Amounts,
    device: Device | None,
) -> dict[str, Duration]:  # fmt: skip
    """The time of each artifact that is made and of which it can be said, and of what a command does beside them (`START`).
    run: with its own workspace: of an index that is made for the plan alone nothing follows.
    """
    rates = _rates(run, {artifact.kind: artifact.request for artifact in artifacts})
    found: dict[str, Duration] = {}
    by_table = {STAGES[plan.stage].table: plan for plan in stages}
    calibrated = Calibrated(run, by_table, costs, amounts, device) if device and device.speeds else None
    made = [artifact.kind for artifact in artifacts if artifact.state != "reused"]
    for kind in made:
        table, _, part = kind.partition("_")
        plan = by_table.get(table)
        units = _units(kind, part, plan, amounts)
        if kind in rates and units is not None:
            fixed, each = rates[kind]
            if took := fixed + each * units:
                found[kind] = Duration(took, "earlier runs")
        elif calibrated and (seconds := calibrated.seconds(kind)) is not None:
            found[kind] = Duration(seconds, "calibration")
    if calibrated and made:
        found[START] = Duration(calibrated.start_s(len(made)), "calibration")
    return found


def _units(kind: str, part: str, plan: StagePlan | None, amounts: Amounts) -> float | None:
    """How much of an artifact is to be made, in what its rate is of; None: not known."""
    if kind == "image_index":
        return amounts.pictures
    if kind == "text_embeds":
        return amounts.new_captions
    if part == "text":
        return len(amounts.captions)
    if plan is None:
        return 1.0 if kind in ("eval_set", "cascade_samples", "lora_bundle") else None
    return {"pixels": float(sum(count.pictures for count in plan.crops)), "lora": float(plan.samples)}.get(part)


def _rates(run: Run, requests: Mapping[str, Request | None]) -> dict[str, tuple[float, float]]:
    """Of each kind, by the newest artifact that tells of the same work: seconds beside it, and for each unit of it."""
    found: dict[str, tuple[float, float]] = {}
    for artifact in all_artifacts(run.workspace):  # the newest last
        with suppress(ArtifactError):
            if not _is_alike(artifact, requests.get(artifact.kind)) or _other_ranks(run, artifact):
                continue
            if rate := _rate(artifact):
                found[artifact.kind] = rate
    return found


def _is_alike(artifact: Artifact, request: Request | None) -> bool:
    """Whether what an artifact took says how long another one of its kind takes: with the same models and precision."""
    if artifact.kind in _OF_DATA:
        return True
    if request is None:
        return False
    models = [name for name in request.inputs if name.endswith("model") or name in ("unet", "encoder")]
    same_models = all(artifact.inputs.get(name) == request.inputs[name] for name in models)
    return same_models and all(artifact.spec.get(key) == request.spec.get(key) for key in _SPEED)


def _other_ranks(run: Run, artifact: Artifact) -> bool:
    """Whether another number of processes made a training than is asked for; `auto` is the machine's, as before."""
    if not artifact.kind.endswith("_lora") or run.config.num_processes == "auto":
        return False
    ranks = artifact.summary(TrainingSummary).ranks
    return (ranks[max(ranks)] if ranks else 1) != run.config.num_processes


def _rate(artifact: Artifact) -> tuple[float, float] | None:
    seconds, part = artifact.manifest.provenance.seconds, artifact.kind.partition("_")[2]
    if artifact.kind == "image_index":
        return _each(seconds, artifact.summary(IndexSummary).judged_now)
    if artifact.kind == "text_embeds":
        return _each(seconds, artifact.summary(EmbedsSummary).encoded)
    if part == "pixels":
        return _each(seconds, artifact.summary(CropsSummary).decoded)
    if part == "text":
        projected = artifact.summary(ProjectionSummary)
        return _each(seconds, projected.captions - projected.taken_over)
    if part == "lora":
        training = artifact.summary(TrainingSummary)
        if training.samples_per_s is None or not training.steps_of_this_process:
            return None
        config = artifact.spec
        samples = training.steps_of_this_process * config["train_batch_size"] * config["gradient_accumulation_steps"]
        return max(0.0, seconds - samples / training.samples_per_s), 1 / training.samples_per_s
    return (seconds, 0.0) if artifact.kind in ("eval_set", "cascade_samples", "lora_bundle") else None


def _each(seconds: float, units: int) -> tuple[float, float] | None:
    return (0.0, seconds / units) if units else None

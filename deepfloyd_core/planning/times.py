"""How long a run would take: by what earlier runs of this workspace took for the same work, else by the device's speed.

Rates are read from manifests: how long an artifact took, and how much of it was made then. So nothing is kept beside them.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stage_run import Precision
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.crops.summary import CropsSummary
from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.index.summary import IndexSummary
from deepfloyd_core.models.device import Device
from deepfloyd_core.pictures.geometry import Size
from deepfloyd_core.planning.steps import StagePlan
from deepfloyd_core.planning.work import ArtifactPlan
from deepfloyd_core.store.artifacts import Artifact, Request, all_artifacts
from deepfloyd_core.text.embeds import EmbedsSummary
from deepfloyd_core.text.projection import ProjectionSummary
from deepfloyd_core.training.costs import StepCosts
from deepfloyd_core.training.jobs import TrainingSummary

By = Literal["earlier runs", "the device's speed"]
# Share of a large convolution's speed that a whole step reaches, and operations of a step in calls of the UNet: forward,
# and backward without the gradients of frozen weights.
_SHARE, _STEP, _FULL_STEP, _AGAIN = 0.5, 2.0, 3.0, 0.7
_SPEED = (
    "mixed_precision", "text_encoder_dtype", "text_encoder_quantization", "base_model_precision", "stage2_patch",
    "controlnet", "model_type", "use_dora", "sizes", "images", "upscaled",
)  # fmt: skip
_OF_DATA = ("image_index", "stage1_pixels", "stage2_pixels", "eval_set", "lora_bundle")  # no model makes them
_START_S = 8.0  # of a job that loads a model


@dataclass(frozen=True)
class Duration:
    """How long an artifact takes, and how that is known."""

    seconds: float
    by: By


@dataclass(frozen=True)
class Amounts:
    """How much is to be made."""

    pictures: int  # to be judged
    sizes: Mapping[Stage, Size]  # px, of the pictures that the costs of a stage's step are of
    captions: int  # all texts
    new_captions: int  # to be encoded
    t5_flops: float  # operations for one caption


def plan_times(
    run: Run, artifacts: list[ArtifactPlan], stages: list[StagePlan], costs: Mapping[Stage, StepCosts], amounts: Amounts,
    device: Device | None,
) -> dict[str, Duration]:  # fmt: skip
    """The time of each artifact that is made and of which it can be said. run: with its own workspace: of an index that is
    made for the plan alone nothing follows.
    """
    rates = _rates(run, {artifact.kind: artifact.request for artifact in artifacts})
    found: dict[str, Duration] = {}
    by_table = {STAGES[plan.stage].table: plan for plan in stages}
    for kind in (artifact.kind for artifact in artifacts if artifact.state != "reused"):
        table, _, part = kind.partition("_")
        plan = by_table.get(table)
        units = _units(kind, part, plan, amounts)
        if kind in rates and units is not None:
            fixed, each = rates[kind]
            if took := fixed + each * units:
                found[kind] = Duration(took, "earlier runs")
        elif device is not None and (seconds := _by_speed(run, part, plan, costs, amounts, device)) is not None:
            found[kind] = Duration(seconds, "the device's speed")
    return found


def _units(kind: str, part: str, plan: StagePlan | None, amounts: Amounts) -> float | None:
    """How much of an artifact is to be made, in what its rate is of; None: not known."""
    if kind == "image_index":
        return amounts.pictures
    if kind == "text_embeds":
        return amounts.new_captions
    if part == "text":
        return amounts.captions
    if plan is None:
        return 1.0 if kind in ("eval_set", "cascade_samples", "lora_bundle") else None
    return {"pixels": float(sum(count.pictures for count in plan.crops)), "lora": float(plan.samples)}.get(part)


def _rates(run: Run, requests: Mapping[str, Request | None]) -> dict[str, tuple[float, float]]:
    """Of each kind, by the newest artifact that tells of the same work: seconds beside it, and for each unit of it."""
    found: dict[str, tuple[float, float]] = {}
    for artifact in all_artifacts(run.workspace):  # the newest last
        with suppress(ArtifactError):
            if _is_alike(artifact, requests.get(artifact.kind)) and (rate := _rate(artifact)):
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


def _by_speed(
    run: Run, part: str, plan: StagePlan | None, costs: Mapping[Stage, StepCosts], amounts: Amounts, device: Device
) -> float | None:
    """Seconds of a training, or of T5, from operations."""
    if part == "embeds":
        precision: Precision = "bf16" if run.config.text_encoder_dtype == "bf16" and device.has_bf16 else "no"
        return _START_S + amounts.new_captions * amounts.t5_flops / (_SHARE * device.flops[precision])
    if part == "samples":
        return _START_S + sum(_sampled_s(run, stage, costs[stage], amounts.sizes[stage], device) for stage in costs)
    if part != "lora" or plan is None or plan.stage not in costs:
        return None
    config, each = run.config.stage(plan.stage), costs[plan.stage]
    calls = (_FULL_STEP if config.model_type == "full" else _STEP) + (_AGAIN if config.gradient_checkpointing else 0)
    return _START_S + plan.samples * calls * each.sampled_flops / (_SHARE * device.flops[config.mixed_precision])


def _sampled_s(run: Run, stage: Stage, costs: StepCosts, size: Size, device: Device) -> float:
    """Seconds of a stage's samples, of the base and of the tuned model."""
    config, kind, run_config = run.config.stage(stage), STAGES[stage], run.config
    images = run_config.num_upscaled_images if kind.is_upscaler else run_config.num_validation_images
    areas = sum(width * height for width, height in run_config.sample_sizes_px) * kind.scale**2
    pictures = images * max(1, len(run_config.prompts)) * areas / (size[0] * size[1])
    calls = config.validation_num_inference_steps * (2 if config.validation_guidance > 1 else 1)
    return 2 * pictures * calls * costs.sampled_flops / (_SHARE * device.flops[config.mixed_precision])

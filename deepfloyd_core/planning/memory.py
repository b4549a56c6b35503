"""The most memory that each part of a run takes, and whether it fits.

Of a training step: frozen weights, trained ones with their gradients, optimizer and average, activations. Of T5: its
weights, or one layer where they are streamed, and the hidden states of a file of embeds. Of drawing: the UNet's weights
and a call of it. All is computed before a model is loaded; `benchmarks/results.md` has it beside what was taken.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.models.device import Device
from deepfloyd_core.models.folders import folder_here
from deepfloyd_core.models.text_encoders import text_encoder_of
from deepfloyd_core.pictures.geometry import Size
from deepfloyd_core.planning.encoding import t5_file, t5_numbers, t5_shape, t5_widths
from deepfloyd_core.planning.steps import StagePlan
from deepfloyd_core.training.costs import PROGRAM, CostRequest, StepCosts, cost_request, step_parts

_OF_T5 = {"none": 1.0, "int8": 0.5, "nf4": 0.28}  # share of the weights' bytes, by text_encoder_quantization
MOST_SHARE = 0.95  # of a device's memory: its own program and allocator need some


@dataclass(frozen=True)
class Part:
    """One of the things that are in memory at once."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Saving:
    """Settings that take less memory."""

    settings: tuple[tuple[str, object], ...]  # keys of the run file, dotted, with their values
    bytes: int  # less
    effect: str
    is_same: bool  # no byte of the result changes

    def __str__(self) -> str:
        keys = " with ".join(f"{key} = {str(value).lower()}" for key, value in self.settings)
        return f"{keys}: {_gb(self.bytes)} less, {self.effect}"


@dataclass(frozen=True)
class MemoryPlan:
    """The most that a part of a run takes."""

    what: str  # such as `Stage I, training`
    parts: tuple[Part, ...]
    savings: tuple[Saving, ...] = ()  # those first that change no result

    def fits(self, device: Device) -> bool:
        """Whether a device has room for it."""
        return self.bytes <= MOST_SHARE * device.total

    @property
    def bytes(self) -> int:
        """Of all."""
        return sum(part.bytes for part in self.parts)


def cost_requests(run: Run, plans: Sequence[StagePlan]) -> dict[Stage, CostRequest]:
    """What must be known of each stage's step. A stage is left out whose architecture is not known on this machine."""
    sizes = {plan.stage: _largest(plan, run.config.stage(plan.stage)) for plan in plans}
    found = {}
    for stage in run.config.stages:
        config = run.config.stage(stage)
        size = sizes.get(stage) or (STAGES[stage].size_px,) * 2
        request = cost_request(config, folder_here(config.model, stage), size)
        if request is not None:
            found[stage] = request
    return found


def plan_memory(
    run: Run,
    made: set[str],
    captions: int,
    costs: Mapping[Stage, StepCosts],
    sizes: Mapping[Stage, Size],
    device: Device,
) -> list[MemoryPlan]:
    """The parts of a run that load models, in their order. made: the kinds of artifacts that are made; captions: texts
    that T5 encodes, 0: it is not loaded; sizes: of the pictures that the costs are of.
    """
    plans = [_text(run, captions, device)] if captions else []
    for stage, each in costs.items():
        if f"{STAGES[stage].table}_lora" in made:
            plans.append(_training(run, stage, each, device))
    if "cascade_samples" in made:
        plans += [_drawing(run, stage, each, sizes[stage], device) for stage, each in costs.items()]
    return plans


def _drawing(run: Run, stage: Stage, costs: StepCosts, size: Size, device: Device) -> MemoryPlan:
    """Of the samples at the end, at least: the UNet with its adapters, and a call of it for one picture, which grows with
    its area. A GPU draws as many at once as fit.
    """
    config, kind = run.config.stage(stage), STAGES[stage]
    calls = 2 if config.validation_guidance > 1 else 1
    area = max(width * height for width, height in run.config.sample_sizes_px) * kind.scale**2
    call = int(costs.sampling(calls) * area / (size[0] * size[1]))
    parts = (Part("weights", costs.frozen + costs.trained_bytes), Part("a call", call))
    return MemoryPlan(f"{kind.title}, drawing", (*parts, *_program(device)))


def _training(run: Run, stage: Stage, costs: StepCosts, device: Device) -> MemoryPlan:
    config = run.config.stage(stage)
    parts = [Part(name, count) for name, count in step_parts(config, costs, device.is_cpu).items()]
    return MemoryPlan(f"{STAGES[stage].title}, training", (*parts, *_program(device)), _savings(config, costs, device))


def _savings(config: StageConfig, costs: StepCosts, device: Device) -> tuple[Saving, ...]:
    """What takes less of a training."""
    table, batch = STAGES[config.flavour.stage].table, config.train_batch_size
    now = costs.step(batch, config.gradient_checkpointing, device.is_cpu)
    found = []
    recomputes = config.gradient_checkpointing
    if not recomputes and (saved := now - costs.step(batch, True, device.is_cpu)) > 0:
        is_same = config.dynamo_backend == "no"  # a graph compiled with the recomputation may round differently
        effect = "the same result" if is_same else "another rounding"
        found.append(Saving(((f"{table}.gradient_checkpointing", True),), saved, effect, is_same))
        recomputes = True
    if batch > 1:
        saved = now - costs.step(1, recomputes, device.is_cpu)
        accumulation = batch * config.gradient_accumulation_steps
        keys = ((f"{table}.train_batch_size", 1), (f"{table}.gradient_accumulation_steps", accumulation))
        found.append(Saving(keys, saved, "steps of the same size", False))
    if config.base_model_precision == "no_change" and config.model_type != "full":
        share = 0.5 if config.mixed_precision == "bf16" else 0.25
        saved = int(costs.frozen * (1 - share))
        found.append(Saving(((f"{table}.base_model_precision", "int8"),), saved, "another result", False))
    return tuple(found)


def _text(run: Run, captions: int, device: Device) -> MemoryPlan:
    """T5. Its hidden states are of one file of embeds, its layers of one at a time where it computes in another dtype."""
    config, shape, kind = run.config, t5_shape(run), text_encoder_of(run.config.first_stage)
    layer, rest = t5_numbers(shape)
    width, (stored, computed) = shape["d_model"], t5_widths(run, device)
    hidden = min(captions, t5_file(run, shape)) * config.tokenizer_max_length * width * computed
    share = _OF_T5[config.text_encoder_quantization]
    layers = 1 if config.text_encoder_streaming else shape["num_layers"]
    parts = [
        Part("weights", int(layers * layer * stored * share) + (0 if config.text_encoder_streaming else rest * stored)),
        Part("the layer at work", layer * computed if computed != stored or config.text_encoder_streaming else 0),
        Part("hidden states", hidden),
        *_program(device),
    ]
    saved = (shape["num_layers"] - 1) * layer * stored
    streaming = Saving((("text_encoder_streaming", True),), saved, "the same result", True)
    savings = () if config.text_encoder_streaming else (streaming,)
    return MemoryPlan(kind.title, tuple(part for part in parts if part.bytes), savings)


def _program(device: Device) -> tuple[Part, ...]:
    return (Part("program", PROGRAM),) if device.is_cpu else ()


def _largest(plan: StagePlan, config: StageConfig) -> Size | None:
    """The largest of the sizes that a stage is trained on: of its windows, where it has any."""
    if config.stage2_patch:
        return config.stage2_patch, config.stage2_patch
    return max((count.size for count in plan.crops), key=lambda size: size[0] * size[1], default=None)


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"

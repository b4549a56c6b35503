"""The most memory that each part of a run takes, and whether it fits.

Of a training step: frozen weights, trained ones with their gradients, optimizer and average, activations. Of T5: its
weights, or one layer where they are streamed, and the hidden states of a file of embeds. Of sampling: the UNet's weights,
while it is trained the state of that, and a call for the pictures that are sampled at once. All is computed before a model
is loaded; `benchmarks/results.md` has it beside what was taken.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.models.device import Device
from deepfloyd_core.models.folders import folder_here
from deepfloyd_core.models.text_encoders import text_encoder_of
from deepfloyd_core.pictures.geometry import Size
from deepfloyd_core.planning.encoding import t5_file, t5_numbers, t5_shape, t5_widths
from deepfloyd_core.planning.savings import Saving, sampling_savings, training_savings
from deepfloyd_core.planning.steps import StagePlan
from deepfloyd_core.store.counts import many
from deepfloyd_core.training.costs import PROGRAM, CostRequest, StepCosts, cost_request, state_parts, step_parts
from deepfloyd_core.training.previews import pictures_of_size, sampled_together
from deepfloyd_core.training.turns import of_a_rank, ranks_of

_OF_T5 = {"none": 1.0, "int8": 0.5, "nf4": 0.28}  # share of the weights' bytes, by text_encoder_quantization


@dataclass(frozen=True)
class Part:
    """One of the things that are in memory at once."""

    name: str
    bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """The most that a part of a run takes."""

    what: str  # such as `Stage I, training`
    parts: tuple[Part, ...]
    savings: tuple[Saving, ...] = ()  # those first that change no result, by the time that they cost
    ranks: int = 1  # processes that take as much each

    def fits(self, device: Device) -> bool:
        """Whether a device has room for it."""
        return self.on(device).fits(self.bytes)

    def on(self, device: Device) -> Device:
        """The device as each of its processes has it."""
        return replace(device, ranks=self.ranks)

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
            if pictures := sampled_together(run, stage):
                held = state_parts(run.config.stage(stage), each, ranks_of(run.config, stage, device.gpus))
                plans.append(_sampling(run, stage, "validating", Sampling(each, sizes[stage], held, pictures), device))
    if "cascade_samples" in made:
        for stage, each in costs.items():
            held = {"weights": each.frozen + each.trained_bytes}
            most = run.config.stage(stage).sampled_at_once
            pictures = min(most, pictures_of_size(run.config, stage))
            plans.append(_sampling(run, stage, "drawing", Sampling(each, sizes[stage], held, pictures), device))
    return plans


@dataclass(frozen=True)
class Sampling:
    """What is known of sampling a stage's pictures."""

    costs: StepCosts
    size: Size  # px, of the pictures that the costs are of
    held: Mapping[str, int]  # bytes that are in memory meanwhile, by name
    pictures: int  # at once

    def call(self, calls: int, area: int, pictures: int) -> int:
        """Bytes of a call of the UNet for so many pictures of an area, which it grows with."""
        return int(self.costs.sampling(pictures * calls) * area / (self.size[0] * self.size[1]))


def _sampling(run: Run, stage: Stage, what: str, sampling: Sampling, device: Device) -> MemoryPlan:
    config, kind = run.config.stage(stage), STAGES[stage]
    calls = 2 if config.validation_guidance > 1 else 1
    area = max(width * height for width, height in run.config.sample_sizes_px) * kind.scale**2
    held = [*(Part(name, count) for name, count in sampling.held.items()), *_program(device)]
    beside = sum(part.bytes for part in held)

    def taken(pictures: int) -> int:
        return beside + sampling.call(calls, area, pictures)

    call = Part(f"a call for {many(sampling.pictures, 'picture')}", taken(sampling.pictures) - beside)
    savings = sampling_savings(kind.table, sampling.pictures, taken, device)
    return MemoryPlan(f"{kind.title}, {what}", (*held, call), savings)


def _training(run: Run, stage: Stage, costs: StepCosts, device: Device) -> MemoryPlan:
    config, ranks = run.config.stage(stage), ranks_of(run.config, stage, device.gpus)
    own, device = of_a_rank(config, ranks), replace(device, ranks=ranks)
    parts = [Part(name, count) for name, count in step_parts(own, costs, device.is_cpu, ranks).items()]
    parts += _program(device)
    what = f"{STAGES[stage].title}, training" + (f", each of {ranks} processes" if ranks > 1 else "")
    return MemoryPlan(what, tuple(parts), training_savings(config, costs, device), ranks)


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
    streamed = replace(run, config=config.model_copy(update={"text_encoder_streaming": True}))
    takes = 0 if config.text_encoder_streaming else _text(streamed, captions, device).bytes
    savings = (Saving((("text_encoder_streaming", True),), takes, "the same result", True),) if takes else ()
    return MemoryPlan(kind.title, tuple(part for part in parts if part.bytes), savings)


def _program(device: Device) -> tuple[Part, ...]:
    return (Part("program", PROGRAM),) if device.is_cpu else ()


def _largest(plan: StagePlan, config: StageConfig) -> Size | None:
    """The largest of the sizes that a stage is trained on: of its windows, where it has any."""
    if config.stage2_patch:
        return config.stage2_patch, config.stage2_patch
    return max((count.size for count in plan.crops), key=lambda size: size[0] * size[1], default=None)

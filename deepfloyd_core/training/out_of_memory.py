"""What a training says that ran out of a GPU's memory: how much was taken, what the plan said, and what takes less.

The settings that it names change no byte that was trained so far, so the next run goes on from the last checkpoint.
"""

import torch

from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stages import STAGES
from deepfloyd_core.errors import JobError
from deepfloyd_core.models.device import MOST_SHARE
from deepfloyd_core.store.counts import size
from deepfloyd_core.training.checkpoints import last_good
from deepfloyd_core.training.costs import StepCosts, cost_request, default_cache, known_costs, step_parts
from deepfloyd_core.training.forward import Prepared, TrainingContext
from deepfloyd_core.training.lighter import lighter

_MORE = 0.1  # that a step may take beyond its forecast, as this one did


def out_of_memory(context: TrainingContext, prepared: Prepared, step: int) -> JobError:
    """The error of a step, counted from 0, that found no memory for a batch."""
    config, title, (height, width) = context.config, STAGES[context.stage].title, prepared.fed.x.shape[-2:]
    had = f"{title}'s step {step + 1}, {len(prepared.fed.x)} pictures of {width}x{height} px"
    had += f" in micro-batches of {config.pass_size}" if config.pass_size < config.train_batch_size else ""
    request = cost_request(config, context.model, (width, height))
    costs = known_costs(request, default_cache()) if request else None
    planned = f", and `deepfloyd plan` forecasts {size(_bytes(config, costs, context))}" if costs else ""
    less = _less(context, costs)
    return JobError(f"{had}, found no memory{_taken(context)}{planned}. {last_good(context.out)} {less}.")


def _taken(context: TrainingContext) -> str:
    if context.device.type != "cuda":
        return ""
    total = _total(context)
    return f": {size(torch.cuda.max_memory_allocated(context.device))} of the GPU's {size(total)} were taken"


def _total(context: TrainingContext) -> int:
    return int(torch.cuda.mem_get_info(context.device)[1])


def _bytes(config: StageConfig, costs: StepCosts, context: TrainingContext) -> int:
    return sum(step_parts(config, costs, context.device.type == "cpu", context.ranks.size).values())


def _less(context: TrainingContext, costs: StepCosts | None) -> str:
    """The first settings that fit and take less than these did, or those that take least."""
    config, ways = context.config, lighter(context.config)
    table = STAGES[context.stage].table
    if not ways:
        return "Take a smaller batch, base_model_precision or lora_rank; that is another training"
    chosen, forecast = ways[-1], ""
    if costs is not None:
        now, room = _bytes(config, costs, context), _total(context) if context.device.type == "cuda" else 0
        most = min(now * (1 - _MORE), MOST_SHARE * room or now)
        sums = {way: _bytes(way.of(config), costs, context) for way in ways}
        chosen = next((way for way in ways if sums[way] <= most), min(ways, key=lambda way: sums[way]))
        forecast = f", forecast at {size(sums[chosen])}"
    keys = " and ".join(f"{table}.{key} = {str(value).lower()}" for key, value in chosen.settings)
    return f"Set {keys}{forecast}, with which the next run goes on from there to {chosen.effect}"

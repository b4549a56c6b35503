"""What a training says that ran out of a GPU's memory: how much was taken, what the plan said, and what takes less.

The settings that it names change no byte that was trained so far, so the next run goes on from the last checkpoint.
"""

import torch

from deepfloyd_core.config.stages import STAGES
from deepfloyd_core.errors import JobError
from deepfloyd_core.store.counts import size
from deepfloyd_core.training.checkpoints import last_good
from deepfloyd_core.training.costs import cost_request, default_cache, known_costs, step_parts
from deepfloyd_core.training.forward import Prepared, TrainingContext


def out_of_memory(context: TrainingContext, prepared: Prepared, step: int) -> JobError:
    """The error of a step, counted from 0, that found no memory for a batch."""
    title, (height, width) = STAGES[context.stage].title, prepared.fed.x.shape[-2:]
    had = f"{title}'s step {step + 1}, {len(prepared.fed.x)} pictures of {width}x{height} px, found no memory"
    if context.config.gradient_checkpointing:
        less = "Set train_batch_size = 1 with as many gradient_accumulation_steps as the batch had; that is another training"
    else:
        less = "Set gradient_checkpointing = true, with which the next run goes on from there to the same result"
    return JobError(f"{had}{_taken(context)}{_planned(context, (width, height))}. {last_good(context.out)} {less}.")


def _taken(context: TrainingContext) -> str:
    if context.device.type != "cuda":
        return ""
    _, total = torch.cuda.mem_get_info(context.device)
    return f": {size(torch.cuda.max_memory_allocated(context.device))} of the GPU's {size(total)} were taken"


def _planned(context: TrainingContext, px: tuple[int, int]) -> str:
    """What `deepfloyd plan` said; empty where it has not calculated that step."""
    request = cost_request(context.config, context.model, px)
    costs = known_costs(request, default_cache()) if request else None
    if costs is None:
        return ""
    parts = step_parts(context.config, costs, context.device.type == "cpu")
    return f", and `deepfloyd plan` forecasts {size(sum(parts.values()))}"

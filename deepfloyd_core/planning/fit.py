"""`auto_fit`: the settings that make a run fit its device and change no result, by the time that they cost."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.index.ledger import caption_counts
from deepfloyd_core.models.device import Device
from deepfloyd_core.pictures.geometry import Size
from deepfloyd_core.planning.costs import costs_of
from deepfloyd_core.planning.memory import MemoryPlan, cost_requests, plan_memory
from deepfloyd_core.planning.savings import Saving
from deepfloyd_core.planning.steps import plan_stages
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.store.counts import size
from deepfloyd_core.text.embeds import run_captions
from deepfloyd_core.training.costs import StepCosts


@dataclass(frozen=True)
class Fitted:
    """A run with what makes it fit."""

    run: Run
    applied: tuple[str, ...]  # what was set and why, in words
    proposed: tuple[str, ...]  # what does not fit all the same, and what would change the result


def fit_after_index(run: Run, index: Artifact, device: Device) -> Fitted:
    """Fit the trainings of a run that has its index, and T5, as if it encoded every caption."""
    requests = cost_requests(run, plan_stages(run, index))
    costs, _ = costs_of(requests, calculates=True)
    captions = run_captions(run, caption_counts(index))
    return fit(run, costs, {stage: request.size for stage, request in requests.items()}, device, len(captions))


def fit(
    run: Run, costs: Mapping[Stage, StepCosts], sizes: Mapping[Stage, Size], device: Device, captions: int
) -> Fitted:
    """Apply to each part that does not fit what changes no result. sizes: of the pictures that the costs are of; captions:
    that T5 encodes, 0: it is not loaded.
    """
    made, applied = {f"stage{stage}_lora" for stage in costs} | {"cascade_samples"}, list[str]()

    def parts() -> list[MemoryPlan]:
        return plan_memory(run, made, captions, costs, sizes, device)

    for number in range(len(parts())):
        part = parts()[number]  # a setting can belong to several
        if not part.fits(device) and (saving := _cheapest(part, device)):
            run = _with(run, saving)
            applied.append(f"{saving.keys}: {_too_large(part, device)}; with it {size(saving.bytes)}, {saving.effect}")
    left = [part for part in parts() if not part.fits(device)]
    proposed = [f"{_too_large(part, device)}{_would(part.savings, part.on(device))}" for part in left]
    return Fitted(run, tuple(applied), tuple(proposed))


def _cheapest(part: MemoryPlan, device: Device) -> Saving | None:
    """The first saving that fits and changes no result; where none fits, the one that takes least."""
    same = [saving for saving in part.savings if saving.is_same]
    least = min(same, key=lambda saving: saving.bytes, default=None)
    return next((saving for saving in same if part.on(device).fits(saving.bytes)), least)


def _with(run: Run, saving: Saving) -> Run:
    config = run.config
    for key, value in saving.settings:
        table, _, name = key.rpartition(".")
        changed = config if not table else getattr(config, table)
        changed = changed.model_copy(update={name: value})
        config = config.model_copy(update={table: changed}) if table else changed
    return replace(run, config=config)


def _too_large(part: MemoryPlan, device: Device) -> str:
    return f"{part.what} takes {size(part.bytes)}, and {device.name} has {size(device.total)}"


def _would(savings: Iterable[Saving], device: Device) -> str:
    each = [saving.told(device) for saving in savings]
    return f". Less would take {'; or '.join(each)}" if each else ""

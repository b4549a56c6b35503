"""A plan as tables and sentences: the same for the terminal and the UI."""

from collections.abc import Iterable
from dataclasses import dataclass

from deepfloyd_core.config.stages import STAGES
from deepfloyd_core.models.device import Device
from deepfloyd_core.planning.memory import MemoryPlan
from deepfloyd_core.planning.plan import Plan
from deepfloyd_core.planning.steps import StagePlan
from deepfloyd_core.planning.times import START
from deepfloyd_core.planning.work import MissingModel
from deepfloyd_core.store.changes import label
from deepfloyd_core.store.counts import duration, many, size

_MOST_SIZES = 4  # named of a stage


@dataclass(frozen=True)
class PlanTable:
    """A table of a plan. Cells are plain text."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def plan_tables(plan: Plan) -> list[PlanTable]:
    """The tables of a plan that have rows."""
    tables = [_pictures(plan), _artifacts(plan), _trainings(plan), _memory(plan)]
    return [table for table in tables if table.rows]


def verdict(plan: Plan) -> list[str]:
    """What a person wants to know first: whether there is anything to do, how long it takes, and whether it fits."""
    made = [artifact for artifact in plan.artifacts if artifact.state != "reused"]
    if not made:
        return ["Nothing to do: every artifact is there."]
    lines = [*plan.ends, _time(plan), _disk(plan)]
    lines += [_coming(each) for each in plan.missing]
    if plan.device is not None:
        lines += _fits(plan.memory, plan.device)
    return lines


def _coming(model: MissingModel) -> str:
    """Of a model that is not here, beside what the run itself writes."""
    if model.is_random:
        return f"Beside that {size(model.bytes)} of random weights are written for {model.name}."
    about = f", about {size(model.bytes)}" if model.bytes else ""
    return f"Beside that {model.name} must be downloaded{about}; `deepfloyd doctor` asks the hub for it."


def _disk(plan: Plan) -> str:
    """What is written, and what checkpoints take meanwhile."""
    disk = plan.disk
    made, meanwhile = sum(disk.artifacts.values()), size(disk.meanwhile)
    text = f"It writes {size(made)}"
    text += f", and {meanwhile} of checkpoints while it trains" if disk.meanwhile else ""
    return f"{text}; {size(disk.free)} are free{': that does not fit' if disk.needed > disk.free else ''}."


def _time(plan: Plan) -> str:
    if plan.seconds is None:
        return "How long it takes is not known: nothing of the kind has run in this workspace yet."
    known = [kind for kind, each in plan.times.items() if each.by == "earlier runs"]
    calibrated = [label(kind) for kind in plan.times if kind not in (*known, START)]
    about = f"It takes about {duration(plan.seconds)}"
    if not calibrated:
        return f"{about}, by what earlier runs of this workspace took."
    if not known:
        return f"{about}, by a short calibration of this machine: nothing of the kind has run in this workspace yet."
    return (
        f"{about}: by a short calibration of this machine {', '.join(calibrated)}, by earlier runs what else is made."
    )


def _fits(memory: Iterable[MemoryPlan], device: Device) -> list[str]:
    """Whether each part of the run fits a device, and if not, what would."""
    has = f"{device.name} has {size(device.total)}"
    lines = []
    for each in (each for each in memory if not each.fits(device)):
        lines.append(f"{each.what} takes {size(each.bytes)}, and {has}: that does not fit.")
        lines += [f"  {saving.told(each.on(device))}" for saving in each.savings]
    most = max(memory, key=lambda each: each.bytes, default=None)
    if most is not None and not lines:
        lines.append(f"It takes {size(most.bytes)} of memory at most ({most.what}), and {has}: it fits.")
    return lines


def _pictures(plan: Plan) -> PlanTable:
    rows = []
    for one in plan.sets:
        rejected = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in one.rejected.items())
        rows.append((one.dataset_id, f"{one.inputs:,}", rejected or "none", f"{one.held_out:,}", f"{one.trained:,}"))
    return PlanTable("Pictures", ("data set", "files", "rejected", "held out", "to train on"), tuple(rows))


def _artifacts(plan: Plan) -> PlanTable:
    rows = []
    for artifact in plan.artifacts:
        took, written = plan.times.get(artifact.kind), plan.disk.artifacts.get(artifact.kind)
        rows.append(
            (
                label(artifact.kind),
                artifact.state,
                duration(took.seconds) if took else "",
                size(written) if written else "",
                "; ".join(artifact.why),
            )
        )
    return PlanTable("Artifacts", ("artifact", "", "time", "bytes", "why"), tuple(rows))


def _trainings(plan: Plan) -> PlanTable:
    made = {artifact.kind for artifact in plan.artifacts if artifact.state != "reused"}
    rows = [
        (STAGES[one.stage].title, f"{one.steps:,}", f"{one.samples:,}", f"{one.seen:.2g} times" if one.seen < 10
         else f"{one.seen:,.0f} times", _sizes(one))
        for one in plan.stages if f"{STAGES[one.stage].table}_lora" in made
    ]  # fmt: skip
    heads = ("training", "steps", "samples", "each picture is seen", "crops of an epoch, px")
    return PlanTable("Trainings", heads, tuple(rows))


def _sizes(one: StagePlan) -> str:
    counts: dict[str, int] = {}
    for count in one.crops:
        name = f"{count.size[0]}x{count.size[1]}"
        counts[name] = counts.get(name, 0) + count.shown
    shown = sorted(counts.items(), key=lambda each: -each[1])
    named = ", ".join(f"{name}: {count:,}" for name, count in shown[:_MOST_SIZES])
    return named + (f" and {many(len(shown) - _MOST_SIZES, 'more size')}" if len(shown) > _MOST_SIZES else "")


def _memory(plan: Plan) -> PlanTable:
    rows = [
        (each.what, size(each.bytes), ", ".join(f"{part.name} {size(part.bytes)}" for part in each.parts))
        for each in plan.memory
    ]
    return PlanTable("Memory, at most", ("", "", "of it"), tuple(rows))

"""What a run would do, as one record: `plan_run`. It changes nothing, and takes seconds."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from deepfloyd_core.arrow import mapped_table
from deepfloyd_core.bundle.planned import FROM_BASE, Starts, index_captions
from deepfloyd_core.config.run import Run
from deepfloyd_core.errors import DeepFloydError, JobError, attempt
from deepfloyd_core.hashing import caption_id
from deepfloyd_core.models.device import Device, device_of
from deepfloyd_core.models.torch_facts import TorchFacts, ask_torch
from deepfloyd_core.planning.calibrated import Amounts
from deepfloyd_core.planning.costs import costs_of
from deepfloyd_core.planning.data import DataLook, SetCount, check_index, count_sets, look_at_data, look_of, why_unknown
from deepfloyd_core.planning.disk import DiskPlan, plan_disk
from deepfloyd_core.planning.fit import fit
from deepfloyd_core.planning.memory import MemoryPlan, cost_requests, plan_memory
from deepfloyd_core.planning.shadow import shadow
from deepfloyd_core.planning.steps import StagePlan, plan_stages, with_counted_steps
from deepfloyd_core.planning.times import Duration, plan_times
from deepfloyd_core.planning.work import ArtifactPlan, MissingModel, models_missing, plan_artifacts
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.text.embeds import CAPTIONS_FILE, older_embeds

_LOOKED_UP = 200_000  # captions that are compared with those of older embeds


@dataclass(frozen=True)
class Plan:
    """What a run would do."""

    sets: tuple[SetCount, ...]  # empty where no picture could be looked at
    changes: tuple[str, ...]  # of the pictures since the last index
    artifacts: tuple[ArtifactPlan, ...]
    stages: tuple[StagePlan, ...]
    captions: int  # texts that T5 has still to encode
    memory: tuple[MemoryPlan, ...]
    device: Device | None  # None: it was not asked for, or torch cannot be used
    disk: DiskPlan
    times: Mapping[str, Duration]  # by the kind of artifact
    missing: tuple[MissingModel, ...] = ()
    ends: tuple[str, ...] = ()  # why a run would end once it has its index
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float | None:
        """Of the whole run; None where it cannot be said of some artifact that takes long."""
        made = [artifact.kind for artifact in self.artifacts if artifact.state != "reused"]
        long = [kind for kind in made if kind.endswith(("_lora", "_embeds", "_samples"))]
        if any(kind not in self.times for kind in long):
            return None
        return sum(each.seconds for each in self.times.values())


def plan_run(run: Run) -> Plan:
    """The plan of a run. Asks torch for the device, and calculates what a step takes where that is not known, both in
    processes of their own. Raises DataError where the pictures cannot make a run.
    """
    with ThreadPoolExecutor(1) as pool, shadow(run) as seen:
        asked = pool.submit(ask_torch, threads=run.config.num_threads)
        return _planned(run, seen, look_at_data(seen), FROM_BASE, asked)


def plan_after_index(run: Run, index: Artifact, starts: Starts = FROM_BASE) -> Plan:
    """The plan of a run that has its index, without what must be asked of torch or calculated: some 0.1 s.

    starts: as `planned`.
    """
    with shadow(run) as seen:
        return _planned(run, seen, look_of(index), starts, None)


def _planned(run: Run, seen: Run, look: DataLook, starts: Starts, asked: "Future[TorchFacts] | None") -> Plan:
    notes, ends = [why_unknown(look)], list[DeepFloydError]()
    sets, stages, of_index = list[SetCount](), list[StagePlan](), None
    if look.index is not None:
        notes += attempt(ends, check_index, seen, look.index) or []
        sets, stages = count_sets(seen, look.index), plan_stages(seen, look.index)
        of_index = index_captions(seen, look.index)
        seen = with_counted_steps(seen, stages)
    missing = models_missing(seen)
    artifacts = plan_artifacts(seen, look, bool(missing), starts, of_index)
    captions = of_index.texts if of_index else []
    requests = cost_requests(seen, stages)
    device, away = _answered(asked, run.config.device)  # before the next line, which would be load while it calibrates
    costs, unknown = costs_of(requests, calculates=asked is not None)
    new = _new_captions(seen, artifacts, captions)
    made = {artifact.kind for artifact in artifacts if artifact.state != "reused"}
    sizes = {stage: request.size for stage, request in requests.items()}
    files, held_out = sum(one.inputs for one in sets), sum(one.held_out for one in sets)
    amounts = Amounts(files, look.to_judge, look.judged_s, sizes, captions, new, held_out)
    disk = plan_disk(run, artifacts, stages, costs, requests, amounts)
    memory = list[MemoryPlan]()
    if device is not None:
        if seen.config.auto_fit:
            found = fit(seen, costs, sizes, device, new)
            seen = found.run
            notes += [f"auto_fit: {line}" for line in found.applied]
        memory = plan_memory(seen, made, new, costs, sizes, device)
    times = plan_times(_in_workspace_of(run, seen), artifacts, stages, costs, amounts, device)
    notes += [*unknown, *away]
    return Plan(
        tuple(sets), look.changes, tuple(artifacts), tuple(stages), new, tuple(memory), device, disk, times,
        tuple(missing), tuple(f"A run would end here. {error}" for error in ends),
        tuple(note for note in notes if note),
    )  # fmt: skip


def _in_workspace_of(run: Run, seen: Run) -> Run:
    """A run as it was seen and fitted, out of its shadow."""
    return replace(seen, config=seen.config.model_copy(update={"workspace": run.config.workspace}))


def _answered(asked: "Future[TorchFacts] | None", name: str) -> tuple[Device | None, list[str]]:
    """The device, and a note where torch cannot be used."""
    if asked is None:
        return None, []
    try:
        return device_of(asked.result(), name), []
    except JobError as error:
        return None, [str(error)]


def _new_captions(run: Run, artifacts: list[ArtifactPlan], captions: list[str]) -> int:
    """How many texts T5 has to encode: those that no older embeds have."""
    embeds = next(artifact for artifact in artifacts if artifact.kind == "text_embeds")
    if embeds.state == "reused":
        return 0
    older = older_embeds(run.workspace, embeds.request) if embeds.request else None
    if older is None or len(captions) > _LOOKED_UP:
        return len(captions)
    known = mapped_table(older.path / CAPTIONS_FILE)["key"].to_numpy()
    keys = np.array([int(caption_id(caption), 16) for caption in captions], np.uint64)
    return int((~np.isin(keys, known)).sum())

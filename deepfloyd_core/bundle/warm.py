"""Where a retraining starts: from the weights of the version that serves, or from the base model, and why.

A stage whose pictures and settings are those of the version that serves keeps that version's training: it is planned
with the start that this training had. So a night without changes finds nothing to do, although the weights are other
ones than the night before. All other stages start from the version that serves, or, for one reason, all from the base.
A start depends on that version alone: a blocked candidate is planned again as it was made, and so is a killed training.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from deepfloyd_core.adapters.lora_file import weights_file
from deepfloyd_core.adapters.start_from import misfit
from deepfloyd_core.bundle.known_pictures import Ledger, Missing, ledger_now, ledger_then, missing
from deepfloyd_core.bundle.planned import FROM_BASE, Starts, planned, planned_bundle
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.errors import ArtifactError, ConfigError, DataError
from deepfloyd_core.models.folders import resolve
from deepfloyd_core.store.artifacts import Artifact, Request, damaged_parts
from deepfloyd_core.store.events import standing
from deepfloyd_core.store.leases import take_lease
from deepfloyd_core.store.versions import (
    Version,
    bundle_of,
    find_version,
    index_of,
    part_of,
    stage_folder,
    trained_parts,
    versions,
)
from deepfloyd_core.training.start import StartSource, make_start, start_kind

_NO_CHAMPION = "from the base, because no version served"


@dataclass(frozen=True)
class Retraining:
    """What a retraining would make, and from which weights."""

    bundle: Request | None  # as `planned_bundle`
    starts: Starts
    words: str  # `from version 3`, `from the base, because cat.jpg was removed`; empty: nobody asked for a warm one


@dataclass(frozen=True)
class _Choice:
    """The sources of each stage's start; or why there are none."""

    sources: Mapping[Stage, StartSource]
    reason: str = ""


def retraining(run: Run, index: Artifact) -> Retraining:
    """Decide what a retraining starts from. Makes the starts, which are links.

    Raises DataError for a removed picture with `honour_removals = refuse`, and what `planned` and `standing` raise.
    """
    if run.config.retrain_mode == "scratch":
        return Retraining(planned_bundle(run, index), FROM_BASE, "")
    number = standing(run.workspace).champion
    if number is None:
        return Retraining(planned_bundle(run, index), FROM_BASE, _NO_CHAMPION)
    try:
        serving = find_version(run.workspace, str(number))
    except ArtifactError as error:
        return Retraining(planned_bundle(run, index), FROM_BASE, _from_base(str(error)))
    starts, words, choice = dict(own_starts(run, serving)), serving.start, None
    requests = planned(run, index, starts)
    for stage in run.config.stages:
        if requests is None:
            return Retraining(None, FROM_BASE, "")
        if requests[_lora(stage)].name in trained_parts(serving):
            continue
        if choice is None:
            choice = _choose(run, index, serving, requests)
            words = _from_base(choice.reason) if choice.reason else f"from version {serving.number}"
        starts.pop(stage, None)
        if source := choice.sources.get(stage):
            starts[stage] = make_start(run.workspace, stage, source)
        requests = planned(run, index, starts)
    return Retraining(requests["lora_bundle"] if requests else None, starts, words)


def own_starts(run: Run, version: Version) -> Starts:
    """What the trainings of a version started from, for a run that retrains from versions."""
    starts: dict[Stage, Artifact] = {}
    for stage in run.config.stages if run.config.retrain_mode == "warm" else ():
        lora = part_of(run.workspace, version, _lora(stage))
        with suppress(ArtifactError, OSError):  # a training whose record is lost is made anew
            kind, _, fingerprint = (lora.inputs if lora else {}).get("start", "").partition("/")
            if kind == start_kind(stage):
                start = Artifact(kind, fingerprint, run.workspace / kind / fingerprint)
                take_lease(run.workspace, start.name)
                if not any(damaged_parts(start)):
                    starts[stage] = start
    return starts


def _choose(run: Run, index: Artifact, serving: Version, requests: Mapping[str, Request]) -> _Choice:
    """The version that serves as a start, or why it cannot be one."""
    try:
        bundle, then = bundle_of(run.workspace, serving), _ledger(run, serving)
        if reason := _misfit(run, serving, bundle, requests):
            return _Choice({}, reason)
    except (ArtifactError, ConfigError, OSError, ValueError) as error:  # pyarrow's errors are the last two
        return _Choice({}, f"version {serving.number} cannot be started from: {error}")
    if gone := missing(then, ledger_now(run, index), run.config.stages):
        return _Choice({}, _reason(run, serving, gone))
    known = versions(run.workspace)
    sources = {}
    for stage in run.config.stages:
        lora = part_of(run.workspace, serving, _lora(stage))
        first = min(one.number for one in known if lora and lora.name in trained_parts(one))
        sources[stage] = StartSource(bundle, stage_folder(bundle.path, stage), first, then.known(stage))
    return _Choice(sources)


def _ledger(run: Run, serving: Version) -> Ledger:
    """The pictures that a version was made from, which no `gc` takes now."""
    for artifact in (index_of(run.workspace, serving), part_of(run.workspace, serving, "eval_set")):
        if artifact is not None:
            take_lease(run.workspace, artifact.name)
    return ledger_then(run.workspace, serving)


def _reason(run: Run, serving: Version, gone: Missing) -> str:
    """Why a training may not know what the version knows. Raises DataError where it is to end then."""
    if gone.taken_out and run.config.honour_removals == "refuse":
        raise DataError(
            f"{gone.taken_out}, and version {serving.number}, which serves, was trained on that. honour_removals is refuse, "
            "so nothing is trained from it. Set honour_removals = base to start from the base model, or undo the change."
        )
    return gone.taken_out or gone.left


def _misfit(run: Run, serving: Version, bundle: Artifact, requests: Mapping[str, Request]) -> str:
    """Why the settings cannot go on from a version's weights, or its pictures are not known; empty: they can."""
    for stage in run.config.stages:
        title, config = STAGES[stage].title, run.config.stage(stage)
        lora = part_of(run.workspace, serving, _lora(stage))
        if lora is None:
            return f"version {serving.number} has no {title}"
        of_version = f"{title} of version {serving.number}"
        if "parent" in lora.inputs:
            return f"{of_version} started from weights of init_lora, whose pictures are not known"
        if lora.inputs["model"] != requests[_lora(stage)].inputs["model"]:
            return f"{of_version} belongs to another base model"
        file = weights_file(stage_folder(bundle.path, stage), of_version)
        if fault := misfit(config, file, resolve(config.model, stage)):
            return f"the settings do not fit {of_version}, {fault.partition('. ')[0]}"
    return ""


def _from_base(reason: str) -> str:
    return f"from the base, because {' '.join(reason.split()).removesuffix('.')}"


def _lora(stage: Stage) -> str:
    return f"{STAGES[stage].table}_lora"

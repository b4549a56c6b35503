"""Which artifacts a run would reuse, go on with or make, and why."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deepfloyd_core.bundle.planned import Captions, Starts, planned
from deepfloyd_core.config.flavours import RANDOM
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.crops.identity import eval_request, pixels_request
from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.models.folders import folder_here
from deepfloyd_core.models.sizes import download_bytes, random_bytes
from deepfloyd_core.planning.data import DataLook
from deepfloyd_core.store.artifacts import Artifact, Request, damaged_parts, find, newest_record
from deepfloyd_core.store.changes import changes
from deepfloyd_core.store.manifest import MANIFEST
from deepfloyd_core.store.working_state import REQUEST
from deepfloyd_core.text.projection import text_is_frozen

State = Literal["reused", "continued", "made"]
_FIRST = "there is none yet"


@dataclass(frozen=True)
class ArtifactPlan:
    """What a run does for one of its artifacts."""

    kind: str
    state: State
    why: tuple[str, ...]  # in the user's words; empty for what is reused
    request: Request | None  # None: its identity is not known yet


@dataclass(frozen=True)
class MissingModel:
    """A base model that is not on this machine."""

    name: str
    bytes: int  # about what its files take; 0: not known without the hub
    is_random: bool  # it is written, not downloaded


def plan_artifacts(
    run: Run, look: DataLook, lacks_models: bool, starts: Starts, captions: Captions | None
) -> list[ArtifactPlan]:
    """The artifacts of a run in the order in which it makes them. run: with its steps counted, in its shadow;
    lacks_models: see `models_missing`; captions: of the index, if there is one.
    """
    index = _planned(run, look.request, look.is_made) if look.request else _unknown("image_index")
    if index.state != "reused" and look.changes:
        index = ArtifactPlan(index.kind, index.state, look.changes, index.request)
    if not look.is_current or look.index is None:
        return [index, *(_unknown(kind) for kind in kinds_of(run))]
    if lacks_models:
        crops = _of_pictures(run, look.index)
        return [
            index,
            *(_planned(run, crops[kind]) if kind in crops else _without_model(run, kind) for kind in kinds_of(run)),
        ]
    requests = planned(run, look.index, starts, _here, captions)
    assert requests is not None  # the steps are counted
    order = kinds_of(run)
    rest = sorted(requests.values(), key=lambda request: order.index(request.kind))
    return [index, *(_planned(run, request) for request in rest)]


def _of_pictures(run: Run, index: Artifact) -> dict[str, Request]:
    """The requests of the crops, for which no model is needed, by their kind."""
    pixels = [pixels_request(run, index, stage) for stage in run.config.stages]
    return {request.kind: request for request in [*pixels, eval_request(run, index)]}


def kinds_of(run: Run) -> list[str]:
    """The kinds of artifacts after the index, in the order in which a run makes them."""
    pixels = [f"{STAGES[stage].table}_pixels" for stage in run.config.stages]
    kinds = [*pixels, "eval_set"]
    if run.config.paired_stage is not None:
        kinds += [f"{STAGES[run.config.paired_stage].table}_conditioning", "eval_conditioning"]
    kinds.append("text_embeds")
    for stage in run.config.stages:
        table, config = STAGES[stage].table, run.config.stage(stage)
        kinds += [f"{table}_text"] if text_is_frozen(config) else []
        kinds += [f"{table}_low_res"] if STAGES[stage].is_upscaler and config.remakes_low_res else []
        kinds.append(f"{table}_lora")
    return [*kinds, "cascade_samples", "lora_bundle"]


def _without_model(run: Run, kind: str) -> ArtifactPlan:
    """What is made with a model that is not here: its identity is not known."""
    is_first = not any((run.workspace / kind).glob(f"*/{MANIFEST}"))
    return ArtifactPlan(kind, "made", (_FIRST if is_first else "its model is not on this machine",), None)


def _here(model: str, stage: Stage, text: bool) -> Path:
    """The folder of a model that is on this machine: what is newer on the hub is not downloaded for a plan."""
    folder = folder_here(model, stage, text)
    assert folder is not None  # `models_missing`
    return folder


def models_missing(run: Run) -> list[MissingModel]:
    """The base models that are not on this machine, each once."""
    found: dict[str, MissingModel] = {}
    for stage in run.config.stages:
        config, text = run.config.stage(stage), stage == run.config.first_stage
        if folder_here(config.model, stage, text) is not None or config.model in found:
            continue
        is_random = config.model.startswith(RANDOM)
        is_own = config.pretrained_model_name_or_path is not None
        coming = random_bytes(config.model, text) if is_random else download_bytes(config.model_flavour, text)
        found[config.model] = MissingModel(config.model, 0 if is_own else coming, is_random)
    return list(found.values())


def _planned(run: Run, request: Request, is_made: bool | None = None) -> ArtifactPlan:
    """is_made: whether it is finished; None: as it is found."""
    artifact = find(run.workspace, request) if is_made is not False else None
    if artifact is not None:
        damage = tuple(damaged_parts(artifact))
        return ArtifactPlan(request.kind, "made" if damage else "reused", damage, request)
    if (run.workspace / request.kind / request.fingerprint / REQUEST).exists() and is_made is None:
        return ArtifactPlan(request.kind, "continued", ("an earlier run was stopped",), request)
    return ArtifactPlan(request.kind, "made", _why(run.workspace, request), request)


def _why(workspace: Path, request: Request) -> tuple[str, ...]:
    try:
        before = newest_record(workspace, request)
    except (ArtifactError, OSError):
        return ("the last one is damaged",)
    return (_FIRST,) if before is None else tuple(changes(request.kind, before, request.record))


def _unknown(kind: str) -> ArtifactPlan:
    return ArtifactPlan(kind, "made", ("pictures are new or changed",), None)

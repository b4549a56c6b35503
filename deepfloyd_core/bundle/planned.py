"""The bundle that a run would make, before anything is made: its identity follows from the index and the settings.

It makes the same requests as the tasks, in the order of `flows.dag`; the inputs of a request are earlier requests. It
reads the index's captions and the model's files (of a hub snapshot only their names); it decodes and loads nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from deepfloyd_core.adapters.start_from import find_parent
from deepfloyd_core.bundle.identity import BundleInputs, bundle_request
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.crops.identity import conditioning_request, eval_request, pixels_request
from deepfloyd_core.crops.rows import HELD_OUT_FILE, ROWS_FILE
from deepfloyd_core.index.ledger import caption_counts
from deepfloyd_core.models.folders import resolve
from deepfloyd_core.sampling.identity import low_res_request, samples_request
from deepfloyd_core.sampling.jobs import LowResInputs, SampleInputs, lora_fields
from deepfloyd_core.store.artifacts import Artifact, Request, damaged_parts, find
from deepfloyd_core.store.reuse import is_as_recorded
from deepfloyd_core.text.embeds import embeds_request, run_captions
from deepfloyd_core.text.projection import text_is_frozen, text_request
from deepfloyd_core.training.epochs import with_steps
from deepfloyd_core.training.identity import lora_request
from deepfloyd_core.training.jobs import TrainingInputs
from deepfloyd_core.types import Identity

Starts = Mapping[
    Stage, Artifact
]  # what the warm training of a stage starts from; a stage without one: from the base model
Resolver = Callable[[str, Stage, bool], Path]  # of a model, its stage, and whether its text encoder is needed
FROM_BASE: Starts = MappingProxyType({})


class Captions(NamedTuple):
    """The captions of an index, which take a second a million."""

    counts: Mapping[str, int]  # as `caption_counts`
    texts: list[str]  # as `run_captions`


def index_captions(run: Run, index: Artifact) -> Captions:
    """The captions of a run's index."""
    counts = caption_counts(index)
    return Captions(counts, run_captions(run, counts))


def sample_prompts(run: Run, index: Artifact) -> list[str]:
    """The validation prompts, or the most frequent caption (the first by alphabet among equals)."""
    return list(run.config.prompts) or [_most_frequent(caption_counts(index))]


def _most_frequent(counts: Mapping[str, int]) -> str:
    most = max(counts.values())
    return min(caption for caption, count in counts.items() if count == most)


def planned_bundle(run: Run, index: Artifact, starts: Starts = FROM_BASE) -> Request | None:
    """The bundle that `flows.finetune` would publish for an index. None and errors: as `planned`."""
    requests = planned(run, index, starts)
    return requests["lora_bundle"] if requests else None


def planned(
    run: Run, index: Artifact, starts: Starts = FROM_BASE, resolve: Resolver = resolve, captions: Captions | None = None
) -> dict[str, Request] | None:
    """The artifact of each kind that `flows.finetune` would make from an index, by its kind. resolve: finds a model;
    captions: as `index_captions`, where they are known.

    None if epochs are counted in crops that are lost or damaged. Raises what the tasks raise before they make anything,
    e.g. ModelError for a missing model.
    """
    folders = {stage: resolve(run.config.stage(stage).model, stage, False) for stage in run.config.stages}
    first = run.config.first_stage
    encoder = resolve(run.config.stage(first).model, first, True)
    counts, texts = captions or index_captions(run, index)
    embeds = embeds_request(run, texts, encoder)
    held_out, prompts = eval_request(run, index), list(run.config.prompts) or [_most_frequent(counts)]
    requests = [embeds, held_out]
    conditioning = eval_conditioning = None
    if run.config.paired_stage is not None:
        conditioning = conditioning_request(run, index, pixels_request(run, index, run.config.paired_stage))
        eval_conditioning = conditioning_request(run, index, held_out)
    loras: dict[Stage, Request] = {}
    for stage, folder in folders.items():
        pixels, config, source = pixels_request(run, index, stage), run.config.stage(stage), STAGES[stage].upscales
        frozen = text_is_frozen(config)
        text = text_request(run, stage, folder, embeds) if frozen else embeds
        inputs = TrainingInputs[Identity](pixels=pixels, text=text, eval_set=held_out, start=starts.get(stage))
        if config.paired:
            inputs = replace(inputs, conditioning=conditioning, eval_conditioning=eval_conditioning)
        if source is not None and config.remakes_low_res:
            remade_from = LowResInputs(pixels=pixels, stage1_lora=loras[source], text_embeds=embeds)
            inputs = replace(inputs, low_res=low_res_request(run, stage, folders[source], remade_from))
        counted = _with_steps(run, stage, pixels, held_out)
        if counted is None:
            return None
        parent = find_parent(run, stage, folder)
        loras[stage] = lora_request(counted, stage, folder, inputs, prompts, parent.pinned.sha256 if parent else None)
        requests += [*(each for each in inputs.by_field.values() if isinstance(each, Request)), loras[stage]]
    sampled_from = SampleInputs(
        text_embeds=embeds,
        eval_set=held_out,
        conditioning=conditioning,
        eval_conditioning=eval_conditioning,
        **lora_fields(loras),
    )
    samples = samples_request(run, prompts, folders, sampled_from)
    bundled = BundleInputs[Identity](image_index=index, cascade_samples=samples, **lora_fields(loras))
    bundle = bundle_request(bundled)
    return {request.kind: request for request in [*requests, samples, bundle]}


def _with_steps(run: Run, stage: Stage, pixels: Request, held_out: Request) -> Run | None:
    """`epochs.with_steps` for crops that are known by their requests alone; None if these cannot be read."""
    if run.config.stage(stage).num_train_epochs is None:
        return run
    crops, eval_set = _readable(run, pixels, ROWS_FILE), _readable(run, held_out, HELD_OUT_FILE)
    return with_steps(run, stage, crops, eval_set) if crops and eval_set else None


def _readable(run: Run, request: Request, name: str) -> Artifact | None:
    """The artifact of a request; None if it is not finished, or a file of it has changed since it was written."""
    artifact = find(run.workspace, request)
    whole = artifact and not any(damaged_parts(artifact)) and is_as_recorded(artifact.path / name, artifact.hashes)
    return artifact if whole else None

"""Identities of crops: which pictures and settings decide the bytes of a stage's pixels, of the eval set, and of pairs.

The inputs of these artifacts do not contain the index's fingerprint. They contain a digest of the index rows that the
artifact is made from. So the crops of a stage stay valid when a picture that only the other stage can use, a rejected
file or the other stage itself is added or removed. Costs one pass over the ledger for the held-out pictures; the
digests of the training pictures are in the index's summary.
"""

import pyarrow as pa
import pyarrow.compute as pc

from deepfloyd_core.arrow import table_digest
from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.config.keys import Reader, read_by
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import CONTROLLED, Stage
from deepfloyd_core.crops.eval_choice import EVAL_FORMAT, choose_held_out, chosen_pictures, held_out_pictures
from deepfloyd_core.crops.pixels import FORMAT
from deepfloyd_core.files import canonical_json, sha256_bytes
from deepfloyd_core.index.ledger import PAIR, PICTURE, ledger_batches
from deepfloyd_core.index.summary import IndexSummary
from deepfloyd_core.store.artifacts import Artifact, Request
from deepfloyd_core.types import Identity, Json

# The kind of the pairs that belong to pixels or to the eval set.
KINDS = {
    "eval_set": "eval_conditioning",
    **{f"stage{stage}_pixels": f"stage{stage}_conditioning" for stage in CONTROLLED},
}


def pixels_request(run: Run, index: Artifact, stage: Stage) -> Request:
    """Identity of a stage's pixels: the pictures that feed it, how they are cropped, and how rows are cut into files."""
    spec = {
        "stage": stage,
        "seed": run.config.seed,
        "shard_mib": run.config.shard_mib,
        **_cropped(run, stage, "pixels"),
    }
    kind = f"stage{stage}_pixels"
    return Request(kind, FORMAT, spec, {"pictures": index.summary(IndexSummary).rows[kind]})


def eval_request(run: Run, index: Artifact) -> Request:
    """Identity of the eval set: the chosen pictures of each stage, their cropping settings, and all held-out pictures.
    Raises DataError as `choose_held_out`.
    """
    chosen, out = chosen_pictures(run, index, PICTURE), _held_out(run, index)
    spec: Json = {"seed": run.config.seed}
    inputs: dict[str, str] = {}
    for stage in run.config.stages:
        spec[f"stage{stage}"] = _cropped(run, stage, "eval_set")
        inputs[f"stage{stage}_pictures"] = _digest(run, stage, chosen)
        inputs[f"stage{stage}_held_out"] = table_digest([out[stage]])
    return Request("eval_set", EVAL_FORMAT, spec, inputs)


def eval_identity(eval_set: Identity, stage: Stage) -> str:
    """The identity of the part of an eval set that a stage's training reads, without the parts of other stages."""
    own = {name: value for name, value in eval_set.inputs.items() if name.startswith(f"stage{stage}_")}
    record = {"seed": eval_set.spec["seed"], "crops": eval_set.spec[f"stage{stage}"], **own}
    return sha256_bytes(canonical_json(record).encode())[:16]


def conditioning_request(run: Run, index: Artifact, pictures: Identity) -> Request:
    """Identity of the pairs of a stage's pixels or of its eval set: those crops, and the pictures' pairs."""
    kind, stage = KINDS[pictures.kind], run.config.paired_stage
    assert stage is not None  # else there are no pairs
    if pictures.kind == "eval_set":
        pairs, crops = _digest(run, stage, chosen_pictures(run, index, PAIR)), eval_identity(pictures, stage)
    else:
        pairs, crops = index.summary(IndexSummary).rows[kind], pictures.name
    return Request(kind, FORMAT, {}, {"pairs": pairs, "pictures": crops})


def _fed(run: Run, stage: Stage) -> list[ImageDataset]:
    """The data sets that feed a stage, by name: their order in the data file has no meaning."""
    return sorted((dataset for dataset in run.datasets if dataset.factor(stage)), key=lambda dataset: dataset.id)


def _cropped(run: Run, stage: Stage, reader: Reader) -> Json:
    """The settings that decide a stage's crops, with the keys of each data set that feeds it."""
    return {
        "aspect_bucket_alignment": run.config.aspect_bucket_alignment,
        "aspect_bucket_rounding": run.config.aspect_bucket_rounding,
        "datasets": {dataset.id: read_by(dataset, reader) for dataset in _fed(run, stage)},
    }


def _digest(run: Run, stage: Stage, chosen: pa.Table) -> str:
    """A digest of the chosen pictures from the data sets that feed a stage."""
    return table_digest(chosen.filter(pc.equal(chosen["dataset_id"], dataset.id)) for dataset in _fed(run, stage))


def _held_out(run: Run, index: Artifact) -> dict[Stage, pa.Table]:
    """For each stage the pictures that feed it but are not trained on, by name, each once."""
    out = held_out_pictures(index, choose_held_out(run, index))
    found: dict[Stage, list[pa.Array]] = {stage: [] for stage in run.config.stages}
    reasons = [f"stage{stage}_reason" for stage in run.config.stages]
    for batch in ledger_batches(index, ["image_id", *reasons]) if len(out) else ():
        rows = batch.filter(pc.is_in(batch["image_id"], out))
        for stage, reason in zip(run.config.stages, reasons, strict=True):
            found[stage] += rows["image_id"].filter(pc.is_null(rows[reason])).chunks
    ids = {stage: pc.unique(pa.chunked_array(chunks, pa.string())) for stage, chunks in found.items()}
    return {stage: pa.table({"image_id": names.take(pc.sort_indices(names))}) for stage, names in ids.items()}

"""The index's identity: which files, captions and settings decide it."""

from contextlib import suppress
from dataclasses import replace

import pyarrow as pa

from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.config.keys import read_by
from deepfloyd_core.config.run import Run
from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.index.scan import data_digest, has_heif
from deepfloyd_core.index.summary import IndexSummary
from deepfloyd_core.sources.picture_bytes import HAS_HEIF
from deepfloyd_core.store.artifacts import Request, find
from deepfloyd_core.types import Json

FORMAT = 13
MORE_TIME = "decode_timeout_s"  # in the spec of an index that gives late pictures more time


def index_request(run: Run, found: pa.Table) -> Request:
    """The index's identity: the bytes and captions of the scanned files, and the settings that judge them.

    If pictures of the index took too long, a longer `decode_timeout_s` gives another identity.
    """
    request = Request("image_index", FORMAT, index_spec(run, found), {"data": data_digest(found)})
    before, summary = find(run.workspace, request), None
    with suppress(ArtifactError):  # of a damaged one nothing is known, and it is made again
        summary = before.summary(IndexSummary) if before else None
    if summary is None or "timeout" not in summary.reasons or summary.decode_timeout_s >= run.config.decode_timeout_s:
        return request
    # What took too long then is tried with more time; an index without such rows is the same for any time.
    return replace(request, spec=request.spec | {MORE_TIME: run.config.decode_timeout_s})


def index_spec(run: Run, found: pa.Table) -> Json:
    return {
        "datasets": {dataset.id: _index_spec(run, dataset) for dataset in run.datasets},
        "stages": list(run.config.stages),
        "aspect_bucket_alignment": run.config.aspect_bucket_alignment,
        "aspect_bucket_rounding": run.config.aspect_bucket_rounding,
        "decode_memory_mib": run.config.decode_memory_mib,
        "reads_heif": HAS_HEIF and has_heif(found),  # who installs it runs again, and they are judged
    }


def _index_spec(run: Run, dataset: ImageDataset) -> Json:
    spec = read_by(dataset, "index")
    if dataset.parquet is not None:
        spec["parquet"]["path"] = None  # its captions are in the data
    if dataset.max_num_samples is not None or (dataset.caption_shuffle and dataset.caption_shuffle.enable):
        spec["seed"] = run.config.seed
    if run.pairs_of(dataset) is not None:
        spec["paired"] = True  # which they are is in the data
    return spec | {"faces": dataset.crop and dataset.crop_style == "face"}

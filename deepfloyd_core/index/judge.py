"""The verdict on a picture's bytes, made in a child process, and the ledger's row made from the verdict and the captions."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.index.captions import finished_captions, missing_caption
from deepfloyd_core.index.ledger import Row, StageReasons
from deepfloyd_core.index.looks import sight_of
from deepfloyd_core.index.pairs import check_pair, missing_pair
from deepfloyd_core.pictures.decode import check_decodes, check_fits, decode_rgb, read_header
from deepfloyd_core.pictures.faces import find_face
from deepfloyd_core.pictures.faults import Unreadable
from deepfloyd_core.pictures.geometry import REASONS, geometry, judge_sizes
from deepfloyd_core.sources.source import read_again

SIZE_REASONS = (
    "aspect_out_of_range",
    "too_small",
    "not_for_this_stage",
)  # in order of precedence: why a stage cannot use a size


@dataclass(frozen=True)
class Entry:
    """One row of the scan."""

    dataset_id: str
    source: str
    bytes: int
    sha256: str | None
    captions: tuple[str, ...] | None
    reason: str | None
    detail: str | None = None  # of the reason, or why a caption that is there cannot be read
    conditioning: tuple[str, ...] | None = None  # the names that its pair may have; None: there is none
    conditioning_id: str | None = None  # sha256 of its pair, if there is one that can be read


@dataclass(frozen=True)
class Verdict(StageReasons):
    """Facts from a picture's bytes. `reason`: it cannot be used at all."""

    format: str | None = None
    width: int | None = None
    height: int | None = None
    face: list[int] | None = None
    reason: str | None = None
    detail: str | None = None
    note: str | None = None  # what is odd about the file, whatever becomes of it
    look: bytes | None = None  # from a child its sight (see `looks`)


def judge(run: Run, dataset: ImageDataset, entry: Entry, verdict: Verdict) -> Row:
    """The ledger's row of one file whose bytes have the verdict `verdict`."""
    captions = finished_captions(dataset, entry.captions, run.config.seed)
    reason, detail = verdict.reason, verdict.detail
    if reason is None:
        reason, detail = _unfit(run, verdict)
    if reason is None and not captions:
        reason, detail = "caption_missing", entry.detail or missing_caption(dataset, entry.source, entry.captions)
    names = tuple(entry.conditioning or ())
    if reason is None and run.pairs_of(dataset) is not None:
        reason, detail = missing_pair(names, entry.conditioning_id)
    found = {key: value for key, value in vars(verdict).items() if key not in ("reason", "detail")}
    return Row(
        source=entry.source, dataset_id=entry.dataset_id, status="rejected" if reason else "accepted", reason=reason,
        detail=detail, image_id=entry.sha256, bytes=entry.bytes, captions=captions,
        conditioning=names[0] if len(names) == 1 else None, conditioning_id=entry.conditioning_id, **found,
    )  # fmt: skip


def look(run: Run, dataset: ImageDataset, entry: Entry) -> Verdict:
    """Judge a picture's bytes: header, size, one decode, the face if crops are placed by it, and the bytes of its pair."""
    if entry.reason is not None:
        return refused(entry.reason, entry.detail)
    try:
        data = read_again(dataset, entry.source, entry.sha256)
    except OSError as error:
        return refused("unreadable", str(error))
    if data is None:
        return refused("changed_while_reading")
    known: dict[str, Any] = {}
    try:
        header = read_header(data)
        known = {"format": header.format, "width": header.size[0], "height": header.size[1]}
        check_fits(header.size, run.config.decode_memory_mib)
        known |= {f"stage{stage}_reason": _size_reason(run, dataset, stage, header.size) for stage in STAGES}
        if all(known[f"stage{stage}_reason"] for stage in run.config.stages):
            return Verdict(**known)
        glance = check_decodes(data)
        known |= {"look": sight_of(glance), "note": glance.note}
        if dataset.crop and dataset.crop_style == "face":
            known["face"] = find_face(decode_rgb(data))
        pairs = run.pairs_of(dataset)
        if pairs is not None and entry.conditioning and entry.conditioning_id:
            check_pair(pairs, entry.conditioning[0], entry.conditioning_id, header.size, run.config.decode_memory_mib)
    except Unreadable as error:
        return refused(error.reason, str(error), known)
    return Verdict(**known)


def _unfit(run: Run, verdict: Verdict) -> tuple[str | None, str | None]:
    """Why no stage of the run can use a picture of this size, and the detail; None if a stage can."""
    whys = [verdict.unfit(stage) for stage in run.config.stages]
    if not all(whys) or not verdict.width or not verdict.height:
        return None, None
    why = next(reason for reason in SIZE_REASONS if reason in whys)
    aspect = f", aspect {verdict.width / verdict.height:.3g}" if why == "aspect_out_of_range" else ""
    return why, f"{verdict.width}x{verdict.height} px{aspect}"


def refused(reason: str, detail: str | None = None, known: dict[str, Any] | None = None) -> Verdict:
    unfit = dict.fromkeys((f"stage{stage}_reason" for stage in STAGES), reason)
    return Verdict(**{**(known or {}), "reason": reason, "detail": detail, **unfit})


def _size_reason(run: Run, dataset: ImageDataset, stage: Stage, size: tuple[int, int]) -> str | None:
    rules = geometry(run.config, dataset, stage)
    if rules is None:
        return "not_for_this_stage"
    return REASONS[int(judge_sizes(np.array([size]), rules)[0])]

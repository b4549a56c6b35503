"""The image index: every input file ends as exactly one row of the ledger, accepted or with one named reason.

The scan names the data; here each file's header, size, decode and captions are judged, in blocks that a killed run keeps.
What an older index of the same settings said of the same bytes is taken over, so 1 % new pictures cost 1 % of the decoding.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from deepfloyd_core.artifacts import Artifact, Request, WorkDir, finish_part, newest, part_is_whole
from deepfloyd_core.captions import finished_captions
from deepfloyd_core.children import Children, Limits, Lost
from deepfloyd_core.config import Run
from deepfloyd_core.datafile import ImageDataset, Place
from deepfloyd_core.draws import hash_units, image_keys
from deepfloyd_core.faces import find_face
from deepfloyd_core.files import atomic_path
from deepfloyd_core.flavours import Stage
from deepfloyd_core.geometry import REASONS, geometry, judge_sizes
from deepfloyd_core.ledger import BEYOND, INDEX_FILE, SCHEMA, CaptionCounts, Row, count_captions, count_rows, schema
from deepfloyd_core.pairs import PAIR_REASONS, check_pair, missing_pair
from deepfloyd_core.pictures import Unreadable, check_decodes, decode_rgb, decode_what_is_there, read_header
from deepfloyd_core.rejected import Rejected, choose, draw
from deepfloyd_core.scan import data_digest, others_of
from deepfloyd_core.sheets import save_picture
from deepfloyd_core.sources import read_again
from deepfloyd_core.types import Report, no_report

log = logging.getLogger(__name__)

FORMAT = 5  # 4: `rejected.png`. 5: counts of other files and of captions
BLOCK = 4096  # pictures judged, and kept by a killed run, at once
SHEET, SHEET_CELL_PX = "rejected.png", 144
# Settings of a data set that change nothing in its index.
_NOT_IN_INDEX = {
    *Place.model_fields, "dataset_type", "disabled", "disable", "repeats", "text_embeds", "probability", "start_step",
    "end_step", "crop_style", "conditioning_data",
}  # fmt: skip
# What a picture's bytes and the settings alone decide. Other reasons are judged anew: they may have gone away.
_LASTING = (
    "too_small", "aspect_out_of_range", "not_for_this_stage", "unsupported", "corrupt", "truncated", "decompression_bomb",
    "conditioning_aspect",
)  # fmt: skip
# Rejected pictures that are safe to decode for the sheet: what is said of the others is that they harm, or change.
_SHOWN = (
    "too_small", "aspect_out_of_range", "not_for_this_stage", "corrupt", "truncated", "caption_missing", *PAIR_REASONS,
)  # fmt: skip
# Said of pictures whose bytes are good.
_BESIDE = ("caption_missing", "conditioning_missing", "conditioning_ambiguous", BEYOND)
_NOT_IN_VERDICT = {
    "max_num_samples", "caption_strategy", "parquet", "disable_multiline_split", "instance_prompt",
    "prepend_instance_prompt", "only_instance_prompt", "caption_filter_list", "caption_shuffle", "seed",
}  # fmt: skip


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
class Verdict:
    """What was found in a picture's bytes. `reason`: it cannot be used at all."""

    format: str | None = None
    width: int | None = None
    height: int | None = None
    face: list[int] | None = None
    reason: str | None = None
    detail: str | None = None
    stage1_reason: str | None = None
    stage2_reason: str | None = None


def index_request(run: Run, found: pa.Table) -> Request:
    """The index's identity: the bytes and captions of the scanned files, and the settings that judge them."""
    return Request("image_index", FORMAT, _spec(run), {"data": data_digest(found)})


def _spec(run: Run) -> dict[str, Any]:
    return {
        "datasets": {dataset.id: _index_spec(run, dataset) for dataset in run.datasets},
        "stages": list(run.config.stages),
        "aspect_bucket_alignment": run.config.aspect_bucket_alignment,
        "aspect_bucket_rounding": run.config.aspect_bucket_rounding,
    }


def _index_spec(run: Run, dataset: ImageDataset) -> dict[str, Any]:
    spec = dataset.model_dump(mode="json", exclude=_NOT_IN_INDEX)
    if dataset.parquet is not None:
        spec["parquet"]["path"] = None  # its captions are in the data
    if dataset.max_num_samples is not None or (dataset.caption_shuffle and dataset.caption_shuffle.enable):
        spec["seed"] = run.config.seed
    if run.pairs_of(dataset) is not None:
        spec["paired"] = True  # which they are is in the data
    return spec | {"faces": dataset.crop and dataset.crop_style == "face"}


def judges(run: Run) -> Children:
    """The child processes in which pictures are judged, with the run's limits."""
    limits = Limits(run.config.decode_memory_mib, run.config.decode_timeout_s)
    return Children(run.config.workers, limits, (__name__,))


def build_index(
    run: Run, found: pa.Table, children: Children, work: WorkDir, report: Report = no_report
) -> dict[str, Any]:
    """Judge every scanned file and write the ledger. Returns counts by status and reason."""
    older, place = _older_verdicts(run, found, work.path.parents[1])
    parts = [work.path / f".ledger-{start:09d}.parquet" for start in range(0, len(found), BLOCK)]
    for number, part in enumerate(parts):
        block = slice(number * BLOCK, (number + 1) * BLOCK)
        if not part_is_whole(part):
            entries = [Entry(**row) for row in found[block].to_pylist()]
            old, is_known = older.take(place[block]).to_pylist(), place[block].is_valid().to_pylist()
            known = [Verdict(**row) if valid else None for row, valid in zip(old, is_known, strict=True)]
            rows = _judge_block(run, entries, known, children)
            with atomic_path(part) as tmp:
                pq.write_table(pa.Table.from_pylist([vars(row) for row in rows], schema=schema(run.config.paired)), tmp)
            finish_part(part)
        report(min(block.stop, len(found)), len(found), "pictures judged")
    beyond = np.zeros(len(found), bool)
    for dataset in run.datasets:
        if dataset.max_num_samples is not None:
            beyond |= _beyond(parts, dataset.id, dataset.max_num_samples, run.config.seed)
    captions: CaptionCounts = {}
    with atomic_path(work.path / INDEX_FILE) as tmp, pq.ParquetWriter(tmp, schema(run.config.paired)) as writer:
        for number, part in enumerate(parts):
            rows = _left_out(pq.read_table(part), beyond[number * BLOCK : (number + 1) * BLOCK])
            count_captions(rows, captions)
            writer.write_table(rows)
    before = len(place) - place.null_count
    readable = len(found) - found["sha256"].null_count
    summary = count_rows(work.path / INDEX_FILE)
    _save_rejected(run, summary["rejected"] - summary["reasons"].get(BEYOND, 0), work.path, children)
    return summary | {
        "judged_now": readable - before,
        "judged_before": before,
        "captions_per_picture": captions,
        "other_files": others_of(found),
    }


def sample_order(image_ids: Iterable[str], seed: int) -> np.ndarray:
    """The places of pictures in the order in which a few of them are taken: by a hash, so that it stays as pictures come."""
    keys = image_keys(image_ids)
    return np.argsort(hash_units("sample", seed, keys, np.zeros(len(keys), np.int64)), kind="stable")


def judge(run: Run, dataset: ImageDataset, entry: Entry, verdict: Verdict) -> Row:
    """The ledger's row of one file, of which its bytes said `verdict`."""
    captions = finished_captions(dataset, entry.captions, run.config.seed)
    reason, detail = verdict.reason, verdict.detail
    if reason is None and not captions:
        reason, detail = "caption_missing", entry.detail
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
    """Judge a picture's bytes: header, size, one decode, the face if crops are placed by it, and those of its pair."""
    if entry.reason is not None:
        return _refused(entry.reason, entry.detail)
    try:
        data = read_again(dataset, entry.source, entry.sha256)
    except OSError as error:
        return _refused("unreadable", str(error))
    if data is None:
        return _refused("changed_while_reading")
    known: dict[str, Any] = {}
    try:
        header = read_header(data)
        known = {"format": header.format, "width": header.size[0], "height": header.size[1]}
        reasons = {stage: _size_reason(run, dataset, stage, header.size) for stage in (1, 2)}
        whys = [reason for stage, reason in reasons.items() if stage in run.config.stages]
        if all(whys):
            why = next(
                reason for reason in ("aspect_out_of_range", "too_small", "not_for_this_stage") if reason in whys
            )
            aspect = f", aspect {header.size[0] / header.size[1]:.3g}" if why == "aspect_out_of_range" else ""
            return _refused(why, f"{header.size[0]}x{header.size[1]} px{aspect}", known)
        check_decodes(data)
        if dataset.crop and dataset.crop_style == "face":
            known["face"] = find_face(decode_rgb(data))
        pairs = run.pairs_of(dataset)
        if pairs is not None and entry.conditioning and entry.conditioning_id:
            check_pair(pairs, entry.conditioning[0], entry.conditioning_id, header.size)
    except Unreadable as error:
        return _refused(error.reason, str(error), known)
    return Verdict(**known, stage1_reason=reasons[1], stage2_reason=reasons[2])


def _judge_block(run: Run, entries: list[Entry], known: list[Verdict | None], children: Children) -> list[Row]:
    """The rows of some files; what is not known of them is looked up in child processes, which a picture may kill."""
    datasets = {dataset.id: dataset for dataset in run.datasets}
    unknown = [(run, datasets[entry.dataset_id], entry) for entry, verdict in zip(entries, known, strict=True)
               if verdict is None]  # fmt: skip
    looked = (_verdict(answer) for answer in children.map(_look, unknown))
    verdicts = [next(looked) if verdict is None else verdict for verdict in known]
    return [
        judge(run, datasets[entry.dataset_id], entry, verdict) for entry, verdict in zip(entries, verdicts, strict=True)
    ]


def _save_rejected(run: Run, count: int, out: Path, children: Children) -> None:
    """Draw a few of the `count` rejected files; no file when there are none. Decodes at most those that it shows."""
    (out / SHEET).unlink(missing_ok=True)  # an interrupted build may have found others
    if not count:
        return
    rows = choose(out / INDEX_FILE, not_wanted=BEYOND)
    datasets = {dataset.id: dataset for dataset in run.datasets}
    shown = [row for row in rows if row.reason in _SHOWN]
    pictures = dict(
        zip(shown, children.map(_thumbnail, [(datasets[row.dataset_id], row) for row in shown]), strict=True)
    )
    decoded = {row: picture for row, picture in pictures.items() if isinstance(picture, np.ndarray)}
    save_picture(draw(rows, decoded, count, SHEET_CELL_PX), out / SHEET)


def _thumbnail(job: tuple[ImageDataset, Rejected]) -> np.ndarray | None:
    dataset, row = job
    try:
        data = read_again(dataset, row.source, row.image_id)
        return None if data is None else np.asarray(decode_what_is_there(data, SHEET_CELL_PX))
    except (OSError, Unreadable):
        return None


def _verdict(answer: Verdict | Lost) -> Verdict:
    return _refused(answer.reason, answer.detail) if isinstance(answer, Lost) else answer


def _look(job: tuple[Run, ImageDataset, Entry]) -> Verdict:
    return look(*job)


def _refused(reason: str, detail: str | None = None, known: dict[str, Any] | None = None) -> Verdict:
    return Verdict(**known or {}, reason=reason, detail=detail, stage1_reason=reason, stage2_reason=reason)


def _older_verdicts(run: Run, found: pa.Table, workspace: Path) -> tuple[pa.Table, pa.Array]:
    """Verdicts of the newest index whose settings judge alike, and for each scanned file its place there, or null."""
    older = newest(workspace, "image_index", FORMAT)
    table = schema(run.config.paired).empty_table()
    if older and _judging(older.manifest["spec"]) == _judging(_spec(run)) and _same_decoder(older):
        table = pq.read_table(older.path / INDEX_FILE)
    of_bytes = pc.or_(pc.is_null(table["reason"]), pc.is_in(table["reason"], pa.array([*_LASTING, *_BESIDE])))
    table = table.filter(of_bytes)
    beside = pc.is_in(table["reason"], pa.array(_BESIDE))
    names = [field.name for field in fields(Verdict)]
    verdicts = table.select(names)
    for name in ("reason", "detail"):
        verdicts = verdicts.set_column(names.index(name), name, pc.if_else(beside, None, table[name]))
    place = pc.index_in(_bytes(found, "sha256"), _bytes(table, "image_id").combine_chunks())
    return verdicts, place.combine_chunks()


def _bytes(table: pa.Table, image: str) -> pa.ChunkedArray:
    """What decides the verdict on each row beside the settings: its bytes, null where they are not known, and its pair's."""
    parts = [table["dataset_id"], table[image]]
    if "conditioning_id" in table.column_names:
        parts.append(pc.fill_null(table["conditioning_id"], ""))
    return pc.binary_join_element_wise(*parts, "/")


def _same_decoder(index: Artifact) -> bool:
    return bool(index.manifest["provenance"]["packages"]["pillow"] == metadata.version("pillow"))


def _judging(spec: dict[str, Any]) -> dict[str, Any]:
    """The part of an index's spec that decides verdicts: all but captions and limits on how many are used."""
    datasets = {
        name: {key: value for key, value in dataset.items() if key not in _NOT_IN_VERDICT}
        for name, dataset in spec["datasets"].items()
    }
    return spec | {"datasets": datasets}


def _beyond(parts: list[Path], dataset_id: str, limit: int, seed: int) -> np.ndarray:
    """Which rows of a ledger's parts are accepted pictures of a data set beyond its limit: bool (N,)."""
    columns = ["dataset_id", "status", "image_id"]
    table = pa.concat_tables(pq.read_table(part, columns=columns) for part in parts)
    own = pc.and_(pc.equal(table["dataset_id"], dataset_id), pc.equal(table["status"], "accepted"))
    places = np.flatnonzero(own.to_numpy())
    beyond = np.zeros(len(table), bool)
    beyond[places[sample_order(table["image_id"].take(places), seed)[limit:]]] = True
    return beyond


def _left_out(rows: pa.Table, beyond: np.ndarray) -> pa.Table:
    for name, value in (("status", "rejected"), ("reason", BEYOND)):
        place = rows.schema.get_field_index(name)
        rows = rows.set_column(place, SCHEMA.field(name), pc.if_else(beyond, value, rows[name]))
    return rows


def _size_reason(run: Run, dataset: ImageDataset, stage: Stage, size: tuple[int, int]) -> str | None:
    rules = geometry(run.config, dataset, stage)
    if rules is None:
        return "not_for_this_stage"
    return REASONS[int(judge_sizes(np.array([size]), rules)[0])]

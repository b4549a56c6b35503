"""The image index: every input file ends as exactly one row of the ledger, accepted or with one named reason.

The scan names the data; here each file's header, size, decode and captions are judged, in blocks that a killed run keeps.
What an older index of the same settings said of the same bytes is taken over, so 1 % new pictures cost 1 % of the decoding.
"""

import logging
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import reduce
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from deepfloyd_core.config.data_sets import ImageDataset, Place
from deepfloyd_core.config.flavours import STAGES, Stage
from deepfloyd_core.config.run import Run
from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.files import atomic_path
from deepfloyd_core.index.captions import finished_captions, missing_caption
from deepfloyd_core.index.ledger import (
    AS_ASKED,
    INDEX_FILE,
    LOOK_BYTES,
    LOOKS_FILE,
    Row,
    count_rows,
    part_schema,
    row_digests,
    schema,
    take_examples,
)
from deepfloyd_core.index.left_out import finish_ledger, read_looks
from deepfloyd_core.index.looks import looks_of, sight_of
from deepfloyd_core.index.pairs import PAIR_REASONS, check_pair, missing_pair
from deepfloyd_core.index.rejected import COLUMNS, Rejected, choose, draw
from deepfloyd_core.index.scan import data_digest, has_heif, others_of
from deepfloyd_core.index.twins import Member
from deepfloyd_core.pictures.decode import (
    Unreadable,
    check_decodes,
    check_fits,
    decode_rgb,
    decode_what_is_there,
    read_header,
)
from deepfloyd_core.pictures.faces import find_face
from deepfloyd_core.pictures.geometry import REASONS, geometry, judge_sizes
from deepfloyd_core.pictures.sheets import fitted, save_picture, titled_rows
from deepfloyd_core.processes.pool import Children, Limits, Lost
from deepfloyd_core.sources.picture_bytes import HAS_HEIF
from deepfloyd_core.sources.source import read_again
from deepfloyd_core.store.artifacts import Artifact, Request, WorkDir, find, newest
from deepfloyd_core.store.parts import finish_part, part_is_whole
from deepfloyd_core.types import Report, no_report

log = logging.getLogger(__name__)

# 7: an example of each reason. 8: what a decode may take. 9: why no caption. 10: what a decode takes.
# 11: the first of a group by the numbers in names. 12: `note`. 13: digests of the rows that feed each stage
FORMAT = 13
BLOCK = 4096  # pictures judged, and kept by a killed run, at once
_MORE_TIME = "decode_timeout_s"  # in the spec of an index that gives late pictures more time
SHEET, SHEET_CELL_PX = "rejected.png", 144
TWINS_SHEET, GROUPS_SHOWN = "twins.png", 8
# Settings of a data set that change nothing in its index.
_NOT_IN_INDEX = {
    *Place.model_fields, "dataset_type", "disabled", "disable", "repeats", "random_crops", "text_embeds", "probability",
    "start_step", "end_step", "crop_style", "conditioning_data",
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
_SIZES = ("aspect_out_of_range", "too_small", "not_for_this_stage")  # said first to last: why a stage cannot use a size
# Said of pictures whose bytes are good.
_BESIDE = ("caption_missing", "conditioning_missing", "conditioning_ambiguous", *AS_ASKED)
_PICTURE = ("dataset_id", "image_id", "conditioning_id")  # what a verdict is of
_NOT_IN_VERDICT = {
    "max_num_samples", "duplicates", "caption_strategy", "parquet", "disable_multiline_split", "instance_prompt",
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
    note: str | None = None  # what is odd about the file, whatever becomes of it
    look: bytes | None = None  # from a child its sight (see `looks`)


@dataclass(frozen=True)
class Older:
    """What an older index said: its verdicts, and for each scanned file its place there, or null."""

    verdicts: pa.Table  # the columns of Verdict but the look, and `row`, the row of the older ledger
    place: pa.Array
    looks: np.ndarray | None

    def take(self, block: slice) -> list[Verdict | None]:
        """The verdicts on some of the scanned files; None where there is none."""
        place = self.place[block]
        known: list[Verdict | None] = []
        for found, valid in zip(self.verdicts.take(place).to_pylist(), place.is_valid().to_pylist(), strict=True):
            row = found.pop("row")
            look = self.looks[row].tobytes() if valid and self.looks is not None else b""
            known.append(Verdict(**found, look=look if any(look) else None) if valid else None)
        return known


def index_request(run: Run, found: pa.Table) -> Request:
    """The index's identity: the bytes and captions of the scanned files, and the settings that judge them.

    Of an index that has pictures that took too long, a longer `decode_timeout_s` makes another.
    """
    request = Request("image_index", FORMAT, _spec(run, found), {"data": data_digest(found)})
    before, summary = find(run.workspace, request), dict[str, Any]()
    with suppress(ArtifactError):  # of a damaged one nothing is known, and it is made again
        summary = before.summary if before else summary
    late = summary.get("reasons", {}).get("timeout")
    if not late or summary["decode_timeout_s"] >= run.config.decode_timeout_s:
        return request
    # What took too long then is tried with more time; an index without such rows is the same for any time.
    return replace(request, spec=request.spec | {_MORE_TIME: run.config.decode_timeout_s})


def _spec(run: Run, found: pa.Table) -> dict[str, Any]:
    return {
        "datasets": {dataset.id: _index_spec(run, dataset) for dataset in run.datasets},
        "stages": list(run.config.stages),
        "aspect_bucket_alignment": run.config.aspect_bucket_alignment,
        "aspect_bucket_rounding": run.config.aspect_bucket_rounding,
        "decode_memory_mib": run.config.decode_memory_mib,
        "reads_heif": HAS_HEIF and has_heif(found),  # who installs it runs again, and they are judged
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
    older = _older_verdicts(run, found, work.path.parents[1])
    parts = [work.path / f".ledger-{start:09d}.parquet" for start in range(0, len(found), BLOCK)]
    for number, part in enumerate(parts):
        block = slice(number * BLOCK, (number + 1) * BLOCK)
        if not part_is_whole(part):
            entries = [Entry(**row) for row in found[block].to_pylist()]
            rows = [vars(row) for row in _judge_block(run, entries, older.take(block), children)]
            with atomic_path(part) as tmp:
                pq.write_table(pa.Table.from_pylist(rows, schema=part_schema(run.config.paired)), tmp)
            finish_part(part)
        report(min(block.stop, len(found)), len(found), "pictures judged")
    groups, captions = finish_ledger(run, parts, len(found), work.path)
    before = len(found) - older.place.null_count
    readable = len(found) - found["sha256"].null_count
    summary = count_rows(work.path / INDEX_FILE)
    left_out = sum(summary["reasons"].get(reason, 0) for reason in AS_ASKED)
    _save_rejected(run, summary["rejected"] - left_out, work.path, children)
    _save_twins(run, groups, work.path, children)
    return summary | {
        "twin_groups": len(groups),
        "twins": sum(len(members) - 1 for members in groups),
        "judged_now": readable - before,
        "judged_before": before,
        "captions_per_picture": captions,
        "examples": take_examples(work.path / INDEX_FILE),
        "decode_timeout_s": run.config.decode_timeout_s,
        "other_files": others_of(found),
        "rows": row_digests(work.path / INDEX_FILE, run.config.paired),
    }


def judge(run: Run, dataset: ImageDataset, entry: Entry, verdict: Verdict) -> Row:
    """The ledger's row of one file, of which its bytes said `verdict`."""
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
        return _refused(error.reason, str(error), known)
    return Verdict(**known)


def _unfit(run: Run, verdict: Verdict) -> tuple[str | None, str | None]:
    """Why no stage of the run can use a picture of its size, and the detail; None where one can."""
    whys = [verdict.stage1_reason if stage == 1 else verdict.stage2_reason for stage in run.config.stages]
    if not all(whys) or not verdict.width or not verdict.height:
        return None, None
    why = next(reason for reason in _SIZES if reason in whys)
    aspect = f", aspect {verdict.width / verdict.height:.3g}" if why == "aspect_out_of_range" else ""
    return why, f"{verdict.width}x{verdict.height} px{aspect}"


def _judge_block(run: Run, entries: list[Entry], known: list[Verdict | None], children: Children) -> list[Row]:
    """The rows of some files; what is not known of them is looked up in child processes, which a picture may kill."""
    datasets = {dataset.id: dataset for dataset in run.datasets}
    unknown = [(run, datasets[entry.dataset_id], entry) for entry, verdict in zip(entries, known, strict=True)
               if verdict is None]  # fmt: skip
    looked = iter(_with_looks([_verdict(answer) for answer in children.map(_look, unknown)]))
    verdicts = [next(looked) if verdict is None else verdict for verdict in known]
    return [
        judge(run, datasets[entry.dataset_id], entry, verdict) for entry, verdict in zip(entries, verdicts, strict=True)
    ]


def _with_looks(verdicts: list[Verdict]) -> list[Verdict]:
    """The verdicts of children with looks in place of sights."""
    seen = {place: verdict.look for place, verdict in enumerate(verdicts) if verdict.look is not None}
    for place, look_there in zip(seen, looks_of(list(seen.values())), strict=True):
        verdicts[place] = replace(verdicts[place], look=look_there)
    return verdicts


def _save_rejected(run: Run, count: int, out: Path, children: Children) -> None:
    """Draw a few of the `count` rejected files; no file when there are none. Decodes at most those that it shows."""
    (out / SHEET).unlink(missing_ok=True)  # an interrupted build may have found others
    if not count:
        return
    rows = choose(out / INDEX_FILE, not_wanted=AS_ASKED)
    datasets = {dataset.id: dataset for dataset in run.datasets}
    shown = [row for row in rows if row.reason in _SHOWN]
    pictures = dict(
        zip(shown, children.map(_thumbnail, [(datasets[row.dataset_id], row) for row in shown]), strict=True)
    )
    decoded = {row: picture for row, picture in pictures.items() if isinstance(picture, np.ndarray)}
    save_picture(draw(rows, decoded, count, SHEET_CELL_PX), out / SHEET)


def _save_twins(run: Run, groups: list[list[Member]], out: Path, children: Children) -> None:
    """Draw some pictures of some groups, a line each; no file when there are none."""
    (out / TWINS_SHEET).unlink(missing_ok=True)
    if not groups:
        return
    datasets = {dataset.id: dataset for dataset in run.datasets}
    shown = [members[:COLUMNS] for members in groups[:GROUPS_SHOWN]]
    made = children.map(_thumbnail, [(datasets[one.dataset_id], one) for members in shown for one in members])
    nothing = np.full((SHEET_CELL_PX, SHEET_CELL_PX, 3), 198, np.uint8)
    lines = []
    for members in shown:
        pictures = [picture if isinstance(picture, np.ndarray) else nothing for picture in islice(made, len(members))]
        names = ", ".join(one.source for one in members)
        lines.append((fitted(names, len(pictures) * SHEET_CELL_PX, 14), pictures))
    title = f"{len(shown)} of {len(groups):,} groups that show the same"
    save_picture(titled_rows(lines, SHEET_CELL_PX, title), out / TWINS_SHEET)


def _thumbnail(job: tuple[ImageDataset, Rejected | Member]) -> np.ndarray | None:
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
    return Verdict(
        **{**(known or {}), "reason": reason, "detail": detail, "stage1_reason": reason, "stage2_reason": reason}
    )


def _older_verdicts(run: Run, found: pa.Table, workspace: Path) -> Older:
    """Verdicts of the newest index whose settings judge alike, whatever its stages; none on a picture that was of no use
    there, and so not decoded, and is of use here.
    """
    older = newest(workspace, "image_index", FORMAT)
    names = [field.name for field in fields(Verdict) if field.name != "look"]
    columns = [name for name in schema(run.config.paired).names if name in (*names, *_PICTURE)]
    table, looks = schema(run.config.paired).empty_table().select(columns), None
    if older and _judging(older.manifest["spec"]) == _judging(_spec(run, found)) and _same_decoder(older):
        table, looks = _read_older(older, columns) or (table, looks)
    table = table.append_column("row", pa.array(np.arange(len(table))))
    of_bytes = pc.or_(pc.is_null(table["reason"]), pc.is_in(table["reason"], pa.array([*_LASTING, *_BESIDE])))
    unseen = pc.is_in(table["reason"], pa.array(_SIZES))
    useful = [pc.is_null(table[f"stage{stage}_reason"]) for stage in run.config.stages]
    table = table.filter(pc.and_(of_bytes, pc.invert(pc.and_(unseen, reduce(pc.or_, useful)))))
    beside = pc.is_in(table["reason"], pa.array([*_BESIDE, *_SIZES]))
    verdicts = table.select([*names, "row"])
    for name in ("reason", "detail"):
        verdicts = verdicts.set_column(names.index(name), name, pc.if_else(beside, None, table[name]))
    place = pc.index_in(_bytes(found, "sha256"), _bytes(table, "image_id").combine_chunks())
    return Older(verdicts, place.combine_chunks(), looks)


def _read_older(older: Artifact, columns: list[str]) -> tuple[pa.Table, np.ndarray] | None:
    """The ledger and the looks of an index; None where they are damaged: then every picture is judged again."""
    try:
        table, looks = pq.read_table(older.path / INDEX_FILE, columns=columns), read_looks(older.path / LOOKS_FILE)
    except (OSError, ValueError):  # pyarrow's errors are both
        return None
    return (table, looks) if looks.shape == (len(table), LOOK_BYTES) and looks.dtype == np.uint8 else None


def _bytes(table: pa.Table, image: str) -> pa.ChunkedArray:
    """What decides the verdict on each row beside the settings: its bytes, null where they are not known, and its pair's."""
    parts = [table["dataset_id"], table[image]]
    if "conditioning_id" in table.column_names:
        parts.append(pc.fill_null(table["conditioning_id"], ""))
    return pc.binary_join_element_wise(*parts, "/")


def _same_decoder(index: Artifact) -> bool:
    packages = index.manifest["provenance"]["packages"]
    heif = ["pillow-heif"] if HAS_HEIF else []
    return all(packages.get(name) == metadata.version(name) for name in ("pillow", *heif))


def _judging(spec: dict[str, Any]) -> dict[str, Any]:
    """The part of an index's spec that decides verdicts: all but captions, limits on how many are used, and stages."""
    datasets = {
        name: {key: value for key, value in dataset.items() if key not in _NOT_IN_VERDICT}
        for name, dataset in spec["datasets"].items()
    }
    return {key: value for key, value in spec.items() if key not in (_MORE_TIME, "stages")} | {"datasets": datasets}


def _size_reason(run: Run, dataset: ImageDataset, stage: Stage, size: tuple[int, int]) -> str | None:
    rules = geometry(run.config, dataset, stage)
    if rules is None:
        return "not_for_this_stage"
    return REASONS[int(judge_sizes(np.array([size]), rules)[0])]

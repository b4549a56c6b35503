"""Scan and ledger: every input file ends as exactly one row, accepted or with one named reason.

The scan reads each file once for its sha256 (1.7 GB/s), which names the picture and, over all of them, the data. The
ledger then adds sizes, captions and the decoder's verdict. Nothing in the source directories is ever touched.
"""

import logging
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deepfloyd_core.artifacts import Artifact, Request, WorkDir
from deepfloyd_core.caption_tables import table_path
from deepfloyd_core.captions import finished_captions, raw_captions
from deepfloyd_core.config import Run
from deepfloyd_core.datafile import TABLES, ImageDataset
from deepfloyd_core.draws import hash_units, image_keys
from deepfloyd_core.errors import DataError
from deepfloyd_core.faces import find_face
from deepfloyd_core.files import atomic_path, canonical_json, sha256_bytes
from deepfloyd_core.flavours import Stage
from deepfloyd_core.geometry import REASONS, geometry, judge_sizes
from deepfloyd_core.pictures import Unreadable, check_decodes, decode_rgb, read_header
from deepfloyd_core.types import Report, no_report

log = logging.getLogger(__name__)

FORMAT = 2
INDEX_FILE = "index.parquet"
SIDECARS = (".txt", ".json")  # captions and metadata: not inputs
BEYOND = "beyond_max_num_samples"  # left out by request, so it does not count against max_rejected_share
# Settings of a data set that change nothing in its index.
_NOT_IN_INDEX = {
    "id", "type", "dataset_type", "instance_data_dir", "disabled", "disable", "repeats", "text_embeds",
    "probability", "start_step", "end_step", "crop_style",
}  # fmt: skip

SCHEMA = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("dataset_id", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
        pa.field("image_id", pa.string()),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("format", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("captions", pa.list_(pa.string()), nullable=False),
        pa.field("face", pa.list_(pa.int32())),
        pa.field("stage1_reason", pa.string()),
        pa.field("stage2_reason", pa.string()),
    ]
)


@dataclass(frozen=True)
class Entry:
    """One input file as the scan found it."""

    dataset_id: str
    source: str  # path below the data set's directory, with forward slashes
    bytes: int
    sha256: str | None  # None: it could not be read
    captions: tuple[str, ...] | None  # texts as they were found; None: there are none, or they cannot be read
    reason: str | None  # already rejected by the scan


@dataclass(frozen=True)
class Row:
    """One row of the ledger. A picture can be fit for one stage and too small for the other."""

    source: str
    dataset_id: str
    status: str  # accepted | rejected
    reason: str | None
    detail: str | None
    image_id: str | None
    bytes: int
    format: str | None
    width: int | None
    height: int | None
    captions: list[str]  # every one that training may use
    face: list[int] | None  # left, top, width, height in the upright picture; None: none was found, or looked for
    stage1_reason: str | None  # why it does not feed Stage I; None: it does
    stage2_reason: str | None


def scan(datasets: tuple[ImageDataset, ...]) -> list[Entry]:
    """List and hash every input file, sorted. Raises DataError when there is none at all."""
    entries = [entry for dataset in datasets for entry in _scan_dataset(dataset)]
    if not entries:
        places = ", ".join(dataset.instance_data_dir for dataset in datasets)
        raise DataError(f"There is no picture in {places}. Put pictures there, or correct instance_data_dir.")
    return sorted(entries, key=lambda entry: (entry.dataset_id, entry.source))


def index_request(run: Run, entries: list[Entry]) -> Request:
    """The index's identity: the bytes and captions of the files, and the settings that judge them."""
    data = sha256_bytes(canonical_json([asdict(entry) for entry in entries]).encode())[:16]
    spec = {
        "datasets": {dataset.id: _index_spec(run, dataset) for dataset in run.datasets},
        "stages": list(run.config.stages),
        "aspect_bucket_alignment": run.config.aspect_bucket_alignment,
        "aspect_bucket_rounding": run.config.aspect_bucket_rounding,
    }
    return Request("image_index", FORMAT, spec, {"data": data})


def _index_spec(run: Run, dataset: ImageDataset) -> dict[str, Any]:
    spec = dataset.model_dump(mode="json", exclude=_NOT_IN_INDEX)
    if dataset.parquet is not None:
        spec["parquet"]["path"] = None  # its captions are in the data
    if dataset.max_num_samples is not None or (dataset.caption_shuffle and dataset.caption_shuffle.enable):
        spec["seed"] = run.config.seed
    return spec | {"faces": dataset.crop and dataset.crop_style == "face"}


def build_index(run: Run, entries: list[Entry], work: WorkDir, report: Report = no_report) -> dict[str, Any]:
    """Judge every entry and write the ledger. Returns counts by status and reason."""
    datasets = {dataset.id: dataset for dataset in run.datasets}
    rows: list[Row] = []
    with ThreadPoolExecutor(run.config.workers) as pool:  # Pillow releases the GIL while it decodes
        judged = pool.map(lambda entry: judge(run, datasets[entry.dataset_id], entry), entries)
        for row in judged:
            rows.append(row)
            report(len(rows), len(entries), "pictures judged")
    for dataset in run.datasets:
        rows = _limited(rows, dataset, run.config.seed)
    with atomic_path(work.path / INDEX_FILE) as tmp:
        pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows], schema=SCHEMA), tmp)
    return count_rows(rows)


def sample_order(image_ids: list[str], seed: int) -> list[int]:
    """The places of pictures in the order in which a few of them are taken: by a hash, so that it stays as pictures come."""
    units = hash_units("sample", seed, image_keys(image_ids), np.zeros(len(image_ids), np.int64))
    return [int(place) for place in np.argsort(units, kind="stable")]


def read_index(index: Artifact) -> list[Row]:
    """All rows of a ledger, in its order."""
    return [Row(**row) for row in pq.read_table(index.path / INDEX_FILE).to_pylist()]


def count_rows(rows: list[Row]) -> dict[str, Any]:
    """Counts that the manifest and the UI show."""
    accepted = [row for row in rows if row.status == "accepted"]
    return {
        "inputs": len(rows),
        "accepted": len(accepted),
        "rejected": len(rows) - len(accepted),
        "reasons": dict(sorted(Counter(row.reason for row in rows if row.reason).items())),
        "stage1": sum(row.stage1_reason is None for row in accepted),
        "stage2": sum(row.stage2_reason is None for row in accepted),
        "bytes": sum(row.bytes for row in rows),
    }


def check_share(summary: dict[str, Any], max_rejected_share: float, ledger: Path) -> None:
    """Raises DataError when too large a share was rejected, or nothing is left."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in summary["reasons"].items())
    if not summary["accepted"]:
        raise DataError(f"All {summary['inputs']} pictures were rejected ({reasons}). The ledger is {ledger}.")
    left_out = summary["reasons"].get(BEYOND, 0)
    rejected, inputs = summary["rejected"] - left_out, summary["inputs"] - left_out
    share = rejected / inputs
    if share > max_rejected_share:
        raise DataError(
            f"{rejected} of {inputs} pictures were rejected ({reasons}): a share of {share:.2f}, "
            f"above max_rejected_share = {max_rejected_share}. The ledger is {ledger}; mend the data or raise the limit."
        )


def judge(run: Run, dataset: ImageDataset, entry: Entry) -> Row:
    """The ledger's row of one file: header, size, one decode, captions, and the face if crops are placed by it."""
    base: dict[str, Any] = {
        "source": entry.source, "dataset_id": entry.dataset_id, "image_id": entry.sha256, "bytes": entry.bytes,
        "format": None, "width": None, "height": None, "face": None,
        "captions": finished_captions(dataset, entry.captions, run.config.seed),
    }  # fmt: skip

    def rejected(reason: str, detail: str | None = None) -> Row:
        why: dict[str, Any] = {"reason": reason, "stage1_reason": reason, "stage2_reason": reason}
        return Row(**base, status="rejected", detail=detail, **why)

    if entry.reason:
        return rejected(entry.reason)
    data = _read_again(dataset, entry)
    if data is None:
        return rejected("changed_while_reading")
    try:
        header = read_header(data)
        base |= {"format": header.format, "width": header.size[0], "height": header.size[1]}
        reasons = {stage: _size_reason(run, dataset, stage, header.size) for stage in (1, 2)}
        whys = [reason for stage, reason in reasons.items() if stage in run.config.stages]
        if all(whys):
            why = next(
                reason for reason in ("aspect_out_of_range", "too_small", "not_for_this_stage") if reason in whys
            )
            aspect = f", aspect {header.size[0] / header.size[1]:.3g}" if why == "aspect_out_of_range" else ""
            return rejected(why, f"{header.size[0]}x{header.size[1]} px{aspect}")
        check_decodes(data)
        if dataset.crop and dataset.crop_style == "face":
            base["face"] = find_face(decode_rgb(data))
    except Unreadable as error:
        return rejected(error.reason, str(error))
    if not base["captions"]:
        return rejected("caption_missing")
    return Row(**base, status="accepted", reason=None, detail=None, stage1_reason=reasons[1], stage2_reason=reasons[2])


def _limited(rows: list[Row], dataset: ImageDataset, seed: int) -> list[Row]:
    """The rows with those accepted pictures of a data set left out that are beyond its max_num_samples."""
    own = [place for place, row in enumerate(rows) if row.dataset_id == dataset.id and row.status == "accepted"]
    if dataset.max_num_samples is None or len(own) <= dataset.max_num_samples:
        return rows
    order = sample_order([str(rows[place].image_id) for place in own], seed)
    beyond = {own[place] for place in order[dataset.max_num_samples :]}
    out: dict[str, Any] = {"status": "rejected", "reason": BEYOND, "stage1_reason": BEYOND, "stage2_reason": BEYOND}
    return [replace(row, **out) if place in beyond else row for place, row in enumerate(rows)]


def _scan_dataset(dataset: ImageDataset) -> list[Entry]:
    root = Path(dataset.instance_data_dir)
    paths, blocked = _walk(root)
    if dataset.caption_strategy in TABLES:
        table = table_path(dataset).resolve()
        paths = [path for path in paths if path.name != table.name or path.resolve() != table]
    found = [_scan_file(dataset, root, path) for path in paths]
    read = [entry.source for entry in found if entry.reason is None]
    captions = dict(zip(read, raw_captions(dataset, read), strict=True))
    found = [replace(entry, captions=captions.get(entry.source)) for entry in found]
    folders = [f"{_printable(folder.relative_to(root).as_posix())}/" for folder in blocked]
    return found + [Entry(dataset.id, name, 0, None, None, "unreadable") for name in folders]


def _walk(root: Path) -> tuple[list[Path], list[Path]]:
    """The files below a directory that may be pictures, and the directories that cannot be listed."""
    found: list[Path] = []
    blocked: list[Path] = []
    for folder, folders, files in os.walk(root, onerror=lambda error: blocked.append(Path(error.filename))):
        files += [name for name in folders if Path(folder, name).is_symlink()]  # not followed, and not passed over
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = [name for name in sorted(files) if not name.startswith(".") and not name.lower().endswith(SIDECARS)]
        found += [Path(folder, name) for name in names]
    return found, blocked


def _printable(source: str) -> str:
    return source.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _scan_file(dataset: ImageDataset, root: Path, path: Path) -> Entry:
    source = path.relative_to(root).as_posix()
    printable = _printable(source)

    def rejected(reason: str, size: int = 0) -> Entry:
        return Entry(dataset.id, printable, size, None, None, reason)

    if printable != source:
        return rejected("name_not_utf8")
    try:
        if not path.resolve().is_relative_to(root.resolve()):
            return rejected("outside_root")
        if not path.is_file():
            return rejected("not_a_file")
        data = path.read_bytes()
    except OSError:
        return rejected("unreadable")
    except RuntimeError:
        return rejected("not_a_file")  # a link that leads to itself, before Python 3.13
    return Entry(dataset.id, source, len(data), sha256_bytes(data), None, None)


def _read_again(dataset: ImageDataset, entry: Entry) -> bytes | None:
    try:
        data = Path(dataset.instance_data_dir, entry.source).read_bytes()
    except OSError:
        return None
    return data if sha256_bytes(data) == entry.sha256 else None


def _size_reason(run: Run, dataset: ImageDataset, stage: Stage, size: tuple[int, int]) -> str | None:
    rules = geometry(run.config, dataset, stage)
    if rules is None:
        return "not_for_this_stage"
    return REASONS[int(judge_sizes(np.array([size]), rules)[0])]

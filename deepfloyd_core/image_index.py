"""Scan and ledger: every input file ends as exactly one row, accepted or with one named reason.

The scan reads each file once for its sha256 (1.7 GB/s), which names the picture and, over all of them, the data. The
ledger then adds sizes, captions and the decoder's verdict. Nothing in the source directories is ever touched.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from deepfloyd_core.artifacts import Artifact, Request, WorkDir
from deepfloyd_core.config import Run
from deepfloyd_core.datafile import ImageDataset
from deepfloyd_core.errors import DataError
from deepfloyd_core.files import atomic_path, canonical_json, sha256_bytes
from deepfloyd_core.flavours import Stage
from deepfloyd_core.geometry import geometry, plan_crop
from deepfloyd_core.pictures import Unreadable, check_decodes, read_header
from deepfloyd_core.types import Report, no_report

log = logging.getLogger(__name__)

FORMAT = 1
INDEX_FILE = "index.parquet"
SIDECARS = (".txt", ".json")  # captions and metadata: not inputs
# What decides an index beside the bytes of the files.
_SPEC_KEYS = (
    "id", "resolution", "resolution_type", "minimum_image_size", "maximum_image_size", "target_downsample_size",
    "crop", "crop_aspect", "caption_strategy", "instance_prompt", "prepend_instance_prompt", "only_instance_prompt",
)  # fmt: skip

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
    caption: str | None  # raw text of the sidecar; None: there is none, or it is not UTF-8
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
    captions: list[str]
    stage1_reason: str | None  # why it does not feed Stage I; None: it does
    stage2_reason: str | None


def scan(datasets: tuple[ImageDataset, ...]) -> list[Entry]:
    """List and hash every input file, sorted. Raises DataError when there is none at all."""
    entries = []
    for dataset in datasets:
        root = Path(dataset.instance_data_dir)
        entries += [_scan_file(dataset, root, path) for path in _walk(root)]
    if not entries:
        places = ", ".join(dataset.instance_data_dir for dataset in datasets)
        raise DataError(f"There is no picture in {places}. Put pictures there, or correct instance_data_dir.")
    return sorted(entries, key=lambda entry: (entry.dataset_id, entry.source))


def index_request(run: Run, entries: list[Entry]) -> Request:
    """The index's identity: the bytes and captions of the files, and the settings that judge them."""
    data = sha256_bytes(canonical_json([asdict(entry) for entry in entries]).encode())[:16]
    datasets = {ds.id: {key: getattr(ds, key) for key in _SPEC_KEYS if key != "id"} for ds in run.datasets}
    spec = {"datasets": datasets, "stages": list(run.config.stages)}
    return Request("image_index", FORMAT, spec, {"data": data})


def build_index(run: Run, entries: list[Entry], work: WorkDir, report: Report = no_report) -> dict[str, Any]:
    """Judge every entry and write the ledger. Returns counts by status and reason."""
    datasets = {dataset.id: dataset for dataset in run.datasets}
    rows: list[Row] = []
    with ThreadPoolExecutor(run.config.workers) as pool:  # Pillow releases the GIL while it decodes
        judged = pool.map(lambda entry: _judge(entry, datasets[entry.dataset_id], run.config.stages), entries)
        for row in judged:
            rows.append(row)
            report(len(rows), len(entries), "pictures judged")
    with atomic_path(work.path / INDEX_FILE) as tmp:
        pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows], schema=SCHEMA), tmp)
    return count_rows(rows)


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
    share = summary["rejected"] / summary["inputs"]
    if share > max_rejected_share:
        raise DataError(
            f"{summary['rejected']} of {summary['inputs']} pictures were rejected ({reasons}): a share of {share:.2f}, "
            f"above max_rejected_share = {max_rejected_share}. The ledger is {ledger}; mend the data or raise the limit."
        )


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        files += [name for name in folders if Path(folder, name).is_symlink()]  # not followed, and not passed over
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and not name.lower().endswith(SIDECARS):
                yield Path(folder, name)


def _scan_file(dataset: ImageDataset, root: Path, path: Path) -> Entry:
    source = path.relative_to(root).as_posix()
    printable = source.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")

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
    return Entry(dataset.id, source, len(data), sha256_bytes(data), _sidecar(path, root), None)


def _sidecar(path: Path, root: Path) -> str | None:
    text = path.with_suffix(".txt")
    try:
        if not text.is_file() or not text.resolve().is_relative_to(root.resolve()):
            return None  # a pipe would never end, and a link may point at anything on this machine
        return text.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None


def captions_of(dataset: ImageDataset, entry: Entry) -> list[str]:
    """The captions of one picture, one for each line of a text file; empty when there is none."""
    prompt = (dataset.instance_prompt or "").strip()
    if dataset.only_instance_prompt or dataset.caption_strategy == "instanceprompt":
        return [prompt]
    if dataset.caption_strategy == "filename":
        lines = [Path(entry.source).stem.replace("_", " ")]
    else:
        lines = (entry.caption or "").splitlines()
    captions = [line.strip() for line in lines if line.strip()]
    return [f"{prompt} {caption}" for caption in captions] if dataset.prepend_instance_prompt else captions


def _judge(entry: Entry, dataset: ImageDataset, stages: tuple[Stage, ...]) -> Row:
    base: dict[str, Any] = {
        "source": entry.source, "dataset_id": entry.dataset_id, "image_id": entry.sha256, "bytes": entry.bytes,
        "format": None, "width": None, "height": None, "captions": captions_of(dataset, entry),
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
        reasons = {stage: _size_reason(dataset, stage, header.size) for stage in (1, 2)}
        whys = [reasons[stage] for stage in stages]
        if all(whys):
            why = "too_small" if "too_small" in whys else "not_for_this_stage"
            return rejected(why, f"{header.size[0]}x{header.size[1]} px")
        check_decodes(data)
    except Unreadable as error:
        return rejected(error.reason, str(error))
    if not base["captions"]:
        return rejected("caption_missing")
    return Row(**base, status="accepted", reason=None, detail=None, stage1_reason=reasons[1], stage2_reason=reasons[2])


def _read_again(dataset: ImageDataset, entry: Entry) -> bytes | None:
    try:
        data = Path(dataset.instance_data_dir, entry.source).read_bytes()
    except OSError:
        return None
    return data if sha256_bytes(data) == entry.sha256 else None


def _size_reason(dataset: ImageDataset, stage: Stage, size: tuple[int, int]) -> str | None:
    sizes = geometry(dataset, stage)
    if sizes is None:
        return "not_for_this_stage"
    return None if plan_crop(size, sizes) else "too_small"

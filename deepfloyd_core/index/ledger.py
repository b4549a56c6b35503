"""The ledger: one row for every input file, accepted or with a named reason. Its columns, and how to read it.

`image_index` makes it. Later steps read it here, in blocks, so that any size fits into memory.
"""

import builtins
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from deepfloyd_core.arrow import table_digest
from deepfloyd_core.config.stages import CONTROLLED, STAGES, Stage
from deepfloyd_core.errors import DataError
from deepfloyd_core.index.summary import CaptionCounts, IndexSummary, LedgerCounts
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.store.counts import many

INDEX_FILE = "index.parquet"
ROWS_AT_ONCE = 4096
LOOKS_FILE, LOOK_BYTES = "looks.npy", 392  # what each row's picture looks like: uint8 (rows, LOOK_BYTES), see `looks`
BEYOND, DUPLICATE = "beyond_max_num_samples", "duplicate"
AS_ASKED = (BEYOND, DUPLICATE)  # left out by request: these do not count against max_rejected_share

SCHEMA = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("dataset_id", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
        pa.field("note", pa.string()),
        pa.field("image_id", pa.string()),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("format", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("captions", pa.list_(pa.string()), nullable=False),
        pa.field("face", pa.list_(pa.int32())),
        *(pa.field(f"{kind.table}_reason", pa.string()) for kind in STAGES.values()),
        pa.field("group", pa.string()),
    ]
)
_PAIR = [pa.field("conditioning", pa.string()), pa.field("conditioning_id", pa.string())]
PICTURE = (
    "image_id",
    "source",
    "dataset_id",
    "width",
    "height",
    "captions",
    "face",
)  # the columns that crops are made of
PAIR = (*PICTURE, "conditioning", "conditioning_id")  # and those of their pairs


def schema(paired: bool) -> pa.Schema:
    """The columns of a ledger; with pairs also the name and the sha256 of each picture's pair."""
    return pa.schema([*SCHEMA, *_PAIR]) if paired else SCHEMA


def part_schema(paired: bool) -> pa.Schema:
    """The columns of judged rows before duplicates are known: the look instead of the group."""
    return schema(paired).remove(SCHEMA.get_field_index("group")).append(pa.field("look", pa.binary(LOOK_BYTES)))


@dataclass(frozen=True, kw_only=True)
class StageReasons:
    """Why a picture does not feed each stage; None: it does. It can be fit for one stage and too small for another."""

    stage1_reason: str | None = None
    stage2_reason: str | None = None

    def unfit(self, stage: Stage) -> str | None:
        """Why it does not feed a stage; None: it does."""
        reason: str | None = getattr(self, f"{STAGES[stage].table}_reason")
        return reason


@dataclass(frozen=True)
class Row(StageReasons):
    """One row of the ledger."""

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
    note: str | None = None  # what is odd about the file, whether it is accepted or not
    conditioning: str | None = None  # the pair that a ControlNet follows: its name, and the sha256 of its bytes
    conditioning_id: str | None = None
    group: str | None = None  # the first image_id of its duplicates; None: it has no twin
    look: "builtins.bytes | None" = None  # see `looks`; not in the ledger, but beside it


def read_index(index: Artifact) -> list[Row]:
    """All rows of a ledger, in its order; for small ones. `ledger_batches` reads any size in bounded memory."""
    return [Row(**row) for row in pq.read_table(index.path / INDEX_FILE).to_pylist()]


def ledger_batches(
    index: Artifact, columns: Iterable[str], stage: Stage | None = None, *, rejected: bool = False
) -> Iterator[pa.Table]:
    """Columns of the accepted rows of a ledger, in its order, some thousand at a time; with a stage, only rows that feed it.

    rejected: also the rejected rows.
    """
    yield from _batches(index.path / INDEX_FILE, list(columns), stage, rejected)


def row_digests(ledger: Path, paired: bool) -> dict[str, str]:
    """A digest for each stage over the rows that feed it, by the name of the stage's artifact: the pictures, in their
    order, and with `paired` their pairs. Equal digests, equal crops.
    """
    digests = {f"stage{stage}_pixels": table_digest(_batches(ledger, list(PICTURE), stage)) for stage in STAGES}
    if paired:
        for stage in CONTROLLED:
            digests[f"stage{stage}_conditioning"] = table_digest(_batches(ledger, list(PAIR), stage))
    return digests


def _batches(ledger: Path, columns: list[str], stage: Stage | None, rejected: bool = False) -> Iterator[pa.Table]:
    asked = list(dict.fromkeys([*columns, "status", *([f"stage{stage}_reason"] if stage else [])]))
    # pre_buffer would hold every column chunk of the file until the end: 800 MiB of ten million rows.
    with pq.ParquetFile(ledger, pre_buffer=False) as file:
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=asked):
            mask = pc.or_(pc.equal(batch["status"], "accepted"), rejected)
            if stage:
                mask = pc.and_(mask, pc.is_null(batch[f"stage{stage}_reason"]))
            yield pa.Table.from_batches([batch]).filter(mask).select(columns)


def group_names(rows: pa.Table) -> pa.ChunkedArray:
    """For each row (columns `group` and `image_id`) the first picture of its group; the row's own if it has no twin."""
    return pc.coalesce(rows["group"], rows["image_id"])


def caption_counts(index: Artifact) -> Counter[str]:
    """Every caption that training may use, and how many pictures have it."""
    counts: Counter[str] = Counter()
    for batch in ledger_batches(index, ["captions"]):
        counts.update(pc.list_flatten(batch["captions"]).to_pylist())
    return counts


def unfit_counts(index: Artifact, stage: Stage) -> Counter[str]:
    """How many accepted pictures a stage cannot use although its data set feeds the stage, by reason; another stage can."""
    counts: Counter[str] = Counter()
    for batch in ledger_batches(index, [f"stage{stage}_reason"]):
        for each in pc.value_counts(batch.column(0).drop_null()).to_pylist():
            counts[each["values"]] += each["counts"]
    del counts["not_for_this_stage"]
    return counts


def count_captions(rows: pa.Table, counts: CaptionCounts) -> None:
    """Add to `counts` the accepted rows of a ledger."""
    rows = rows.filter(pc.equal(rows["status"], "accepted"))
    pairs = zip(rows["dataset_id"].to_pylist(), pc.list_value_length(rows["captions"]).to_pylist(), strict=True)
    for (name, captions), pictures in Counter(pairs).items():
        of_set = counts.setdefault(name, {})
        of_set[captions] = of_set.get(captions, 0) + pictures


def take_examples(ledger: Path) -> dict[str, tuple[str, str]]:
    """For each reason of a rejection the first file that has a detail: its name and the detail."""
    examples: dict[str, tuple[str, str]] = {}
    with pq.ParquetFile(ledger, pre_buffer=False) as file:
        for batch in file.iter_batches(columns=["status", "reason", "source", "detail"]):
            rejected = batch.filter(pc.and_(pc.equal(batch["status"], "rejected"), pc.is_valid(batch["detail"])))
            for reason in set(pc.unique(rejected["reason"]).to_pylist()) - set(examples):
                first = pc.index(rejected["reason"], reason).as_py()
                examples[reason] = rejected["source"][first].as_py(), rejected["detail"][first].as_py()
    return dict(sorted(examples.items()))


def captions_left_out(counts: Mapping[str, Mapping[int, int]], repeats: Mapping[str, int]) -> list[str]:
    """A line for each data set with pictures that have more captions than `repeats + 1` passes can show."""
    lines = []
    for name, of_set in sorted(counts.items()):
        passes = repeats[name] + 1
        more = {captions: pictures for captions, pictures in of_set.items() if captions > passes}
        if more:
            shown = "the first alone is" if passes == 1 else f"the first {passes} are"
            have = many(sum(more.values()), "picture has", "pictures have")
            lines.append(
                f"{name}: {have} up to {max(more)} captions, and with repeats = {repeats[name]} {shown} trained. "
                f"Set repeats = {max(more) - 1}, or disable_multiline_split where the lines of a file are one caption"
            )
    return lines


def count_rows(ledger: Path) -> LedgerCounts:
    """The number of rows of each kind."""
    columns = {kind.table: f"{kind.table}_reason" for kind in STAGES.values()}
    table = pq.read_table(ledger, columns=["status", "reason", *columns.values(), "bytes"])
    accepted = table.filter(pc.equal(table["status"], "accepted"))
    reasons = Counter(reason for reason in table["reason"].drop_null().to_pylist())
    return LedgerCounts(
        inputs=len(table),
        accepted=len(accepted),
        rejected=len(table) - len(accepted),
        reasons=dict(sorted(reasons.items())),
        bytes=pc.sum(table["bytes"]).as_py(),
        **{name: accepted[column].null_count for name, column in columns.items()},
    )


def left_out_as_asked(counts: LedgerCounts) -> int:
    """How many of the rejected pictures are left out because the data file asks for it."""
    return sum(counts.reasons.get(reason, 0) for reason in AS_ASKED)


def rejected_and_inputs(counts: LedgerCounts) -> tuple[int, int]:
    """The counts of the rejected share: without what is left out because the data file asks for it."""
    left_out = left_out_as_asked(counts)
    return counts.rejected - left_out, counts.inputs - left_out


def check_share(summary: IndexSummary, max_rejected_share: float, ledger: Path | None) -> None:
    """Raises DataError when too large a share was rejected, or no picture is left. ledger: to be named, if it stays."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in summary.reasons.items())
    if not summary.accepted:
        all_of_them = "The only picture was" if summary.inputs == 1 else f"All {summary.inputs} pictures were"
        where = f"The ledger is {ledger}." if ledger else ""
        raise DataError(f"{all_of_them} rejected ({reasons}). {_most(summary)}{where}".rstrip())
    rejected, inputs = rejected_and_inputs(summary)
    share = rejected / inputs
    if share > max_rejected_share:
        were, advice = "was" if rejected == 1 else "were", "correct the data or raise the limit."
        last = f"The ledger is {ledger}; {advice}" if ledger else advice.capitalize()
        raise DataError(
            f"{rejected} of {inputs} pictures {were} rejected ({reasons}): a share of {share:.2f}, above "
            f"max_rejected_share = {max_rejected_share}. {_most(summary)}{last}"
        )


def _most(summary: IndexSummary) -> str:
    """An example of the most frequent reason, as a sentence; empty if it has no detail."""
    reason = max(summary.reasons, key=lambda name: summary.reasons[name], default="")
    source, detail = summary.examples.get(reason, ("", ""))
    return f"For example {source}: {in_words(reason, detail)}. " if detail else ""


def in_words(reason: str, detail: str) -> str:
    """A row's detail as a sentence for a person who has not read what the reason means."""
    return f"{detail}, below minimum_image_size or the training size" if reason == "too_small" else detail

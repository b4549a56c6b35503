"""The image index: every input file becomes exactly one row of the ledger, accepted or rejected with one named reason.

The scan lists and hashes the files. Here each file's header, size, decode and captions are judged, in blocks that are
kept when a run is killed. The verdicts of an older index with the same settings are reused for the same bytes, so 1 %
new pictures cost 1 % of the decoding.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.config.run import Run
from deepfloyd_core.files import atomic_path
from deepfloyd_core.index.judge import Entry, Verdict, judge, look, refused
from deepfloyd_core.index.ledger import (
    INDEX_FILE,
    Row,
    count_rows,
    left_out_as_asked,
    part_schema,
    row_digests,
    take_examples,
)
from deepfloyd_core.index.left_out import finish_ledger
from deepfloyd_core.index.looks import looks_of
from deepfloyd_core.index.older_verdicts import Older, older_verdicts
from deepfloyd_core.index.scan import others_of
from deepfloyd_core.index.sheets import save_rejected, save_twins
from deepfloyd_core.index.summary import IndexSummary
from deepfloyd_core.processes.pool import Children, Limits, Lost
from deepfloyd_core.store.artifacts import WorkDir
from deepfloyd_core.store.parts import finish_part, part_is_whole
from deepfloyd_core.types import Report, no_report

log = logging.getLogger(__name__)

BLOCK = 4096  # pictures judged, and kept by a killed run, at once


def judges(run: Run, workers: int | None = None) -> Children:
    """The child processes that judge pictures, with the run's limits; as many as its workers, unless told."""
    limits = Limits(run.config.decode_memory_mib, run.config.decode_timeout_s)
    return Children(workers or run.config.workers, limits, (__name__,))


@dataclass(frozen=True)
class Block:
    """Some scanned files, which are judged together."""

    start: int  # in the scan
    count: int
    part: Path  # the file of their rows
    known: list[Verdict | None] | None  # verdicts of an older index; None: there are none


JudgeBlocks = Callable[[Sequence[Block]], None]


def build_index(
    run: Run, scanned: pa.Table, children: Children, work: WorkDir, report: Report = no_report,
    elsewhere: JudgeBlocks | None = None,
) -> IndexSummary:  # fmt: skip
    """Judge every scanned file and write the ledger. elsewhere: judges the blocks that have files without a verdict, if the
    scan has several blocks.
    """
    older = older_verdicts(run, scanned, work.workspace)
    if elsewhere is not None and len(scanned) > BLOCK:
        elsewhere([one for one in _blocks(scanned, older, work) if not one.known or None in one.known])
    parts = list[Path]()
    for block in _blocks(scanned, older, work):
        judge_block(run, scanned[block.start : block.start + block.count], block, children)
        parts.append(block.part)
        report(block.start + block.count, len(scanned), "pictures judged")
    groups, captions = finish_ledger(run, parts, len(scanned), work.path)
    before = len(scanned) - older.place.null_count
    readable = len(scanned) - scanned["sha256"].null_count
    counts = count_rows(work.path / INDEX_FILE)
    save_rejected(run, counts.rejected - left_out_as_asked(counts), work.path, children)
    save_twins(run, groups, work.path, children)
    return IndexSummary(
        **dict(counts),
        twin_groups=len(groups),
        twins=sum(len(members) - 1 for members in groups),
        judged_now=readable - before,
        judged_before=before,
        captions_per_picture=captions,
        examples=take_examples(work.path / INDEX_FILE),
        decode_timeout_s=run.config.decode_timeout_s,
        other_files=others_of(scanned),
        rows=row_digests(work.path / INDEX_FILE, run.config.paired),
    )


def judge_block(run: Run, scanned: pa.Table, block: Block, children: Children) -> None:
    """Write the rows of a block, unless an interrupted build has written them. scanned: of the block."""
    if part_is_whole(block.part):
        return
    entries = [Entry(**row) for row in scanned.to_pylist()]
    rows = [vars(row) for row in _judged(run, entries, block.known or [None] * len(entries), children)]
    with atomic_path(block.part) as tmp:
        pq.write_table(pa.Table.from_pylist(rows, schema=part_schema(run.config.paired)), tmp)
    finish_part(block.part)


def _blocks(scanned: pa.Table, older: Older, work: WorkDir) -> Iterator[Block]:
    for start in range(0, len(scanned), BLOCK):
        count = min(BLOCK, len(scanned) - start)
        known = older.take(slice(start, start + count))
        part = work.path.absolute() / f".ledger-{start:09d}.parquet"
        yield Block(start, count, part, None if all(verdict is None for verdict in known) else known)


def _judged(run: Run, entries: list[Entry], known: list[Verdict | None], children: Children) -> list[Row]:
    """The rows of some files. Unknown facts are looked up in child processes, which a picture may kill."""
    datasets = {dataset.id: dataset for dataset in run.datasets}
    unknown = [(run, datasets[entry.dataset_id], entry) for entry, verdict in zip(entries, known, strict=True)
               if verdict is None]  # fmt: skip
    looked = iter(_with_looks([_verdict(answer) for answer in children.map(look_at, unknown)]))
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


def _verdict(answer: Verdict | Lost) -> Verdict:
    return refused(answer.reason, answer.detail) if isinstance(answer, Lost) else answer


def look_at(job: tuple[Run, ImageDataset, Entry]) -> Verdict:
    """`look` of one argument, which a child process takes."""
    return look(*job)

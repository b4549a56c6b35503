"""How long `deepfloyd plan` takes: `python benchmarks/plan_command.py 1e6`, 15 minutes.

Most of it makes files, which are empty. The demo and `stage1_24gb.toml` (with the demo's pictures) in an empty workspace,
then data sets of so many rows with a synthetic index, every caption another: nothing is read or judged, all is listed and
counted. Where a table's pictures are still to be downloaded the index is an earlier one, else it is the run's own. Seconds,
of the CPU also those of child processes, and the peak of the command's anonymous memory.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from worlds import one_set, own_bytes

from deepfloyd_core.config.run import Run
from deepfloyd_core.files import sha256_bytes
from deepfloyd_core.index import scan as scanning
from deepfloyd_core.index.identity import FORMAT, index_request, index_spec
from deepfloyd_core.index.index import BLOCK
from deepfloyd_core.index.ledger import INDEX_FILE, SCHEMA, count_rows, row_digests
from deepfloyd_core.index.summary import IndexSummary
from deepfloyd_core.sources.source import open_source
from deepfloyd_core.store.artifacts import Request, WorkDir, materialise

ROOT = Path(__file__).parents[1]
IN_FOLDER = 5000  # files
SIZES = {"resolution": 64, "minimum_image_size": 64}


def names(rows: int) -> Iterator[str]:
    """Names of pictures."""
    return (f"pictures/{number // IN_FOLDER:05d}/{number:09d}.jpg" for number in range(rows))


def captions(rows: int) -> list[str]:
    """As many different ones."""
    return [f"caption number {number} of a picture that shows something" for number in range(rows)]


def touch(paths: Iterator[Path]) -> None:
    """Empty files."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))


def a_folder(folder: Path, rows: int) -> Run:
    """A run over a folder, whose captions are the names of the files."""
    touch(folder / name for name in names(rows))
    return one_set(folder, 1, {"caption_strategy": "filename", **SIZES})


def a_table_of_urls(folder: Path, rows: int, suffix: str, kept: bool = False) -> Run:
    """A run over a table of URLs; kept: each was downloaded."""
    urls = [f"https://pictures.example.org/{name}?w=512" for name in names(rows)]
    table, path = pa.table({"url": urls, "caption": captions(rows)}), folder / f"table{suffix}"
    pq.write_table(table, path) if suffix == ".parquet" else pyarrow.csv.write_csv(table, path)
    if kept:
        digests = (sha256_bytes(url.encode()) for url in urls)
        touch(folder / "kept" / digest[:2] / digest for digest in digests)
    kind = suffix[1:]
    entry = {"type": kind, "caption_strategy": kind, "csv_file": str(path), "csv_cache_dir": str(folder / "kept")}
    return one_set(folder, 1, {**entry, **SIZES})


def write_index(sources: pa.ChunkedArray, texts: pa.Array, work: WorkDir) -> IndexSummary:
    """A ledger in which every picture is accepted."""
    rows, rng = len(sources), np.random.default_rng(0)
    ids = rng.bytes(32 * rows).hex()
    columns = {
        "source": sources, "dataset_id": pa.repeat("set", rows), "status": pa.repeat("accepted", rows),
        "image_id": pa.array([ids[64 * row : 64 * row + 64] for row in range(rows)]),
        "bytes": rng.integers(10_000, 5_000_000, rows), "format": pa.repeat("JPEG", rows),
        "width": rng.integers(130, 2000, rows, dtype=np.int32), "height": rng.integers(130, 2000, rows, dtype=np.int32),
        "captions": pa.ListArray.from_arrays(pa.array(range(rows + 1), pa.int32()), texts),
        "stage2_reason": pa.repeat("not_for_this_stage", rows),
    }  # fmt: skip
    arrays = [columns.get(field.name, pa.nulls(rows, field.type)) for field in SCHEMA]
    ledger = work.path / INDEX_FILE
    pq.write_table(pa.table(arrays, schema=SCHEMA), ledger, row_group_size=BLOCK)
    return IndexSummary(
        **dict(count_rows(ledger)), twin_groups=0, twins=0, judged_now=rows, judged_before=0, examples={}, other_files={},
        captions_per_picture={"set": {1: rows}}, decode_timeout_s=60, rows=row_digests(ledger, False),
    )  # fmt: skip


def finish(run: Run, texts: list[str]) -> None:
    """Notes of a scan that read every file, and the index of what it found."""
    (dataset,) = run.datasets
    listing = scanning._list_dataset(run, dataset, scanning.Counter())
    listed, rows, told = listing.listed, len(listing.listed), pa.array(texts)
    own = pa.ListArray.from_arrays(pa.array(range(rows + 1), pa.int32()), told) if dataset.own_texts else None
    hashes = pa.array([sha256_bytes(b"%d" % row) for row in range(rows)])
    new = {
        "source": listed["source"], "stamp": listed["stamp"], "bytes": listed["bytes"], "sha256": hashes,
        "looks_like": pa.repeat("picture", rows), "text_stamp": listed["text_stamp"], "captions": own,
    }  # fmt: skip
    columns = [new.get(field.name) for field in scanning._NOTES]
    arrays = [pa.nulls(rows, field.type) if column is None else column
              for field, column in zip(scanning._NOTES, columns, strict=True)]  # fmt: skip
    scanning._write_notes(listing.notes, pa.table(arrays, schema=scanning._NOTES))
    found = scanning.scan(run)
    assert pc.all(pc.is_valid(found["sha256"])).as_py()
    materialise(run.workspace, index_request(run, found), lambda work: write_index(found["source"], told, work))


def finish_older(run: Run, texts: list[str]) -> None:
    """An index of the same names, which stands in because nothing of the data set was downloaded yet."""
    sources = open_source(run.datasets[0]).listed()["source"]
    request = Request("image_index", FORMAT, index_spec(run, scanning.SCAN.empty_table()), {"data": "0" * 16})
    materialise(run.workspace, request, lambda work: write_index(sources, pa.array(texts), work))


def measured(config: Path, *more: str) -> str:
    """Wall and CPU seconds of a plan, and the peak of its own memory."""
    command = [sys.executable, "-P", "-m", "flows", "plan", str(config), *more]
    before, began, peak = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), 0
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while process.poll() is None:
            peak = max(peak, own_bytes(process.pid))
            time.sleep(0.02)
        said = process.communicate()[0].decode()
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert process.returncode == 0, said
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return f"{wall:6.1f} s  {cpu:6.1f} CPU s  {peak >> 20:6} MiB"


CASES: dict[str, tuple[Callable[[Path, int], Run], Callable[[Run, list[str]], None]]] = {
    "Parquet of URLs, to be downloaded": (lambda folder, rows: a_table_of_urls(folder, rows, ".parquet"), finish_older),
    "CSV of URLs, to be downloaded": (lambda folder, rows: a_table_of_urls(folder, rows, ".csv"), finish_older),
    "Parquet of URLs, downloaded": (lambda folder, rows: a_table_of_urls(folder, rows, ".parquet", True), finish),
    "a folder": (a_folder, finish),
}


def main() -> None:
    """Print a line for each plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=float, nargs="?", default=1e6)
    rows = int(parser.parse_args().rows)
    data = ("--set", "data_backend_config=datasets/demo.json")
    for name in ("demo", "stage1_24gb"):
        with tempfile.TemporaryDirectory() as folder:
            told = measured(ROOT / f"flows/configs/{name}.toml", "--set", f"workspace={folder}/new", *data)
        print(f"{name:<52}{told}", flush=True)
    for name, (make, complete) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            run = make(Path(folder), rows)
            time.sleep(2.5)  # so that the files are old enough to be trusted
            complete(run, captions(rows))
            print(f"{f'{name}, {rows:,} rows':<52}{measured(Path(folder) / 'run.json')}", flush=True)


if __name__ == "__main__":
    main()

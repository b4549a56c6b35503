"""What several benchmarks stand on: a run of the tiny cascade over one data set, its index, its pixels, its embeds."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.processes.jobs import Job
from deepfloyd_core.store.artifacts import Artifact, materialise
from deepfloyd_core.text.embeds import embeds_request, encode_job, run_captions
from deepfloyd_core.types import no_report


def own_bytes(process: int | str = "self") -> int:
    """Memory of a process that is no mapped file; 0 when it has ended, or where /proc has no such figure."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) << 10


@contextmanager
def peak_bytes() -> Iterator[list[int]]:
    """One number: the most that this process held of its own inside the block, sampled every 20 ms."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], own_bytes())

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield peak
    finally:
        done.set()


def one_set(folder: Path, stage: Stage, entry: dict[str, Any], **keys: Any) -> Run:
    """A run that trains one stage on one data set, `entry`: the folder `pictures` unless it says otherwise."""
    (folder / "pictures").mkdir(exist_ok=True)
    data = {"id": "set", "type": "local", "instance_data_dir": str(folder / "pictures"), **entry}
    return several_sets(folder, stage, [data], **keys)


def several_sets(folder: Path, stage: Stage, entries: list[dict[str, Any]], **keys: Any) -> Run:
    """A run that trains one stage on some data sets.

    `keys`: of the run file; `stage1` or `stage2` among them names another flavour than the tiny one.
    """
    (folder / "data.json").write_text(json.dumps(entries))
    where = {"workspace": str(folder / "workspace"), "data_backend_config": str(folder / "data.json")}
    flavour = {f"stage{stage}": {"model_flavour": f"tiny-{'i' * stage}"}}
    (folder / "run.json").write_text(json.dumps({**where, **flavour, **keys}))
    return load_run(folder / "run.json")


def prepare(run: Run, stage: Stage) -> tuple[Artifact, Artifact]:
    """Index and pixels, as `deepfloyd prepare` makes them, in this thread."""
    # What looks into pictures needs packages that the GPU day does without.
    from deepfloyd_core.crops.identity import pixels_request
    from deepfloyd_core.crops.pixels import build_shards, plan_shards
    from deepfloyd_core.index.identity import index_request
    from deepfloyd_core.index.index import build_index, judges
    from deepfloyd_core.index.scan import scan

    with judges(run) as children:
        found = scan(run)
        index = materialise(
            run.workspace, index_request(run, found), lambda work: build_index(run, found, children, work)
        )
    request = pixels_request(run, index, stage)
    pixels = materialise(run.workspace, request, lambda work: build_shards(plan_shards(run, index, stage, work), work))
    return index, pixels


def embed(run: Run, encoder: Path, captions: list[str]) -> Artifact:
    """The embeds of captions, by the product's own job in this process."""
    from deepfloyd_core.text.encode import encode_captions  # torch, which other benchmarks do without

    texts = run_captions(run, captions)
    request, job = embeds_request(run, texts, encoder), encode_job(run, texts, encoder)
    return materialise(run.workspace, request, lambda work: encode_captions(Job(job, work.path, no_report)))

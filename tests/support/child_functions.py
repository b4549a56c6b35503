"""What tests run in child processes: a module of its own, because a child imports its functions by name."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from deepfloyd_core.crops.pixels import Layout, build_shard, finish_pixels
from deepfloyd_core.crops.summary import CropsSummary
from deepfloyd_core.index import index as image_index
from deepfloyd_core.index.judge import Entry, Verdict, look
from deepfloyd_core.pictures.decode import check_decodes
from deepfloyd_core.pictures.faults import Unreadable
from deepfloyd_core.pictures.resize import take_crops
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.processes.pool import Children, Limits
from deepfloyd_core.store.artifacts import Artifact, WorkDir, materialise

PYTHON = ctypes.PyDLL(None)  # calls that keep the interpreter to themselves, as a decoder does


def die(way: str) -> str:
    ways: dict[str, Callable[[], object]] = {
        "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "segfault": lambda: ctypes.string_at(0),
        "abort": os.abort,
        "exit code": lambda: os._exit(3),
        "sys.exit": lambda: sys.exit(4),
        "hang": lambda: PYTHON.sleep(600),
    }
    if way in ways:
        ways[way]()
    return way.upper()


def crop_of(data: bytes) -> tuple[int, ...]:
    """The shape of a small crop of a picture."""
    try:
        return take_crops(data, [((96, 96), (0, 0, 64, 80))])[0][0].shape
    except Unreadable as error:
        return (0, len(error.reason))


def dies_where_told(folder: str) -> int:
    """Die at the first call in a folder, live at the next."""
    mark = Path(folder, "was here")
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()


def nap(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def allocate(mib: int) -> str:
    try:
        return allocate_rashly(mib)
    except MemoryError:
        return "refused"


def allocate_rashly(mib: int) -> str:
    return f"{np.ones(mib << 20, np.uint8).nbytes >> 20} MiB"


def process(_: object) -> int:
    return os.getpid()


def fail(kind: str) -> None:
    match kind:
        case "Unreadable":
            raise Unreadable("corrupt", "no such chunk")
        case "FileNotFoundError":
            Path("/nowhere/at all").read_bytes()
        case "UnicodeDecodeError":
            b"\xff".decode()
        case "unsendable":
            raise ValueError(lambda: None)
        case _:
            raise ValueError("a bug")


def verdict(data: bytes) -> str:
    try:
        check_decodes(data)
    except Unreadable as error:
        return error.reason
    return "good"


def lambdas(_: object) -> object:
    return lambda: None


def hang_forever(note: str) -> None:
    """A whole program: two children hang when `note` is there with their numbers."""
    with Children(2, Limits(seconds=600), ("child_functions",)) as children:

        def ways() -> Iterator[str]:
            pids = [str(pid) for pid in children.map(process, range(2))]
            Path(note).write_text(" ".join(pids))
            yield from ("hang", "hang")

        list(children.map(die, ways()))


def make_data(run_file: str) -> None:
    """A whole program: what `deepfloyd prepare` makes, in smaller blocks; prints a line when its imports are done."""
    from data_world import DataWorld

    class Threaded(DataWorld):
        @override
        def shards(self, layout: Layout, work: WorkDir, beside: Artifact | None = None) -> CropsSummary:
            with ThreadPoolExecutor(2) as pool:  # as the task runner does
                results = list(pool.map(lambda shard: build_shard(shard, work.path, layout.older), layout.made))
            return finish_pixels(layout, results, work, beside)

    image_index.BLOCK = 40
    run = load_run(Path(run_file))
    print("started", flush=True)
    with image_index.judges(run) as children:
        world = Threaded(Path(run_file).parent, children)
        index = world.index(run)
        world.eval_set(run, index)
        for stage in run.config.stages:
            world.pixels(run, index, stage)


def make_embeds(run_file: str, settings: tuple[str, ...], captions: list[str], encoder: str, reports: str) -> None:
    """What the task makes of captions; each report's count is a line of the file `reports`."""
    from deepfloyd_core.processes.jobs import Job
    from deepfloyd_core.text.embeds import FILES, embeds_request, encode_job
    from deepfloyd_core.text.encode import encode_captions

    run = load_run(Path(run_file), settings)

    def report(done: int, total: int, line: str) -> None:
        with Path(reports).open("a") as file:
            file.write(f"{done}\n")

    materialise(
        run.workspace, embeds_request(run, captions, Path(encoder)),
        lambda work: encode_captions(Job(encode_job(run, captions, Path(encoder)), work.path, report)), parts=FILES,
    )  # fmt: skip


def killed(_: object) -> None:
    """Stands for a decoder's bug that every picture meets."""
    os.kill(os.getpid(), signal.SIGKILL)


def killed_by_name(job: tuple[Any, Any, Entry]) -> Verdict:
    """Stands for a decoder's bug: the picture's name says how it ends."""
    name = Path(job[2].source).name
    if name.startswith("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    if name.startswith("crash"):
        os.abort()
    return look(*job)


def hangs_by_name(job: tuple[Any, Any, Entry]) -> Verdict:
    """Stands for a decoder that takes too long at a picture whose name says so."""
    if Path(job[2].source).name.startswith("slow"):
        PYTHON.sleep(60)
    return look(*job)

"""Fixtures that several files share: a world of pictures, a small run on the tiny cascade, one real Prefect server."""

import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from deepfloyd_core.config.flavours import Stage
from deepfloyd_core.config.run import Run
from deepfloyd_core.crops.conditioning import plan_conditioning, plan_eval_conditioning
from deepfloyd_core.crops.identity import conditioning_request, eval_request, pixels_request
from deepfloyd_core.crops.pixels import (
    build_shards,
    plan_eval,
    plan_shards,
)
from deepfloyd_core.index.identity import index_request
from deepfloyd_core.index.index import build_index
from deepfloyd_core.index.ledger import INDEX_FILE, check_share
from deepfloyd_core.index.scan import scan
from deepfloyd_core.index.summary import IndexSummary
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.processes.pool import Children, Limits
from deepfloyd_core.store.artifacts import Artifact, materialise
from flows.server import prefect_server

if TYPE_CHECKING:
    from PIL import Image

gc.disable()  # until all is imported, of which nothing is garbage
# One thread: two would spin against the other processes of a test, and rounding would differ between their counts.
os.environ["OMP_NUM_THREADS"] = "1"
# What a test writes need not survive a power cut; the tests of what is forced to the disk look for the calls.
os.fsync = lambda fd: None  # type: ignore[assignment]
# Tests call the core outside of flow runs, in processes where another test may have imported Prefect.
os.environ["PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW"] = "ignore"
# A shell script starts its `&` jobs with SIGINT ignored, nohup with SIGHUP; what a test starts would then ignore it as well.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

RUN_FILE = """
workspace = "{folder}/workspace"
data_backend_config = "{folder}/data.json"
num_eval_images = 2
shard_mib = 0.2
mixed_precision = "no"
text_encoder_dtype = "fp32"
device = "cpu"
num_threads = 1
validation_prompt = "a purple star"
num_validation_images = 2
num_upscaled_images = 1
max_rejected_share = 0.5

[stage1]
model_flavour = "tiny-i"
lora_rank = 4
learning_rate = 1e-3
max_train_steps = 12
train_batch_size = 2
checkpoint_step_interval = 2
caption_dropout_probability = 0.3
lora_dropout = 0.1
random_flip = true
use_ema = true
validation_step_interval = 6
validation_num_inference_steps = 2
validation_guidance = 3.0

[stage2]
model_flavour = "tiny-ii"
lora_rank = 4
learning_rate = 1e-3
max_train_steps = 6
train_batch_size = 1
checkpoint_step_interval = 1
validation_num_inference_steps = 2
validation_guidance = 1.0
validation_noise_level = 100
"""


@dataclass(frozen=True)
class SmallRun:
    """A run file with a folder of drawn pictures of its own, and the command line to run it."""

    folder: Path

    @property
    def config(self) -> Path:
        """The run file."""
        return self.folder / "run.toml"

    @property
    def workspace(self) -> Path:
        """Where its artifacts are."""
        return self.folder / "workspace"

    @property
    def pictures(self) -> Path:
        """Its data set."""
        return self.folder / "pictures"

    def add_picture(self, number: int) -> None:
        """Draw one more captioned picture, large enough for both stages."""
        from PIL import Image

        from deepfloyd_core.measures import drawn_world as world

        rng = np.random.default_rng(number)
        width, height = int(rng.integers(260, 420)), int(rng.integers(260, 420))
        Image.fromarray(world.draw(rng, "a purple star", width, height)).save(self.pictures / f"star_{number:03d}.png")
        (self.pictures / f"star_{number:03d}.txt").write_text("a purple star\n")

    def command(self, *arguments: str) -> list[str]:
        """A `deepfloyd` command line."""
        return [sys.executable, "-P", "-m", "flows", *arguments]

    def call(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run the command line and return exit code and output."""
        return subprocess.run(self.command(*arguments), capture_output=True, text=True, cwd=self.folder, timeout=600)

    def call_here(self, *arguments: str, all_losses: bool = False) -> "subprocess.CompletedProcess[str]":
        """Like `call`, in a fork of this process that starts no other: a whole run takes a third of the time."""
        from command_here import call_here

        return call_here(arguments, self.folder, all_losses)

    def start_here(self, log: Path, *arguments: str, all_losses: bool = False) -> "multiprocessing.process.BaseProcess":
        """Begin what `call_here` waits for; both outputs go to the end of one file."""
        from command_here import start_here

        return start_here(arguments, self.folder, (log, log), all_losses)


def make_small_run(folder: Path, pictures: int = 8) -> SmallRun:
    """Write the run file, the data file and the pictures of a small run."""
    run = SmallRun(folder)
    run.pictures.mkdir(parents=True)
    for number in range(pictures):
        run.add_picture(number)
    (run.pictures / "broken.jpg").write_bytes(b"not a picture")
    sizes = {"minimum_image_size": 64, "maximum_image_size": 64, "target_downsample_size": 64}
    entry = {
        "id": "stars", "type": "local", "instance_data_dir": str(run.pictures), "crop": True, "crop_aspect": "square",
        "crop_style": "random", "resolution": 64, "caption_strategy": "textfile", "repeats": 1, **sizes,
    }  # fmt: skip
    (folder / "data.json").write_text(json.dumps([entry]))
    run.config.write_text(RUN_FILE.format(folder=folder))
    return run


_LONGEST = (
    "test_demo", "test_trainer", "test_runners", "test_gpu_day", "test_stopping", "test_flows", "test_killed_runs",
    "test_ui", "test_embeds", "test_quantized", "test_server", "test_outbox", "test_remakes", "test_random_weights",
    "test_killed_training", "test_tiny_cascade", "test_controlnet", "test_hostile_pictures", "test_pool",
    "test_data_stages", "test_sources", "test_bitfit", "test_data_options", "test_full", "test_lora",
    "test_killed_data_stages", "test_start_from",
)  # fmt: skip


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One process more than cores: tests also wait, for servers and for what they started."""
    return len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that no core waits for the other at the end."""
    items.sort(key=lambda item: _LONGEST.index(item.path.stem) if item.path.stem in _LONGEST else len(_LONGEST))


def pytest_collection_finish() -> None:
    """What was imported stays: the collector need not look at it again, nor copy its pages into forks."""
    gc.enable()
    gc.freeze()


@pytest.fixture
def small_run(tmp_path: Path) -> SmallRun:
    """A fresh small run."""
    return make_small_run(tmp_path)


@dataclass(frozen=True)
class DataWorld:
    """A folder of pictures with its data file and run file, and the data stages as the tasks chain them."""

    folder: Path
    children: Children

    def add(self, name: str, picture: "Image.Image | np.ndarray | bytes", caption: str | None = "a caption") -> Path:
        """Put one file (an array or picture is saved in the format of its name) and its caption into `pictures`."""
        from PIL import Image

        path = self.folder / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(picture, bytes):
            path.write_bytes(picture)
        else:
            (Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture).save(path)
        if caption is not None:
            path.with_suffix(".txt").write_text(caption, encoding="utf-8")
        return path

    def load(self, *entries: dict[str, Any], stages: tuple[int, ...] = (1, 2), **keys: Any) -> Run:
        """Write the files and load them. Each entry is one data set; without one, `pictures` at 64 px."""
        common = {"type": "local", "instance_data_dir": str(self.folder / "pictures"), "caption_strategy": "textfile"}
        data = [{"id": "set", **common, **entry} for entry in entries or ({},)]
        (self.folder / "data.json").write_text(json.dumps(data))
        flavours = {f"stage{stage}": {"model_flavour": f"tiny-{'i' * stage}"} for stage in stages}
        where = {"workspace": str(self.folder / "workspace"), "data_backend_config": str(self.folder / "data.json")}
        (self.folder / "run.json").write_text(json.dumps({**where, "num_eval_images": 1, **flavours, **keys}))
        return load_run(self.folder / "run.json")

    def index(self, run: Run) -> Artifact:
        """The image index, checked against the limit of rejects."""
        found = scan(run)
        request = index_request(run, found)
        index = materialise(run.workspace, request, lambda work: build_index(run, found, self.children, work))
        check_share(index.summary(IndexSummary), run.config.max_rejected_share, index.path / INDEX_FILE)
        return index

    def pixels(self, run: Run, index: Artifact, stage: Stage) -> Artifact:
        """The shards of a stage."""
        request = pixels_request(run, index, stage)
        return materialise(
            run.workspace, request, lambda work: build_shards(plan_shards(run, index, stage, work), work)
        )

    def conditioning(self, run: Run, index: Artifact, of: Artifact) -> Artifact:
        """The pairs of Stage I's pixels, or of the eval set."""
        plan = plan_conditioning if of.kind == "stage1_pixels" else plan_eval_conditioning
        request = conditioning_request(run, index, of)
        return materialise(run.workspace, request, lambda work: build_shards(plan(run, index, work), work, of))

    def eval_set(self, run: Run, index: Artifact) -> Artifact:
        """The held-out pictures."""
        request = eval_request(run, index)
        return materialise(run.workspace, request, lambda work: build_shards(plan_eval(run, index, work), work))


@pytest.fixture(scope="session")
def children() -> Iterator[Children]:
    """Two processes that judge pictures, for all tests: starting them takes half a second."""
    with Children(2, Limits(), ("deepfloyd_core.index.index",)) as children:
        yield children


@pytest.fixture
def world(tmp_path: Path, children: Children) -> DataWorld:
    """An empty world of pictures."""
    (tmp_path / "pictures").mkdir()
    return DataWorld(tmp_path, children)


@pytest.fixture(scope="session")
def new_world(children: Children) -> Callable[[Path], DataWorld]:
    """Make further worlds, for fixtures of a wider scope."""
    return lambda folder: DataWorld(folder, children)


@pytest.fixture(scope="session")
def new_small_run() -> Callable[[Path], SmallRun]:
    """Make further small runs, for fixtures of a wider scope."""
    return make_small_run


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Prefect server on a free loopback port with a home of its own; child processes find it by PREFECT_API_URL.

    All processes of a test session share it: the first to need it starts it.
    """
    base = tmp_path_factory.getbasetemp()
    session = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with prefect_server(session / "prefect-home") as url:
        yield url

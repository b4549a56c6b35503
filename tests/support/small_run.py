"""A small run on the tiny cascade: its run file, its data file and its drawn pictures."""

import io
import json
import multiprocessing
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from deepfloyd_core.measures import drawn_world

RUN_FILE = """
workspace = "{folder}/workspace"
data_backend_config = "{folder}/data.json"
shard_mib = 0.2
mixed_precision = "no"
text_encoder_dtype = "fp32"
device = "cpu"
num_threads = 1
validation_prompt = "a purple star"
num_validation_images = 1
num_upscaled_images = 1
forgetting_probes = 0
max_rejected_share = 0.5
gate = "off"

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
        (self.pictures / f"star_{number:03d}.png").write_bytes(_purple_star(number))
        (self.pictures / f"star_{number:03d}.txt").write_text("a purple star\n")

    def command(self, *arguments: str) -> list[str]:
        """A `deepfloyd` command line."""
        return [sys.executable, "-P", "-m", "flows", *arguments]

    def call(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run the command line and return exit code and output."""
        return subprocess.run(self.command(*arguments), capture_output=True, text=True, cwd=self.folder, timeout=600)

    def call_here(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Like `call`, in a fork of this process that starts no other: a whole run takes a third of the time."""
        from command_here import call_here

        return call_here(arguments, self.folder)

    def start_here(self, log: Path, *arguments: str) -> "multiprocessing.process.BaseProcess":
        """Begin what `call_here` waits for; both outputs go to the end of one file."""
        from command_here import start_here

        return start_here(arguments, self.folder, (log, log))


class NewSmallRun(Protocol):
    """`make_small_run`, as a fixture gives it."""

    def __call__(self, folder: Path, pictures: int = 8) -> SmallRun: ...


@cache
def _purple_star(number: int) -> bytes:
    rng = np.random.default_rng(number)
    width, height = int(rng.integers(260, 420)), int(rng.integers(260, 420))
    file = io.BytesIO()
    Image.fromarray(drawn_world.draw(rng, "a purple star", width, height)).save(file, "PNG")
    return file.getvalue()


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

"""Stage II learns to upscale: ours and the recipe of other trainers, beside the untuned model and plain enlargements.

The other recipe is that of SimpleTuner and of diffusers' example for IF: the UNet is fed concat(x_t, x_t) with the timestep
as class label, so that it never sees the low-res picture. Both are trained by the product's trainer with the same steps,
pictures, draws and settings, on windows of random crops and on their own guesses (scheduled sampling), and measured by the
product on crops of pictures that were held out, at several noise levels of the low-res picture: once by the stock pipeline,
once with back-projection, each time trained for it. Data: drawn stars, and the photographs inside scikit-image,
scikit-learn and matplotlib together with those of two packages of Debian, which are asked for by `--debian`:
`apt-get download mate-backgrounds opencv-doc`, and `dpkg-deb -x FILE FOLDER` for each. A run goes on where it was stopped
when it is given the same `--folder`.
"""

import argparse
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from worlds import embed, prepare, several_sets

from deepfloyd_core.adapters.files import LORA_FILE
from deepfloyd_core.config.run import Run
from deepfloyd_core.crops.identity import eval_request
from deepfloyd_core.crops.pixels import build_shards, plan_eval
from deepfloyd_core.crops.rows import shard_files
from deepfloyd_core.crops.shards import ShardRow, read_rows
from deepfloyd_core.diffusion.loss import low_res
from deepfloyd_core.hashing import caption_id, hash_seed
from deepfloyd_core.index.ledger import caption_counts
from deepfloyd_core.measures.files import UpscalingFiles
from deepfloyd_core.measures.pixel import mean_and_interval
from deepfloyd_core.measures.upscaling import Upscaler, measure_upscalers
from deepfloyd_core.models.folders import resolve
from deepfloyd_core.processes.jobs import Job
from deepfloyd_core.sampling.jobs import SampledStage
from deepfloyd_core.sampling.sampler import make_sampler, sample_upscaled
from deepfloyd_core.store.artifacts import Artifact, materialise
from deepfloyd_core.text.embeds import Embeds
from deepfloyd_core.training import forward as stage_loss
from deepfloyd_core.training import trainer as train
from deepfloyd_core.training.batches import Draws
from deepfloyd_core.training.jobs import TrainingInputs, TrainingSummary, train_job

LEVELS = (0, 100, 250, 500)
UNTUNED, OTHER, OURS = "untuned", "concat(x_t, x_t)", "ours"
WAYS = ("bilinear", "bicubic", UNTUNED, OTHER, OURS)
DATA = ("stars", "photographs")
HELD_OUT = 10  # of each data set
STARS, FIRST_STAR = 60, 50_000  # seeds that neither the shipped weights nor the demo have seen
# Photographs, micrographs and textures; no charts, no text, one of the stereo pair. Two are left out that hold nothing an
# upscaler could add: bicubic enlargement of a fourth of their size is within 40 dB of them (cell, out of focus, 47.6 dB;
# clock_motion, blurred, 40.7 dB; the others 17 to 39 dB).
PYTHON = (
    "astronaut", "brick", "camera", "chelsea", "china", "coffee", "coins", "flower", "grace_hopper", "grass",
    "gravel", "hubble_deep_field", "ihc", "moon", "motorcycle_left", "retina", "rocket",
)  # fmt: skip
# The photographs of at least 256 px, one of each scene; no drawings, no renderings, no diagrams.
OPENCV = (
    "alphamat/input_images/plant.jpg", "data/aero1.jpg", "data/aloeL.jpg", "data/apple.jpg", "data/baboon.jpg",
    "data/basketball1.png", "data/board.jpg", "data/box_in_scene.png", "data/building.jpg", "data/chicky_512.png",
    "data/ela_original.jpg", "data/fruits.jpg", "data/graf1.png", "data/home.jpg", "data/left01.jpg", "data/leuvenA.jpg",
    "data/messi5.jpg", "data/orange.jpg", "data/rubberwhale1.png", "data/squirrel_cls.jpg", "data/stuff.jpg",
    "dnn_superres/butterfly.png", "reg/home.png", "text/scenetext01.jpg", "text/scenetext02.jpg", "text/scenetext05.jpg",
)  # fmt: skip
MATE = (
    "Aqua", "Blinds", "Dune", "FreshFlower", "Garden", "GreenMeadow", "LadyBird", "RainDrops", "Storm", "TwoWings",
    "Wood", "YellowFlower",
)  # fmt: skip
# Of a picture whose shorter edge is above 384 px, a crop takes 256 px from it at 384 px; of others as they are.
CROPS = {"crop": True, "crop_aspect": "square", "maximum_image_size": 96, "target_downsample_size": 96}
STAGE2 = {
    "model_flavour": "tiny-ii", "mixed_precision": "no", "lora_rank": 16, "random_flip": True, "snr_gamma": 5.0,
    "lora_target_modules": [
        "to_q", "to_out.0", "add_k_proj", "add_v_proj", "conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv_in",
        "conv_out",
    ],
    "learning_rate": 6e-3, "lr_end": 1e-5, "lr_scheduler": "cosine", "lr_warmup_steps": 10,
    "noise_level_end": 101, "stage2_patch": 128,
    "use_ema": True, "ema_decay": 0.97, "checkpoint_step_interval": 100,
    "validation_guidance": 1.0, "validation_noise_level": LEVELS[0], "validation_noise_levels": LEVELS[1:],
}  # fmt: skip


def draw_stars(folder: Path) -> None:
    """Purple stars, which the shipped weights never saw."""
    from deepfloyd_core.measures import drawn_world as world

    for number in range(STARS):
        rng = np.random.default_rng(FIRST_STAR + number)
        width, height = (int(rng.integers(260, 520)) for _ in range(2))
        Image.fromarray(world.draw(rng, world.NEW_CAPTION, width, height)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(world.NEW_CAPTION)


def python_photographs() -> list[Path]:
    """Those inside three Python packages, which the tests bring."""
    import matplotlib
    import skimage
    import sklearn

    places = (
        Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets/images",
        Path(matplotlib.get_data_path()) / "sample_data",
    )  # fmt: skip
    found = []
    for name in PYTHON:
        (path,) = (file for place in places for file in place.glob(f"{name}.*") if file.suffix in (".png", ".jpg"))
        found.append(path)
    return found


def debian_photographs(unpacked: Path) -> list[Path]:
    """Those inside two packages of Debian, from the folder in which they were unpacked."""
    opencv, mate = unpacked / "usr/share/doc/opencv-doc/examples", unpacked / "usr/share/backgrounds/mate/nature"
    return [*(opencv / name for name in OPENCV), *(mate / f"{name}.jpg" for name in MATE)]


def copy_photographs(paths: list[Path], folder: Path) -> None:
    """Photographs, and a caption for each."""
    for path in paths:
        name = f"{path.parent.name}-{path.name}"
        shutil.copyfile(path, folder / name)
        (folder / name).with_suffix(".txt").write_text("a photograph")


class Doubled(stage_loss.UNetInput):
    """Those trainers' idea of Stage II's input: concat(x_t, x_t), and t as class label, at every point of the way."""

    def at(self, x_t: torch.Tensor, t: torch.Tensor) -> "Doubled":
        """The same batch at another point."""
        return Doubled(torch.cat([x_t, x_t], dim=1), t, t, self.text, small=self.small)


def other_recipe(
    context: stage_loss.TrainingContext, x_0: torch.Tensor, draws: Draws, captions: list[str | None], *_: None
) -> stage_loss.UNetInput:
    """What those trainers do in the place of `stage_loss.feed`."""
    x_t = context.scheduler.add_noise(x_0, draws.fed, draws.t)
    text = context.texts([caption_id("") if name is None else name for name in captions])
    return Doubled(draws.cut(torch.cat([x_t, x_t], dim=1)), draws.t, draws.t, text, small=low_res(x_0))


@contextmanager
def recipe(way: str) -> Iterator[None]:
    """The trainer as it is, or with the other recipe."""
    before = stage_loss.feed
    stage_loss.feed = other_recipe if way == OTHER else before
    try:
        yield
    finally:
        stage_loss.feed = before


def make_sets(data: str, debian: Path | None) -> dict[str, Callable[[Path], None]]:
    """The data sets of a kind of data: what writes the pictures of each into a folder."""
    if data == "stars":
        return {"stars": draw_stars}
    places = {"python": python_photographs()} | ({"debian": debian_photographs(debian)} if debian else {})
    return {name: partial(copy_photographs, paths) for name, paths in places.items()}


def make_run(folder: Path, data: str, wanted: argparse.Namespace, back_projection: bool) -> Run:
    """A run over the data sets of a kind of data."""
    place, entries = folder / f"{data}-run", []
    place.mkdir(exist_ok=True)
    for name, write in make_sets(data, wanted.debian).items():
        pictures = folder / name
        if not pictures.exists():
            pictures.mkdir()
            write(pictures)
        entries.append({**CROPS, "id": name, "type": "local", "instance_data_dir": str(pictures), "crop_style": "random",
                        "caption_strategy": "textfile", "resolution": 64, "repeats": wanted.repeats})  # fmt: skip
    stage = {**STAGE2, "max_train_steps": wanted.steps, "train_batch_size": wanted.batch}
    stage |= {"validation_back_projection": back_projection, "validation_num_inference_steps": wanted.inference_steps}
    stage["scheduled_sampling_max_step_offset"] = wanted.max_step_offset
    stage["scheduled_sampling_probability"] = 1.0 if wanted.max_step_offset else 0.0
    common = {"device": "cpu", "num_threads": wanted.threads, "text_encoder_dtype": "fp32"}
    return several_sets(place, 2, entries, stage2=stage, num_eval_images=HELD_OUT, **common)


def trained(run: Run, inputs: TrainingInputs[Artifact], model: Path, way: str, out: Path) -> TrainingSummary | None:
    """Train one way into a folder; prints a line now and then."""
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    def report(done: int, total: int, line: str) -> None:
        if done % 50 == 0:
            print(f"<!-- {out.name} {done}/{total} {time.monotonic() - started:.0f} s {line} -->", flush=True)

    if (out / LORA_FILE).exists():
        return None
    with recipe(way):
        return train.train(Job(train_job(run, 2, model, inputs, [], None), out, report))


def upscaler(run: Run, model: Path, lora: Path | None, embeds: Artifact) -> Upscaler:
    """Samples the held-out pictures as the product does."""
    sampler, texts = (
        make_sampler(
            SampledStage(stage=2, settings=run.config.stage(2), model=model), lora, run.config, lambda count: None
        ),
        Embeds(embeds),
    )

    def upscale(rows: list[ShardRow], small: torch.Tensor, noise_level: int) -> torch.Tensor:
        seeds = [hash_seed("eval", row.image_id) % 2**32 for row in rows]
        text, negative = torch.stack([texts.of(row.caption) for row in rows]), torch.stack([texts.of("")] * len(rows))
        return sample_upscaled(sampler.at(noise_level), text, negative, seeds, small)

    return upscale


def eval_set(run: Run, index: Artifact) -> Artifact:
    """The held-out pictures."""
    return materialise(
        run.workspace, eval_request(run, index), lambda work: build_shards(plan_eval(run, index, work), work)
    )


def measure(folder: Path, data: str, wanted: argparse.Namespace, back_projection: bool) -> None:
    """Train both ways on a data set for a way of sampling, measure all ways, print their table."""
    run, said = make_run(folder, data, wanted, back_projection), "back-projected" if back_projection else "stock"
    index, pixels = prepare(run, 2)
    held_out = eval_set(run, index)
    model = resolve(run.config.stage(2).model, 2)
    embeds = embed(run, model, list(caption_counts(index)))
    inputs = TrainingInputs(pixels=pixels, text=embeds, eval_set=held_out)
    loras: dict[str, Path | None] = {UNTUNED: None}
    for way, name in ((OURS, "ours"), (OTHER, "other")):
        loras[way] = out = folder / f"{data}-{said}-{name}"
        if summary := trained(run, inputs, model, way, out):
            kept = ("rows", "trainable_parameters", "last_loss", "eval_loss_base", "eval_loss")
            print(f"<!-- {way}: { ({key: getattr(summary, key) for key in kept}) } -->", flush=True)
    ways = {way: partial(upscaler, run, model, loras[way], embeds) for way in WAYS[2:]}
    out = folder / f"{data}-{said}"
    out.mkdir(exist_ok=True)
    files = UpscalingFiles(2, out)
    measure_upscalers(shard_files(held_out, 2), ways, LEVELS, files)
    table = pq.read_table(files.table).to_pylist()
    out_of_it = held_out.manifest.summary["pictures"]
    print(
        f"\n### {data}, {said}: {pixels.manifest.summary['pictures'] - out_of_it} to train on, {out_of_it} held out\n"
    )
    for line in lines(table):
        print(line, flush=True)
    of_set = {row.image_id: row.dataset_id for file in shard_files(held_out, 2) for row in read_rows(file)}
    sets = sorted(set(of_set.values()))
    for name in sets if len(sets) > 1 else ():
        print(f"\nThe {HELD_OUT} of {name}:\n")
        for line in lines([row for row in table if of_set[row["image_id"]] == name]):
            print(line, flush=True)


def lines(table: list[dict[str, Any]]) -> Iterator[str]:
    """The markdown table of one data set."""
    gains = [(measure, other) for measure in ("psnr", "ssim") for other in WAYS[:3]]
    heads = ["noise level", "way", "PSNR, dB", "SSIM", *(f"{measure.upper()} over {other}" for measure, other in gains)]
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for level in (None, *LEVELS):
        at = {way: [row for row in table if row["way"] == way and row["noise_level"] in (None, level)] for way in WAYS}
        for way in WAYS[:2] if level is None else WAYS[2:]:
            psnr, ssim = (np.mean([row[name] for row in at[way]]) for name in ("psnr", "ssim"))
            more = [
                gain(at[way], at[other], measure) if level is not None and other != way else ""
                for measure, other in gains
            ]
            yield f"| {'' if level is None else level} | {way} | {psnr:.2f} | {ssim:.4f} | {' | '.join(more)} |"


def gain(mine: list[dict[str, Any]], other: list[dict[str, Any]], measure: str) -> str:
    """The mean of a paired difference, and its 95 % interval; bold where that is clear of zero and above."""
    differences = [one[measure] - two[measure] for one, two in zip(mine, other, strict=True)]
    middle, low, high = mean_and_interval(differences)
    digits = 2 if measure == "psnr" else 3
    text = f"{middle:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
    return f"**{text}**" if low > 0 else text


def main() -> None:
    """Print a table for each data set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=DATA, action="append", help="this one alone")
    parser.add_argument("--debian", type=Path, help="where its packages mate-backgrounds and opencv-doc are unpacked")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--max-step-offset", type=int, default=700, help="of scheduled sampling; 0: without")
    parser.add_argument("--inference-steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9, help="further crops of each picture")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keep everything here, and go on with what is in it")
    wanted = parser.parse_args()
    torch.set_num_threads(wanted.threads)
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as name:
        folder = wanted.folder or Path(name)
        folder.mkdir(exist_ok=True)
        for data, back_projection in product(wanted.data or DATA, (True, False)):
            measure(folder, data, wanted, back_projection)


if __name__ == "__main__":
    main()

"""How fast captions become stored embeds and come back, side by side with two other ways, and how many bytes each takes.

Encoder: T5 v1.1 of base size (d_model 768, d_ff 2048, 12 layers, 12 heads of 64) with random weights. Captions: words of the
shipped tokenizer, one token each; tokens with the end token are drawn log-normally (median 17, sigma 0.55) and cut to 5
to 77, mean about 20; 30 % are repeats of another caption of the same chunk. Ours is the product's job: clean, each text
once, encode, write Arrow. `one at a time` is the common way: `IFPipeline.encode_prompt` for each caption and a gzipped
`torch.save` file for each. `batches` is `encode_prompt` for 16 or 32 captions, which stores nothing. All encode the same
captions with the same weights, in one process on one thread, and take turns chunk by chunk. CPU time; all files are in the
page cache. Each loads the encoder for each chunk (ours inside the job): what that takes with a first caption is measured
beside each chunk and taken off, because a run pays it once and not for every 60 captions.
"""

import argparse
import gzip
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import IFPipeline
from transformers import AutoTokenizer, T5EncoderModel
from worlds import embed, one_set

from deepfloyd_core.config.flavours import FLAVOURS
from deepfloyd_core.config.run import Run
from deepfloyd_core.models.random_weights import design_of, write_folder
from deepfloyd_core.models.text_encoders import T5_XXL
from deepfloyd_core.text.embeds import Embeds
from deepfloyd_core.tiny.make.models import WORDS

T5_BASE = {**T5_XXL, "d_model": 768, "d_ff": 2048, "num_heads": 12, "num_layers": 12}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
REPEATS = 0.3
GOALS = {"one at a time": 3.0, "batches of 16": 1.3, "batches of 32": 1.3}


def caption_chunks(captions: int, chunks: int) -> list[list[str]]:
    """The captions, cut into chunks; see the module for their distribution."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(chunks):
        size = captions // chunks
        lengths = np.clip(np.round(rng.lognormal(np.log(17), 0.55, size - round(size * REPEATS))), 5, 77).astype(int)
        distinct = [" ".join(rng.choice(WORDS, length - 1)) for length in lengths]
        repeats = rng.choice(distinct, size - len(distinct)).tolist()
        made.append(rng.permutation(distinct + repeats).tolist())
    return made


def make_run(folder: Path, dtype: str, batch: int) -> tuple[Run, Path]:
    """A run with one thread on the CPU, and the folder of its encoder."""
    base = replace(design_of(FLAVOURS["tiny-i"]), text=T5_BASE, dtype=str(DTYPES[dtype]).removeprefix("torch."))
    (folder / "models").mkdir()
    run = one_set(folder, 1, {}, device="cpu", num_threads=1, text_encoder_dtype=dtype, embed_batch_size=batch)
    return run, write_folder(("t5-base", base, True, folder / "models"))


def pipeline(folder: Path, dtype: torch.dtype) -> Any:
    """The stock pipeline with nothing but the text encoder."""
    encoder = T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=dtype, use_safetensors=True)
    parts = dict.fromkeys(("unet", "scheduler", "safety_checker", "feature_extractor", "watermarker"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    return IFPipeline(**parts, tokenizer=tokenizer, text_encoder=encoder.eval(), requires_safety_checker=False)


def rows(pipe: Any, captions: list[str]) -> torch.Tensor:
    """What `encode_prompt` gives for captions: (N, 77, D)."""
    found: torch.Tensor = pipe.encode_prompt(captions, do_classifier_free_guidance=False, clean_caption=True)[0]
    return found


def one_at_a_time(folder: Path, dtype: torch.dtype, captions: list[str], out: Path) -> None:
    """A gzipped file for each caption of the list."""
    pipe = pipeline(folder, dtype)
    for number, caption in enumerate(captions):
        with gzip.open(out / f"{number}.pt", "wb") as handle:
            torch.save(rows(pipe, [caption]), handle)


def in_batches(folder: Path, dtype: torch.dtype, captions: list[str], size: int) -> None:
    """Encoded only."""
    pipe = pipeline(folder, dtype)
    for start in range(0, len(captions), size):
        rows(pipe, captions[start : start + size])


def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU time of this process's threads for a call, and what it returned."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def farthest(embeds: Embeds, captions: list[str], files: Path) -> float:
    """The largest distance of our rows from the pipeline's, over their root mean square."""
    worst = 0.0
    for number, caption in enumerate(captions):
        with gzip.open(files / f"{number}.pt", "rb") as handle:
            theirs = torch.load(handle)[0].float()
        worst = max(worst, float((embeds.of(caption).float() - theirs).norm() / theirs.norm()))
    return worst


def read_seconds(embeds: Embeds, captions: list[str], files: Path) -> tuple[list[float], list[float]]:
    """CPU seconds of each read into memory of its own: ours, the gzipped files."""
    ours, theirs = [], []

    def load(number: int) -> torch.Tensor:
        with gzip.open(files / f"{number}.pt", "rb") as handle:
            return torch.load(handle)[0]

    for number, caption in enumerate(captions):
        ours.append(cpu_seconds(lambda caption=caption: [embeds.of(caption).clone() for _ in range(20)])[0] / 20)
        theirs.append(cpu_seconds(lambda number=number: load(number))[0])
    return ours, theirs


def report(seconds: dict[str, float], sizes: dict[str, float], captions: int, share: float) -> None:
    """Print the table of speeds. share: of the captions that are no repeats, as if the other ways had skipped those."""
    print("| way | captions/s | ours is, times | goal | without the repeats, times | bytes a caption |")
    print("|---|---|---|---|---|---|")
    for name, spent in seconds.items():
        ratio = spent / seconds["ours"]
        goal = f">= {GOALS[name]}" if name in GOALS else ""
        size = f"{sizes[name]:,.0f}" if name in sizes else "not stored"
        fair = f"{ratio * share:.2f}" if name in GOALS else ""
        print(f"| {name} | {captions / spent:.2f} | {ratio:.2f} | {goal} | {fair} | {size} |")


def main() -> None:
    """Print speed, size and read time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the encoder and of what is stored")
    parser.add_argument("--captions", type=int, default=240)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16, help="our embed_batch_size")
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    machine = f"{platform.machine()} ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} cores"
    print(f"{machine}, load {os.getloadavg()[0]:.1f}; {versions}, diffusers {diffusers.__version__}")
    chunks = caption_chunks(wanted.captions, wanted.chunks)
    distinct = sum(len(set(chunk)) for chunk in chunks)
    tokens = [len(caption.split()) + 1 for chunk in chunks for caption in chunk]
    print(
        f"{len(tokens)} captions, {distinct} distinct, {min(tokens)} to {max(tokens)} tokens, mean {np.mean(tokens):.1f}"
    )

    dtype = DTYPES[wanted.dtype]
    seconds = dict.fromkeys(("ours", "one at a time", "batches of 16", "batches of 32"), 0.0)
    starts = {"ours": 0.0, "the others": 0.0}
    ours_read: list[float] = []
    gzip_read: list[float] = []
    bytes_of, worst = {"ours": 0, "one at a time": 0}, 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run, encoder = make_run(folder, wanted.dtype, wanted.batch)
        embed(run, encoder, ["warm up"])
        for turn, captions in enumerate(chunks):
            files = folder / f"gzip-{turn}"
            files.mkdir()
            starts["ours"] += cpu_seconds(lambda turn=turn: embed(run, encoder, [f"start {turn}"]))[0]
            starts["the others"] += cpu_seconds(lambda: rows(pipeline(encoder, dtype), ["start"]))[0]
            spent, artifact = cpu_seconds(lambda captions=captions: embed(run, encoder, captions))
            seconds["ours"] += spent
            seconds["one at a time"] += cpu_seconds(
                lambda captions=captions, files=files: one_at_a_time(encoder, dtype, captions, files)
            )[0]
            for size in (16, 32):
                seconds[f"batches of {size}"] += cpu_seconds(
                    lambda captions=captions, size=size: in_batches(encoder, dtype, captions, size)
                )[0]
            bytes_of["ours"] += sum(file.stat().st_size for file in artifact.path.iterdir())
            bytes_of["one at a time"] += sum(file.stat().st_size for file in files.iterdir())
            embeds = Embeds(artifact)
            worst = max(worst, farthest(embeds, captions, files))
            for total, part in zip((ours_read, gzip_read), read_seconds(embeds, captions, files), strict=True):
                total += part
            print(f"chunk {turn + 1} of {len(chunks)} done", file=sys.stderr, flush=True)
    print(f"\n### {wanted.dtype}\n")
    net = {way: spent - starts.get(way, starts["the others"]) for way, spent in seconds.items()}
    share = (distinct - len(chunks)) / (len(tokens) - len(chunks))
    report(net, {way: size / len(tokens) for way, size in bytes_of.items()}, len(tokens) - len(chunks), share)
    ours, theirs = np.median(ours_read) * 1e3, np.median(gzip_read) * 1e3
    print(f"\nA read, median: ours {ours:.3f} ms, gzipped file {theirs:.2f} ms, {theirs / ours:.0f} times; goal >= 20.")
    mine, other = (spent / len(chunks) for spent in starts.values())
    print(
        f"Taken off each chunk's seconds, for loading and the first caption: ours {mine:.2f}, the others {other:.2f}."
    )
    print(f"Our rows against the pipeline's, largest relative distance: {worst:.1e}.")


if __name__ == "__main__":
    main()

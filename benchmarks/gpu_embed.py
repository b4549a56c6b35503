"""Captions a second through T5-v1.1-XXL on a GPU, and which share of the card's own bf16 matrix product that is.

The captions have 77 tokens, so that no row can be left out: 0.72 TFLOP each. The product's job encodes them and writes its
files; a short job is subtracted from a long one, which leaves the captions without the start and the loading. The card's
peak is measured, not its data sheet's: the best of products of 8192 x 4096 by 4096 x 10240, T5's own widths. Writes 9.5 GB
of random weights once. Goal on an H200: >= 60 % of the peak, >= 500 captions/s. Without a GPU there is nothing to measure.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from worlds import embed, one_set

from deepfloyd_core.config import Run
from deepfloyd_core.flavours import resolve
from deepfloyd_core.tiny.models import WORDS

TOKENS = 77
GOALS = "goal on an H200: >= 60 %, >= 500 captions/s"


def seconds(run: Run, encoder: Path, captions: list[str]) -> float:
    """Wall time of the product's job over captions, in this process."""
    start = time.perf_counter()
    embed(run, encoder, captions)
    return time.perf_counter() - start


def flop_per_caption(config: dict[str, Any]) -> float:
    """Multiplications and additions of T5's encoder over 77 rows; the table and the norms cost nothing beside them."""
    inner = config["num_heads"] * config["d_kv"]
    weights = 4 * config["d_model"] * inner + 3 * config["d_model"] * config["d_ff"]
    return float(config["num_layers"] * 2 * (TOKENS * weights + 2 * TOKENS * TOKENS * inner))


def peak_flops(device: str, repeats: int = 20) -> float:
    """FLOP/s of the best of some matrix products in bf16."""
    rows, inner, columns = (8192, 4096, 10240) if device == "cuda" else (77, 256, 256)
    left = torch.randn((rows, inner), device=device, dtype=torch.bfloat16)
    right = torch.randn((inner, columns), device=device, dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(repeats):
            left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) / repeats)
    return 2.0 * rows * inner * columns / best


def main() -> None:
    """Print the machine, its peak, and a row for each batch size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=int, default=4096, help="of the long job")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--model", default="random:i-medium-400m", help="random:tiny-i tries the benchmark itself")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the benchmark itself")
    wanted = parser.parse_args()
    if wanted.device == "cuda" and not torch.cuda.is_available():
        print("Skipped: needs a CUDA GPU, and none is here.")
        return
    transformers.logging.disable_progress_bar()
    card = torch.cuda.get_device_name() if wanted.device == "cuda" else "CPU"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    print(f"{card}, {platform.machine()}, {os.cpu_count()} cores; {versions}, transformers {transformers.__version__}")
    encoder = resolve(wanted.model, 1, text=True)
    flop = flop_per_caption(json.loads((encoder / "text_encoder/config.json").read_bytes()))
    peak = peak_flops(wanted.device)
    print(f"{flop / 1e12:.3g} TFLOP a caption; matrix product in bf16: {peak / 1e12:.4g} TFLOP/s\n")
    print(f"| captions in a batch | captions/s | of the peak ({GOALS}) |\n|---|---|---|")
    rng = np.random.default_rng(0)
    captions = [" ".join(rng.choice(WORDS, TOKENS - 1)) for _ in range(wanted.captions)]
    few = captions[: max(1, wanted.captions // 8)]
    for batch in wanted.batch:
        with tempfile.TemporaryDirectory() as name:
            stage = {"model_flavour": wanted.model}
            run = one_set(Path(name), 1, {}, device=wanted.device, embed_batch_size=batch, stage1=stage)
            seconds(run, encoder, [captions[0]])  # warms the card and the page cache
            short = seconds(run, encoder, few)
            rate = (len(captions) - len(few)) / (seconds(run, encoder, captions) - short)
        print(f"| {batch} | {rate:,.1f} | {rate * flop / peak:.1%} |")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

"""Memory and time of T5-v1.1-XXL itself (random weights, bf16) over a handful of captions: `--run`.

Not without that word: the encoder takes 9.5 GB of disk, once, and 10 GiB of memory. The product's job encodes the captions
in a child process. Two peaks: all resident memory, and what of it is the process's own (sampled; Linux). The difference are
mapped pages of the weights, which the kernel takes back when memory is short. With the key `text_encoder_streaming` a
second child reads the encoder layer by layer, and must write the same bytes.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from worlds import embed, one_set, own_bytes

from deepfloyd_core.models.folders import resolve

CAPTIONS = [
    "a red circle", "a photo of a green star", "a small blue square on a plain white ground",
    "a drawing of one large yellow triangle and two old pink hearts in soft light on a dark brown ground",
]  # fmt: skip


def encode(folder: Path, model: str, captions: list[str], streaming: bool) -> None:
    """In the child: the product's job. Prints one JSON line."""
    stage = {"model_flavour": model}
    run = one_set(folder, 1, {}, device="cpu", num_threads=1, text_encoder_streaming=streaming, stage1=stage)
    encoder = resolve(model, 1, text=True)
    start = time.perf_counter(), time.process_time()
    artifact = embed(run, encoder, captions)
    wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    files = artifact.hashes
    print(json.dumps({"captions": artifact.manifest.summary["captions"], "wall_s": wall, "cpu_s": cpu, "files": files}))


def measure(model: str, captions: list[str], streaming: bool) -> dict[str, str]:
    """Run one child, print its figures and return the hashes of its files."""
    own, status, usage = 0.0, 0, None
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryFile("w+") as out:
        command = [sys.executable, __file__, "--model", model, "--captions", str(len(captions)), "--child", name]
        child = subprocess.Popen([*command, "--streaming"] if streaming else command, stdout=out)
        ended = 0
        while not ended:
            own = max(own, own_bytes(child.pid) / 2**30)
            time.sleep(0.05)
            ended, status, usage = os.wait4(child.pid, os.WNOHANG)
        if status or usage is None:
            sys.exit(f"the child ended with status {status}")
        out.seek(0)
        found = json.loads(out.read().splitlines()[-1])
    way = "layer by layer" if streaming else "as a whole"
    print(
        f"| {way} | {usage.ru_maxrss / 2**20:.2f} | {own:.2f} | {found['wall_s']:.0f} | {found['cpu_s']:.0f} "
        f"| {found['cpu_s'] / found['captions']:.1f} |",
        flush=True,
    )
    return dict(found["files"])


def main() -> None:
    """Print a row for each way of loading, and whether they wrote the same bytes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help="take 9.5 GB of disk and 10 GiB of memory")
    parser.add_argument("--model", default="random:i-medium-400m", help="random:tiny-i tries the benchmark itself")
    parser.add_argument("--captions", type=int, default=len(CAPTIONS), help=f"at most {len(CAPTIONS)}")
    parser.add_argument("--only", choices=("whole", "streaming"), help="one way alone")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--streaming", action="store_true", help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    captions = CAPTIONS[: wanted.captions]
    if wanted.child:
        encode(wanted.child, wanted.model, captions, wanted.streaming)
        return
    if not wanted.run:
        print("Skipped: T5-XXL takes 9.5 GB of disk and 10 GiB of memory. Add --run to measure it.")
        return
    machine = f"{platform.machine()} ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} cores"
    print(f"{machine}, load {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, torch {torch.__version__}")
    encoder = resolve(wanted.model, 1, text=True)  # written here, so that no child pays for it
    size = sum(file.stat().st_size for file in (encoder / "text_encoder").iterdir())
    print(
        f"{wanted.model}: text encoder of {size / 1e9:.2f} GB; {len(captions)} captions and the empty one, one thread\n"
    )
    print(
        "| encoder | resident, GiB | of its own, GiB | wall, s | CPU, s | CPU s a caption |\n|---|---|---|---|---|---|"
    )
    ways = [way for way in (False, True) if wanted.only in (None, "streaming" if way else "whole")]
    hashes = [measure(wanted.model, captions, streaming) for streaming in ways]
    if len(hashes) == 2:
        arrows = [{name: digest for name, digest in files.items() if name.endswith(".arrow")} for files in hashes]
        print(f"\nThe files have {'the same bytes' if arrows[0] == arrows[1] else 'OTHER BYTES'}.")


if __name__ == "__main__":
    main()

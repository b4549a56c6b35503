"""What finding copies costs: the look of each picture beside the rest of its index, and the grouping of many looks.

The pictures are those of `benchmarks/pictures.py`. Both ways read, hash and decode the same bytes; one thread, CPU time,
rounds interleaved. Without looks a picture is decoded at its smallest scale and one pixel converted. What a run adds to both
(the listing, the ledger, the way to the children) is left out, so the shares are upper bounds.

The looks to be grouped are drawn at random, 1 % of them copies with up to 4 other bits and 3 other levels.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pictures import corpus

from deepfloyd_core.files import sha256_bytes
from deepfloyd_core.ledger import LOOK_BYTES
from deepfloyd_core.looks import look_of
from deepfloyd_core.pictures import WHITE, _convert, _decoded, check_decodes, read_header
from deepfloyd_core.twins import group_alike

ROUNDS, AT_ONCE = 5, 1 << 16


def without_look(path: Path) -> None:
    """Read, hash (by the scan, and when it is read again) and decode."""
    data = path.read_bytes()
    sha256_bytes(data), sha256_bytes(path.read_bytes())
    read_header(data)
    picture, _ = _decoded(data, "RGB", (1, 1))
    _convert(picture.crop((0, 0, 1, 1)), picture.info.get("icc_profile"), WHITE)


def with_look(path: Path) -> None:
    data = path.read_bytes()
    sha256_bytes(data), sha256_bytes(path.read_bytes())
    read_header(data)
    look_of(check_decodes(data))


def measure_looks(count: int) -> None:
    """Print the CPU time of both ways by format, and the share that looks add."""
    with tempfile.TemporaryDirectory() as folder:
        samples = corpus(count, 64)
        paths = [Path(folder) / f"{number}" for number in range(count)]
        for path, sample in zip(paths, samples, strict=True):
            path.write_bytes(sample.data)
        ways: tuple[Callable[[Path], None], ...] = (without_look, with_look)
        spent = np.zeros((ROUNDS, 2, count))
        for turn in range(ROUNDS):
            for place, path in enumerate(paths):
                for way, function in enumerate(ways):
                    started = time.process_time()
                    function(path)
                    spent[turn, way, place] = time.process_time() - started
    best = np.median(spent, 0)
    for kind in [*sorted({sample.kind for sample in samples}), "all"]:
        own = np.array([kind in (sample.kind, "all") for sample in samples])
        plain, more = best[:, own].sum(1) / own.sum() * 1e3
        print(f"{kind:12s} {plain:7.2f} ms a picture, with its look {more:7.2f} ms: {more / plain - 1:+.1%}")


def measure_groups(count: int) -> None:
    """Print the time and memory of grouping, and how many of the copies were found."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "looks.npy"
        looks = np.lib.format.open_memmap(path, "w+", np.uint8, (count, LOOK_BYTES))
        for start in range(0, count, AT_ONCE):
            size = min(AT_ONCE, count - start)
            block = rng.integers(0, 256, (size, LOOK_BYTES), dtype=np.uint8)
            light = rng.normal(120, 35, (size, 1)) + rng.normal(0, 40, (size, 256))
            block[:, 8:264] = np.clip(light, 0, 255)
            looks[start : start + size] = block
        first = np.sort(rng.choice(count // 2, count // 100, replace=False))
        copies = count // 2 + np.sort(rng.choice(count // 2, count // 100, replace=False))
        made = np.clip(looks[first].astype(np.int16) + rng.integers(-3, 4, (len(first), LOOK_BYTES)), 0, 255).astype(
            np.uint8
        )
        flips = np.stack([rng.permutation(64) < bits for bits in rng.integers(0, 5, len(first))])
        made[:, :8] = looks[first, :8] ^ np.packbits(flips, axis=1)
        looks[copies] = made
        looks.flush()
        keys = np.arange(count, dtype=np.uint64)
        before, started = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
        groups = group_alike(keys, np.lib.format.open_memmap(path, "r"), np.arange(count))
        after = resource.getrusage(resource.RUSAGE_SELF)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found, joined = (groups[first] == groups[copies]).mean(), (groups != np.arange(count)).sum()
    print(f"{count:,} looks: {cpu:.1f} s of CPU, {time.monotonic() - started:.1f} s; {found:.2%} of {len(copies):,} copies "
          f"found, {joined - round(found * len(copies)):,} false")  # fmt: skip


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--looks", type=int, default=1_000_000)
    arguments = parser.parse_args()
    measure_looks(arguments.pictures)
    measure_groups(arguments.looks)


if __name__ == "__main__":
    main()

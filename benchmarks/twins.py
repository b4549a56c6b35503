"""What finding copies costs: the look of each picture beside the rest of its index, and the grouping of many looks.

The pictures are those of `benchmarks/pictures.py`, and are hashed as by the scan and judged as by the index, in this
process, one thread. Without looks one pixel is converted of the decode at the smallest scale. Only what follows the decode
differs, so it has a clock of its own: 0.2 ms would be lost in what two decodes differ by. The two ways take turns at every
picture, and of the CPU times of all rounds the least counts: what else runs on the machine only adds.

Then the whole index of baseline JPEGs, the cheapest to decode: a scan, the judging, the ledger. The two ways take turns,
and the median of their differences counts. The way to the children is left out, so the shares are upper bounds.

The looks to be grouped are drawn at random, 1 % of them copies with up to 4 other bits and 3 other levels.
"""

import argparse
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from pictures import QUALITIES, corpus, photograph
from worlds import one_set

from deepfloyd_core.config.run import Run
from deepfloyd_core.files import sha256_bytes
from deepfloyd_core.index import index, judge, looks
from deepfloyd_core.index.identity import index_request
from deepfloyd_core.index.index import build_index
from deepfloyd_core.index.judge import Entry, look
from deepfloyd_core.index.ledger import LOOK_BYTES
from deepfloyd_core.index.scan import scan
from deepfloyd_core.index.twins import group_alike
from deepfloyd_core.pictures import decode as pictures
from deepfloyd_core.pictures.colour import WHITE, convert
from deepfloyd_core.store.artifacts import materialise

AT_ONCE, REPEATS = 1 << 16, 20


def one_pixel(data: bytes) -> pictures.Glance:
    """What the index would do without looks: a decode at the smallest scale, and one pixel in sRGB."""
    found = pictures._decoded(data, "RGB", (1, 1))
    pixel, profile = found.pixels.crop((0, 0, 1, 1)), found.pixels.info.get("icc_profile")
    return pictures.Glance(convert(pixel, profile, WHITE), pixel, 1, found.note)


WAYS: tuple[dict[str, Callable[..., Any]], ...] = (
    {"check_decodes": one_pixel, "sight_of": lambda glance: None},
    {"check_decodes": pictures.check_decodes, "sight_of": looks.sight_of},
)


def judged(run: Run, entry: Entry) -> tuple[bytes | None, float, float]:
    """Hash and judge a picture: its sight, and CPU seconds, of all and of what follows the decode."""
    decode, decoded = pictures._decoded, 0.0

    def clocked(*arguments: Any) -> Any:
        nonlocal decoded
        found = decode(*arguments)
        decoded = time.process_time()
        return found

    with patch.object(pictures, "_decoded", clocked):
        started = time.process_time()
        sha256_bytes((run.workspace.parent / "pictures" / entry.source).read_bytes())
        verdict = look(run, run.datasets[0], entry)
        done = time.process_time()
    assert verdict.reason is None
    return verdict.look, done - started, done - decoded


def measure_looks(count: int, rounds: int) -> None:
    """Print by format the CPU time without looks, and what they add."""
    samples = corpus(count, 64)
    whole, after, together = np.full(count, np.inf), np.full((2, count), np.inf), np.inf
    with tempfile.TemporaryDirectory() as folder:
        run = one_set(Path(folder), 1, {"caption_strategy": "filename"})
        entries = []
        for number, sample in enumerate(samples):
            (Path(folder) / "pictures" / str(number)).write_bytes(sample.data)
            entries.append(Entry("set", str(number), len(sample.data), sha256_bytes(sample.data), ("",), None))
        for _ in range(rounds):
            sights = []
            for place, entry in enumerate(entries):
                for way, functions in enumerate(WAYS):
                    with patch.multiple(judge, **functions):
                        sight, seconds, rest = judged(run, entry)
                    after[way, place] = min(after[way, place], rest)
                    if sight is None:
                        whole[place] = min(whole[place], seconds)
                    else:
                        sights.append(sight)
            assert len(sights) == count
            started = time.process_time()
            looks.looks_of(sights * REPEATS)
            together = min(together, (time.process_time() - started) / count / REPEATS)
    for kind in [*sorted({sample.kind for sample in samples}), "all"]:
        own = np.array([kind in (sample.kind, "all") for sample in samples])
        plain, (less, more) = whole[own].mean() * 1e3, after[:, own].mean(1) * 1e3
        added = more - less + together * 1e3
        print(f"{kind:12s} {plain:7.2f} ms a picture without looks, which add {added:.2f} ms: {added / plain:+.1%}")


class ThisProcess:
    """What the index needs of its children."""

    map = staticmethod(map)


def index_seconds(run: Run, way: dict[str, Callable[..., Any]]) -> float:
    """CPU seconds of an index made anew, without its sheet of copies: that one costs as much for any number of pictures."""
    shutil.rmtree(run.workspace, ignore_errors=True)
    with patch.multiple(judge, **way), patch.object(index, "save_twins"):
        started = time.process_time()
        found = scan(run)
        materialise(run.workspace, index_request(run, found), lambda work: build_index(run, found, ThisProcess(), work))
        return time.process_time() - started


def measure_index(count: int, rounds: int) -> None:
    """Print by subsampling the CPU time of the whole index without looks, and what they add."""
    for kind, subsampling in {"4:2:0": 2, "4:4:4": 0}.items():
        with tempfile.TemporaryDirectory() as folder:
            run = one_set(Path(folder), 1, {"caption_strategy": "filename"})
            for number in range(count):
                photograph(number).save(
                    Path(folder) / "pictures" / f"{number}.jpg", quality=QUALITIES[number % 4], subsampling=subsampling
                )
            index_seconds(run, WAYS[1])  # what is imported and read for the first time
            took = np.array([[index_seconds(run, way) for way in WAYS] for _ in range(rounds)])
        plain, added = np.median(took[:, 0]), np.median(took[:, 1] - took[:, 0])
        print(f"{kind:12s} {plain / count * 1e3:7.2f} ms a picture of the whole index without looks, which add "
              f"{added / count * 1e3:.2f} ms: {added / plain:+.1%}")  # fmt: skip


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
    """Measure all three."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--looks", type=int, default=1_000_000)
    arguments = parser.parse_args()
    measure_looks(arguments.pictures, arguments.rounds)
    measure_index(2 * arguments.pictures, 3 * arguments.rounds)
    measure_groups(arguments.looks)


if __name__ == "__main__":
    main()

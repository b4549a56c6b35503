"""What a data set that did not change, or grew by 1 %, costs: `python benchmarks/growing.py 1e5`.

Photographs of `--size` px, 320x240 unless told, each with a caption beside it, through scan, index and Stage I's pixels in
one process, as the tasks chain them. Smaller pictures are the harder case: the first run is then cheaper, the others
are not. The pictures repeat, their bytes do not: each file carries its number in a JPEG comment.
"""

import argparse
import io
import resource
import tempfile
import time
from pathlib import Path

from pictures import photograph
from PIL import Image
from worlds import one_set, prepare

from deepfloyd_core.config.stages import Stage

STAGE: Stage = 1
PHOTOGRAPHS = 60  # different ones


def photographs(size: tuple[int, int]) -> list[bytes]:
    """JPEGs of one size, without their first two bytes, which start every JPEG."""
    files = []
    for number in range(PHOTOGRAPHS):
        buffer = io.BytesIO()
        photograph(number).resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=85)
        files.append(buffer.getvalue()[2:])
    return files


def add(folder: Path, files: list[bytes], numbers: range) -> None:
    """Pictures and their captions, a thousand to a folder."""
    for number in numbers:
        path = folder / f"{number // 1000:04d}" / f"{number:08d}.jpg"
        path.parent.mkdir(exist_ok=True)
        comment = b"\xff\xfe\x00\x0a%08d" % number
        path.write_bytes(b"\xff\xd8" + comment + files[number % len(files)])
        path.with_suffix(".txt").write_text(f"caption {number % 1000}\n")


def main() -> None:
    """Print the seconds of a first run, of one over the same files, and of one with 1 % more."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pictures", type=float, nargs="?", default=1e4)
    parser.add_argument("--size", default="320x240", help="width x height of the pictures")
    wanted = parser.parse_args()
    count = int(wanted.pictures)
    width, height = map(int, wanted.size.split("x"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures = folder / "pictures"
        run = one_set(folder, STAGE, {"caption_strategy": "textfile"})
        files = photographs((width, height))
        add(pictures, files, range(count))
        time.sleep(2.5)  # so that the files are old enough to be trusted
        first = 0.0
        for title in ("first run", "nothing changed", "1 % more"):
            if title == "1 % more":
                add(pictures, files, range(count, count + count // 100))
            started = time.perf_counter()
            index, pixels = prepare(run, STAGE)
            seconds = time.perf_counter() - started
            first = first or seconds
            judged, decoded = index.manifest.summary["judged_now"], pixels.manifest.summary["decoded"]
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
            print(f"{title:<16} {seconds:8.2f} s  {seconds / first:7.2%}  judged {judged}, decoded {decoded}, "
                  f"peak so far {peak} MiB", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

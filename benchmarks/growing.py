"""What a data set that did not change, or grew by 1 %, costs: `python benchmarks/growing.py 1e5`.

Small JPEGs of noise, each with a caption beside it, through scan, index and Stage I's pixels in one process, as the tasks
chain them. Small pictures are the hard case: a photograph of 3 megapixels takes 20 times as long the first time, and no
longer the second.
"""

import argparse
import io
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from worlds import one_set, prepare

from deepfloyd_core.flavours import Stage

STAGE: Stage = 1


def add(folder: Path, numbers: range) -> None:
    """Pictures of 96 x 80 px, a thousand to a folder."""
    for number in numbers:
        path = folder / f"{number // 1000:04d}" / f"{number:08d}.jpg"
        path.parent.mkdir(exist_ok=True)
        picture = np.random.default_rng(number).integers(0, 256, (80, 96, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=85)
        path.write_bytes(buffer.getvalue())
        path.with_suffix(".txt").write_text(f"caption {number % 1000}\n")


def main() -> None:
    """Print the seconds of a first run, of one over the same files, and of one with 1 % more."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pictures", type=float, nargs="?", default=1e4)
    count = int(parser.parse_args().pictures)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures = folder / "pictures"
        pictures.mkdir()
        run = one_set(folder, STAGE, {"caption_strategy": "textfile"})
        add(pictures, range(count))
        time.sleep(2.5)  # so that the files are old enough to be trusted
        first = 0.0
        for title in ("first run", "nothing changed", "1 % more"):
            if title == "1 % more":
                add(pictures, range(count, count + count // 100))
            started = time.perf_counter()
            index, pixels = prepare(run, STAGE)
            seconds = time.perf_counter() - started
            first = first or seconds
            judged, decoded = index.summary["judged_now"], pixels.summary["decoded"]
            print(
                f"{title:<16} {seconds:8.2f} s  {seconds / first:7.2%}  judged {judged}, decoded {decoded}", flush=True
            )


if __name__ == "__main__":
    main()

"""Time and memory of planning crops: `python benchmarks/plan_crops.py 1e6`, one core.

Measured on one busy core of two: a million pictures 0.25 to 0.45 s, ten million 2.9 to 5.5 s with 530 MiB at the peak, the
sizes (80 MiB), the pictures' keys (80 MiB) and the plan (250 MiB) among them.
"""

import argparse
import resource
import time

import numpy as np

from deepfloyd_core.pictures.draws import seeded
from deepfloyd_core.pictures.geometry import Geometry, plan_crops

SHAPES = ((1.0, 1.0), (0.75, 1.0), (1.33, 1.0), (0.5, 1.0), (2.0, 1.0))
RULES = {
    "square, random place": Geometry(64, 64, 256, 128, "random"),
    "own aspect, random place": Geometry(64, 64, 256, 128, "random", aspect="own", aspect_range=(0.25, 4.0)),
    "closest of 5 by area": Geometry(4096, None, None, None, "random", by_area=True, aspect="closest", buckets=SHAPES),
    "random of 5": Geometry(64, None, None, None, "random", aspect="random", buckets=SHAPES),
}


def main() -> None:
    """Plan every rule once and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pictures", type=float, nargs="?", default=1e6)
    total = int(parser.parse_args().pictures)
    rng = np.random.default_rng(0)
    sizes = rng.integers(64, 6000, (total, 2), dtype=np.int32)
    draw = seeded(1, rng.integers(0, 2**63, total, dtype=np.uint64), np.zeros(total, np.int8))
    for name, rules in RULES.items():
        start = time.perf_counter()
        fit = int((plan_crops(sizes, rules, draw).reason == 0).sum())
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        print(f"{name:<26} {seconds:6.2f} s  {total / seconds / 1e6:5.1f} M pictures/s  {fit} fit  peak {peak} MiB")


if __name__ == "__main__":
    main()

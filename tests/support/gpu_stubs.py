"""Cases that stand in for the GPU day's: what they do takes no card and no torch. As a program: the driver over them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu
import gpu_process
from gpu_plan import Asked, Case, Figure, Goal, Yields, tolerance

EXACT = Figure("off by", "", tolerance(1e-3))
FAST = Figure("samples/s", "", Goal(">=", 100, "a wish"))


def good(asked: Asked) -> Yields:
    yield "off by", 1e-4, "of its length"
    yield "samples/s", 50.0, ""


def wrong(asked: Asked) -> Yields:
    yield "off by", 0.5, ""


def not_a_number(asked: Asked) -> Yields:
    yield "off by", float("nan"), ""


def out_of_memory(asked: Asked) -> Yields:
    yield "off by", 0.0, "before it failed"
    raise RuntimeError("a first line\nCUDA out of memory. Tried to allocate 20.00 GiB")


def leaves(asked: Asked) -> Yields:
    yield "off by", 0.0, ""
    sys.exit("there is nothing to do")


def killed(asked: Asked) -> Yields:
    yield "off by", 0.0, ""
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(asked: Asked) -> Yields:
    helper = subprocess.Popen(["sleep", "120"])
    yield "off by", float(helper.pid), ""
    time.sleep(60)


def once(asked: Asked) -> Yields:
    """Fails the first time that it is run beside a file."""
    mark = Path("was-here")
    if not mark.exists():
        mark.touch()
        raise ValueError("not yet")
    yield "off by", 0.0, "the second time"


def case(
    name: str, process: str = "one", group: str = "a", limit_s: float = 60.0, figures: tuple[Figure, ...] = (EXACT,)
) -> Case:
    call = f"gpu_stubs:{name.replace(' ', '_')}"
    return Case(group, name, call, figures, 1.0, limit_s, process)


CASES = {
    "failures": (
        case("good", figures=(EXACT, FAST)), case("out of memory"), case("leaves"), case("killed"), case("wrong"),
        case("not a number"),
    ),
    "slow": (case("hangs", limit_s=2.0), case("good", "two", "b", figures=(EXACT, FAST))),
    "endless": (case("good", figures=(EXACT, FAST)), case("hangs", "two"), case("wrong", "two"), case("wrong", "x", "b")),
    "twice": (case("good", figures=(EXACT, FAST)), case("once")),
}  # fmt: skip

if __name__ == "__main__":
    gpu_process.SPARE_S = gpu.SPARE_S = 0.3  # type: ignore[attr-defined]
    sys.exit(gpu.main(sys.argv[2:], CASES[sys.argv[1]], packages=()))

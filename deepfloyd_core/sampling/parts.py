"""How far a job that samples is, part by part: a picture of Stage II can take twenty times as long as one of Stage I, so
the time left of all pictures together would be wrong until the last part.
"""

from collections.abc import Callable

from deepfloyd_core.types import Report

Sampled = Callable[[float], None]  # called with the pictures that were made since the last call, in parts of one
_ROUNDING = 1e-6  # of a sum of such parts


class Parts:
    """The parts of a job, begun one after another."""

    def __init__(self, report: Report, count: int) -> None:
        self._report, self._count, self._begun = report, count, 0

    def begin(self, what: str, pictures: int, done: int = 0) -> Sampled:
        """Begin the next part. Returns a function that reports its pictures, when another one is done. done: by an earlier
        process.
        """
        self._begun += 1
        return counted(self._report, pictures, f"part {self._begun} of {self._count}: {what}", done)


def so_far(sampled: Sampled) -> Sampled:
    """A function that is told what is done so far, and reports what is new."""
    told = 0.0

    def tell(done: float) -> None:
        nonlocal told
        sampled(done - told)
        told = done

    return tell


def counted(report: Report, pictures: int, line: str, done: int = 0) -> Sampled:
    """A function that reports pictures, when another one is done. done: by an earlier process."""
    total, told = float(done), done
    report(done, pictures, line)

    def sampled(count: float) -> None:
        nonlocal total, told
        total += count
        if int(total + _ROUNDING) > told:
            told = int(total + _ROUNDING)
            report(told, pictures, line)

    return sampled

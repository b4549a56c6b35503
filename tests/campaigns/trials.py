"""Tries many inputs of one kind in a forked process, within limits of time and memory; an input that fails is made smaller.

A trial raises for whatever is no named outcome. One that takes too long or too much memory, or that kills its process,
is a failure too: the parent knows which input it was.
"""

import logging
import multiprocessing
import os
import re
import resource
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from deepfloyd_core.errors import DeepFloydError

CPU_S = 10.0  # of one input; a slow machine needs a hundredth
WALL_S = 60.0
MEMORY = 2 << 30  # bytes of address space beyond what the process has
_SMALLER_S = 20.0  # that may be spent on a smaller input
_TOLD = 40  # characters of what was raised, with which inputs that fail for one reason mostly begin
MESSAGE = 30_000  # characters of an error, at most

Trial = Callable[[bytes], str]  # one input -> its outcome, a word


@dataclass(frozen=True)
class Target:
    """A kind of input, and what is made of one."""

    kind: str
    seeds: Callable[[], Sequence[bytes]]  # good inputs
    mutate: Callable[[Random, bytes], bytes]
    opened: Callable[[Path], AbstractContextManager[Trial]]  # in an empty folder


@dataclass
class Found:
    """What came of some inputs."""

    tried: int = 0
    lost: int = 0  # that ended with their process
    outcomes: dict[str, int] = field(default_factory=dict)
    failures: dict[str, bytes] = field(default_factory=dict)  # by what was raised, and where: the first such input

    def add(self, other: "Found") -> None:
        """Count what came of others, too."""
        self.tried, self.lost = self.tried + other.tried, self.lost + other.lost
        for outcome, times in other.outcomes.items():
            self.outcomes[outcome] = self.outcomes.get(outcome, 0) + times
        self.failures = other.failures | self.failures


class TooLongError(BaseException):
    """An input took more than CPU_S. No `except Exception` catches it."""


def nth_input(target: Target, seeds: Sequence[bytes], seed: int, number: int) -> bytes:
    """Input `number` of a kind; number 0 and the next are the good ones."""
    if number < len(seeds):
        return seeds[number]
    rng = Random(f"{seed}/{target.kind}/{number}")
    return target.mutate(rng, rng.choice(seeds))


def named_error(error: DeepFloydError, *names: object) -> str:
    """The outcome "refused" of an error for the user, whose message is short and names one of these."""
    text = str(error)
    assert len(text) < MESSAGE, f"a message of {len(text)} characters"
    assert any(str(name) in text for name in names), f"names none of {names}: {text[:500]}"
    return "refused"


def try_inputs(target: Target, seed: int, first: int, seconds: float, folder: Path) -> Found:
    """Try inputs from number `first` on for so many seconds, at least one."""
    seeds, found = target.seeds(), Found()
    end = time.monotonic() + seconds
    while not found.tried or time.monotonic() < end:
        lost = _tried_in_a_process(target, seeds, (seed, first + found.tried, end), folder, found)
        if lost:
            data = nth_input(target, seeds, seed, first + found.tried)
            found.add(Found(1, 1, {}, {lost: data}))
    for what, data in list(found.failures.items()):
        found.failures[what] = smaller(target, data, what, folder)
    return found


def _tried_in_a_process(
    target: Target, seeds: Sequence[bytes], work: tuple[int, int, float], folder: Path, found: Found
) -> str:
    """Try inputs in one process until the time is over. Returns how it was lost; empty: it was not."""
    seed, first, end = work
    ours, theirs = multiprocessing.Pipe()

    def child() -> None:
        with target.opened(_fresh(folder)) as trial:
            _limit()
            theirs.send(None)
            for number in count(first):
                data = nth_input(target, seeds, seed, number)
                outcome, fault = _outcome(trial, data)
                theirs.send((outcome, {fault: data} if fault else {}))
                if time.monotonic() > end:
                    break

    process = _forked(child)
    theirs.close()
    try:
        ours.recv()
    except EOFError:
        raise RuntimeError(f"{target.kind}: its trials could not begin") from None
    try:
        while ours.poll(WALL_S):
            outcome, failures = ours.recv()
            found.add(Found(1, 0, {outcome: 1}, failures))
    except EOFError:
        process.join()
        return "" if process.exitcode == 0 else f"the process ended with {process.exitcode}"
    process.kill()
    process.join()
    return f"no answer in {WALL_S:g} s"


def _forked(child: Callable[[], None]) -> Any:
    """A process of its own session that runs a function and nothing else."""

    def run() -> None:
        os.setsid()
        code = 1
        try:
            child()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def _fresh(folder: Path) -> Path:
    number = 0
    while (made := folder / f"{number}").exists():
        number += 1
    made.mkdir(parents=True)
    return made


def _limit() -> None:
    """Limits of this process, in which too much CPU time raises; and as in the product's, no word of decoders is seen."""
    warnings.simplefilter("ignore")
    logging.disable()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def too_long(*_: object) -> None:
        raise TooLongError(f"more than {CPU_S:g} s of CPU time")

    signal.signal(signal.SIGPROF, too_long)


def _outcome(trial: Trial, data: bytes) -> tuple[str, str]:
    """The outcome of an input, and what it broke, if anything."""
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    try:
        return trial(data), ""
    except BaseException as error:
        return "failed", told(error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def told(error: BaseException) -> str:
    """What was raised, and where: the same for inputs that fail for the same reason."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames[-4:]))
    text = re.sub(r"/\S+|0x[0-9a-f]+|[0-9]+", "N", str(error))[:_TOLD]
    return f"{type(error).__name__}: {text} ({where})"


def smaller(target: Target, data: bytes, what: str, folder: Path) -> bytes:
    """A smaller input that fails in the same way, as far as one is found soon; by halves, then by quarters, and so on."""
    end, kept = time.monotonic() + _SMALLER_S, what.split(":")[0] + what.rpartition("(")[2]
    if "(" not in what:
        return data  # it kills its process

    def child(connection: "Connection[Any, Any]") -> None:
        with target.opened(_fresh(folder)) as trial:
            _limit()
            now, size = data, len(data) // 2
            while size and time.monotonic() < end:
                start = 0
                while start < len(now) and time.monotonic() < end:
                    less = now[:start] + now[start + size :]
                    fault = _outcome(trial, less)[1]
                    if fault and fault.split(":")[0] + fault.rpartition("(")[2] == kept:
                        now = less
                        connection.send(now)
                    else:
                        start += size
                size //= 2

    ours, theirs = multiprocessing.Pipe()
    process = _forked(lambda: child(theirs))
    theirs.close()
    best = data
    try:
        while ours.poll(_SMALLER_S + CPU_S):
            best = ours.recv()
    except EOFError:
        pass
    process.kill()
    process.join()
    return best

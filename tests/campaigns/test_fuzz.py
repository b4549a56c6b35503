"""The fuzz campaign in short, and that it finds what it looks for."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import fuzz
import pytest
from mutations import damaged
from trials import Target, Trial


def test_each_kind_of_input_has_one_named_outcome(tmp_path: Path) -> None:
    rows = fuzz.attack(5, 1, tmp_path)
    assert len({row.kind for row in rows}) == len(rows) == len(fuzz.TARGETS)
    for row in rows:
        assert row.tried and not row.failed, row.failures


def test_an_input_follows_from_its_seed_and_its_number() -> None:
    from trials import nth_input

    for target in fuzz.TARGETS[:6]:
        seeds = target.seeds()
        assert all(nth_input(target, seeds, 7, number) == nth_input(target, seeds, 7, number) for number in range(30))


def _target(broken: Callable[[bytes], bool], how: Callable[[], object]) -> Target:
    """A kind whose trial breaks in some way on some inputs."""

    @contextmanager
    def opened(folder: Path) -> Iterator[Trial]:
        def trial(data: bytes) -> str:
            if broken(data):
                how()
            return "accepted"

        yield trial

    return Target("odd", lambda: [bytes(range(32, 96))], lambda rng, data: damaged(Random(rng.random()), data), opened)


def _raise() -> None:
    raise KeyError("odd")


def test_an_input_that_raises_is_kept_and_made_smaller(tmp_path: Path) -> None:
    (row,) = fuzz.attack(0.2, 1, tmp_path, [_target(lambda data: b"A" in data, _raise)])
    assert row.failed and len(row.failures) == 1 and "KeyError" in row.failures[0]
    (kept,) = tmp_path.glob("input-*")
    assert kept.read_bytes() == b"A" and str(kept) in row.failures[0] and "seed 1" in row.failures[0]


@pytest.mark.parametrize("how", [lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: os._exit(3)])
def test_an_input_that_kills_its_process_is_a_failure_and_the_others_go_on(
    tmp_path: Path, how: Callable[[], object]
) -> None:
    target = _target(lambda data: len(data) < 40, how)
    (row,) = fuzz.attack(0.5, 1, tmp_path, [target])
    assert 0 < row.failed < row.tried and "the process ended with" in row.failures[0]

"""Batches that are made ahead: the same ones in the same order, however many threads make them."""

import threading
import time

import pytest

from deepfloyd_core.training.prefetch import Prefetcher


@pytest.mark.parametrize("threads", [0, 1, 2, 5])
def test_every_number_is_made_once_and_comes_in_its_turn(threads: int) -> None:
    made: list[int] = []

    def make(number: int) -> int:
        time.sleep(0.002 * (number % 3))  # later ones are ready first
        made.append(number)
        return number * number

    with Prefetcher(make, threads, 40) as ahead:
        assert [ahead.take(number) for number in range(7, 40)] == [number * number for number in range(7, 40)]
    assert sorted(made) == list(range(7, 40)), "none before the first, none after the last"


def test_the_next_ones_are_made_while_one_is_used() -> None:
    begun, named = threading.Event(), []

    def make(number: int) -> int:
        named.append(threading.current_thread().name)
        if number == 1:
            begun.set()
        return number

    with Prefetcher(make, 1, 10) as ahead:
        ahead.take(0)
        assert begun.wait(10)
    assert all(name.startswith("batches") for name in named) and len(named) <= 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_is_raised_in_its_turn(threads: int) -> None:
    def make(number: int) -> int:
        if number == 2:
            raise OSError("the disk is gone")
        return number

    with Prefetcher(make, threads, 9) as ahead:
        assert [ahead.take(0), ahead.take(1)] == [0, 1]
        with pytest.raises(OSError, match="the disk is gone"):
            ahead.take(2)

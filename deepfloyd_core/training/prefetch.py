"""Prefetches a training's batches: threads make the next ones while a step is computed."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Made = TypeVar("Made")


class Ahead(Generic[Made]):
    """Results of a pure function of a number, made in threads before they are asked for.

    What is returned does not depend on how many threads there are; with none everything is made when it is asked for. One
    result for each thread waits, beside the one that is used. An error in a thread is raised where its number is asked
    for. A context manager: the threads end with it.
    """

    def __init__(self, make: Callable[[int], Made], threads: int, end: int) -> None:
        """end: the number after the last one that will be asked for."""
        self._make, self._ahead, self._end = make, threads, end
        self._pool = ThreadPoolExecutor(threads, "batches") if threads else None
        self._waiting: dict[int, Future[Made]] = {}

    def __enter__(self) -> "Ahead[Made]":
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def take(self, number: int) -> Made:
        """The result for a number; the next ones are begun."""
        if self._pool is None:
            return self._make(number)
        for coming in range(number, min(number + self._ahead + 1, self._end)):
            if coming not in self._waiting:
                self._waiting[coming] = self._pool.submit(self._make, coming)
        return self._waiting.pop(number).result()

"""Prefetches a training's batches: threads make the next ones while a step is computed."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Made = TypeVar("Made")


class Prefetcher(Generic[Made]):
    """Results of a pure function of a number, computed in threads before they are needed.

    The results do not depend on the number of threads; without threads each is computed when it is needed. One result
    for each thread waits, beside the one in use. An error in a thread is raised when its number is taken. A context
    manager: the threads end with it.
    """

    def __init__(self, make: Callable[[int], Made], threads: int, end: int) -> None:
        """end: the number after the last one."""
        self._make, self._ahead, self._end = make, threads, end
        self._pool = ThreadPoolExecutor(threads, "batches") if threads else None
        self._waiting: dict[int, Future[Made]] = {}

    def __enter__(self) -> "Prefetcher[Made]":
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def take(self, number: int) -> Made:
        """The result for a number; the next ones are started."""
        if self._pool is None:
            return self._make(number)
        for coming in range(number, min(number + self._ahead + 1, self._end)):
            if coming not in self._waiting:
                self._waiting[coming] = self._pool.submit(self._make, coming)
        return self._waiting.pop(number).result()

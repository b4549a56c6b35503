"""A question to a module in a Python process of its own, which answers in JSON: what needs torch stays out of the caller.

The answer is asked for later, so that the process works beside the caller. It ends with the block that it was begun in.
"""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from deepfloyd_core.errors import JobError

PATIENCE_S = 120.0  # a cold disk takes half a minute to give torch


class Aside:
    """The process of one question."""

    def __init__(self, module: str, question: str) -> None:
        self._module = module
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, question], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def answer(self) -> str:
        """What it printed. Raises JobError with the last line of its errors where it failed."""
        try:
            told, said = self._process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise JobError(f"{self._module} gave no answer within {PATIENCE_S:.0f} s.") from None
        if self._process.returncode:
            last = said.strip().splitlines()[-1:] or [f"it ended with exit code {self._process.returncode}"]
            raise JobError(f"{self._module} failed: {last[0]}")
        return told

    def end(self) -> None:
        """End it, whether it has answered or not."""
        self._process.kill()
        self._process.communicate()


@contextmanager
def asides(questions: Mapping[str, tuple[str, str]]) -> Iterator[dict[str, Aside]]:
    """The processes of some questions, (MODULE, QUESTION) by a name; they end with the block."""
    running: dict[str, Aside] = {}
    try:
        for name, question in questions.items():
            running[name] = Aside(*question)
        yield running
    finally:
        for aside in running.values():
            aside.end()

"""Entry of the console script and of `python -m flows`: handles signals before the imports, which take a second."""

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from deepfloyd_core.processes.collector import collect_seldom
from flows.commands.ending import SIGNALS, end_at_once


def main() -> None:
    """Run the command line."""
    end_at_once()
    answer_signals(_leave)
    collect_seldom()
    from flows.commands.cli import main

    main()


def answer_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    """Call a function for each of SIGNALS."""
    for number in SIGNALS:
        # `nohup` ignores SIGHUP, to be obeyed; a script's `&` ignores SIGINT, and then nothing could be stopped.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """End at once: nothing but imports has run."""
    with suppress(OSError):  # SIGHUP: the terminal is gone
        os.write(2, f"Stopped by {signal.Signals(number).name}. Nothing was changed.\n".encode())
    os._exit(128 + number)


if __name__ == "__main__":
    main()

"""A disk that fails while one file is looked at."""

import os
from pathlib import Path
from typing import Any, Literal

import pytest


def fail(patch: pytest.MonkeyPatch, name: Literal["stat", "read_bytes"], place: Path, number: int) -> None:
    """Make a method of Path fail for one file, as the system does: `stat` names the file, a read does not."""
    call = getattr(Path, name)

    def called(file: Path, *arguments: Any, **keys: Any) -> Any:
        if file == place:
            raise OSError(number, os.strerror(number), *((str(file),) if name == "stat" else ()))
        return call(file, *arguments, **keys)

    patch.setattr(Path, name, called)

"""Seeded fuzzing of what others write: files, tables, answers of servers. Each input has one named outcome, soon.

An input follows from (seed, kind, number). One that fails is kept as a file, made smaller.
"""

import os
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import fuzz_artifacts
import fuzz_captions
import fuzz_config
import fuzz_http
import fuzz_pictures
import fuzz_records
import fuzz_weights
from rows import Row
from trials import Found, Target, try_inputs

SHARE = 2
_MODULES = (fuzz_pictures, fuzz_captions, fuzz_config, fuzz_weights, fuzz_records, fuzz_artifacts, fuzz_http)
TARGETS: tuple[Target, ...] = tuple(target for module in _MODULES for target in module.TARGETS)
_TURN_S = 10.0  # of one kind at most, before the next kind's turn
_SHOWN = 5  # failures of a kind


def attack(seconds: float, seed: int, folder: Path, targets: Sequence[Target] = TARGETS) -> list[Row]:
    """Try inputs of each kind by turns until the time is over; of each kind at least one."""
    os.fsync = lambda fd: None  # no input depends on it, and a disk would take most of the time
    end, found = time.monotonic() + seconds, {target.kind: Found() for target in targets}
    turn_s = min(_TURN_S, seconds / len(targets))
    while True:
        for target in targets:
            every = found[target.kind]
            every.add(try_inputs(target, seed, every.tried, turn_s, folder))
        if time.monotonic() > end:
            return [_row(target, found[target.kind], seed, folder) for target in targets]


def _row(target: Target, found: Found, seed: int, folder: Path) -> Row:
    kept = []
    for what, data in list(found.failures.items())[:_SHOWN]:
        file = folder / f"input-{sha256(data).hexdigest()[:12]}"
        file.write_bytes(data)
        kept.append(f"{what}\n    seed {seed}, {file}: {data[:80]!r}")
    return Row(f"fuzz: {target.kind}", found.tried, found.outcomes.get("failed", 0) + found.lost, kept)

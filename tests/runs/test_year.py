"""Twenty nights of `benchmarks/year.py`: nobody looks after them, and each has one honest outcome."""

from pathlib import Path

import pytest
from year import Script, Year
from year_story import Day

DAYS = [
    Day(added=tuple(range(12))),
    *(Day(added=(12, 13), recaptioned=(5,)) if night == 3 else Day() for night in range(7)),
    Day(bad="inverted"),
    Day(bad_leaves=True),
    *([Day()] * 10),
]
BREAKS = {1: "week", 8: "run", 9: "server", 10: "worker", 11: "week", 18: "ui"}


@pytest.mark.slow
def test_twenty_nights_need_no_person(tmp_path: Path) -> None:
    year = Year(Script(DAYS, BREAKS, stages=(1,), steps=20, eval_images=4), tmp_path)
    year.play()
    assert year.faults == []
    assert len(DAYS) == 20 and year.outcomes["skipped"] == 12 and sum(year.hits.values()) == len(BREAKS)
    assert year.published["bad batch, harmful, blocked"] == 1

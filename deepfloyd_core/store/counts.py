"""Counts and sizes in words."""

from collections.abc import Iterable


def many(count: int, one: str, several: str = "") -> str:
    """`1 picture`, `2,000 pictures`; several: the plural if it is not `one` with an s."""
    return f"{count:,} {one if count == 1 else several or f'{one}s'}"


def size(count: int) -> str:
    """A number of bytes with three digits: `912 B`, `1.20 kB`, `34.5 GB`."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 99.95 else f"{value:.{1 if value >= 9.995 else 2}f} {unit}"


def ranges(numbers: Iterable[int]) -> str:
    """Numbers in ascending order, with runs of three and more shortened: `1 to 9, 12, 13`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ", ".join(parts)


def days(count: float) -> str:
    """`1 day`, `14 days`, `0.5 days`."""
    return f"{count:g} day{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """`0.4 s`, `45 s`, `3 min 20 s`, `2 h 5 min`, `3 days 4 h`: as a person says it, with two units at most."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return _two(f"{whole // 60} min", whole % 60, "s")
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return _two(f"{minutes // 60} h", minutes % 60, "min")
    hours = round(seconds / 3600)
    return _two(days(hours // 24), hours % 24, "h")


def _two(first: str, second: int, unit: str) -> str:
    return f"{first} {second} {unit}" if second else first

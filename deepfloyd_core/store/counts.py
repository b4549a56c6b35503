"""Counts in words."""


def many(count: int, one: str, several: str = "") -> str:
    """`1 picture`, `2,000 pictures`; several: the plural if it is not `one` with an s."""
    return f"{count:,} {one if count == 1 else several or f'{one}s'}"

"""What a campaign reports: one row for each kind of attack."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """How often one kind of attack was tried, and what it broke."""

    kind: str
    tried: int
    failed: int
    failures: list[str]  # some of them at most, each the smallest input or seed that reproduces it

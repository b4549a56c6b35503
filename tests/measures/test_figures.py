"""How figures read."""

import math

import pytest

from deepfloyd_core.measures.figures import signed


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [
        (0.0, 2, "0"), (-0.0, 4, "0"), (1e-9, 4, "0"), (0.004, 2, "+0.004"), (-0.00004, 4, "-0.00004"), (-0.5, 2, "-0.50"),
        (0.12345, 4, "+0.1235"), (math.nan, 2, "+nan"), (-math.inf, 2, "-inf"),
    ],
)  # fmt: skip
def test_a_difference_is_not_rounded_to_zero(value: float, decimals: int, text: str) -> None:
    assert signed(value, decimals) == text

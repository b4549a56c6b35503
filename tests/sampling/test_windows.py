"""Windows over a large picture: they cover it, and what is averaged of them is what the UNet says."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepfloyd_core.sampling.windows import OVERLAP_PX, WINDOW_PX, WindowedUnet, windows


class Pointwise(torch.nn.Module):
    """A UNet that looks at each pixel alone; what it gives does not depend on the window."""

    config, dtype, device = SimpleNamespace(in_channels=6), torch.float32, torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, sample: torch.Tensor, timestep: Any, return_dict: bool = True) -> Any:
        self.sizes.append(tuple(sample.shape[2:]))
        return (sample * 2 + timestep,) if not return_dict else SimpleNamespace(sample=sample * 2 + timestep)


@given(st.integers(1, 100))
def test_windows_cover_an_edge_and_overlap(units: int) -> None:
    length = 32 * units
    found = windows(length, WINDOW_PX, OVERLAP_PX)
    assert found[0][0] == 0 and sum(found[-1]) == length
    for (start, size), (following, _) in pairwise(found):
        assert size == WINDOW_PX and start < following <= start + size - OVERLAP_PX and following % 32 == 0
    assert len(found) <= 1 or (len(found) - 2) * (WINDOW_PX - OVERLAP_PX) < length - OVERLAP_PX, "no more than needed"


@pytest.mark.parametrize("size", [(256, 256), (288, 256), (640, 448), (1024, 288)])
def test_a_large_picture_has_the_output_of_the_whole(size: tuple[int, int]) -> None:
    unet = Pointwise()
    sample = torch.randn(2, 6, *size, generator=torch.Generator().manual_seed(0))
    (made,) = WindowedUnet(unet)(sample, 3, return_dict=False)
    torch.testing.assert_close(made, sample * 2 + 3, rtol=1e-5, atol=1e-5)
    assert all(max(one) <= WINDOW_PX for one in unet.sizes) and (len(unet.sizes) > 1) == (max(size) > WINDOW_PX)


def test_windows_that_disagree_leave_no_edge() -> None:
    """Each window gives a value of its own: from pixel to pixel the average moves as slowly as the overlap is wide."""

    class OfItsOwn(Pointwise):
        def forward(self, sample: torch.Tensor, timestep: Any, return_dict: bool = True) -> Any:
            self.sizes.append(tuple(sample.shape[2:]))
            return (torch.full_like(sample, float(len(self.sizes) % 2)),)

    unet = OfItsOwn()
    (made,) = WindowedUnet(unet)(torch.zeros(1, 1, 544, 5600), 3, return_dict=False)
    assert len(unet.sizes) == 3 * 29
    steepest = torch.pi / 2 / OVERLAP_PX  # of a raised cosine
    for axis in (2, 3):
        assert 0.01 < made.diff(dim=axis).abs().max() < 1.1 * steepest
    assert made.min() == 0 and made.max() == 1


def test_it_stands_for_the_unet() -> None:
    unet = Pointwise()
    windowed = WindowedUnet(unet)
    assert windowed.config is unet.config and windowed.dtype == torch.float32 and windowed.device.type == "cpu"
    small = torch.zeros(1, 6, 64, 64)
    assert torch.equal(windowed(small, 1).sample, torch.ones(1, 6, 64, 64)), "a small one as it is"

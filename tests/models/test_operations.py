"""The counted work of some operations, against counts by hand."""

import pytest
import torch
from torch.nn import functional as F

from deepfloyd_core.models import calibration
from deepfloyd_core.models.operations import Operations
from deepfloyd_core.models.work import Work

CPU = torch.device("cpu")


def test_products_are_counted_by_their_shapes_and_views_touch_nothing() -> None:
    left, right = torch.ones(3, 5), torch.ones(5, 7)
    with Operations() as product:
        left @ right
    assert product.work == Work(flops=2 * 3 * 5 * 7, bytes=4 * (15 + 35 + 21), calls=1)
    with Operations() as seen:
        left.view(5, 3).t().unsqueeze(0)
    assert seen.work == Work(calls=3)
    with Operations() as changed:
        left.add_(1.0)
    assert changed.work.flops == 0 and changed.work.bytes >= 4 * 15


def test_a_convolution_and_an_attention_are_counted_in_both_directions() -> None:
    x, weight = torch.ones(2, 4, 8, 8, requires_grad=True), torch.ones(6, 4, 3, 3)
    with Operations() as convolution:
        F.conv2d(x, weight, padding=1).sum().backward()
    assert convolution.work.flops == 2 * (2 * 2 * 6 * 4 * 9 * 64)
    rows = torch.ones(1, 2, 10, 16, requires_grad=True)
    with Operations() as attention, torch.no_grad():
        F.scaled_dot_product_attention(rows, rows, rows)
    forward = 2 * (2 * 2 * 10 * 10 * 16)
    assert attention.work.flops == forward
    with Operations() as both:
        F.scaled_dot_product_attention(rows, rows, rows).sum().backward()
    assert both.work.flops == forward + 2.5 * forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_calibrates_a_device_is_what_it_is_taken_for(dtype: torch.dtype) -> None:
    works: list[Work] = []
    for work in calibration._works(CPU, dtype):
        with Operations() as operations:
            work()
        works.append(operations.work)
    products, chain, tiny = calibration.known_work(CPU, dtype)
    assert products.flops == works[0].flops and chain.bytes == pytest.approx(works[1].bytes, rel=1e-4)
    assert tiny.calls == works[2].calls and works[1].flops == 0


def test_a_slower_clock_gives_a_faster_device() -> None:
    """A clock by which every computation takes as long: what counts is how much each computes."""
    seconds = [0.0]

    def clock() -> float:
        seconds[0] += 0.25
        return seconds[0]

    found = calibration.measured_speeds(CPU, clock)
    assert found.keys() == {"no", "bf16"}
    for speed in found.values():
        # A convolution of 192 channels at 32 px with the gradient of its input; each call takes between 0.25 and 0.75 s.
        flops = 2 * 2 * 192**2 * 9 * 32**2
        assert flops / 0.75 <= speed.flops <= flops / 0.25
    assert 1.5 < found["no"].bytes / found["bf16"].bytes < 2.5

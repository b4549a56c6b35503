"""T5's weights in 8 and 4 bits, against transformers' encoder with weights rounded here."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_run import SmallRun
from text_encoders import TINY, stock_encoder, tokenised

from deepfloyd_core.config.extras import Quantization
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.text import t5
from deepfloyd_core.text.embeds import embeds_request
from deepfloyd_core.text.encode import encode_prompts
from deepfloyd_core.tiny.make.models import WORDS

pytest.importorskip("torchao", reason="torchao is not installed: make test-extras")

CAPTIONS = [" ".join(WORDS[start : start + 1 + start % 7]) for start in range(0, 48, 8)]


def rounded_per_row(weight: torch.Tensor) -> torch.Tensor:
    """A matrix in whole numbers of -127 to 127 and a scale for each row, in float64."""
    scale = weight.double().abs().amax(1, keepdim=True) / 127.5
    return (weight.double() / scale).round().clamp(-128, 127) * scale


# QLoRA (Dettmers et al. 2023), appendix E.
NORMAL_FLOAT = torch.tensor([
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
])  # fmt: skip


def nearest_normal_float(weight: torch.Tensor) -> torch.Tensor:
    """The nearest of the 16 values times the largest magnitude of each block of 64."""
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    place = (blocks[..., None] / scale[..., None] - NORMAL_FLOAT).abs().argmin(-1)
    return (NORMAL_FLOAT[place] * scale).reshape(weight.shape)


@pytest.mark.parametrize(
    ("kind", "rounded", "bound"), [("int8", rounded_per_row, 3e-3), ("nf4", nearest_normal_float, 0.05)]
)
def test_a_quantised_encoder_is_one_with_rounded_weights(
    kind: Quantization, rounded: Callable[[torch.Tensor], torch.Tensor], bound: float
) -> None:
    """NF4's scales are in 8 bits themselves, and int8 breaks ties its own way: hence the bounds. The effect is larger."""
    batch, ids = tokenised(CAPTIONS)
    plain, expected = stock_encoder(torch.float32), stock_encoder(torch.float32)
    for layer in expected.encoder.block.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data = rounded(layer.weight.data).float()
    with torch.inference_mode():
        before, after = (model(batch.input_ids, batch.attention_mask)[0] for model in (plain, expected))
    for streamed in (False, True):
        encoder = t5.load_encoder(TINY, torch.float32, torch.device("cpu"), streamed, kind)
        ours = t5.encode(encoder, ids, 77, 16 * 77)
        error, effect = (ours - after).norm() / after.norm(), (before - after).norm() / after.norm()
        assert error < bound and error < effect / 3


def test_quantised_weights_are_part_of_the_identity(tmp_path: Path, new_small_run: Callable[[Path], SmallRun]) -> None:
    plain = load_run(new_small_run(tmp_path / "run").config)
    small = load_run(tmp_path / "run" / "run.toml", ("text_encoder_quantization=nf4",))
    assert embeds_request(plain, CAPTIONS, TINY).fingerprint != embeds_request(small, CAPTIONS, TINY).fingerprint
    rows = [encode_prompts(CAPTIONS, "t5", TINY, run.config, run.config) for run in (plain, small)]
    assert 0 < (rows[0] - rows[1]).norm() / rows[0].norm() < 0.3


@pytest.mark.parametrize(("kind", "stored"), [("int8", "Int8Tensor"), ("nf4", "NF4Tensor")])
def test_the_weights_in_memory_are_the_small_ones(kind: Quantization, stored: str) -> None:
    held = t5.load_encoder(TINY, torch.bfloat16, torch.device("cpu"), quantization=kind).held
    assert held is not None
    assert type(held["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"]).__name__ == stored

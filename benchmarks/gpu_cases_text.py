"""The cases of group c: T5-XXL's encoder with random weights, held on the device or read layer by layer.

A caption of 77 tokens costs 0.72 TFLOP, so captions/s are a share of what the card does in plain matrix products of T5's own
widths, 8192 x 4096 by 4096 x 10240 in bf16, which are measured first.
"""

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from gpu_plan import Asked, Yields
from gpu_world import bare_folder, drawn, peak_memory, run_of, seconds_of
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_NAME
from worlds import embed

from deepfloyd_core.text import t5
from deepfloyd_core.text.t5 import TextEncoder, encode, load_encoder
from deepfloyd_core.tiny.make.models import WORDS

TOKENS = 77
LAYERS = 6  # of 24 that are read when it is streamed: 2.7 GB; the time of a layer does not depend on their number


def resident(asked: Asked) -> Yields:
    """The whole encoder on the device."""
    peak = matrix_flops(asked)
    yield "matrix product in bf16", peak / 1e12, ""
    count, texts = (1024, 256) if not asked.tiny else (8, 4)
    with peak_memory(asked.device) as most:
        encoder = _held(bare_folder(asked, "i-medium-400m"), asked)
        vocabulary, rng = encoder.config.vocab_size, np.random.default_rng(0)

        def rate(lengths: np.ndarray) -> float:
            ids = [[*rng.integers(3, vocabulary, length - 1).tolist(), 1] for length in lengths]
            encode(encoder, ids[:texts], TOKENS, texts * TOKENS)  # warms the card up
            return len(ids) / seconds_of(lambda: encode(encoder, ids, TOKENS, texts * TOKENS))

        full = rate(np.full(count, TOKENS))
        yield "77 tokens: captions/s", full, f"batches of {texts}"
        flop = flop_per_caption(encoder)
        yield "77 tokens: of that peak", 100 * full * flop / peak, f"{flop / 1e12:.3g} TFLOP a caption"
        natural = np.clip(np.round(rng.lognormal(np.log(17), 0.55, count)), 5, TOKENS).astype(int)
        yield "natural lengths: captions/s", rate(natural), f"mean {natural.mean():.1f} tokens"
        yield "peak memory", *most()


def job(asked: Asked) -> Yields:
    """The product's job: clean, tokenise, encode, write Arrow files. A short one is taken off a long one."""
    folder, rng = bare_folder(asked, "i-medium-400m"), np.random.default_rng(0)
    few, many = (128, 1024) if not asked.tiny else (2, 6)
    captions = [" ".join(rng.choice(WORDS, TOKENS - 1)) for _ in range(many)]
    run = run_of(asked, folder, 1, 4, lora_rank=8)
    run = replace(run, config=run.config.model_copy(update={"embed_batch_size": 256, "text_encoder_dtype": "bf16"}))
    encoder = _held(folder, asked)
    with patch.object(t5, "load_encoder", lambda *_: encoder):
        embed(run, folder, captions[:1])
        short, long = (seconds_of(lambda part=part: embed(run, folder, captions[:part])) for part in (few, many))
    yield "77 tokens: captions/s", (many - few) / (long - short), f"a start with {few} captions {short:.1f} s"


def streamed(asked: Asked) -> Yields:
    """Layers that are read one by one, from files in the page cache, for a file of embeds (425 captions) each."""
    count = 425 if not asked.tiny else 4
    layers = {} if asked.tiny else {"num_layers": LAYERS}
    folder = bare_folder(asked, "i-medium-400m", **layers)
    encoder = load_encoder(folder, torch.bfloat16, torch.device(asked.device), streamed=True)
    weights = {name: tensor.cpu() for name, tensor in drawn(encoder.model, asked.device, torch.bfloat16)}
    save_file(weights, folder / "text_encoder" / SAFE_WEIGHTS_NAME, {"format": "pt"})
    ids = [[*[3] * (TOKENS - 1), 1]] * count
    with peak_memory(asked.device) as most:
        encode(encoder, ids[:1], TOKENS, TOKENS)
        seconds = seconds_of(lambda: encode(encoder, ids, TOKENS, 256 * TOKENS))
        share = encoder.config.num_layers / (24 if layers else encoder.config.num_layers)
        note = f"{encoder.config.num_layers} layers in {seconds:.2f} s for {count}"
        yield "77 tokens: captions/s", count * share / seconds, note
        yield "peak memory", *most()
    (folder / "text_encoder" / SAFE_WEIGHTS_NAME).unlink()


def flop_per_caption(encoder: TextEncoder) -> float:
    """Multiplications and additions over 77 rows; the table and the norms cost nothing beside them."""
    config = encoder.config
    inner = config.num_heads * config.d_kv
    weights = 4 * config.d_model * inner + 3 * config.d_model * config.d_ff
    return float(config.num_layers * 2 * (TOKENS * weights + 2 * TOKENS * TOKENS * inner))


def matrix_flops(asked: Asked, repeats: int = 20) -> float:
    """FLOP/s of the best of some matrix products in bf16."""
    rows, inner, columns = (8192, 4096, 10240) if not asked.tiny else (77, 256, 256)
    left = torch.randn((rows, inner), device=asked.device, dtype=torch.bfloat16)
    right = torch.randn((inner, columns), device=asked.device, dtype=torch.bfloat16)

    def products() -> None:
        for _ in range(repeats):
            left @ right

    return 2.0 * rows * inner * columns * repeats / min(seconds_of(products) for _ in range(8))


def _held(folder: Path, asked: Asked) -> TextEncoder:
    """An encoder with its weights on the device; no file is read."""
    empty = load_encoder(folder, torch.bfloat16, torch.device(asked.device), streamed=True)
    return replace(empty, held=dict(drawn(empty.model, asked.device, torch.bfloat16)))

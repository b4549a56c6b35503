"""transformers' own T5 of the tiny cascade, and texts as it takes them: what ours is compared with."""

from pathlib import Path
from typing import Any

import torch
from transformers import T5EncoderModel

from deepfloyd_core.config.flavours import FLAVOURS
from deepfloyd_core.text.t5 import load_tokenizer

TINY = Path(FLAVOURS["tiny-i"].repo)


def stock_encoder(dtype: torch.dtype) -> T5EncoderModel:
    return T5EncoderModel.from_pretrained(TINY / "text_encoder", dtype=dtype, use_safetensors=True).eval()


def tokenised(texts: list[str]) -> tuple[Any, list[list[int]]]:
    """A padded batch for the stock encoder, and each text's tokens alone for ours."""
    batch = load_tokenizer(TINY)(texts, padding="max_length", max_length=77, return_tensors="pt")
    ids = [row[mask].tolist() for row, mask in zip(batch.input_ids, batch.attention_mask.bool(), strict=True)]
    return batch, ids

"""T5's encoder over many texts, one layer after another: each layer goes over all of them before the next is needed.

So a layer can be read from the file, used and dropped: T5-XXL (9.5 GB in bf16) then runs in the memory of one layer and
of the texts' hidden states. With the whole encoder in memory the same loop gives the same bytes.

IF's UNet gets no attention mask, so the rows of the padding count. `plain` runs transformers' own blocks on padded texts:
bit for bit what `IFPipeline.encode_prompt` gives. `lean` leaves out what cannot change the result: only real tokens are
keys, and rows of the padding that must come out equal (their distances to all real tokens fall into the same buckets)
are computed once. In exact arithmetic both agree; they differ as two orders of summation do.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5Config, T5EncoderModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.t5.modeling_t5 import T5Attention
from transformers.utils import SAFE_WEIGHTS_NAME

from deepfloyd_core.errors import ModelError
from deepfloyd_core.models import weight_files
from deepfloyd_core.types import Report, no_report

Read = Callable[..., torch.Tensor]
_EMBEDDING, _FINAL_NORM = ("shared.weight", "encoder.embed_tokens.weight"), "encoder.final_layer_norm.weight"


@dataclass(frozen=True)
class TextEncoder:
    """A T5 encoder in memory, or (`model` is on the meta device) one whose layers are read when they are needed."""

    folder: Path  # text_encoder/
    model: T5EncoderModel
    dtype: torch.dtype
    device: torch.device
    streamed: bool
    lean: bool  # see the module

    @property
    def config(self) -> T5Config:
        return self.model.config


@dataclass(frozen=True)
class _Batch:
    """Texts of one length. `kept`: the positions that are computed; `spread`: for every position its place in `kept`."""

    numbers: list[int]
    ids: torch.Tensor  # (B, kept), padded
    mask: torch.Tensor  # (B, kept), 1: a real token
    kept: torch.Tensor
    spread: torch.Tensor
    real: int  # tokens that are keys; 0: texts of different lengths, see the mask


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a pipeline folder."""
    return AutoTokenizer.from_pretrained(folder / "tokenizer")


def load_encoder(folder: Path, dtype: torch.dtype, device: torch.device, streamed: bool = False) -> TextEncoder:
    """The T5 encoder of a pipeline folder, whole or to be read layer by layer. Only safetensors are read.

    fp32 is for those who want the pipeline's bits, so it is not lean; bf16 itself rounds far more than `lean` changes.
    """
    folder = folder / "text_encoder"
    if streamed:
        config = T5Config.from_pretrained(folder)
        with torch.device("meta"):
            model = T5EncoderModel(config).eval()
    else:
        model = T5EncoderModel.from_pretrained(folder, dtype=dtype, use_safetensors=True).eval().to(device)
    return TextEncoder(folder, model, dtype, device, streamed, lean=dtype != torch.float32)


@torch.inference_mode()
def encode(
    encoder: TextEncoder, ids: list[list[int]], length: int, batch_rows: int, report: Report = no_report
) -> torch.Tensor:
    """The last hidden states (N, length, D) of tokenised texts (at most `length` ids, the end token among them), on the CPU.

    `batch_rows`: rows of D in one forward pass. Raises ModelError when a streamed tensor is not in the files.
    """
    with _stored(encoder) as read:
        batches = _batches(encoder, ids, length, max(1, batch_rows // length))
        hidden = _embedded(encoder, read, batches)
        bias = None
        for number in range(encoder.config.num_layers):
            with _block(encoder, read, number) as block:
                if bias is None:
                    bias = block.layer[0].SelfAttention.compute_bias(length, length, device=encoder.device)
                forward = _lean if encoder.lean else _plain
                hidden = [
                    forward(encoder, block, rows, batch, bias) for rows, batch in zip(hidden, batches, strict=True)
                ]
            report((number + 1) * len(ids) // encoder.config.num_layers, len(ids), f"layer {number + 1}")
        return _finished(encoder, read, batches, hidden, length)


def distinct_positions(buckets: torch.Tensor, real: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions to compute, and for each position its place among them, for texts of `real` tokens.

    buckets: (T, T) relative-position buckets, [query, key]. Positions of the padding whose distances to all real tokens
    fall into the same buckets get the same hidden state in every layer: they start as the same token and see the same
    keys at the same biases.
    """
    length = len(buckets)
    if real >= length:
        return torch.arange(length), torch.arange(length)
    _, group = torch.unique(buckets[real:, :real], dim=0, return_inverse=True)
    first = {int(name): place for place, name in reversed(list(enumerate(group.tolist())))}
    kept = sorted(first.values())
    place_of = {name: real + kept.index(place) for name, place in first.items()}
    spread = list(range(real)) + [place_of[name] for name in group.tolist()]
    return torch.tensor([*range(real), *(real + place for place in kept)]), torch.tensor(spread)


def _batches(encoder: TextEncoder, ids: list[list[int]], length: int, texts: int) -> list[_Batch]:
    """Texts sorted by length, in batches of about as many rows; for `lean` of one length each."""
    pad, everything = encoder.config.pad_token_id, torch.arange(length)
    order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
    made = []
    for real, group in groupby(order, key=lambda number: len(ids[number]) if encoder.lean else 0):
        numbers = list(group)
        kept, spread = (
            distinct_positions(_buckets(encoder.config, length), real) if encoder.lean else (everything, everything)
        )
        size = max(1, texts * length // len(kept))
        for start in range(0, len(numbers), size):
            part = numbers[start : start + size]
            padded = torch.tensor([ids[n] + [pad] * (length - len(ids[n])) for n in part])[:, kept]
            mask = torch.tensor([[1] * len(ids[n]) + [0] * (length - len(ids[n])) for n in part])[:, kept]
            made.append(_Batch(part, padded, mask, kept, spread, real))
    return made


def _buckets(config: T5Config, length: int) -> torch.Tensor:
    places = torch.arange(length)
    buckets: torch.Tensor = T5Attention._relative_position_bucket(
        places[None] - places[:, None], True, config.relative_attention_num_buckets,
        config.relative_attention_max_distance,
    )  # fmt: skip
    return buckets


def _plain(encoder: TextEncoder, block: Any, hidden: torch.Tensor, batch: _Batch, bias: torch.Tensor) -> torch.Tensor:
    mask = create_bidirectional_mask(
        config=encoder.config, inputs_embeds=hidden, attention_mask=batch.mask.to(hidden.device)
    )
    rows: torch.Tensor = block(hidden, mask, bias)[0]
    return rows


def _lean(encoder: TextEncoder, block: Any, hidden: torch.Tensor, batch: _Batch, bias: torch.Tensor) -> torch.Tensor:
    attention = block.layer[0].SelfAttention
    normed = block.layer[0].layer_norm(hidden)
    keys = normed[:, : batch.real]

    def heads(projected: torch.Tensor) -> torch.Tensor:  # (B, n, heads * d) -> (B, heads, n, d)
        return projected.reshape(*projected.shape[:2], attention.n_heads, -1).transpose(1, 2)

    seen = F.scaled_dot_product_attention(
        heads(attention.q(normed)), heads(attention.k(keys)), heads(attention.v(keys)),
        attn_mask=bias[:, :, batch.kept.to(bias.device), : batch.real], scale=1.0,
    )  # fmt: skip
    rows: torch.Tensor = block.layer[-1](hidden + attention.o(seen.transpose(1, 2).flatten(2)))
    return rows


def _embedded(encoder: TextEncoder, read: Read, batches: list[_Batch]) -> list[torch.Tensor]:
    if not encoder.streamed:
        return [encoder.model.shared(batch.ids.to(encoder.device)) for batch in batches]
    table = read(*_EMBEDDING)
    return [table[batch.ids].to(encoder.device) for batch in batches]


@contextmanager
def _block(encoder: TextEncoder, read: Read, number: int) -> Iterator[Any]:
    """A layer of the encoder; a streamed one is gone afterwards."""
    block = encoder.model.encoder.block[number]
    if not encoder.streamed:
        yield block
        return
    prefix = f"encoder.block.{number}."
    found = {name: read(prefix + name).to(encoder.device) for name in block.state_dict()}
    block.load_state_dict(found, assign=True)
    del found
    yield block
    block.to("meta")


def _finished(
    encoder: TextEncoder, read: Read, batches: list[_Batch], hidden: list[torch.Tensor], length: int
) -> torch.Tensor:
    norm = encoder.model.encoder.final_layer_norm
    if encoder.streamed:
        norm.load_state_dict({"weight": read(_FINAL_NORM).to(encoder.device)}, assign=True)
    texts = sum(len(batch.numbers) for batch in batches)
    made = torch.empty(texts, length, encoder.config.d_model, dtype=encoder.dtype)
    for batch, rows in zip(batches, hidden, strict=True):
        made[torch.tensor(batch.numbers)] = norm(rows).cpu()[:, batch.spread]
    return made


@contextmanager
def _stored(encoder: TextEncoder) -> Iterator[Callable[..., torch.Tensor]]:
    """Read tensors of the encoder's files by name: the first of the names given that is there, as the encoder has it."""
    with ExitStack() as stack:
        where: dict[str, Any] = {}
        for file in weight_files(encoder.folder, SAFE_WEIGHTS_NAME) if encoder.streamed else ():
            opened = stack.enter_context(safe_open(file, "pt"))
            where |= dict.fromkeys(opened.keys(), opened)

        def read(*names: str) -> torch.Tensor:
            name = next((name for name in names if name in where), None)
            if name is None:
                raise ModelError(f"{encoder.folder} has no tensor {' or '.join(names)}. Are all of its files there?")
            tensor: torch.Tensor = where[name].get_tensor(name)
            return tensor.to(encoder.dtype)

        yield read

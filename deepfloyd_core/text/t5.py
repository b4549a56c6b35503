"""Runs T5's encoder over many texts, layer by layer: each layer processes all texts before the next layer is loaded.

So a layer can be read from the file, used and dropped: T5-XXL (9.5 GB in bf16) then needs memory for one layer and for
the texts' hidden states. With the whole encoder in memory the same loop gives the same bytes.

On a processor that multiplies bf16 no faster than fp32 (most: up to six times slower) each layer's weights are converted
to fp32 when used, the hidden states stay fp32, and the result is rounded to bf16 once.

IF's UNet gets no attention mask, so it also reads the hidden states of the padding. `plain` runs transformers' own
blocks on padded texts: bit for bit the output of `IFPipeline.encode_prompt`. `lean` skips work that cannot change the
result: only real tokens are keys, and padding positions that must get equal hidden states (their distances to all real
tokens fall into the same buckets) are computed once. In exact arithmetic both are equal; in practice they differ only
by the order of summation.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import IFPipeline
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5Config, T5EncoderModel
from transformers.activations import NewGELUActivation
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.t5.modeling_t5 import T5Attention
from transformers.utils import SAFE_WEIGHTS_NAME

from deepfloyd_core.config.extras import Quantization
from deepfloyd_core.errors import ModelError
from deepfloyd_core.models.headers import weight_files
from deepfloyd_core.models.text_encoders import TEXT_ENCODERS
from deepfloyd_core.models.torch_device import computes_bf16
from deepfloyd_core.text.bounds import bounded
from deepfloyd_core.text.quantize import quantize
from deepfloyd_core.types import Report, no_report

_EMBEDDING, _FINAL_NORM = ("shared.weight", "encoder.embed_tokens.weight"), "encoder.final_layer_norm.weight"
_LAYER = "encoder.block."
_KIND = TEXT_ENCODERS["t5"]


@dataclass(frozen=True)
class TextEncoder:
    """A T5 encoder. A layer is built when it is needed, from weights in memory or in the files."""

    folder: Path  # text_encoder/
    model: T5EncoderModel  # on the meta device: the layers' code and shapes
    dtype: torch.dtype  # of the weights and of what comes out
    arithmetic: torch.dtype  # of the products and the hidden states
    device: torch.device
    lean: bool  # see the module
    quantization: Quantization  # of the layers' weights
    held: dict[str, torch.Tensor] | None  # all weights, on the device; None: streamed from the files

    @property
    def config(self) -> T5Config:
        return self.model.config


@dataclass(frozen=True)
class _Batch:
    """Texts of one length. `kept`: the computed positions; `spread`: for every position its index in `kept`."""

    numbers: list[int]
    ids: torch.Tensor  # (B, kept), padded
    mask: torch.Tensor  # (B, kept), 1: a real token
    kept: torch.Tensor
    spread: torch.Tensor
    real: int  # tokens that are keys; 0: texts of different lengths, see the mask


def clean_captions(captions: list[str], special: list[str]) -> tuple[list[str], int]:
    """Captions cleaned as in `IFPipeline.__call__`, without `special` tokens, and how many of those tokens there were.

    The pipeline's own function cleans what `bounded` leaves; it needs ftfy and beautifulsoup4. It takes `</s>` for a tag
    and drops it. Special tokens of another tokenizer may remain and are removed here, because a literal one would end a
    text, or pad it.
    """
    cleaner = object.__new__(IFPipeline)  # the method uses no component
    texts = list(cleaner._text_preprocessing([bounded(caption) for caption in captions], clean_caption=True))
    found = sum(text.count(token) for text in (*captions, *texts) for token in special)
    for token in special if found else ():
        texts = [text.replace(token, " ") for text in texts]
    return texts, found


def row_width(folder: Path) -> int:
    """D of the encoder of a pipeline folder."""
    return int(T5Config.from_pretrained(folder / _KIND.weights_folder).d_model)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a pipeline folder."""
    return AutoTokenizer.from_pretrained(folder / _KIND.tokenizer_folder)


def load_encoder(
    folder: Path, dtype: torch.dtype, device: torch.device, streamed: bool = False, quantization: Quantization = "none"
) -> TextEncoder:
    """The T5 encoder of a pipeline folder, complete in memory or streamed layer by layer. Only safetensors are read.

    fp32 must give the pipeline's bits, so it is not lean; bf16 itself rounds far more than `lean` changes.
    """
    folder = folder / _KIND.weights_folder
    with torch.device("meta"):
        model = T5EncoderModel(T5Config.from_pretrained(folder)).eval()
    lean = dtype != torch.float32
    encoder = TextEncoder(folder, model, dtype, _arithmetic(dtype, device), device, lean, quantization, None)
    if streamed:
        return encoder
    with _files(encoder) as files:
        names = [name for name in files if quantization == "none" or not name.startswith(_LAYER)]
        held = {name: _sent(encoder, files[name].get_tensor(name)) for name in names}
    if quantization != "none":
        for number in range(model.config.num_layers):
            layer = _block(encoder, number).state_dict()
            held |= {f"{_LAYER}{number}.{name}": weight for name, weight in layer.items()}
    return replace(encoder, held=held)


@torch.no_grad()
def forecast_s(encoder: TextEncoder, texts: int, files: int, length: int, batch_rows: int) -> float:
    """Expected time for texts in some files, in seconds, from one product and one layer's weights, both timed here."""
    start = time.perf_counter()
    float(next(_block(encoder, 0).parameters()).flatten()[0])  # waits for it; quantised ones are parameters too
    layers = encoder.config.num_layers
    reading = (time.perf_counter() - start) * layers * files
    config = encoder.config
    rows = batch_rows if encoder.device.type == "cuda" else length  # a GPU is only fast at products that fill it
    left = torch.randn(rows, config.d_model, device=encoder.device, dtype=encoder.arithmetic)
    right = torch.randn(config.d_model, config.d_ff, device=encoder.device, dtype=encoder.arithmetic)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        float((left @ right)[0, 0])  # waits for it
        seconds.append(time.perf_counter() - start)
    inner = config.num_heads * config.d_kv
    weights = 4 * config.d_model * inner + (3 if config.is_gated_act else 2) * config.d_model * config.d_ff
    macs = texts * layers * length * (weights + 2 * length * inner)
    return float(reading + min(seconds) * macs / (rows * config.d_model * config.d_ff))


def _arithmetic(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    if dtype == torch.float32 or device.type != "cpu":
        return dtype
    return dtype if computes_bf16(device) else torch.float32


def _sent(encoder: TextEncoder, tensor: torch.Tensor) -> torch.Tensor:
    """A weight on the encoder's device in its dtype. It goes to a GPU from page-locked memory, while the next one is
    read.
    """
    if encoder.device.type == "cuda":
        return tensor.pin_memory().to(encoder.device, encoder.dtype, non_blocking=True)
    return tensor.to(encoder.device, encoder.dtype)


@torch.no_grad()  # not inference_mode: quantised weights cannot be loaded under it
def encode(
    encoder: TextEncoder, ids: list[list[int]], length: int, batch_rows: int, report: Report = no_report
) -> torch.Tensor:
    """The last hidden states (N, length, D) of tokenised texts (at most `length` ids, including the end token), on the CPU.

    `batch_rows`: hidden states (rows of D) in one forward pass. Raises ModelError when a streamed tensor is missing.
    """
    batches = _batches(encoder, ids, length, max(1, batch_rows // length))
    table = _weights(encoder, [_EMBEDDING])[_EMBEDDING[0]]
    hidden = [table[batch.ids].to(encoder.arithmetic) for batch in batches]
    del table
    bias, forward = None, _lean if encoder.lean else _plain
    for number in range(encoder.config.num_layers):
        block = _block(encoder, number)
        if bias is None:
            bias = block.layer[0].SelfAttention.compute_bias(length, length, device=encoder.device)
        hidden = [forward(encoder, block, rows, batch, bias) for rows, batch in zip(hidden, batches, strict=True)]
        del block  # before the next one is read
        report((number + 1) * len(ids) // encoder.config.num_layers, len(ids), f"layer {number + 1}")
    return _finished(encoder, batches, hidden, length)


def distinct_positions(buckets: torch.Tensor, real: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions to compute, and for each position its index among them, for texts of `real` tokens.

    buckets: (T, T) relative-position buckets, [query, key]. Padding positions whose distances to all real tokens fall
    into the same buckets get the same hidden state in every layer: they start as the same token, and attend to the same
    keys with the same biases.
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
    pad, everything, device = encoder.config.pad_token_id, torch.arange(length), encoder.device
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
            made.append(_Batch(part, padded.to(device), mask.to(device), kept.to(device), spread, real))
    return made


def _buckets(config: T5Config, length: int) -> torch.Tensor:
    places = torch.arange(length)
    buckets: torch.Tensor = T5Attention._relative_position_bucket(
        places[None] - places[:, None], True, config.relative_attention_num_buckets,
        config.relative_attention_max_distance,
    )  # fmt: skip
    return buckets


def _plain(encoder: TextEncoder, block: Any, hidden: torch.Tensor, batch: _Batch, bias: torch.Tensor) -> torch.Tensor:
    mask = create_bidirectional_mask(config=encoder.config, inputs_embeds=hidden, attention_mask=batch.mask)
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
        attn_mask=bias[:, :, batch.kept, : batch.real], scale=1.0,
    )  # fmt: skip
    rows: torch.Tensor = block.layer[-1](hidden + attention.o(seen.transpose(1, 2).flatten(2)))
    return rows


def _block(encoder: TextEncoder, number: int) -> Any:
    """A layer of the encoder with its weights."""
    block, prefix = deepcopy(encoder.model.encoder.block[number]), f"{_LAYER}{number}."
    found = _weights(encoder, [(prefix + name,) for name in block.state_dict()])
    # No `.to` for what has the dtype: it would turn quantised weights into plain ones.
    weights = {
        name.removeprefix(prefix): weight if weight.dtype == encoder.arithmetic else weight.to(encoder.arithmetic)
        for name, weight in found.items()
    }
    del found
    block.load_state_dict(weights, assign=True)
    if encoder.held is None:
        quantize(block, encoder.quantization)
    feed_forward = block.layer[-1].DenseReluDense
    if encoder.lean and isinstance(feed_forward.act, NewGELUActivation):
        feed_forward.act = torch.nn.GELU(approximate="tanh")  # the same formula as one kernel in place of eight
    return block


def _finished(encoder: TextEncoder, batches: list[_Batch], hidden: list[torch.Tensor], length: int) -> torch.Tensor:
    norm = deepcopy(encoder.model.encoder.final_layer_norm)
    norm.load_state_dict(
        {"weight": _weights(encoder, [(_FINAL_NORM,)])[_FINAL_NORM].to(encoder.arithmetic)}, assign=True
    )
    there = []
    while hidden:
        there.append(_fetched(encoder, norm(hidden.pop(0))))  # popped: there are as many bytes of them as in a file
    if encoder.device.type == "cuda":
        torch.cuda.synchronize(encoder.device)
    texts = sum(len(batch.numbers) for batch in batches)
    made = torch.empty(texts, length, encoder.config.d_model, dtype=encoder.dtype)
    for batch, rows in zip(batches, there, strict=True):
        made[torch.tensor(batch.numbers)] = rows[:, batch.spread]
    return made


def _fetched(encoder: TextEncoder, rows: torch.Tensor) -> torch.Tensor:
    """Hidden states in main memory; from a GPU copied into page-locked memory, and still in transfer when this returns."""
    if encoder.device.type == "cuda":
        place = torch.empty(rows.shape, dtype=encoder.dtype, pin_memory=True)
        return place.copy_(rows, non_blocking=True)
    return rows.to("cpu", encoder.dtype)


def _weights(encoder: TextEncoder, wanted: list[tuple[str, ...]]) -> dict[str, torch.Tensor]:
    """Tensors by the first of their names; each is read under the first of its names that exists. ModelError: none
    exists.
    """
    with nullcontext() if encoder.held else _files(encoder) as files:
        there: Any = encoder.held or files
        found = {}
        for names in wanted:
            name = next((name for name in names if name in there), None)
            if name is None:
                raise ModelError(f"{encoder.folder} has no tensor {' or '.join(names)}. Are all of its files there?")
            found[names[0]] = there[name] if encoder.held else _sent(encoder, there[name].get_tensor(name))
    return found


@contextmanager
def _files(encoder: TextEncoder) -> Iterator[dict[str, Any]]:
    """The open file of each tensor. When it is closed and its tensors are freed, a file is no longer mapped into memory."""
    with ExitStack() as stack:
        where: dict[str, Any] = {}
        for file in weight_files(encoder.folder, SAFE_WEIGHTS_NAME):
            opened = stack.enter_context(safe_open(file, "pt"))
            where |= dict.fromkeys(opened.keys(), opened)
        yield where

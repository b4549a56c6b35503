"""T5 before it is loaded: its shape, what it holds, and how much it computes for some captions."""

import math
from collections.abc import Sequence

import numpy as np

from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stage_run import Precision
from deepfloyd_core.models.device import Device
from deepfloyd_core.models.folders import folder_here
from deepfloyd_core.models.random_files import read_json
from deepfloyd_core.models.text_encoders import T5_XXL, text_encoder_of
from deepfloyd_core.models.work import Work
from deepfloyd_core.types import Json

_TOKENS_A_WORD = 1.3  # of English, in T5's vocabulary
_MOST_COUNTED = 10_000  # captions whose words are counted
# Operations of a layer, and bytes in fp32 for each of its numbers that they touch at a position: of its width, and of its
# inner one.
_CALLS, _TOUCHED, _TOUCHED_INSIDE = 60, 12 * 4, 8 * 4


def t5_shape(run: Run) -> Json:
    """The configuration of a run's T5; of one that is not on this machine, T5-XXL's."""
    first = run.config.first_stage
    folder = folder_here(run.config.stage(first).model, first, text=True)
    kind = text_encoder_of(first)
    return dict(T5_XXL) if folder is None else read_json(folder / kind.weights_folder / "config.json")


def t5_numbers(shape: Json) -> tuple[int, int]:
    """How many weights a layer of a T5 has, and everything else."""
    inner = shape["num_heads"] * shape["d_kv"]
    gated = 3 if "gated" in shape.get("feed_forward_proj", "relu") else 2
    layer = 4 * shape["d_model"] * inner + gated * shape["d_model"] * shape["d_ff"]
    return layer, shape["vocab_size"] * shape["d_model"]


def stored_width(run: Run) -> int:
    """Bytes of a number of T5's rows, and of its weights."""
    return 4 if run.config.text_encoder_dtype == "fp32" else 2


def t5_widths(run: Run, device: Device) -> tuple[int, int]:
    """Bytes of a number: as it is stored, and as it is computed with."""
    stored = stored_width(run)
    return stored, 4 if device.is_cpu and not device.has_bf16 else stored


def t5_file(run: Run, shape: Json) -> int:
    """How many texts a file of embeds has."""
    row = run.config.tokenizer_max_length * shape["d_model"] * stored_width(run)
    return max(1, int(run.config.embed_file_mib * 2**20 / row))


def encoding_s(run: Run, captions: Sequence[str], new: int, device: Device) -> float:
    """Seconds in which T5 encodes so many new ones of some captions: its layers, and for each file of embeds its weights,
    where they are read or converted then. A disk that is slower than memory is not in it.
    """
    shape, (stored, computed) = t5_shape(run), t5_widths(run, device)
    layer, _ = t5_numbers(shape)
    length, layers = run.config.tokenizer_max_length, shape["num_layers"]
    real, kept = _positions(shape, _tokens(captions, length), length)
    if stored == 4:  # as the pipeline: every position
        real = kept = float(length)
    inner = shape["num_heads"] * shape["d_kv"]
    of_keys = 2 * shape["d_model"] * inner
    flops = 2 * (kept * (layer - of_keys) + real * of_keys + 2 * kept * real * inner)
    touched = kept * (_TOUCHED * shape["d_model"] + _TOUCHED_INSIDE * shape["d_ff"])
    batches = math.ceil(new / run.config.embed_batch_size)
    work = Work(flops=layers * new * flops, bytes=layers * new * touched, calls=layers * batches * _CALLS)
    files = math.ceil(new / t5_file(run, shape))
    loads = files if computed != stored or run.config.text_encoder_streaming else 1
    moved = layers * layer * (stored + (computed if computed != stored else 0)) * loads
    precision: Precision = "bf16" if computed == 2 else "no"
    return device.seconds(work, precision) + device.seconds(Work(bytes=moved), "no")


def _tokens(captions: Sequence[str], length: int) -> float:
    """Of a caption in the mean, with the one that ends it. All of another language than English have more."""
    counted = captions[:: max(1, len(captions) // _MOST_COUNTED)]
    words = [min(length, 1 + _TOKENS_A_WORD * len(caption.split())) for caption in counted]
    return sum(words) / max(1, len(words))


def _positions(shape: Json, real: float, length: int) -> tuple[float, float]:
    """How many positions of a text are keys, and how many are computed: the real ones, and of the padding one for each
    group with equal distances to these (`text.t5`).
    """
    exact = shape["relative_attention_num_buckets"] // 4
    most = shape["relative_attention_max_distance"]
    tokens = min(length, math.ceil(real))
    distances = np.arange(tokens, length)[:, None] - np.arange(tokens)[None]
    far = exact + (np.log(np.maximum(distances, 1) / exact) / math.log(most / exact) * exact).astype(int)
    buckets = np.where(distances < exact, distances, np.minimum(far, 2 * exact - 1))
    return float(tokens), float(tokens + len(np.unique(buckets, axis=0)))

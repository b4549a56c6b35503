"""How T5 encodes captions, and how the embeds are stored."""

from typing import Literal

from deepfloyd_core.config.base import Spec
from deepfloyd_core.config.extras import Quantization
from deepfloyd_core.config.keys import Reader, key

TOKENS = 77  # rows of text that IF was trained with
_ENCODED: tuple[Reader, ...] = ("embeds", "generated")


class TextKeys(Spec):
    """How captions are encoded."""

    text_encoder_dtype: Literal["fp32", "bf16"] = key(
        "bf16", says="dtype in which T5 runs and its output is stored; never fp16, which overflows.", makes=_ENCODED
    )
    text_encoder_quantization: Quantization = key(
        "none",
        says="T5's weights in 8 or 4 bits (torchao): a half or a quarter of the memory, less exact.",
        makes=_ENCODED,
    )
    tokenizer_max_length: int = key(
        TOKENS, ge=TOKENS, le=512, says="Tokens of a caption; IF was trained with 77, more is a risk.", makes=_ENCODED
    )
    embed_compression: Literal["none", "packed"] = key(
        "none",
        says="How embeds are stored, both without loss: `packed` takes 36 % less and is read 10x slower.",
        makes=("embeds",),
    )
    embed_file_mib: float = key(
        256.0,
        ge=0.1,
        le=4096,
        says="Embeds (MiB, before packing) in one file; a kill costs at most one.",
        makes=("embeds",),
    )

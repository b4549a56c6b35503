"""The one table of text encoders: their folders, files and architecture, by the name that `StageKind.text_encoder` has.

No torch, so that model folders are found and identified without it. `text.encoders` has the functions of each.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepfloyd_core.config.flavours import TINY
from deepfloyd_core.config.stages import STAGES, Stage


@dataclass(frozen=True)
class TextEncoderKind:
    """The facts of a text encoder."""

    title: str
    weights_folder: str  # its folder in a model's folder
    weights_file: str  # the name of its weights there, if they are one file
    tokenizer_folder: str  # the folder of its tokenizer
    cleaned_by: tuple[str, ...]  # packages whose versions decide how captions are cleaned for it
    model_class: str  # in transformers, as the following two
    config_class: str
    tokenizer_class: str
    random_config: Mapping[str, Any]  # of its architecture, for random weights
    random_tokenizer: Path  # which these have

    @property
    def parts(self) -> tuple[str, ...]:
        """The folders that decide its hidden states."""
        return self.weights_folder, self.tokenizer_folder

    @property
    def files(self) -> tuple[str, ...]:
        """Patterns of the files that it needs."""
        return (
            f"{self.weights_folder}/config.json",
            f"{self.weights_folder}/*.safetensors",
            f"{self.tokenizer_folder}/tokenizer_config.json",
        )


T5_XXL = {  # v1.1, encoder only: 4,762,310,656 parameters
    "architectures": ["T5EncoderModel"], "model_type": "t5", "d_model": 4096, "d_ff": 10240, "d_kv": 64,
    "num_heads": 64, "num_layers": 24, "vocab_size": 32128, "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0,
    "layer_norm_epsilon": 1e-6, "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
    "pad_token_id": 0, "eos_token_id": 1, "is_encoder_decoder": False, "use_cache": False,
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
TEXT_ENCODERS = {
    "t5": TextEncoderKind(
        title="T5",
        weights_folder="text_encoder",
        weights_file="model.safetensors",
        tokenizer_folder="tokenizer",
        cleaned_by=("diffusers", "ftfy"),
        model_class="T5EncoderModel",
        config_class="T5Config",
        tokenizer_class="T5Tokenizer",
        random_config=T5_XXL,
        random_tokenizer=TINY / "i" / "tokenizer",
    )
}


def text_encoder_of(stage: Stage) -> TextEncoderKind:
    """The text encoder whose hidden states a stage's UNet takes."""
    return TEXT_ENCODERS[STAGES[stage].text_encoder]

"""The functions of each text encoder: a module for each, by its name in `models.text_encoders.TEXT_ENCODERS`."""

from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from deepfloyd_core.config.extras import Quantization
from deepfloyd_core.text import t5
from deepfloyd_core.types import Report


class EncoderModule(Protocol):
    """What a module of a text encoder has. T: `tokenizer_max_length`; D: the width of its hidden states."""

    def clean_captions(self, captions: list[str], special: list[str]) -> tuple[list[str], int]:
        """Captions cleaned as the encoder saw them in its training, without the tokenizer's special tokens; and how many of
        these there were.
        """
        ...

    def load_tokenizer(self, folder: Path) -> PreTrainedTokenizerBase:
        """The tokenizer of a model folder; it also counts tokens."""
        ...

    def row_width(self, folder: Path) -> int:
        """D, from the configuration of a model folder."""
        ...

    def load_encoder(
        self, folder: Path, dtype: torch.dtype, device: torch.device, streamed: bool, quantization: Quantization
    ) -> Any:
        """The encoder of a model folder, in memory or streamed from its files, for the two functions below."""
        ...

    def forecast_s(self, encoder: Any, texts: int, files: int, length: int, batch_rows: int) -> float:
        """Expected time for texts in some files, in seconds."""
        ...

    def encode(self, encoder: Any, ids: list[list[int]], length: int, batch_rows: int, report: Report) -> torch.Tensor:
        """The hidden states (N, T, D) of tokenised texts of at most T tokens, on the CPU, in the encoder's dtype."""
        ...


ENCODERS: dict[str, EncoderModule] = {"t5": t5}

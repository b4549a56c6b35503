"""Tensors that a sampling job keeps beside its pictures, so that a killed one goes on with them."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from deepfloyd_core.files import atomic_path
from deepfloyd_core.store.parts import finish_part, part_is_whole


def store_tensor(tensor: torch.Tensor, file: Path) -> None:
    """Write a tensor as a finished part."""
    with atomic_path(file) as tmp:
        save_file({"": tensor.contiguous()}, tmp)
    finish_part(file)


def stored_tensor(file: Path) -> torch.Tensor:
    """A tensor that `store_tensor` has written, on the CPU."""
    tensor: torch.Tensor = load_file(file)[""]
    return tensor


class StoredTexts:
    """Hidden states of texts, each encoded once. The encoder is loaded when the first text is needed, and no more in a job
    that goes on.
    """

    def __init__(self, texts: Iterable[str], encode: Callable[[list[str]], torch.Tensor], file: Path) -> None:
        """encode: texts to (N, T, D); file: where the hidden states are kept."""
        self._places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        self._encode, self._file = encode, file
        self._rows: torch.Tensor | None = None

    def of(self, texts: list[str]) -> torch.Tensor:
        """(N, T, D) on the CPU."""
        if self._rows is None:
            self._rows = self._encoded()
        return self._rows[[self._places[text] for text in texts]]

    def _encoded(self) -> torch.Tensor:
        if part_is_whole(self._file):
            return stored_tensor(self._file)
        rows = self._encode(list(self._places))
        store_tensor(rows, self._file)
        return rows

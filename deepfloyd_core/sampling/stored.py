"""Tensors that a sampling job keeps beside its pictures, so that a killed one goes on with them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from deepfloyd_core.files import atomic_path
from deepfloyd_core.sampling.jobs import DrawRequest
from deepfloyd_core.store.parts import finish_part, part_is_whole
from deepfloyd_core.text.embeds import Embeds
from deepfloyd_core.text.encode import encode_prompts


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
    """Hidden states of texts: those of the workspace's embeds, the others encoded, each once. The encoder is loaded when the
    first of these is needed, and no more in a job that goes on.
    """

    def __init__(self, texts: Iterable[str], request: DrawRequest[Any], file: Path) -> None:
        """request: names the encoder; file: where the hidden states are kept."""
        self._places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        self._request, self._file = request, file
        self._rows: torch.Tensor | None = None

    def make(self) -> None:
        """Encode what is not there. The encoder is gone afterwards: call this before another large model is loaded."""
        if self._rows is None:
            self._rows = self._encoded()

    def of(self, texts: list[str]) -> torch.Tensor:
        """(N, T, D) on the CPU."""
        self.make()
        assert self._rows is not None
        return self._rows[[self._places[text] for text in texts]]

    def _encoded(self) -> torch.Tensor:
        if part_is_whole(self._file):
            return stored_tensor(self._file)
        request = self._request
        embeds = Embeds(request.embeds) if request.embeds else None
        found = {text: embeds.of(text) for text in self._places if text in embeds} if embeds else {}
        missing = [text for text in self._places if text not in found]
        if missing:
            made = encode_prompts(missing, request.encoder_name, request.encoder, request.text, request.machine)
            found |= dict(zip(missing, made, strict=True))
        rows = torch.stack([found[text] for text in self._places])
        store_tensor(rows, self._file)
        return rows

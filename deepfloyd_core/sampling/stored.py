"""Tensors that sampling jobs keep beside their pictures, so that a killed one goes on with them."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from deepfloyd_core.models.tensor_files import save_tensors
from deepfloyd_core.models.unet import use_threads
from deepfloyd_core.processes.jobs import Job
from deepfloyd_core.sampling.forecasts import texts_forecast
from deepfloyd_core.sampling.jobs import DrawRequest
from deepfloyd_core.sampling.texts_jobs import TextsRequest, TextsSummary
from deepfloyd_core.store.counts import many
from deepfloyd_core.store.parts import finish_part, part_is_whole
from deepfloyd_core.text.embeds import Embeds
from deepfloyd_core.text.encode import encode_prompts

DRAWN = ".drawn"  # their folder
_TEXTS = "text.safetensors"


def store_tensor(tensor: torch.Tensor, file: Path) -> None:
    """Write a tensor as a finished part."""
    save_tensors({"": tensor.contiguous()}, file)
    finish_part(file)


def stored_tensor(file: Path) -> torch.Tensor:
    """A tensor that `store_tensor` has written, on the CPU."""
    tensor: torch.Tensor = load_file(file)[""]
    return tensor


def store_texts(job: Job[TextsRequest]) -> TextsSummary:
    """Store the hidden states of texts (N, T, D) for `StoredTexts`: those of the workspace's embeds, the others encoded. The
    encoder is loaded only if there are others, and not in a request that goes on.
    """
    request, file = job.request, job.out / DRAWN / _TEXTS
    use_threads(request.machine.num_threads)
    file.parent.mkdir(exist_ok=True)
    if part_is_whole(file):
        return TextsSummary(encoded=0)
    embeds = Embeds(request.embeds) if request.embeds else None
    found = {text: embeds.of(text) for text in request.texts if text in embeds} if embeds else {}
    missing = [text for text in request.texts if text not in found]
    if missing:
        forecast = texts_forecast(request)
        told = f"{many(len(missing), 'text')} to encode" + (f", with {forecast}" if forecast else "")
        job.report(0, len(missing), told)
        made = encode_prompts(missing, request.encoder_name, request.encoder, request.keys, request.machine)
        found |= dict(zip(missing, made, strict=True))
    store_tensor(torch.stack([found[text] for text in request.texts]), file)
    return TextsSummary(encoded=len(missing))


class StoredTexts:
    """Hidden states of the texts of a request to draw, which `store_texts` has stored. Read when the first is needed."""

    def __init__(self, request: DrawRequest[Any], out: Path) -> None:
        """out: the folder of the pictures."""
        self._places = {text: place for place, text in enumerate(request.texts)}
        self._file = out / DRAWN / _TEXTS

    def of(self, texts: list[str]) -> torch.Tensor:
        """(N, T, D) on the CPU."""
        return self._rows[[self._places[text] for text in texts]]

    @cached_property
    def _rows(self) -> torch.Tensor:
        return stored_tensor(self._file)

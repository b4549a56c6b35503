"""Memory: how much there is, and whether the weights that a run loads fit at all.

Weights alone, a lower bound: activations come on top, and depend on sizes and batches. So a fault is certain, and no
fault is no promise.
"""

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from shlex import quote

from safetensors import SafetensorError

from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.doctor.embeds import has_embeds
from deepfloyd_core.doctor.finding import Finding
from deepfloyd_core.errors import ModelError
from deepfloyd_core.models.device import machine_memory
from deepfloyd_core.models.folders import folder_here
from deepfloyd_core.models.headers import UNET_WEIGHTS, read_header, weight_files
from deepfloyd_core.models.sizes import T5_XXL, unet_parameters
from deepfloyd_core.models.text_encoders import text_encoder_of
from deepfloyd_core.models.torch_facts import TorchFacts
from deepfloyd_core.store.counts import size
from deepfloyd_core.training.turns import ranks_of

_WIDTH = {"fp32": 4.0, "bf16": 2.0, "no": 4.0, "no_change": 0.0, "int8": 1.0, "nf4": 0.5}  # bytes of a weight
# Bytes of a parameter in full training: weight, gradient, states. Others as AdamW in fp32.
_FULL = {"adamw_bf16": 8.0, "adamw_8bit": 10.0, "adafactor": 8.0}
_FULL_FP32 = 16.0


@dataclass(frozen=True)
class _Need:
    what: str
    num_bytes: float
    remedy: str


def memory_findings(run: Run | None, facts: TorchFacts | None) -> list[Finding]:
    """Of the machine, and of its GPU; whether what a run loads fits where it computes. facts: None where torch has none."""
    total, free, is_limited = machine_memory()
    of_container = ", the limit of this container" if is_limited else ""
    has_gpu = facts is not None and facts.device == "cuda"
    on_gpu = has_gpu and run is not None and run.config.device != "cpu"
    needs = [*_encoding(run, on_gpu), *_trainings(run, on_gpu)] if run else []
    text = f"{size(free)} of {size(total)} free{of_container}"
    found = _fit(Finding("memory", "fine", text), free, total, [] if on_gpu else needs)
    if facts is not None and has_gpu:
        text = f"{size(facts.free_bytes)} of {size(facts.total_bytes)} free on {facts.device_name}"
        of_gpu = Finding("GPU memory", "fine", text)
        found += _fit(of_gpu, facts.free_bytes, facts.total_bytes, needs if on_gpu else [])
    return found


def _fit(memory: Finding, free: int, total: int, needs: list[_Need]) -> list[Finding]:
    """A finding for each need that does not fit, else one. needs: what is loaded there, one after the other."""
    largest = max(needs, key=lambda need: need.num_bytes, default=None)
    if largest is None:
        return [memory]
    if large := [need for need in needs if need.num_bytes > total]:
        return [Finding(memory.name, "fault", _wants(memory, need), need.remedy) for need in large]
    text = _wants(memory, largest)
    if largest.num_bytes > free:
        return [Finding(memory.name, "note", f"{text}: end other programs first", largest.remedy)]
    return [Finding(memory.name, "fine", text)]


def _wants(memory: Finding, need: _Need) -> str:
    return f"{memory.text}; {need.what} takes {size(int(need.num_bytes))}, beside activations"


def _encoding(run: Run, on_gpu: bool) -> Iterator[_Need]:
    """The text encoder, unless captions were encoded before."""
    config = run.config
    if config.text_encoder_streaming or has_embeds(run):
        return
    kind, stage = text_encoder_of(config.first_stage), config.first_stage
    quantization = config.text_encoder_quantization
    width = _WIDTH[config.text_encoder_dtype if quantization == "none" else quantization]
    count = _parameters(run, stage, kind.weights_folder, kind.weights_file, T5_XXL)
    copies = 1 if on_gpu else config.embed_workers  # each has a GPU of its own, where there are several
    remedy = f"{_command(run)} --set text_encoder_streaming=true"
    yield _Need(f"{kind.title}, to encode captions,", width * count * copies, remedy)


def _trainings(run: Run, on_gpu: bool) -> Iterator[_Need]:
    """The UNet of each stage, in each process: on GPUs each has one of its own, or its part of one that is trained whole."""
    for stage in run.config.stages:
        own, ranks = run.config.stage(stage), ranks_of(run.config, stage, 0)
        copies = 1.0 if on_gpu else ranks
        if own.model_type == "full":
            copies /= ranks
        count = _parameters(run, stage, "unet", UNET_WEIGHTS, unet_parameters(own.model_flavour))
        smaller = "base_model_precision=int8"
        if own.model_type == "full":
            smaller = "model_type=lora" if own.optimizer in _FULL else "optimizer=adamw_bf16"
        remedy = f"{_command(run)} --set stage{stage}.{smaller}"
        yield _Need(f"the UNet of stage {stage}, in training,", _unet_width(own) * count * copies, remedy)


def _command(run: Run) -> str:
    return f"deepfloyd run {quote(run.file)}"


def _unet_width(own: StageConfig) -> float:
    if own.model_type == "full":
        return _FULL.get(own.optimizer, _FULL_FP32)
    return _WIDTH[own.base_model_precision] or _WIDTH[own.mixed_precision]


def _parameters(run: Run, stage: Stage, part: str, file: str, otherwise: int) -> int:
    """Parameters of a part of a stage's model, from the headers of its files; `otherwise` for a model that is not here."""
    model = run.config.stage(stage).model
    with suppress(ModelError, OSError, SafetensorError):
        if folder := folder_here(model, stage, text=part != "unet"):
            headers = [read_header(each) for each in weight_files(folder / part, file)]
            return sum(math.prod(shape) for header in headers for shape in header.shapes.values())
    return otherwise

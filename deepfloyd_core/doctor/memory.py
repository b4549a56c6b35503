"""Memory: how much there is, and whether the weights that a run loads fit at all.

Weights alone, a lower bound: activations come on top, and depend on sizes and batches. So a fault is certain, and no
fault is no promise.
"""

import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import psutil
from safetensors import SafetensorError

from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.doctor.finding import Finding
from deepfloyd_core.doctor.sizes import T5_XXL, unet_parameters
from deepfloyd_core.doctor.torch_facts import TorchFacts
from deepfloyd_core.errors import ModelError
from deepfloyd_core.models.folders import folder_here
from deepfloyd_core.models.headers import UNET_WEIGHTS, read_header, weight_files
from deepfloyd_core.models.text_encoders import text_encoder_of
from deepfloyd_core.store.counts import size

_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
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
    memory = psutil.virtual_memory()
    limit = _limit()
    total = min(memory.total, limit or memory.total)
    free = min(memory.available, total)
    text = f"{size(free)} of {size(total)} free"
    places = {"memory": (free, total, f"{text}, the limit of this container" if total < memory.total else text)}
    if facts and facts.device == "cuda":
        of_gpu = f"{size(facts.free_bytes)} of {size(facts.total_bytes)} free on {facts.device_name}"
        places["GPU memory"] = (facts.free_bytes, facts.total_bytes, of_gpu)
    on_gpu = "GPU memory" in places and run is not None and run.config.device != "cpu"
    needs = _needs(run) if run else []
    return [_fit(name, *place, needs if (name == "GPU memory") == on_gpu else []) for name, place in places.items()]


def _fit(name: str, free: int, total: int, text: str, needs: list[_Need]) -> Finding:
    """needs: what is loaded there, one after the other."""
    largest = max(needs, key=lambda need: need.num_bytes, default=None)
    if largest is None:
        return Finding(name, "fine", text)
    wants = f"{text}; {largest.what} takes {size(int(largest.num_bytes))}, beside activations"
    if largest.num_bytes > total:
        return Finding(name, "fault", wants, largest.remedy)
    if largest.num_bytes > free:
        return Finding(name, "note", f"{wants}: end other programs first", largest.remedy)
    return Finding(name, "fine", wants)


def _needs(run: Run) -> list[_Need]:
    config, command = run.config, f"deepfloyd run {quote(run.file)}"
    needs = []
    if not config.text_encoder_streaming:
        width = _WIDTH[
            config.text_encoder_quantization
            if config.text_encoder_quantization != "none"
            else config.text_encoder_dtype
        ]
        encoder = text_encoder_of(config.first_stage)
        count = _parameters(run, config.first_stage, encoder.weights_folder, encoder.weights_file, T5_XXL)
        loaded = width * count * config.embed_workers
        needs.append(
            _Need(f"{encoder.title}, to encode captions,", loaded, f"{command} --set text_encoder_streaming=true")
        )
    for stage in config.stages:
        own = config.stage(stage)
        count = _parameters(run, stage, "unet", UNET_WEIGHTS, unet_parameters(own.model_flavour))
        smaller = f"{command} --set stage{stage}.base_model_precision=int8"
        if own.model_type == "full":
            smaller = f"{command} --set stage{stage}.optimizer=adamw_bf16"
            if own.optimizer in _FULL:
                smaller = f"{command} --set stage{stage}.model_type=lora"
        needs.append(_Need(f"the UNet of stage {stage}, in training,", _unet_width(own) * count, smaller))
    return needs


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


def _limit() -> int | None:
    """The memory limit (bytes) of the container that this process is in; None: there is none."""
    for file in _CGROUPS:
        with suppress(OSError, ValueError):
            return int(Path(file).read_text())
    return None

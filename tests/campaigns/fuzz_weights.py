"""Damaged weights to start from, to draw with and to train on: refused by name before anything is made, or loaded."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzz_folder import new_world
from mutations import damaged, damaged_json, damaged_safetensors, damaged_text, one_of
from safetensors.numpy import save
from trials import Target, Trial, named_error

from deepfloyd_core.adapters import mixed
from deepfloyd_core.adapters.controlnet_file import RECORD, new_shapes
from deepfloyd_core.adapters.lora_file import METADATA
from deepfloyd_core.adapters.method import method_of
from deepfloyd_core.adapters.mixing import load_loras
from deepfloyd_core.adapters.start_from import find_parent
from deepfloyd_core.config.flavours import FLAVOURS
from deepfloyd_core.errors import DeepFloydError
from deepfloyd_core.models.folders import resolve
from deepfloyd_core.models.headers import UNET_WEIGHTS, unet_shapes
from deepfloyd_core.models.unet import load_scheduler, load_unet, stock_pipeline
from deepfloyd_core.preflight.schedulers import check_scheduler
from deepfloyd_core.preflight.unet_sizes import check_unet, training_size_faults

TINY, RANK = Path(FLAVOURS["tiny-i"].repo), 2
_KEYS: dict[str, Any] = {"model_flavour": "tiny-i", "mixed_precision": "no"}
_CONFIG, _SCHEDULER = "unet/config.json", "scheduler/scheduler_config.json"
_OWN = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")


def _layers() -> dict[str, tuple[int, ...]]:
    """The layers that a LoRA of the default settings is on, with the shapes of their weights."""
    shapes = {name.removesuffix(".weight"): shape for name, shape in unet_shapes(TINY).items()}
    return {name: shape for name, shape in shapes.items() if name.endswith(tuple(f".{own}" for own in _OWN))}


def _halves() -> dict[str, np.ndarray]:
    rng, found = np.random.default_rng(0), dict[str, np.ndarray]()
    for layer, shape in _layers().items():
        for part, size in (("A", (RANK, *shape[1:])), ("B", (shape[0], RANK))):
            found[f"{layer}.lora_{part}.weight"] = rng.standard_normal(size, np.float32)
    return found


def _loras() -> list[bytes]:
    """In the formats of several programs."""
    halves = _halves()
    told = {METADATA: json.dumps({"unet.r": RANK, "unet.lora_alpha": RANK, "unet.target_modules": list(_OWN)})}
    ours = {f"unet.{name}": tensor for name, tensor in halves.items()}
    scripts, kohya, processors = (dict[str, np.ndarray]() for _ in range(3))
    for name, tensor in halves.items():
        layer, part = name.removesuffix(".weight").split(".lora_")
        word = {"A": "down", "B": "up"}[part]
        scripts[f"unet.{layer}.lora.{word}.weight"] = tensor
        flat = f"lora_unet_{layer.replace('.', '_')}"
        kohya |= {f"{flat}.lora_{word}.weight": tensor, f"{flat}.alpha": np.array(RANK, np.float16)}
        block, own = layer.removesuffix(".0").rsplit(".", 1)
        processors[f"{block}.processor.{own}_lora.{word}.weight"] = tensor
    return [save(ours, told), save(ours), save(scripts), save(kohya), save(processors), save(halves)]


def _control() -> list[bytes]:
    """A ControlNet-LoRA."""
    rng = np.random.default_rng(0)
    new = {name: rng.standard_normal(shape, np.float32) for name, shape in new_shapes(unet_shapes(TINY)).items()}
    down = {
        f"encoder.{name}": part for name, part in _halves().items() if name.startswith(("down_blocks", "mid_block"))
    }
    record = {"conditioning": "grayscale", "lora": {"r": RANK, "lora_alpha": RANK, "target_modules": list(_OWN)}}
    return [save(new | down, {RECORD: json.dumps(record)})]


def _biases() -> list[bytes]:
    shapes = {name: shape for name, shape in unet_shapes(TINY).items() if name.endswith(".bias")}
    return [
        save(
            {
                name: np.zeros(shape, np.float32)
                for name, shape in shapes.items()
                if not name.startswith(("encoder_hid", "add_"))
            }
        )
    ]


def _starts(**keys: Any) -> Any:
    """Trials of a file to start from, with a stage of these settings. What fits is loaded into its UNet."""

    @contextmanager
    def opened(folder: Path) -> Iterator[Trial]:
        file = folder / "x.safetensors"
        run = new_world(folder).load(stages=(1,), stage1={**_KEYS, **keys, "init_lora": str(file)})
        method, unet = method_of(run.config.stage(1)), load_unet(TINY, torch.float32)
        method.prepare(unet, run.config.stage(1), 1)

        def trial(data: bytes) -> str:
            file.write_bytes(data)
            try:
                parent = find_parent(run, 1, TINY)
            except DeepFloydError as error:
                return named_error(error, file)
            assert parent is not None and file.read_bytes() == data
            method.start(unet, file)
            return "accepted"

        yield trial
        shutil.rmtree(folder)

    return opened


@contextmanager
def _drawn(folder: Path) -> Iterator[Trial]:
    file, base = folder / "x.safetensors", load_unet(TINY, torch.float32)
    run = new_world(folder).load(stages=(1,), stage1=_KEYS)
    pipeline = stock_pipeline(TINY, 1, base, load_scheduler(TINY))

    def trial(data: bytes) -> str:
        file.write_bytes(data)
        try:
            loras = mixed.mixed_loras(run, (mixed.parse_lora(f"{file}@0.5"),), {1: TINY})
            load_loras(pipeline, loras)
        except DeepFloydError as error:
            return named_error(error, file)
        finally:
            for name in list(getattr(base, "peft_config", {})):
                base.delete_adapters(name)
        return "accepted"

    yield trial
    shutil.rmtree(folder)


def _model(name: str) -> Any:
    """Trials of one file of a model's folder, which has few weights."""

    @contextmanager
    def opened(folder: Path) -> Iterator[Trial]:
        run = new_world(folder).load(stages=(1,), stage1=_KEYS)
        model = folder / "model"
        shutil.copytree(TINY, model, ignore=shutil.ignore_patterns("*.safetensors"))
        for part, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
            (model / part / f"{file}.safetensors").write_bytes(_few()[0])

        def trial(data: bytes) -> str:
            (model / name).write_bytes(data)
            try:
                found = resolve(str(model), 1, text=True)
                check_unet(1, found)
                check_scheduler(1, found)
                training_size_faults(run, 1, found)
            except DeepFloydError as error:
                return named_error(error, model)
            unet_shapes(found)
            return "accepted"

        yield trial
        shutil.rmtree(folder)

    return opened


def _few() -> list[bytes]:
    return [
        save(
            {"conv_in.weight": np.zeros((4, 3), np.float32), "conv_in.bias": np.zeros(4, np.float16)}, {"format": "pt"}
        )
    ]


def _indices() -> list[bytes]:
    names = {"conv_in.weight": UNET_WEIGHTS, "conv_in.bias": UNET_WEIGHTS}
    return [json.dumps({"metadata": {"total_size": 52}, "weight_map": names}).encode()]


def _places(rng: Any, data: bytes) -> bytes:
    return json.dumps(damaged_json(rng, json.loads(data))).encode()


_header, _json = one_of(damaged, damaged_safetensors, damaged_safetensors), one_of(_places, _places, damaged_text())
_LORA: dict[str, Any] = {"lora_rank": RANK}
_CONTROL = {**_LORA, "controlnet": True, "controlnet_conditioning": "grayscale"}
TARGETS = (
    Target("weights to start from: LoRAs of several programs", _loras, _header, _starts(**_LORA)),
    Target("weights to start from: ControlNet", _control, _header, _starts(**_CONTROL)),
    Target("weights to start from: biases", _biases, _header, _starts(use_bitfit=True)),
    Target("LoRAs to draw with", _loras, _header, _drawn),
    Target("models: a UNet's weights", _few, _header, _model(f"unet/{UNET_WEIGHTS}")),
    Target("models: an index of weights", _indices, _json, _model(f"unet/{UNET_WEIGHTS}.index.json")),
    Target("models: config.json", lambda: [(TINY / _CONFIG).read_bytes()], _json, _model(_CONFIG)),
    Target("models: scheduler_config.json", lambda: [(TINY / _SCHEDULER).read_bytes()], _json, _model(_SCHEDULER)),
)

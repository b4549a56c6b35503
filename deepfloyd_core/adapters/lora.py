"""LoRA adapters: added by peft, saved as diffusers writes them, and read back through the stock pipeline every time.

The widely copied `convert_state_dict_to_diffusers` mixes two key formats for IF's added projections; the loader then
silently drops most of the file. So the peft state dict is saved as it is, with its metadata (without which the loader
takes alpha for the rank).
"""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from deepfloyd_core.adapters.files import LORA_FILE
from deepfloyd_core.adapters.lora_formats import our_names
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.errors import ArtifactError, ConfigError
from deepfloyd_core.files import write_bytes
from deepfloyd_core.models.same_output import output_change, small_change
from deepfloyd_core.models.tensor_files import tensors_written
from deepfloyd_core.models.unet import PIPELINES, adapter_dtype, load_scheduler, stock_pipeline

ADAPTER = "default"


def add_lora(unet: UNet2DConditionModel, config: StageConfig, seed: int) -> None:
    """Add adapters to the target layers, in the dtype of their optimizer.

    Raises ConfigError when no layer has a target's name.
    """
    present = {name for name, _ in unet.named_modules()}
    targets = [t for t in config.lora_target_modules if any(n == t or n.endswith(f".{t}") for n in present)]
    if not targets:
        where = f"the down path of {config.model_flavour}" if config.controlnet else config.model_flavour
        raise ConfigError(f"lora_target_modules is {list(config.lora_target_modules)}; {where} has none of these.")
    torch.manual_seed(seed)
    alpha = config.lora_alpha or config.lora_rank
    unet.add_adapter(
        LoraConfig(
            r=config.lora_rank, lora_alpha=alpha, lora_dropout=config.lora_dropout, target_modules=sorted(targets),
            init_lora_weights=config.lora_init_type == "default" or config.lora_init_type, use_dora=config.use_dora,
        ),
        adapter_name=ADAPTER,
    )  # fmt: skip
    cast_training_params(unet, adapter_dtype(config))
    if config.use_dora:
        _measure_rows(unet)


def _measure_rows(unet: UNet2DConditionModel) -> None:
    """Compute DoRA's magnitudes of linear layers again, from adapters in their final dtype.

    peft computed them in the base's dtype, and divides by norms computed in the adapters' dtype: with bf16 magnitudes
    the output would change before the first step. For convolutions it computes both in the base's dtype.
    """
    for layer in unet.modules():
        if isinstance(layer, LoraLayer) and isinstance(layer.get_base_layer(), torch.nn.Linear):
            layer.lora_magnitude_vector[ADAPTER].update_layer(
                base_layer=layer.get_base_layer(),
                lora_A=layer.lora_A[ADAPTER].weight.detach(),
                lora_B=layer.lora_B[ADAPTER].weight.detach(),
                scaling=layer.scaling[ADAPTER],
            )


def load_adapters(unet: UNet2DConditionModel, file: Path) -> None:
    """Load a saved file, in any format, into existing adapters; the file must have exactly their tensors."""
    own = lora_state(unet)
    saved = load_file(file)
    names = our_names(saved, {name.split(".lora_")[0] for name in own}).tensors
    fill(own, {ours: saved[name] for name, ours in names.items()})


def fill(own: dict[str, torch.Tensor], saved: dict[str, torch.Tensor]) -> None:
    """Copy values into tensors by name; both must have exactly the same names."""
    assert saved.keys() == own.keys()  # the file was checked before the run
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def trainable(unet: UNet2DConditionModel) -> dict[str, torch.nn.Parameter]:
    """The adapters' parameters by name."""
    return {name: param for name, param in unet.named_parameters() if param.requires_grad}


def lora_state(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """The adapters' tensors under the names that diffusers' files use (without the `unet.` prefix)."""
    return dict(get_peft_model_state_dict(unet, adapter_name=ADAPTER))


def save_lora(unet: UNet2DConditionModel, stage: Stage, folder: Path, out: Path) -> None:
    """Write `pytorch_lora_weights.safetensors` with its metadata; the same bytes for the same weights."""
    # A loaded adapter starts in training mode: with its dropout in the file, every sample would be noisy.
    metadata = plain_settings({**unet.peft_config[ADAPTER].to_dict(), "lora_dropout": 0.0})
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in lora_state(unet).items()}
    out.mkdir(parents=True, exist_ok=True)
    with tensors_written(out / LORA_FILE, state):
        PIPELINES[stage].save_lora_weights(out, unet_lora_layers=state, unet_lora_adapter_metadata=metadata)
    _sort_header(out / LORA_FILE)


def remove_lora(unet: UNet2DConditionModel, folder: Path) -> None:
    """Restore the base model in `folder`."""
    unet.unload_lora()


def _sort_header(path: Path) -> None:
    """Rewrite a safetensors header with its keys sorted: the library writes its metadata in a random order."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors start at a multiple of 8
    write_bytes(path, len(header).to_bytes(8, "little") + header + data[8 + size :])


def reload_saved(unet: UNet2DConditionModel, stage: Stage, folder: Path, out: Path) -> float:
    """Load the saved file's adapters with the stock pipeline, in place of the trained ones; both must be equal.

    It uses this UNet itself, because a second one would need twice the memory. Every tensor and every scale must be
    equal. In fp32 the outputs for a fixed input are also compared, and their largest difference (0.0 unless the machine
    rounds differently) is returned. Raises ArtifactError on any difference.
    """
    dtype = next(p.dtype for p in unet.parameters() if not p.requires_grad)
    trained, scales = lora_state(unet), _scales(unet)
    change = output_change(unet, folder, dtype)
    unet.unload_lora()
    try:
        stock_pipeline(folder, stage, unet, load_scheduler(out)).load_lora_weights(out, adapter_name=ADAPTER)
    except OSError as error:  # diffusers makes one of every error in reading a file
        raise ArtifactError(f"{out / LORA_FILE} cannot be read: {error}") from None
    unet.eval()  # a loaded adapter starts in training mode
    loaded = lora_state(unet) if ADAPTER in getattr(unet, "peft_config", {}) else {}
    loaded = {name: tensor for name, tensor in loaded.items() if not tensor.is_meta}  # meta: not in the file
    if trained.keys() != loaded.keys():
        missing, extra = sorted(trained.keys() - loaded.keys()), sorted(loaded.keys() - trained.keys())
        raise ArtifactError(f"{out}: the stock pipeline dropped {missing[:3]} and added {extra[:3]}.")
    for name, tensor in trained.items():
        if not torch.equal(tensor.to(loaded[name].dtype), loaded[name]):
            raise ArtifactError(f"{out}: {name} has other values after reloading.")
    if scales != _scales(unet):
        raise ArtifactError(f"{out}: the adapters have other scales after reloading.")
    return small_change(change, f"{out}: the reloaded LoRA's output")


def _scales(unet: UNet2DConditionModel) -> dict[str, float]:
    layers = ((name, module) for name, module in unet.named_modules() if hasattr(module, "scaling"))
    return {name: float(module.scaling[ADAPTER]) for name, module in layers if ADAPTER in module.scaling}


def plain_settings(value: Any) -> Any:
    """peft's config with its sets as sorted lists and its enums as strings, so that it is JSON, always the same."""
    if isinstance(value, dict):
        return {str(key): plain_settings(item) for key, item in sorted(value.items())}
    if isinstance(value, (set, frozenset)):
        return sorted(plain_settings(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [plain_settings(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(getattr(value, "value", value))

"""The trainer's optimizers, and their state as tensors for safetensors and numbers for JSON.

torch, prodigyopt, schedulefree and bitsandbytes each keep the state that their papers ask for: tensors of any shape, some
numbers a parameter, some numbers for all. The three are stored as they are, so that a resumed run has the same bytes.
"""

from collections.abc import Iterable
from typing import Any

import torch

from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.training.adamw_bf16 import AdamWBF16


def make_optimizer(config: StageConfig, params: Iterable[torch.nn.Parameter], seed: int) -> torch.optim.Optimizer:
    """The optimizer of a stage, ready for its first step. `seed`: of the rounding of `adamw_bf16`."""
    common: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.adam_weight_decay}
    adam = {**common, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    if config.optimizer == "adamw_bf16":
        return AdamWBF16(params, seed, **adam)
    if config.optimizer == "adafactor":
        # Its steps are relative to the root mean square of a tensor. The second epsilon is the smallest one to reckon
        # with: at 1, which adapters do not reach, learning_rate is an absolute step, as in AdamW. With torch's 1e-3 an
        # adapter that starts at zero would take steps of a thousandth.
        return torch.optim.Adafactor(params, **common, eps=(None, 1.0))
    library = _from_library(config, params, adam)
    # Fused, which torch takes on no device by itself: one pass over each tensor in place of ten, as near to float64's.
    return torch.optim.AdamW(params, **adam, fused=True) if library is None else library


def _from_library(
    config: StageConfig, params: Iterable[torch.nn.Parameter], adam: dict[str, Any]
) -> torch.optim.Optimizer | None:
    made: torch.optim.Optimizer | None = None
    if config.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        made = AdamW8bit(params, **adam)
    elif config.optimizer == "prodigy":
        from prodigyopt import Prodigy

        # As its authors advise for diffusion models.
        made = Prodigy(params, **adam, use_bias_correction=True, safeguard_warmup=True)
    elif config.optimizer == "adamw_schedulefree":
        from schedulefree import AdamWScheduleFree

        averaging = AdamWScheduleFree(params, **adam)
        averaging.train()
        made = averaging
    return made


def take_average(optimizer: torch.optim.Optimizer) -> None:
    """Schedule-free AdamW puts the average that it keeps in place of the point that it trains at; others do nothing.

    Not for checkpoints: the way there and back rounds.
    """
    if hasattr(optimizer, "eval"):
        optimizer.eval()


def resume_training(optimizer: torch.optim.Optimizer) -> None:
    """After `take_average` in the middle of a run; the parameters must then be put back, because the way there rounds."""
    if hasattr(optimizer, "train"):
        optimizer.train()


def optimizer_state(
    optimizer: torch.optim.Optimizer, names: list[str]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's tensors under `<parameter>/<state>`, on the CPU, and its numbers: of the parameters, of the groups.

    `names` in the order of its parameters.
    """
    tensors, numbers = {}, {}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for name, param in zip(names, params, strict=True):
        for part, value in optimizer.state.get(param, {}).items():
            if isinstance(value, torch.Tensor):  # a copy: bitsandbytes shares one table among all parameters
                tensors[f"{name}/{part}"] = value.detach().to("cpu", copy=True).contiguous()
            else:
                numbers[f"{name}/{part}"] = value
    groups = [{key: value for key, value in group.items() if _is_number(value)} for group in optimizer.param_groups]
    return tensors, {"params": numbers, "groups": groups}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, torch.Tensor], numbers: dict[str, Any]
) -> None:
    """Inverse of `optimizer_state`."""
    places = {name: place for place, name in enumerate(names)}
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **numbers["params"]}.items():
        name, part = key.rsplit("/", 1)
        state.setdefault(places[name], {})[part] = value
    groups = optimizer.state_dict()["param_groups"]
    groups = [{**group, **saved} for group, saved in zip(groups, numbers["groups"], strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)

"""The trainer's optimizers, and their state as tensors for safetensors and numbers for JSON.

torch, prodigyopt, schedulefree and bitsandbytes each keep the state of their papers: tensors of any shape, some numbers
for each parameter, some numbers for all. All three are stored unchanged, so that a resumed run has the same bytes.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.errors import JobError
from deepfloyd_core.training.adamw_bf16 import AdamWBF16

Params = Iterable[torch.nn.Parameter]


def make_optimizer(config: StageConfig, params: Params, seed: int) -> torch.optim.Optimizer:
    """The optimizer of a stage, ready for its first step. `seed`: of the rounding of `adamw_bf16`."""
    optimizer = OPTIMIZERS[config.optimizer](config, params, seed)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float, peak: float) -> None:
    """Set each group's learning rate of a step. A group that began with another rate than `peak` keeps its multiple."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] / peak * rate


def _common(config: StageConfig) -> dict[str, Any]:
    return {"lr": config.learning_rate, "weight_decay": config.adam_weight_decay}


def _adam(config: StageConfig) -> dict[str, Any]:
    betas = (config.adam_beta1, config.adam_beta2)
    return {**_common(config), "betas": betas, "eps": config.adam_epsilon}


def _adamw(config: StageConfig, params: Params, seed: int) -> torch.optim.Optimizer:
    # Fused, which torch never chooses by itself: one pass over each tensor instead of ten, as close to float64.
    return torch.optim.AdamW(params, **_adam(config), fused=True)


def _adamw_bf16(config: StageConfig, params: Params, seed: int) -> torch.optim.Optimizer:
    return AdamWBF16(params, seed, **_adam(config))


def _adamw_8bit(config: StageConfig, params: Params, seed: int) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(params, **_adam(config))
    return optimizer


def _adafactor(config: StageConfig, params: Params, seed: int) -> torch.optim.Optimizer:
    # Its steps are relative to the root mean square of a tensor. The second epsilon is the lower bound of that: at
    # 1, which adapters do not reach, learning_rate is an absolute step, as in AdamW. With torch's 1e-3 an adapter that
    # starts at zero would take steps of a thousandth.
    return torch.optim.Adafactor(params, **_common(config), eps=(None, 1.0))


def _prodigy(config: StageConfig, params: Params, seed: int) -> torch.optim.Optimizer:
    from prodigyopt import Prodigy

    # As its authors advise for diffusion models.
    optimizer: torch.optim.Optimizer = Prodigy(params, **_adam(config), use_bias_correction=True, safeguard_warmup=True)
    return optimizer


def _adamw_schedulefree(config: StageConfig, params: Params, seed: int) -> torch.optim.Optimizer:
    from schedulefree import AdamWScheduleFree

    averaging = AdamWScheduleFree(params, **_adam(config))
    averaging.train()
    optimizer: torch.optim.Optimizer = averaging
    return optimizer


# By the value of `optimizer`. Each imports its library when it is called.
OPTIMIZERS: dict[str, Callable[[StageConfig, Params, int], torch.optim.Optimizer]] = {
    "adamw": _adamw, "adamw_bf16": _adamw_bf16, "adamw_8bit": _adamw_8bit, "adafactor": _adafactor, "prodigy": _prodigy,
    "adamw_schedulefree": _adamw_schedulefree,
}  # fmt: skip


def take_average(optimizer: torch.optim.Optimizer) -> None:
    """For schedule-free AdamW, replace the trained point by the average that the optimizer keeps; others do nothing.

    Not for checkpoints: switching there and back rounds.
    """
    if hasattr(optimizer, "eval"):
        optimizer.eval()


def resume_training(optimizer: torch.optim.Optimizer) -> None:
    """After `take_average` in the middle of a run. The parameters must then be restored from a copy, because the switch
    rounds.
    """
    if hasattr(optimizer, "train"):
        optimizer.train()


def check_savable(optimizer: torch.optim.Optimizer, name: str) -> None:
    """Raise JobError when an optimizer has state that a checkpoint would lose. Call it after a step, which creates the
    state.

    A checkpoint holds tensors and plain values of each parameter, and numbers of each group; other values of a group
    must not change. name: the value of `optimizer`.
    """
    params = {param for group in optimizer.param_groups for param in group["params"]}
    faults = [f"state {key!r} of no parameter" for key in optimizer.state if key not in params]
    for param in params:
        parts = optimizer.state.get(param, {}).items()
        faults += [
            _told(key, value) for key, value in parts if not (isinstance(value, torch.Tensor) or _is_plain(value))
        ]
    for group in optimizer.param_groups:
        parts = ((key, value) for key, value in group.items() if key != "params")
        faults += [_told(key, value) for key, value in parts if not _is_fixed(value)]
    if faults:
        raise JobError(
            f"optimizer is {name!r}, and a checkpoint cannot hold its {sorted(faults)[0]}: a stopped training could "
            "not resume. Use another optimizer."
        )


def _told(key: str, value: Any) -> str:
    return f"{key!r}, a {type(value).__name__}"


def optimizer_state(
    optimizer: torch.optim.Optimizer, named: Mapping[str, torch.nn.Parameter]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's tensors under `<parameter>/<state>`, on the CPU, and its numbers: of the parameters, of the groups.

    named: its parameters, in any order; an optimizer may put them into groups in another one.
    """
    tensors, numbers = {}, {}
    for name, param in named.items():
        for part, value in optimizer.state.get(param, {}).items():
            if isinstance(value, torch.Tensor):  # a copy: bitsandbytes shares one table among all parameters
                tensors[f"{name}/{part}"] = value.detach().to("cpu", copy=True).contiguous()
            else:
                numbers[f"{name}/{part}"] = value
    groups = [{key: value for key, value in group.items() if _is_number(value)} for group in optimizer.param_groups]
    return tensors, {"params": numbers, "groups": groups}


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, torch.nn.Parameter],
    tensors: dict[str, torch.Tensor],
    numbers: dict[str, Any],
) -> None:
    """Inverse of `optimizer_state`."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    numbered = {param: place for place, param in enumerate(params)}
    places = {name: numbered[param] for name, param in named.items()}
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **numbers["params"]}.items():
        name, part = key.rsplit("/", 1)
        state.setdefault(places[name], {})[part] = value
    groups = optimizer.state_dict()["param_groups"]
    groups = [{**group, **saved} for group, saved in zip(groups, numbers["groups"], strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, int | float | str)


def _is_fixed(value: Any) -> bool:
    """Whether a group's value is a number, or one that no optimizer changes."""
    return _is_plain(value) or (isinstance(value, tuple) and all(map(_is_plain, value)))

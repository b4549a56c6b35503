"""AdamW (Loshchilov and Hutter 2019) whose parameters and both moments are bf16: 6 bytes a parameter instead of 12.

bf16 has 8 bits of precision. With rounding to nearest, an update below 1/512 of a parameter is lost, and a second
moment never decays, because 0.999 times a number rounds back to that number. So every stored value is rounded
stochastically: the expected value is exact. The random bits are a pure function of (seed, step): a resumed run
continues with the same bytes.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from deepfloyd_core.hashing import hash_seed


class AdamWBF16(torch.optim.Optimizer):
    """AdamW over bf16 parameters. One step computes in fp32, tensor after tensor, and stores in bf16."""

    def __init__(
        self, params: Iterable[torch.nn.Parameter], seed: int, *, lr: float, betas: tuple[float, float], eps: float,
        weight_decay: float,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})
        self._seed = seed
        for param in (param for group in self.param_groups for param in group["params"]):
            if param.dtype is not torch.bfloat16:
                raise TypeError(f"AdamWBF16 was given a parameter of {param.dtype}; all must be torch.bfloat16")

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step for every parameter that has a gradient."""
        if closure is not None:
            raise NotImplementedError("AdamWBF16 takes no closure")
        for group in self.param_groups:
            group["step"] += 1
            device = group["params"][0].device
            generator = torch.Generator(device).manual_seed(hash_seed("rounding", self._seed, group["step"]))
            for param in group["params"]:
                if param.grad is not None:
                    self._step_one(param, param.grad.float(), group, generator)

    @torch.no_grad()
    def _step_one(
        self, param: torch.nn.Parameter, grad: torch.Tensor, group: dict[str, Any], generator: torch.Generator
    ) -> None:
        state = self.state[param]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        beta1, beta2 = group["betas"]
        first = state["exp_avg"].float().mul_(beta1).add_(grad, alpha=1 - beta1)
        second = state["exp_avg_sq"].float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        state["exp_avg"].copy_(round_at_random(first, generator))
        state["exp_avg_sq"].copy_(round_at_random(second, generator))
        scale = second.div_(1 - beta2 ** group["step"]).sqrt_().add_(group["eps"])
        new = param.float().mul_(1 - group["lr"] * group["weight_decay"])
        new.addcdiv_(first, scale, value=-group["lr"] / (1 - beta1 ** group["step"]))
        param.copy_(round_at_random(new, generator))


def round_at_random(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Stochastic rounding, fp32 -> bf16: to one of the two neighbours, so that the expected value is x itself.

    bf16 is the upper half of fp32. A uniform number of 16 bits is added to the lower half, which is then cut off: the
    carry into the upper half has the probability lower half / 2^16.
    """
    bits = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    bits += x.view(torch.int32)
    return bits.bitwise_and_(-1 << 16).view(torch.float32).bfloat16()

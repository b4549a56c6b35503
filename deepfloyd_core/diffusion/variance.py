"""The learned half of the UNet's output: the log variance of each reverse step, and its training loss.

Nichol and Dhariwal 2021: L_hybrid = L_simple + 0.001 L_vlb, where L_vlb is a sum over 1,000 timesteps. For one drawn
timestep this is the squared error plus the bound's term, both with weight 1. The mean is detached from the term's
gradient, so that the term trains the variance alone. It is in bits, averaged over pixels and colours.
"""

import math
from dataclasses import dataclass

import torch

_BIN = 1 / 255  # half of the distance between two neighbouring 8-bit levels in [-1, 1]
_LEAST = 1e-12  # smallest probability of a level; its log is finite


@dataclass(frozen=True)
class Steps:
    """The reverse steps of B samples; each tensor float32 (B, 1, 1, 1)."""

    log_min: torch.Tensor  # log of the posterior's variance, the least that a step can have
    log_max: torch.Tensor  # log beta_t, the most
    gain: torch.Tensor  # how far the mean of x_{t-1} moves for an error of 1 in epsilon
    last: torch.Tensor  # bool: t = 0, the step that makes the picture


def reverse_steps(betas: torch.Tensor, t: torch.Tensor) -> Steps:
    """The reverse steps at int64 t (B,) of a schedule of betas (T,), computed in float64 on the CPU.

    Ho et al. 2020, eq. 7 and 11. The posterior's variance at t = 0 is zero; the one at t = 1 is used for it.
    """
    beta = betas.double().cpu()
    bar = torch.cumprod(1 - beta, 0)
    posterior = beta[1:] * (1 - bar[:-1]) / (1 - bar[1:])
    log_min = torch.cat([posterior[:1], posterior]).log()
    gain = beta / ((1 - beta) * (1 - bar)).sqrt()

    def at(table: torch.Tensor) -> torch.Tensor:
        return table[t.cpu()].reshape(-1, 1, 1, 1).float().to(t.device)

    return Steps(at(log_min), at(beta.log()), at(gain), (t == 0).reshape(-1, 1, 1, 1))


def vlb_bits(
    eps: torch.Tensor, raw: torch.Tensor, noise: torch.Tensor, x_0: torch.Tensor, steps: Steps
) -> torch.Tensor:
    """The bound's term of each sample at its t, in bits: float32 (B,). Only `raw` gets a gradient.

    eps, raw: the two halves of the UNet's output; noise: the noise in x_t; all (B, C, H, W). t > 0: KL divergence
    between posterior and step (eq. 5 of Nichol and Dhariwal). t = 0: negative log-likelihood of the picture.
    """
    share = (raw.float() + 1) / 2
    log_var = share * steps.log_max + (1 - share) * steps.log_min  # eq. 15
    # Both means are linear in epsilon with the same factor, so their distance needs neither of them.
    off = steps.gain * (noise - eps.detach().float())
    divergence = 0.5 * (log_var - steps.log_min - 1 + (steps.log_min - log_var).exp() + off.square() * (-log_var).exp())
    surprise = -_log_likelihood(x_0, x_0 + off, log_var)
    return torch.where(steps.last, surprise, divergence).mean(dim=(1, 2, 3)) / math.log(2)


def _log_likelihood(x_0: torch.Tensor, mean: torch.Tensor, log_var: torch.Tensor) -> torch.Tensor:
    """Log of the probability that a Gaussian gives to each pixel's 8-bit level (Ho et al. 2020, eq. 13)."""
    scale = (-0.5 * log_var).exp()
    above, below = (x_0 - mean + _BIN) * scale, (x_0 - mean - _BIN) * scale
    inside = torch.special.ndtr(above) - torch.special.ndtr(below)
    # The darkest level takes in all that is darker, the lightest all that is lighter.
    probability = torch.where(x_0 < -0.999, torch.special.ndtr(above), inside)
    probability = torch.where(x_0 > 0.999, torch.special.ndtr(-below), probability)
    return probability.clamp(min=_LEAST).log()

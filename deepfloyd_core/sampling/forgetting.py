"""Forgetting: how much worse the tuned Stage I predicts the noise of pictures that its base drew.

The prompts are of the base's own world (`Flavour.probes`), not of the data. The base draws one picture of each, in few
steps; on these the loss of base and tuned is taken at fixed timesteps and noise. The base drew them, so it knows them: how
much worse the tuned model is, is what it has forgotten. All draws follow from the prompt, so versions are compared prompt
by prompt. The pictures are drawn anew for each version, as the base's samples are: 8 probes take 144 forward passes of one
picture, 4 s of a processor for the tiny Stage I, of the demo's 6 minutes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from deepfloyd_core.config.stages import STAGES
from deepfloyd_core.diffusion.loss import Text, predict, squared_error, to_bytes, to_model_range
from deepfloyd_core.files import atomic_path
from deepfloyd_core.hashing import hash_seed
from deepfloyd_core.models.unet import DTYPES
from deepfloyd_core.pictures.sheets import save_picture, titled_rows
from deepfloyd_core.sampling.jobs import PROBED, PROBES_FILE, Probes
from deepfloyd_core.sampling.sampler import Sampler, sample_from_text

PROBES_SHEET = "probes.png"
_COLUMNS = 8  # of the sheet


@dataclass(frozen=True)
class ProbeLoss:
    """The squared error in epsilon of a probe at a timestep: a row of probes.parquet."""

    prompt: str
    conditions: str
    way: str  # base or tuned
    t: int
    loss: float


@dataclass(frozen=True)
class DrawnProbes:
    """The base's pictures of the probes, and their texts."""

    probes: Probes
    pictures: torch.Tensor  # uint8 (N, H, W, C)
    text: torch.Tensor  # (N, T, D)

    @classmethod
    def of(cls, base: Sampler, probes: Probes, text: torch.Tensor) -> "DrawnProbes":
        """Let the base draw them, without guidance."""
        few = {
            "validation_num_inference_steps": PROBED["steps"], "validation_guidance": PROBED["guidance"],
            "validation_noise_scheduler": "ddpm",
        }  # fmt: skip
        quick = replace(base, config=base.config.model_copy(update=few))
        seeds = [hash_seed("probe", prompt) % 2**32 for prompt in probes.prompts]
        edge = STAGES[base.stage].size_px
        return cls(probes, to_bytes(sample_from_text(quick, text, text, seeds, (edge, edge))), text)

    def losses(self, sampler: Sampler, way: str) -> list[ProbeLoss]:
        """The losses of a model."""
        unet, bars, dtype = sampler.pipeline.unet, sampler.scheduler.alphas_cumprod, DTYPES[
            sampler.config.mixed_precision
        ]  # fmt: skip
        x_0, text, rows = to_model_range(self.pictures), Text(self.text).to(sampler.device, dtype), list[ProbeLoss]()
        for t in PROBED["t"]:
            noise = torch.stack([_noise(prompt, t, x_0.shape[1:]) for prompt in self.probes.prompts])
            x_t = (bars[t].sqrt() * x_0 + (1 - bars[t]).sqrt() * noise).to(sampler.device, dtype)
            with torch.inference_mode():
                eps, _ = predict(unet, x_t, torch.full((len(x_t),), t, device=sampler.device), text, None)
            found = squared_error(eps.cpu(), noise).tolist()
            rows += [
                ProbeLoss(prompt, self.probes.conditions, way, t, loss)
                for prompt, loss in zip(self.probes.prompts, found, strict=True)
            ]
        return rows


def write_probes(drawn: DrawnProbes, rows: Sequence[ProbeLoss], out: Path) -> dict[str, float]:
    """Write the table and the sheet of the probes. Returns their mean losses, as fields of `SamplesSummary`."""
    with atomic_path(out / PROBES_FILE) as tmp:
        pq.write_table(pa.Table.from_pylist([vars(row) for row in rows]), tmp)
    pictures = list(drawn.pictures.numpy())
    lines = [(f"base, {n + 1} to {n + len(part)}", part) for n, part in _parts(pictures)]
    save_picture(titled_rows(lines, 96, "what forgetting is measured on"), out / PROBES_SHEET)
    ways = {way: [row.loss for row in rows if row.way == way] for way in ("base", "tuned")}
    return {f"probe_loss_{way}": float(np.mean(losses)) for way, losses in ways.items()}


def _parts(pictures: list[np.ndarray]) -> list[tuple[int, list[np.ndarray]]]:
    return [(start, pictures[start : start + _COLUMNS]) for start in range(0, len(pictures), _COLUMNS)]


def _noise(prompt: str, t: int, shape: torch.Size) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(hash_seed("probe", prompt, t)))

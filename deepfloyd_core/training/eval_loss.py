"""The loss on a fixed grid of (picture, noise, t): always the same draws, so two models are compared pair by pair.

The grid has the held-out pictures, and a few training pictures. The extra gain on the training pictures measures
overfitting. The estimate of x_0 at each point also has a mean colour, whose distance from the picture's shows a cast
without any sampling.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from deepfloyd_core.config.stages import Stage
from deepfloyd_core.crops.eval_pictures import eval_pictures
from deepfloyd_core.diffusion.loss import estimate, squared_error, to_model_range
from deepfloyd_core.hashing import digest, hash_seed
from deepfloyd_core.measures.pixel import mean_and_interval
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.training.batches import Draws, MixedOrder, TrainingRows, draw
from deepfloyd_core.training.previews import SEEN_PICTURES
from deepfloyd_core.training.previews import TIMESTEPS as TIMESTEPS

HELD_OUT, SEEN = "held_out", "seen"


class Predict(Protocol):
    """A model's epsilon."""

    def __call__(
        self, x_0: torch.Tensor, draws: Draws, caption_ids: list[str], pair: torch.Tensor | None
    ) -> torch.Tensor:
        """x_0: float32 (B, C, H, W); pair: what to follow, uint8 (B, H, W, C). Returns float32 (B, C, H, W)."""
        ...


@dataclass(frozen=True)
class GridLoss:
    """The squared error in epsilon of a picture of the grid at a timestep."""

    part: str  # HELD_OUT or SEEN
    image_id: str
    t: int
    loss: float
    colour_shift: float = 0.0  # of the estimate of x_0, mean over red, green, blue, in levels of 255
    conditions: str = ""  # digest of all that decides it beside the model: crop, caption, pair, noise level


@dataclass(frozen=True)
class LossComparison:
    """How a trained model differs from another one on the same grid."""

    gain: tuple[float, ...]  # how much lower its held-out loss is, paired: mean and, of enough pictures, 95 % interval
    overfit_gap: float  # its extra gain on training pictures: memorisation
    by_t: dict[int, tuple[float, float]]  # held-out losses of the other and of this one at each timestep


@dataclass(frozen=True)
class GridPicture:
    """A picture of the grid."""

    part: str  # HELD_OUT or SEEN
    image_id: str
    caption_id: str
    pixels: torch.Tensor  # uint8 (1, H, W, C)
    pair: torch.Tensor | None = None  # the same: its pair, for a paired ControlNet

    def conditions(self, level: int) -> str:
        """Digest of all that decides its losses beside the model; level: of the low-res picture's noise. The draws follow
        from the picture and t.
        """
        pair = b"" if self.pair is None else self.pair.numpy().tobytes()
        return digest(self.pixels.numpy().tobytes(), str(tuple(self.pixels.shape)), self.caption_id, pair, level)


def grid_pictures(
    eval_set: Artifact, rows: TrainingRows, order: MixedOrder, stage: Stage, pairs: Artifact | None = None
) -> list[GridPicture]:
    """The held-out pictures of a stage, and the first crops that the run trains on; the same for the same data and seed.

    pairs: the pairs of the held-out pictures, for a paired ControlNet.
    """
    found = []
    for one in eval_pictures(eval_set, stage, pairs):
        pair = None if one.pair is None else torch.from_numpy(one.pair)[None]
        pixels = torch.from_numpy(one.pixels)[None]
        found.append(GridPicture(HELD_OUT, one.row.image_id, one.row.caption_id, pixels, pair))
    seen = []
    for number in range(SEEN_PICTURES):  # each batch has at least one
        batch = rows.take(*order.batch(number))
        for place, name in enumerate(rows.image_ids(batch)):
            own = slice(place, place + 1)
            pair = None if batch.pairs is None else batch.pairs[own]
            seen.append(GridPicture(SEEN, name, batch.caption_ids[place], batch.pixels[own], pair))
    return found + seen[:SEEN_PICTURES]


def grid_losses(
    pictures: list[GridPicture], predict: Predict, level: int, bars: torch.Tensor,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> list[GridLoss]:  # fmt: skip
    """The squared error in epsilon of every picture at each of TIMESTEPS, and the colour shift of its estimate of x_0.

    level: the noise level of Stage II's low-res picture, 0 to 999; bars: alpha_bar of each timestep, float32 (T,); told:
    called with the number of points that are done, and of all.
    """
    losses: list[GridLoss] = []
    for picture in pictures:
        x_0, conditions = to_model_range(picture.pixels), picture.conditions(level)
        for t in TIMESTEPS:
            drawn = draw(x_0.shape, hash_seed("eval", picture.image_id, t), 0, 0.0)
            draws = replace(drawn, t=torch.tensor([t]), level=torch.tensor([level]))
            with torch.inference_mode():
                eps = predict(x_0, draws, [picture.caption_id], picture.pair)
            eps = eps.float().cpu()
            loss, shift = float(squared_error(eps, draws.noise)), _colour_shift(x_0, draws.noise, eps, bars[t])
            losses.append(GridLoss(picture.part, picture.image_id, t, loss, shift, conditions))
            told(len(losses), len(pictures) * len(TIMESTEPS))
    return losses


def _colour_shift(x_0: torch.Tensor, noise: torch.Tensor, eps: torch.Tensor, bar: torch.Tensor) -> float:
    """How far the mean colour of the estimate of x_0 is off, in levels of 255. Pictures: float32 (1, C, H, W)."""
    x_t = bar.sqrt() * x_0 + (1 - bar).sqrt() * noise
    off = (estimate(x_t, eps, bar) - x_0).mean((2, 3)).abs().mean()
    return float(off) * 127.5


def mean_loss(losses: list[GridLoss], part: str = HELD_OUT) -> float | None:
    """The mean over a part of the grid; None where it has no picture."""
    found = [row.loss for row in losses if row.part == part]
    return float(np.mean(found)) if found else None


def compared(base: list[GridLoss], tuned: list[GridLoss]) -> LossComparison | None:
    """The second model's losses against the first's, paired picture by picture; None if no picture is held out."""
    gains: dict[str, dict[str, list[float]]] = {HELD_OUT: {}, SEEN: {}}
    for before, after in zip(base, tuned, strict=True):
        gains[before.part].setdefault(before.image_id, []).append(before.loss - after.loss)
    if not gains[HELD_OUT]:
        return None
    of_pictures = {part: [float(np.mean(values)) for values in found.values()] for part, found in gains.items()}
    gain = mean_and_interval(of_pictures[HELD_OUT])
    return LossComparison(
        tuple(gain),
        float(np.mean(of_pictures[SEEN])) - gain[0],
        {t: (_mean_at(base, t), _mean_at(tuned, t)) for t in TIMESTEPS},
    )


def _mean_at(losses: list[GridLoss], t: int) -> float:
    return float(np.mean([row.loss for row in losses if row.t == t and row.part == HELD_OUT]))

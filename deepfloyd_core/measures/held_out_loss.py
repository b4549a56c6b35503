"""The held-out loss: a training's loss on pictures that it was not trained on, for terminal, log and UI alike."""

from dataclasses import dataclass
from typing import Literal

from deepfloyd_core.measures.figures import signed, signed_ends
from deepfloyd_core.store.manifest import Summary


@dataclass(frozen=True)
class LossChange:
    """Mean held-out losses: of the base model or of the weights that the training started from; and of the trained model."""

    since: Literal["base", "parent"]
    before: float
    after: float
    gain: tuple[float, ...]  # mean fall, and its 95 % interval where enough pictures are held out

    @property
    def words(self) -> str:
        """Both losses."""
        return f"{self.before:.4f} -> {self.after:.4f}"

    @property
    def change(self) -> str:
        """How much the loss changed; a fall is negative."""
        mean, *interval = (-value for value in self.gain)
        ends = f" ({signed_ends(reversed(interval), 4)}, 95 %)" if interval else ""
        return f"{signed(mean, 4)}{ends}"


class HeldOutLosses(Summary):
    """The mean losses of a training on the held-out pictures; None where none is held out."""

    eval_loss_base: float | None = None
    eval_loss: float | None = None  # of the trained model
    eval_gain: tuple[float, ...] | None = None  # mean fall since the base, and its 95 % interval
    eval_overfit_gap: float | None = None  # how much more it fell on pictures that were trained on
    eval_loss_parent: float | None = None  # of the weights that the training started from
    eval_gain_on_parent: tuple[float, ...] | None = None

    @property
    def changes(self) -> list[LossChange]:
        """Against the base first; none where no picture was held out."""
        since: tuple[tuple[Literal["base", "parent"], float | None, tuple[float, ...] | None], ...] = (
            ("base", self.eval_loss_base, self.eval_gain),
            ("parent", self.eval_loss_parent, self.eval_gain_on_parent),
        )
        after = self.eval_loss
        return [
            LossChange(name, before, after, gain)
            for name, before, gain in since
            if before is not None and after is not None and gain is not None
        ]

"""The loss of a training on pictures that it was not trained on: the same figures for the terminal, the log and the UI."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class LossChange:
    """The mean held-out loss of the base model, or of the parent that the training started from, and of the trained one."""

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
        ends = " ({:+.4f} to {:+.4f}, 95 %)".format(*reversed(interval)) if interval else ""
        return f"{mean:+.4f}{ends}"


def loss_changes(summary: dict[str, Any]) -> list[LossChange]:
    """Of a LoRA's summary, against the base first; none where no picture was held out."""
    changes = []
    if "eval_loss_base" in summary:
        gain = tuple(summary["eval_gain"])
        changes.append(LossChange("base", summary["eval_loss_base"], summary["eval_loss"], gain))
    if "eval_loss_parent" in summary:
        gain = tuple(summary["eval_gain_on_parent"])
        changes.append(LossChange("parent", summary["eval_loss_parent"], summary["eval_loss"], gain))
    return changes


def losses_by_timestep(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a LoRA's summary a row for each timestep that held-out pictures were measured at: t, base, tuned."""
    return [{"t": t, "base": base, "tuned": tuned} for t, (base, tuned) in summary.get("eval_by_t", {}).items()]

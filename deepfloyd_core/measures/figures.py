"""The figures of Stage II that are stored and shown: means of the measures, and what the tuned model gains. No torch."""

from collections.abc import Mapping

from deepfloyd_core.store.manifest import Summary


class LevelFigures(Summary):
    """Of the pictures made at one noise level; by method (base, tuned, bicubic ...), and in each by the measure's name."""

    upscaled: Mapping[str, Mapping[str, float | None]]  # means; None: too few pictures for the measure
    gain: Mapping[str, Mapping[str, tuple[float, ...]]]  # of tuned on the others: mean, and its 95 % interval


class UpscalingFigures(LevelFigures):
    """Of one kind of low-res pictures; its own are those of the noise level of most interest."""

    noise_level: int  # 0 to 999
    other_levels: Mapping[int, LevelFigures] = {}

    @property
    def by_level(self) -> dict[int, LevelFigures]:
        """The figures of each noise level, that of most interest first."""
        return {self.noise_level: self, **self.other_levels}

"""The figures of Stage II that are stored and shown: means of the measures, and the tuned model's gains. No torch."""

from collections.abc import Mapping

from deepfloyd_core.store.manifest import Summary


class LevelFigures(Summary):
    """The figures at one noise level, by method (base, tuned, bicubic ...), then by the measure's name."""

    upscaled: Mapping[str, Mapping[str, float | None]]  # means; None: too few pictures for the measure
    gain: Mapping[str, Mapping[str, tuple[float, ...]]]  # of tuned on the others: mean, and its 95 % interval


class UpscalingFigures(LevelFigures):
    """The figures of one kind of low-res pictures; its own fields are those of the main noise level."""

    noise_level: int  # 0 to 999
    other_levels: Mapping[int, LevelFigures] = {}

    @property
    def by_level(self) -> dict[int, LevelFigures]:
        """The figures of each noise level, the main one first."""
        return {self.noise_level: self, **self.other_levels}

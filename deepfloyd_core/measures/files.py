"""Names of the files of an upscaler's figures; in a module of their own, because their readers load no torch."""

from dataclasses import dataclass
from pathlib import Path

from deepfloyd_core.config.stages import STAGES, UPSCALERS, Stage, StageKind


@dataclass(frozen=True)
class UpscalingFiles:
    """The table and the sheets of an upscaler's figures. Names of a second upscaler begin with its table, so that both
    fit into one folder.
    """

    stage: Stage
    folder: Path = Path()

    @property
    def kind(self) -> StageKind:
        """The upscaler's record."""
        return STAGES[self.stage]

    @property
    def table(self) -> Path:
        """A row for each picture, method and noise level."""
        return self._file("eval.parquet")

    @property
    def sheet(self) -> Path:
        """Held-out pictures."""
        return self._file("eval.png")

    @property
    def details(self) -> Path:
        """Zoomed details of these."""
        return self._file("eval_details.png")

    @property
    def spoilt(self) -> tuple[Path, Path]:
        """Both sheets, with degraded low-res pictures."""
        return self._file("eval_spoilt.png"), self._file("eval_spoilt_details.png")

    def _file(self, name: str) -> Path:
        return self.folder / (name if self.stage == UPSCALERS[0] else f"{self.kind.table}_{name}")

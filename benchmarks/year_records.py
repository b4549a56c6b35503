"""What lies in the workspace of the year, read without the product's own conclusions."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from deepfloyd_core.bundle.picture_figures import picture_losses
from deepfloyd_core.config.stages import STAGES

NEGLIGIBLE = 1e-4  # of the mean loss: a stage that gains less has learnt nothing that could be lost
TOLERANCE = 0.1  # `gate_tolerance`


@dataclass(frozen=True)
class State:
    """The versions."""

    numbers: frozenset[int]
    promoted: tuple[int, ...]  # ever, in the order in which they began to serve
    blocked: frozenset[int]
    champion: int | None


@dataclass(frozen=True)
class Kept:
    """What a workspace keeps."""

    versions: tuple[int, ...] = ()
    bytes: int = 0
    needed_bytes: int = 0  # of what the kept versions were made from

    @property
    def extra_bytes(self) -> int:
        """Of what no kept version was made from."""
        return self.bytes - self.needed_bytes

    @property
    def words(self) -> str:
        """For the table."""
        needed, extra = self.needed_bytes / 1e6, self.extra_bytes / 1e6
        return f"{len(self.versions)} versions: {needed:.0f} MB they were made from, {extra:.0f} MB beside"


@dataclass(frozen=True)
class Records:
    """The records of a workspace."""

    workspace: Path

    def state(self) -> State:
        """By the records of versions and of what happened to them, the last promoted one that is not blocked serves."""
        versions = self.workspace / "versions"
        numbers = frozenset(int(file.stem) for file in versions.glob("[0-9]*.json"))
        pushed, blocked = list[int](), set[int]()
        for file in sorted((versions / "events").glob("[0-9]*.json")):
            event = json.loads(file.read_text())
            if event["kind"] == "promoted":
                pushed.append(event["version"])
                blocked.discard(event["version"])
            elif event["kind"] == "blocked":
                blocked.add(event["version"])
        serving = [number for number in pushed if number not in blocked]
        return State(numbers, tuple(pushed), frozenset(blocked), serving[-1] if serving else None)

    def bundle(self, number: int) -> Path:
        """Where the bundle of a version is, or was."""
        return self.workspace / "lora_bundle" / str(json.loads(self._record(number).read_text())["bundle"])

    def kept_versions(self) -> list[int]:
        """The versions whose bundles are there."""
        return [number for number in sorted(self.state().numbers) if (self.bundle(number) / "manifest.json").exists()]

    def last(self, count: int) -> set[int]:
        """The last versions, and the last of those that serve or would after rollbacks: what `gc` keeps of them."""
        state = self.state()
        serving = [number for number in state.promoted if number not in state.blocked]
        return {*sorted(state.numbers)[-count:], *list(dict.fromkeys(reversed(serving)))[:count]}

    def kept(self) -> Kept:
        """What is there."""
        needed, kept = set[str](), self.kept_versions()
        for number in kept:
            lineage = json.loads(self._record(number).read_text())["lineage"]
            needed |= {*lineage, *(name for names in lineage.values() for name in names)}
        texts = [str(path.relative_to(self.workspace)) for path in self.workspace.glob("stage*_text/*")]
        return Kept(
            tuple(kept), _bytes_below([self.workspace]), _bytes_below(self.workspace / one for one in {*needed, *texts})
        )

    def _record(self, number: int) -> Path:
        return self.workspace / "versions" / f"{number:04d}.json"


def _bytes_below(folders: Iterable[Path]) -> int:
    """What all files take; a file with several names counts once."""
    sizes = {}
    for folder in folders:
        for at, _, names in os.walk(folder):
            for name in names:
                found = (Path(at) / name).lstat()
                sizes[found.st_ino] = found.st_size
    return sum(sizes.values())


@dataclass(frozen=True)
class Loss:
    """How much more held-out loss one version has than another, on the pictures that both have, of its worst stage."""

    share: float = 0.0  # of the other's gain over the base; negative: less loss
    sure: bool = False  # SciPy's paired 95 % t interval lies above 0

    @property
    def is_harm(self) -> bool:
        """Whether it is sure, and more than the gate tolerates."""
        return self.sure and self.share > TOLERANCE


def loss_against(records: Records, other: int, number: int) -> Loss:
    """The loss of a version against another's."""
    worst = Loss(-np.inf)
    for stage in STAGES:
        if not all((records.bundle(one) / f"stage{stage}").is_dir() for one in (other, number)):
            continue
        before, after = (picture_losses(records.bundle(one), stage) for one in (other, number))
        common = sorted(before.tuned.keys() & after.tuned.keys())
        change = np.array([after.tuned[key] - before.tuned[key] for key in common])
        gain = np.mean([before.base[key] - before.tuned[key] for key in common]) if common else 0.0
        if len(change) > 1 and gain > NEGLIGIBLE * np.mean([before.base[key] for key in common]):
            low = stats.ttest_1samp(change, 0).confidence_interval(0.95).low
            worst = max(
                worst, Loss(float(change.mean() / gain), bool(low > 0)), key=lambda one: (one.is_harm, one.share)
            )
    return worst

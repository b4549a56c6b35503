"""The main figures of a version, and by how much they differ from the base's and the champion's on the same pictures.

No torch. PSNR comes first: it is what people know. A figure whose pictures are lost keeps the change that its summary has.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deepfloyd_core.bundle.gate_rules import PROBE_LOSS
from deepfloyd_core.bundle.identity import BundleSummary
from deepfloyd_core.bundle.picture_figures import (
    PictureFigures,
    PictureName,
    picture_losses,
    picture_measures,
    probe_losses,
)
from deepfloyd_core.config.stages import STAGES, UPSCALERS, Stage
from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.measures.figures import signed, signed_ends
from deepfloyd_core.measures.measure import Measure
from deepfloyd_core.measures.paired import Bounds, paired_gain
from deepfloyd_core.measures.registry import measures_against
from deepfloyd_core.store.counts import many
from deepfloyd_core.store.lookup import known_artifact
from deepfloyd_core.store.manifest import Manifest
from deepfloyd_core.store.versions import Version

Figures = Mapping[PictureName, float]
Judged = Literal["better", "worse", "no clear difference", "too few pictures to tell"]
_ANY = Bounds(0.0, 0.0)  # the gate alone has bounds
_NO_FIGURES = PictureFigures({}, {})


@dataclass(frozen=True)
class _Scale:
    unit: str
    less: bool  # less is better


_LOSS = _Scale("", less=True)


@dataclass(frozen=True)
class Change:
    """The difference of a figure on the same pictures, in the figure's unit."""

    difference: float
    interval: tuple[float, float] | None  # 95 %; None: too few pictures
    verdict: Judged
    pictures: int | None  # None: not recorded

    def words(self, decimals: int, unit: str = "") -> str:
        """`+0.20 dB (+0.05 to +0.35, 95 %, 12 pictures)`."""
        of = [] if self.pictures is None else [many(self.pictures, "picture")]
        if self.interval is None:
            of = of or ["no interval"]
        else:
            of = [signed_ends(self.interval, decimals), "95 %", *of]
        return f"{signed(self.difference, decimals)}{f' {unit}' if unit else ''} ({', '.join(of)})"

    def short(self, decimals: int) -> str:
        """`+0.20 (+0.05 to +0.35)`."""
        interval = signed_ends(self.interval or (), decimals)
        return signed(self.difference, decimals) + (f" ({interval})" if interval else "")


@dataclass(frozen=True)
class MainFigure:
    """A mean over held-out pictures. None: it was not measured."""

    name: str
    unit: str
    less: bool  # less is better
    base: float | None
    value: float | None
    champion: float | None
    since_base: Change | None
    since_champion: Change | None
    is_main: bool = True  # also told where there is little room

    @property
    def decimals(self) -> int:
        """Of a difference."""
        return decimals_of(self.unit)

    @property
    def better(self) -> str:
        """Which direction is better, in words."""
        return "less is better" if self.less else "more is better"


@dataclass(frozen=True)
class Measurements:
    """The means of a version, and the folder of its bundle, which has the figures of each picture."""

    summary: BundleSummary
    bundle: Path


def measurements_of(workspace: Path, version: Version) -> Measurements | None:
    """The figures in the record of a version's bundle, also of a collected one. None: that is lost, or of another version
    of the program.
    """
    name = f"lora_bundle/{version.bundle}"
    with suppress(ArtifactError, OSError):
        known = known_artifact(workspace, name)
        if isinstance(known.record, Manifest):
            return Measurements(BundleSummary.of_record(known.record.summary, name), known.path)
    return None


def three(value: float | None) -> str:
    """A number with three digits; a dash for a missing one."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:#.3g}".removesuffix(".")


def decimals_of(unit: str) -> int:
    """How many decimals of a difference a person can use."""
    return 2 if unit in ("dB", "levels of 255") else 4


def main_figures(one: Measurements, champion: Measurements | None) -> tuple[MainFigure, ...]:
    """Each figure that the version or the champion has: measures of the upscaler, then the losses of the stages, and what
    was forgotten.
    """
    return (*_upscaling(one, champion), *_losses(one, champion), *_forgetting(one, champion))


def _upscaling(one: Measurements, champion: Measurements | None) -> Iterator[MainFigure]:
    held_out = one.summary.samples.held_out
    known = champion.summary.samples.held_out if champion else None
    if held_out is None or not one.summary.tables:
        return
    name = STAGES[UPSCALERS[0]].title
    for measure in (each for each in measures_against("truth") if each.better and each.of == "picture"):
        base, value = (held_out.upscaled.get(way, {}).get(measure.name) for way in ("base", "tuned"))
        before = known.upscaled.get("tuned", {}).get(measure.name) if known else None
        if value is None:
            continue
        level, scale = held_out.noise_level, _Scale(measure.unit, measure.better == "less")
        own = _measured(one, measure, level)
        since_base = _paired(own.base, own.tuned, scale) or _recorded(
            held_out.gain.get("base", {}).get(measure.name), scale
        )
        since_champion = _paired(_measured(champion, measure, level).tuned, own.tuned, scale) if champion else None
        yield MainFigure(
            f"{name}: {measure.words}",
            measure.unit,
            scale.less,
            base,
            value,
            before,
            since_base,
            since_champion,
            measure.gains,
        )


def _losses(one: Measurements, champion: Measurements | None) -> Iterator[MainFigure]:
    for stage, training in one.summary.trainings.items():
        if training.eval_loss is None:
            continue
        own, before = _picture_losses(one, stage), champion.summary.trainings.get(stage) if champion else None
        since_base = _paired(own.base, own.tuned, _LOSS) or _recorded(training.eval_gain, _LOSS)
        since_champion = _paired(_picture_losses(champion, stage).tuned, own.tuned, _LOSS) if champion else None
        known = before.eval_loss if before else None
        yield MainFigure(
            f"{STAGES[stage].title}: held-out loss", "", True, training.eval_loss_base, training.eval_loss, known,
            since_base, since_champion,
        )  # fmt: skip


def _forgetting(one: Measurements, champion: Measurements | None) -> Iterator[MainFigure]:
    means = [each.summary.samples if each else None for each in (one, champion)]
    if means[0] is None or means[0].probe_loss_tuned is None:
        return
    own, before = (_probes(each) for each in (one, champion))
    known = means[1].probe_loss_tuned if means[1] else None
    first = next(stage for stage in one.summary.trainings if stage not in UPSCALERS)
    yield MainFigure(
        f"{STAGES[first].title}: {PROBE_LOSS}", "", True, means[0].probe_loss_base, means[0].probe_loss_tuned,
        known, _paired(own.base, own.tuned, _LOSS), _paired(before.since_base, own.since_base, _LOSS), is_main=False,
    )  # fmt: skip


def _probes(one: Measurements | None) -> PictureFigures:
    if one is None or one.summary.samples.probe_loss_tuned is None:
        return _NO_FIGURES
    try:
        return probe_losses(one.bundle)
    except ArtifactError:
        return _NO_FIGURES


def _measured(one: Measurements, measure: Measure, level: int) -> PictureFigures:
    """Those of each picture; none if their file is lost."""
    try:
        return picture_measures(one.bundle, UPSCALERS[0], measure.name, level)
    except ArtifactError:
        return _NO_FIGURES


def _picture_losses(one: Measurements, stage: Stage) -> PictureFigures:
    try:
        return picture_losses(one.bundle, stage)
    except ArtifactError:
        return _NO_FIGURES


def _paired(before: Figures, after: Figures, scale: _Scale) -> Change | None:
    """Over the pictures that both have; None: there is none."""
    gain = paired_gain(before, after, "less" if scale.less else "more", _ANY)
    return _change(gain.mean, gain.interval, scale, gain.pictures) if gain else None


def _recorded(gain: Sequence[float] | None, scale: _Scale) -> Change | None:
    """The change in a summary, whose gains are positive where the figure is better."""
    if not gain:
        return None
    mean, *ends = gain
    return _change(mean, (ends[0], ends[1]) if ends else None, scale, None)


def _change(
    gain: float, interval: tuple[float, float] | None, scale: _Scale, pictures: int | None
) -> Change | None:  # fmt: skip
    """None: a figure is not finite. What rounds to no difference is none, however sure it is."""
    if not math.isfinite(gain):
        return None
    verdict: Judged = "no clear difference" if interval else "too few pictures to tell"
    if interval and round(gain, decimals_of(scale.unit)):
        verdict = "better" if interval[0] > 0 else "worse" if interval[1] < 0 else verdict
    sign = -1 if scale.less else 1
    ends = sorted(sign * end for end in interval) if interval else None
    return Change(sign * gain, (ends[0], ends[1]) if ends else None, verdict, pictures)

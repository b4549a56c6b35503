"""The rules of the gate: each judges a candidate by stored figures. A new rule is a function and its row of GATE_RULES.

They fail closed: a figure that is missing or not finite, or that cannot be compared, does not pass. A rule that has
nothing to judge (a stage that was not trained; no champion) gives no verdict.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from deepfloyd_core.bundle.identity import BundleSummary
from deepfloyd_core.bundle.picture_figures import PictureFigures, PictureName
from deepfloyd_core.config.stages import STAGES, UPSCALERS, Stage
from deepfloyd_core.index.ledger import rejected_and_inputs
from deepfloyd_core.index.summary import IndexSummary
from deepfloyd_core.measures.figures import signed
from deepfloyd_core.measures.paired import Bounds, PairedGain, paired_gain
from deepfloyd_core.measures.registry import measures_against
from deepfloyd_core.models.identity import ROUNDING
from deepfloyd_core.store.counts import many
from deepfloyd_core.store.verdicts import Verdict

# Of a mean loss; and of measures in dB: a quarter of one is hardly seen.
_LOSS_MARGIN, _LOSS_NEGLIGIBLE = 0.02, 1e-4
_DB = Bounds(margin=0.25, negligible=0.01)
# Of colours, in levels of 255. A shift by 2 is a CIELAB distance of 2.0 (median over colours; 3.1 for one in ten), and 2.3
# is just noticed (Mahy et al. 1994). What is not seen is no harm, however sure it is, with many pictures or few.
_LEVELS = Bounds(margin=2.0, negligible=2.0)
_UPSCALING = {"psnr": _DB, "consistency": _DB}
_COLOURS = {"colour_shift": _LEVELS, "colour_spread": _LEVELS}
COMPARED: Mapping[str, Bounds] = {**_UPSCALING, **_COLOURS}  # measures of an upscaler, and how much worse counts
# Of forgetting, in the loss on the base's own pictures, as a share of the noise's variance. The demo, which forgets much, is
# worse by 0.03, with another seed by 0.04; a training that diverged by 1.0.
_FORGOTTEN, FORGOTTEN_MORE = Bounds(0.1, 0.1), Bounds(0.02, 0.02)  # since the base, and since the champion
PROBE_LOSS = "loss on the base's own pictures"
# Rejected pictures: how much larger their share may be than the champion's, and the z of a difference beyond chance.
_JUMP, _Z = 0.02, 1.96
_MOST_DIGITS = 8  # of a blocked figure and its limit


@dataclass(frozen=True)
class Measured:
    """The figures of a version."""

    number: int
    summary: BundleSummary
    index: IndexSummary
    losses: Mapping[Stage, PictureFigures]  # held-out losses of each trained stage
    colours: Mapping[Stage, PictureFigures]  # colour shifts of the estimates of each that makes pictures from text
    upscaled: Mapping[str, PictureFigures]  # COMPARED of the upscaler; empty: it has none, or no held-out picture
    probes: PictureFigures | None  # of forgetting; None: not measured


@dataclass(frozen=True)
class GateContext:
    """Everything that the gate judges by."""

    candidate: Measured
    champion: Measured | None
    formers: tuple[Measured, ...]  # would serve one after the other if the champion were rolled back
    max_rejected_share: float
    tolerance: float  # of what a version has gained over the base, the share that a candidate may lose


Rule = Callable[[GateContext], Iterator[Verdict]]


def finite_figures(context: GateContext) -> Iterator[Verdict]:
    """Every figure that was to be measured is there, and finite. Without held-out pictures nothing is measured: that
    passes only where there is no champion that could be better.
    """
    one, rule = context.candidate, "figures"
    if not one.summary.trainings:
        yield Verdict(rule=rule, about="", passed=False, reason="it has no figures of any stage")
    for stage, training in one.summary.trainings.items():
        about, pictures = STAGES[stage].title, one.losses[stage]
        if training.eval_loss is None and not pictures.tuned and not pictures.base:
            against = f", so it cannot be compared with version {context.champion.number}" if context.champion else ""
            reason = f"{about}: no picture is held out{against}"
            yield Verdict(rule=rule, about=about, passed=context.champion is None, reason=reason)
            continue
        figures = [training.last_loss, training.eval_loss, training.eval_loss_base, *(training.eval_gain or (None,))]
        fault = next(_faults(figures, pictures, "held-out loss"), None)
        if stage in one.colours:
            fault = fault or next(_faults([], one.colours[stage], "colour shift"), None)
        yield Verdict(rule=rule, about=about, passed=fault is None, reason=f"{about}'s {fault or 'figures are finite'}")
        if stage in UPSCALERS:
            yield _finite_measures(one, about)


def reloaded(context: GateContext) -> Iterator[Verdict]:
    """A stock pipeline that loads the weights gives the outputs of the training, up to rounding."""
    rule, name = "reloaded weights", "reload difference"
    for stage, training in context.candidate.summary.trainings.items():
        about, difference = STAGES[stage].title, training.reload_difference
        if difference is None or not math.isfinite(difference):
            fault = "missing" if difference is None else "not finite"
            yield Verdict(rule=rule, about=about, passed=False, reason=f"{about}'s {name} is {fault}")
            continue
        reason = f"{about}'s {name} is {difference:.2g}, and at most {ROUNDING:g} is rounding"
        passed = 0 <= difference <= ROUNDING
        yield Verdict(rule=rule, about=about, passed=passed, reason=reason, figure=difference, limit=ROUNDING)


def worse_loss(context: GateContext) -> Iterator[Verdict]:
    """No stage has a worse held-out loss than the champion's; nor than the best former one's, so that many losses that
    are tolerated do not add up.
    """
    if context.champion is None:
        return
    rule, number = "champion's loss", context.champion.number
    lacking = [STAGES[stage].title for stage in context.champion.losses if stage not in context.candidate.losses]
    if lacking:
        reason = f"version {number} has {' and '.join(lacking)}, which it lacks"
        yield Verdict(rule=rule, about="", passed=False, reason=reason)
    for stage, figures in context.candidate.losses.items():
        if before := context.champion.losses.get(stage):
            known = {one.number: one.losses[stage] for one in context.formers if stage in one.losses}
            for of, one in _with_best(number, before, known, figures.tuned, "less"):
                bounds = loss_bounds(one, figures.tuned, context.tolerance)
                gain = paired_gain(one.tuned, figures.tuned, "less", bounds)
                yield _compared(rule, STAGES[stage].title, "held-out loss", gain, f"against version {of}", True, 4)


def worse_upscaling(context: GateContext) -> Iterator[Verdict]:
    """The upscaler is no worse than the champion's in PSNR to the truth, nor in consistency with the low-res picture; nor
    than the best former one's.
    """
    if context.champion is None or not context.champion.upscaled:
        return
    rule, number = "champion's upscaling", context.champion.number
    for measure, bounds in _UPSCALING.items():
        after = context.candidate.upscaled.get(measure)
        known = {one.number: one.upscaled[measure] for one in context.formers if measure in one.upscaled}
        before = context.champion.upscaled[measure]
        for of, one in _with_best(number, before, known, after.tuned if after else {}, "more"):
            lost = -context.tolerance * _mean_rise(one.tuned, one.base, after.tuned if after else {})
            at_least = replace(bounds, negligible=max(bounds.negligible, lost), margin=max(bounds.margin, lost))
            gain = paired_gain(one.tuned, after.tuned, "more", at_least) if after else None
            yield _compared(rule, STAGES[UPSCALERS[0]].title, f"{_label(measure)} in dB", gain, f"against version {of}")


def harm(context: GateContext) -> Iterator[Verdict]:
    """The training did not make the held-out loss worse than the base's."""
    for stage, figures in context.candidate.losses.items():
        if figures.tuned:
            bounds = loss_bounds(replace(figures, tuned=figures.base), figures.tuned)
            gain = paired_gain(figures.base, figures.tuned, "less", bounds)
            yield _compared("base's loss", STAGES[stage].title, "held-out loss", gain, "against the base", True, 4)


def colour_drift(context: GateContext) -> Iterator[Verdict]:
    """No stage's colours are visibly further from the held-out pictures' than the champion's are; nor than the base's,
    so that many small steps do not add up.
    """
    for (about, name), figures in _colours(context.candidate).items():
        against = [("against the base", figures.base)]
        if context.champion and (before := _colours(context.champion).get((about, name))):
            against = [(f"against version {context.champion.number}", before.tuned), *against]
        for words, known in against if figures.tuned else ():
            gain = paired_gain(known, figures.tuned, "less", _LEVELS)
            yield _compared("colour drift", about, f"{name} in levels of 255", gain, words, less=True)


def forgetting(context: GateContext) -> Iterator[Verdict]:
    """The tuned Stage I still knows the pictures that its base drew for prompts of its own, about as well as the
    champion does.
    """
    rule, one, champion = "forgetting", context.candidate, context.champion
    for about in (STAGES[stage].title for stage in one.summary.trainings if stage not in UPSCALERS):
        if one.probes is None:
            reason = f"{about}'s forgetting was not measured"
            if champion and champion.probes:
                reason += f", and that of version {champion.number} was: set forgetting_probes as it was then"
            yield Verdict(rule=rule, about=about, passed=not (champion and champion.probes), reason=reason)
            continue
        if fault := next(_faults([], one.probes, "forgetting"), None):
            yield Verdict(rule=rule, about=about, passed=False, reason=f"{about}'s {fault}")
            continue
        if champion and champion.probes:
            more = paired_gain(champion.probes.since_base, one.probes.since_base, "less", FORGOTTEN_MORE)
            yield _compared(rule, about, PROBE_LOSS, more, f"against version {champion.number}", True, 4)
        since = paired_gain(one.probes.base, one.probes.tuned, "less", _FORGOTTEN)
        yield _compared(rule, about, PROBE_LOSS, since, "against the base", True, 4)


def rejected_pictures(context: GateContext) -> Iterator[Verdict]:
    """Not too many pictures were rejected: no larger share than the run allows, nor, beyond chance, than the champion's
    and _JUMP.
    """
    rule, limit = "rejected pictures", context.max_rejected_share
    rejected, inputs = rejected_and_inputs(context.candidate.index)
    share = rejected / max(1, inputs)
    told = f"{share:.1%} of {many(inputs, 'picture')} are rejected"
    if share > limit:
        reason = f"{told}, and max_rejected_share is {limit:.1%}"
        yield Verdict(rule=rule, about="", passed=False, reason=reason, figure=share, limit=limit)
        return
    if context.champion is not None:
        of_before, all_before = rejected_and_inputs(context.champion.index)
        before, both = of_before / max(1, all_before), (rejected + of_before) / max(1, inputs + all_before)
        chance = _Z * math.sqrt(both * (1 - both) * (1 / max(1, inputs) + 1 / max(1, all_before)))
        limit, told = (
            min(limit, before + max(_JUMP, chance)),
            f"{told}, {before:.1%} in version {context.champion.number}",
        )
    yield Verdict(rule=rule, about="", passed=share <= limit, reason=told, figure=share, limit=limit)


GATE_RULES: Mapping[str, Rule] = {
    "figures": finite_figures,
    "champion's loss": worse_loss,
    "champion's upscaling": worse_upscaling,
    "base's loss": harm,
    "colour drift": colour_drift,
    "forgetting": forgetting,
    "reloaded weights": reloaded,
    "rejected pictures": rejected_pictures,
}


def _colours(one: Measured) -> dict[tuple[str, str], PictureFigures]:
    """The colour figures of each stage, by its title and their names."""
    found = {(STAGES[stage].title, _label("colour_shift")): figures for stage, figures in one.colours.items()}
    title = STAGES[UPSCALERS[0]].title
    return found | {(title, _label(measure)): one.upscaled[measure] for measure in _COLOURS if measure in one.upscaled}


def _label(measure: str) -> str:
    return next(one.label for one in measures_against("truth") if one.name == measure)


def _faults(figures: list[float | None], pictures: PictureFigures, name: str) -> Iterator[str]:
    if any(figure is None for figure in figures) or not pictures.tuned:
        yield f"{name} is missing"
    elif not all(math.isfinite(figure) for figure in figures if figure is not None) or not pictures.are_finite:
        yield f"{name} is not finite"


def _finite_measures(one: Measured, about: str) -> Verdict:
    held_out = one.summary.samples.held_out
    if held_out is None:
        return Verdict(
            rule="figures", about=about, passed=False, reason=f"{about}'s measures on held-out pictures are missing"
        )
    for measure in COMPARED:
        figures = [held_out.upscaled.get("tuned", {}).get(measure)]
        pictures = one.upscaled.get(measure, PictureFigures({}, {}))
        if fault := next(_faults(figures, pictures, measure), None):
            return Verdict(rule="figures", about=about, passed=False, reason=f"{about}'s {fault}")
    return Verdict(rule="figures", about=about, passed=True, reason=f"{about}'s measures are finite")


def loss_bounds(before: PictureFigures, after: Mapping[PictureName, float], tolerance: float = 0.0) -> Bounds:
    """How much worse than a version's losses counts, on the pictures of another: more than the share of its gain over the
    base that is tolerated.
    """
    level = _mean([before.tuned[picture] for picture in before.tuned.keys() & after.keys()])
    lost = tolerance * _mean_rise(before.tuned, before.base, after)
    return Bounds(max(_LOSS_MARGIN * level, lost), max(_LOSS_NEGLIGIBLE * level, lost))


def _mean_rise(
    one: Mapping[PictureName, float], other: Mapping[PictureName, float], pictures: Mapping[PictureName, float]
) -> float:  # fmt: skip
    """By how much other figures are higher, on those of some pictures that have both."""
    return _mean([other[each] - one[each] for each in one.keys() & other.keys() & pictures.keys()])


def _mean(figures: list[float]) -> float:
    """Of the finite ones; 0.0: there is none. Sorted, because sets have no order and sums of floats depend on it."""
    finite = sorted(filter(math.isfinite, figures))
    return sum(finite) / len(finite) if finite else 0.0


def _with_best(
    number: int, champion: PictureFigures, formers: Mapping[int, PictureFigures], after: Mapping[PictureName, float],
    better: Literal["less", "more"],
) -> Iterator[tuple[int, PictureFigures]]:  # fmt: skip
    """The champion's figures, and those of the former version that is best on the candidate's pictures, if it is better
    than the champion on them; each with its number.
    """
    yield number, champion
    before = {picture: figure for picture, figure in champion.tuned.items() if picture in after}
    gains = {of: paired_gain(before, one.tuned, better, Bounds(0, 0)) for of, one in formers.items()}
    ahead = {of: gain.mean for of, gain in gains.items() if gain and gain.mean > 0}
    if ahead:
        best = max(ahead, key=lambda of: ahead[of])
        yield best, formers[best]


def _compared(
    rule: str, about: str, name: str, gain: PairedGain | None, against: str, less: bool = False, digits: int = 2
) -> Verdict:  # fmt: skip
    """A verdict on paired figures. less: less is better, so a gain is a fall."""
    name = f"{about}'s {name}"
    if gain is None:
        reason = f"{name}: no picture was measured under the same conditions, so it cannot be compared {against}"
        return Verdict(rule=rule, about=about, passed=False, reason=reason)
    sign = -1 if less else 1
    if not gain.is_finite:
        return Verdict(rule=rule, about=about, passed=False, reason=f"{name} is not finite {against}")
    low, high = sorted(sign * end for end in gain.interval or (gain.mean, gain.mean))
    limit = None if gain.most_lost is None else -sign * gain.most_lost
    passes = ""
    if gain.is_worse and limit:
        while digits < _MOST_DIGITS and round(limit, digits) == round(sign * gain.mean, digits):
            digits += 1  # else the figure would read as its limit
        passes = f"; {signed(limit, digits)} would pass"
    return Verdict(
        rule=rule, about=about, passed=not gain.is_worse, figure=sign * gain.mean, limit=limit,
        interval=(low, high) if gain.interval else None,
        reason=f"{name} {gain.words(less, digits)} {against}{passes}",
    )  # fmt: skip

"""The gate: each rule blocks its fixture, a good candidate passes, and what cannot be judged does not."""

import errno
import math
import os
import shutil
from datetime import UTC, datetime

import numpy as np
import pytest
from bad_disk import fail
from candidates import Candidate
from hypothesis import given, settings
from hypothesis import strategies as st
from releases import deepfloyd
from scipy import stats
from small_run import SmallRun

from deepfloyd_core.bundle.gate import gate_of
from deepfloyd_core.bundle.gate_rules import GATE_RULES
from deepfloyd_core.bundle.picture_figures import picture_losses
from deepfloyd_core.config.run import Run
from deepfloyd_core.errors import ArtifactError, StorageError
from deepfloyd_core.measures.paired import Bounds, paired_gain
from deepfloyd_core.measures.pixel import FEWEST, mean_and_interval
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.store.collected import record_file, write_record
from deepfloyd_core.store.events import Event, read_events, standing
from deepfloyd_core.store.manifest import MANIFEST
from deepfloyd_core.store.registry import Decision, Outcome, block, news_of, promote, publish, rollback, settled
from deepfloyd_core.store.verdicts import GateReport
from deepfloyd_core.store.versions import Version, versions

GOOD = Candidate()
NAN = float("nan")


@pytest.fixture
def run(small_run: SmallRun) -> Run:
    return gated(load_run(small_run.config), "auto")


def gated(run: Run, gate: str) -> Run:
    config = run.config.model_copy(update={"gate": gate})
    return Run(**{**vars(run), "config": config})


def report(run: Run, version: int) -> GateReport:
    """The gate's report on a version, as its event has it."""
    found = standing(run.workspace).candidates[version].report
    assert found is not None
    return found


def blocked_by(run: Run, outcome: Outcome) -> set[str]:
    """The rules that a version did not pass."""
    assert outcome.state == "blocked"
    return {one.rule for one in report(run, outcome.version.number).verdicts if not one.passed}


# ---- what passes and what does not ------------------------------------------------------------------------------------


def test_a_good_first_version_and_a_better_second_one_are_promoted_and_say_their_gain(run: Run) -> None:
    first = GOOD.publish(run)
    assert news_of(run.workspace, first).startswith("published version 1, promoted: Stage I's held-out loss -0.0")
    assert "(-0.0" in first.reason and "95 %, 12 pictures) against the base" in first.reason
    better = GOOD.with_(loss=-0.06, psnr=1.5, seed=1).publish(run)
    assert (better.state, better.before, better.serves) == ("champion", 1, 2)
    assert "against version 1" in better.reason
    verdicts = report(run, 2).verdicts
    assert {one.rule for one in verdicts} == set(GATE_RULES) and all(one.passed for one in verdicts)
    (loss,) = (one for one in verdicts if one.rule == "champion's loss" and one.about == "Stage I")
    assert loss.figure == pytest.approx(-0.01, abs=0.002) and loss.interval is not None and loss.interval[1] < 0


def test_a_version_that_is_worse_within_its_interval_is_promoted(run: Run) -> None:
    GOOD.publish(run)
    assert GOOD.with_(loss=-0.0495, psnr=0.99, spread=0.02, seed=1).publish(run).state == "champion"


def test_a_version_may_lose_a_tenth_of_the_gain_but_not_in_many_small_steps(run: Run) -> None:
    """Each is worse beyond doubt than the one before, by less than a tenth of the gain; the best one stays the measure."""
    first, second, third = (
        GOOD.with_(loss=loss, spread=1e-5, seed=1).publish(run) for loss in (-0.05, -0.047, -0.0435)
    )
    assert (first.state, second.state) == ("champion", "champion") and second.serves == 2
    assert blocked_by(run, third) == {"champion's loss"}
    assert "against version 1" in third.reason and "against version 2" not in third.reason
    strict = Run(**{**vars(run), "config": run.config.model_copy(update={"gate_tolerance": 0.0})})
    assert "against version 2" in GOOD.with_(loss=-0.0465, spread=1e-5, seed=1).publish(strict).reason


def test_a_verdict_names_the_worst_figure_that_passes(run: Run) -> None:
    """With few pictures and many, by the margin and by the interval: the limit is the one that decided."""
    few = GOOD.with_(pictures=tuple(range(5)))
    few.publish(run)
    for seed, (psnr, spread) in enumerate([(0.95, 0.002), (0.8, 0.002), (0.8, 0.5), (0.5, 0.5), (1.2, 0.1)]):
        few.with_(psnr=psnr, spread=spread, seed=seed + 1).publish(run)
        for one in report(run, seed + 2).verdicts:
            if one.limit is not None and one.figure is not None and one.rule == "champion's upscaling":
                assert one.passed == (one.figure >= one.limit), one
                assert one.passed or one.reason.endswith(f"; {one.limit:+.2f} would pass")
    (psnr_row, *_) = (one for one in report(run, 3).verdicts if one.rule == "champion's upscaling")
    assert not psnr_row.passed and psnr_row.limit == pytest.approx(-0.1, abs=0.01), "a tenth of the gain of 1 dB"


def test_a_figure_that_is_blocked_by_little_does_not_read_as_its_limit(run: Run) -> None:
    few = GOOD.with_(pictures=tuple(range(5)), spread=1e-6)
    few.publish(run)
    few.with_(psnr=0.896, seed=1).publish(run)
    (psnr_row, *_) = (one for one in report(run, 2).verdicts if one.rule == "champion's upscaling")
    assert psnr_row.figure == pytest.approx(-0.104, abs=1e-4) and psnr_row.limit == pytest.approx(-0.1, abs=1e-4)
    assert " -0.104 (" in psnr_row.reason and psnr_row.reason.endswith("; -0.100 would pass")


def test_colours_that_nobody_sees_move_are_promoted_but_not_in_many_small_steps(run: Run) -> None:
    """Each step is below what is noticed; together they are not, and the base's colours are the fixed point."""
    steps = [GOOD.with_(colour=colour, shift=colour) for colour in (0.0, 1.5, 1.9, 3.0)]
    *unseen, last = [each.publish(run) for each in steps]
    assert [outcome.state for outcome in unseen] == ["champion"] * 3
    assert blocked_by(run, last) == {"colour drift"}
    assert "Stage I's colour shift in levels of 255 +3.00" in last.reason and "against the base" in last.reason


@pytest.mark.parametrize(
    ("worse", "rules"),
    [({"loss": -0.03}, {"champion's loss"}),
     ({"psnr": 0.8}, {"champion's upscaling"}),
     ({"consistency": 0.8}, {"champion's upscaling"}),
     ({"loss": 0.02}, {"champion's loss", "base's loss"}),
     ({"rejected": 15}, {"rejected pictures"}),
     ({"colour": 1.6}, {"colour drift"}),
     ({"shift": 1.6}, {"colour drift"}),
     ({"contrast": 1.6}, {"colour drift"}),
     ({"colour": NAN}, {"figures", "colour drift"}),
     ({"contrast": NAN}, {"figures", "colour drift"}),
     ({"forgotten": 0.055}, {"forgetting"}),
     ({"forgotten": 0.2}, {"forgetting"}),
     ({"forgotten": NAN}, {"forgetting"}),
     ({"probed": "another recipe"}, {"forgetting"}),
     ({"reloaded": 2e-5}, {"reloaded weights"}),
     ({"reloaded": -1.0}, {"reloaded weights"}),
     ({"reloaded": None}, {"reloaded weights"}),
     ({"losses": (NAN,) * 12}, {"figures", "champion's loss", "base's loss"}),
     ({"losses": (0.4,) * 11 + (NAN,)}, {"figures", "champion's loss", "base's loss"}),
     ({"losses": (0.4,) * 11 + (math.inf,)}, {"figures", "champion's loss", "base's loss"}),
     ({"psnr": NAN}, {"figures", "champion's upscaling"}),
     ({"pictures": ()}, {"figures", "champion's loss", "champion's upscaling"}),
     ({"crop": "another"}, {"champion's loss", "champion's upscaling", "colour drift"}),
     ({"pictures": tuple(range(20, 32))}, {"champion's loss", "champion's upscaling", "colour drift"}),
     ({"stages": (1,)}, {"champion's loss", "champion's upscaling"}),
     ({"stages": ()}, {"figures", "champion's loss", "champion's upscaling"})],
)  # fmt: skip
def test_each_rule_blocks_its_fixture_and_the_champion_goes_on_serving(
    run: Run, worse: dict[str, object], rules: set[str]
) -> None:
    GOOD.publish(run)
    outcome = GOOD.with_(**{"seed": 1, **worse}).publish(run)
    assert blocked_by(run, outcome) == rules
    assert standing(run.workspace).champion == 1
    assert news_of(run.workspace, outcome).startswith("version 2 is blocked: ")
    assert news_of(run.workspace, outcome).endswith("; version 1 serves")
    assert outcome.reason in [event.reason for event in read_events(run.workspace) if isinstance(event, Event)]


@pytest.mark.parametrize(
    ("first", "rules"),
    [({"loss": 0.02}, {"base's loss"}), ({"rejected": 150}, {"rejected pictures"}), ({"colour": 2.1}, {"colour drift"}),
     ({"contrast": 2.1}, {"colour drift"}), ({"forgotten": 0.11}, {"forgetting"}),
     ({"reloaded": None}, {"reloaded weights"}),
     ({"losses": (NAN,) * 12}, {"figures", "base's loss"})],
)  # fmt: skip
def test_a_first_version_that_does_harm_is_blocked_and_none_serves(
    run: Run, first: dict[str, object], rules: set[str]
) -> None:
    outcome = GOOD.with_(**first).publish(run)
    assert blocked_by(run, outcome) == rules
    assert news_of(run.workspace, outcome).endswith("; no version serves")


def test_without_held_out_pictures_the_first_version_serves_and_a_later_one_waits_for_a_person(run: Run) -> None:
    unmeasured = GOOD.with_(pictures=())
    assert unmeasured.publish(run).state == "champion"
    second = unmeasured.with_(seed=1).publish(run)
    assert second.state == "blocked" and "cannot be compared with version 1" in second.reason


def test_pairs_are_the_pictures_that_both_versions_held_out(run: Run) -> None:
    """Others may be as bad as they like, for they may have been trained on by the other version."""
    GOOD.publish(run)
    base = [float(np.random.default_rng(number).uniform(0.3, 0.7)) for number in range(12, 18)]
    shared = picture_losses(GOOD.bundle(run.workspace).path, 1).tuned.items()
    kept = [loss - 0.05 for (name, _), loss in shared if int(name, 16) >= 6]  # without what the fixture adds for t
    outcome = GOOD.with_(pictures=tuple(range(6, 18)), losses=(*kept, *(one - 0.001 for one in base))).publish(run)
    assert outcome.state == "champion"
    (loss,) = (one for one in report(run, 2).verdicts if one.rule == "champion's loss" and one.about == "Stage I")
    assert loss.figure == pytest.approx(0, abs=1e-12) and "6 pictures" in loss.reason


def test_another_seed_forgets_a_little_more_and_what_is_not_measured_is_said(run: Run) -> None:
    GOOD.with_(forgotten=None).publish(run)
    (told,) = (one for one in report(run, 1).verdicts if one.rule == "forgetting")
    assert told.passed and told.reason == "Stage I's forgetting was not measured" and told.figure is None
    assert GOOD.publish(run).state == "champion", "the champion's was not measured: the base is the yardstick"
    assert GOOD.with_(forgotten=0.045).publish(run).state == "champion"
    reasons = [one.reason for one in report(run, 3).verdicts if one.rule == "forgetting"]
    assert [reason.split(" (")[0] for reason in reasons] == [
        "Stage I's loss on the base's own pictures +0.0150", "Stage I's loss on the base's own pictures +0.0457",
    ]  # fmt: skip


def test_what_the_champion_forgot_is_measured_of_its_successors_too(run: Run) -> None:
    """Else a key of one night, or a run file without it, would let any forgetting through."""
    GOOD.publish(run)
    unmeasured = GOOD.with_(loss=-0.06, seed=1, forgotten=None)
    outcome = unmeasured.publish(run)
    assert blocked_by(run, outcome) == {"forgetting"}
    assert outcome.reason == (
        "Stage I's forgetting was not measured, and that of version 1 was: set forgetting_probes as it was then"
    )
    assert GOOD.with_(loss=-0.06, seed=2).publish(run).state == "champion", "the key is as it was"
    promote(run.workspace, 2, "a person")
    assert unmeasured.with_(loss=-0.07, seed=3).publish(run).state == "champion", "a person has chosen that"


@pytest.mark.parametrize("of", ["tuned", "upscaling"])
def test_a_figure_of_the_champion_that_is_not_finite_is_told_and_counts_only_where_it_is_compared(
    run: Run, of: str
) -> None:
    bad = {"losses": (0.4,) * 11 + (NAN,)} if of == "tuned" else {"psnrs": (1.0,) * 11 + (NAN,)}
    assert GOOD.with_(**bad).publish(gated(run, "off")).state == "champion"
    same = GOOD.with_(loss=-0.2, psnr=2.0, seed=1).publish(run)
    assert same.state == "blocked" and "is not finite against version 1" in same.reason
    clean = tuple(range(11))
    worse = GOOD.with_(loss=0.2, psnr=-3.0, seed=2, pictures=clean).publish(run)
    assert {"champion's loss", "champion's upscaling"} <= blocked_by(run, worse)
    assert GOOD.with_(loss=-0.2, psnr=2.0, seed=3, pictures=clean).publish(run).state == "champion"


def test_a_former_version_is_the_measure_although_the_champion_lacks_a_figure_of_another_picture(run: Run) -> None:
    best = GOOD.with_(loss=-0.2, spread=1e-5)
    assert best.publish(run).state == "champion"
    worse = GOOD.with_(loss=-0.05, spread=1e-5, seed=1)
    base = picture_losses(worse.bundle(run.workspace).path, 1).base.items()
    losses = [loss - 0.0501 - 0.05 for _, loss in sorted(base)]  # without what the fixture adds for t
    worse.with_(losses=(*losses[:11], NAN)).publish(gated(run, "off"))
    outcome = worse.with_(pictures=tuple(range(11)), seed=2).publish(run)
    assert "against version 1" in outcome.reason and blocked_by(run, outcome) == {"champion's loss"}


# ---- where it started -------------------------------------------------------------------------------------------------


def test_a_training_that_started_from_a_version_that_was_rolled_back_meanwhile_does_not_serve(run: Run) -> None:
    bad = GOOD.with_(loss=-0.07, seed=1)
    assert [one.publish(run).state for one in (GOOD, bad)] == ["champion"] * 2
    successor = GOOD.with_(loss=-0.08, seed=2, started=(bad, 2))
    successor.bundle(run.workspace)
    rollback(run.workspace, "a person")
    outcome = successor.publish(run)
    assert blocked_by(run, outcome) == {"start"} and outcome.serves == 1
    assert outcome.reason == "Stage I started from the weights of version 2, which was blocked meanwhile"
    assert GOOD.with_(loss=-0.06, seed=3, started=(GOOD, 1)).publish(run).state == "champion"
    waits = successor.with_(seed=4).publish(gated(run, "manual"))
    assert waits.reason.startswith("would be blocked: Stage I started from the weights of version 2")


def test_a_start_from_weights_that_another_version_still_has_is_no_case_nor_are_weights_that_serve(run: Run) -> None:
    twin = GOOD.with_(loss=-0.05, prompt="another")
    assert [one.publish(run).state for one in (GOOD, twin)] == ["champion"] * 2
    block(run.workspace, 1, "no", "a person")
    successor = GOOD.with_(loss=-0.06, seed=1, started=(GOOD, 1))
    assert successor.publish(run).state == "champion", "version 2 has the same weights"
    block(run.workspace, 2, "no", "a person")
    assert successor.with_(prompt="a third").publish(run).state == "champion", "its LoRA serves already"
    assert successor.with_(loss=-0.07, seed=2).publish(run).state == "blocked"


# ---- few pictures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_with_few_pictures_a_clear_loss_blocks_and_a_small_one_does_not(run: Run, count: int) -> None:
    few = GOOD.with_(pictures=tuple(range(count)))
    few.publish(run)
    assert few.with_(loss=-0.0495, spread=0.004, seed=1).publish(run).state == "champion"
    worse = few.with_(loss=0.05, seed=2).publish(run)
    assert {"champion's loss", "base's loss"} <= blocked_by(run, worse)
    assert blocked_by(run, few.with_(psnr=0.1, seed=3).publish(run)) == {"champion's upscaling"}


@given(st.integers(0, 10_000), st.integers(1, 25), st.sampled_from(["less", "more"]))
@settings(max_examples=30, deadline=None)
def test_paired_intervals_are_scipys_of_the_differences(seed: int, count: int, better: str) -> None:
    rng = np.random.default_rng(seed)
    before, after = ({number: float(rng.normal()) for number in range(count)} for _ in range(2))
    found = paired_gain({**before, "other": 9.0}, {**after, -1: 9.0}, better, Bounds(0.1, 0.0))  # type: ignore[arg-type]
    sign = 1 if better == "more" else -1
    gains = [sign * (after[number] - before[number]) for number in range(count)]
    assert found is not None and found.pictures == count and found.mean == pytest.approx(np.mean(gains))
    if count == 1:
        assert found.interval is None
    elif count < FEWEST:
        low, high = stats.ttest_1samp(gains, 0).confidence_interval(0.95)
        assert found.interval == pytest.approx((low, high), rel=1e-6, abs=1e-6 * (high - low))
    else:
        in_order = [gains[number] for number in sorted(range(count), key=str)]
        assert (found.mean, *known(found.interval)) == pytest.approx(mean_and_interval(in_order))
    less = found.mean < 0 and (found.interval is not None and found.interval[1] < 0)
    assert found.is_worse == (less or (count < FEWEST and found.mean < -0.1))


def known(interval: tuple[float, float] | None) -> tuple[float, float]:
    assert interval is not None
    return interval


@pytest.mark.parametrize(("count", "most"), [(4, 0.05), (12, 0.07), (50, 0.05)])
def test_of_equal_models_few_are_blocked(count: int, most: float) -> None:
    """One side of a 95 % interval: 2.5 %, and of a bootstrap of 12 some 4 %."""
    rng, keys = np.random.default_rng(0), range(count)
    none = dict.fromkeys(keys, 0.0)
    blocked = [paired_gain(none, dict(zip(keys, rng.normal(size=count), strict=True)), "more", Bounds(9, 0))
               for _ in range(150)]  # fmt: skip
    assert np.mean([one is not None and one.is_worse for one in blocked]) <= most


# ---- what cannot be read, and who decides -----------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["candidate", "champion"])
@pytest.mark.parametrize("harm", ["bundle gone", "figures damaged", "figures gone", "index gone", "record damaged"])
def test_what_cannot_be_read_blocks_with_its_reason(run: Run, of: str, harm: str) -> None:
    better = GOOD.with_(loss=-0.06, seed=1, accepted=101)
    GOOD.publish(run)
    better.publish(gated(run, "manual"))
    version = versions(run.workspace)[1]
    lost = better if of == "candidate" else GOOD
    bundle, index = lost.bundle(run.workspace).path, lost.index(run.workspace).path
    losses, number = bundle / "stage1" / "validation.parquet", 2 if of == "candidate" else 1
    if harm == "index gone":
        shutil.rmtree(index)
    elif harm == "figures damaged":
        losses.write_bytes(b"\x00" * losses.stat().st_size)
    elif harm == "figures gone":
        losses.unlink()
    elif harm == "bundle gone":
        shutil.rmtree(bundle)
    else:
        (run.workspace / "versions" / f"000{number}.json").write_bytes(b"")
    decision = gate_of(run)(version, 1)
    if harm == "record damaged" and of == "candidate":
        assert decision.then == "promoted", "its record was just written"
        return
    named = {"index gone": index.name, "record damaged": "0001.json"}.get(harm, bundle.name)
    assert decision.then == "blocked" and named in decision.reason


@pytest.mark.parametrize(
    ("of", "part", "number"),
    [("candidate", "figures", number) for number in (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOMEM)]
    + [("candidate", part, errno.EIO) for part in ("size", "manifest", "index")]
    + [("champion", part, errno.EIO) for part in ("figures", "size", "manifest", "index", "record", "event")]
    + [("champion", "collected index", errno.EIO)],
)
def test_a_disk_that_fails_for_a_moment_says_nothing_of_a_candidate_and_the_next_run_judges_it(
    run: Run, monkeypatch: pytest.MonkeyPatch, of: str, part: str, number: int
) -> None:
    better = GOOD.with_(loss=-0.06, seed=1, accepted=101)
    GOOD.publish(run)
    one = better if of == "candidate" else GOOD
    bundle, index, records = one.bundle(run.workspace), one.index(run.workspace), run.workspace / "versions"
    places = {
        "figures": bundle.path / "stage1" / "validation.parquet", "size": bundle.path / "eval.parquet",
        "manifest": bundle.path / MANIFEST, "index": index.path / MANIFEST, "record": records / "0001.json",
        "collected index": record_file(run.workspace, index.name), "event": records / "events" / "000002.json",
    }  # fmt: skip
    if part == "collected index":
        write_record(run.workspace, index.name, datetime.now(UTC), index.manifest)
        shutil.rmtree(index.path)

    def judge_on_a_bad_disk(version: Version, champion: int | None) -> Decision:
        with monkeypatch.context() as patch:
            fail(patch, "stat" if part == "size" else "read_bytes", places[part], number)
            return gate_of(run)(version, champion)

    products = better.bundle(run.workspace), better.index(run.workspace)
    told = f"^{places[part]}.* cannot be read: (?i:{os.strerror(number)})"
    with pytest.raises((StorageError, ArtifactError), match=told):
        publish(run.workspace, *products, None, judge_on_a_bad_disk)
    outcome = better.publish(run)
    assert (outcome.state, outcome.version.number) == ("champion", 2)


def test_a_lost_record_of_a_version_that_serves_or_served_is_told_and_ends_no_run(run: Run) -> None:
    for seed in range(2):
        assert GOOD.with_(loss=-0.05 - seed / 100, seed=seed).publish(run).state == "champion"
    (run.workspace / "versions" / "0001.json").unlink()
    assert GOOD.with_(loss=-0.07, seed=2).publish(run).state == "champion", "the others judge it"
    (run.workspace / "versions" / "0003.json").rename(run.workspace / "lost.json")
    outcome = GOOD.with_(loss=-0.08, seed=3).publish(run)
    assert outcome.state == "blocked" and "There is no version '3'" in outcome.reason


def test_manual_waits_for_a_person_and_off_promotes_always_and_both_report(run: Run) -> None:
    GOOD.publish(run)
    worse = GOOD.with_(loss=-0.01, seed=1)
    waiting = worse.publish(gated(run, "manual"))
    assert (waiting.state, waiting.serves) == ("candidate", 1) and waiting.reason.startswith(
        "would be blocked: Stage I"
    )
    assert not report(run, 2).passed and report(run, 2).against == 1
    fingerprint = worse.bundle(run.workspace).fingerprint
    assert settled(run.workspace, fingerprint, waits=True) is not None
    assert settled(run.workspace, fingerprint) is None, "another gate judges it"
    promoted = worse.publish(gated(run, "off"))
    assert (promoted.state, promoted.version.number) == ("champion", 2)
    assert "the gate is off, and would have blocked it: Stage I" in news_of(run.workspace, promoted)


def test_a_blocked_candidate_is_named_in_the_history_with_its_reason(run: Run) -> None:
    GOOD.publish(run)
    GOOD.with_(rejected=15, seed=1).publish(run)
    (line,) = (line for line in deepfloyd("history", str(run.workspace)).output.splitlines() if " blocked " in line)
    assert "13.0% of 115 pictures are rejected, 1.0% in version 1" in line

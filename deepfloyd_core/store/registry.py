"""Publishes, promotes and blocks versions. Each holds the lock of versions, so two at once take turns.

A publication writes the version's record, then the verdict on it (`candidate`), then what follows from that. A kill
between two of these leaves a candidate, which the next run of the same bundle judges again. A bundle that was blocked
is neither published nor promoted again, except by `promote`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Literal, ParamSpec, TypeVar

from deepfloyd_core.errors import ArtifactError, ConfigError
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.store.events import FOLDER, Standing, append_event, standing
from deepfloyd_core.store.locks import locked
from deepfloyd_core.store.mirror import RacedError, mirror_of, refresh
from deepfloyd_core.store.verdicts import GateReport
from deepfloyd_core.store.versions import (
    Origin,
    Version,
    bundle_of,
    find_version,
    published_numbers,
    record_version,
    trained_parts,
    versions,
)

ROLLED_BACK = "rolled back"
_RACES = 5
_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(frozen=True)
class Decision:
    """The verdict on a candidate."""

    then: Literal["promoted", "blocked", "candidate"]  # candidate: a person decides
    reason: str
    report: GateReport | None = None  # of the gate


# Judges a candidate against the champion, by its number; None: there is none.
Judge = Callable[[Version, int | None], Decision]


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    version: Version
    state: Literal["champion", "blocked", "candidate"]
    is_new: bool  # the verdict; False: it is of an earlier run
    reason: str = ""
    before: int | None = None  # the champion when the version was judged
    serves: int | None = None  # the champion now


@contextmanager
def versions_locked(workspace: Path) -> Iterator[None]:
    """Hold the lock of versions; of a workspace in a bucket, bring first what others have decided."""
    with locked(workspace, FOLDER):
        if mirror := mirror_of(workspace):
            refresh(mirror, f"{FOLDER}/")
        yield


def _in_turn(decide: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorates a decision on versions: where another machine writes its record first, it is made again upon that."""

    @wraps(decide)
    def decided(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        for _ in range(_RACES):
            with suppress(RacedError):
                return decide(*args, **kwargs)
        return decide(*args, **kwargs)

    return decided


def promote_always(version: Version, champion: int | None) -> Decision:
    """The verdict without a gate."""
    return Decision("promoted", "")


@_in_turn
def publish(
    workspace: Path, bundle: Artifact, index: Artifact, origin: Origin | None = None,
    judge: Judge = promote_always, waits: bool = False,
) -> Outcome:  # fmt: skip
    """Give a bundle the next version number and judge it, unless `settled` says what it is.

    origin: None: no run is known. waits: see `settled`. Raises ArtifactError when it is not
    known which version serves.
    """
    with versions_locked(workspace):
        if outcome := settled(workspace, bundle.fingerprint, waits):
            return outcome
        now = standing(workspace)
        same = _of_bundle(workspace, bundle.fingerprint)
        version = _last_candidate(same, now) or record_version(workspace, bundle, index, origin or Origin())
        before, by = now.champion, version.run_file or "a run"
        decision = judge(version, before)
        append_event(workspace, version.number, "candidate", decision.reason, by, decision.report)
        if decision.then == "candidate":
            return Outcome(version, "candidate", True, decision.reason, before, before)
        append_event(workspace, version.number, decision.then, decision.reason, by)
        if decision.then == "blocked":
            return Outcome(version, "blocked", True, decision.reason, before, before)
        return Outcome(version, "champion", True, decision.reason, before, version.number)


def settled(workspace: Path, bundle: str, waits: bool = False) -> Outcome | None:
    """What a bundle, by its fingerprint, is already: the champion's, or blocked; or, if `waits`, a judged candidate for
    which a person decides. None: it is to be judged.

    Raises ArtifactError when it is not known which version serves.
    """
    now = standing(workspace)
    champion, same = now.champion, _of_bundle(workspace, bundle)
    for version in same:
        if version.number == champion:
            return Outcome(version, "champion", False, "", champion, champion)
    for version in reversed(same):
        if version.number in now.blocked:
            return Outcome(version, "blocked", False, now.blocked[version.number].reason, champion, champion)
    waiting = _last_candidate(same, now)
    if waits and waiting and waiting.number in now.candidates:
        reason = now.candidates[waiting.number].reason
        return Outcome(waiting, "candidate", False, reason, champion, champion)
    return None


@_in_turn
def promote(workspace: Path, number: int, by: str, reason: str = "") -> str:
    """Make a version serve, blocked or not. Returns a sentence. Raises ArtifactError when its bundle is not complete."""
    with versions_locked(workspace):
        bundle_of(workspace, find_version(workspace, str(number)))
        now = standing(workspace)
        if now.state_of(number) == "champion":
            return f"version {number} serves already"
        append_event(workspace, number, "promoted", reason or f"by {by}", by)
        return f"version {number} is promoted and serves"


@_in_turn
def rollback(workspace: Path, by: str, reason: str = ROLLED_BACK) -> str:
    """Block the champion, so that the one before serves again. Returns a sentence.

    Raises ConfigError when there is no champion or none before it, ArtifactError when the bundle of that is not complete
    or it is not known which version serves.
    """
    with versions_locked(workspace):
        now = standing(workspace)
        champion = now.champion
        if champion is None:
            raise ConfigError(f"No version of {workspace} serves, so there is nothing to roll back.")
        before = now.champion_without(champion)
        if before is None:
            raise ConfigError(
                f"Before version {champion} none serves that is not blocked. `deepfloyd promote {workspace} N` makes "
                f"another one serve; `deepfloyd block {workspace} {champion} --reason TEXT` leaves none."
            )
        bundle_of(workspace, find_version(workspace, str(before)))
        append_event(workspace, champion, "blocked", reason, by)
        return f"version {champion} is blocked ({reason}); version {before} serves"


@_in_turn
def block(workspace: Path, number: int, reason: str, by: str) -> str:
    """Block a version: it does not serve, and its bundle is not published again. Returns a sentence."""
    if not reason.strip():
        raise ConfigError("The reason is empty. Say why the version is blocked.")
    with versions_locked(workspace):
        if number not in published_numbers(workspace):
            find_version(workspace, str(number))  # raises, and names those that are there
        event = append_event(workspace, number, "blocked", reason, by)
        return f"version {number} is blocked ({event.reason}); {_serving(standing(workspace))}"


def news_of(workspace: Path, outcome: Outcome) -> str:
    """The outcome of a run, for people."""
    number = outcome.version.number
    why = f": {outcome.reason}" if outcome.reason else ""
    start = f" ({outcome.version.start})" if outcome.version.start else ""
    serves = "no version serves" if outcome.serves is None else f"version {outcome.serves} serves"
    if outcome.state == "champion" and outcome.is_new:
        promoted = f", promoted{why}" if why else ""
        return f"published version {number}{start}{_kinship(workspace, outcome)}{promoted}"
    unchanged = "" if outcome.is_new else "no change: "
    if outcome.state == "champion":
        return f"{unchanged}{outcome.reason}; {serves}" if outcome.reason else f"{unchanged}{serves}"
    if outcome.state == "blocked":
        reason = why if outcome.is_new or not why else f" ({outcome.reason})"
        return f"{unchanged}version {number}{start} is blocked{reason}; {serves}"
    decides = f"`deepfloyd promote {workspace} {number}` promotes it"
    return f"{unchanged}version {number}{start} is a candidate{why}; {decides}; {serves}"


def _kinship(workspace: Path, outcome: Outcome) -> str:
    """What a version has in common with earlier ones, and whether it replaces one of another run file."""
    version, known = outcome.version, versions(workspace)
    before = next((one for one in known if one.number == outcome.before), None)
    first = next((one for one in known if one.bundle == version.bundle), version)
    again = f": the bundle of version {first.number} again" if first.number < version.number else ""
    if before and not again and (trained := trained_parts(version)) and trained == trained_parts(before):
        again = f": the same weights as version {before.number}"  # the ledger, the samples or the prompts are others
    if before and before.run_file and version.run_file and before.run_file != version.run_file:
        return (
            f"{again}{version.of}. Version {before.number}{before.of}, is no longer `latest`: use --version "
            f"{before.number}, or give each run file a workspace"
        )
    return again


def _of_bundle(workspace: Path, bundle: str) -> list[Version]:
    return [version for version in versions(workspace) if version.bundle == bundle]


def _last_candidate(same: list[Version], now: Standing) -> Version | None:
    return next((version for version in reversed(same) if now.state_of(version.number) == "candidate"), None)


def _serving(now: Standing) -> str:
    """Which version serves, in words."""
    try:
        champion = now.champion
    except ArtifactError:
        return "it is not known which version serves"
    return "no version serves" if champion is None else f"version {champion} serves"

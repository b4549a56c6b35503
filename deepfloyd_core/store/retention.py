"""Retention: which artifacts of a workspace stay, and which `gc` removes. A pure function; `gc.py` does it.

Some artifacts stay whatever their age: those of running runs, of the champion and of the version before it, to which a
rollback returns, of the last versions of each run file, and the newest of each kind, which the next run reuses. Others
stay for some days. Each of them keeps all artifacts that it was made from, so that a run that starts from it rebuilds
nothing. A bundle that is only an input (of generated pictures, of a training that started from it) stays for its
weights, without what it was made from.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from deepfloyd_core.config.retention import Policy
from deepfloyd_core.config.stages import STAGES
from deepfloyd_core.store.changes import DRAWN
from deepfloyd_core.store.counts import days
from deepfloyd_core.store.inventory import FileLink, Inventory, Leftover, Stored
from deepfloyd_core.store.lineage import Lineage, reached

BUNDLE, GENERATED = "lora_bundle", "generated"
TEXTS = {f"{stage.table}_text" for stage in STAGES.values()}
_DAY_S = 86_400
KEPT_REPORTS = 20  # some 20 MB


@dataclass(frozen=True)
class Published:
    """What retention needs to know of a version."""

    number: int
    bundle: str  # names of artifacts
    image_index: str
    lineage: Lineage
    published: float  # Unix time, s
    run_file: str  # empty: not known, or removed


@dataclass(frozen=True)
class World:
    """The state of a workspace."""

    inventory: Inventory
    versions: tuple[Published, ...]  # in ascending order
    served: tuple[int, ...]  # the champion, then the versions that would serve after a rollback of each
    leased: Mapping[str, str]  # artifacts that running runs use, and who each is
    reports: Mapping[int, int] = field(default_factory=dict)  # of versions, and the bytes of each
    away: tuple[str, ...] = ()  # run files that cannot be looked at now: their disk may be away


@dataclass(frozen=True)
class Going:
    """An artifact that is removed."""

    artifact: Stored
    versions: tuple[int, ...]  # that were made from it
    frees: int  # bytes; those of a file with several names count where its last name goes


@dataclass(frozen=True)
class Staying:
    """An artifact that stays."""

    artifact: Stored
    why: str


@dataclass(frozen=True)
class GcPlan:
    """What is removed from a workspace and what stays."""

    goes: tuple[Going, ...]
    leftovers: tuple[tuple[Leftover, int], ...]  # each with the bytes that it frees
    stays: tuple[Staying, ...]
    versions: tuple[int, ...]  # whose bundles are removed
    reports: Mapping[int, int]  # of versions whose bundles are gone, and the bytes of each

    @property
    def frees(self) -> int:
        """Bytes."""
        reports = sum(self.reports.values())
        return reports + sum(going.frees for going in self.goes) + sum(frees for _, frees in self.leftovers)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is removed."""
        return not (self.goes or self.leftovers or self.reports)


def plan_gc(world: World, policy: Policy, now: float) -> GcPlan:
    """What to remove. now: Unix time, s."""
    graph = _Graph.of(world)
    reasons: dict[str, str] = {}
    for why, names in _roots(world, policy, now):
        for root in names:
            for name in graph.whole(root):
                reasons.setdefault(name, why)
    going = [artifact for artifact in world.inventory.artifacts if artifact.name not in reasons]
    old = now - policy.keep_days * _DAY_S
    leftovers = [leftover for leftover in world.inventory.leftovers if leftover.is_gone or leftover.changed < old]
    frees = _freed([*(leftover.files for leftover in leftovers), *(artifact.files for artifact in going)])
    of = _versions_of(world.versions, graph)
    bundles = {artifact.name for artifact in going if artifact.kind == BUNDLE}
    return GcPlan(
        goes=tuple(
            Going(artifact, tuple(of.get(artifact.name, ())), size)
            for artifact, size in zip(going, frees[len(leftovers) :], strict=True)
        ),
        leftovers=tuple(zip(leftovers, frees, strict=False)),
        stays=tuple(Staying(graph.stored[name], why) for name, why in reasons.items() if name in graph.stored),
        versions=tuple(version.number for version in world.versions if version.bundle in bundles),
        reports=_old_reports(world, bundles),
    )


def _old_reports(world: World, going: set[str]) -> dict[int, int]:
    """The reports of versions whose bundles are gone, or go now; the last KEPT_REPORTS of all stay."""
    there = {one.name for one in world.inventory.artifacts} - going
    kept = {version.number for version in world.versions if version.bundle in there}
    kept |= set(sorted(world.reports)[-KEPT_REPORTS:])
    return {number: size for number, size in world.reports.items() if number not in kept}


def _roots(world: World, policy: Policy, now: float) -> Iterator[tuple[str, list[str]]]:
    """Reasons to stay, the strongest first, each with the artifacts that stay for it, without what they were made from."""
    artifacts, old = world.inventory.artifacts, now - policy.keep_days * _DAY_S
    yield "used by a running run", [*world.leased, *(artifact.name for artifact in artifacts if artifact.locked)]
    by_number = {version.number: version for version in world.versions}
    served = [by_number[number] for number in world.served if number in by_number]
    for version in served[:1]:
        yield f"version {version.number}, the champion", _names(version)
    for version in served[
        1 : max(2, policy.keep_versions)
    ]:  # `keep_versions = 1` shall not end what `rollback` promises
        yield "former champions, for a rollback", _names(version)
    last = "the last version" if policy.keep_versions == 1 else f"the last {policy.keep_versions} versions"
    yield f"{last} of each run file", _of_last(world.versions, policy.keep_versions)
    age = days(policy.keep_days)
    yield (
        f"version published in the last {age}",
        [name for version in world.versions if version.published >= old for name in _names(version)],
    )
    yield "newest of its kind: the next run reuses it", list(_newest(artifacts))
    yield f"changed in the last {age}", [artifact.name for artifact in artifacts if artifact.changed >= old]


def _names(version: Published) -> list[str]:
    return [version.bundle, version.image_index]


def _of_last(versions: Iterable[Published], count: int) -> list[str]:
    """The bundles and indices of the last versions of each run file."""
    by_file: dict[str, list[Published]] = {}
    for version in versions:
        by_file.setdefault(version.run_file, []).append(version)
    return [name for group in by_file.values() for version in group[-count:] for name in _names(version)]


def _newest(artifacts: Iterable[Stored]) -> Iterator[str]:
    """The newest finished artifact of each kind, and the newest unfinished one that is newer. Nothing is made from
    generated pictures.
    """
    newest: dict[tuple[str, bool], Stored] = {}
    for artifact in artifacts:
        key = artifact.kind, artifact.finished
        if artifact.kind not in DRAWN and (key not in newest or newest[key].changed < artifact.changed):
            newest[key] = artifact
    for (kind, finished), artifact in newest.items():
        if finished or (kind, True) not in newest or newest[kind, True].changed < artifact.changed:
            yield artifact.name


@dataclass(frozen=True)
class _Graph:
    """What each artifact was made from."""

    stored: Mapping[str, Stored]
    lineage: Lineage
    texts: Mapping[str, list[str]]  # the stages' texts that were made from each embeds

    @classmethod
    def of(cls, world: World) -> "_Graph":
        """As the records of versions say, and as the artifacts themselves say."""
        lineage: Lineage = {}
        for version in world.versions:
            lineage |= version.lineage
        stored = {artifact.name: artifact for artifact in world.inventory.artifacts}
        texts: dict[str, list[str]] = {}
        for artifact in stored.values():
            for name in artifact.inputs if artifact.kind in TEXTS else ():
                texts.setdefault(name, []).append(artifact.name)
        return cls(stored, lineage | {name: list(artifact.inputs) for name, artifact in stored.items()}, texts)

    def whole(self, root: str) -> set[str]:
        """An artifact and everything that it was made from; of a bundle among that only its files.

        A training names its text by the rows that it reads, so the texts of its embeds are taken. And it names the
        weights that it started from by their bytes.
        """
        inputs = reached(root, lambda name: [] if name != root and _is_bundle(name) else self.lineage.get(name, []))
        weights = {parent for name in inputs if name in self.stored for parent in self.stored[name].weights}
        return inputs | weights | {text for name in inputs for text in self.texts.get(name, ())}


def _is_bundle(name: str) -> bool:
    return name.startswith(f"{BUNDLE}/")


def _versions_of(versions: Iterable[Published], graph: _Graph) -> dict[str, list[int]]:
    """The versions that each artifact belongs to."""
    of: dict[str, list[int]] = {}
    for version in versions:
        for name in set().union(*map(graph.whole, _names(version))):
            of.setdefault(name, []).append(version.number)
    return of


def _freed(groups: list[tuple[FileLink, ...]]) -> list[int]:
    """The bytes that removing each group of files frees when all are removed, in their order."""
    names: Counter[tuple[int, int]] = Counter()
    frees = [0] * len(groups)
    for number, files in enumerate(groups):
        for file in files:
            names[file.device, file.inode] += 1
            if names[file.device, file.inode] == file.links:
                frees[number] += file.bytes
    return frees

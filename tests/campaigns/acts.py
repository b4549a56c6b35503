"""What is written durably, one act for each kind: from a state before it, with what must hold wherever it ends.

Of an artifact the act is its commit, from the directory that its real builder left, with the checkpoints and records of
parts that it had. Of anything else it is all that a run does: a checkpoint, a version, a choice of held-out pictures.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from data_world import DataWorld
from PIL import Image
from power_loss import Tree, read_tree
from releases import Release
from releases import make as make_artifact

from deepfloyd_core.config.retention import Policy
from deepfloyd_core.config.run import Run
from deepfloyd_core.crops.eval_record import damaged_records as damaged_choices
from deepfloyd_core.crops.eval_record import eval_record
from deepfloyd_core.files import fsync_path, write_bytes
from deepfloyd_core.index.scan import scan
from deepfloyd_core.pictures.sheets import save_picture
from deepfloyd_core.processes.pool import Children, Limits
from deepfloyd_core.store import artifacts
from deepfloyd_core.store.artifacts import (
    Artifact,
    Request,
    WorkDir,
    all_artifacts,
    commit,
    find,
    materialise,
    verify_artifact,
)
from deepfloyd_core.store.collected import collected, collected_records
from deepfloyd_core.store.file_faults import written
from deepfloyd_core.store.gc import collect, would_collect
from deepfloyd_core.store.leases import drop_ended_leases, leased, running_leases, take_lease
from deepfloyd_core.store.locks import artifact_lock, locked
from deepfloyd_core.store.manifest import Summary
from deepfloyd_core.store.parts import finish_part, part_is_whole
from deepfloyd_core.store.registry import publish
from deepfloyd_core.store.versions import bundle_of, damaged_records, published_numbers, readable_versions


@dataclass(frozen=True)
class Act:
    """Something that is written, to `folder` alone, whose state before it is there."""

    kind: str
    folder: Path
    do: Callable[[], object]
    check: Callable[
        [], None
    ]  # raises AssertionError unless the old or the new is whole; then goes on as the next run would


# ---- artifacts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Built:
    """An artifact whose builder has ended."""

    request: Request
    summary: Summary
    started: datetime
    tree: Tree  # of its directory, by the path inside it
    hashes: dict[str, str]  # of its files when it was finished


@contextmanager
def noted() -> Iterator[list[Built]]:
    """Take down each artifact that is committed meanwhile."""
    built: list[Built] = []

    def noting(path: Path, request: Request, summary: Summary, started: datetime) -> Artifact:
        tree = {str(Path(name).relative_to(path)): data for name, data in read_tree(path).items()}
        made = commit(path, request, summary, started)
        built.append(Built(request, summary, started, tree, made.hashes))
        return made

    with patch.object(artifacts, "commit", noting):
        yield built


def commit_of(built: Built, folder: Path) -> Act:
    """The commit of an artifact, in a workspace of its own."""
    workspace = folder / built.request.kind
    path = workspace / built.request.name

    def put(name: str, data: bytes | None) -> None:
        if data is None:
            (path / name).mkdir(parents=True, exist_ok=True)
        else:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)

    for name, data in sorted(built.tree.items()):
        put(name, data)

    def do() -> None:
        with locked(workspace, artifact_lock(built.request.name)):
            commit(path, built.request, built.summary, built.started)

    def work_is_whole() -> None:
        for name, data in built.tree.items():
            file = path / name
            assert file.is_dir() if data is None else file.is_file() and file.read_bytes() == data, f"{name} is lost"

    def rebuild(work: WorkDir) -> Summary:
        work_is_whole()
        return built.summary

    def check() -> None:
        finished = find(workspace, built.request)
        if finished is None:
            work_is_whole()
        else:
            assert verify_artifact(finished) == []
        after = materialise(workspace, built.request, rebuild)
        assert after.reused == (finished is not None) and after.hashes == built.hashes
        assert verify_artifact(after) == [] and not list(after.path.rglob(".*")), "working state stays"

    return Act(f"commit of {built.request.kind}", workspace, do, check)


def _new_artifact(folder: Path) -> Act:
    """All of a small artifact: its first workspace, its folders, a part that is finished, its commit."""
    request, content = Request("generated", 1, {"x": 1}, {}), {"part": b"p" * 5000, "in/file": b"f" * 3000}

    def build(work: WorkDir) -> Summary:
        if not part_is_whole(work.path / "part"):
            write_bytes(work.path / "part", content["part"])
            finish_part(work.path / "part")
        (work.path / "in").mkdir(exist_ok=True)
        (work.path / "in" / "file").write_bytes(content["in/file"])
        return Summary()

    def check() -> None:
        if found := find(folder, request):
            assert verify_artifact(found) == []
        after = materialise(folder, request, build)
        assert {name: (after.path / name).read_bytes() for name in after.hashes} == content
        assert verify_artifact(after) == [] and not list(after.path.rglob(".*"))

    return Act("a whole artifact", folder, lambda: materialise(folder, request, build), check)


def _damaged_artifact(folder: Path) -> Act:
    """An artifact with a changed file, which is built again; its other part is kept."""
    request, content = Request("generated", 1, {"x": 2}, {}), {"part-1": b"1" * 4000, "part-2": b"2" * 4000}

    def build(work: WorkDir) -> Summary:
        for name, data in content.items():
            if not part_is_whole(work.path / name):
                write_bytes(work.path / name, data)
                finish_part(work.path / name)
        return Summary()

    (materialise(folder, request, build).path / "part-2").write_bytes(b"3" * 4000)

    def check() -> None:
        after = materialise(folder, request, build, parts="part-*")
        assert {name: (after.path / name).read_bytes() for name in after.hashes} == content
        assert verify_artifact(after) == [] and not list(after.path.rglob(".*"))

    return Act("a damaged artifact", folder, lambda: materialise(folder, request, build, parts="part-*"), check)


# ---- what is no artifact ------------------------------------------------------------------------------------------------


def _version(folder: Path) -> Act:
    """The second version of a workspace: its bundle, its record, its verdict and its promotion."""
    release = Release(folder)
    release.publish("old")
    bundle, index = release.parts["new lora_bundle"], release.parts["new image_index"]
    file = (bundle.path / "stage1" / "file").read_bytes()
    request = Request("lora_bundle", 1, bundle.spec, bundle.inputs)
    shutil.rmtree(bundle.path)

    def build(work: WorkDir) -> Summary:
        (work.path / "stage1").mkdir(exist_ok=True)
        (work.path / "stage1" / "file").write_bytes(file)
        return Summary()

    def do() -> int | None:
        return publish(folder, materialise(folder, request, build), index).serves

    def check() -> None:
        assert damaged_records(folder) == [] and readable_versions(folder)[1] == []
        for version in readable_versions(folder)[0]:
            assert verify_artifact(bundle_of(folder, version)) == []
        assert do() == 2 and published_numbers(folder) == [1, 2] and damaged_records(folder) == []

    return Act("a version", folder, do, check)


def _collection(folder: Path) -> Act:
    """Three versions, of which `gc` removes the first one's bundle and what it was made from."""
    release = Release(folder)
    index = make_artifact(folder, "image_index", {"of": "newest"}, data="1" * 16)
    release.parts |= {
        "newest image_index": index,
        "newest lora_bundle": make_artifact(folder, "lora_bundle", {}, index),
    }
    numbers = [release.publish(name) for name in ("old", "new", "newest")]
    first = {part.name for name, part in release.parts.items() if name.startswith("old ")}
    others = {part.name for part in release.parts.values()} | {release.encoder.name}
    policy, now = Policy(keep_versions=1, keep_days=0), datetime(2100, 1, 1, tzinfo=UTC)

    def check() -> None:
        there = {artifact.name: artifact for artifact in all_artifacts(folder)}
        assert published_numbers(folder) == numbers and there.keys() <= others
        assert others - first <= there.keys(), f"collected {others - first - there.keys()}"
        assert not any(verify_artifact(artifact) for artifact in there.values())
        assert all(collected(folder, name) for name in first - there.keys()), "gone, and no record tells"
        collect(folder, policy, now)
        gone = others - {artifact.name for artifact in all_artifacts(folder)}
        assert collected_records(folder).known.keys() == gone and gone and not list(folder.glob("*/.gone-*"))
        assert would_collect(folder, policy, now).plan.is_empty

    return Act("a collection", folder, lambda: collect(folder, policy, now), check)


def _held_out(folder: Path) -> Act:
    def add(name: str) -> None:
        with eval_record(folder, 7) as record:
            record.add("set", name, name)

    def order() -> list[str]:
        with eval_record(folder, 7) as record:
            return list(record.order_for("set"))

    add("first")

    def check() -> None:
        assert damaged_choices(folder) == [] and order() in (["first"], ["first", "second"])
        add("second")
        assert order() == ["first", "second"]

    return Act("held-out pictures", folder, lambda: add("second"), check)


def _notes(run: Run, pictures: Path) -> Act:
    """The notes of a scan, which are there of fewer files."""
    scan(run)
    Image.new("RGB", (80, 80)).save(pictures / "extra.png")
    expected: list[Any] = []

    def check() -> None:
        if not expected:
            expected.append(scan(run))
        for _ in range(2):  # the second reads what the first wrote
            assert scan(run).equals(expected[0])

    return Act("notes of a scan", run.workspace / ".scan", lambda: scan(run), check)


def _lease(folder: Path) -> Act:
    @leased
    def take() -> None:
        for name in ("kind/0123456789abcdef", "kind/fedcba9876543210"):
            take_lease(folder, name)

    def check() -> None:
        assert running_leases(folder) == {}, "no run runs"
        take()
        drop_ended_leases(folder)
        assert not list((folder / ".leases").iterdir())

    take()
    return Act("a lease", folder, take, check)


def _picture(folder: Path) -> Act:
    old, new = (Image.fromarray(np.full((60, 60, 3), value, np.uint8)) for value in (0, 200))
    file = folder / "sheet.jpg"
    save_picture(old, file)

    def save() -> None:
        with written(folder):
            save_picture(new, file)

    def check() -> None:
        with Image.open(file) as found:
            assert int(np.asarray(found)[0, 0, 0]) in (0, 200)
        save()
        with Image.open(file) as found:
            assert int(np.asarray(found)[0, 0, 0]) == 200

    return Act("a sheet", folder, save, check)


def _each(folder: Path, makers: Sequence[Callable[[Path], Act]]) -> list[Act]:
    """An act of each, in a folder of its own."""
    acts = []
    for make in makers:
        place = folder / make.__name__.strip("_")
        place.mkdir(parents=True)
        acts.append(make(place))
    return acts


def quick_acts(folder: Path) -> list[Act]:
    """Those of a test of some seconds."""
    return _each(folder, (_new_artifact,))


def planted_acts(folder: Path) -> list[Act]:
    """Those that are wrong: a file written in place; one renamed before it is flushed; one whose name is not flushed before
    another file says that it is there.
    """
    return _each(folder, (_in_place, _renamed_early, _named_late))


def _in_place(folder: Path) -> Act:
    file = folder / "file"
    file.write_bytes(b"old" * 99)

    def check() -> None:
        assert file.read_bytes() in (b"old" * 99, b"new" * 99)

    return Act("in place", folder, lambda: file.write_bytes(b"new" * 99), check)


def _renamed_early(folder: Path) -> Act:
    file = folder / "file"
    file.write_bytes(b"old")

    def do() -> None:
        (folder / "other").write_bytes(b"new")
        (folder / "other").replace(file)
        fsync_path(folder)

    def check() -> None:
        assert file.read_bytes() in (b"old", b"new")

    return Act("renamed early", folder, do, check)


def _named_late(folder: Path) -> Act:
    first, second = folder / "in" / "first", folder / "second"

    def do() -> None:
        first.parent.mkdir()
        write_bytes(first, b"1")
        write_bytes(second, b"2")

    def check() -> None:
        assert first.exists() or not second.exists()

    (folder / "old").touch()
    return Act("named late", folder, do, check)


def gc_acts(folder: Path) -> list[Act]:
    return _each(folder, (_collection,))


def light_acts(folder: Path) -> list[Act]:
    """Those that need no torch."""
    acts = _each(folder, (_new_artifact, _damaged_artifact, _version, _collection, _held_out, _lease, _picture))
    (folder / "data" / "pictures").mkdir(parents=True)
    with Children(1, Limits(), ("deepfloyd_core.index.index",)) as children, noted() as built:
        world = DataWorld(folder / "data", children)
        run = _small_world(world)
        index = world.index(run)
        world.pixels(run, index, 1)
        world.eval_set(run, index)
    notes = _notes(run, folder / "data" / "pictures")
    return [*acts, notes, *(commit_of(each, folder / "commits") for each in built)]


def _small_world(world: DataWorld) -> Run:
    rng = np.random.default_rng(0)
    for number in range(4):
        world.add(f"{number}.png", rng.integers(0, 255, (70, 70, 3), np.uint8), f"caption {number}")
    return world.load(stages=(1,))

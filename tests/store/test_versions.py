"""Versions: which one serves, what verify asks of them, and that a lost or damaged piece is named, with who needs it."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from releases import Release, deepfloyd, make
from small_run import SmallRun

from deepfloyd_core.bundle.verify import verify_workspace
from deepfloyd_core.errors import ArtifactError, ConfigError, DeepFloydError
from deepfloyd_core.files import read_sealed, write_sealed
from deepfloyd_core.store.manifest import MANIFEST
from deepfloyd_core.store.registry import news_of, publish
from deepfloyd_core.store.versions import bundle_of, champion, find_version, versions
from deepfloyd_core.store.working_state import REQUEST


@pytest.fixture
def release(tmp_path: Path) -> Release:
    return Release(tmp_path / "workspace")


def test_a_version_says_which_run_file_it_is_of_where_two_share_a_workspace(release: Release) -> None:
    first = release.outcome("old", "/runs/one.toml")
    assert news_of(release.workspace, first) == "published version 1"
    second = release.outcome("new", "/runs/two.toml")
    assert news_of(release.workspace, second) == (
        "published version 2, of two.toml. Version 1, of one.toml, is no longer `latest`: use --version 1, or give "
        "each run file a workspace"
    )
    third = release.outcome("old", "/runs/two.toml")
    assert news_of(release.workspace, third) == "published version 3: the bundle of version 1 again"
    lines = deepfloyd("ls", str(release.workspace)).output.splitlines()
    assert [line.split()[3] for line in lines if ".toml" in line] == ["one.toml", "two.toml", "two.toml"]


def test_a_version_of_the_same_weights_says_so(tmp_path: Path) -> None:
    first, second = (make(tmp_path, "stage1_lora", {"of": number}) for number in range(2))
    published = []
    for number, lora in enumerate((first, first, second)):
        index = make(tmp_path, "image_index", {"of": number}, data="1" * 16)
        published.append(publish(tmp_path, make(tmp_path, "lora_bundle", {}, index, lora), index))
    assert [news_of(tmp_path, outcome) for outcome in published] == [
        "published version 1", "published version 2: the same weights as version 1", "published version 3",
    ]  # fmt: skip


# ---- which one serves -------------------------------------------------------------------------------------------------


def test_a_bundle_that_is_not_the_champion_s_gets_the_next_number_also_when_it_had_one(release: Release) -> None:
    assert [release.publish(name) for name in ("old", "old", "new", "new", "old", "old")] == [1, 1, 2, 2, 3, 3]
    old, new, again = versions(release.workspace)
    assert old.bundle == again.bundle != new.bundle
    assert (old.image_index, old.data) == (again.image_index, again.data)
    assert find_version(release.workspace, "latest") == champion(release.workspace) == again
    assert find_version(release.workspace, "2") == new
    assert news_of(release.workspace, release.outcome("old")) == "no change: version 3 serves"
    assert news_of(release.workspace, release.outcome("new")) == "published version 4: the bundle of version 2 again"


def test_a_version_that_is_not_there_is_named_beside_those_that_are(release: Release) -> None:
    with pytest.raises(ConfigError, match="published: none yet"):
        find_version(release.workspace, "latest")
    release.publish("old")
    for name in ("2", "newest", "-1", "²"):
        with pytest.raises(ConfigError, match="published: 1"):
            find_version(release.workspace, name)


def damage(release: Release, number: int, record: bytes) -> Path:
    """Put something else in the place of a version's record."""
    file = release.workspace / "versions" / f"{number:04d}.json"
    if record == b"another":
        shutil.copyfile(file.with_name("0001.json"), file)
    elif record == b"foreign":
        write_sealed(file, {"number": number, "color": "blue"})
    else:
        file.write_bytes(record)
    return file


@pytest.mark.parametrize("record", [b"", b"{}", b"\x00" * 200, b"another", b"foreign"])
def test_a_damaged_record_of_an_old_version_is_named_and_stops_only_what_asks_for_it(
    release: Release, record: bytes
) -> None:
    for name in ("old", "new", "old"):
        release.publish(name)
    first, _, latest = versions(release.workspace)
    damage(release, 2, record)
    assert find_version(release.workspace, "latest") == champion(release.workspace) == latest
    assert find_version(release.workspace, "1") == first
    assert [release.publish(name) for name in ("old", "new", "new")] == [3, 4, 4]
    with pytest.raises(ArtifactError, match=r"0002\.json .*Take it from a backup"):
        find_version(release.workspace, "2")
    (line,) = verify_workspace(release.workspace).records
    assert "0002.json" in line and "Take it from a backup" in line
    assert "0002.json" in deepfloyd("ls", str(release.workspace)).output


@pytest.mark.parametrize("record", [b"", b"another"])
def test_the_number_of_a_damaged_record_is_not_used_again_when_it_was_the_champion_s(
    release: Release, record: bytes
) -> None:
    release.publish("old")
    release.publish("new")
    lost = damage(release, 2, record)
    with pytest.raises(ArtifactError, match=r"0002\.json .*--version 1"):
        find_version(release.workspace, "latest")
    with pytest.raises(ConfigError, match="published: 1, 2"):
        find_version(release.workspace, "3")
    assert [release.publish(name) for name in ("old", "old")] == [3, 3]
    assert find_version(release.workspace, "latest").number == 3
    assert lost.read_bytes() == (record if record != b"another" else lost.with_name("0001.json").read_bytes())


@pytest.mark.parametrize("command", [("run",), ("retrain",), ("generate", "--prompt", "a star", "--version", "1")])
def test_a_damaged_record_is_a_note_of_every_command_that_publishes_or_draws(
    small_run: SmallRun, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    release = Release(small_run.workspace)
    release.publish("old")
    release.publish("new")
    damage(release, 2, b"")

    def prefect_server(home: Path, while_it_starts: object) -> None:
        raise ConfigError("as far as the server")

    monkeypatch.setattr("flows.serving.server.prefect_server", prefect_server)
    done = deepfloyd(command[0], str(small_run.config), *command[1:])
    assert str(done.exception) == "as far as the server"
    assert done.stderr.replace("\n", "").count("0002.json") == 1


# ---- verify -----------------------------------------------------------------------------------------------------------


def test_a_whole_workspace_has_no_fault_and_other_files_in_it_are_no_artifacts(release: Release) -> None:
    for name in ("old", "new", "old"):
        release.publish(name)
    (release.workspace / "node_modules" / "left-pad").mkdir(parents=True)
    (release.workspace / "node_modules" / "left-pad" / MANIFEST).write_text("{}")
    (release.workspace / "versions" / ".tmp-host-1-0004.json").write_text("{")
    found = verify_workspace(release.workspace)
    assert (found.faults, found.notes, found.artifacts, found.versions) == (0, (), 9, 3)
    assert deepfloyd("verify", str(release.workspace)).exit_code == 0


@pytest.mark.parametrize("part", ["image_index", "stage1_pixels", "a_kind_that_came_later", "lora_bundle"])
@pytest.mark.parametrize("harm", ["directory", "manifest", "file"])
def test_whatever_a_version_needs_is_named_when_it_is_gone_and_so_are_the_versions(
    release: Release, part: str, harm: str
) -> None:
    for name in ("old", "new", "old"):
        release.publish(name)
    lost = release.parts[f"old {part}"].path
    if harm == "directory":
        shutil.rmtree(lost)
    else:
        (lost / (MANIFEST if harm == "manifest" else "stage1/file")).unlink()
    done = deepfloyd("verify", str(release.workspace))
    assert done.exit_code == 1
    (line,) = (line for line in done.output.replace("\n", " ").split("  ") if str(lost) in line)
    assert "needed by versions 1, 3" in line and ", 1 fault\n" in done.output
    assert "rebuilds missing artifacts" in done.output


@pytest.mark.parametrize("harm", ["directory", "manifest", "garbage"])
def test_what_lies_below_what_is_lost_is_named_as_well(release: Release, harm: str) -> None:
    """Also where every manifest that named it is gone."""
    release.publish("old")
    release.publish("new")
    kinds = ("lora_bundle", "a_kind_that_came_later", "stage1_pixels", "image_index")
    lost = [release.parts[f"old {kind}"].path for kind in kinds]
    for path in lost:
        if harm == "directory":
            shutil.rmtree(path)
        elif harm == "manifest":
            (path / MANIFEST).unlink()
        else:
            (path / MANIFEST).write_bytes(b"garbage")
    found = verify_workspace(release.workspace)
    lines = found.damaged if harm == "garbage" else found.missing
    assert len(lines) == found.faults == 4
    for path in lost:
        (line,) = (line for line in lines if str(path) in line)
        assert line.endswith("; needed by version 1")


def test_where_a_manifest_was_lost_before_its_version_was_published_verify_says_that_more_may_be_missing(
    release: Release,
) -> None:
    lora, pixels = release.parts["old a_kind_that_came_later"].path, release.parts["old stage1_pixels"].path
    shutil.rmtree(lora)
    shutil.rmtree(pixels)
    release.publish("old")
    (line,) = verify_workspace(release.workspace).missing
    assert line == f"{lora}; needed by version 1; its inputs are not known, so more may be missing"


def test_what_every_version_needs_is_named_once_with_all_of_them(release: Release) -> None:
    release.publish("old")
    release.publish("new")
    shutil.rmtree(release.encoder.path)
    found = verify_workspace(release.workspace)
    assert found.missing == (f"{release.encoder.path}; needed by versions 1, 2",)


def test_what_no_version_needs_may_be_gone_and_what_was_made_from_it_is_noted(release: Release) -> None:
    release.publish("old")
    shutil.rmtree(release.parts["new lora_bundle"].path)
    shutil.rmtree(release.parts["new stage1_pixels"].path)
    found = verify_workspace(release.workspace)
    assert found.faults == 0
    (note,) = found.notes
    assert str(release.parts["new a_kind_that_came_later"].path) in note and "no version needs it" in note
    assert release.parts["new stage1_pixels"].fingerprint in note
    shutil.rmtree(release.parts["new a_kind_that_came_later"].path)
    assert verify_workspace(release.workspace).notes == ()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_lost_record_is_a_fault_whichever_it_is(release: Release, number: int) -> None:
    third = make(release.workspace, "lora_bundle", {"third": True}, release.parts["new image_index"])
    release.publish("old")
    release.publish("new")
    publish(release.workspace, third, release.parts["new image_index"])
    assert verify_workspace(release.workspace).faults == 0
    lost = versions(release.workspace)[number - 1].bundle
    (release.workspace / "versions" / f"000{number}.json").unlink()
    found = verify_workspace(release.workspace)
    assert any(f"lora_bundle/{lost} belongs to no version" in line for line in found.records)
    assert (f"000{number}.json" in " ".join(found.records)) == (number < 3), "a gap is known by what comes after it"


@pytest.mark.parametrize("garbage", [b"", b"{}", b"null", b"\xff" * 50, b'{"seal": 3}'])
def test_a_manifest_that_is_garbage_is_a_fault_and_breaks_no_list(release: Release, garbage: bytes) -> None:
    release.publish("old")
    release.publish("new")
    file = release.parts["old stage1_pixels"].path / MANIFEST
    file.write_bytes(garbage)
    (line,) = verify_workspace(release.workspace).damaged
    assert str(file) in line and line.endswith("needed by version 1")
    done = deepfloyd("ls", str(release.workspace))
    assert done.exit_code == 0 and "damaged" in done.output


# ---- a lost bundle at the doors that use it ---------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["promote {} 2", "rollback {}", "publish {} 1 {}-copy", "publish {} 2 {}-copy"])
def test_a_bundle_with_a_flipped_bit_neither_serves_nor_leaves_the_workspace(release: Release, command: str) -> None:
    for name in ("new", "old", "new"):
        release.publish(name)
    before = find_version(release.workspace, "latest")
    for name in ("old", "new"):
        file = release.parts[f"{name} lora_bundle"].path / "stage1" / "file"
        data, times = file.read_bytes(), file.stat()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    done = deepfloyd(*command.format(*[release.workspace] * 2).split())
    assert done.exit_code == 1 and "stage1/file has other bytes than its manifest says" in str(done.exception)
    assert find_version(release.workspace, "latest") == before
    assert not Path(f"{release.workspace}-copy").exists()


@pytest.mark.parametrize("harm", ["directory", "manifest", "file"])
def test_a_lost_bundle_is_one_clear_sentence(release: Release, harm: str) -> None:
    release.publish("old")
    (version,) = versions(release.workspace)
    bundle = bundle_of(release.workspace, version)
    lost: dict[str, Callable[[], None]] = {
        "directory": lambda: shutil.rmtree(bundle.path),
        "manifest": lambda: (bundle.path / MANIFEST).unlink(),
        "file": lambda: (bundle.path / "stage1" / "file").unlink(),
    }
    lost[harm]()
    with pytest.raises(ArtifactError, match=r"Version 1 cannot be used: .*`deepfloyd run` rebuilds its bundle"):
        bundle_of(release.workspace, version)
    assert "Version 1 cannot be used" in deepfloyd("ls", str(release.workspace)).output.replace("\n", " ")
    shown = deepfloyd("show", str(release.workspace), bundle.fingerprint[:6])
    told = {
        "directory": "is missing. `deepfloyd verify",
        "manifest": "is not finished. `deepfloyd verify",
        "file": "damaged",
    }
    assert told[harm] in (shown.output if harm == "file" else str(shown.exception)).replace("\n", " ")
    assert "lost or damaged" in deepfloyd("show", str(release.workspace), "1").output or harm == "file"


# ---- options that are given twice -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "option"),
    [(("generate", "run.toml", "--prompt", "x", "--seeds", "1", "--seeds", "2"), "--seeds"),
     (("generate", "run.toml", "--prompt", "x", "--version=1", "--version=2"), "--version"),
     (("prepare", "run.toml", "--preview", "3", "--set", "a=1", "--preview", "4"), "--preview"),
     (("ui", "--port", "1", "--port", "2"), "--port")],
)  # fmt: skip
def test_an_option_of_one_value_that_is_given_twice_is_refused(arguments: tuple[str, ...], option: str) -> None:
    done = deepfloyd(*arguments)
    assert done.exit_code == 2
    assert f"{option} is given 2 times" in done.output


@pytest.mark.parametrize(
    "changed", [{"bundle": -1}, {"bundle": "../../x"}, {"image_index": "a\0"}, {"lineage": {"a": 1}}, {"more": 1}]
)
def test_a_sealed_record_that_is_none_of_a_version_costs_that_version(
    release: Release, changed: dict[str, object]
) -> None:
    for name in ("old", "new"):
        release.publish(name)
    place = release.workspace / "versions" / "0002.json"
    write_sealed(place, read_sealed(place, "") | changed)
    for command in ("ls", "history", "show {} 1", "show {} 2", "gc", "promote {} 1"):
        words = (command if "{}" in command else f"{command} {{}}").format(release.workspace).split()
        done = deepfloyd(*words)
        assert done.exception is None or isinstance(done.exception, SystemExit | DeepFloydError), command
        assert command != "show {} 2" or str(place) in str(done.exception)
    assert champion(release.workspace) == find_version(release.workspace, "1")


# ---- what a damaged record costs --------------------------------------------------------------------------------------

READERS = ("ls", "history", "verify", "gc", "show {} 1", "diff {} 1 3", "promote {} 1", "block {} 1 --reason x")
DESTRUCTIVE = ("remove", "delete")


@pytest.mark.parametrize("record", [b"{}", b"\x00" * 200, b"[" * 100_000, b"foreign"])
def test_no_reader_of_records_advises_to_remove_what_is_damaged(release: Release, record: bytes) -> None:
    """Whatever record is damaged: of a version, of an event, of an artifact that is finished, unfinished or collected."""
    for name in ("old", "new", "old"):
        release.publish(name)
    index, bundle = (release.parts[f"new {kind}"].path for kind in ("image_index", "lora_bundle"))
    shutil.move(index / MANIFEST, index / REQUEST)
    places = [release.workspace / "versions" / "0002.json", release.workspace / "versions" / "events" / "000003.json"]
    places += [index / REQUEST, bundle / MANIFEST, release.workspace / "held_out" / "7.json"]
    for place in places:
        place.parent.mkdir(exist_ok=True)
        if record == b"foreign":
            write_sealed(place, {"color": "blue"})
        else:
            place.write_bytes(record)
    commands = [*READERS, f"show {{}} {index.name[:8]}", f"show {{}} {bundle.name[:8]}", "show {} 2", "promote {} 2"]
    for command in commands:
        words = (command if "{}" in command else f"{command} {{}}").format(release.workspace).split()
        done = deepfloyd(*words)
        told = f"{done.output} {done.exception or ''}".replace("\n", " ")
        assert done.exception is None or isinstance(done.exception, SystemExit | DeepFloydError), command
        advice = [line for line in told.split(". ") if line.strip().lower().startswith(DESTRUCTIVE)]
        assert not advice, command
    assert "champion" in deepfloyd("ls", str(release.workspace)).output
    assert find_version(release.workspace, "1").number == 1 and find_version(release.workspace, "3").number == 3

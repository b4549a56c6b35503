"""What was held out once stays so, whatever comes, goes and is asked for between; nothing measured on is trained on."""

import random
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from artifact_rows import live_rows
from copies import COPIES, scene, trained
from data_world import DataWorld

from deepfloyd_core.bundle.verify import verify_workspace
from deepfloyd_core.config.run import Run
from deepfloyd_core.crops.eval_choice import Choice, check_left, choose_held_out, held_out_pictures
from deepfloyd_core.crops.eval_record import copy_closed, damaged_records, eval_record
from deepfloyd_core.errors import ArtifactError, DataError
from deepfloyd_core.files import write_sealed
from deepfloyd_core.index.ledger import INDEX_FILE, SCHEMA
from deepfloyd_core.store.artifacts import Artifact


def split(world: DataWorld, *entries: dict[str, Any], **keys: Any) -> tuple[set[str], set[str]]:
    """The names of the pictures that are measured on, and of those that are trained on."""
    choose_held_out.cache_clear()  # as a process of its own
    run = world.load(*entries, **{"stages": (1,), "num_eval_images": 4, **keys})
    index = world.index(run)
    evals = world.eval_set(run, index)
    return {row["source"] for row in live_rows(evals)}, trained(world, run, index, evals)


def draw(folder: Path, numbers: range) -> None:
    folder.mkdir(exist_ok=True)
    for number in numbers:
        scene(number).save(folder / f"x{number:02d}.png", compress_level=1)


def entry(folder: Path, **keys: Any) -> dict[str, Any]:
    return {"id": folder.name, "instance_data_dir": str(folder), "caption_strategy": "filename", **keys}


def test_of_a_held_out_picture_and_an_earlier_copy_the_one_that_is_kept_is_held_out(world: DataWorld) -> None:
    first, pictures = entry(world.folder / "pictures", duplicates="first"), world.folder / "pictures"
    draw(pictures, range(12))
    held, _ = split(world, first)
    for name in held:
        world.add(f"a{name[1:3]}.jpg", COPIES["q95.jpg"](scene(int(name[1:3]))), None)
    now, seen = split(world, first)
    assert now == {f"a{name[1:3]}.jpg" for name in held}
    assert seen == {f"x{number:02d}.png" for number in range(12)} - held


def test_copies_stay_held_out_when_their_pictures_go(world: DataWorld) -> None:
    pictures = world.folder / "pictures"
    draw(pictures, range(12))
    held, _ = split(world, entry(pictures))
    copies = {f"{name[:3]} (1).jpg" for name in held}
    for name in copies:
        world.add(name, COPIES["q95.jpg"](scene(int(name[1:3]))), None)
    assert split(world, entry(pictures))[0] == held
    for name in held:
        (pictures / name).unlink()
    now, seen = split(world, entry(pictures))
    assert now == copies
    assert seen == {f"x{number:02d}.png" for number in range(12)} - held


def test_a_number_that_goes_up_and_back_down_gives_the_first_choice(world: DataWorld) -> None:
    pictures = world.folder / "pictures"
    draw(pictures, range(6))
    first, _ = split(world, entry(pictures), num_eval_images=3)
    draw(pictures, range(6, 26))
    assert split(world, entry(pictures), num_eval_images=3)[0] == first
    more, _ = split(world, entry(pictures), num_eval_images=8)
    assert first < more and len(more) == 8
    assert split(world, entry(pictures), num_eval_images=3)[0] == first
    assert split(world, entry(pictures), num_eval_images=0)[0] == set()
    assert split(world, entry(pictures), num_eval_images=3)[0] == first


def test_a_data_set_that_is_away_for_a_run_keeps_what_it_held_out(world: DataWorld) -> None:
    one, two = world.folder / "one", world.folder / "two"
    draw(one, range(8))
    draw(two, range(20, 28))
    held, _ = split(world, entry(one), entry(two))
    split(world, entry(one))
    draw(two, range(28, 48))
    assert split(world, entry(one), entry(two))[0] == held
    assert split(world, entry(one), entry(two, id="renamed"))[0] == held, "or goes by another name"


def test_a_removed_eval_set_is_made_again_with_the_same_pictures(world: DataWorld) -> None:
    pictures = world.folder / "pictures"
    draw(pictures, range(6))
    held, _ = split(world, entry(pictures))
    draw(pictures, range(6, 26))
    shutil.rmtree(world.folder / "workspace" / "eval_set")
    assert split(world, entry(pictures))[0] == held


def test_a_held_out_picture_that_is_too_small_for_a_further_stage_is_not_trained_on(world: DataWorld) -> None:
    pictures = world.folder / "pictures"
    draw(pictures, range(8))  # 200 x 150 px: Stage I alone
    held, _ = split(world, entry(pictures))
    for number in range(20, 26):
        world.add(f"large {number}.png", scene(number, 400), None)
    now, seen = split(world, entry(pictures), stages=(1, 2))
    assert all(name.startswith("large") for name in now) and len(now) == 4
    assert not seen & held
    assert (now, seen) == split(world, entry(pictures), stages=(1, 2))


def test_stage1_alone_holds_out_pictures_that_stage2_can_use_as_well(world: DataWorld) -> None:
    pictures = world.folder / "pictures"
    draw(pictures, range(8))  # 200 x 150 px: Stage I alone
    for number in range(20, 26):
        world.add(f"large {number}.png", scene(number, 400), None)
    alone, _ = split(world, entry(pictures))
    assert all(name.startswith("large") for name in alone) and len(alone) == 4
    shutil.rmtree(world.folder / "workspace")
    assert split(world, entry(pictures), stages=(1, 2))[0] == alone


def test_a_set_to_measure_on_that_leaves_nothing_else_fails_with_the_index(world: DataWorld) -> None:
    pictures, own = world.folder / "pictures", world.folder / "own"
    draw(pictures, range(4))
    own.mkdir()
    for number in range(4):
        (own / f"{number}.jpg").write_bytes(COPIES["q95.jpg"](scene(number)))
    run = world.load(entry(pictures), entry(own), stages=(1,), eval_dataset_id="own", num_eval_images=None)
    index = world.index(run)
    with pytest.raises(
        DataError, match=r"Stage 1 has no picture to train on: each of its 8 .* Remove duplicates from own"
    ):
        check_left(run, index, choose_held_out(run, index))


def test_a_data_set_of_copies_of_held_out_pictures_alone_is_named(world: DataWorld) -> None:
    pictures, two = world.folder / "pictures", world.folder / "two"
    draw(pictures, range(8))
    held, _ = split(world, entry(pictures))
    shutil.copytree(pictures, two)
    for path in two.iterdir():
        if path.name not in held:
            path.unlink()
    run = world.load(entry(pictures), entry(two), stages=(1,), num_eval_images=4, eval_dataset_id="pictures")
    index = world.index(run)
    (line,) = check_left(run, index, choose_held_out(run, index))
    assert line.startswith("two: stage 1 trains on none of its pictures: each of its 4 is held out")
    run = world.load(entry(pictures), stages=(1,), num_eval_images=4)
    index = world.index(run)
    assert check_left(run, index, choose_held_out(run, index)) == []


def test_a_damaged_record_is_named_and_nothing_is_chosen(world: DataWorld) -> None:
    pictures = world.folder / "pictures"
    draw(pictures, range(8))
    split(world, entry(pictures))
    (path,) = (world.folder / "workspace" / "held_out").iterdir()
    assert verify_workspace(world.folder / "workspace").records == ()
    path.write_text(path.read_text().replace('"sets"', '"sits"'))
    assert str(path) in verify_workspace(world.folder / "workspace").records[0]
    with pytest.raises(ArtifactError, match=r"was changed after it was written\. Take it from a backup, or move it"):
        split(world, entry(pictures))
    write_sealed(path, {"color": "blue"})
    assert "not of held-out pictures" in verify_workspace(world.folder / "workspace").records[0]


def ledger_of(folder: Path, number: int, pictures: dict[str, tuple[str, str, str | None]]) -> Artifact:
    """An index of pictures that are names alone: image_id -> (data set, group or "", reason)."""
    groups: dict[str, str] = {}
    rows = []
    for image_id, (name, group, reason) in sorted(pictures.items()):
        first = groups.setdefault(group, image_id) if group else None
        rows.append({"source": image_id, "dataset_id": name, "status": "rejected" if reason else "accepted",
                     "reason": reason, "image_id": image_id, "bytes": 1, "captions": ["a"], "group": first,
                     "stage2_reason": "not_for_this_stage"})  # fmt: skip
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    path = folder / "image_index" / f"{number:016x}"
    path.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path / INDEX_FILE)
    return Artifact("image_index", path.name, path)


def test_whatever_comes_goes_and_is_asked_for_no_choice_of_an_index_changes_and_none_is_forgotten(
    world: DataWorld,
) -> None:
    """Subjects whose copies come and go in two data sets, and runs that ask for other numbers and for one of the sets."""
    rng = random.Random(3)
    (world.folder / "pictures" / "x.png").touch()
    one, two = entry(world.folder / "pictures", id="one"), entry(world.folder / "pictures", id="two")
    load = {("one", "two"): (one, two), ("one",): (one,), ("two",): (two,)}
    runs = {
        (sets, count): world.load(*load[sets], stages=(1,), num_eval_images=count) for sets in load for count in (2, 4)
    }
    subjects = [f"{rng.getrandbits(256):064x}" for _ in range(40)]
    copies = {f"{rng.getrandbits(256):064x}": subject for subject in subjects for _ in range(4)}
    there: dict[str, str] = {}
    seen: dict[int, tuple[Run, Artifact, tuple[Choice, ...]]] = {}
    measured: dict[str, set[str]] = {"one": set(), "two": set()}  # subjects, of each set
    known: dict[str, set[str]] = {"one": set(), "two": set()}  # their copies that were there with them
    for step in range(100):
        for image_id in rng.sample(sorted(copies), 8):
            if there.pop(image_id, None) is None:
                there[image_id] = rng.choice(["one", "two"])
        sets = rng.choice([*load, ("one", "two")])
        pictures = {one: (name, copies[one], rng.choice([None] * 9 + ["duplicate"])) for one, name in there.items()}
        pictures = {one: row for one, row in pictures.items() if row[0] in sets}
        count = rng.choice([2, 4])
        if any(sum(row[0] == name and not row[2] for row in pictures.values()) < 30 for name in sets):
            continue
        run = runs[sets, count]
        index = ledger_of(world.folder, step, pictures)
        choose_held_out.cache_clear()
        choices = choose_held_out(run, index)
        assert all(len(choice.ids) == count for choice in choices)
        out = set(held_out_pictures(index, choices).to_pylist())
        held = {copies[one] for one in out}
        assert {one for one, row in pictures.items() if copies[one] in held and not row[2]} == out, (
            "subjects as a whole"
        )
        seen[step] = run, index, choices
        for choice in choices:
            name, chosen = choice.dataset_id, {copies[one] for one in choice.ids}
            linked = {copies[one] for one in pictures if one in known[name]} & measured[name]
            still = linked & {copies[one] for one, row in pictures.items() if row[0] == name and not row[2]}
            assert still <= chosen if len(still) <= count else chosen <= still
            measured[name] |= chosen
            known[name] |= {one for one in pictures if copies[one] in linked | chosen}
    assert len(seen) > 50
    for run, index, choices in seen.values():
        choose_held_out.cache_clear()
        assert choose_held_out(run, index) == choices


def test_what_a_killed_run_left_of_a_record_is_none(tmp_path: Path) -> None:
    with eval_record(tmp_path / "one", 7) as record:
        record.add("set", "a", "a")
    (tmp_path / "one" / "held_out" / ".tmp-host-1-7.json").write_bytes(b"{ half")
    assert damaged_records(tmp_path / "one") == []
    (tmp_path / "two").mkdir()
    copy_closed(tmp_path / "one", tmp_path / "two")
    assert [path.name for path in (tmp_path / "two" / "held_out").iterdir()] == ["7.json"]

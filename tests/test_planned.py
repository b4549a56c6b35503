"""What a run would publish is known from the index and the settings; tests of whole runs hold it equal to what they made."""

from typing import Any

import pytest

from deepfloyd_core.artifacts import MANIFEST
from deepfloyd_core.eval_choice import choose_held_out
from deepfloyd_core.planned import planned_bundle


def draw(world: Any, numbers: range) -> None:
    from PIL import Image

    for number in numbers:
        world.add(f"{number}.png", Image.new("RGB", (64 + number, 64), (number, 2 * number, 255 - number)))


def test_what_decides_the_bundle_changes_the_plan_and_nothing_else_does(world: Any) -> None:
    draw(world, range(4))

    def planned(**keys: Any) -> str:
        run = world.load(stages=(1,), **keys)
        request = planned_bundle(run, world.index(run))
        assert request is not None and not run.workspace.joinpath("stage1_pixels").exists()
        return request.fingerprint

    plain = planned()
    assert plain == planned(workers=1, num_threads=2, device="cpu", task_runner="processes", max_rejected_share=0.9)
    for keys in ({"seed": 7}, {"learning_rate": 1e-4}, {"validation_prompt": "a star"}, {"num_validation_images": 3},
                 {"num_eval_images": 2}, {"tokenizer_max_length": 80}, {"validation_num_inference_steps": 3}):  # fmt: skip
        assert planned(**keys) != plain, keys
    draw(world, range(4, 5))
    grown = planned()
    assert grown != plain
    for file in world.folder.joinpath("pictures").glob("4.*"):
        file.unlink()
    assert planned() == plain


def test_epochs_are_counted_in_crops_that_are_there_and_otherwise_not_known(world: Any) -> None:
    draw(world, range(5))
    run = world.load(stages=(1,), num_train_epochs=3, train_batch_size=2)
    index = world.index(run)
    assert planned_bundle(run, index) is None
    world.pixels(run, index, 1)
    world.eval_set(run, index)
    planned, written = planned_bundle(run, index), world.load(stages=(1,), max_train_steps=6, train_batch_size=2)
    assert planned is not None and planned == planned_bundle(written, index)


@pytest.mark.parametrize("harm", ["gone", "cut", "flipped", "manifest"])
@pytest.mark.parametrize(("kind", "name"), [("stage1_pixels", "rows.arrow"), ("eval_set", "held_out.arrow")])
def test_epochs_are_not_counted_in_crops_of_which_a_part_is_lost_or_damaged(
    world: Any, kind: str, name: str, harm: str
) -> None:
    draw(world, range(5))
    run = world.load(stages=(1,), num_train_epochs=3, train_batch_size=2)
    index = world.index(run)
    world.pixels(run, index, 1)
    world.eval_set(run, index)
    (file,) = (run.workspace / kind).glob(f"*/{name}")
    data = file.read_bytes()
    if harm == "gone":
        file.unlink()
    elif harm == "manifest":
        (file.parent / MANIFEST).write_bytes(b"garbage")
    else:
        file.write_bytes(data[:-9] if harm == "cut" else bytes(len(data)))
    assert planned_bundle(run, index) is None


def test_data_that_went_back_holds_out_what_it_held_out(world: Any) -> None:
    """Although more was held out meanwhile, and pictures among it that a choice by hash alone would prefer."""

    def held_out(pictures: int) -> tuple[str, ...]:
        choose_held_out.cache_clear()
        for file in world.folder.joinpath("pictures").iterdir():
            file.unlink()
        draw(world, range(pictures))
        run = world.load(
            stages=(1,), num_eval_images=None, seed=5
        )  # of which number 10 comes before all of the first 8
        index = world.index(run)
        (choice,) = choose_held_out(run, index)
        world.eval_set(run, index)
        ids: tuple[str, ...] = choice.ids
        return ids

    few, some, many = held_out(8), held_out(12), held_out(45)
    assert few == some and len(many) == 4 and set(some) < set(many)
    assert held_out(12) == some
    assert held_out(8) == few

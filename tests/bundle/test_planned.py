"""What a run would publish is known from the index and the settings; tests of whole runs hold it equal to what they made."""

import io
from functools import partial
from typing import Any

import numpy as np
import pytest
from data_world import DataWorld
from PIL import Image

from deepfloyd_core.bundle.planned import planned_bundle
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.crops.eval_choice import choose_held_out
from deepfloyd_core.index.identity import index_request
from deepfloyd_core.index.index import build_index
from deepfloyd_core.index.ledger import read_index
from deepfloyd_core.index.scan import scan
from deepfloyd_core.store.artifacts import materialise
from deepfloyd_core.store.manifest import MANIFEST


def png_cut_short(edge: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (edge, edge, 3), np.uint8)).save(data, "PNG")
    return data.getvalue()[: len(data.getvalue()) // 2]


def draw(world: DataWorld, numbers: range) -> None:
    for number in numbers:
        world.add(f"{number}.png", Image.new("RGB", (64 + number, 64), (number, 2 * number, 255 - number)))


def test_what_decides_the_bundle_changes_the_plan_and_nothing_else_does(world: DataWorld) -> None:
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


def planned_inputs(world: DataWorld, *entries: dict[str, Any], **keys: Any) -> dict[str, str]:
    """What a bundle would be put together from."""
    run = world.load(*entries, **{"max_rejected_share": 0.9, **keys})
    request = planned_bundle(run, world.index(run))
    assert request is not None
    return request.inputs


def mixed_sizes(world: DataWorld) -> None:
    """Pictures for both stages, for Stage I alone, for none, and two that show the same."""
    for number in range(14):
        edge = 260 + number if number % 3 else 90
        world.add(f"{number}.png", np.random.default_rng(number).integers(0, 256, (edge, 70 + edge, 3), np.uint8))
    world.add("same.png", world.folder.joinpath("pictures", "4.png").read_bytes())
    world.add("tiny.png", np.zeros((20, 20, 3), np.uint8))
    world.add("broken.png", b"no picture")


@pytest.mark.parametrize("keys", [{}, {"num_eval_images": 3}, {"crop_aspect": "preserve"}, {"duplicates": "first"}])
def test_a_stage_that_comes_or_goes_leaves_the_lora_of_the_other_what_it_is(
    world: DataWorld, keys: dict[str, Any]
) -> None:
    mixed_sizes(world)
    of_set = {key: value for key, value in keys.items() if key != "num_eval_images"}
    keys = {"num_eval_images": 2} | {key: value for key, value in keys.items() if key not in of_set}
    alone = planned_inputs(world, of_set, stages=(1,), **keys)
    both = planned_inputs(world, of_set, stages=(1, 2), **keys)
    second = planned_inputs(world, of_set, stages=(2,), **keys)
    assert alone["stage1_lora"] == both["stage1_lora"] and both["stage2_lora"] == second["stage2_lora"]
    assert alone["image_index"] != both["image_index"] != second["image_index"]


def test_what_is_held_out_fits_a_stage_that_may_come(world: DataWorld) -> None:
    for number in range(50):
        edge = 260 if number < 10 else 90
        world.add(f"{number}.png", np.random.default_rng(number).integers(0, 256, (edge, edge, 3), np.uint8))
    run = world.load(stages=(1,), num_eval_images=None)
    index = world.index(run)
    (choice,) = choose_held_out(run, index)
    sizes = {row.image_id: row.width for row in read_index(index)}
    assert len(choice.ids) == 4 and {sizes[name] for name in choice.ids} == {260}


def test_pictures_that_an_index_of_other_stages_judged_are_not_judged_again(world: DataWorld) -> None:
    mixed_sizes(world)
    rows = {}
    times: tuple[tuple[tuple[Stage, ...], int | None], ...] = (((1,), 17), ((1, 2), 0), ((2,), 0), ((1,), None))
    for stages, judged in times:
        index = world.index(world.load(stages=stages, max_rejected_share=0.9))
        assert judged is None or index.manifest.summary["judged_now"] == judged, stages
        rows[stages] = {row.source: (row.status, row.reason, row.detail) for row in read_index(index)}
    assert rows[1,] == {**rows[1, 2]}  # here every picture for Stage II is one for Stage I as well
    small = ("rejected", "too_small", "160x90 px")
    assert rows[2,] == {**rows[1, 2], **{f"{number}.png": small for number in range(0, 14, 3)}}


def test_a_picture_that_no_stage_of_the_first_run_could_use_is_judged_by_the_one_that_can(world: DataWorld) -> None:
    world.add("cut.png", png_cut_short(90))
    reasons: dict[Stage, str] = {2: "too_small", 1: "truncated"}
    for stage, reason in reasons.items():
        run = world.load(stages=(stage,))
        found = scan(run)
        index = materialise(run.workspace, index_request(run, found), partial(build_index, run, found, world.children))
        assert [row.reason for row in read_index(index)] == [reason]


STAGE1, STAGE2 = {"model_flavour": "tiny-i"}, {"model_flavour": "tiny-ii"}


@pytest.mark.parametrize(
    ("keys", "same"),
    [
        ({"stage2": {**STAGE2, "learning_rate": 1e-3}}, ["stage1_lora"]),
        ({"stage2": {**STAGE2, "max_train_steps": 7, "validation_step_interval": 2}}, ["stage1_lora"]),
        ({"stage1": {**STAGE1, "learning_rate": 1e-3}}, ["stage2_lora"]),
        ({"stage1": {**STAGE1, "validation_num_inference_steps": 3}}, ["stage1_lora", "stage2_lora"]),
        ({"stage2": {**STAGE2, "validation_guidance": 3.0}}, ["stage1_lora", "stage2_lora"]),
        ({"decode_memory_mib": 2048}, ["stage1_lora", "stage2_lora", "cascade_samples"]),
        ({"stage1": {**STAGE1, "learning_rate": 1e-3}, "stage2": {**STAGE2, "low_res_stage1_share": 0.5}}, []),
    ],
)
def test_a_key_of_one_stage_makes_nothing_of_the_other_anew(
    world: DataWorld, keys: dict[str, Any], same: list[str]
) -> None:
    mixed_sizes(world)
    plain, other = planned_inputs(world), planned_inputs(world, **keys)
    assert [name for name in ("stage1_lora", "stage2_lora", "cascade_samples") if plain[name] == other[name]] == same


def test_a_data_set_for_stage2_alone_leaves_stage1_what_it_is(world: DataWorld) -> None:
    mixed_sizes(world)
    large = {"id": "large", "resolution": 256, "instance_data_dir": str(world.folder / "large")}
    for number in range(3):
        world.add(
            f"../large/{number}.png", np.random.default_rng(99 + number).integers(0, 256, (300, 300, 3), np.uint8)
        )
    plain, more = planned_inputs(world), planned_inputs(world, {}, large)
    assert plain["stage1_lora"] == more["stage1_lora"] and plain["stage2_lora"] != more["stage2_lora"]


def test_of_pairs_only_those_that_are_followed_decide(world: DataWorld) -> None:
    follow = {"model_flavour": "tiny-i", "controlnet": True, "controlnet_conditioning": "paired"}
    pairs = {"id": "pairs", "dataset_type": "conditioning", "instance_data_dir": str(world.folder / "pairs")}
    for number in range(4):
        picture = np.random.default_rng(number).integers(0, 256, (300, 300, 3), np.uint8)
        world.add(f"{number}.png", picture)
        world.add(f"../pairs/{number}.png", 255 - picture, None)
    data = {"conditioning_data": "pairs"}, pairs
    alone = planned_inputs(world, *data, stages=(1,), stage1=follow)
    assert planned_inputs(world, *data, stage1=follow)["stage1_lora"] == alone["stage1_lora"]
    world.add("../pairs/2.png", np.zeros((300, 300, 3), np.uint8), None)
    changed = planned_inputs(world, *data, stage1=follow)
    assert changed["stage1_lora"] != alone["stage1_lora"]


def test_epochs_are_counted_in_crops_that_are_there_and_otherwise_not_known(world: DataWorld) -> None:
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
    world: DataWorld, kind: str, name: str, harm: str
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


def test_data_that_went_back_holds_out_what_it_held_out(world: DataWorld) -> None:
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

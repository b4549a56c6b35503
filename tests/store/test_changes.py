"""What is said of an artifact that is made anew: in the words of the user's files."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_world import DataWorld
from lpips_models import save_lpips

from deepfloyd_core.bundle.planned import planned
from deepfloyd_core.config.run import Run
from deepfloyd_core.index import changed_pictures as module
from deepfloyd_core.index.changed_pictures import picture_changes
from deepfloyd_core.store.artifacts import Artifact, Request
from deepfloyd_core.store.changes import changes
from deepfloyd_core.store.settings import changed_settings
from deepfloyd_core.types import Json

STAGE1, STAGE2 = {"model_flavour": "tiny-i"}, {"model_flavour": "tiny-ii"}


def picture(world: DataWorld, name: str, seed: int, caption: str = "a star") -> None:
    world.add(name, np.random.default_rng(seed).integers(0, 256, (300, 300, 3), np.uint8), caption)


def told(world: DataWorld, kind: str, before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Of two runs of one world, given by their keys and those of their data set."""

    def request(keys: dict[str, Any]) -> Request:
        of_set = keys.get("set", {})
        run: Run = world.load(of_set, **{key: value for key, value in keys.items() if key != "set"})
        index: Artifact = world.index(run)
        requests = planned(run, index)
        assert requests is not None
        return {**requests, "image_index": Request("image_index", 0, index.spec, index.inputs)}[kind]

    return changes(kind, request(before).record, request(after).record)


@pytest.mark.parametrize(
    ("kind", "before", "after", "said"),
    [
        ("stage1_lora", {}, {"stage1": {**STAGE1, "learning_rate": 2e-4}}, ["stage1.learning_rate 4e-05 -> 0.0002"]),
        ("stage2_lora", {}, {"stage2": {**STAGE2, "lora_rank": 4, "snr_gamma": 5.0}},
         ["stage2.lora_rank 16 -> 4", "stage2.snr_gamma unset -> 5"]),
        ("stage1_lora", {}, {"stage1": {**STAGE1, "validation_step_interval": 5}},
         ["stage1.validation_step_interval unset -> 5"]),
        ("stage1_lora", {}, {"data_backend_sampling": "uniform"},
         ['data_backend_sampling "auto-weighting" -> "uniform"']),
        ("stage1_lora", {}, {"set": {"probability": 2.0}}, ["set.probability 1 -> 2"]),
        ("stage1_lora", {}, {"seed": 7}, ["seed 42 -> 7", "held-out pictures changed", "Stage I pixels changed"]),
        ("image_index", {"stages": (1,)}, {}, ["stage 2 added"]),
        ("eval_set", {}, {"stages": (1,)}, ["stage 2 removed"]),
        ("image_index", {}, {"set": {"minimum_image_size": 70}}, ["set.minimum_image_size unset -> 70"]),
        ("stage1_pixels", {}, {"set": {"crop_style": "random"}}, ['set.crop_style "center" -> "random"']),
        ("cascade_samples", {}, {"validation_prompt": "a cat", "validation_seed": 3, "validation_resolution": 96},
         ['validation_prompt ["a star"] -> ["a cat"]', "validation_seed 0 -> 3",
          "validation_resolution [[64, 64]] -> [[96, 96]]",
          "text embeds changed"]),
        ("lora_bundle", {}, {"stages": (1,)}, ["cascade samples changed", "image index changed",
                                               "Stage II LoRA removed"]),
        ("text_embeds", {}, {"validation_negative_prompt": "gray"}, ["captions or prompts changed"]),
    ],
)  # fmt: skip
def test_what_differs_is_named_as_in_the_user_s_files(
    world: DataWorld, kind: str, before: dict[str, Any], after: dict[str, Any], said: list[str]
) -> None:
    for number in range(4):
        picture(world, f"{number}.png", number)
    assert sorted(told(world, kind, before, after)) == sorted(said)


def test_other_weights_of_a_measure_are_named_by_their_key_and_are_no_base_model(world: DataWorld) -> None:
    for number in range(4):
        picture(world, f"{number}.png", number)
    one, other = (
        {"eval_lpips_model": str(save_lpips(world.folder / f"{seed}.safetensors", seed=seed))} for seed in (0, 1)
    )
    assert told(world, "cascade_samples", one, other) == ["eval_lpips_model changed"]
    assert told(world, "cascade_samples", {}, one) == ["eval_lpips_model added"]
    assert told(world, "cascade_samples", one, {}) == ["eval_lpips_model removed"]


def test_a_size_of_windows_is_no_stage_that_came_or_went() -> None:
    old, new = ({"format": 1, "spec": {"stage2_patch": size}, "inputs": {}} for size in (None, 128))
    assert changes("stage2_lora", old, new) == ["stage2.stage2_patch unset -> 128"]
    assert changes("stage2_lora", new, old) == ["stage2.stage2_patch 128 -> unset"]


def test_stage_iii_is_a_stage_that_came_went_or_changed() -> None:
    table = {"validation_guidance": 9.0, "validation_noise_level": 100}
    records: dict[str, Json] = {
        "none": {"spec": {}, "inputs": {}},
        "lanczos": {"spec": {"stage3": "lanczos"}, "inputs": {}},
        "model": {"spec": {"stage3": table}, "inputs": {"stage3_model": "a"}},
        "other": {"spec": {"stage3": table | {"validation_guidance": 4.0}}, "inputs": {"stage3_model": "b"}},
    }

    def told(old: str, new: str) -> list[str]:
        return changes("generated", {"format": 1, **records[old]}, {"format": 1, **records[new]})

    assert told("none", "lanczos") == told("none", "model") == ["Stage III added"]
    assert told("model", "none") == ["Stage III removed"] and told("lanczos", "model") == ["Stage III changed"]
    assert told("model", "other") == ["stage3.validation_guidance 9 -> 4", "model of Stage III changed"]
    assert changed_settings("generated", records["model"]["spec"]) == {}
    assert changed_settings("generated", records["other"]["spec"]) == {"stage3.validation_guidance": ("4", "9")}


def test_of_another_format_only_keys_are_named_that_both_have() -> None:
    old = {"format": 1, "spec": {"dtype": "bf16", "seed": 1}, "inputs": {}}
    new = {"format": 2, "spec": {"text_encoder_dtype": "bf16", "seed": 2}, "inputs": {}}
    assert changes("text_embeds", old, new) == ["this version of the program builds it differently", "seed 1 -> 2"]


def test_pictures_that_came_went_or_changed_are_named_at_most_three(
    world: DataWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(8):
        picture(world, f"{number}.png", number)
    run = world.load(stages=(1,), max_rejected_share=0.9)
    first = world.index(run)
    folder = world.folder / "pictures"
    for number in range(8, 13):
        picture(world, f"deep/{number}.png", number)
    (folder / "0.png").unlink()
    picture(world, "1.png", 99, "another caption too")
    for name in ("2", "3"):
        (folder / f"{name}.txt").write_text("another caption")
    second = world.index(run)
    ledgers = [index.path / "index.parquet" for index in (first, second)]
    assert picture_changes(*ledgers) == [
        "5 pictures added: deep/10.png, deep/11.png, deep/12.png and 2 more",
        "1 picture withdrawn: 0.png",
        "1 picture changed: 1.png",
        "2 captions changed: 2.png, 3.png",
    ]
    assert picture_changes(ledgers[0], ledgers[0]) == []
    (folder / "4.png").write_bytes(b"broken")
    (folder / "noise.png").write_bytes(b"noise")
    ledgers.append(world.index(run).path / "index.parquet")
    assert picture_changes(*ledgers[1:])[:2] == ["1 rejected file added: noise.png", "1 picture rejected now: 4.png"]
    assert picture_changes(*ledgers[:0:-1])[:2] == [
        "1 rejected file withdrawn: noise.png",
        "1 picture accepted now: 4.png",
    ]
    (folder / "5.txt").unlink()
    uncaptioned = world.index(run).path / "index.parquet"
    assert picture_changes(ledgers[2], uncaptioned) == ["1 picture rejected now: 5.png"]
    assert picture_changes(uncaptioned, ledgers[2]) == ["1 picture accepted now: 5.png"]
    del ledgers[2]
    monkeypatch.setattr(module, "MOST_ROWS", 19)
    assert picture_changes(*ledgers) == ["pictures: 8 -> 12"]


def test_of_no_pictures_all_are_new(tmp_path: Path) -> None:
    schema = pa.schema([("dataset_id", pa.string()), ("source", pa.string()), ("status", pa.string()),
                        ("image_id", pa.string()), ("captions", pa.list_(pa.string()))])  # fmt: skip
    rows: list[dict[str, Any]] = [
        {"dataset_id": "set", "source": "a.png", "status": "accepted", "image_id": None, "captions": []}
    ]
    for name, table in (("old", []), ("new", rows)):
        pq.write_table(pa.Table.from_pylist(table, schema=schema), tmp_path / name)
    assert picture_changes(tmp_path / "old", tmp_path / "new") == ["1 picture added: a.png"]
    assert picture_changes(tmp_path / "new", tmp_path / "old") == ["1 picture withdrawn: a.png"]

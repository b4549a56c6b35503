"""How often a training shows samples of itself where the run file does not say: what it costs, and when there are none."""

from pathlib import Path
from typing import Any

import pytest
from data_world import DataWorld

from deepfloyd_core.config.stages import Stage
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.training.previews import preview_interval

GPU_24 = {
    "num_validation_images": 8,
    "max_train_steps": 2000,
    "train_batch_size": 4,
}  # of flows/configs/stage1_24gb.toml


@pytest.mark.parametrize(
    ("stage", "keys", "of_run", "pictures"),
    [
        (1, GPU_24, {}, 4),
        (1, {"max_train_steps": 100_000, "train_batch_size": 4}, {}, 4),
        (1, {"max_train_steps": 3000}, {"validation_prompt": ["a", "b"], "validation_resolution": "64,96x64"}, 4),
        (
            1,
            {"max_train_steps": 5000, "controlnet": True, "gradient_accumulation_steps": 2},
            {"num_eval_images": 12},
            4,
        ),
        (2, {"max_train_steps": 9000, "stage2_patch": 64, "train_batch_size": 16}, {"validation_guidance": 1.0}, 4),
    ],
)
def test_previews_cost_at_most_a_tenth_of_the_passes_of_a_training_and_one_more_would_not(
    world: DataWorld, stage: Stage, keys: dict[str, Any], of_run: dict[str, Any], pictures: int
) -> None:
    table = {"model_flavour": f"tiny-{'i' * stage}", **keys}
    images = table.pop("num_validation_images", None)
    run = world.load(
        stages=(1, 2), **{f"stage{stage}": table}, **of_run, **({"num_validation_images": images} if images else {})
    )
    every, config = preview_interval(run, stage), run.config.stage(stage)
    count = len(range(every, config.steps, every))  # none at step 0
    held_out = run.config.num_eval_images or 0
    guided = 2 if config.validation_guidance > 1 else 1
    one = pictures * config.validation_num_inference_steps * guided + 4 * (held_out + 2)
    of_training = 2 * config.steps * config.samples_per_step * ((config.stage2_patch or 256) / 256) ** 2
    assert 1 <= count <= 10 and count * one <= of_training / 10
    assert count == 10 or (count + 1) * one > of_training / 10 or every * (count + 1) < config.steps + every


@pytest.mark.parametrize("keys", [{"max_train_steps": 100}, {"max_train_steps": 100_000, "validation_step_interval": 0},
                                  {"max_train_steps": 100_000, "validation_step_interval": 500}])  # fmt: skip
def test_a_short_training_has_no_previews_nor_has_one_whose_validations_are_set(
    world: DataWorld, keys: dict[str, Any]
) -> None:
    assert preview_interval(world.load(stages=(1,), **keys), 1) == 0


def test_the_demo_has_no_previews_because_it_is_short() -> None:
    run = load_run(Path(__file__).parents[2] / "flows" / "configs" / "demo.toml")
    assert [preview_interval(run, stage) for stage in run.config.stages] == [0, 0]

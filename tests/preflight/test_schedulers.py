"""A scheduler that a model's prediction does not fit: one sentence before any model is loaded."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from small_run import SmallRun

from deepfloyd_core.config.flavours import FLAVOURS
from deepfloyd_core.errors import ConfigError, DeepFloydError
from deepfloyd_core.preflight.check import Goal, check_run
from deepfloyd_core.preflight.generate import GenerateOptions
from deepfloyd_core.preflight.upscale import UpscaleOptions

DRAWS = GenerateOptions(("x",), "base")
TINY3 = Path(FLAVOURS["tiny-i"].repo).parent / "iii"


def copied(folder: Path, to: Path, **changes: str | None) -> Path:
    """A model with another scheduler's configuration; None leaves a key out."""
    shutil.copytree(folder, to)
    file = to / "scheduler" / "scheduler_config.json"
    written = {**json.loads(file.read_bytes()), **changes}
    file.write_text(json.dumps({key: value for key, value in written.items() if value is not None}))
    return to


def checked(run: SmallRun, goal: Goal, *keys: str) -> str:
    """What is said of a run; empty: nothing."""
    try:
        check_run(run.config, keys, goal)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prediction_type": "v_prediction"}, "has prediction_type 'v_prediction' in place of 'epsilon'"),
        ({"prediction_type": "sample"}, "has prediction_type 'sample' in place of 'epsilon'"),
        ({"variance_type": "learned"}, "has variance_type 'learned' in place of 'learned_range'"),
        ({"prediction_type": None}, ""),  # as older files: epsilon
        ({"variance_type": "learned_range"}, ""),
    ],
)
def test_if_predicts_the_noise_when_it_is_drawn_with_and_when_it_is_trained(
    small_run: SmallRun, tmp_path: Path, changes: dict[str, str | None], says: str
) -> None:
    folder = copied(Path(FLAVOURS["tiny-ii"].repo), tmp_path / "model", **changes)
    Image.new("RGB", (64, 64)).save(tmp_path / "own.png")
    goals: tuple[Goal, ...] = (DRAWS, UpscaleOptions(tmp_path / "own.png", "base"), 2, "lora_bundle")
    for goal in goals:
        told = checked(small_run, goal, f'stage2.pretrained_model_name_or_path="{folder}"')
        assert says in told and bool(says) == bool(told) and len(told.splitlines()) <= 1
        assert not told or told.startswith(f"stage2: {folder}/scheduler/scheduler_config.json has ")


@pytest.mark.parametrize(
    ("prediction", "says"),
    [("epsilon", ""), ("v_prediction", ""), ("sample", ""), ("flow", "has prediction_type 'flow'")],
)
def test_stage3_has_a_prediction_of_its_own(small_run: SmallRun, tmp_path: Path, prediction: str, says: str) -> None:
    folder = copied(TINY3, tmp_path / "model", prediction_type=prediction)
    keys = ("stage3.model_flavour=tiny-iii", f'stage3.pretrained_model_name_or_path="{folder}"')
    told = checked(small_run, GenerateOptions(("x",), "base", stages="1-3"), *keys)
    assert says in told and bool(says) == bool(told)


def test_a_file_that_is_none_is_told(small_run: SmallRun, tmp_path: Path) -> None:
    folder = copied(Path(FLAVOURS["tiny-i"].repo), tmp_path / "model")
    for text in ("{", "[1]"):
        (folder / "scheduler" / "scheduler_config.json").write_text(text)
        with pytest.raises(DeepFloydError, match=r"scheduler_config\.json is no scheduler's configuration \("):
            check_run(small_run.config, (f'stage1.pretrained_model_name_or_path="{folder}"',), DRAWS)

"""Several versions that draw the same pictures, and the words that name a version."""

import re
from pathlib import Path
from typing import Any

import pytest
from data_world import DataWorld
from draws_here import draw_in_this_process
from moved_bundles import moved_bundle
from PIL import Image
from releases import deepfloyd, make
from small_run import SmallRun

from deepfloyd_core.api import GenerateOptions, generate, upscale
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.preflight.upscale import UpscaleOptions
from deepfloyd_core.store.registry import publish

KEYS = ("num_threads=1", "text_encoder_dtype=fp32")


@pytest.fixture
def run_file(world: DataWorld) -> Path:
    """Of a workspace whose version 1 serves."""
    settings: dict[str, Any] = {"mixed_precision": "no", "validation_num_inference_steps": 2, "use_bitfit": True}
    run, bundle, _ = moved_bundle(world, stage1={"model_flavour": "tiny-i", **settings})
    publish(run.workspace, bundle, make(run.workspace, "image_index", {}, data="1" * 16))
    return world.folder / "run.json"


def test_comparisons_of_other_pictures_lie_beside_each_other(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    draw_in_this_process(monkeypatch)
    sheets = []
    for prompt in ("a red circle", "a blue star", "a red circle"):
        options = GenerateOptions((prompt,), compare=("base", "champion", "1"))
        assert len(generate(run_file, options, KEYS)) == 2, "the champion is version 1"
        found = re.fullmatch(r"the base and version 1, side by side: (.*)", caplog.messages[-1])
        assert found
        sheets.append(Path(found[1]))
    assert sheets[0] == sheets[2] != sheets[1] and len({sheet.read_bytes() for sheet in sheets}) == 2
    with Image.open(sheets[0]) as sheet:
        assert sheet.height > 2 * 128


def test_the_champion_is_a_word_wherever_a_version_is_named(run_file: Path, tmp_path: Path) -> None:
    workspace = run_file.parent / "workspace"
    for word in ("latest", "champion"):
        for arguments in (
            ("show", str(workspace), word),
            ("export", str(run_file), word, str(tmp_path / word)),
            ("publish", str(workspace), word, str(tmp_path / f"published-{word}")),
        ):
            done = deepfloyd(*arguments)
            assert done.exit_code == 0, (arguments, done.exception)


def test_the_champion_draws_and_its_lora_too(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_in_this_process(monkeypatch)
    (by_word,) = generate(run_file, GenerateOptions(("a star",), "champion"), KEYS)
    assert generate(run_file, GenerateOptions(("a star",)), KEYS) == [by_word]
    with pytest.raises(ConfigError, match=r"--lora version:champion has bitfit_biases"):
        generate(run_file, GenerateOptions(("a star",), loras=("version:champion",)), KEYS)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"version": "base,3"}, "--version is 'base,3'; it names one. To draw with several: --compare base,3."),
        ({"version": "1", "compare": ("base", "3")}, "Give neither --version nor --lora beside it."),
        ({"loras": ("a.safetensors",), "compare": ("base", "3")}, "Give neither --version nor --lora beside it."),
        ({"compare": ("base",)}, "--compare is 'base'; give several, such as base,3,champion."),
        ({"compare": ("base", "")}, "--compare is 'base,'; give several"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_told(small_run: SmallRun, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        generate(small_run.config, GenerateOptions(("a star",), **options))
    assert says in str(refused.value)


def test_a_lora_is_drawn_with_on_the_base_models_unless_a_version_is_named(small_run: SmallRun, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "own.png")
    for version, says in (
        (None, "no such file or folder"),
        ("base", "no such file or folder"),
        ("1", "leave out --version"),
    ):
        with pytest.raises(ConfigError, match=says):
            generate(small_run.config, GenerateOptions(("x",), version, loras=("none.safetensors@0.5",)))
        with pytest.raises(ConfigError, match=says):
            upscale(small_run.config, UpscaleOptions(tmp_path / "own.png", version, loras=("none.safetensors@0.5",)))

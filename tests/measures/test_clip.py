"""CLIP's figures of pictures against transformers' own model and the formula written out; a wrong folder fails at once."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_models import features, save_clip
from PIL import Image
from small_run import SmallRun

from deepfloyd_core.adapters.start_from import find_parent
from deepfloyd_core.errors import ConfigError, ModelError
from deepfloyd_core.measures.clip import alike, check_clip_folder, load_embed, set_distance
from deepfloyd_core.models.folders import resolve
from deepfloyd_core.preflight.load import load_run


def pictures(count: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (count, 6, 8, 3), dtype=np.uint8)
    return [np.asarray(Image.fromarray(block).resize((96, 64), Image.Resampling.BICUBIC)) for block in blocks]


def test_embeddings_are_those_of_transformers_own_model_whatever_the_batch(tmp_path: Path) -> None:
    folder, shown = save_clip(tmp_path), pictures(20, 0)
    found = load_embed(folder, torch.device("cpu"))(shown)
    expected = features(folder, shown)
    assert found.shape == (20, 16)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-12)


def test_a_picture_is_like_itself_and_less_like_another(tmp_path: Path) -> None:
    eye = load_embed(save_clip(tmp_path), torch.device("cpu"))
    seen = eye(pictures(4, 0))
    assert alike(seen, seen) == pytest.approx([1.0] * 4)
    assert max(alike(seen, np.roll(seen, 1, axis=0))) < 0.999


def test_the_distance_of_two_sets_is_the_estimator_written_out() -> None:
    rng = np.random.default_rng(0)
    x, y = (
        rows / np.linalg.norm(rows, axis=1, keepdims=True)
        for rows in (rng.normal(size=(12, 5)), rng.normal(size=(15, 5)))
    )
    x[:, 0], y[:, 1] = x[:, 0] + 0.5, y[:, 1] - 0.5

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((sum(p * q for p, q in zip(a, b, strict=True)) + 1) ** 3)

    xx = [kernel(x[i], x[j]) for i in range(12) for j in range(12) if i != j]
    yy = [kernel(y[i], y[j]) for i in range(15) for j in range(15) if i != j]
    xy = [kernel(one, other) for one in x for other in y]
    expected = np.mean(xx) + np.mean(yy) - 2 * np.mean(xy)
    assert set_distance(x, y) == pytest.approx(expected, rel=1e-9)
    assert expected > 0.1
    assert set_distance(x[:9], y) is None


def test_halves_of_one_set_are_nearer_than_sets_of_different_pictures() -> None:
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(60, 8)) + 2
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    far = -rows[30:]
    near, apart = set_distance(rows[:30], rows[30:]), set_distance(rows[:30], far)
    assert near is not None
    assert apart is not None
    assert abs(near) < apart / 20


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors. Give a folder"),
        (lambda folder: (folder / "config.json").write_text(json.dumps({"model_type": "siglip"})), "type 'siglip'"),
    ],
)
def test_a_folder_that_holds_no_clip_is_refused_before_anything_is_loaded(
    tmp_path: Path, spoil: Callable[[Path], object], says: str
) -> None:
    folder = save_clip(tmp_path)
    check_clip_folder(folder)
    spoil(folder)
    with pytest.raises(ConfigError, match=says):
        check_clip_folder(folder)


def test_a_run_that_could_not_use_the_model_is_refused(small_run: SmallRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config.json, no model.safetensors, no preprocessor_config.json"):
        load_run(small_run.config, (f"eval_clip_model={tmp_path}",))
    with pytest.raises(ConfigError, match=r"eval_clip_model is 'x+', which has no config.json"):
        load_run(small_run.config, ("eval_clip_model=" + 300 * "x",))
    with pytest.raises(ConfigError, match=r"eval_lpips_model is 'x+\.safetensors'; there is no such file"):
        load_run(small_run.config, ("eval_lpips_model=" + 300 * "x" + ".safetensors",))
    with pytest.raises(ConfigError, match=r"stage1.init_lora is 'x+'; there is no such file or folder"):
        find_parent(load_run(small_run.config, ("stage1.init_lora=" + 300 * "x",)), 1, tmp_path)
    with pytest.raises(ModelError, match=r"x+ is not a directory, nor a hub id"):
        resolve(300 * "x", 1)
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (tmp_path / name).write_text("[1")
    for text in ("[1", "[1]", "\x80"):
        (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(ConfigError, match=r"eval_clip_model is .*, whose config.json cannot be read"):
            load_run(small_run.config, (f"eval_clip_model={tmp_path}",))
    text = small_run.config.read_text()
    small_run.config.write_text(text[: text.index("[stage2]")])
    with pytest.raises(ConfigError, match=r"there is no .stage2."):
        load_run(small_run.config, (f"eval_clip_model={save_clip(tmp_path)}",))

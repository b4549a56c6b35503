"""`show`: what a person may call a version or an artifact, and which settings of it are worth showing."""

import json
from pathlib import Path

import pytest
from releases import Release, deepfloyd

from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.config.keys import read_by
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.store.lookup import artifact_named, version_named
from deepfloyd_core.store.settings import changed_settings


@pytest.fixture
def release(tmp_path: Path) -> Release:
    release = Release(tmp_path / "workspace")
    release.publish("old")
    release.publish("new")
    return release


@pytest.mark.parametrize("text", ["2", "v2", "V2", "version:2", "version 2", "latest", "02"])
def test_a_version_has_several_names(release: Release, text: str) -> None:
    version = version_named(release.workspace, text)
    assert version and version.number == 2
    assert deepfloyd("show", str(release.workspace), text).output.startswith("version 2, champion\n")
    assert json.loads(deepfloyd("show", str(release.workspace), text, "--json").output)["number"] == 2


@pytest.mark.parametrize("text", ["v7", "version:7", "v0", "0", "7", "123"])
def test_a_version_that_is_not_there_is_named_beside_those_that_are(release: Release, text: str) -> None:
    with pytest.raises(ConfigError, match="published: 1, 2"):
        version_named(release.workspace, text)


def test_an_artifact_is_named_by_its_first_digits_or_its_kind(release: Release) -> None:
    for name in ("old image_index", "new lora_bundle"):
        artifact = release.parts[name]
        for text in (artifact.fingerprint, artifact.fingerprint[:9], artifact.name, artifact.name[:-4]):
            assert artifact_named(release.workspace, text).name == artifact.name
    both = [artifact for name, artifact in release.parts.items() if name.endswith("image_index")]
    with pytest.raises(ConfigError, match=r"'image_index' begins the names of 2 artifacts: .*Give more digits") as told:
        artifact_named(release.workspace, "image_index")
    assert all(artifact.name in str(told.value) for artifact in both)
    for text in ("", "x", "0" * 17, "../versions", both[0].fingerprint.upper() + "!"):
        with pytest.raises(ConfigError, match="has no version and no artifact"):
            artifact_named(release.workspace, text)


def test_four_digits_that_are_no_version_may_begin_a_fingerprint(release: Release) -> None:
    assert version_named(release.workspace, "9999") is None
    with pytest.raises(ConfigError, match="has no version and no artifact '9999'"):
        artifact_named(release.workspace, "9999")


def test_the_settings_that_differ_from_the_defaults_are_those_that_the_files_set() -> None:
    """By the names of the run file, and without those that only follow from others."""
    config = StageConfig(model_flavour="tiny-i", lora_rank=4, learning_rate=1e-3, use_ema=True)
    spec = read_by(config, "lora", 1)
    spec |= {"lr_end": config.final_learning_rate, "lr_scheduler": config.schedule, "max_train_steps": config.steps}
    spec |= {
        "seed": 7,
        "shares": {"cats": [1.0, 0, None], "dogs": [0.5, 100, None]},
        "data_backend_sampling": "uniform",
    }
    spec |= {"validation": {"prompts": ["a cat", "a dog"], "sizes": [[64, 64], [96, 64]], "seed": 0, "images": 2}}
    assert changed_settings("stage1_lora", spec) == {
        "stage1.model_flavour": ("tiny-i", ""),
        "stage1.lora_rank": ("4", "16"),
        "stage1.learning_rate": ("0.001", "4e-05"),
        "stage1.use_ema": ("true", "false"),
        "seed": ("7", "42"),
        "dogs.probability": ("0.5", "1"),
        "dogs.start_step": ("100", "0"),
        "data_backend_sampling": ("uniform", "auto-weighting"),
        "validation_prompt": ("a cat, a dog", "unset"),
        "validation_resolution": ("64,96x64", "64"),
        "num_validation_images": ("2", "4"),
    }
    spec |= {"lr_end": 1e-5, "lr_scheduler": "constant", "max_train_steps": 300, "shares": {}, "validation": None}
    told = changed_settings("stage1_lora", spec)
    assert told["stage1.lr_end"] == ("1e-05", "0.0001") and told["stage1.lr_scheduler"] == ("constant", "cosine")
    assert told["stage1.max_train_steps"] == ("300", "1000") and "validation" not in told


def test_the_settings_of_a_data_set_carry_its_name() -> None:
    dataset = ImageDataset.model_validate(
        {"id": "cats", "type": "local", "instance_data_dir": "/cats", "crop_style": "random", "repeats": 3}
    )
    spec = {"datasets": {"cats": read_by(dataset, "pixels")}, "stage": 1, "shard_mib": 64.0, "seed": 42}
    assert changed_settings("stage1_pixels", spec) == {
        "cats.crop_style": ("random", "center"), "cats.repeats": ("3", "0"),
    }  # fmt: skip

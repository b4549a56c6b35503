"""The recipe of a version: it has no secrets, its run is the same run, and what differs in a bundle is named."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from releases import Release
from small_run import SmallRun

from deepfloyd_core.bundle.recipe import check_reproduction, different_files, recipe_of, write_scratch
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.store.versions import Version


def test_the_recorded_settings_make_the_same_run(small_run: SmallRun, tmp_path: Path) -> None:
    entries = json.loads((small_run.folder / "data.json").read_text())
    filters = tmp_path / "filters.txt"
    filters.write_text("purple\n")
    entries[0]["caption_filter_list"] = str(filters)
    embeds = {
        "id": "texts",
        "dataset_type": "text_embeds",
        "default": True,
        "type": "local",
        "caption_filter_list": ["x"],
    }
    (small_run.folder / "data.json").write_text(json.dumps([*entries, embeds]))
    run = load_run(small_run.config)
    recipe = recipe_of(run)
    version = Version(1, "b" * 16, "i" * 16, "d" * 16, {}, "", json.loads(json.dumps(recipe)))
    (tmp_path / "old" / "image_index" / ("i" * 16)).mkdir(parents=True)
    rows = [{"dataset_id": "stars", "source": name, "image_id": None} for name in ("star_000.png", "star_001.png")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "old" / "image_index" / ("i" * 16) / "index.parquet")
    again = load_run(write_scratch(tmp_path / "old", version, tmp_path / "scratch"))
    assert recipe_of(again)["run"] == {**recipe["run"], "gate": "off", "report_to": "none"}
    (one,), (other,) = run.datasets, again.datasets
    folder = Path(other.instance_data_dir)
    assert other.model_copy(update={"instance_data_dir": one.instance_data_dir, "text_embeds": one.text_embeds}) == one
    names = {"star_000.png", "star_000.txt", "star_001.png", "star_001.txt"}
    assert {path.name for path in folder.iterdir()} == names, "the recorded pictures with their captions alone"
    with pytest.raises(ConfigError, match="not empty"):
        write_scratch(tmp_path / "old", version, tmp_path / "scratch")


def test_a_recipe_has_no_secret(small_run: SmallRun) -> None:
    run = load_run(small_run.config)
    secret = {"aws_access_key_id": "AKIA77", "aws_secret_access_key": "hidden77"}
    dataset = type(run.datasets[0]).model_validate({**run.datasets[0].model_dump(exclude_none=True), **secret})
    text = json.dumps(recipe_of(type(run)(run.config, (dataset,), ())))
    assert "AKIA77" not in text and "hidden77" not in text and "aws_access" not in text


def test_a_version_without_a_recipe_is_refused(tmp_path: Path) -> None:
    release = Release(tmp_path / "workspace")
    release.publish("old")
    with pytest.raises(ConfigError, match="has no settings"):
        check_reproduction(release.workspace, 1)


def test_every_difference_of_two_bundles_is_named(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        (folder / "stage1").mkdir(parents=True)
        (folder / "stage1" / "weights").write_bytes(b"\x00" * 1000)
        (folder / "manifest.json").write_text(folder.name)
    assert different_files(one, other) == []
    (other / "stage1" / "weights").write_bytes(b"\x00" * 999 + b"\x01")
    (one / "README.md").write_text("")
    assert different_files(one, other) == [f"README.md is only in {one}", "stage1/weights has other bytes"]

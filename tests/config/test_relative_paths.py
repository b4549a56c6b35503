"""Relative paths of a run mean the same from every directory."""

import json
import shutil
from pathlib import Path

import pytest
from small_run import SmallRun

from deepfloyd_core.config.base import Spec
from deepfloyd_core.config.relative_paths import path_keys
from deepfloyd_core.config.run import RunConfig
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.preflight.load import load_run
from flows.serving.ui import project_folder

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "flows/configs/demo.toml"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, which has nothing of the project."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_the_demo_is_the_same_run_from_every_directory(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    away = load_run(DEMO)
    monkeypatch.chdir(ROOT)
    here = load_run(DEMO.relative_to(ROOT))
    assert away.workspace == here.workspace.absolute() == ROOT / "workspace/demo"
    assert [Path(each.instance_data_dir) for each in away.datasets] == [
        Path(each.instance_data_dir).absolute() for each in here.datasets
    ]
    assert [note for note in away.notes if "relative paths start at" in note] == [
        f"{DEMO}: relative paths start at {ROOT}, where the data file is"
    ]
    assert not [note for note in here.notes if "relative paths" in note]


def test_names_of_the_hub_stay_and_folders_are_found(elsewhere: Path, small_run: SmallRun) -> None:
    model = shutil.copytree(ROOT / "deepfloyd_core/tiny/i", small_run.folder / "models" / "i")
    small_run.config.write_text(small_run.config.read_text().replace(f"{small_run.folder}/data.json", "data.json"))
    key = "stage1.pretrained_model_name_or_path="
    assert load_run(small_run.config, (f"{key}DeepFloyd/IF-I-M-v1.0",)).config.stage(1).model == "DeepFloyd/IF-I-M-v1.0"
    text = small_run.config.read_text().replace("[stage1]", '[stage1]\npretrained_model_name_or_path = "models/i"')
    small_run.config.write_text(text)
    assert load_run(small_run.config).config.stage(1).model == str(model)


def test_the_number_of_a_version_stays_a_number_from_elsewhere(elsewhere: Path, tmp_path: Path) -> None:
    """Also as text, which numbers are in files of SimpleTuner's form; a folder of such a name goes before it."""
    project = tmp_path / "project"
    (project / "pictures").mkdir(parents=True)
    entry = {"id": "set", "type": "local", "instance_data_dir": "pictures"}
    (project / "data.json").write_text(json.dumps([entry]))
    run = {"model_flavour": "tiny-i", "workspace": "w", "data_backend_config": "data.json", "init_lora": "3"}
    (project / "config.json").write_text(json.dumps(run))
    assert load_run(project / "config.json").config.stage(1).init_lora == "3"
    assert load_run(project / "config.json", ("init_lora=old/lora",)).config.stage(1).init_lora == str(
        project / "old/lora"
    )
    (project / "3").mkdir()
    assert load_run(project / "config.json").config.stage(1).init_lora == str(project / "3")


def test_paths_of_the_command_line_start_where_it_was_typed(elsewhere: Path) -> None:
    assert load_run(DEMO, ("workspace=mine",)).workspace == elsewhere / "mine"
    assert load_run(DEMO, ('workspace="mine"',)).workspace == elsewhere / "mine"
    (elsewhere / "datasets" / "demo").mkdir(parents=True)
    shutil.copy(ROOT / "datasets/demo.json", elsewhere / "datasets")  # the current directory comes first
    assert load_run(DEMO).workspace == Path("workspace/demo")


def test_a_data_file_that_is_nowhere_says_where_it_was_looked_for(elsewhere: Path, small_run: SmallRun) -> None:
    for named, said in (
        ("none.json", f"current directory, {elsewhere}, nor beside the run file"),
        ("/none.json", "no such file"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_run(small_run.config, (f"data_backend_config={named}",))


def test_every_key_of_a_path_is_known_as_one() -> None:
    assert {name for model in (RunConfig, StageConfig) for name in _path_keys(model)} == path_keys()


def _path_keys(model: type[Spec]) -> set[str]:
    return {name for name, field in model.model_fields.items() if "placed" in f"{field.annotation} {field.metadata}"}


def test_ui_deploys_the_projects_file_from_elsewhere_and_says_where_it_looked(elsewhere: Path) -> None:
    assert project_folder() == ROOT
    with pytest.raises(ConfigError, match=f"current directory, {elsewhere}, nor in /usr/lib, where the package is"):
        project_folder(Path("/usr/lib"))
    (elsewhere / "prefect.yaml").touch()
    assert project_folder() == elsewhere


def test_a_command_runs_from_another_directory(elsewhere: Path, small_run: SmallRun) -> None:
    entry = json.loads((small_run.folder / "data.json").read_text())
    entry[0]["instance_data_dir"] = "pictures"
    (small_run.folder / "data.json").write_text(json.dumps(entry))
    text = small_run.config.read_text().replace(f"{small_run.folder}/", "")
    small_run.config.write_text(text)
    moved = type(small_run)(elsewhere)  # whose commands start there
    done = moved.call_here("prepare", str(small_run.config), "--preview", "1")
    assert done.stdout == f"1 picture with its crop: {small_run.workspace / 'preview.png'}\n", done.stderr
    assert list(elsewhere.iterdir()) == []

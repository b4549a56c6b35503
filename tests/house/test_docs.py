"""The documentation says what the code does."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.config.flavours import PUBLISHED, RANDOM
from deepfloyd_core.config.reference import render
from deepfloyd_core.preflight.load import load_run
from flows.commands.ending import SIGNALS

ROOT = Path(__file__).parents[2]


def test_the_configuration_page_is_current() -> None:
    assert (ROOT / "docs/config.md").read_text() == render(), "run `make docs`"


def test_every_key_of_the_configuration_has_a_description() -> None:
    rows = [line for line in render().splitlines() if line.startswith("| `")]
    assert len(rows) > 60
    assert all(row.split("|")[4].strip() for row in rows)


def test_the_readme_names_every_flavour_and_command() -> None:
    readme = (ROOT / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in PUBLISHED)
    assert f"`{RANDOM}<flavour>`" in readme
    for command in (
        "init",
        "run",
        "prepare",
        "train-stage1",
        "train-stage2",
        "retrain",
        "generate",
        "upscale",
        "verify",
        "ls",
        "show",
        "gc",
        "doctor",
        "ui",
    ):
        assert re.search(rf"`[^`]*\b{command}\b", readme), command


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    decisions = (ROOT / "docs/decisions.md").read_text()
    extras = [name for names in project["optional-dependencies"].values() for name in names]
    for requirement in [*project["dependencies"], *extras]:
        name = re.split(r"[<>=\[]", requirement)[0]
        assert name == project["name"] or name in decisions, name


def test_no_prefect_is_allowed_whose_schedules_never_fire() -> None:
    """Before 3.9.1 each loop of the scheduler fails with SQLAlchemy 2.1, which those versions let in."""
    named = map(Requirement, tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    (prefect,) = (one for one in named if one.name == "prefect")
    assert "3.8.8" not in prefect.specifier and "3.9.0" not in prefect.specifier
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert pinned["prefect"] in prefect.specifier


def test_every_module_that_the_documentation_names_is_there() -> None:
    modules = [path.relative_to(ROOT) for room in ("deepfloyd_core", "flows", "tasks", "tests", "benchmarks")
               for path in (ROOT / room).rglob("*.py")]  # fmt: skip
    named = {
        name
        for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
        for name in re.findall(r"`([\w./*]+\.py)\b", page.read_text())
    }
    lost = {name for name in named if not any(path.match(name) for path in modules)}
    assert len(named) > 60 and lost == {"tests/ROOM/test_MODULE.py"}, lost


def test_the_readme_names_every_exit_code() -> None:
    (said,) = re.findall(r"Exit codes: (.*)", (ROOT / "README.md").read_text())
    assert {int(code) for code in re.findall(r"\d+", said)} == {0, 1, 2, *(128 + number for number in SIGNALS)}


def test_the_shipped_run_files_are_valid(tmp_path: Path) -> None:
    for file in sorted((ROOT / "flows/configs").glob("*.toml")):
        data = tmp_path / "data.json"
        data.write_text(f'[{{"id": "x", "type": "local", "instance_data_dir": "{tmp_path}"}}]')
        run = load_run(file, (f"data_backend_config={data}",))
        assert isinstance(run.datasets[0], ImageDataset)


def test_an_installed_package_has_every_file_of_the_tiny_cascade() -> None:
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["deepfloyd_core"]
    package = ROOT / "deepfloyd_core"
    places = [place for pattern in found for place in package.glob(pattern)]
    named = {file for place in places for file in (place.iterdir() if place.is_dir() else (place,))}
    files = {file for file in (package / "tiny").rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")}
    assert files and files <= named, sorted(str(file) for file in files - named)

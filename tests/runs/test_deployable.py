"""A deployment's parameters lead nowhere but into the project's folder and those that its worker allows."""

import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from prefect import Flow
from prefect.exceptions import ParameterTypeError

from deepfloyd_core.errors import ConfigError
from flows import deployable
from flows.deployable import PATHS, ROOTS, TARGETS, confined
from flows.generate import generate

# The other texts that flows take: none of them becomes a path.
WORDS = {"target", "prompt", "style", "seeds", "sizes", "reason"}
CHECKED = {"overrides", "lora", "version", "compare"}  # in ways of their own


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project in which a flow runs, beside it a folder that is allowed and one that is not."""
    for name in ("project", "pictures", "private", "project-2"):
        (tmp_path / name).mkdir()
    (tmp_path / "project" / "prefect.yaml").touch()
    (tmp_path / "project" / "link").symlink_to(tmp_path / "private")
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setenv(ROOTS, f"{tmp_path / 'pictures'}:")
    return tmp_path / "project"


def _confined(**parameters: Any) -> dict[str, Any]:
    return confined(parameters, deployable.allowed_folders())


OUTSIDE = [
    "/etc/passwd", "../private/run.toml", "../project-2/run.toml", "link/run.toml", "~/run.toml", "a/../../private", "/",
]  # fmt: skip


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize("name", PATHS)
def test_a_path_outside_is_refused_by_the_name_of_its_parameter(project: Path, name: str, path: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is .*{path.split('/')[-1]}', outside of .*{ROOTS}"):
        _confined(**{name: path})


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize(
    "override",
    ["workspace={}", 'data_backend_config="{}"', " stage1.init_lora = '{}'", 'stage1={{init_lora="{}"}}',
     "pretrained_model_name_or_path={}", 'stage2={{"--pretrained-model-name-or-path"="{}"}}', "eval_clip_model={}"],
)  # fmt: skip
def test_so_is_a_path_in_an_override(project: Path, override: str, path: str) -> None:
    key = override.partition("=")[0].strip()
    with pytest.raises(ConfigError, match=rf"^the override of {key} is .*outside of the folders"):
        _confined(config="run.toml", overrides=["seed=1", override.format(path)])


def test_paths_inside_start_at_the_project_and_other_values_stay(project: Path) -> None:
    pictures = project.parent / "pictures"
    (project / "models").mkdir()
    found = _confined(
        config="run.toml",
        control=str(pictures / "hint.png"),
        prompt="/etc/passwd",
        overrides=["workspace=out", "data_backend_config=../pictures/data.json", "stage1.init_lora=3", "seed=2",
                   "stage1.pretrained_model_name_or_path=DeepFloyd/IF-I-M-v1.0", "eval_lpips_model=", "workspace=",
                   "stage2.pretrained_model_name_or_path=models", 'validation_prompt="/a ../drawing"'],
    )  # fmt: skip
    assert found == {
        "config": str(project / "run.toml"),
        "control": str(pictures / "hint.png"),
        "prompt": "/etc/passwd",
        "overrides": [
            f'workspace="{project}/out"', f'data_backend_config="{project}/../pictures/data.json"', "stage1.init_lora=3",
            "seed=2", "stage1.pretrained_model_name_or_path=DeepFloyd/IF-I-M-v1.0", "eval_lpips_model=", "workspace=",
            f'stage2.pretrained_model_name_or_path="{project}/models"', 'validation_prompt="/a ../drawing"',
        ],
    }  # fmt: skip
    assert _confined(config="a.toml", control=None, overrides=None)["control"] is None


def test_a_version_is_published_inside_or_where_the_worker_allows_it(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _confined(workspace="w", target="out")["target"] == f"{project}/out"
    monkeypatch.setenv(TARGETS, "hf://me  s3://bucket/models/")
    for target in ("hf://me/model", "s3://bucket/models/star"):
        assert _confined(target=target)["target"] == target
    elsewhere = "hf://you/model", "hf://me-too/model", "hf://me/../you/model", "s3://bucket/other", "file:///etc"
    inside_no_more = (f"s3://bucket/models/{part}/other" for part in ("..", "", "%2e%2e"))
    for target in (*elsewhere, *inside_no_more, *OUTSIDE):
        with pytest.raises(ConfigError, match=r"^target is "):
            _confined(target=target)


def test_a_workspace_in_a_bucket_is_one_that_the_worker_allows(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TARGETS, "s3://bucket/mine/")
    url = "s3://bucket/mine/birds"
    assert _confined(workspace=url)["workspace"] == url
    assert _confined(config="a.toml", overrides=[f'workspace = "{url}"'])["overrides"] == [f'workspace = "{url}"']
    for elsewhere in ("s3://bucket/yours", "s3://bucket/mine/../yours", "s3://other/mine/birds"):
        with pytest.raises(ConfigError, match=r"^workspace is "):
            _confined(workspace=elsewhere)
        with pytest.raises(ConfigError, match=r"^workspace is "):
            _confined(config="a.toml", overrides=[f"workspace={elsewhere}"])


def test_a_lora_is_a_version_or_a_file_inside(project: Path) -> None:
    assert _confined(lora=["me/model@0.5", "me/model"])["lora"] == ["me/model@0.5", "me/model"], "of the Hub"
    found = _confined(config="run.toml", lora=["version:3@0.7", "a@b.safetensors", "../pictures/style.safetensors@0.5"])
    assert found["lora"] == [
        "version:3@0.7", f"{project}/a@b.safetensors@1", f"{project}/../pictures/style.safetensors@0.5",
    ]  # fmt: skip
    for path in OUTSIDE:
        with pytest.raises(ConfigError, match=r"^lora is .*outside of the folders"):
            _confined(lora=[f"{path}@0.5"])


def test_a_version_is_a_name_or_a_bundle_s_folder_inside(project: Path) -> None:
    (project / "bundle").mkdir()
    for version in ("3", "champion", "latest", "base", "none-such"):
        assert _confined(version=version, compare=[version, 3]) == {"version": version, "compare": [version, "3"]}
    assert _confined(compare=["base", "./bundle"])["compare"] == ["base", f"{project}/bundle"]
    (project / "me" / "here").mkdir(parents=True)
    assert _confined(version="me/here")["version"] == f"{project}/me/here"
    assert _confined(version="me/model")["version"] == "me/model", "of the Hub"
    for path in OUTSIDE:
        for named in ({"version": path}, {"compare": ["base", path]}):
            with pytest.raises(ConfigError, match=r"^(version|compare) is .*outside of the folders"):
                _confined(**named)


@pytest.mark.parametrize("deployed", [True, False])
def test_only_a_deployment_is_bound_to_the_folders(
    project: Path, monkeypatch: pytest.MonkeyPatch, deployed: bool
) -> None:
    monkeypatch.setattr(deployable, "server_awaited", lambda body: body)
    monkeypatch.setattr(deployable, "_is_deployed", lambda: deployed)

    @deployable.deployable
    def body(config: str, number: int = 3, *, overrides: list[str] | None = None) -> tuple[str, int]:
        return config, number

    assert body("run.toml", 4) == (str(project / "run.toml") if deployed else "run.toml", 4)
    if deployed:
        with pytest.raises(ConfigError, match=r"^config is '/etc/passwd', outside"):
            body(config="/etc/passwd")
        with pytest.raises(ConfigError, match=r"^config is .*, outside"):
            body("no\0path")
    else:
        assert body(config="/etc/passwd", overrides=["workspace=/tmp"]) == ("/etc/passwd", 3)


def test_every_flow_that_can_be_deployed_is_bound_and_its_texts_are_paths_or_words() -> None:
    folder = Path(deployable.__file__).parent
    modules = [import_module(f"flows.{file.stem}") for file in folder.glob("*.py") if "@flow(" in file.read_text()]
    flows = {each.name: each for module in modules for each in vars(module).values() if isinstance(each, Flow)}
    assert {"finetune", "retrain", "generate", "promote"} <= flows.keys()
    for name, each in flows.items():
        assert list(_layers(each.fn))[:3] == ["run_lease", "outbox", "deployable"], name
        texts = {key for key, of in inspect.signature(each.fn).parameters.items() if "str" in str(of.annotation)}
        assert texts - CHECKED <= {*PATHS, *WORDS}, f"{name}: is it a path? Then it belongs to PATHS"


def _layers(function: object) -> Iterator[str]:
    """The modules of a function's decorators, the outermost first, and its own."""
    while function is not None:
        yield Path(inspect.getfile(function.__code__)).stem  # type: ignore[attr-defined]
        function = getattr(function, "__wrapped__", None)


def test_a_number_alone_is_taken_where_several_are_a_text() -> None:
    """`prefect deployment run -p seeds=7` gives a number."""
    given = {"config": "run.toml", "seeds": 7, "sizes": 64, "stages": 1, "version": 3}
    assert generate.validate_parameters(given).items() >= given.items()
    for name, wrong in {"seeds": -1, "sizes": 0, "stages": 2}.items():
        with pytest.raises(ParameterTypeError, match=name):
            generate.validate_parameters({"config": "run.toml", name: wrong})

"""What the command `generate` draws, and its deployment."""

from contextlib import chdir
from pathlib import Path

import pytest
from commands_here import without_prefect
from PIL import Image
from releases import deepfloyd
from small_run import NewSmallRun

FAST = tuple(f"stage{stage}.validation_num_inference_steps=1" for stage in (1, 2))


def test_a_command_and_a_deployment_draw_a_file_of_prompts_into_the_same_bytes(
    new_small_run: NewSmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = without_prefect(monkeypatch)
    one, other = new_small_run(tmp_path / "one", 0), new_small_run(tmp_path / "other", 0)
    for run in (one, other):
        (run.folder / "prompts.csv").write_text("prompt,seed,size\na red circle,7,\na star,,72x64\n")
    arguments = ("--prompt-file", str(one.folder / "prompts.csv"), "--version", "base", "--seeds", "3")
    done = deepfloyd("generate", str(one.config), *arguments, *(f"--set={key}" for key in FAST))
    assert done.exit_code == 0, (done.output, done.exception)
    told = [line.split("  ") for line in done.stdout.splitlines() if line.startswith("/")]
    files = {Path(file).name: Path(file).read_bytes() for file, _ in told}
    assert [prompt for _, prompt in told] == ["a red circle", "a star"] * 2
    assert files.keys() == {
        "picture-000-seed-7-64x64.png", "picture-001-seed-3-72x64.png", "picture-000-seed-7-256x256.png",
        "picture-001-seed-3-288x256.png",
    }  # fmt: skip
    monkeypatch.setattr("flows.deployable.project_folder", lambda: other.folder)
    with chdir(other.folder):
        (drawn,) = deployment(
            config="run.toml", prompt_file="prompts.csv", version="base", seeds=3, overrides=list(FAST)
        )
    assert {file.name: file.read_bytes() for file in drawn.path.glob("picture-*.png")} == files
    folder = Path(told[0][0]).parent
    assert f"Index     {folder}/index.parquet\nSheet     {folder}/sheet.png\n" in done.stderr
    with Image.open(drawn.path / "picture-001-seed-3-288x256.png") as picture:
        assert picture.size == (288, 256)

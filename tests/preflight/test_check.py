"""What is checked before anything is made: for each goal what it needs, together, in rounds; nothing is fetched early."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from prefect_api import post
from releases import deepfloyd
from small_run import SmallRun

from deepfloyd_core.config.flavours import FLAVOURS
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.errors import ConfigError, DeepFloydError, ModelError
from deepfloyd_core.models.folders import resolve
from deepfloyd_core.preflight import check
from deepfloyd_core.preflight.check import Goal, check_run, trained_with
from deepfloyd_core.preflight.generate import GenerateOptions
from deepfloyd_core.preflight.load import NO_DATA
from deepfloyd_core.preflight.unet_sizes import check_unet
from deepfloyd_core.preflight.upscale import UpscaleOptions

BROKEN = (  # each in another place; a fourth is in the data file
    'eval_dataset_id="moons"',
    'stage1.pretrained_model_name_or_path="/nowhere/model"',
    'stage2.init_lora="nowhere/lora"',
)
SAYS = (
    "/data.json: stars: instance_data_dir is '/nowhere/pictures', which is not a directory.",
    "run.toml: eval_dataset_id is 'moons'; ",
    "/nowhere/model is not a directory, nor a hub id of the form owner/name.",
    "stage2.init_lora is 'nowhere/lora'; there is no such file or folder: nowhere/lora.",
)


def refusal(small_run: SmallRun, goal: Goal, *overrides: str, **how: bool) -> list[str]:
    """The sentences with which a run is refused."""
    with pytest.raises(DeepFloydError) as caught:
        check_run(small_run.config, overrides, goal, **how)
    lines = str(caught.value).splitlines()
    return [line.removeprefix("- ") for line in lines[1:]] if len(lines) > 1 else lines


def move_pictures_away(small_run: SmallRun) -> None:
    data = json.loads((small_run.folder / "data.json").read_bytes())
    data[0]["instance_data_dir"] = "/nowhere/pictures"
    (small_run.folder / "data.json").write_text(json.dumps(data))


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object) -> None:
        pytest.fail("before all files are right")

    for name in ("check_wandb", "reach", "resolve"):
        monkeypatch.setattr(check, name, asked)


def test_faults_of_files_data_and_models_are_told_together_in_their_order(small_run: SmallRun) -> None:
    move_pictures_away(small_run)
    lines = refusal(small_run, "lora_bundle", *BROKEN, "report_to=wandb")
    assert [says in line for line, says in zip(lines, SAYS, strict=True)] == [True] * 4


def test_a_command_prints_them_all_in_one_message_before_it_starts_a_server(small_run: SmallRun) -> None:
    move_pictures_away(small_run)
    done = small_run.call_here("run", str(small_run.config), *(f"--set={text}" for text in BROKEN))
    count, *lines = done.stderr.splitlines()
    assert (done.returncode, count) == (2, "error: 4 faults to correct:")
    assert [says in line for line, says in zip(lines, SAYS, strict=True)] == [True] * 4
    assert not small_run.workspace.exists()


@pytest.mark.slow
def test_a_run_of_a_flow_has_them_all_in_its_state_and_once_in_its_log(small_run: SmallRun, server: str) -> None:
    move_pictures_away(small_run)
    code = "import sys; from flows.finetune import finetune; finetune(sys.argv[1], overrides=sys.argv[2:])"
    command = [sys.executable, "-P", "-c", code, str(small_run.config), *BROKEN]
    subprocess.run(command, env=os.environ | {"PREFECT_API_URL": server}, capture_output=True, timeout=300)

    def newest(path: str, **filters: Any) -> list[dict[str, Any]]:
        return list(post(server, path, {"sort": "START_TIME_DESC", "limit": 1, **filters}))

    (run,) = newest("flow_runs/filter", flows={"name": {"any_": ["finetune"]}})
    chosen = {"flow_run_id": {"any_": [run["id"]]}}
    logs = newest("logs/filter", logs=chosen, sort="TIMESTAMP_ASC", limit=200)
    told = [record["message"] for record in logs if "faults to correct" in record["message"]]
    assert [message.partition(" ")[0] for message in told] == ["error:"]
    assert told[0].startswith("error: 4 faults to correct:\n- ")
    assert all(says in told[0] and says in run["state"]["message"] for says in SAYS)


DRAWS = GenerateOptions(("x",), "base")


@pytest.mark.parametrize("goal", ["crops", "text_embeds", 1, 2, "lora_bundle"])
def test_what_trains_needs_a_data_file_and_says_so_once(small_run: SmallRun, goal: Goal) -> None:
    without = refusal(small_run, goal, "data_backend_config=", elsewhere=False)
    assert without == [f"{small_run.config}: {NO_DATA}"]
    move_pictures_away(small_run)
    assert len(refusal(small_run, goal, elsewhere=False)) == 1


def test_what_draws_needs_none_and_does_not_read_it(small_run: SmallRun, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "own.png")
    (small_run.folder / "data.json").write_text("{")
    for goal in (DRAWS, UpscaleOptions(tmp_path / "own.png", "base")):
        for overrides in ((), ("data_backend_config=",), ('data_backend_config="/nowhere/data.json"',)):
            run = check_run(small_run.config, overrides, goal, elsewhere=False)
            assert run.datasets == () and run.notes == ()
    done = deepfloyd("export", str(small_run.config), "7", str(tmp_path / "out"))
    assert str(done.exception) == f"There is no version '7' in {small_run.workspace}; published: none yet; " + (
        "`deepfloyd run` publishes one, `--version base` draws without."
    )


@pytest.mark.parametrize("goal", ["crops", "text_embeds", 1, 2, "lora_bundle"])
def test_a_goal_is_checked_for_what_it_needs(small_run: SmallRun, goal: Goal) -> None:
    wrong = (
        'stage1.pretrained_model_name_or_path="/nowhere/1"', 'stage1.init_lora="a"',
        'stage2.pretrained_model_name_or_path="/nowhere/2"',
    )  # fmt: skip
    needed = {"text_embeds": [1], 1: [1], 2: [1, 2], "lora_bundle": [1, 2]}  # T5 lies beside 1
    if goal == "crops":
        check_run(small_run.config, wrong, goal, elsewhere=False)
        return
    lines = refusal(small_run, goal, *wrong)
    assert [line.split()[0] for line in lines] == [f"/nowhere/{stage}" for stage in needed[goal]]


def test_a_text_encoder_that_is_missing_is_told_first_and_hides_no_fault_of_its_unet(
    small_run: SmallRun, tmp_path: Path
) -> None:
    folder = shutil.copytree(FLAVOURS["tiny-i"].repo, tmp_path / "model")
    shutil.rmtree(folder / "text_encoder")
    named = f'stage1.pretrained_model_name_or_path="{folder}"'
    lines = refusal(small_run, 1, named, 'stage1.init_lora="nowhere"')
    assert len(lines) == 2 and "lacks text_encoder/config.json, text_encoder/*.safetensors" in lines[0]
    assert lines[1].startswith("stage1.init_lora is 'nowhere'")


def test_all_faults_of_pictures_that_are_asked_for_are_told_at_once(small_run: SmallRun, tmp_path: Path) -> None:
    table = tmp_path / "p.csv"
    table.write_text("prompt,seed,size\na,1,64\nb,1,63x10\na,1,64\n")
    asked = GenerateOptions(("x",), "base", sizes="63x1", seeds="z", prompt_file=table)
    lines = refusal(small_run, asked, elsewhere=False)
    assert [line.partition(";")[0].partition(" is asked")[0] for line in lines] == [
        "The seeds are 'z'", "The size is 63x1", f"{table}, row 2: the size is 63x10",
        "The picture of 'a' with seed 1 and size 64x64",
    ]  # fmt: skip
    assert f"by {table}, row 1 and by {table}, row 3" in lines[-1]
    table.write_text("prompt,seed\na,x\n,1\nb,-\n")
    lines = refusal(small_run, GenerateOptions((), "base", prompt_file=table), elsewhere=False)
    assert [line.partition(": ")[0] for line in lines] == [f"{table}, row {number}" for number in (1, 2, 3)]


@pytest.mark.parametrize(("name", "data"), [("p.json", "{"), ("p.csv", 'prompt\n"a'), ("p.parquet", "PAR1")])
def test_a_file_of_prompts_that_cannot_be_read_is_a_fault_of_the_command_line(
    small_run: SmallRun, name: str, data: str
) -> None:
    (small_run.folder / name).write_text(data)
    done = deepfloyd(
        "generate", str(small_run.config), "--version", "base", "--prompt-file", str(small_run.folder / name)
    )
    assert isinstance(done.exception, ConfigError) and name in str(done.exception)


UNET, T5 = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


def of_header(name: str = "x", times: int = 1, **keys: object) -> bytes:
    """A file of one tensor, whose header has these keys, and names it so many times."""
    tensor = {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]} | keys
    pair = json.dumps({name: tensor}, ensure_ascii=False)[1:-1]
    text = f"{{{', '.join([pair] * times)}}}".encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + bytes(8)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 11530000\n"


@pytest.mark.parametrize(
    ("file", "left", "says"),
    [
        (UNET, b"", f"/{UNET} is empty. Remove it and download it again."),
        (T5, b"", f"/{T5} is empty. Remove it and download it again."),
        (UNET, POINTER, f"/{UNET} is a pointer of Git LFS, not the weights (`git lfs pull` fetches them). Remove it and "),
        (UNET, b"<!doctype html><title>404</title>", f"/{UNET} is no safetensors file. Remove it"),
        (UNET, of_header(shape=[2, 1.0]), f"/{UNET} is no safetensors file. Remove it"),
        (UNET, of_header(dtype="F3"), f"/{UNET} is no safetensors file. Remove it"),
        (UNET, of_header(data_offsets=[4, 12]), f"/{UNET} is no safetensors file. Remove it"),
        (UNET, of_header(data_offsets=[0, 8.0]), f"/{UNET} is no safetensors file. Remove it"),
        (UNET, of_header(times=2), f"/{UNET} is no safetensors file. Remove it"),
        (UNET, of_header(name="\ud800"), f"/{UNET} is no safetensors file. Remove it"),
        (UNET, 1000, f"/{UNET} is truncated to 1,000 bytes. Remove it"),
        (T5, -1, " bytes. Remove it"),
        (UNET, "diffusion_pytorch_model.fp16.safetensors", f" lacks {UNET}. Put these files there"),
        (UNET, "diffusion_pytorch_model-00001-of-00002.safetensors", f" lacks {UNET[:-12]}-00002-of-00002.safetensors."),
    ],
)  # fmt: skip
def test_weights_of_a_download_that_broke_off_are_told_before_anything_is_made(
    small_run: SmallRun, tmp_path: Path, file: str, left: bytes | int | str, says: str
) -> None:
    """left: what the file holds, how much of it (from its end, if negative), or its name in place of the whole one's."""
    folder = shutil.copytree(FLAVOURS["tiny-i"].repo, tmp_path / "model")
    whole = (folder / file).read_bytes()
    if isinstance(left, str):
        (folder / file).rename(folder / "unet" / left)
        shards = {"conv_in.bias": left, "conv_out.bias": left.replace("00001-of", "00002-of")}
        if "-of-" in left:
            (folder / f"{file}.index.json").write_text(json.dumps({"weight_map": shards}))
    else:
        (folder / file).write_bytes(left if isinstance(left, bytes) else whole[:left])
    (line,) = refusal(small_run, "lora_bundle", f'stage1.pretrained_model_name_or_path="{folder}"')
    assert says in line
    if left == -1:
        assert line.startswith(f"{folder / T5} has {len(whole) - 1:,} of {len(whole):,} bytes.")


@pytest.mark.parametrize("name", ["/dev/zero", "../x.safetensors", "", "unet", "[" * 5000])
def test_an_index_of_weights_that_names_no_file_beside_it_is_refused(
    small_run: SmallRun, tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(FLAVOURS["tiny-i"].repo, tmp_path / "model")
    text = name if name[:1] == "[" else json.dumps({"weight_map": {"a": name, "b": Path(UNET).name}})
    (folder / f"{UNET}.index.json").write_text(text)
    (line,) = refusal(small_run, "lora_bundle", f'stage1.pretrained_model_name_or_path="{folder}"')
    assert line.startswith(f"{folder / UNET}.index.json cannot be read (")


@pytest.mark.parametrize("file", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_a_model_s_json_that_is_nested_too_deeply_is_refused(small_run: SmallRun, tmp_path: Path, file: str) -> None:
    folder = shutil.copytree(FLAVOURS["tiny-i"].repo, tmp_path / "model")
    (folder / file).write_text('{"a":' * 5000)
    (line,) = refusal(small_run, "lora_bundle", f'stage1.pretrained_model_name_or_path="{folder}"')
    assert str(folder / file) in line and "nested too deeply" in line


@pytest.mark.parametrize("levels", ["x" * 3000, [64] * 3000, [], 4])
def test_a_unet_of_thousands_of_levels_is_refused_at_once(small_run: SmallRun, tmp_path: Path, levels: object) -> None:
    folder = shutil.copytree(FLAVOURS["tiny-i"].repo, tmp_path / "model")
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"block_out_channels": levels}))
    (line,) = refusal(small_run, "lora_bundle", f'stage1.pretrained_model_name_or_path="{folder}"')
    assert str(folder / "unet" / "config.json") in line and "block_out_channels" in line


def test_whole_weights_of_several_files_are_taken(small_run: SmallRun, tmp_path: Path) -> None:
    folder = shutil.copytree(FLAVOURS["tiny-i"].repo, tmp_path / "model")
    (folder / T5).rename(folder / "text_encoder" / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"shared.weight": "model-00001-of-00001.safetensors"}}
    (folder / f"{T5}.index.json").write_text(json.dumps(index))
    named = f'stage1.pretrained_model_name_or_path="{folder}"'
    assert check_run(small_run.config, (named,), "lora_bundle", elsewhere=False)


def test_a_stage_that_the_run_does_not_have_is_told_with_the_rest(small_run: SmallRun) -> None:
    lines = refusal(small_run, 1, "stage1=", 'validation_resolution="256"', 'eval_dataset_id="moons"')
    assert "eval_dataset_id is 'moons'" in lines[0]
    assert lines[1:] == ["This run has no stage 1: add a [stage1] table with a model_flavour."]


def test_services_are_asked_together_and_before_anything_is_downloaded(
    small_run: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise ConfigError("no cluster")

    def no_key() -> None:
        raise ConfigError("no key")

    monkeypatch.setattr(check, "reach", away)
    monkeypatch.setattr(check, "check_wandb", no_key)
    asked = ("report_to=wandb", "task_runner=dask", 'task_runner_address="tcp://10.0.0.1:1"')
    assert refusal(small_run, "lora_bundle", *asked) == ["no cluster", "no key"]
    assert refusal(small_run, "lora_bundle", *asked, workers=False) == ["no key"]
    assert refusal(small_run, "crops", *asked) == ["no cluster"]
    check_run(small_run.config, asked, "lora_bundle", elsewhere=False)
    check_run(small_run.config, asked, "text_embeds")


def test_after_a_model_that_cannot_be_had_no_other_is_downloaded(
    small_run: SmallRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fetched: list[str] = []

    def fetch(model: str, stage: Stage, text: bool = False) -> Path:
        fetched.append(model)
        if model == "deep/one":
            raise ModelError("deep/one is gated.")
        return Path(FLAVOURS["tiny-ii"].repo)

    monkeypatch.setattr(check, "resolve", fetch)
    hub = [f'stage{stage}.pretrained_model_name_or_path="deep/{name}"' for stage, name in ((1, "one"), (2, "two"))]
    assert refusal(small_run, "lora_bundle", *hub) == ["deep/one is gated."]
    assert fetched == ["deep/one"]
    assert refusal(small_run, "lora_bundle", *hub, 'stage1.init_lora="x"', 'eval_dataset_id="moons"')
    assert fetched == ["deep/one"], "not for a run that cannot begin"
    fetched.clear()
    check_run(small_run.config, (hub[1],), 2)
    assert fetched == ["deep/two"]
    monkeypatch.setattr(check, "resolve", lambda *_, **__: Path(FLAVOURS["tiny-i"].repo))
    assert "has 3 input channels; one of Stage II has 6." in refusal(small_run, 2, hub[1])[0]


def test_a_model_on_this_machine_is_checked_once(small_run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def checked(stage: Stage, folder: Path) -> bool:
        read.append(folder)
        return check_unet(stage, folder)

    monkeypatch.setattr(check, "check_unet", checked)
    monkeypatch.setattr(check, "resolve", resolve)
    check_run(small_run.config, (), "lora_bundle")
    here = [Path(FLAVOURS[name].repo) for name in ("tiny-i", "tiny-ii")]
    assert read == here


def test_a_model_that_is_newer_on_the_hub_is_checked_as_well(
    small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`resolve` gives another snapshot than the one that the cache had before: here, of the wrong stage."""
    newer = Path(FLAVOURS["tiny-ii"].repo)
    monkeypatch.setattr(check, "resolve", lambda *_, **__: newer)
    with pytest.raises(DeepFloydError, match="Stage I "):
        check_run(small_run.config, (), "lora_bundle")


def test_all_stages_that_a_stage_learns_from_are_trained_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    third: Any = 3
    monkeypatch.setitem(STAGES, third, replace(STAGES[2], number=third, roman="III", upscales=2))
    remakes: dict[int, bool] = {1: False, 2: True, 3: True}
    run: Any = SimpleNamespace(stage=lambda stage: SimpleNamespace(remakes_low_res=remakes[stage]))
    assert trained_with(run, third) == (1, 2, 3)
    remakes[2] = False
    assert [trained_with(run, stage) for stage in (1, 2, third)] == [(1,), (2,), (2, 3)]


def test_an_order_of_pictures_is_told_all_its_faults(small_run: SmallRun, tmp_path: Path) -> None:
    (tmp_path / "hint.png").write_bytes(b"no picture")
    options = GenerateOptions(
        ("a star", " "), "7", control=tmp_path / "hint.png", seeds="-1", prompt_file=tmp_path / "none.txt"
    )
    starts = (
        "One of the prompts is empty.", f"The file of prompts {tmp_path / 'none.txt'} is not there.", "The seeds are '-1'; ",
        f"The picture {tmp_path / 'hint.png'} cannot be read", "There is no version '7' in ",
    )  # fmt: skip
    lines = refusal(small_run, options)
    assert [line.startswith(start) for line, start in zip(lines, starts, strict=True)] == [True] * 5
    assert refusal(small_run, GenerateOptions((), "base")) == [
        "There is no prompt: give --prompt TEXT, or --prompt-file FILE.",
    ]
    (twice,) = refusal(small_run, GenerateOptions(("a star", "a star"), "base"))
    assert twice.startswith("The picture of 'a star' with seed 0 and size 64x64 is asked for twice.")
    (odd,) = refusal(small_run, GenerateOptions(("a star",), "base", sizes="64,63"))
    assert odd.startswith("The size is 63x63; each edge must divide by 8")
    assert refusal(small_run, GenerateOptions(("",), "base"), "stage1=", 'validation_resolution="256"') == [
        "The prompt is empty.",
        "generate starts from Stage I: add a [stage1] table with a model_flavour.",
    ]

"""`deepfloyd doctor`: what a machine lacks is said once, first, with what mends it; secrets never."""

import errno
import fcntl
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from importlib import import_module, util
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hub_of_models import TOKEN, ModelHub, hub_of_models
from huggingface_hub import close_session
from releases import deepfloyd
from small_run import SmallRun

from deepfloyd_core.config.flavours import FLAVOURS
from deepfloyd_core.doctor import examine
from deepfloyd_core.doctor.finding import Finding
from deepfloyd_core.errors import JobError
from deepfloyd_core.models import torch_facts
from deepfloyd_core.models.torch_facts import TorchFacts
from deepfloyd_core.models.work import Speed, Speeds
from flows.commands.doctor import hidden, report_json, secrets_of
from flows.serving.server_log import STARTED


def speeds(no: float, bf16: float) -> Speeds:
    return {"no": Speed(flops=no, bytes=1.0, call_s=1.0), "bf16": Speed(flops=bf16, bytes=1.0, call_s=1.0)}


FACTS = TorchFacts(version="2.13.0", build="the CPU", device="cpu", threads=2, cpu_speeds=speeds(1.0, 2.0))
OF_GPU = {"device": "cuda", "device_name": "a GPU", "total_bytes": 24 * 10**9, "free_bytes": 20 * 10**9}
REPO = "DeepFloyd/IF-I-M-v1.0"
HUB_MODEL = f"--set=stage1.pretrained_model_name_or_path={REPO}"
FILES = {
    "model_index.json": 500, "unet/config.json": 1_000, "unet/diffusion_pytorch_model.safetensors": 1_500_000_000,
    "scheduler/scheduler_config.json": 500, "text_encoder/config.json": 500, "text_encoder/model.safetensors": 9_500_000_000,
    "tokenizer/tokenizer_config.json": 500,
}  # fmt: skip
OTHERS = {
    "unet/diffusion_pytorch_model.bin": 1_500_000_000,
    "unet/diffusion_pytorch_model.fp16.safetensors": 750_000_000,
}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A healthy one, with nothing in its environment, whose torch is not asked."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(("HF_", "PREFECT_API", "PREFECT_HOME")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(examine, "ask_torch", lambda: FACTS)


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModelHub]:
    """The only one that can be reached; the cache is empty, and nobody is logged in."""
    constants = import_module("huggingface_hub.constants")
    with hub_of_models() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        close_session()  # it keeps the proxies of the environment in which it was opened
        yield running
        close_session()


def told(*arguments: str, code: int) -> list[dict[str, Any]]:
    """The findings that are not fine, in their order."""
    done = deepfloyd("doctor", *arguments, "--json")
    assert done.exit_code == code, (done.output, done.exception)
    return [each for each in json.loads(done.stdout)["findings"] if each["state"] != "fine"]


def only(*arguments: str) -> dict[str, Any]:
    """The only fault."""
    found = told(*arguments, code=1)
    assert [each["state"] for each in found].count("fault") == 1 and found[0]["state"] == "fault", found
    return found[0]


def test_a_machine_without_faults_is_told_in_lines_and_as_json(small_run: SmallRun) -> None:
    done = deepfloyd("doctor", str(small_run.config))
    lines = done.stdout.splitlines()
    assert done.exit_code == 0 and lines[-1] == f"no faults, 0 notes, {len(lines) - 1} fine"
    assert {line.split()[0] for line in lines[:-1]} == {"fine"}
    lines = deepfloyd("doctor").stdout.splitlines()
    assert lines[0].split()[:2] == ["note", "hub"] and lines[1].split() == ["->", "hf", "auth", "login"]
    assert lines[-1].startswith("no faults, 1 note, ")
    report = json.loads(deepfloyd("doctor", str(small_run.config), "--json").stdout)
    assert report.keys() == {"schema", "python", "platform", "packages", "findings"}
    assert {"torch", "diffusers", "transformers", "peft", "prefect", "pyarrow", "pillow", "numpy"} <= report[
        "packages"
    ].keys()
    assert not small_run.workspace.exists() and not list(small_run.folder.glob(".trial*"))


def test_torch_is_asked_in_a_process_of_its_own() -> None:
    facts = torch_facts.ask_torch()
    assert facts.version and facts.bf16_times is not None and facts.bf16_times > 0


@pytest.mark.parametrize(
    ("code", "said"),
    [("raise ImportError('no libtorch')", "torch failed: ImportError: no libtorch"),
     ("import os; os.kill(os.getpid(), 4)", "torch was ended by SIGILL"), ("print(1)", "torch told nothing of use: '1'"),
     ("import time; time.sleep(60)", "torch has not answered in 0.5 s")],
)  # fmt: skip
def test_a_torch_that_fails_crashes_or_hangs_is_a_finding(
    code: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}"\n')
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(JobError, match=said):
        torch_facts.ask_torch(0.5 if "sleep" in code else 60)
    monkeypatch.undo()


def test_a_torch_that_tells_nothing_is_said_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask() -> TorchFacts:
        raise JobError("torch cannot be imported: no libtorch")

    monkeypatch.setattr(examine, "ask_torch", ask)
    assert only()["remedy"] == "pip install --force-reinstall torch"


def test_a_missing_extra_is_said_once_with_the_command_that_installs_it(
    small_run: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *rest: None if name == "prodigyopt" else find(name, *rest))
    fault = only(str(small_run.config), "--set=stage1.optimizer=prodigy")
    assert fault["name"] == "run file" and "optimizer is 'prodigy', and prodigyopt cannot be imported" in fault["text"]
    assert fault["remedy"] == "pip install 'deepfloyd-pipeline[optimizers]'" and "pip" not in fault["text"]


def test_a_required_package_in_a_wrong_version_is_said_with_the_right_one(monkeypatch: pytest.MonkeyPatch) -> None:
    version = import_module("importlib.metadata").version
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.1" if name == "peft" else version(name))
    fault = only()
    assert (fault["text"], fault["remedy"]) == ("peft is 0.1", "pip install 'peft<0.22,>=0.21'")


def test_a_package_that_the_look_itself_takes_is_said_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    version = import_module("importlib.metadata").version

    def without_psutil(name: str) -> str:
        if name == "psutil":
            raise PackageNotFoundError(name)
        return str(version(name))

    def look(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'psutil'")

    monkeypatch.setattr(examine, "memory_findings", look)
    assert isinstance(deepfloyd("doctor").exception, ModuleNotFoundError), "a fault of ours, where nothing is missing"
    monkeypatch.setattr("importlib.metadata.version", without_psutil)
    assert told(code=1) == [only()] and only()["remedy"] == "pip install 'psutil>=5.9'"


def test_a_gated_model_is_said_with_its_licence_and_nothing_is_downloaded(small_run: SmallRun, hub: ModelHub) -> None:
    hub.repos[REPO], hub.gated = FILES, {REPO}
    fault = only(str(small_run.config), HUB_MODEL)
    assert fault["name"] == "stage1 model" and f"{REPO} is gated: " in fault["text"]
    assert f"Accept the licence at https://huggingface.co/{REPO} and run `hf auth login`" in fault["remedy"]
    assert not hub.downloads and not (small_run.folder / "hub").exists()


def test_a_model_that_may_be_read_is_told_with_the_size_of_its_download(
    small_run: SmallRun, hub: ModelHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos[REPO] = FILES | OTHERS
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    done = deepfloyd("doctor", str(small_run.config), HUB_MODEL)
    assert done.exit_code == 0 and f"{REPO}: 11.0 GB will be downloaded" in done.output, done.output
    assert "accepts the token" in done.output and TOKEN not in done.output and "alice" not in done.output
    assert not hub.downloads

    room = SimpleNamespace(total=10**12, used=0, free=10 * 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room)
    fault = only(str(small_run.config), HUB_MODEL)
    assert fault["name"] == "disk" and fault["text"].startswith("10.0 GB free") and "11.0 GB" in fault["text"]
    assert fault["remedy"] == "export HF_HOME=/a/larger/disk"


def test_a_model_in_the_cache_needs_no_hub(small_run: SmallRun, hub: ModelHub, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = small_run.folder / f"hub/models--{REPO.replace('/', '--')}/snapshots/abc"
    shutil.copytree(FLAVOURS["tiny-i"].repo, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("abc")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        notes = told(str(small_run.config), HUB_MODEL, code=0)
        assert [each["name"] for each in notes] == ["clock", "hub"] and "cannot be reached" in notes[1]["text"]
        shutil.rmtree(snapshot)
        fault = only(str(small_run.config), HUB_MODEL)
        assert "cannot be reached" in fault["text"] and fault["remedy"].startswith(
            "Run this again when it can, or point"
        )


def test_a_token_that_the_hub_refuses_is_said_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of-somebody-else")
    (note,) = told(code=0)
    assert "refuses the token" in note["text"] and note["remedy"] == "hf auth login --force"
    assert "somebody" not in str(note)


@pytest.mark.parametrize(("ahead_s", "said"), [(3_700, "1 h 2 min behind"), (-7_200, "2 h ahead of")])
def test_a_clock_that_is_wrong_is_a_fault(hub: ModelHub, ahead_s: float, said: str) -> None:
    hub.ahead_s = ahead_s
    fault = only()
    assert fault["name"] == "clock" and said in fault["text"] and "timedatectl" in fault["remedy"]


def test_too_little_memory_is_said_with_a_key_that_takes_less(
    small_run: SmallRun, hub: ModelHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos[REPO] = FILES
    model = "--set=stage1.model_flavour=i-medium-400m"
    memory = SimpleNamespace(total=8 * 10**9, available=6 * 10**9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    fault = only(str(small_run.config), model)
    assert fault["name"] == "memory" and "T5, to encode captions, takes 19.0 GB" in fault["text"]
    assert fault["remedy"] == f"deepfloyd run {small_run.config} --set text_encoder_streaming=true"
    assert told(str(small_run.config), model, "--set=text_encoder_streaming=true", code=0)[0]["name"] == "hub"

    monkeypatch.setattr(examine, "ask_torch", lambda: FACTS.model_copy(update=OF_GPU))
    assert told(str(small_run.config), model, "--set=device=cuda", code=0)[0]["name"] == "hub", "24 GB take it"


def test_each_model_that_does_not_fit_is_said_and_t5_not_where_captions_were_encoded(
    small_run: SmallRun, hub: ModelHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos[REPO] = FILES
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=5 * 10**9, available=10**9))
    full = ["lora_rank=", "lora_dropout=", "model_type=full", "model_flavour=i-medium-400m"]
    arguments = [str(small_run.config), *(f"--set=stage1.{each}" for each in full)]

    def faults() -> list[str]:
        return [each["text"] for each in told(*arguments, code=1) if each["state"] == "fault"]

    t5, unet = faults()
    assert "T5, to encode captions, takes 19.0 GB" in t5
    assert "the UNet of stage 1, in training, takes 5.95 GB" in unet, "16 bytes for each of 371,605,830 parameters"
    encoded = small_run.workspace / "text_embeds/0123/manifest.json"
    encoded.parent.mkdir(parents=True)
    encoded.touch()
    assert faults() == [unet]


def test_a_device_that_torch_does_not_see_is_a_fault(small_run: SmallRun) -> None:
    fault = only(str(small_run.config), "--set=device=cuda")
    assert fault["name"] == "torch" and "computes on cpu, and device is 'cuda'" in fault["text"]


def test_slow_bf16_is_a_note_where_a_run_file_asks_for_it(small_run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine, "ask_torch", lambda: FACTS.model_copy(update={"cpu_speeds": speeds(3.2, 1.0)}))
    assert not told(str(small_run.config), code=0)
    found = told(str(small_run.config), "--set=stage1.mixed_precision=bf16", code=0)
    note = next(each for each in found if each["name"] == "bf16")
    assert "3.2 times" in note["text"] and note["remedy"].endswith("--set stage1.mixed_precision=no")


def test_too_little_disk_is_one_fault_for_all_that_lies_on_it(
    small_run: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**12, used=0, free=30 * 10**6))
    fault = only(str(small_run.config))
    assert fault["name"] == "disk" and str(small_run.workspace) in fault["text"] and "30.0 MB free" in fault["text"]
    assert fault["remedy"] == 'in the run file: workspace = "/a/larger/disk"'
    small_run.workspace.mkdir()
    assert only(str(small_run.config))["remedy"] == f"deepfloyd gc {small_run.workspace} --delete"


@pytest.mark.parametrize("variable", ["https_proxy", "HTTPS_PROXY", "all_proxy"])
def test_a_dead_proxy_is_said_and_its_password_nowhere(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        monkeypatch.setenv(variable, f"http://alice:p4ss%40word@{address}")
        fault = only()
        assert f"{variable} is http://{address}, where nothing answers" in fault["text"]
        assert fault["remedy"] == f"unset {variable}"
        for arguments in ([], ["--json"]):
            output = deepfloyd("doctor", *arguments).output
            assert not [secret for secret in ("alice", "p4ss", "word@") if secret in output]


@pytest.mark.parametrize(
    ("address", "said", "remedy"),
    [("http://[::1", "which is no address", "unset all_proxy"), ("a::b", "which is no address", "unset all_proxy"),
     ("socks5://u:p4ss@127.0.0.1:9", "and socksio, which such a proxy takes, is not", "pip install 'socksio>=1,<2'")],
)  # fmt: skip
def test_a_proxy_that_the_hub_s_library_cannot_use_is_said_once_and_no_crash(
    address: str, said: str, remedy: str, small_run: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("all_proxy", address)
    found = told(str(small_run.config), HUB_MODEL, code=1)
    assert [each["name"] for each in found if each["state"] == "fault"] == ["proxy", "stage1 model"]
    assert said in found[0]["text"] and found[0]["remedy"] == remedy and "p4ss" not in str(found)
    assert "cannot be reached" in found[1]["text"]


def test_secrets_that_other_texts_repeat_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://bob:hunter2secret@127.0.0.1:9/api")
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def fail() -> TorchFacts:
        raise JobError(f"hunter2secret and {TOKEN} at https://carol:else@host/x")

    monkeypatch.setattr(examine, "ask_torch", fail)
    for arguments in ([], ["--json"]):
        output = deepfloyd("doctor", *arguments).output
        assert "*** and *** at https://host/x" in output
        assert not [secret for secret in ("bob", "hunter2", TOKEN, "carol") if secret in output]


def refuse(number: int) -> Callable[..., Any]:
    def called(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return called


def test_a_file_system_without_hard_links_is_a_note_and_without_locks_a_fault(
    small_run: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    note = next(each for each in told(str(small_run.config), code=0) if each["name"] == "file system")
    assert "has no hard links: files that versions share are copied" in note["text"]
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOLCK))
    faults = [each for each in told(str(small_run.config), code=1) if each["state"] == "fault"]
    assert [each["name"] for each in faults] == ["file system", "Prefect home"]
    assert f"{small_run.workspace} cannot be locked: no locks available" in faults[0]["text"]


def test_the_faults_of_a_run_file_are_told_one_by_one_and_the_rest_all_the_same(small_run: SmallRun) -> None:
    found = told(str(small_run.config), "--set=eval_dataset_id=moons", "--set=stage2.init_lora=nowhere/lora", code=1)
    assert [each["name"] for each in found] == ["run file", "run file"]
    assert "moons" in found[0]["text"] and "nowhere/lora" in found[1]["text"]
    found = told("nowhere.toml", code=1)
    assert found[0]["text"] == "nowhere.toml cannot be read: no such file."
    assert (found[1]["name"], found[1]["state"]) == ("run file", "note") and "when it has no such faults" in found[1][
        "text"
    ]


def test_a_new_user_reads_all_that_is_missing_at_once_and_first(
    small_run: SmallRun, hub: ModelHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing extra, a gated model, too little memory, too little disk, a dead proxy."""
    find = util.find_spec
    hub.repos[REPO], hub.gated = FILES, {REPO}
    monkeypatch.setattr(util, "find_spec", lambda name, *rest: None if name == "prodigyopt" else find(name, *rest))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=8 * 10**9, available=6 * 10**9))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**12, used=0, free=30 * 10**6))
    monkeypatch.setenv("https_proxy", "http://alice:p4ssword@127.0.0.1:9")
    model = "--set=stage1.model_flavour=i-medium-400m"
    done = deepfloyd("doctor", str(small_run.config), model, "--set=stage1.optimizer=prodigy")
    lines = [line.split() for line in done.stdout.splitlines()]
    faults = [" ".join(line[1:3]) for line in lines if line[0] == "fault"]
    assert [fault.split()[0] for fault in faults] == ["run", "proxy", "memory", "stage1", "disk"], done.stdout
    assert [line[0] for line in lines[:10]] == ["fault", "->"] * 5 and lines[10][0] != "->"
    assert done.exit_code == 1 and "alice" not in done.output and "p4ss" not in done.output


def test_a_prefect_server_that_does_not_answer_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    fault = only()
    assert fault["name"] == "Prefect server" and "no Prefect server answers there" in fault["text"]
    assert fault["remedy"] == "unset PREFECT_API_URL"


def test_services_that_fail_are_told_of_the_server_that_runs_and_not_of_an_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = "21:27:57.023 | ERROR   | docket - {}(){{x}}\nTraceback (most recent call last):\nKeyError: 'x'\n"
    (tmp_path / ".prefect").mkdir()
    log = tmp_path / ".prefect/server.log"
    log.write_bytes(failed.format("of_before").encode() + STARTED + failed.format("of_now").encode() * 2)
    with (tmp_path / ".prefect/server.json").open("w") as record:  # as a server holds it
        fcntl.flock(record, fcntl.LOCK_EX)
        record.write('{"url": "http://127.0.0.1:9/api"}')
        record.flush()
        faults = [each for each in told(code=1) if each["state"] == "fault"]
    assert [each["name"] for each in faults] == ["Prefect server", "Prefect services"]
    assert faults[1]["text"] == "of_now fails: KeyError: 'x'" and faults[1]["remedy"] == f"tail -n 50 {log}"


def test_keys_are_changed_of_a_run_file_only() -> None:
    done = deepfloyd("doctor", "--set=workspace=x")
    assert done.exit_code == 2 and "name it" in done.output


def test_pieces_of_a_password_a_home_and_a_flag_are_told_right(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = secrets_of({"https_proxy": "http://joe:12hunter/2x9@10.0.0.1:3128", "TOKENIZERS_PARALLELISM": "false"})
    finding = hidden(
        Finding("x", "note", "Invalid port: '12hunter', false, at http://joe:12hunter/2x9@10.0.0.1:3128"), secrets
    )
    assert finding.text == "Invalid port: '***', false, at http://10.0.0.1:3128"
    for home, shown in (("/home/j\u00fcrgen", "~/x of https://a"), ("/", "/home/j\u00fcrgen/x of https://a")):
        monkeypatch.setattr(Path, "home", lambda home=home: Path(home))
        report = report_json([Finding("x", "fine", "/home/j\u00fcrgen/x of https://a")])
        assert json.loads(report)["findings"][0]["text"] == shown


def test_a_run_file_that_only_draws_is_no_fault(small_run: SmallRun) -> None:
    found = told(str(small_run.config), "--set=data_backend_config=", code=0)
    assert not [each for each in found if each["state"] == "fault"]
    assert any("it can draw and not train" in each["text"] for each in found)

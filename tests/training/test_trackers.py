"""W&B, with the library itself and without a network: its own file of a run is read back."""

import json
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from data_world import DataWorld
from PIL import Image
from small_run import SmallRun
from training_parts import break_in_step, prepared, run_here, train_stage

from deepfloyd_core.errors import ConfigError, JobError
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.preflight.wandb_login import check_wandb
from deepfloyd_core.training.checkpoints import StepMetrics
from deepfloyd_core.training.eval_loss import HELD_OUT, SEEN, GridLoss
from deepfloyd_core.training.trackers import open_loggers, show_validation, shown_metrics
from deepfloyd_core.training.trainer import METRICS_FILE

pytestmark = pytest.mark.skipif(not find_spec("wandb"), reason="pip install 'deepfloyd-pipeline[wandb]'")

KEY = "0123456789abcdef0123456789abcdef01234567"


class Proxy(threading.Thread):
    """Where everything would go that leaves the machine, with a count of what came."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.server, self.seen = socket.create_server(("127.0.0.1", 0)), 0
        self.url = f"http://127.0.0.1:{self.server.getsockname()[1]}"

    def run(self) -> None:
        while True:
            try:
                connection, _ = self.server.accept()
            except OSError:
                return
            self.seen += 1
            connection.close()


@pytest.fixture(autouse=True)
def proxy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Proxy]:
    """No key, no home and no network but this."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    found = Proxy()
    found.start()
    (tmp_path / "home").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # the library leaves folders there
    for name, value in {"HOME": str(tmp_path / "home"), "NETRC": str(tmp_path / "netrc")}.items():
        monkeypatch.setenv(name, value)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, found.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield found
    found.server.close()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, proxy: Proxy) -> Iterator[None]:
    """WANDB_MODE=offline, read anew by the library, which keeps it for a process."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()
    yield
    wandb.teardown()
    assert proxy.seen == 0, "nothing leaves the machine"


def records(file: Path) -> Iterator[Any]:
    """The messages in a run's file, by the library's own types, in LevelDB's log format: blocks of 32 KiB, in them pieces
    with checksum, length and kind. The first block begins with 7 bytes of W&B's.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last piece
            yield Record.FromString(whole)
            whole = b""


def rows(file: Path) -> list[dict[str, Any]]:
    """What was shown, by W&B's steps."""
    history = (record.history for record in records(file) if record.HasField("history"))
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row.item} for row in history
    ]


def run_files(folder: Path) -> list[Path]:
    """One of each process that wrote, in their order; its server writes their ends when it stops."""
    import wandb

    wandb.teardown()
    return sorted(folder.glob("wandb/*run-*/*.wandb"), key=lambda file: file.stat().st_mtime)


WANDB = (("wandb",), {"lora_rank": 4, "seed": 3})


def losses(value: float) -> list[GridLoss]:
    return [GridLoss(part, "a", 100, value) for part in (HELD_OUT, SEEN)]


@pytest.mark.usefixtures("offline")
def test_a_run_is_the_artifacts_and_holds_what_was_shown_of_each_step(tmp_path: Path) -> None:
    out, picture = tmp_path / "stage1_lora" / "abc", tmp_path / "000.png"
    Image.new("RGB", (8, 8), (255, 0, 0)).save(picture)
    with open_loggers(*WANDB, out, []) as show:
        show_validation(show, 0, losses(1.0), [picture])
        for step in (1, 2, 3):
            show(step, {"loss": step / 4, "lr": 1e-4}, ())
        show_validation(show, 3, losses(0.5), [picture])
    (file,) = run_files(tmp_path)
    shown = rows(file)
    assert [row["_step"] for row in shown] == [0, 1, 2, 3]
    assert [row.get("loss") for row in shown] == [None, 0.25, 0.5, 0.75]
    assert [row.get("loss/held_out") for row in shown] == [1.0, None, None, 0.5]
    media = [row["validation/000.path"] for row in (shown[0], shown[3])]
    assert all((file.parent / "files" / path).read_bytes() == picture.read_bytes() for path in media)
    run = next(record.run for record in records(file) if record.HasField("run"))
    assert (run.run_id, run.display_name, run.project) == ("stage1_lora-abc", "stage1_lora-abc", "deepfloyd")
    assert not run.HasField("git"), "a remote's address may hold a token"
    settings = {item.key: item.value_json for item in run.config.update}
    assert (settings["lora_rank"], settings["seed"]) == ("4", "3")
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if KEY.encode() in path.read_bytes()]


@pytest.mark.usefixtures("offline")
def test_its_own_variables_say_where_and_under_which_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    for name, value in {"DIR": str(tmp_path / "elsewhere"), "PROJECT": "mine", "NAME": "first try"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    wandb.teardown()
    with open_loggers(*WANDB, tmp_path / "stage1_lora" / "abc", []) as show:
        show(1, {"loss": 1.0}, ())
    assert not run_files(tmp_path)
    (file,) = run_files(tmp_path / "elsewhere")
    run = next(record.run for record in records(file) if record.HasField("run"))
    assert (run.run_id, run.display_name, run.project) == ("stage1_lora-abc", "first try", "mine")


def metrics(*steps: int) -> list[StepMetrics]:
    return [StepMetrics(step, float(step), 1e-4, 1.0) for step in steps]


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("has", "end", "expected"),
    [
        # Its server has steps 0 to 6: killed in the validation of step 6.
        (7, 8, [(7, 7.0, 0.5), (8, 8.0, None)]),
        # The same, stopped again before anything new.
        (7, 6, [(7, None, 0.5)]),
        # It had sent 0 to 2 of the 4 steps before the checkpoint; offline none.
        (3, 6, [(3, 3.0, None), (4, 4.0, None), (5, 5.0, None), (6, 6.0, 0.5)]),
        (0, 6, [(step, float(step), 0.5 if step == 6 else None) for step in range(1, 7)]),
    ],
)
def test_what_w_and_b_has_is_not_shown_again_and_what_it_lacks_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has: int, end: int, expected: list[tuple[int, float, float | None]]
) -> None:
    """A training with a checkpoint of step 4 is resumed, and validates after step 6."""
    import wandb

    monkeypatch.setattr(wandb.Run, "step", property(lambda run: has))
    with open_loggers(*WANDB, tmp_path / "stage1_lora" / "abc", metrics(1, 2, 3, 4)) as show:
        for row in metrics(*range(5, end + 1)):
            show(row.step, shown_metrics(row), ())
            if row.step == 6:
                show_validation(show, 6, losses(0.5), ())
    (file,) = run_files(tmp_path)
    assert [(row["_step"], row.get("loss"), row.get("loss/held_out")) for row in rows(file)] == expected


@pytest.mark.usefixtures("offline")
def test_a_server_that_does_not_answer_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def init(**keys: Any) -> None:
        raise wandb.errors.CommError("Failed to get resume status:\nconnection refused.")

    monkeypatch.setattr(wandb, "init", init)
    with (
        pytest.raises(
            JobError, match=r"^W&B cannot be reached: Failed to get resume status: connection refused\. WANDB_"
        ),
        open_loggers(*WANDB, tmp_path / "stage1_lora" / "abc", []),
    ):
        pass


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_a_training_that_broke_off_goes_on_in_its_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    new_small_run: Callable[[Path], SmallRun],
    new_world: Callable[[Path], DataWorld],
) -> None:
    """Against metrics.parquet's numbers; W&B changes no byte of the artifact."""
    small = new_small_run(tmp_path / "run")
    keys = ["max_train_steps=3", "validation_step_interval=3", "checkpoint_step_interval=1"]
    settings = tuple(f"stage1.{key}" for key in keys)
    first = load_run(small.config, settings)
    made = prepared(first, new_world(first.workspace))
    plain = train_stage(first, made, 1, tmp_path / "plain", how=run_here)
    run = load_run(small.config, (*settings, "report_to=tensorboard,wandb"))
    break_in_step(monkeypatch, 2)
    with pytest.raises(RuntimeError, match="broken"):
        train_stage(run, made, 1, tmp_path / "shown", how=run_here)
    lora = train_stage(run, made, 1, tmp_path / "shown", how=run_here)
    assert (lora.fingerprint, lora.hashes) == (plain.fingerprint, plain.hashes)
    files = run_files(tmp_path / "shown")
    ids = {next(record.run.run_id for record in records(file) if record.HasField("run")) for file in files}
    assert ids == {f"stage1_lora-{lora.fingerprint}"}
    broken, resumed = map(rows, files)
    assert [row["_step"] for row in broken] == [0, 1, 2] and [row["_step"] for row in resumed] == [1, 2, 3]
    assert {"loss", "lr", "grad_norm", "samples_per_s", "peak_gib"} <= resumed[2].keys()
    assert [row["loss"] for row in resumed] == [
        row["loss"] for row in pq.read_table(lora.path / METRICS_FILE).to_pylist()
    ]
    assert [row["loss"] for row in broken[1:]] == [row["loss"] for row in resumed[:2]]
    assert resumed[2]["loss/held_out"] == pytest.approx(lora.manifest.summary["eval_loss"], rel=1e-12)
    assert "validation/000.path" in broken[0] and "validation/000.path" in resumed[2]
    assert list((tmp_path / "shown" / "tensorboard").rglob("events.*")), "and TensorBoard"
    text = b"".join(path.read_bytes() for path in (tmp_path / "shown").rglob("*") if path.is_file())
    assert KEY.encode() not in text


# ---- before anything is made ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_no_key_is_needed_where_nothing_is_sent(mode: str, monkeypatch: pytest.MonkeyPatch, proxy: Proxy) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    check_wandb()
    assert proxy.seen == 0


@pytest.mark.slow
def test_a_key_is_found_where_the_library_looks_for_it_and_nothing_is_sent(
    monkeypatch: pytest.MonkeyPatch, proxy: Proxy
) -> None:
    with pytest.raises(
        ConfigError, match=r"no key of W&B is known\. Set WANDB_API_KEY or run `wandb login`; WANDB_MODE="
    ):
        check_wandb()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    check_wandb()
    monkeypatch.setenv("WANDB_API_KEY", "no-key-at-all")
    with pytest.raises(ConfigError, match="WANDB_API_KEY invalid: API key must have 40") as caught:
        check_wandb()
    assert "no-key-at-all" not in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert not proxy.seen


def test_nobody_is_asked_for_a_key_on_a_terminal_either(tmp_path: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    command = [
        sys.executable,
        "-P",
        "-c",
        "from deepfloyd_core.preflight.wandb_login import check_wandb; check_wandb()",
    ]
    done = subprocess.run(
        command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, text=True, timeout=60, cwd=tmp_path
    )
    os.close(theirs)
    os.close(ours)
    assert done.returncode == 1 and "no key of W&B is known" in done.stderr


@pytest.mark.slow
def test_the_command_line_says_so_and_makes_nothing(server: str, small_run: SmallRun) -> None:
    failed = small_run.call_here("train-stage1", str(small_run.config), "--set=report_to=wandb")
    assert failed.returncode == 2
    assert "report_to has wandb, and no key of W&B is known" in " ".join(failed.stderr.split())
    assert not small_run.workspace.exists() or not list(small_run.workspace.glob("*/*"))

"""A run killed with SIGKILL in any stage goes on where it was, and ends with the same LoRA bytes as an unbroken one."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from narrowing import known
from prefect_api import PrefectApi
from small_run import SmallRun

LORAS = "stage?_lora/*/pytorch_lora_weights.safetensors"
# In the order of the flow: a stage, and what is there only while it is under way.
MOMENTS = {
    "stage I pixels": "stage1_pixels/*/.part-*",
    "stage II pixels": "stage2_pixels/*/.part-*",
    "text embeds": "text_embeds/*/.job-embed.request",
    "stage I text": "stage1_text/*/.job-project.request",
    "stage I LoRA": "stage1_lora/*/.checkpoints/*/checkpoint.json",
    "stage II LoRA": "stage2_lora/*/.checkpoints/*/checkpoint.json",
}
# These are killed with every process that a user's run has; of the others a fork in which the jobs run as well, which
# takes a third of the time. DEEPFLOYD_KILLS, for more kills everywhere, kills real ones in every stage.
WITH_PROCESSES = MOMENTS if "DEEPFLOYD_KILLS" in os.environ else ("text embeds", "stage I LoRA")


SHORT = tuple(
    word
    for key in (
        "stage1.max_train_steps=8", "stage1.validation_step_interval=0", "stage2.max_train_steps=4", "num_eval_images=1",
        "num_validation_images=1",
    )
    for word in ("--set", key)
)  # fmt: skip


def _kill_at(run: SmallRun, stage: str) -> bool:
    """Start the run in a session of its own and SIGKILL all of it in this stage; False if it ended first."""
    log = run.folder / "killed.log"
    if stage in WITH_PROCESSES:
        with log.open("ab") as opened:
            process = subprocess.Popen(
                run.command("run", str(run.config), *SHORT),
                cwd=run.folder,
                stdout=opened,
                stderr=opened,
                start_new_session=True,
            )
        return _killed_in(run, stage, process.pid, lambda: process.poll() is not None, process.wait)
    fork = run.start_here(log, "run", str(run.config), *SHORT)
    return _killed_in(run, stage, known(fork.pid), lambda: not fork.is_alive(), fork.join)


def _killed_in(run: SmallRun, stage: str, group: int, ended: Callable[[], bool], wait: Callable[[], object]) -> bool:
    deadline = time.monotonic() + 300
    while not ended() and time.monotonic() < deadline:
        if any(run.workspace.glob(MOMENTS[stage])):
            os.killpg(group, signal.SIGKILL)
            wait()
            return True
        time.sleep(0.002)
    if not ended():
        os.killpg(group, signal.SIGKILL)
    wait()
    return False


@pytest.mark.slow
def test_runs_killed_in_every_stage_end_with_the_bytes_of_an_unbroken_run(
    server: str, tmp_path: Path, new_small_run: Callable[[Path], SmallRun]
) -> None:
    unbroken, broken = new_small_run(tmp_path / "unbroken"), new_small_run(tmp_path / "broken")
    whole = unbroken.call_here("run", str(unbroken.config), *SHORT)
    assert whole.returncode == 0, whole.stderr
    killed = [stage for stage in MOMENTS if _kill_at(broken, stage)]
    assert killed == list(MOMENTS), (broken.folder / "killed.log").read_text()[-3000:]
    last = broken.call_here("run", str(broken.config), *SHORT)
    assert last.returncode == 0, last.stderr
    assert "stage1_lora" in last.stderr and ": reused" in last.stderr
    expected = {path.parent.parent.name: path.read_bytes() for path in unbroken.workspace.glob(LORAS)}
    found = {path.parent.parent.name: path.read_bytes() for path in broken.workspace.glob(LORAS)}
    assert len(expected) == 2
    assert found == expected
    shards = {path.name: path.read_bytes() for path in unbroken.workspace.glob("stage?_pixels/*/*.parquet")}
    assert {path.name: path.read_bytes() for path in broken.workspace.glob("stage?_pixels/*/*.parquet")} == shards
    assert broken.call_here("verify", str(broken.workspace)).returncode == 0
    states = PrefectApi(server).states_of(str(broken.config))
    assert states == ["CRASHED"] * len(killed) + ["COMPLETED"], "none is said to be running"


@pytest.mark.slow
def test_two_runs_at_once_share_the_work(server: str, small_run: SmallRun) -> None:
    """One has processes for its jobs, the other is a fork."""
    arguments = "run", str(small_run.config), *SHORT
    logs = [small_run.folder / name for name in ("process.log", "fork.log")]
    with logs[0].open("wb") as log:
        process = subprocess.Popen(small_run.command(*arguments), cwd=small_run.folder, stdout=log, stderr=log)
    started = time.monotonic()
    while not any(small_run.workspace.glob("image_index/*")) and time.monotonic() - started < 60:
        time.sleep(0.01)  # a fork is ready at once
    fork = small_run.start_here(logs[1], *arguments)
    fork.join(600)
    codes = process.wait(600), fork.exitcode
    printed = [log.read_text() for log in logs]
    assert codes == (0, 0), printed
    kinds = "image_index", "text_embeds", "stage1_text", "stage1_pixels", "stage1_lora", "stage2_lora", "lora_bundle"
    for kind in kinds:
        assert (
            sum(line.count(f"{kind} ") for text in printed for line in text.splitlines() if ": built," in line) == 1
        ), kind
    assert len(list((small_run.workspace / "versions").glob("*.json"))) == 1
    assert sum("waiting for finetune " in " ".join(text.split()) for text in printed) == 1, "the second, and for whom"

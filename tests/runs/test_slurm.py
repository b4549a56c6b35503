"""The job script of SLURM, run in bash: what it does when the time of its allocation is nearly over."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from polling import within
from recipes import DEPLOY
from small_run import SmallRun

PATIENCE_S = 240.0  # a hang, not a measure of speed


@pytest.mark.slow
def test_a_job_whose_time_is_nearly_over_is_queued_again_and_then_ends(small_run: SmallRun, tmp_path: Path) -> None:
    tools, log, queued = tmp_path / "tools", tmp_path / "job.log", tmp_path / "queued"
    tools.mkdir()
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {queued}\n')
    (tools / "deepfloyd").write_text(f'#!/bin/sh\nexec {sys.executable} -P -m flows "$@"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    environ = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    environ |= {"DEEPFLOYD_BIN": str(tools), "SLURM_JOB_ID": "42", "LAST_STEP_S": "1", "TMPDIR": str(tmp_path)}
    keys = (
        "stage1.max_train_steps=60",
        "stage1.validation_step_interval=",
        "stage2.max_train_steps=1",
        "num_eval_images=0",
    )
    words = [word for key in keys for word in ("--set", key)]
    command = ["bash", str(DEPLOY / "slurm" / "run.sbatch"), str(small_run.config), *words]
    with log.open("ab") as out:
        job = subprocess.Popen(command, cwd=small_run.folder, env=environ, stdout=out, stderr=out)
        assert within(PATIENCE_S, lambda: any(small_run.workspace.glob("stage1_lora/*/.checkpoints/*")), every_s=0.1)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(PATIENCE_S) == 128 + signal.SIGTERM, log.read_text()
        assert queued.read_text() == "requeue 42\n"
        again = subprocess.run(command, cwd=small_run.folder, env=environ, stdout=out, stderr=out, timeout=PATIENCE_S)
    assert again.returncode == 0, log.read_text()
    assert (small_run.workspace / "versions" / "0001.json").exists()
    assert queued.read_text() == "requeue 42\n"

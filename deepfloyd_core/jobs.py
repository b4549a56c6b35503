"""Torch runs in child processes: the parent stays small, a model's memory is gone when its job ends.

The request, the log, the progress and the result are dot files in the artifact's own directory, so a dead parent breaks
no pipe. The child inherits the artifact's lock and asks the kernel for SIGTERM when its parent dies: a trainer then
writes a checkpoint and still owns its files until it is gone. Costs one interpreter start and import, 4 to 10 s a job.
"""

import ctypes
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from deepfloyd_core import errors
from deepfloyd_core.artifacts import Artifact, WorkDir
from deepfloyd_core.config import RunConfig
from deepfloyd_core.errors import DeepFloydError, JobError, Stop
from deepfloyd_core.files import write_bytes
from deepfloyd_core.types import Report, no_report

JOBS = {
    "embed": "deepfloyd_core.embed_job:embed_job",
    "project": "deepfloyd_core.projected:project_job",
    "remake": "deepfloyd_core.stage1_low_res:remake_job",
    "train": "deepfloyd_core.train:train_job",
    "sample": "deepfloyd_core.samples:samples_job",
    "generate": "deepfloyd_core.generate:generate_job",
}
POLL_S = 0.1
STOP_GRACE_S = 60.0  # how long a job may take to write its last checkpoint
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Job:
    """What a job's function gets."""

    config: RunConfig
    inputs: dict[str, Artifact]
    options: dict[str, Any]
    out: Path
    report: Report


def run_job(
    name: str, config: RunConfig, inputs: dict[str, Artifact], options: dict[str, Any], work: WorkDir,
    report: Report = no_report,
) -> dict[str, Any]:  # fmt: skip
    """Run one job in a child process and return its summary. `name`: of JOBS; several at once add a number, `embed.1`.

    Raises the child's own DeepFloydError, or JobError with the end of its log when it died without one.
    """
    paths = {part: work.path / f".job-{name}.{part}" for part in ("request", "log", "progress", "result")}
    for path in paths.values():
        path.unlink(missing_ok=True)
    request = {
        "config": config.model_dump(mode="json"),
        "inputs": {key: [item.kind, item.fingerprint, str(item.path)] for key, item in inputs.items()},
        "options": options,
        "parent": os.getpid(),
    }
    write_bytes(paths["request"], json.dumps(request).encode())
    # -P: the current directory holds a folder `datasets`, which must not pass for Hugging Face's package.
    command = [sys.executable, "-P", "-m", "deepfloyd_core.jobs", name, str(work.path.absolute())]
    with paths["log"].open("wb") as log_file:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log_file, stderr=subprocess.STDOUT, pass_fds=(work.lock_fd,)
        )
    try:
        _follow(child, paths["progress"], report)
    finally:
        _stop(child)
    return _outcome(name, child.returncode, paths)


def job_function(name: str) -> Callable[[Job], dict[str, Any]]:
    """What does a job of JOBS, imported now; `name` may have a number, as in `run_job`."""
    module, function = JOBS[name.split(".")[0]].split(":")
    found: Callable[[Job], dict[str, Any]] = getattr(importlib.import_module(module), function)
    return found


def run_parts(
    name: str, config: RunConfig, inputs: dict[str, Artifact], options: dict[str, Any], work: WorkDir, report: Report
) -> dict[str, Any]:
    """Run a job whose parts `embed_workers` processes make at once, then once more for what is made of all of them."""
    count = config.embed_workers
    shown = [(0, 0, "")] * count

    def run_part(number: int) -> None:
        def show(done: int, total: int, line: str) -> None:
            shown[number] = done, total, line

        run_job(f"{name}.{number}", config, inputs, {**options, "part": [number, count]}, work, show)

    if count > 1:
        with ThreadPoolExecutor(count) as pool:
            parts = [pool.submit(run_part, number) for number in range(count)]
            while wait(parts, POLL_S).not_done:  # reports go out from the caller's thread, which has Prefect's context
                done, total, lines = zip(*shown, strict=True)
                report(sum(done), sum(total), f"{lines[0]} in each of {count} processes")
        for part in parts:
            part.result()
    return run_job(name, config, inputs, options, work, report)


def _follow(child: "subprocess.Popen[bytes]", progress: Path, report: Report) -> None:
    position = 0
    running = True
    while running:
        running = child.poll() is None
        if progress.exists():
            with progress.open("rb") as handle:
                handle.seek(position)
                lines = handle.read().split(b"\n")
            position += sum(len(line) + 1 for line in lines[:-1])
            if len(lines) > 1:
                done, total, line = json.loads(lines[-2])
                report(done, total, line)
        if running:
            time.sleep(POLL_S)


def _stop(child: "subprocess.Popen[bytes]") -> None:
    if child.poll() is not None:
        return
    child.terminate()
    try:
        child.wait(STOP_GRACE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _outcome(name: str, code: int, paths: dict[str, Path]) -> dict[str, Any]:
    result = json.loads(paths["result"].read_bytes()) if paths["result"].exists() else None
    if result is not None and result["error"] is None:
        return dict(result["summary"])
    if result is not None:
        raise getattr(errors, result["error"])(result["message"])
    tail = "\n".join(paths["log"].read_text(errors="replace").splitlines()[-15:])
    died = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    hint = " The kernel kills a process that takes too much memory." if code == -signal.SIGKILL else ""
    raise JobError(f"The {name} job {died}.{hint} Its log is {paths['log']}; it ends with:\n{tail}")


def main(name: str, folder: str) -> int:
    """Entry of the child process."""
    out = Path(folder)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    request = json.loads((out / f".job-{name}.request").read_bytes())
    _die_with_parent(request["parent"])
    signal.signal(signal.SIGTERM, _on_sigterm)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent then sends SIGTERM
    progress = (out / f".job-{name}.progress").open("w")

    def report(done: int, total: int, line: str) -> None:
        progress.write(json.dumps([done, total, line]) + "\n")
        progress.flush()

    inputs = {key: Artifact(kind, fp, Path(path)) for key, (kind, fp, path) in request["inputs"].items()}
    job = Job(RunConfig.model_validate(request["config"]), inputs, request["options"], out, report)
    result: dict[str, Any] = {"error": None, "message": None, "summary": None}
    try:
        result["summary"] = job_function(name)(job)
    except DeepFloydError as error:
        result |= {"error": type(error).__name__, "message": str(error)}
    except Stop:
        result |= {"error": "JobError", "message": f"The {name} job was stopped; run it again to continue."}
    except MemoryError:
        traceback.print_exc()
        result |= {"error": "JobError", "message": f"The {name} job ran out of memory; its log is in {out}."}
    write_bytes(out / f".job-{name}.result", json.dumps(result).encode())
    return 0 if result["error"] is None else 1


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough; the checkpoint being written must not be cut
    raise Stop


def _die_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the line above
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))

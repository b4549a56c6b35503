"""The GPU day, without a GPU: what is written when cases fail, hang or are cut off, and all of it on the tiny cascade."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import training_parts

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
sys.path.insert(0, str(SUPPORT))

import gpu_stubs  # noqa: E402  it makes the modules of benchmarks/ importable
from gpu_plan import CASES, PRODUCT, Goal, forecast_s, tolerance  # noqa: E402
from gpu_results import empty_table, measured  # noqa: E402

from deepfloyd_core.preflight.load import load_run  # noqa: E402
from deepfloyd_core.processes.jobs import Job  # noqa: E402
from deepfloyd_core.store.artifacts import Artifact  # noqa: E402
from deepfloyd_core.training import trainer as train  # noqa: E402
from deepfloyd_core.training.jobs import TrainingInputs, train_job  # noqa: E402
from deepfloyd_core.types import no_report  # noqa: E402


def command(cases: str, *arguments: str) -> list[str]:
    return [sys.executable, str(SUPPORT / "gpu_stubs.py"), cases, "--device", "cpu", "--results", "day.1", *arguments]


def day(folder: Path, cases: str, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    """The exit code of a run of some stubs in a folder, and the rows that its file has by then."""
    done = subprocess.run(command(cases, *arguments), cwd=folder, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, rows_of(folder)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "day.1.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def table_of(folder: Path) -> list[list[str]]:
    lines = (folder / "day.1.md").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| a")]


# ---- what is written ------------------------------------------------------------------------------------------------


def test_a_case_that_fails_is_a_row_with_the_last_line_of_its_error_and_the_others_go_on(tmp_path: Path) -> None:
    code, rows = day(tmp_path, "failures")
    failed = {row["case"]: row["note"] for row in rows if row["failed"]}
    assert failed == {
        "out of memory": "CUDA out of memory. Tried to allocate 20.00 GiB",
        "leaves": "SystemExit: there is nothing to do",
        "killed": "its process ended by SIGKILL",
    }
    kept = [row["case"] for row in rows if not row["failed"]]
    assert kept == ["good", "good", "out of memory", "leaves", "killed", "wrong", "not a number"]
    assert code == 1


def test_a_row_says_its_goal_and_whether_it_is_met(tmp_path: Path) -> None:
    _, rows = day(tmp_path, "failures")
    met = {(row["case"], row["figure"]): row["met"] for row in rows if not row["failed"]}
    assert met["good", "off by"] is True and met["wrong", "off by"] is False and met["not a number", "off by"] is False
    assert met["good", "samples/s"] is None, "speed is not judged on a CPU"
    good = [cells for cells in table_of(tmp_path) if cells[1] == "good"]
    assert [cells[:7] for cells in good] == [
        ["a", "good", "off by", "<= 0.001 (rounding alone)", "0.0001", "yes", "of its length"],
        ["a", "good", "samples/s", ">= 100 (a wish)", "50", "", ""],
    ]
    (wrong,) = [cells for cells in table_of(tmp_path) if cells[1] == "wrong"]
    assert wrong[4:6] == ["0.5", "**no**"]
    assert "10 rows" in (tmp_path / "day.1.md").read_text() and "2 goals not met" in (tmp_path / "day.1.md").read_text()


def test_goals_of_speed_are_judged_on_a_card(tmp_path: Path) -> None:
    case = gpu_stubs.CASES["failures"][0]
    assert [measured(case, "samples/s", value, "", 1.0, True).met for value in (99.0, 100.0)] == [False, True]
    assert measured(case, "samples/s", 99.0, "", 1.0, False).met is None
    nothing = measured(case, "off by", math.nan, "", 1.0, True)
    assert nothing.met is False and nothing.value is None


def test_a_case_that_hangs_is_killed_with_all_that_it_started_and_the_next_one_runs(tmp_path: Path) -> None:
    _, rows = day(tmp_path, "slow")
    hung, why, *others = rows
    assert why["failed"] and why["case"] == "hangs" and why["note"].startswith("took more than ")
    assert ended(int(hung["value"])), "what it had started runs on"
    assert [row["case"] for row in others] == ["good", "good"]


def test_a_day_whose_budget_is_spent_stops_with_what_there_is(tmp_path: Path) -> None:
    began = time.monotonic()
    code, rows = day(tmp_path, "endless", "--budget", "6")
    assert time.monotonic() - began < 50  # what hangs would do so for 60 s
    notes = [(row["case"], row["note"]) for row in rows if row["failed"]]
    assert [name for name, _ in notes] == ["hangs", "wrong", "wrong"] and code == 1
    assert "cut off after" in notes[0][1] and {note for _, note in notes[1:]} == {"not run: the budget is spent"}
    assert [row["value"] for row in rows[:2]] == [1e-4, 50.0]


def test_a_second_day_is_added_and_a_resumed_one_does_what_is_missing(tmp_path: Path) -> None:
    code, rows = day(tmp_path, "twice")
    assert [(row["case"], row["failed"]) for row in rows] == [("good", False), ("good", False), ("once", True)]
    with (tmp_path / "day.1.jsonl").open("a") as handle:
        handle.write('{"cut": "off in the mid')
    code, rows = day(tmp_path, "twice", "--resume")
    assert [(row["case"], row["failed"]) for row in rows[3:]] == [("once", False)] and code == 0
    code, rows = day(tmp_path, "twice")
    assert [row["case"] for row in rows[4:]] == ["good", "good", "once"]
    assert (tmp_path / "day.1.md").read_text().count("## at ") == 3


def test_a_killed_day_keeps_its_rows_and_leaves_no_process(tmp_path: Path) -> None:
    started = subprocess.Popen(
        command("endless"), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    while not (tmp_path / "day.1.jsonl").exists() or len(rows_of(tmp_path)) < 3:
        time.sleep(0.05)
        assert started.poll() is None
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert [row["case"] for row in rows_of(tmp_path)] == ["good", "good", "hangs"]
    assert all(map(ended, pids_of(tmp_path)))


def ended(pid: int) -> bool:
    """Whether a process is gone within 50 s, or waits for nothing but its parent to ask for its exit code."""
    until = time.monotonic() + 50
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def pids_of(folder: Path) -> list[int]:
    """Processes of the driver that work in a folder. What a case started itself is not among them."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            where, line = (process / "cwd").readlink(), (process / "cmdline").read_bytes()
        except OSError:
            continue
        if where == folder and b"gpu_stubs.py" in line:
            found.append(int(process.name))
    return found


def test_groups_and_cases_can_be_chosen(tmp_path: Path) -> None:
    code, rows = day(tmp_path, "slow", "--only", "b")
    assert {row["group"] for row in rows} == {"b"} and code == 0
    done = subprocess.run(command("slow", "--plan", "--case", "goo"), cwd=tmp_path, capture_output=True, text=True)
    assert "good" in done.stdout and "hangs" not in done.stdout and "1 cases" in done.stdout


def test_cases_also_run_where_a_fork_cannot_use_the_card(tmp_path: Path) -> None:
    """There each process begins anew; what it yields and how it fails is told all the same."""
    _, rows = day(tmp_path, "failures", "--begin-anew")
    assert [row["case"] for row in rows if row["failed"]] == ["out of memory", "leaves", "killed"]
    assert len(rows) == 10


# ---- what is planned ------------------------------------------------------------------------------------------------


def test_the_plan_fits_into_eight_minutes_with_the_dearest_case_last() -> None:
    assert forecast_s(CASES) < 480
    assert CASES[-1].seconds == max(case.seconds for case in CASES)
    assert {case.group for case in CASES} == set("abcdef")
    assert len({(case.group, case.name) for case in CASES}) == len(CASES)


def test_the_goals_are_those_of_the_product() -> None:
    goals = {(case.name, one.what): one.goal for case in CASES for one in case.figures if one.goal}
    for where, sign, value in (
        (("LoRA r32, IF-I-M", "peak memory"), "<=", 6), (("LoRA r32, IF-I-M", "times the plain loop"), ">=", 2),
        (("full U-Net, IF-I-M", "peak memory"), "<=", 12), (("LoRA r32, Stage II, 256 px", "peak memory"), "<=", 12),
        (("LoRA r32, IF-I-XL", "peak memory"), "<=", 16), (("T5-XXL, resident", "77 tokens: captions/s"), ">=", 500),
        (("T5-XXL, resident", "77 tokens: of that peak"), ">=", 60),
    ):  # fmt: skip
        assert goals[where] == Goal(sign, value, PRODUCT), where
    (gain,) = [goal for (_, what), goal in goals.items() if what == "times the step that is not compiled"]
    assert (gain.sign, gain.value) == (">=", 1.3)
    assert all(goals[name, "gradients, off by"].everywhere for name in ("LoRA", "nf4 base", "ControlNet"))
    assert tolerance(0).met(0.0) and not tolerance(0).met(1e-9)


def test_the_page_has_a_row_for_every_figure() -> None:
    page = (ROOT / "docs/gpu.md").read_text()
    assert "\n".join(empty_table(CASES)) in page, "run benchmarks/gpu.py --empty-table"


# ---- what a CPU can show of the card's paths ------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the training itself would show it")
def test_training_on_a_gpu_asks_torch_for_kernels_that_repeat_themselves(tmp_path: Path) -> None:
    """A day on a GPU compares the bytes; here the training ends where the UNet should go to the card."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "data.json").write_text(
        json.dumps([{"id": "set", "type": "local", "instance_data_dir": str(tmp_path / "pictures")}])
    )
    keys = {"workspace": str(tmp_path), "data_backend_config": str(tmp_path / "data.json"), "num_threads": 1}
    run = {**keys, "device": "cuda", "stage1": {"model_flavour": "tiny-i", "mixed_precision": "no", "lora_rank": 4}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    text = Artifact("stage1_text", "none", tmp_path)
    inputs = TrainingInputs(pixels=text, text=text, eval_set=text)
    asked = train_job(load_run(tmp_path / "run.json"), 1, training_parts.FOLDERS[1], inputs, [], None)
    job = Job(asked, tmp_path, no_report)
    try:
        with pytest.raises((AssertionError, RuntimeError)):
            train.set_up(job)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]  # a property of the module


# ---- all of it ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_day_passes_on_the_tiny_cascade_without_prefect(tmp_path: Path) -> None:
    """112 s of one core. Prefect cannot be imported meanwhile."""
    (tmp_path / "without").mkdir()
    (tmp_path / "without/prefect.py").write_text("raise ImportError('the GPU day must do without Prefect')\n")
    arguments = ["--device", "cpu", "--tiny", "--results", "day.1", "--budget", "3000"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/gpu.py"), *arguments],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "without")}, capture_output=True, text=True,
    )  # fmt: skip
    rows = rows_of(tmp_path)
    assert done.returncode == 0, [row for row in rows if row["failed"]] or done.stdout + done.stderr
    expected = [
        (case.group, case.name, one.what + (f", {one.unit}" if one.unit else ""))
        for case in CASES
        for one in case.figures
    ]
    assert sorted((row["group"], row["case"], row["figure"]) for row in rows) == sorted(expected)
    assert {row["met"] for row in rows if row["group"] == "a"} == {True}

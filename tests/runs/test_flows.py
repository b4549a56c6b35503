"""The flows by the user's door: the command line against a real Prefect server."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from prefect_api import post
from small_run import NewSmallRun, SmallRun

from deepfloyd_core.adapters.files import LORA_FILE
from deepfloyd_core.config.data_file import load_data_file
from deepfloyd_core.config.flavours import FLAVOURS
from deepfloyd_core.index.scan import scan
from deepfloyd_core.sources.folder import RACY_NS
from deepfloyd_core.store import manifest
from deepfloyd_core.store.versions import find_version

pytestmark = pytest.mark.slow  # a server, and whole runs

FAST = (
    "--set", "stage1.max_train_steps=2", "--set", "stage2.max_train_steps=2", "--set", "stage2.low_res_jpeg_quality=40",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(
    server: str, tmp_path_factory: pytest.TempPathFactory, new_small_run: Callable[[Path], SmallRun]
) -> tuple[SmallRun, str]:
    """A small run that `deepfloyd run` brought to its end, and what it printed."""
    run = new_small_run(tmp_path_factory.mktemp("flows") / "run")
    done = run.call("run", str(run.config), *FAST)
    assert done.returncode == 0, done.stderr
    return run, done.stdout + done.stderr


def _digest(workspace: Path) -> dict[str, str]:
    """Of everything but the scan's notes, which trust no file that is younger than 2 s, so that a later scan may add to
    them; the lock of a run, which names it; the reports, which say which version serves now; and the last event that was
    told.
    """
    files = {str(path.relative_to(workspace)): path for path in sorted(workspace.rglob("*")) if path.is_file()}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in files.items()
        if not name.startswith((".scan/", "versions/reports/")) and name not in (".locks/run", "versions/told")
    }


def _found(server: str, run: SmallRun, path: str) -> list[dict[str, Any]]:
    """Everything of one kind that the server, which other tests use as well, has of a small run and its subflows."""
    flow_runs = _all(server, "flow_runs", {})
    ids = [entry["id"] for entry in flow_runs if entry["parameters"].get("config") == str(run.config)]
    subflows = _all(server, "flow_runs", {"flow_runs": {"parent_flow_run_id": {"any_": ids}}})
    ids += [entry["id"] for entry in subflows]
    return _all(
        server,
        path,
        {"logs": {"flow_run_id": {"any_": ids}}} if path == "logs" else {"flow_runs": {"id": {"any_": ids}}},
    )


def _all(server: str, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    while page := post(server, f"{path}/filter", {**body, "limit": 200, "offset": len(found)}):
        found += page
    return found


def test_a_run_makes_every_artifact_and_prints_where_the_bundle_is(finished: tuple[SmallRun, str]) -> None:
    run, printed = finished
    kinds = {path.parent.parent.name for path in run.workspace.glob("*/*/manifest.json")}
    assert kinds == {
        "image_index", "text_embeds", "stage1_text", "stage2_text", "stage1_pixels", "stage2_pixels", "eval_set",
        "stage1_lora", "stage2_lora", "cascade_samples", "lora_bundle",
    }  # fmt: skip
    (bundle,) = (run.workspace / "lora_bundle").iterdir()
    assert str(bundle) in printed and "sheet.png" in printed
    (index,), (lora,) = ((run.workspace / kind).iterdir() for kind in ("image_index", "stage1_lora"))
    assert f"image index: 9 inputs: 8 accepted, 1 rejected (1 unsupported); see {index / 'rejected.png'}" in printed
    assert (
        "Stage I LoRA: 2 steps on 7 pictures, loss on held-out pictures " in printed
        and str(lora / "validation.png") in printed
    )
    assert "Stage II on held-out pictures, upscaled by" in printed and "Stage II on Stage I's samples" in printed
    assert "low-res degraded as in training, upscaled by" in printed and str(bundle / "eval_spoilt.png") in printed
    (samples,) = (run.workspace / "cascade_samples").iterdir()
    table = pq.read_table(samples / "eval.parquet").to_pylist()
    of_samples = [(row["image_id"], row["way"]) for row in table if row["low_res"] == "stage1"]
    assert of_samples == [("a purple star, seed 0, 64x64", way) for way in ("bilinear", "bicubic", "base", "tuned")]
    assert {path.name for path in bundle.iterdir()} == {
        "README.md", "manifest.json", "metrics.json", "sheet.png", "eval.parquet", "eval.png", "eval_details.png",
        "eval_spoilt.png", "eval_spoilt_details.png", "stage1", "stage2",
    }  # fmt: skip


def test_working_files_are_gone_from_finished_artifacts(finished: tuple[SmallRun, str]) -> None:
    run, _ = finished
    hidden = [path for path in run.workspace.glob("*/*/**/.*") if ".locks" not in path.parts]
    assert hidden == []


def test_a_second_run_reuses_every_artifact_and_changes_no_byte(finished: tuple[SmallRun, str]) -> None:
    run, _ = finished
    before = _digest(run.workspace)
    again = run.call_here("run", str(run.config), *FAST)
    assert again.returncode == 0, again.stderr
    printed = again.stdout + again.stderr
    assert printed.count(": reused") == 11
    assert ": built" not in printed
    assert _digest(run.workspace) == before


@pytest.mark.parametrize(
    ("command", "kinds"),
    [("prepare", ["stage1_pixels", "stage2_pixels", "eval_set"]),
     ("train-stage1", ["stage1_pixels", "eval_set", "text_embeds", "stage1_text", "stage1_lora"]),
     ("train-stage2", ["stage2_pixels", "eval_set", "text_embeds", "stage2_text", "stage2_lora"])],
)  # fmt: skip
def test_a_stage_s_command_names_what_the_run_made_for_it_in_that_order_and_makes_nothing(
    finished: tuple[SmallRun, str], command: str, kinds: list[str]
) -> None:
    run, _ = finished
    done = run.call_here(command, str(run.config), *FAST)
    assert done.returncode == 0 and ": built" not in done.stderr, done.stderr
    told = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert list(told) == ["image_index", *kinds]
    assert all(Path(told[kind]).parent == run.workspace / kind for kind in told)


def test_the_ui_gets_tables_pictures_and_logs(finished: tuple[SmallRun, str], server: str) -> None:
    run, _ = finished
    found = _found(server, run, "artifacts")
    artifacts = {entry["key"]: entry for entry in found}
    assert "| rejected | unsupported | 1 |" in artifacts["image-index-workspace"]["data"]
    assert "- `broken.jpg`: unsupported: " in artifacts["image-index-workspace"]["data"]
    plan = min((entry for entry in found if entry["key"] == "plan-workspace"), key=lambda entry: entry["created"])
    of_run = (entry for entry in found if entry["flow_run_id"] == plan["flow_run_id"] and entry["type"] == "markdown")
    assert min(of_run, key=lambda entry: entry["created"])["id"] == plan["id"], "the first page of the run"
    assert "| stars | 9 | 1 unsupported | 1 | 7 |" in plan["data"] and "| Stage II LoRA | made | " in plan["data"]
    pages = "stage1-pixels", "stage2-pixels", "eval-set", "stage1-lora", "stage2-lora", "cascade-samples"
    for key in (f"{page}-workspace" for page in (*pages, "version")):
        assert "](data:image/" in artifacts[key]["data"], key
        assert len(artifacts[key]["data"]) < 310_000
        assert re.search(r"\bin \d+(\.\d)? (s|min)\b", artifacts[key]["data"]), f"{key} tells how long it took"
        assert str(run.workspace.absolute()) in artifacts[key]["data"]
    tabs = (
        {entry["flow_run_id"] for entry in found if entry["key"] == f"{page}-workspace"} for page in (*pages, "version")
    )
    assert set.intersection(*tabs), "all on the tab of one run"
    assert "](data:image/" in artifacts["stage2-details-workspace"]["data"]
    assert artifacts["stage2-spoilt-workspace"]["data"].count("](data:image/") == 2
    for title in ("on Stage I's samples", "held\\-out pictures, low\\-res degraded as in training"):
        lines = artifacts["cascade-samples-workspace"]["data"].partition(f"{title}**")[2].splitlines()[2:8]
        assert lines[0].startswith("| upscaled by | ") and "dB" in lines[0]
        assert [line.split(" | ")[0] for line in lines[2:]] == ["| bilinear", "| bicubic", "| base", "| tuned"]
    losses = artifacts["stage1-lora-workspace"]["data"].partition("Held\\-out loss by timestep**")[2].splitlines()[2]
    assert losses == "| timestep (of 1,000) | base | tuned | change (less is better) |"
    told = [entry["description"] for entry in _found(server, run, "artifacts") if entry["type"] == "progress"]
    assert any(line.startswith("cascade samples: ") and "part 6 of 6" in line for line in told), told
    assert any(line.startswith("stage II LoRA: ") and "held-out losses of the base" in line for line in told), told
    logs = _found(server, run, "logs")
    assert any("stage1_lora" in entry["message"] and "built" in entry["message"] for entry in logs)
    assert {"deepfloyd_core.store.artifacts", "tasks.endings"} <= {entry["name"] for entry in logs}


def test_what_a_stage_says_at_its_end_is_in_the_flow_s_log_as_well(finished: tuple[SmallRun, str], server: str) -> None:
    messages = [entry["message"] for entry in _found(server, finished[0], "logs")]
    for kind in ("image index", "Stage I pixels", "eval set", "text embeds", "Stage II LoRA", "cascade samples"):
        assert sum(line.startswith(f"{kind}: ") and "; see " in line for line in messages) >= 1, kind


def test_every_shard_is_a_task_run(finished: tuple[SmallRun, str], server: str) -> None:
    run, _ = finished
    names = {entry["name"].rsplit("-", 1)[0] for entry in _found(server, run, "task_runs")}
    shards = {path.name for path in run.workspace.glob("stage2_pixels/*/*.parquet")}
    assert len(shards) > 3
    assert shards <= names


def test_retrain_says_no_change_and_publishes_nothing(finished: tuple[SmallRun, str]) -> None:
    run, _ = finished
    before = _digest(run.workspace)
    done = run.call_here("retrain", str(run.config), *FAST)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "no change: version 1 serves"
    assert _digest(run.workspace) == before


def _moved(first: SmallRun, folder: Path) -> SmallRun:
    """A copy of a small run elsewhere."""
    shutil.copytree(first.folder, folder)
    run = type(first)(folder)
    for name in ("run.toml", "data.json"):
        path = run.folder / name
        path.write_text(path.read_text().replace(str(first.folder), str(run.folder)))
    return run


def _bundles(run: SmallRun) -> list[str]:
    """What each version points at, and that versions are numbered without a gap."""
    records = [json.loads(path.read_text()) for path in sorted((run.workspace / "versions").glob("*.json"))]
    assert [record["number"] for record in records] == list(range(1, len(records) + 1))
    return [record["bundle"] for record in records]


def test_retrain_publishes_what_data_and_settings_ask_for_and_nothing_when_that_is_current(
    finished: tuple[SmallRun, str], tmp_path: Path
) -> None:
    """Pictures that come are version 2; when they are withdrawn the bundle of version 1 is current again, as version 3;
    a setting that decides the bundle makes version 4, one that decides nothing none."""
    run = _moved(finished[0], tmp_path / "run")

    def retrained(*keys: str) -> "subprocess.CompletedProcess[str]":
        done = run.call_here("retrain", str(run.config), *FAST, *keys)
        assert done.returncode == 0, done.stderr
        return done

    before = _digest(run.workspace)
    for number in (100, 101, 102):
        run.add_picture(number)
    time.sleep(RACY_NS / 1e9)  # what is younger is hashed again by the next scan, which then notes that it has settled
    waits = retrained("--set", "retrain_min_new_pictures=4")
    assert waits.stdout.strip() == (
        "no change: waiting, 3 new pictures of 4 (retrain_min_new_pictures); version 1 serves"
    )
    assert "3 pictures added: star_100.png, star_101.png, star_102.png" in waits.stderr
    done = retrained()
    assert "published version 2, promoted: " in done.stdout
    after = _digest(run.workspace)
    assert {name: after[name] for name in before} == before
    old, new = _bundles(run)
    assert old != new
    assert retrained().stdout.strip() == "no change: version 2 serves" and _digest(run.workspace) == after

    for file in [file for number in (100, 101, 102) for file in run.pictures.glob(f"star_{number}.*")]:
        file.unlink()
    done = retrained("--set", "retrain_min_new_pictures=4")
    assert "published version 3: the bundle of version 1 again, promoted: " in done.stdout and old in done.stdout
    assert ": built" not in done.stderr and _bundles(run) == [old, new, old]
    reverted = _digest(run.workspace)
    assert retrained("--set", "workers=1", "--set", "checkpointing_steps=1").stdout.strip() == (
        "no change: version 3 serves"
    )
    assert _digest(run.workspace) == reverted

    assert "published version 4, promoted: " in retrained("--set", "num_validation_images=2").stdout
    assert len(set(_bundles(run))) == 3
    shutil.rmtree(run.workspace / "lora_bundle" / _bundles(run)[3])
    rebuilt = retrained("--set", "num_validation_images=2").stdout
    assert rebuilt == "no change: version 4 serves\n", "and it is there again"
    assert run.call_here("verify", str(run.workspace)).returncode == 0
    assert (
        "published version 5: the bundle of version 1 again, promoted: "
        in run.call_here("run", str(run.config), *FAST).stdout
    )


def test_a_candidate_that_does_harm_is_blocked_is_not_made_again_and_the_champion_goes_on_serving(
    finished: tuple[SmallRun, str], tmp_path: Path
) -> None:
    run = _moved(finished[0], tmp_path / "run")
    harmful = "--set", "gate=auto", "--set", "stage1.learning_rate=0.5"
    done = run.call_here("retrain", str(run.config), *FAST, *harmful)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("version 2 is blocked: Stage I's held-out"))
    assert "against version 1" in line and line.endswith("; version 1 serves")
    assert find_version(run.workspace, "latest").number == 1
    before = _digest(run.workspace)
    again = run.call_here("retrain", str(run.config), *FAST, *harmful)
    assert again.stdout.startswith("no change: version 2 is blocked (Stage I's held-out") and again.returncode == 0
    assert _digest(run.workspace) == before
    shutil.rmtree(run.workspace / "lora_bundle" / _bundles(run)[1])
    assert run.call_here("retrain", str(run.config), *FAST, *harmful).stdout == again.stdout, "it is not made again"
    assert run.call_here("retrain", str(run.config), *FAST).stdout.strip() == "no change: version 1 serves"


def test_a_version_is_made_again_with_every_byte_although_the_folder_has_grown_since(
    finished: tuple[SmallRun, str],
) -> None:
    run, _ = finished
    before = _digest(run.workspace)
    run.add_picture(200)
    try:
        done = run.call("reproduce", str(run.workspace), "1")
        lost = (run.pictures / "star_003.png").rename(run.folder / "lost.png")
        gone = run.call_here("reproduce", str(run.workspace), "1", "--check")
        lost.rename(run.pictures / "star_003.png")
    finally:
        for file in run.pictures.glob("star_200.*"):
            file.unlink()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "version 1 was made again, every byte equal: 14 files" in done.stdout
    assert "its settings and 9 files of its data are there" in done.stdout
    assert gone.returncode == 1 and "1 file of its data is gone or changed" in gone.stderr and "star_003" in gone.stderr
    assert (
        not [path for path in run.folder.iterdir() if path.name.endswith("again")] and _digest(run.workspace) == before
    )


def _losses(folder: Path, step: int) -> dict[tuple[str, int], float]:
    """The losses of held-out pictures at a step, by picture and t."""
    rows = pq.read_table(folder / "validation.parquet").to_pylist()
    return {(row["image_id"], row["t"]): row["loss"] for row in rows
            if (row["model"], row["part"], row["step"]) == ("trained", "held_out", step)}  # fmt: skip


def test_a_warm_retraining_goes_on_from_the_version_that_serves_and_is_made_again_byte_for_byte(
    finished: tuple[SmallRun, str], tmp_path: Path
) -> None:
    """Step 0 is the earlier version, to the bit; new pictures have a share of their own; the next night has nothing to
    do; a picture that is withdrawn ends it, or begins from the base."""
    run = _moved(finished[0], tmp_path / "run")
    warm = (*FAST, "--set", "retrain_mode=warm")
    assert run.call_here("retrain", str(run.config), *warm).stdout == "no change: version 1 serves\n", "nothing is new"
    run.add_picture(100)
    done = run.call_here("retrain", str(run.config), *warm)
    assert done.returncode == 0, done.stderr
    assert "published version 2 (from version 1), promoted: " in done.stdout
    first, second = (run.workspace / "lora_bundle" / name for name in _bundles(run))
    for stage in (1, 2):
        assert f"stage {stage} starts from version 1: at step 0 its held-out losses are those" in done.stderr
        before, now = _losses(first / f"stage{stage}", 2), _losses(second / f"stage{stage}", 0)
        assert now and {name: before[name] for name in now} == now, (
            "this run measures at one t, that of the fixture at all"
        )
        (lora,) = (path.parent for path in run.workspace.glob(f"stage{stage}_lora/*/manifest.json")
                   if "start" in json.loads(path.read_text())["inputs"])  # fmt: skip
        summary = json.loads((lora / "manifest.json").read_text())["summary"]
        assert [(row["dataset"], row["crops"]) for row in summary["buckets"]] == [("stars", 14), ("stars, new", 2)]
    assert "It started from version 1, which was trained on 7 of these pictures." in (second / "README.md").read_text()
    before_night = _digest(run.workspace)
    assert run.call_here("retrain", str(run.config), *warm).stdout == "no change: version 2 serves\n"
    assert _digest(run.workspace) == before_night

    again = run.call_here("reproduce", str(run.workspace), "2")
    assert again.returncode == 0 and "version 2 was made again, every byte equal" in again.stdout, again.stderr
    assert _digest(run.workspace) == before_night

    for file in run.pictures.glob("star_100.*"):
        file.unlink()
    refused = run.call_here("retrain", str(run.config), *warm, "--set", "honour_removals=refuse")
    assert refused.returncode == 1
    assert "star_100.png was removed, and version 2, which serves, was trained on that" in " ".join(
        refused.stderr.split()
    )
    done = run.call_here("retrain", str(run.config), *warm)
    because = "from the base, because star_100.png was removed"
    assert f"published version 3 ({because}): the bundle of version 1 again, promoted" in done.stdout, done.stderr
    assert because in run.call_here("history", str(run.workspace)).stdout and ": built" not in done.stderr


def test_a_stage_that_goes_and_comes_back_leaves_all_that_is_the_other_stage_s(
    finished: tuple[SmallRun, str], tmp_path: Path
) -> None:
    run = _moved(finished[0], tmp_path / "run")
    before = {path.parent for path in run.workspace.glob("*/*/manifest.json")}
    alone = run.call_here("run", str(run.config), *FAST[:2], "--set", "stage2=")
    assert alone.returncode == 0, alone.stderr
    made = {path.parent for path in run.workspace.glob("*/*/manifest.json")} - before
    assert {path.parent.name for path in made} == {"image_index", "eval_set", "cascade_samples", "lora_bundle"}
    again = run.call_here("run", str(run.config), *FAST)
    assert "published version 3: the bundle of version 1 again" in again.stdout and ": built" not in again.stderr


def test_no_change_scans_once_and_a_retrain_that_fails_publishes_nothing(
    finished: tuple[SmallRun, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _moved(finished[0], tmp_path / "run")

    def count(function: Callable[..., Any], *places: str) -> Path:
        calls = tmp_path / places[0]

        def counted(*arguments: Any) -> Any:
            with calls.open("a") as file:
                file.write("x")
            return function(*arguments)

        for place in places:
            monkeypatch.setattr(place, counted)
        return calls

    scans = count(scan, "tasks.image_index.scan", "deepfloyd_core.index.scan.scan")
    reads = count(load_data_file, "deepfloyd_core.preflight.load.load_data_file")
    # The copies are other files to the scan, of the same bytes.
    assert run.call_here("retrain", str(run.config), *FAST).stdout.strip() == "no change: version 1 serves"
    assert scans.read_text() == "x"
    assert reads.read_text() == "xx", "once by the command, once by its flow, which is a deployment as well"

    def full_disk(*_: object, **__: object) -> NoReturn:
        raise OSError(28, "No space left on device")

    run.add_picture(100)
    with monkeypatch.context() as patched:
        patched.setattr("tasks.text_embeds.materialise", full_disk)
        failed = run.call_here("retrain", str(run.config), *FAST)
    assert failed.returncode == 1 and "No space left" in failed.stderr
    for file in run.pictures.glob("star_100.*"):
        file.unlink()
    assert run.call_here("retrain", str(run.config), *FAST).stdout.strip() == "no change: version 1 serves"
    assert len(_bundles(run)) == 1


def test_generate_gives_the_same_bytes_twice_and_says_how_they_were_made(finished: tuple[SmallRun, str]) -> None:
    run, _ = finished
    arguments = ("generate", str(run.config), "--prompt", "a purple star", "--seeds", "7", "--sizes", "72x64", *FAST)
    kept = shutil.move(run.workspace / "stage1_lora", run.workspace / ".stage1_lora")
    first = run.call_here(*arguments)  # from what was published: it needs no other artifact
    shutil.move(kept, run.workspace / "stage1_lora")
    assert first.returncode == 0, first.stderr
    small, large = (Path(line) for line in first.stdout.split())
    assert Image.open(small).size == (72, 64) and Image.open(large).size == (288, 256)
    record = json.loads(Image.open(large).info["deepfloyd"])
    assert (record["prompt"], record["seed"], record["stage"]) == ("a purple star", 7, 2)
    before = small.read_bytes(), large.read_bytes()
    shutil.rmtree(run.workspace / "generated")
    assert run.call_here(*arguments).returncode == 0
    assert (small.read_bytes(), large.read_bytes()) == before
    base = run.call_here(*arguments, "--version", "base")
    assert Path(base.stdout.split()[0]).read_bytes() != before[0]
    both = run.call_here(*arguments, "--compare", "base, champion,1")
    assert [Path(line).read_bytes() for line in both.stdout.split()] == [
        *(Path(line).read_bytes() for line in base.stdout.split()), *before,
    ]  # fmt: skip
    (sheet,) = (run.workspace / "compared").glob("*/sheet.png")
    assert f"the base and version 1, side by side: {sheet}" in " ".join(both.stderr.split())
    two = run.call_here(*(part if part != "7" else "7,8" for part in arguments), "--prompt", "a red circle")
    drawn = [line.split("  ") for line in two.stdout.splitlines()]
    assert [prompt for _, prompt in drawn] == ["a purple star", "a purple star", "a red circle", "a red circle"] * 2
    records = [json.loads(Image.open(path).info["deepfloyd"]) for path, _ in drawn]
    assert [record["prompt"] for record in records] == [prompt for _, prompt in drawn]
    assert [record["seed"] for record in records] == [7, 8] * 4 and len({path for path, _ in drawn}) == 8
    assert Path(drawn[0][0]).read_bytes() == before[0], "the same picture among others"
    kept = Path(shutil.copy(drawn[5][0], run.folder / "kept.png"))  # of Stage II, beside others
    shutil.rmtree(run.workspace / "generated")
    again = run.call_here("generate", str(run.config), "--from", str(kept))
    assert again.returncode == 0 and "kept.png was drawn again: every byte is equal" in again.stderr, again.stderr
    assert Path(again.stdout.split()[1]).read_bytes() == kept.read_bytes()
    for wrong, fault in (
        (
            ("--from", str(kept), "--seeds", "3"),
            "records its prompt, style, seed, size, stages, version and strength. Give",
        ),
        (("--from", str(run.config)), "was not drawn by `deepfloyd generate`: it cannot be read."),
        (("--from", str(kept), "--set", "stage2.validation_guidance=2"), "was drawn with stage2.validation_guidance="),
    ):
        refused = run.call_here("generate", str(run.config), *wrong)
        assert refused.returncode == 2 and fault in refused.stderr, refused.stderr
    shutil.rmtree(run.workspace / "generated")


def test_generate_draws_a_part_of_a_picture_anew_and_again(finished: tuple[SmallRun, str], tmp_path: Path) -> None:
    run, _ = finished
    Image.effect_noise((128, 128), 60).convert("RGB").save(tmp_path / "photo.png")
    Image.linear_gradient("L").resize((128, 128)).save(tmp_path / "mask.png")  # the lower half is white
    given = "--image", str(tmp_path / "photo.png"), "--mask", str(tmp_path / "mask.png")
    done = run.call_here("generate", str(run.config), "--prompt", "a purple star", *given, *FAST)
    assert done.returncode == 0, done.stderr
    small, large = map(Path, done.stdout.split())
    with Image.open(small) as picture, Image.open(tmp_path / "photo.png") as photo:
        whole = photo.resize((64, 64), Image.Resampling.LANCZOS)
        assert picture.crop((0, 0, 64, 31)).tobytes() == whole.crop((0, 0, 64, 31)).tobytes()
        assert picture.crop((0, 33, 64, 64)).tobytes() != whole.crop((0, 33, 64, 64)).tobytes()
    kept = Path(shutil.copy(large, tmp_path / "kept.png"))
    shutil.rmtree(run.workspace / "generated")
    again = run.call_here("generate", str(run.config), "--from", str(kept), *given)
    assert again.returncode == 0 and "kept.png was drawn again: every byte is equal" in again.stderr, again.stderr
    style = "--style", "a green square", "--image", str(tmp_path / "photo.png"), "--set", "stage2.validation_guidance=3"
    done = run.call_here("generate", str(run.config), *style, *FAST)
    assert done.returncode == 0, done.stderr
    with Image.open(done.stdout.split()[1]) as picture:
        record = json.loads(picture.info["deepfloyd"])
        assert (record["prompt"], record["style"], record["strength"]) == ("a green square", "a green square", 0.5)
    for wrong, fault in (
        (("--prompt", "x", *style[:4], "--mask", str(tmp_path / "mask.png")), "--style gives all of a picture another"),
        (("--from", str(kept)), "was drawn with a start picture of yours. Give that beside --from with --image"),
        (
            ("--from", str(kept), *given[:2]),
            "was drawn with a mask picture of yours. Give that beside --from with --mask",
        ),
        (("--prompt", "x", *given[2:]), "--mask is given without --image"),
    ):
        refused = run.call_here("generate", str(run.config), *wrong)
        assert refused.returncode == 2 and fault in " ".join(refused.stderr.split()), refused.stderr
    shutil.rmtree(run.workspace / "generated")


def test_stage_iii_is_drawn_drawn_again_and_takes_pictures_of_ones_own(
    finished: tuple[SmallRun, str], tmp_path: Path
) -> None:
    run, _ = finished
    stage3 = (
        "--set", "stage3.model_flavour=tiny-iii", "--set", "stage3.mixed_precision=no",
        "--set", "stage3.validation_num_inference_steps=2",
    )  # fmt: skip
    asked = "--prompt", "a purple star", "--sizes", "16", "--stages", "1-3"
    done = run.call_here("generate", str(run.config), *asked, *stage3)
    assert done.returncode == 0, done.stderr
    files = [Path(line) for line in done.stdout.split()]
    assert [Image.open(file).size for file in files] == [(16, 16), (64, 64), (256, 256)]
    kept = Path(shutil.copy(files[2], tmp_path / "kept.png"))
    without = run.call_here("generate", str(run.config), *asked)
    assert "has no [stage3] table, so Lanczos' filter enlarges" in " ".join(without.stderr.split()), without.stderr
    shutil.rmtree(run.workspace / "generated")
    again = run.call_here("generate", str(run.config), "--from", str(kept))
    assert again.returncode == 0 and "kept.png was drawn again: every byte is equal" in again.stderr, again.stderr
    small = Path(shutil.copy(again.stdout.split()[1], tmp_path / "small.png"))  # says its prompt itself
    larger = run.call_here("upscale", str(run.config), str(small), "--stage", "3", *stage3)
    assert larger.returncode == 0, larger.stderr
    with Image.open(larger.stdout.strip()) as picture:
        record = json.loads(picture.info["deepfloyd"])
        assert picture.size == (256, 256) and (record["stage"], record["prompt"]) == (3, "a purple star")
    refused = run.call_here("upscale", str(run.config), str(small), "--stage", "3", "--version", "1", *stage3)
    assert refused.returncode == 2 and "it has no versions. Leave out --version." in refused.stderr, refused.stderr
    for folder in ("generated", "upscaled"):
        shutil.rmtree(run.workspace / folder)


def test_generate_draws_with_several_loras(finished: tuple[SmallRun, str], tmp_path: Path) -> None:
    run, _ = finished

    def drawn(*options: str) -> list[Path]:
        done = run.call_here("generate", str(run.config), "--prompt", "a purple star", *options, *FAST)
        assert done.returncode == 0, done.stderr
        return [Path(line) for line in done.stdout.split()]

    def pixels(files: list[Path]) -> list[bytes]:
        return [Image.open(file).tobytes() for file in files]

    alone, as_lora = pixels(drawn("--version", "1")), pixels(drawn("--lora", "version:1"))
    assert as_lora == alone, "at weight 1 it is the version"
    bundle = find_version(run.workspace, "1")
    file = shutil.copy(
        run.workspace / "lora_bundle" / bundle.bundle / "stage1" / LORA_FILE, tmp_path / "style.safetensors"
    )
    both = drawn("--lora", "version:1@0.5", "--lora", f"{file}@0.5")
    assert np.abs(_pixels(both[0]) - _pixels(drawn("--version", "1")[0])).max() <= 2, "halves make the whole"
    assert pixels(both)[1] != alone[1], "of Stage II there is half of it"
    with Image.open(both[0]) as picture:
        record = json.loads(picture.info["deepfloyd"])
        assert record["loras"] == ["version:1@0.5", "style.safetensors@0.5"] and record["variant"] == "base"
        assert "LoRA: version:1@0.5 style.safetensors@0.5" in picture.info["parameters"]
    for wrong, fault in (
        (("--lora", "version:9"), "There is no version '9'"),
        (("--lora", str(run.config)), "only .safetensors files are read"),
        (("--lora", "version:1@0.5", "--version", "1"), "--lora draws with the base models: leave out --version."),
        (("--lora", "version:1") * 17, "--lora is given 17 times"),
    ):
        refused = run.call_here("generate", str(run.config), "--prompt", "x", *wrong)
        assert refused.returncode == 2 and fault in " ".join(refused.stderr.split()), refused.stderr
    shutil.rmtree(run.workspace / "generated")


def _pixels(file: Path) -> "np.ndarray[Any, Any]":
    with Image.open(file) as picture:
        return np.asarray(picture).astype(int)


def test_upscale_makes_pictures_of_ones_own_larger(finished: tuple[SmallRun, str], tmp_path: Path) -> None:
    run, _ = finished
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (50, 40), "purple").save(photos / "a.png")
    (photos / "b.png").write_bytes(b"no picture")
    done = run.call_here("upscale", str(run.config), str(photos), "--prompt", "a purple star", *FAST)
    assert done.returncode == 0 and "b.png is left out: " in done.stderr, done.stderr
    (file,) = map(Path, done.stdout.split())
    with Image.open(file) as picture:
        assert picture.size == (200, 160) and json.loads(picture.info["deepfloyd"])["variant"] == "1"
    base = run.call_here("upscale", str(run.config), str(photos / "a.png"), "--version", "base", *FAST)
    assert Path(base.stdout.strip()).read_bytes() != file.read_bytes()
    lora = run.call_here(
        "upscale", str(run.config), str(photos), "--prompt", "a purple star", "--lora", "version:1", *FAST
    )
    with Image.open(lora.stdout.strip()) as picture, Image.open(file) as of_version:
        assert picture.tobytes() == of_version.tobytes(), "at weight 1 it is the version"
        record = json.loads(picture.info["deepfloyd"])
        assert record["loras"] == ["version:1@1"] and record["variant"] == "base"
    (bundle,) = (run.workspace / "lora_bundle").iterdir()
    for wrong, fault in (
        ((str(photos), "--lora", str(bundle / "stage1" / LORA_FILE)), "does not fit what draws here. Stage II: "),
        ((str(photos), "--lora", "version:1", "--version", "1"), "--lora draws with the base models"),
        ((str(photos), "--lora", "version:9"), "There is no version '9'"),
        ((str(photos / "b.png"), *FAST), "None of 1 file can be upscaled"),
        ((str(photos / "c"), *FAST), "is not there"),
        ((str(photos), "--version", "9", *FAST), "published: 1"),
        ((str(photos), "--set", "stage2="), "upscale needs an upscaler"),
    ):
        refused = run.call_here("upscale", str(run.config), *wrong)
        assert refused.returncode in (1, 2) and fault in " ".join(refused.stderr.split()), (wrong, refused.stderr)


def test_generate_refuses_a_version_that_is_not_there(finished: tuple[SmallRun, str]) -> None:
    run, _ = finished
    done = run.call_here("generate", str(run.config), "--prompt", "x", "--version", "9")
    assert done.returncode == 2
    assert "published: 1" in done.stderr


def test_verify_finds_a_flipped_byte(finished: tuple[SmallRun, str], tmp_path: Path) -> None:
    run, _ = finished
    assert run.call_here("verify", str(run.workspace)).returncode == 0
    shutil.copytree(run.workspace, tmp_path / "copy")
    victim = next((tmp_path / "copy" / "stage1_lora").glob("*/pytorch_lora_weights.safetensors"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(bytes(data))
    done = run.call_here("verify", str(tmp_path / "copy"))
    assert done.returncode == 1
    assert str(victim) in done.stdout


def _flip(file: Path) -> None:
    """One bit in the middle of a file, which keeps its size and times."""
    data, times = bytearray(file.read_bytes()), file.stat()
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_one_flipped_bit_in_any_small_file_is_found_before_it_is_used_and_costs_no_training(
    finished: tuple[SmallRun, str], tmp_path: Path
) -> None:
    run = _moved(finished[0], tmp_path / "moved")
    (bundle,), flipped = (run.workspace / "lora_bundle").iterdir(), list[Path]()
    for kind in ("image_index", "eval_set", "stage1_pixels", "stage2_pixels", "text_embeds", "stage1_text"):
        flipped += [
            file for file in run.workspace.glob(f"{kind}/*/*") if file.name != "manifest.json" and file.is_file()
        ]
    flipped += run.workspace.glob("stage1_lora/*/pytorch_lora_weights.safetensors")
    flipped += [bundle / "stage2" / "pytorch_lora_weights.safetensors", bundle / "sheet.png", bundle / "metrics.json"]
    whole = {file: file.read_bytes() for file in flipped}
    for file in flipped:
        _flip(file)
    drawn = run.call_here("generate", str(run.config), *FAST, "--prompt", "a purple star")
    assert drawn.returncode == 1 and "has other bytes than its manifest says" in " ".join(drawn.stderr.split())
    again = run.call_here("run", str(run.config), *FAST)
    assert again.returncode == 0, again.stderr
    assert [file for file, data in whole.items() if file.read_bytes() != data] == []
    told = again.stdout + again.stderr
    assert "stage1_lora" not in "".join(line for line in told.splitlines() if ": built" in line)
    assert told.count("it is taken from") >= 3
    assert run.call_here("verify", str(run.workspace)).returncode == 0


def test_one_flipped_bit_in_large_files_of_rows_costs_those_files_and_changes_no_lora(
    finished: tuple[SmallRun, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if every shard and every file of texts were larger than 32 MiB: their readers find it, within the run."""
    run = _moved(finished[0], tmp_path / "moved")
    loras = [Path("lora_bundle", "*", f"stage{stage}", "pytorch_lora_weights.safetensors") for stage in (1, 2)]
    trained = [next(run.workspace.glob(str(file))).read_bytes() for file in loras]
    for kind in ("stage1_lora", "stage2_lora", "cascade_samples", "lora_bundle"):
        shutil.rmtree(run.workspace / kind)
    rows = [file for pattern in ("stage*_pixels/*/*.parquet", "eval_set/*/*.parquet", "stage*_text/*/text-*")
            for file in sorted(run.workspace.glob(pattern))]  # fmt: skip
    kept = {file: (file.read_bytes(), file.stat().st_ino, file.stat().st_mtime_ns) for file in rows}
    firsts = {file.parent: file for file in reversed(rows)}  # of each artifact one
    assert len(firsts) == 5 < len(rows)
    for file in firsts.values():
        _flip(file)
    monkeypatch.setattr(manifest, "_SMALL_ROWS", 0)
    again = run.call_here("run", str(run.config), *FAST)
    assert again.returncode == 0, again.stderr
    assert [next(run.workspace.glob(str(file))).read_bytes() for file in loras] == trained
    told = " ".join(again.stderr.split())
    for file in rows:
        data, *change = kept[file]
        is_mended = file in firsts.values()
        assert file.read_bytes() == data and ([file.stat().st_ino, file.stat().st_mtime_ns] != change) == is_mended, (
            file
        )
        assert (f"{file} has other bytes than its manifest says" in told) == is_mended
    assert run.call_here("verify", str(run.workspace)).returncode == 0


def test_an_empty_data_set_fails_with_one_clear_message(small_run: SmallRun, server: str) -> None:
    shutil.rmtree(small_run.pictures)
    small_run.pictures.mkdir()
    done = small_run.call_here("run", str(small_run.config))
    assert done.returncode == 1
    assert "There is no picture in" in done.stderr and "Traceback" not in done.stderr


def test_a_data_set_without_a_usable_picture_fails_with_counts(small_run: SmallRun, server: str) -> None:
    for path in small_run.pictures.glob("*.png"):
        Image.open(path).resize((20, 20)).save(path)
    done = small_run.call_here("run", str(small_run.config))
    assert done.returncode == 1
    assert "All 9 pictures were rejected (8 too_small, 1 unsupported)" in done.stderr
    assert "Traceback" not in done.stderr


def test_too_large_a_rejected_share_fails(small_run: SmallRun, server: str) -> None:
    done = small_run.call_here("prepare", str(small_run.config), "--set", "max_rejected_share=0.05")
    assert done.returncode == 1
    assert "max_rejected_share" in done.stderr


def test_a_size_that_the_unet_cannot_halve_fails_before_anything_is_made(
    small_run: SmallRun, server: str, tmp_path: Path
) -> None:
    model = shutil.copytree(FLAVOURS["tiny-i"].repo, tmp_path / "model")
    unet = json.loads((model / "unet/config.json").read_bytes())
    (model / "unet/config.json").write_text(json.dumps({**unet, "block_out_channels": [32] * 5}))
    done = small_run.call_here("run", str(small_run.config), f"--set=stage1.pretrained_model_name_or_path={model}")
    assert done.returncode == 2
    assert "so every edge must divide by 16. Set aspect_bucket_alignment = 16." in done.stderr
    assert "Traceback" not in done.stderr and not list(small_run.workspace.glob("*/*"))


@pytest.mark.parametrize("pictures", [1, 3])
def test_a_small_set_ends_in_a_bundle_that_says_what_was_not_measured(
    tmp_path: Path, new_small_run: NewSmallRun, server: str, pictures: int
) -> None:
    run = new_small_run(tmp_path / "run", pictures)
    short = (
        "--set",
        "stage1.max_train_steps=2",
        "--set",
        "stage2.max_train_steps=1",
        "--set",
        "stage1.validation_steps=0",
        "--set",
        "stage1.train_batch_size=3",
    )
    done = run.call_here("run", str(run.config), *short)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    if pictures == 1:
        said = "Stage I LoRA: there are fewer crops than train_batch_size (3), so batches are smaller: 64x64 of stars has 2."
        assert said in done.stderr.partition(" stage1_lora ")[0], "before the training, not after"
    _says_what_was_measured(run, pictures, 0)


def test_a_set_that_is_large_enough_holds_a_picture_out_and_says_what_was_measured(
    finished: tuple[SmallRun, str],
) -> None:
    run, printed = finished
    assert "Traceback" not in printed
    _says_what_was_measured(run, 8, 1)


def _says_what_was_measured(run: SmallRun, pictures: int, held_out: int) -> None:
    (bundle,) = (run.workspace / "lora_bundle").iterdir()
    card, figures = (bundle / "README.md").read_text(), json.loads((bundle / "metrics.json").read_bytes())
    trained = pictures - held_out
    for name in ("I", "II"):
        assert f"Stage {name} was trained on {trained} picture" in card
        assert ("No picture was held out" in card) == (not held_out)
    for stage in ("stage1", "stage2"):
        assert figures[stage]["pictures"] == trained
        assert ("eval_loss" in figures[stage], "eval_gain" in figures[stage]) == (bool(held_out), bool(held_out))
    assert ("held_out" in figures["samples"]) == (bundle / "eval.png").exists() == bool(held_out)
    assert "sheet.png" in card and (bundle / "sheet.png").exists()


def test_a_number_of_held_out_pictures_that_leaves_none_fails_before_the_captions_are_encoded(
    small_run: SmallRun, server: str
) -> None:
    done = small_run.call_here("run", str(small_run.config), "--set", "num_eval_images=8")
    assert done.returncode == 1
    assert "stars has 8 usable pictures, and num_eval_images = 8 would hold all of them out" in " ".join(
        done.stderr.split()
    )
    assert [path.name for path in small_run.workspace.iterdir() if not path.name.startswith(".")] == ["image_index"]


def test_stage_commands_make_only_what_they_need(small_run: SmallRun, server: str) -> None:
    done = small_run.call_here("embed", str(small_run.config))
    assert done.returncode == 0, done.stderr
    kinds = {path.parent.parent.name for path in small_run.workspace.glob("*/*/manifest.json")}
    assert kinds == {"image_index", "text_embeds"}


def test_a_command_runs_where_the_environment_names_a_proxy(
    small_run: SmallRun, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    done = small_run.call_here("prepare", str(small_run.config))
    assert done.returncode == 0, done.stderr
    assert "stage1_pixels" in done.stdout


def test_an_unreachable_server_is_a_clear_error(small_run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    done = small_run.call_here("run", str(small_run.config))
    assert done.returncode == 2
    assert "no Prefect server answers" in done.stderr


@pytest.mark.parametrize(
    ("model_type", "flavour", "stage"), [("deepfloyd-lora", "tiny-i", 1), ("deepfloyd-stage2-lora", "tiny-ii", 2)]
)
def test_simpletuners_flat_config_trains_its_one_stage(
    small_run: SmallRun, server: str, model_type: str, flavour: str, stage: int
) -> None:
    config = {
        "--model_type": model_type,
        "--model_family": "deepfloyd",
        "--model_flavour": flavour,
        "--lora_rank": 2,
        "--learning_rate": 1e-4,
        "--lr_end": 1e-5,
        "--max_train_steps": 2,
        "--train_batch_size": 1,
        "--mixed_precision": "bf16" if stage == 1 else "no",  # bf16 convolutions at 256 px crawl on most CPUs
        "--data_backend_config": str(small_run.folder / "data.json"),
        "--max_rejected_share": 0.5,
        "--output_dir": "ignored",
        "--num_eval_images": 1,
        "--num_validation_images": 1,
        "--validation_num_inference_steps": 2,
        "--validation_guidance": 1.0,
    }
    path = small_run.folder / "config.json"
    path.write_text(json.dumps(config))
    done = small_run.call_here("run", str(path), "--set", f"workspace={small_run.workspace}")
    assert done.returncode == 0, done.stderr
    assert "output_dir is ignored" in done.stderr
    kinds = {path.parent.parent.name for path in small_run.workspace.glob("*/*/manifest.json")}
    made = {f"stage{stage}_{product}" for product in ("text", "pixels", "lora")}
    assert {kind for kind in kinds if kind.startswith("stage")} == made
    (bundle,) = (small_run.workspace / "lora_bundle").iterdir()
    assert (bundle / f"stage{stage}" / "pytorch_lora_weights.safetensors").is_file()
    assert (bundle / ("sheet.png" if stage == 1 else "eval.png")).is_file()

"""The GPU day: everything that only a card can answer, in one command of at most 8 minutes. See docs/gpu.md.

Correctness on the card first, then memory and speed of training, T5-XXL, sampling, and what is dearest last. Each figure
is on the disk before the next one is measured; a case that fails, hangs or runs out of memory is a line of the table.
Nothing but torch, transformers, peft, pyarrow and pillow need be installed: `--wheels` names a folder with the rest
(`gpu_wheels.sh`). `--device cpu --tiny` tries all of it, on the tiny cascade and without a card.
"""

import argparse
import gc
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from functools import partial
from itertools import takewhile
from pathlib import Path
from shutil import which
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from gpu_plan import CASES, Asked, Case, forecast_s  # noqa: E402
from gpu_process import SPARE_S, Watch, do_cases, run_process  # noqa: E402
from gpu_results import Results, beside, empty_table, failure, finished  # noqa: E402

# So that asking whether there is a card does not make a process unfit to be forked.
ENVIRONMENT = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
PACKAGES = ("torch", "diffusers", "transformers", "peft")
CPU_SLACK = 4  # times a case's limit: two cores, which others may use as well


def main(
    arguments: list[str] | None = None, cases: tuple[Case, ...] = CASES, packages: tuple[str, ...] = PACKAGES
) -> int:
    """Run the cases that are asked for. Returns 0 when each gave its figures, 1 when one failed or was left out.

    packages: imported once for all processes, and their versions noted.
    """
    wanted = _parse(arguments)
    if wanted.empty_table:
        print("\n".join(empty_table(cases)))
        return 0
    only = set(wanted.only.split(",")) if wanted.only else {case.group for case in cases}
    cases = tuple(case for case in cases if case.group in only and wanted.case in case.name)
    if wanted.plan:
        _print_plan(cases)
        return 0
    if wanted.child:
        asked = Asked(wanted.device, wanted.tiny, Path(wanted.folder), wanted.any_kernels)
        do_cases([_named(cases, name) for name in json.loads(wanted.child)], asked, wanted.fd)
        return 0
    ends_at = time.monotonic() + wanted.budget
    with tempfile.TemporaryDirectory(prefix="gpu-day-") as name:
        folder = Path(name)
        _make_importable(folder / "site", wanted.wheels, wanted.device)
        return _run(cases, packages, wanted, folder, ends_at)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the tiny cascade in place of the real architectures")
    parser.add_argument("--budget", type=float, default=480, help="seconds, after which it stops with what there is")
    parser.add_argument("--only", default="", help="groups, for example b or a,c")
    parser.add_argument("--case", default="", help="only cases whose name has this")
    parser.add_argument("--wheels", type=Path, help="folder of gpu_wheels.sh; installed into a temporary folder")
    parser.add_argument("--results", type=Path, default=Path("gpu-day"), help="FILE.jsonl and FILE.md grow by this run")
    parser.add_argument("--resume", action="store_true", help="leave out what FILE.jsonl has figures of already")
    parser.add_argument(
        "--any-kernels", action="store_true", help="train also by kernels that do not repeat themselves"
    )
    parser.add_argument("--plan", action="store_true", help="print what would run and how long it should take")
    parser.add_argument("--empty-table", action="store_true", help="print the table of a run that has not been")
    parser.add_argument("--begin-anew", action="store_true",
                        help="let every process import everything again, as where a fork cannot use the card")  # fmt: skip
    for hidden, kind in (("--child", str), ("--folder", str), ("--fd", int)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _run(
    cases: tuple[Case, ...], packages: tuple[str, ...], wanted: argparse.Namespace, folder: Path, ends_at: float
) -> int:
    if missing := _import_all((*packages, *sorted({case.call.split(":")[0] for case in cases}))):
        print(missing)
        return 1
    machine = _machine(wanted.device, packages)
    if machine is None:
        print("Skipped: needs a CUDA GPU, and none is here. --device cpu --tiny tries everything without one.")
        return 0
    kind = {**machine, "tiny": wanted.tiny}
    if wanted.resume:
        there = finished(wanted.results, kind, cases)
        cases = tuple(case for case in cases if case not in there)
    _print_plan(cases)
    results = Results(wanted.results, {"at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S"), **kind})
    asked = Asked(wanted.device, wanted.tiny, folder, wanted.any_kernels)
    log = beside(wanted.results, "log")
    judged, slack = wanted.device == "cuda" and not wanted.tiny, 1 if wanted.device == "cuda" else CPU_SLACK
    while cases:
        if time.monotonic() > ends_at - 2 * SPARE_S:
            for case in cases:
                results.add(failure(case, "not run: the budget is spent", 0.0))
            break
        part = tuple(takewhile(lambda case, name=cases[0].process: case.process == name, cases))  # type: ignore[misc]
        watch = Watch(part, results, ends_at, judged, slack)
        run_process(watch, asked, log, partial(_again, part, folder), wanted.begin_anew)
        cases = cases[watch.done :]
    return _last_word(results, wanted, time.monotonic() - ends_at + wanted.budget)


def _last_word(results: Results, wanted: argparse.Namespace, seconds: float) -> int:
    rows = results.rows
    failed, unmet = sum(row.failed for row in rows), sum(row.met is False for row in rows)
    line = f"{len(rows)} rows in {seconds:.0f} s: {failed} failed, {unmet} goals not met."
    results.say(line)
    print(f"\n{results.table()}\n\n{line}\nIn {wanted.results}.md, .jsonl and .log.")
    return 1 if failed else 0


def _print_plan(cases: tuple[Case, ...]) -> None:
    for case in cases:
        print(f"  {case.seconds:6.1f} s  {case.group}  {case.name}")
    print(f"{len(cases)} cases; on an H200 about {forecast_s(cases):.0f} s with all imports.", flush=True)


def _make_importable(site: Path, wheels: Path | None, device: str) -> None:
    """Put the wheels and the product into a folder, and that ahead of everything, for this process and those it starts."""
    site.mkdir()
    if wheels is not None:
        files = sorted(map(str, wheels.glob("*.whl")))
        if not files:
            sys.exit(f"{wheels} holds no wheel. Fill it: benchmarks/gpu_wheels.sh {wheels}")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile",
                   "--disable-pip-version-check", "--no-cache-dir", "--target", str(site), *files]  # fmt: skip
        if subprocess.run(command).returncode:
            sys.exit(f"{wheels} does not fit this Python {platform.python_version()}; see benchmarks/gpu_wheels.sh.")
    # Not the whole repository: its folder `datasets` would pass for Hugging Face's package.
    (site / "deepfloyd_core").symlink_to(HERE.parent / "deepfloyd_core")
    if device == "cpu":
        os.environ["OMP_NUM_THREADS"] = "1"  # two would spin where others compute too
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ.update(ENVIRONMENT, PYTHONPATH=os.pathsep.join(paths))
    sys.path.insert(0, str(site))
    importlib.invalidate_caches()


def _import_all(names: tuple[str, ...]) -> str:
    """Import what the cases need, once for all their processes. Returns what is missing."""
    start = time.monotonic()
    try:
        for name in names:
            importlib.import_module(name)
    except ImportError as error:
        return f"{error}. Bring it as a wheel: benchmarks/gpu_wheels.sh, and --wheels."
    except (RuntimeError, OSError) as error:  # what is there does not fit together, such as torchvision and torch
        return f"{name} cannot be imported: {' '.join(str(error).split())}"
    print(f"imports took {time.monotonic() - start:.1f} s", flush=True)
    gc.freeze()  # what was imported stays: a case that collects garbage looks at its own objects alone
    return ""


def _machine(device: str, packages: tuple[str, ...]) -> dict[str, Any] | None:
    """What every row says of where it was measured; None where there is no card. Nothing here starts the card's driver."""
    name = platform.machine()
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            return None
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        found = subprocess.run(asked, capture_output=True, text=True).stdout.split("\n") if which(asked[0]) else ["GPU"]
        name = found[0]
    versions = {package: str(importlib.import_module(package).__version__) for package in packages}
    return {"device": name, "python": platform.python_version(), **versions}


def _again(cases: tuple[Case, ...], folder: Path, fd: int) -> list[str]:
    """The command that does cases in a process that begins anew: this one's, told which and whom to tell."""
    names = json.dumps([f"{case.group} {case.name}" for case in cases])
    return [sys.executable, *sys.argv, "--child", names, "--fd", str(fd), "--folder", str(folder)]


def _named(cases: tuple[Case, ...], name: str) -> Case:
    return next(case for case in cases if f"{case.group} {case.name}" == name)


if __name__ == "__main__":
    sys.exit(main())

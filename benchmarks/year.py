"""A year of nights without a person: `python benchmarks/year.py`, at most three hours on two cores.

A real `deepfloyd ui` (server, worker, deployments) retrains the tiny cascade every night while pictures come, change and
are withdrawn, bad batches arrive, and what it runs on is killed, stopped or filled at random. A night is one tick of the
deployment's own schedule: ticks are minutes of the past, which the server is asked to schedule one after the other, so
that each starts at once. `gc/weekly` runs every seventh night.

What is promised is checked by what lies on the disk: the records of versions, the stored loss of each held-out picture
(compared by SciPy's paired t interval), the bytes of the files. It prints a line for each night and the figures at the
end, and exits with 1 if a promise was broken.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from unattended import Ui
from year_faults import WEEK, Breaker, Disk, plan, stopped
from year_records import Kept, Loss, Records, State, loss_against
from year_runs import Runs, Told
from year_story import Day, Pictures, story

KEEP, KEEP_DAYS = 12, 0.01  # of `gc`: versions; days of anything else: a quarter of an hour
REPRODUCED = 10
# What may lie there that no kept version was made from: a share of what they were made from, and the work of a run.
EXTRA, LOOSE_BYTES = 0.25, 40_000_000
DISK_MIB = 1536
QUIET_S, BUSY_S = 4.0, 25.0  # within which something breaks, on nights without and with something to make
WORKER = {"PREFECT_WORKER_QUERY_SECONDS": "1"}

RUN_FILE = """
workspace = "workspace"
data_backend_config = "data.json"
shard_mib = 0.2
mixed_precision = "no"
text_encoder_dtype = "fp32"
device = "cpu"
num_threads = 1
num_eval_images = {eval_images}
validation_prompt = "a purple star"
num_validation_images = 1
num_upscaled_images = 1
forgetting_probes = 2
max_rejected_share = 0.5
retrain_min_new_pictures = 2

[stage1]
model_flavour = "tiny-i"
lora_rank = 4
learning_rate = 1e-3
max_train_steps = {steps}
train_batch_size = 2
checkpoint_step_interval = 5
validation_step_interval = 0
validation_num_inference_steps = 2
validation_guidance = 3.0
{stage2}
"""
STAGE2 = """
[stage2]
model_flavour = "tiny-ii"
lora_rank = 4
learning_rate = 1e-3
max_train_steps = 8
train_batch_size = 1
checkpoint_step_interval = 4
validation_step_interval = 0
validation_num_inference_steps = 2
validation_guidance = 1.0
validation_noise_level = 100
"""
PROJECT = """
name: year
pull: []
deployments:
  - name: nightly
    entrypoint: flows.retrain:retrain
    parameters: {{config: run.toml}}
    work_pool: {{name: deepfloyd, work_queue_name: training}}
    schedules:
      - rrule: "DTSTART:{start:%Y%m%dT%H%M%SZ}\\nRRULE:FREQ=MINUTELY;COUNT={nights}"
        timezone: UTC
  - name: weekly
    entrypoint: flows.gc:gc
    parameters: {{workspace: workspace, delete: true, keep_versions: {keep}, keep_days: {keep_days}}}
    work_pool: {{name: deepfloyd}}
"""


@dataclass(frozen=True)
class Script:
    """What is played: the day before each night, what breaks in which night, and with which settings."""

    days: Sequence[Day]
    breaks: Mapping[int, str]
    seed: int = 1  # of the moments at which something breaks
    stages: tuple[int, ...] = (1, 2)
    steps: int = 30
    eval_images: int = 6


@dataclass
class Year:
    """A year under way."""

    script: Script
    folder: Path
    disk: Disk | None = None
    faults: list[str] = field(default_factory=list)  # promises that were broken
    hits: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    published: Counter[str] = field(default_factory=Counter)  # what became of the versions
    losses: dict[str, list[float]] = field(default_factory=dict)  # theirs against the champion's, as shares of its gain
    nights_of: dict[int, int] = field(default_factory=dict)  # the night in which each version was published
    kept: Kept = field(default_factory=Kept)  # the most that was kept

    def __post_init__(self) -> None:
        self.days, self.breaks = self.script.days, dict(self.script.breaks)
        self.rng = np.random.default_rng([self.script.seed, 5])
        self.start = datetime.now(UTC).replace(second=0, microsecond=0) - timedelta(minutes=len(self.days) + 2)
        self.pictures = Pictures(self.folder / "pictures")
        self.records = Records(self.folder / "workspace")
        self._write_project()
        self.ui = Ui(self.folder, self.folder / "home", environ=WORKER)

    def _write_project(self) -> None:
        sizes = {"minimum_image_size": 64, "maximum_image_size": 64, "target_downsample_size": 64}
        entry = {"id": "stars", "type": "local", "instance_data_dir": str(self.folder / "pictures"), "crop": True,
                 "crop_aspect": "square", "crop_style": "random", "resolution": 64, "caption_strategy": "textfile",
                 "repeats": 1, **sizes}  # fmt: skip
        (self.folder / "data.json").write_text(json.dumps([entry]))
        stage2 = STAGE2 if 2 in self.script.stages else ""
        settings = RUN_FILE.format(steps=self.script.steps, eval_images=self.script.eval_images, stage2=stage2)
        (self.folder / "run.toml").write_text(settings)
        project = PROJECT.format(start=self.start, nights=len(self.days), keep=KEEP, keep_days=KEEP_DAYS)
        (self.folder / "prefect.yaml").write_text(project)

    def play(self) -> None:
        """Play all nights."""
        self.ui.start()
        self.runs = Runs(lambda: self.ui.api)
        self.breaker = Breaker(self.ui, self.disk, lambda most: float(self.rng.uniform(0, most)))
        night = 0
        try:
            while night < len(self.days):
                count = WEEK if self.breaks.get(night) == "week" else 1
                self._nights(range(night, night + count))
                night += count
                if night % WEEK < count:
                    self._collect_garbage()
            left = self.runs.open_ones()
            self._promise(not left, f"runs left open: {left}")
        finally:
            self.ui.stop(signal.SIGINT)

    def _nights(self, nights: range) -> None:
        """One night, or those of a week in which the worker does not answer."""
        began, before, fault = time.monotonic(), self.records.state(), self.breaks.get(nights[0], "")
        if len(nights) > 1:
            with stopped(self.ui.process_of("worker start")):
                for night in nights:
                    self.pictures.live(self.days[night])
                    self.runs.tick(self._time_of(night))
                time.sleep(2)
            hit = "worker does not answer for a week"
        else:
            self.pictures.live(self.days[nights[0]])
            hit = self._broken_night(nights[0], fault)
        told = self.runs.settled()
        seconds = time.monotonic() - began
        self.hits.update([hit] if hit else [])
        self._judge(nights, fault, before, told)
        self._log(nights, hit, told, seconds)

    def _broken_night(self, night: int, fault: str) -> str:
        with ExitStack() as stack:
            if fault == "disk":
                assert self.disk is not None
                stack.enter_context(self.disk.full(int(self.rng.uniform(0, 4 << 20))))
            self.runs.tick(self._time_of(night))
            if not fault:
                return ""
            if fault == "disk":
                self.runs.settled(forget=False)
                return "disk full"
            most_s = QUIET_S if self.days[night].is_quiet else BUSY_S
            if hit := self.breaker.strike(fault, most_s, self.runs.pid, self.runs.are_over):
                return hit
            later = next((one for one in range(night + 1, len(self.days)) if self._is_free(one)), None)
            if later is not None:
                self.breaks[later] = fault
            return ""

    def _is_free(self, night: int) -> bool:
        lengths = {"week": WEEK}
        return not any(night in range(start, start + lengths.get(kind, 1)) for start, kind in self.breaks.items())

    def _judge(self, nights: range, fault: str, before: State, told: list[Told]) -> None:
        """Hold what the runs of a night have said against what lies on the disk."""
        after, name = self.records.state(), f"night {nights[0] + 1}"
        last = [one for one in told if one.is_last]
        self._promise(len(told) >= len(nights), f"{name}: {len(nights)} nights, {len(told)} runs")
        self._promise(len(last) == 1, f"{name}: {len(last)} runs have the last word: {told}")
        self._promise(all(one.is_final for one in told), f"{name}: a run is left open: {told}")
        for one in told:
            self.outcomes[one.outcome] += 1
            self._promise(
                one.is_honest(before, after, disk_full=fault == "disk"), f"{name}: {one} but {before} -> {after}"
            )
        for number in sorted(after.numbers - before.numbers):
            self.nights_of[number] = nights[-1]
            state = "promoted" if number in after.promoted else "blocked" if number in after.blocked else "candidate"
            made_of = "bad batch" if any(self.pictures.folder.glob("bad_*")) else "good pictures"
            loss = Loss() if before.champion is None else loss_against(self.records, before.champion, number)
            self.published[f"{made_of}, {'harmful' if loss.is_harm else 'harmless'}, {state}"] += 1
            self.losses.setdefault(made_of, []).append(loss.share)
            self._promise(not (loss.is_harm and state == "promoted"), f"{name}: version {number} is harmful and serves")

    def _collect_garbage(self) -> None:
        run = self.ui.api.run("gc/weekly", {})
        state = self.runs.ended(run)
        self._promise(state == "COMPLETED", f"gc ended as {state}")
        kept = self.records.kept()
        more = set(kept.versions) - self.records.last(KEEP)
        self._promise(
            not more, f"gc keeps versions {sorted(more)}, none of the last {KEEP} that were made or that served"
        )
        self._promise(kept.extra_bytes <= kept.needed_bytes * EXTRA + LOOSE_BYTES, f"gc keeps too much: {kept}")
        self.kept = max(self.kept, kept, key=lambda one: one.bytes)

    def _time_of(self, night: int) -> datetime:
        return self.start + timedelta(minutes=night)

    def _promise(self, holds: bool, broken: str) -> None:
        if not holds:
            self.faults.append(broken)
            print(f"BROKEN  {broken}", flush=True)

    def _log(self, nights: range, hit: str, told: list[Told], seconds: float) -> None:
        what = "; ".join(self.days[night].words for night in nights if not self.days[night].is_quiet)
        said = " | ".join(one.words for one in told if not one.is_skipped)
        print(f"{nights[0] + 1:>3} {seconds:5.0f} s  [{what}] {hit and '(' + hit + ') '}{said}", flush=True)

    def reproduce(self, count: int) -> list[int]:
        """Make versions again, chosen at random among those whose bundles are kept. Returns their numbers."""
        kept = self.records.kept_versions()
        chosen = sorted(int(one) for one in self.rng.choice(kept, min(count, len(kept)), replace=False))
        for number in chosen:
            shutil.rmtree(self.pictures.folder)
            again = Pictures(self.pictures.folder)
            for day in self.days[: self.nights_of[number] + 1]:
                again.live(day)
            command = [sys.executable, "-P", "-m", "flows", "reproduce", "workspace", str(number),
                       "--scratch", str(self.folder / f"again-{number}")]  # fmt: skip
            environ = os.environ | {"PREFECT_HOME": str(self.ui.home)}
            done = subprocess.run(command, cwd=self.folder, env=environ, capture_output=True, text=True)
            self._promise(done.returncode == 0, f"reproduce {number}: {(done.stdout + done.stderr)[-600:]}")
        return chosen

    def table(self, seconds: float, reproduced: list[int]) -> str:
        """The figures, as Markdown."""
        state = self.records.state()
        served = [number for number in set(state.promoted) if number not in state.blocked]
        rows = {
            "nights, faults": f"{len(self.days)}, {sum(self.hits.values())}",
            "what was hit": counted(self.hits),
            "how runs ended": counted(self.outcomes),
            "versions": f"{len(state.numbers)}: {len(served)} promoted, {len(state.blocked)} blocked",
            "made of": counted(self.published),
            "held-out loss against the champion, of its gain": self._losses_in_words(),
            "workspace after `gc`, at most": self.kept.words,
            "database of Prefect": f"{sum(file.stat().st_size for file in self.ui.home.glob('prefect.db*')) / 1e6:.0f} MB",
            "made again, every byte equal": f"{len(reproduced)}: {', '.join(map(str, reproduced))}",
            "took": f"{seconds / 60:.0f} min",
            "promises broken": str(len(self.faults)),
        }
        return "\n".join(["| | |", "|---|---|", *(f"| {name} | {figure} |" for name, figure in rows.items())])

    def _losses_in_words(self) -> str:
        ranges = {made_of: np.percentile(shares, (0, 50, 100)) for made_of, shares in self.losses.items()}
        return "; ".join(f"{made_of}: {low:+.0%} to {high:+.0%}, median {median:+.0%}"
                         for made_of, (low, median, high) in ranges.items())  # fmt: skip


def counted(counts: "Counter[str]") -> str:
    """Counts in words, the largest first."""
    return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "none"


@contextmanager
def small_disk(folder: Path) -> Iterator[Disk | None]:
    """A disk of DISK_MIB in memory at a folder; None where none can be mounted, which root alone can."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        print("No disk can be filled here: those faults are others.", flush=True)
        yield None
        return
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def year_script(nights: int, bad: int, faults: int, disk: bool, seed: int) -> Script:
    """A random script."""
    days = story(nights, bad, seed)
    busy = {night for night, day in enumerate(days) if not day.is_quiet}
    return Script(days, plan(faults, nights, busy, disk, seed), seed)


def main() -> None:
    """Play it. Exits with 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nights", type=int, default=365)
    parser.add_argument("--bad", type=int, default=12, help="bad batches")
    parser.add_argument("--faults", type=int, default=120)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="an empty folder, which stays; else one that goes")
    wanted = parser.parse_args()
    with ExitStack() as stack:
        folder = wanted.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        disk = stack.enter_context(small_disk(folder / "workspace"))
        script = year_script(wanted.nights, wanted.bad, wanted.faults, disk is not None, wanted.seed)
        began, year = time.monotonic(), Year(script, folder.absolute(), disk)
        year.play()
        again = year.reproduce(REPRODUCED)
        print("\n" + year.table(time.monotonic() - began, again), flush=True)
    sys.exit(1 if year.faults else 0)


if __name__ == "__main__":
    main()

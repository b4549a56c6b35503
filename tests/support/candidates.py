"""Bundles with the figures of each held-out picture, to judge: what the gate reads, without any training."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deepfloyd_core.adapters.files import LORA_FILE
from deepfloyd_core.bundle.gate import gate_of
from deepfloyd_core.bundle.gate_rules import COMPARED
from deepfloyd_core.bundle.identity import BundleSummary
from deepfloyd_core.config.run import Run
from deepfloyd_core.index.summary import IndexSummary
from deepfloyd_core.measures.figures import UpscalingFigures
from deepfloyd_core.sampling.jobs import SamplesSummary
from deepfloyd_core.store.artifacts import Artifact, Request, WorkDir, materialise
from deepfloyd_core.store.manifest import Summary
from deepfloyd_core.store.registry import Outcome, publish
from deepfloyd_core.training.jobs import TrainingFigures
from deepfloyd_core.training.start import StartSource, make_start

LEVEL = 100


@dataclass(frozen=True)
class Candidate:
    """A version by its figures. Pictures are named by numbers; their losses without training follow from these."""

    pictures: tuple[int, ...] = tuple(range(12))
    loss: float = -0.05  # added to the base's, of each picture
    psnr: float = 1.0  # dB, added to the base's
    consistency: float = 1.0
    colour: float = -0.5  # levels, added to the base's colour shift: of Stage I's estimates
    shift: float = -0.5  # and of the upscaler
    contrast: float = -0.5  # levels, added to the base's colour spread
    reloaded: float | None = 0.0
    forgotten: float | None = 0.03  # of the loss on the base's own pictures; None: not measured
    probed: str = "a recipe"
    spread: float = 0.002  # of the differences between pictures
    seed: int = 0
    crop: str = "a crop"
    accepted: int = 100
    rejected: int = 1
    losses: tuple[float, ...] | None = None  # in place of those that follow from `loss`
    psnrs: tuple[float, ...] | None = None  # in place of those that follow from `psnr`
    stages: tuple[int, ...] = (1, 2)
    prompt: str = "a prompt"  # of its samples: another one is another bundle of the same LoRAs
    started: "tuple[Candidate, int] | None" = None  # Stage I, from the weights of a published one with this number

    def with_(self, **changes: object) -> "Candidate":
        """Another one."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def publish(self, run: Run) -> Outcome:
        """Make its bundle and its index, and give them to the gate of a run."""
        return publish(run.workspace, self.bundle(run.workspace), self.index(run.workspace), None, gate_of(run))

    def index(self, workspace: Path) -> Artifact:
        """Its index."""
        summary = IndexSummary(
            inputs=self.accepted + self.rejected, accepted=self.accepted, rejected=self.rejected, reasons={},
            stage1=self.accepted, stage2=self.accepted, twin_groups=0, twins=0, judged_now=0, judged_before=0,
            captions_per_picture={}, examples={}, decode_timeout_s=1.0, other_files={}, rows={},
        )  # fmt: skip
        return _made(workspace, "image_index", {"counts": [self.accepted, self.rejected]}, summary, data="1" * 16)

    def bundle(self, workspace: Path) -> Artifact:
        """Its bundle."""

        def build(work: WorkDir) -> Summary:
            for stage in self.stages:
                (work.path / f"stage{stage}").mkdir()
                pq.write_table(self._losses(), work.path / f"stage{stage}" / "validation.parquet")
                (work.path / f"stage{stage}" / LORA_FILE).write_text(repr(self.with_(prompt="")))
            if 2 in self.stages:
                pq.write_table(self._measures(), work.path / "eval.parquet")
            if self.forgotten is not None and 1 in self.stages:
                pq.write_table(self._probes(), work.path / "probes.parquet")
            return self._summary()

        spec, index = {"candidate": repr(self)}, self.index(workspace)
        lora = Request("stage1_lora", 1, {"of": repr(self.with_(prompt=""))}, self._start(workspace))
        made = materialise(workspace, lora, lambda work: BundleSummary(samples=SamplesSummary()))
        request = Request("lora_bundle", 1, spec, {"image_index": index.name, "stage1_lora": made.name})
        return materialise(workspace, request, build)

    def _start(self, workspace: Path) -> dict[str, str]:
        """What Stage I's training started from, as an input."""
        if self.started is None:
            return {}
        bundle, number = self.started[0].bundle(workspace), self.started[1]
        known = pa.table({"image_id": pa.array([], pa.string())})
        return {"start": make_start(workspace, 1, StartSource(bundle, bundle.path / "stage1", number, known)).name}

    def _differences(self, mean: float) -> np.ndarray:
        noise = [np.random.default_rng((self.seed, number)).normal(0, self.spread) for number in self.pictures]
        return np.asarray(noise) + mean

    def _losses(self) -> pa.Table:
        base = [float(np.random.default_rng(number).uniform(0.3, 0.7)) for number in self.pictures]
        tuned = self.losses or (np.asarray(base) + self._differences(self.loss)).tolist()
        rows = [
            {"step": step, "model": model, "part": part, "image_id": f"{number:064x}", "t": t, "loss": loss + t / 1e4,
             "colour_shift": shift if t < 900 else 99.0 * step, "conditions": self.crop}
            for step, model, losses, shift in (
                (0, "base", base, 4.0), (5, "trained", [9.0] * len(base), 90.0), (10, "trained", tuned, 4.0 + self.colour))
            for part, numbers in (("held_out", self.pictures), ("seen", (90, 91)))
            for number, loss in zip(numbers, losses if part == "held_out" else (0.1, 0.1), strict=True)
            for t in (100, 900)
        ]  # fmt: skip
        return pa.Table.from_pylist(rows)

    def _probes(self) -> pa.Table:
        noise = np.random.default_rng(self.seed).normal(0, self.spread, 8)
        rows = [
            {"prompt": f"prompt {number}", "conditions": self.probed, "way": way, "t": t,
             "loss": 0.01 * number + t / 1e5 + (way == "tuned") * ((self.forgotten or 0) + more)}
            for way in ("base", "tuned") for number, more in enumerate(noise.tolist()) for t in (100, 900)
        ]  # fmt: skip
        return pa.Table.from_pylist(rows)

    def _measures(self) -> pa.Table:
        rows = [
            {"low_res": low_res, "image_id": f"{number:064x}", "conditions": self.crop, "way": way, "noise_level": level,
             "psnr": 30.0 + psnr, "consistency": 40.0 + consistency, "colour_shift": 4.0 + (way == "tuned") * self.shift,
             "colour_spread": 4.0 + (way == "tuned") * self.contrast}
            for low_res in ("held-out", "spoilt") for level in (LEVEL, LEVEL + 50)
            for way, psnrs, consistencies in (("base", [0.0] * 99, [0.0] * 99), ("tuned",
                self.psnrs or self._differences(self.psnr), self._differences(self.consistency)))
            for number, psnr, consistency in zip(self.pictures, psnrs, consistencies, strict=False)
        ]  # fmt: skip
        columns = [("low_res", pa.string()), ("image_id", pa.string()), ("conditions", pa.string()), ("way", pa.string()),
                   ("noise_level", pa.int64()), *((name, pa.float64()) for name in COMPARED)]  # fmt: skip
        return pa.Table.from_pylist(rows, pa.schema(columns))

    def _summary(self) -> BundleSummary:
        training = TrainingFigures(steps=10, rows=9, pictures=9, trainable_parameters=1, last_loss=0.5,
                                   reload_difference=self.reloaded)  # fmt: skip
        means = {"psnr": 30.0, "consistency": 40.0, "colour_shift": 4.0, "colour_spread": 4.0}
        measured = UpscalingFigures(noise_level=LEVEL, upscaled={"base": means, "tuned": means}, gain={})
        if self.pictures:
            training = training.model_copy(
                update={"eval_loss_base": 0.5, "eval_loss": 0.5 + self.loss, "eval_gain": (-self.loss,)}
            )
        samples = SamplesSummary(held_out=measured if self.pictures and 2 in self.stages else None)
        if self.forgotten is not None and 1 in self.stages:
            samples = samples.model_copy(update={"probe_loss_base": 0.01, "probe_loss_tuned": 0.02})
        of_stages = {f"stage{stage}": training for stage in self.stages}
        return BundleSummary(**of_stages, samples=samples)


def _made(workspace: Path, kind: str, spec: dict[str, list[int]], summary: Summary, **inputs: str) -> Artifact:
    return materialise(workspace, Request(kind, 1, spec, inputs), lambda work: summary)

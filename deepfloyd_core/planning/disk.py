"""What a run would write, in bytes: what it makes, and the checkpoints that it needs meanwhile."""

import shutil
from dataclasses import dataclass

from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import STAGES, UPSCALE, Stage
from deepfloyd_core.planning.calibrated import Amounts
from deepfloyd_core.planning.encoding import stored_width
from deepfloyd_core.planning.steps import StagePlan
from deepfloyd_core.planning.work import ArtifactPlan
from deepfloyd_core.store.file_trials import nearest_folder
from deepfloyd_core.training.costs import EMA, STATES, CostRequest, StepCosts
from deepfloyd_core.types import Json

_ROW = 330  # bytes of a crop beside its pixels: names, caption, sizes, and its entry in the list of rows
_PACKED = 0.64  # of embeds, embed_compression = packed
# Fitted to the demo's files (benchmarks/results.md): bytes of a list of files, and of each of them with its look; of the
# curve and the tables of a training, and of a tensor's name; of the count of tokens.
_LIST, _FILE, _CURVES, _NAME, _TOKENS = 15_000, 530, 62_000, 126, 20_000
# Share of its pixels' bytes that a PNG of a sample takes, and on the sheets bytes of a sample, of a probe, and of a held-out
# picture with all that upscaled it, of which there are not more.
_PNG, _CELL, _PROBE, _EVAL, _MOST_EVAL = 0.47, 12_000, 8_000, 157_000, 8


@dataclass(frozen=True)
class DiskPlan:
    """Bytes to be written, by artifact, and what else is needed while it runs."""

    artifacts: dict[str, int]  # of those that are made
    meanwhile: int  # checkpoints
    free: int  # where the workspace is

    @property
    def needed(self) -> int:
        """At most at once."""
        return sum(self.artifacts.values()) + self.meanwhile


def plan_disk(
    run: Run, artifacts: list[ArtifactPlan], stages: list[StagePlan], costs: dict[Stage, StepCosts],
    requests: dict[Stage, CostRequest], amounts: Amounts,
) -> DiskPlan:  # fmt: skip
    """run: with its own workspace, whose disk counts. Pictures that compress better or worse than the demo's make other
    sheets and samples; these are small.
    """
    made = {artifact.kind for artifact in artifacts if artifact.state != "reused"}
    found = {"image_index": _LIST + _FILE * amounts.files} if "image_index" in made else {}
    if "eval_set" in made:
        rows = sum(plan.row_bytes / plan.rows for plan in stages if plan.rows)
        found["eval_set"] = _LIST + int(amounts.held_out * rows)
    for plan in stages:
        table, stage, config = STAGES[plan.stage].table, plan.stage, run.config.stage(plan.stage)
        crops = plan.row_bytes + plan.rows * _ROW
        found |= {kind: crops for kind in (f"{table}_pixels", f"{table}_conditioning") if kind in made}
        if f"{table}_low_res" in made:
            found[f"{table}_low_res"] = plan.row_bytes // UPSCALE**2 + plan.rows * _ROW
        if stage in requests and f"{table}_text" in made:
            found[f"{table}_text"] = len(amounts.captions) * _text_bytes(
                run, requests[stage].unet, config.mixed_precision
            )
        if stage in costs and f"{table}_lora" in made:
            found[f"{table}_lora"] = _weights(costs[stage]) + _CURVES
    if "lora_bundle" in made:
        found["lora_bundle"] = sum(_weights(each) for each in costs.values()) + _sheets(run, amounts) + _LIST
    if "text_embeds" in made:
        new = amounts.new_captions
        found["text_embeds"] = _TOKENS + int(new * run.config.tokenizer_max_length * _width(requests) * _stored(run))
    if "cascade_samples" in made:
        found["cascade_samples"] = _samples(run) + _sheets(run, amounts) + _LIST
    meanwhile = max(
        (_checkpoints(run, stage, costs[stage]) for stage in costs if f"stage{stage}_lora" in made), default=0
    )
    return DiskPlan(found, meanwhile, shutil.disk_usage(nearest_folder(run.workspace)).free)


def _weights(costs: StepCosts) -> int:
    return costs.trained_bytes + _NAME * costs.trained_tensors


def _samples(run: Run) -> int:
    """The samples of base and tuned model."""
    total = 0.0
    for stage in run.config.stages:
        area = sum(width * height for width, height in run.config.sample_sizes_px) * STAGES[stage].scale ** 2
        total += 2 * _PNG * 3 * area * _sampled(run, stage)
    return int(total)


def _sampled(run: Run, stage: Stage) -> int:
    """How many samples a stage draws, of each size."""
    each = max(1, len(run.config.prompts)) * run.config.num_validation_images
    return min(each, run.config.num_upscaled_images) if STAGES[stage].is_upscaler else each


def _sheets(run: Run, amounts: Amounts) -> int:
    shown = sum(2 * min(8, _sampled(run, stage)) for stage in run.config.stages)
    measured = any(STAGES[stage].is_upscaler for stage in run.config.stages)
    held_out = min(_MOST_EVAL, amounts.held_out) if measured else 0
    return _CELL * shown + _PROBE * len(run.config.probes) + _EVAL * held_out


def _text_bytes(run: Run, unet: Json, precision: str) -> int:
    """Of a caption's projected text: its rows, and the pooled vector in fp32."""
    channels = unet["block_out_channels"][0] * 4
    number = 4 if precision == "no" else 2
    return int(run.config.tokenizer_max_length * unet["cross_attention_dim"] * number + channels * number)


def _stored(run: Run) -> float:
    share = _PACKED if run.config.embed_compression == "packed" else 1.0
    return share * stored_width(run)


def _width(requests: dict[Stage, CostRequest]) -> int:
    return next((request.unet["encoder_hid_dim"] for request in requests.values()), 4096)


def _checkpoints(run: Run, stage: Stage, costs: StepCosts) -> int:
    """Of a training, at most: the oldest goes when a newer one is whole."""
    config = run.config.stage(stage)
    one = costs.trained_bytes + (STATES[config.optimizer] + (EMA if config.use_ema else 0)) * costs.trained
    return int((config.checkpoints_total_limit + 1) * one)

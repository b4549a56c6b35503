"""What a run would write, in bytes: what it makes, and the checkpoints that it needs meanwhile."""

import shutil
from dataclasses import dataclass

from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import STAGES, UPSCALE, Stage
from deepfloyd_core.planning.steps import StagePlan
from deepfloyd_core.planning.work import ArtifactPlan
from deepfloyd_core.store.file_trials import nearest_folder
from deepfloyd_core.training.costs import EMA, STATES, CostRequest, StepCosts
from deepfloyd_core.types import Json

_ROW = 330  # bytes of a crop beside its pixels: names, caption, sizes, and its entry in the list of rows
_PACKED = 0.64  # of embeds, embed_compression = packed
_SAMPLE = 3 * 4 * 256**2  # bytes of a sample of the cascade with its place on the sheets


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
    requests: dict[Stage, CostRequest], captions: int, new: int,
) -> DiskPlan:  # fmt: skip
    """run: with its own workspace, whose disk counts. captions: all texts; new: those that are not encoded yet. Held-out
    pictures are too few to count.
    """
    made = {artifact.kind for artifact in artifacts if artifact.state != "reused"}
    found: dict[str, int] = {}
    for plan in stages:
        table, stage, config = STAGES[plan.stage].table, plan.stage, run.config.stage(plan.stage)
        crops = plan.row_bytes + plan.rows * _ROW
        found |= {kind: crops for kind in (f"{table}_pixels", f"{table}_conditioning") if kind in made}
        if f"{table}_low_res" in made:
            found[f"{table}_low_res"] = plan.row_bytes // UPSCALE**2 + plan.rows * _ROW
        if stage in requests and f"{table}_text" in made:
            found[f"{table}_text"] = captions * _text_bytes(run, requests[stage].unet, config.mixed_precision)
        if stage in costs and f"{table}_lora" in made:
            found[f"{table}_lora"] = costs[stage].trained_bytes
    if "lora_bundle" in made:
        found["lora_bundle"] = sum(each.trained_bytes for each in costs.values())
    if "text_embeds" in made:
        found["text_embeds"] = int(new * run.config.tokenizer_max_length * _width(requests) * _stored(run))
    if "cascade_samples" in made:
        found["cascade_samples"] = 2 * max(1, len(run.config.prompts)) * run.config.num_validation_images * _SAMPLE
    meanwhile = max(
        (_checkpoints(run, stage, costs[stage]) for stage in costs if f"stage{stage}_lora" in made), default=0
    )
    return DiskPlan(found, meanwhile, shutil.disk_usage(nearest_folder(run.workspace)).free)


def _text_bytes(run: Run, unet: Json, precision: str) -> int:
    """Of a caption's projected text: its rows, and the pooled vector in fp32."""
    channels = unet["block_out_channels"][0] * 4
    number = 4 if precision == "no" else 2
    return int(run.config.tokenizer_max_length * unet["cross_attention_dim"] * number + channels * number)


def _stored(run: Run) -> float:
    share = _PACKED if run.config.embed_compression == "packed" else 1.0
    return share * (4 if run.config.text_encoder_dtype == "fp32" else 2)


def _width(requests: dict[Stage, CostRequest]) -> int:
    return next((request.unet["encoder_hid_dim"] for request in requests.values()), 4096)


def _checkpoints(run: Run, stage: Stage, costs: StepCosts) -> int:
    """Of a training, at most: the oldest goes when a newer one is whole."""
    config = run.config.stage(stage)
    one = costs.trained_bytes + (STATES[config.optimizer] + (EMA if config.use_ema else 0)) * costs.trained
    return int((config.checkpoints_total_limit + 1) * one)

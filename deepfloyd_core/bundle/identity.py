"""The inputs of a bundle, its identity, and its report. No torch."""

from dataclasses import dataclass
from typing import cast

from deepfloyd_core.config.flavours import STAGES, Stage
from deepfloyd_core.sampling.jobs import SamplesSummary
from deepfloyd_core.store.artifacts import Request
from deepfloyd_core.store.inputs import A, Inputs
from deepfloyd_core.store.manifest import Summary
from deepfloyd_core.training.jobs import TrainingFigures

BUNDLE_FORMAT = 6


@dataclass(frozen=True, kw_only=True)
class BundleInputs(Inputs[A]):
    """The inputs of a bundle."""

    image_index: A
    cascade_samples: A
    stage1_lora: A | None = None
    stage2_lora: A | None = None

    @property
    def loras(self) -> dict[Stage, A]:
        """The LoRA of each stage that has one."""
        found = {1: self.stage1_lora, 2: self.stage2_lora}
        return {stage: cast(A, found[stage]) for stage in STAGES if found[stage] is not None}


class BundleSummary(Summary):
    """The figures of a bundle; also its metrics.json."""

    stage1: TrainingFigures | None = None
    stage2: TrainingFigures | None = None
    samples: SamplesSummary


def bundle_request(inputs: BundleInputs[A]) -> Request:
    """Identity of a bundle: its inputs, and the base model of each LoRA, which samples are made with."""
    models = {f"stage{stage}_model": lora.inputs["model"] for stage, lora in inputs.loras.items()}
    return Request("lora_bundle", BUNDLE_FORMAT, {}, {**inputs.names, **models})

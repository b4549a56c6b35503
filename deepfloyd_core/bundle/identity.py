"""The inputs of a bundle, its identity, and its report. No torch."""

from dataclasses import dataclass

from deepfloyd_core.config.stages import Stage, by_stage
from deepfloyd_core.measures.tables import MeasureTable
from deepfloyd_core.sampling.jobs import CascadeInputs, SamplesSummary
from deepfloyd_core.store.artifacts import Request
from deepfloyd_core.store.inputs import A
from deepfloyd_core.store.manifest import Summary
from deepfloyd_core.training.jobs import TrainingFigures

BUNDLE_FORMAT = 10


@dataclass(frozen=True, kw_only=True)
class BundleInputs(CascadeInputs[A]):
    """The inputs of a bundle."""

    image_index: A
    cascade_samples: A


class BundleSummary(Summary):
    """The figures of a bundle; also its metrics.json."""

    stage1: TrainingFigures | None = None
    stage2: TrainingFigures | None = None
    samples: SamplesSummary

    @property
    def trainings(self) -> dict[Stage, TrainingFigures]:
        """The figures of each trained stage."""
        return by_stage(self)

    @property
    def tables(self) -> list[MeasureTable]:
        """The measures of the upscaler among the trained stages."""
        return self.samples.tables(self.trainings)


def bundle_request(inputs: BundleInputs[A]) -> Request:
    """Identity of a bundle: its inputs, and the base model of each LoRA, which samples are made with."""
    models = {f"stage{stage}_model": lora.inputs["model"] for stage, lora in inputs.loras.items()}
    return Request("lora_bundle", BUNDLE_FORMAT, {}, {**inputs.names, **models})

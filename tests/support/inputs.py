"""What artifacts are made from, where a test cares for a part of it."""

from typing import Any

from deepfloyd_core.sampling.jobs import SampleInputs
from deepfloyd_core.store.artifacts import Request
from deepfloyd_core.training.jobs import TrainingInputs
from deepfloyd_core.types import Identity

ANY = Request("any", 1, {}, {})


def training_inputs(**own: Any) -> TrainingInputs[Identity]:
    """Of a LoRA."""
    return TrainingInputs(**{"pixels": ANY, "text": ANY, "eval_set": ANY, **own})


def sample_inputs(**own: Any) -> SampleInputs[Identity]:
    """Of cascade samples."""
    return SampleInputs(**{"text_embeds": ANY, "eval_set": ANY, **own})

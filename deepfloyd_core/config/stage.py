"""The settings of one stage: training and sampling, with SimpleTuner's key names and units, in six groups.

A group's module has its keys and the rules between them. A setting that would have no effect is refused, like a
contradiction. It is only noted where it is common in other people's files, because a run should do what its file says.
"""

from collections.abc import Iterator
from typing import Self

from pydantic import model_validator

from deepfloyd_core.config.flavours import FLAVOURS, Flavour
from deepfloyd_core.config.keys import idle_faults, other_stage_faults
from deepfloyd_core.config.stage_loss import LossKeys, loss_faults
from deepfloyd_core.config.stage_low_res import LowResKeys, low_res_faults, low_res_notes
from deepfloyd_core.config.stage_method import MethodKeys, flavour_fault, method_faults
from deepfloyd_core.config.stage_optimizer import (
    OPTIMIZER_KINDS,
    OptimizerKeys,
    OptimizerKind,
    Schedule,
    optimizer_faults,
    optimizer_notes,
)
from deepfloyd_core.config.stage_run import RunKeys, compile_fault, micro_batch_fault, sample_batch_fault
from deepfloyd_core.config.stage_sampling import SamplingKeys, sampling_fault
from deepfloyd_core.config.stages import STAGES

GROUPS = (MethodKeys, OptimizerKeys, LossKeys, LowResKeys, RunKeys, SamplingKeys)


class StageConfig(MethodKeys, OptimizerKeys, LossKeys, LowResKeys, RunKeys, SamplingKeys):
    """Training and sampling of one stage."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the run; with `num_train_epochs` they are not known before `epochs.with_steps`."""
        return self.max_train_steps or 1000

    @property
    def samples_per_step(self) -> int:
        """Samples of an optimizer step: of all its forward passes."""
        return self.train_batch_size * self.gradient_accumulation_steps

    @property
    def pass_size(self) -> int:
        """The most pictures in one pass through the UNet: those of a batch, or of one of its parts, which are as even as
        can be.
        """
        whole = self.train_batch_size
        return -(-whole // -(-whole // (self.micro_batch_size or whole)))

    @property
    def passes_per_step(self) -> int:
        """Forward passes of an optimizer step."""
        return self.gradient_accumulation_steps * -(-self.train_batch_size // self.pass_size)

    @property
    def sampled_at_once(self) -> int:
        """The most pictures that are sampled at once."""
        return self.sample_batch_size or STAGES[self.flavour.stage].sample_batch

    @property
    def final_learning_rate(self) -> float:
        """Learning rate at the end of a decaying schedule."""
        return self.learning_rate / 10 if self.lr_end is None else self.lr_end

    @property
    def schedule(self) -> Schedule:
        """Shape of the learning rate over the run."""
        return self.lr_scheduler or ("constant" if self.optimizer_kind.averages else "cosine")

    @property
    def optimizer_kind(self) -> OptimizerKind:
        """The facts of its optimizer."""
        return OPTIMIZER_KINDS[self.optimizer]

    @property
    def measured_noise_levels(self) -> tuple[int, ...]:
        """The noise levels at which Stage II is measured, each once; first the one that it samples at."""
        return tuple(dict.fromkeys((self.validation_noise_level, *self.validation_noise_levels)))

    @property
    def paired(self) -> bool:
        """Whether the ControlNet uses pairs."""
        return self.controlnet and self.controlnet_conditioning == "paired"

    @property
    def remakes_low_res(self) -> bool:
        """Whether an upscaler is trained on low-res pictures that the stage before it sampled."""
        return self.low_res_stage1_share > 0

    @property
    def degrades_low_res(self) -> bool:
        """Whether Stage II's low-res pictures are degraded in training."""
        return bool(self.low_res_blur or self.low_res_noise or self.low_res_jpeg_quality)

    @property
    def flavour(self) -> Flavour:
        """The table's entry."""
        return FLAVOURS[self.model_flavour]

    @property
    def model(self) -> str:
        """Hub id or directory of the weights."""
        return self.pretrained_model_name_or_path or self.flavour.repo

    @property
    def notes(self) -> list[str]:
        """What a user should know of these settings, each starting with its key."""
        return [*optimizer_notes(self), *low_res_notes(self)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if faults := [fault for fault in _faults(self) if fault]:
            raise ValueError("\n".join(faults))
        return self


def _faults(config: StageConfig) -> Iterator[str]:
    """Every contradiction among a stage's settings, to follow the name of the place; empty texts between them."""
    if fault := flavour_fault(config):
        yield fault
        return
    yield from method_faults(config)
    yield from optimizer_faults(config)
    yield from loss_faults(config)
    yield from idle_faults(config, {"lr_scheduler": config.schedule})
    if config.flavour.kind.is_upscaler:
        yield from low_res_faults(config)
    yield from other_stage_faults(config, config.flavour.stage, config.model_flavour)
    yield compile_fault(config)
    yield micro_batch_fault(config)
    yield sample_batch_fault(config)
    yield sampling_fault(config.validation_noise_scheduler, config.validation_num_inference_steps)

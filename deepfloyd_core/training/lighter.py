"""Settings that make a training take less memory and its result no other, those first that cost the least time.

Micro-batches change it by the rounding of sums, as another device does, gradient checkpointing by no bit. Not here: what
cannot be cut or recomputed without another result. `lora_dropout` is drawn for whole batches, and a compiled graph would be
compiled again, with its own rounding. No torch.
"""

from dataclasses import dataclass

from deepfloyd_core.config.stage import StageConfig

RECOMPUTE = (("gradient_checkpointing", True),)


@dataclass(frozen=True)
class Lighter:
    """Settings of a stage that take less memory."""

    settings: tuple[tuple[str, object], ...]  # keys of its table, with their values
    effect: str

    def of(self, config: StageConfig) -> StageConfig:
        """A stage's settings with these."""
        return config.model_copy(update=dict(self.settings))


def lighter(config: StageConfig) -> list[Lighter]:
    """What takes less memory than a stage's settings; larger micro-batches before smaller ones."""
    if config.dynamo_backend != "no":
        return []
    cut = [] if config.lora_dropout else [_cut(config, size) for size in _sizes(config)]
    if config.gradient_checkpointing:
        return cut
    again = Lighter(RECOMPUTE, "the same result")
    return [*cut, again, *(Lighter((*RECOMPUTE, *each.settings), each.effect) for each in cut)]


def _sizes(config: StageConfig) -> list[int]:
    """The sizes of micro-batches below the stage's own, a smaller one for each pass more."""
    whole = config.train_batch_size
    sizes = {-(-whole // count) for count in range(2, whole + 1)}
    return sorted((size for size in sizes if size < config.pass_size), reverse=True)


def _cut(config: StageConfig, size: int) -> Lighter:
    return Lighter((("micro_batch_size", size),), "the same steps, up to the rounding of sums")

"""What makes a training take less memory: for each way the forecast with it, and whether it fits.

First the settings that change no result, by the time that they cost. Only where none of these fits, what changes the result,
in addition to the lightest of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stage_method import BasePrecision
from deepfloyd_core.config.stages import STAGES
from deepfloyd_core.models.device import Device
from deepfloyd_core.store.counts import size
from deepfloyd_core.training.costs import PROGRAM, StepCosts, step_parts
from deepfloyd_core.training.lighter import RECOMPUTE, Lighter, lighter
from deepfloyd_core.training.turns import of_a_rank

_SHARES: dict[BasePrecision, float] = {"int8": 0.26, "nf4": 0.14}  # of the bytes of frozen weights in fp32
_LEAST = 0.01  # share of a training's memory: less is no saving


@dataclass(frozen=True)
class Saving:
    """Settings that take less memory."""

    settings: tuple[tuple[str, object], ...]  # keys of the run file, dotted, with their values
    bytes: int  # that the part takes with them
    effect: str
    is_same: bool  # the result is the same, up to the rounding of sums

    @property
    def keys(self) -> str:
        """As one writes them into the run file."""
        return " with ".join(f"{key} = {str(value).lower()}" for key, value in self.settings)

    def told(self, device: Device) -> str:
        """What they come to on a device."""
        fits = "which fits" if device.fits(self.bytes) else "which does not fit either"
        return f"{self.keys}: {size(self.bytes)}, {fits}; {self.effect}"


def training_bytes(config: StageConfig, costs: StepCosts, device: Device) -> int:
    """The most that a training takes, or each of its processes."""
    own = of_a_rank(config, device.ranks)
    return sum(step_parts(own, costs, device.is_cpu, device.ranks).values()) + (PROGRAM if device.is_cpu else 0)


def training_savings(config: StageConfig, costs: StepCosts, device: Device) -> tuple[Saving, ...]:
    """What takes less of a training. Of each way to change no result the first that fits, or the one that takes least."""
    now, table = training_bytes(config, costs, device), STAGES[config.flavour.stage].table
    ways: dict[tuple[str, ...], list[Saving]] = {}
    for each in lighter(config):
        saving = _saving(table, each, training_bytes(each.of(config), costs, device), True)
        if saving.bytes < now * (1 - _LEAST):
            ways.setdefault(tuple(key for key, _ in saving.settings), []).append(saving)
    same = [next((saving for saving in way if device.fits(saving.bytes)), way[-1]) for way in ways.values()]
    if any(device.fits(saving.bytes) for saving in same):
        return tuple(same)
    least = min(same, key=lambda saving: saving.bytes, default=None)
    settings = () if least is None else tuple((key.partition(".")[2], value) for key, value in least.settings)
    lightest = Lighter(settings, "").of(config)
    other = [
        _saving(table, Lighter((*settings, *each.settings), each.effect), count, False)
        for each, count in _other(lightest, costs, device)
        if count < (now if least is None else least.bytes) * (1 - _LEAST)
    ]
    return (*same, *other)


def sampling_savings(table: str, pictures: int, taken: Callable[[int], int], device: Device) -> tuple[Saving, ...]:
    """What takes less of sampling so many pictures at once: as many as fit, or one. taken: bytes, by their number.

    No weights need leave the device meanwhile: to sample one takes less than a training step of one.
    """
    fewer = next((count for count in range(pictures - 1, 1, -1) if device.fits(taken(count))), 1)
    if pictures == 1:
        return ()
    effect = "the same pictures, up to the rounding of sums"
    return (Saving(((f"{table}.sample_batch_size", fewer),), taken(fewer), effect, True),)


def _other(config: StageConfig, costs: StepCosts, device: Device) -> Iterator[tuple[Lighter, int]]:
    """What changes the result, with the bytes of the training then."""
    now = training_bytes(config, costs, device)
    if config.dynamo_backend != "no" and not config.gradient_checkpointing:
        again = Lighter(RECOMPUTE, "another rounding")
        yield again, training_bytes(again.of(config), costs, device)
    if config.pass_size > 1:  # it cannot be cut
        passes = config.train_batch_size * config.gradient_accumulation_steps
        one = Lighter((("train_batch_size", 1), ("gradient_accumulation_steps", passes)), "other draws")
        yield one, training_bytes(one.of(config), costs, device)
    if config.model_type == "full":
        return
    whole = costs.frozen / _SHARES.get(config.base_model_precision, 0.5 if config.mixed_precision == "bf16" else 1)
    for precision, share in _SHARES.items():
        yield Lighter((("base_model_precision", precision),), "another result"), now - costs.frozen + int(whole * share)
    if not (config.use_bitfit or config.controlnet) and config.lora_rank > 1:
        rank = config.lora_rank // 2
        share = rank / config.lora_rank
        smaller = {"trained": int(costs.trained * share), "trained_bytes": int(costs.trained_bytes * share)}
        halved = Lighter((("lora_rank", rank),), "another result")
        yield halved, training_bytes(config, costs.model_copy(update=smaller), device)


def _saving(table: str, each: Lighter, count: int, is_same: bool) -> Saving:
    return Saving(tuple((f"{table}.{key}", value) for key, value in each.settings), count, each.effect, is_same)

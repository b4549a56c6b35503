"""What a training step costs, before a model is loaded: its record, the question of its calculation, and arithmetic on it.

`measured_costs` calculates a record in a process with torch. It does not depend on weights, so a record is kept for
each architecture, method and size of picture: `known_costs.json` has those of the shipped run files and of the
published flavours, and others are kept in the user's cache. No torch.
"""

import json
from contextlib import suppress
from functools import cache
from importlib import resources
from pathlib import Path

from pydantic import ValidationError

from deepfloyd_core.config.base import Spec
from deepfloyd_core.config.flavours import RANDOM
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.files import canonical_json, read_note, sha256_bytes, write_note
from deepfloyd_core.models.random_files import read_json
from deepfloyd_core.models.random_weights import UNETS
from deepfloyd_core.models.work import Work, of_batch
from deepfloyd_core.pictures.geometry import Size
from deepfloyd_core.store.manifest import Summary
from deepfloyd_core.text.projection import text_is_frozen
from deepfloyd_core.types import Json

FORMAT = 2
KNOWN = "known_costs.json"
# What decides a record, beside the UNet's architecture and the size.
_KEYS = (
    "model_type", "use_bitfit", "use_dora", "controlnet", "controlnet_conditioning", "lora_rank", "lora_target_modules",
    "base_model_precision", "mixed_precision", "attention_mechanism",
)  # fmt: skip
# glibc keeps freed blocks below its largest threshold for mmap, with holes: this share of all that a step allocates in such
# blocks. Fitted to fourteen steps (benchmarks/train_memory.py), whose memory it forecasts within 13 %.
_HEAP_BLOCK, _HOLES = 1 << 25, 0.105
_MOST_HOLES = 2  # passes of a step whose holes add up: later ones fill those of the earlier ones
PROGRAM = 380_000_000  # bytes of Python, torch and diffusers on a CPU, before a model is loaded


# Bytes of an optimizer's state for each trained number: tensors of its size. Adafactor keeps rows and columns only.
STATES = {"adamw": 8, "adamw_bf16": 4, "adamw_8bit": 2, "adafactor": 0.1, "prodigy": 16, "adamw_schedulefree": 8}
EMA = 4  # of a trained number's average
# Bytes that an update touches of each trained number beside the states, and its operations for each tensor: the norm of the
# gradients, their clipping, weights, gradients and weights again; of an average three operations.
_CLIPPED, _AVERAGED, _UPDATES = 4 + 8 + 12, 32, 10
# What a step keeps lies in memory that is fresh, mapped and filled with zeros by the system, and in no cache when its
# backward pass comes: as if touched so often more. Fitted to tiny-ii at 256 px, where it is most.
_FRESH = 4


class StepCosts(Summary):
    """Bytes and work of one training step, for batches of one and of two pictures.

    A step's bytes are of activations and gradients at their highest, beside the weights. Its work is that of the forward
    and the backward pass.
    """

    frozen: int  # bytes of the weights that are not trained
    trained: int  # numbers
    trained_bytes: int
    kept: tuple[int, int]  # a step that keeps its activations
    recomputed: tuple[int, int]  # a step with gradient_checkpointing
    sampled: tuple[int, int]  # a call of the UNet without gradients
    kept_blocks: tuple[
        int, ...
    ]  # bytes that a step of one picture allocates, in blocks of 2^n to 2^(n+1) bytes, from n = 0
    recomputed_blocks: tuple[int, ...]
    trained_tensors: int
    kept_work: tuple[Work, Work]
    recomputed_work: tuple[Work, Work]
    sampled_work: tuple[Work, Work]

    def step(self, batch: int, recomputes: bool, on_cpu: bool, passes: int = 1) -> int:
        """Bytes of a step at their highest, beside the weights. batch: of each of its passes."""
        one, two = self.recomputed if recomputes else self.kept
        held = one + (batch - 1) * (two - one)
        if not on_cpu:
            return held
        blocks = self.recomputed_blocks if recomputes else self.kept_blocks
        small = sum(count * batch for n, count in enumerate(blocks) if 1.5 * 2**n * batch < _HEAP_BLOCK)
        return held + int(_HOLES * min(passes, _MOST_HOLES) * small)

    def step_work(self, config: StageConfig) -> Work:
        """The work of an optimizer step, all its batches and the update."""
        one, two = self.recomputed_work if config.gradient_checkpointing else self.kept_work
        batches = of_batch(one, two, config.train_batch_size).times(config.gradient_accumulation_steps)
        touched = _CLIPPED + 2 * STATES[config.optimizer] + (_AVERAGED if config.use_ema else 0)
        fresh = _FRESH * self.step(config.train_batch_size, config.gradient_checkpointing, on_cpu=False)
        held = fresh * config.gradient_accumulation_steps
        return batches + Work(bytes=touched * self.trained + held, calls=_UPDATES * self.trained_tensors)

    def call_work(self, pictures: float) -> Work:
        """The work of a call of the UNet without gradients. pictures: of the size that the record is of."""
        return of_batch(*self.sampled_work, pictures)

    def sampling(self, pictures: int) -> int:
        """Bytes of a call of the UNet without gradients, beside the weights."""
        one, two = self.sampled
        return one + (pictures - 1) * (two - one)


class CostRequest(Spec):
    """The step whose costs are asked for."""

    settings: StageConfig
    unet: Json  # the UNet's config
    size: Size  # px, of the pictures or windows that are trained on


def step_parts(config: StageConfig, costs: StepCosts, on_cpu: bool, ranks: int = 1) -> dict[str, int]:
    """What is in memory at once while a stage is trained: bytes, by name. ranks: see `state_parts`."""
    # While a later pass of a step is at its highest.
    share = _shares(config, ranks)
    earlier = {"gradients of earlier passes": costs.trained_bytes // share} if config.passes_per_step > 1 else {}
    return {
        **state_parts(config, costs, ranks),
        "activations and gradients": costs.step(
            config.pass_size, config.gradient_checkpointing, on_cpu, config.passes_per_step
        ),
        **earlier,
    }


def state_parts(config: StageConfig, costs: StepCosts, ranks: int = 1) -> dict[str, int]:
    """What is in memory between two steps: bytes, by name.

    ranks: processes that share the steps. Of a UNet that is trained whole each holds a part, see `sharded`; its weights are
    counted whole as well, as a validation has them. A step gathers a block at a time, so there this is more than it takes.
    """
    share = _shares(config, ranks)
    parts = {"this process's part of them": costs.trained_bytes // share} if share > 1 else {}
    average = {"average": EMA * costs.trained // share} if config.use_ema else {}
    return {
        "frozen weights": costs.frozen,
        "trained weights": costs.trained_bytes,
        **parts,
        "optimizer": int(STATES[config.optimizer] * costs.trained) // share,
        **average,
    }


def _shares(config: StageConfig, ranks: int) -> int:
    return ranks if config.model_type == "full" else 1


def default_cache() -> Path:
    """Where calculated records are kept: among Hugging Face's assets of this user."""
    from huggingface_hub.constants import HF_ASSETS_CACHE

    return Path(HF_ASSETS_CACHE) / "deepfloyd" / "costs"


def cost_request(config: StageConfig, folder: Path | None, size: Size) -> CostRequest | None:
    """The request for a stage's step at a size. folder: of its base model; None: not on this machine, and then its
    architecture is known for the published flavours only. Returns None where it is not known.
    """
    unet = (
        UNETS.get(config.model_flavour.removeprefix(RANDOM))
        if folder is None
        else read_json(folder / "unet/config.json")
    )
    if unet is None or (folder is None and config.pretrained_model_name_or_path is not None):
        return None
    return CostRequest(settings=config, unet=_architecture(unet), size=size)


def cost_key(request: CostRequest) -> str:
    """The name of a record: two steps that cost the same have the same."""
    config = request.settings
    keys = {name: value for name, value in config.model_dump(mode="json").items() if name in _KEYS}
    if config.model_type == "full" or config.use_bitfit:
        keys = {name: value for name, value in keys.items() if not name.startswith("lora_")}
    if not config.controlnet:
        keys.pop("controlnet_conditioning", None)
    about = {
        "bf16_weights": config.optimizer_kind.bf16_weights,
        "text": text_is_frozen(config),
        "stage": config.flavour.stage,
    }
    if config.lora_dropout:
        about["dropout"] = True
    record = {"format": FORMAT, "unet": request.unet, "size": request.size, **keys, **about}
    return sha256_bytes(canonical_json(record).encode())[:16]


def known_costs(request: CostRequest, kept_in: Path) -> StepCosts | None:
    """A record that need not be calculated: a shipped one, or one of `keep_costs`. A damaged one is none."""
    key = cost_key(request)
    if (record := _shipped().get(key)) is not None:
        return StepCosts.model_validate(record)
    note = read_note(kept_in / f"{key}.json")
    try:
        return None if note is None else StepCosts.model_validate_json(bytes(note))
    except ValidationError:  # of another version of the program
        return None


def keep_costs(request: CostRequest, costs: StepCosts, kept_in: Path) -> None:
    """Keep a record for `known_costs`, if the folder can be written."""
    with suppress(OSError):
        kept_in.mkdir(parents=True, exist_ok=True)
        write_note(kept_in / f"{cost_key(request)}.json", costs.model_dump_json().encode())


@cache
def _shipped() -> dict[str, Json]:
    text = resources.files(__package__).joinpath(KNOWN).read_text()
    return dict(json.loads(text))


def _architecture(unet: Json) -> Json:
    """A UNet's config without what says where it came from."""
    return {key: value for key, value in sorted(unet.items()) if not key.startswith("_")}

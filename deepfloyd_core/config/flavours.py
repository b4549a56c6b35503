"""The one table of model flavours: where the weights are, and which stage they serve."""

from dataclasses import dataclass, replace
from pathlib import Path

from deepfloyd_core.config.stages import STAGES, Stage, StageKind

TINY = Path(__file__).parents[1] / "tiny"
RANDOM = "random:"  # before a name: the same architecture with random weights


# Prompts of what a base model knew before, to measure what a training makes it forget: everyday things in several styles.
MOST_PROBES = 12
GENERAL = (
    "a photo of a brown dog running over wet grass", "a bowl of oranges on a wooden table",
    "a portrait of an old man with a grey beard", "a city street at night in the rain",
    "a red bicycle leaning against a brick wall", "an oil painting of a ship in a storm",
    "a snowy mountain under a clear blue sky", "an open book beside a cup of coffee",
    "a pencil drawing of a cat asleep on a sofa", "a stone bridge over a quiet river",
    "a field of sunflowers in the evening", "a glass of water on a white background",
)  # fmt: skip
DRAWN = (  # of the tiny cascade's world; the first eight have each of its colours and shapes
    "a red circle", "a green square", "a blue triangle", "a yellow circle", "a red square", "a green triangle",
    "a blue circle", "a yellow square", "a red triangle", "a green circle", "a blue square", "a yellow triangle",
)  # fmt: skip


@dataclass(frozen=True)
class Flavour:
    """One published (or shipped) UNet."""

    name: str
    stage: Stage
    repo: str  # hub id, a directory for the shipped ones, the name itself for random weights
    probes: tuple[str, ...] = GENERAL  # MOST_PROBES prompts that it knows

    @property
    def kind(self) -> StageKind:
        """The facts of its stage."""
        return STAGES[self.stage]


_TABLE = (
    Flavour("i-medium-400m", 1, "DeepFloyd/IF-I-M-v1.0"),
    Flavour("i-large-900m", 1, "DeepFloyd/IF-I-L-v1.0"),
    Flavour("i-xlarge-4.3b", 1, "DeepFloyd/IF-I-XL-v1.0"),
    Flavour("ii-medium-450m", 2, "DeepFloyd/IF-II-M-v1.0"),
    Flavour("ii-large-1.2b", 2, "DeepFloyd/IF-II-L-v1.0"),
    Flavour("tiny-i", 1, str(TINY / "i"), DRAWN),
    Flavour("tiny-ii", 2, str(TINY / "ii"), DRAWN),
)
PUBLISHED = {flavour.name: flavour for flavour in _TABLE}
_RANDOM = [replace(flavour, name=RANDOM + flavour.name, repo=RANDOM + flavour.name) for flavour in _TABLE]
# Of Stage III, which is sampled and not trained.
RANDOM_STAGE3 = f"{RANDOM}x4-upscaler"
STAGE3_REPOS = {
    "x4-upscaler": "stabilityai/stable-diffusion-x4-upscaler",
    RANDOM_STAGE3: RANDOM_STAGE3,
    "tiny-iii": str(TINY / "iii"),
}
FLAVOURS = PUBLISHED | {flavour.name: flavour for flavour in _RANDOM}


TEXT_MODULES = ("encoder_hid_proj", "add_embedding")  # of a UNet: their only input is the text
# Parts of a UNet that a ControlNet has no copy of.
NOT_ON_THE_WAY_DOWN = ("up_blocks", "conv_norm_out", "conv_act", "conv_out", *TEXT_MODULES)

"""Parameters of models that are not on this machine yet: as published, those of Stage II in round figures."""

from deepfloyd_core.config.flavours import RANDOM

T5_XXL = 4_762_310_656
_UNETS = {
    "i-medium-400m": 371_605_830, "i-large-900m": 935_365_830, "i-xlarge-4.3b": 4_304_695_110,
    "ii-medium-450m": 450_000_000, "ii-large-1.2b": 1_200_000_000,
}  # fmt: skip
_RANDOM_WIDTH, _PUBLISHED_WIDTH = (
    2,
    4,
)  # bytes of a random weight, and of one as published: the files in fp16 are left out


def unet_parameters(flavour: str) -> int:
    """Of a flavour's UNet; 0 for the shipped ones, which are always here and small."""
    return _UNETS.get(flavour.removeprefix(RANDOM), 0)


def random_bytes(flavour: str, text: bool) -> int:
    """What random weights of a flavour take on the disk. text: its text encoder too."""
    unet = unet_parameters(flavour)
    return _RANDOM_WIDTH * (unet + (T5_XXL if text and unet else 0))


def download_bytes(flavour: str, text: bool) -> int:
    """About what must be downloaded of a published flavour; 0: its size is not known. text: its text encoder too."""
    unet = 0 if flavour.startswith(RANDOM) else unet_parameters(flavour)
    return _PUBLISHED_WIDTH * (unet + (T5_XXL if text and unet else 0))

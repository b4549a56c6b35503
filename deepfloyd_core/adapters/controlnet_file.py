"""The contents of a ControlNet-LoRA's file: adapters on the UNet's encoder, a few new convolutions, and a record.

No torch: a file that a training starts from is judged by its header.
"""

import re
from typing import Any, get_args

from deepfloyd_core.config.flavours import NOT_ON_THE_WAY_DOWN
from deepfloyd_core.files import parsed_json
from deepfloyd_core.types import Conditioning

HINT_WIDTHS = (16, 32)  # channels between the conditioning and the copy's first features
RECORD = "control"  # in the file's metadata: what the conditioning is, and peft's settings
# The last convolution of what hands a skip over; a downsampler may be a residual block as well.
_HANDS_OVER = re.compile(r"down_blocks\.(\d+)\.(resnets|downsamplers)\.(\d+)\.conv2?\.weight")
_MIDDLE = re.compile(r"mid_block\.resnets\.(\d+)\.conv2\.weight")

Shapes = dict[str, tuple[int, ...]]


def control_record(metadata: dict[str, str]) -> tuple[Conditioning, dict[str, Any]]:
    """The kind of a control's conditioning, and peft's settings of its adapters. Raises ValueError when the metadata
    lack them.
    """
    record = parsed_json(metadata.get(RECORD, "null"))
    if not isinstance(record, dict) or not isinstance(record.get("lora"), dict):
        raise ValueError(f"its metadata have no record {RECORD!r} of a ControlNet-LoRA")
    if record.get("conditioning") not in get_args(Conditioning):
        raise ValueError(f"its conditioning is {record.get('conditioning')!r}")
    return record["conditioning"], record["lora"]


def way_down(base: Shapes) -> Shapes:
    """The UNet's weights that a control shares."""
    return {name: shape for name, shape in base.items() if name.split(".")[0] not in NOT_ON_THE_WAY_DOWN}


def new_shapes(base: Shapes) -> Shapes:
    """Shapes of a control's own convolutions, by name, on a UNet whose weights have these shapes."""
    skips = _skip_widths(base)
    pairs = zip((3, *HINT_WIDTHS), (*HINT_WIDTHS, skips[0]), strict=True)
    layers: Shapes = {f"hint.{2 * place}": (after, before, 3, 3) for place, (before, after) in enumerate(pairs)}
    layers |= {f"skips.{place}": (width, width, 1, 1) for place, width in enumerate(skips)}
    biases: Shapes = {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    return {f"{name}.weight": shape for name, shape in layers.items()} | biases


def _skip_widths(base: Shapes) -> list[int]:
    """Channels of the encoder's skip connections: the first features, after every block, and the mid block."""
    found = [(match, base[match.string][0]) for match in map(_HANDS_OVER.fullmatch, base) if match]
    found.sort(key=lambda item: (int(item[0][1]), item[0][2] == "downsamplers", int(item[0][3])))
    middle = max((int(match[1]), base[match.string][0]) for match in map(_MIDDLE.fullmatch, base) if match)
    return [base["conv_in.weight"][0], *(width for _, width in found), middle[1]]

"""The tensor names of LoRA files from other programs, and our names for them.

Each of these formats holds the same two matrices for a layer, A (rank, in) and B (out, rank). Only the names differ, so
the numbers are read exactly. A file with alphas has a scale for each layer. No torch.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

ADAPTER = re.compile(r"(?P<layer>.+)\.lora_(?P<part>A\.weight|B\.weight|magnitude_vector)")  # ours, without a prefix
DIFFUSERS, PEFT = "diffusers", "peft"
_HALVES = {"down": "A", "up": "B"}
_HALF = r"(?P<half>down|up)\.weight"
_OWN = "(?P<own>to_q|to_k|to_v|to_out|add_k_proj|add_v_proj)"
# The format, and a pattern of its names: `layer`, or `flat` (a layer with underscores for dots), and `half` or `part`.
_PATTERNS = tuple(
    (name, re.compile(pattern))
    for name, pattern in (
        (DIFFUSERS, r"unet\.(?P<layer>.+)\.lora_(?P<part>A|B)(\.default)?\.weight"),
        (DIFFUSERS, r"unet\.(?P<layer>.+)\.lora_(?P<part>magnitude_vector)(\.default)?(\.weight)?"),
        (PEFT, r"base_model\.model\.(?P<layer>.+)\.lora_(?P<part>A|B)(\.default)?\.weight"),
        (PEFT, r"base_model\.model\.(?P<layer>.+)\.lora_(?P<part>magnitude_vector)(\.default)?(\.weight)?"),
        ("diffusers' attention processors", rf"(unet\.)?(?P<layer>.+)\.processor\.{_OWN}_lora\.{_HALF}"),
        ("diffusers' training scripts", rf"(unet\.)?(?P<layer>.+)\.lora\.{_HALF}"),
        ("kohya", rf"lora_unet_(?P<flat>\w+)(\.lora_|_lora\.){_HALF}"),
        ("kohya", r"lora_unet_(?P<flat>\w+)\.(?P<part>alpha)"),
        ("diffusers, without the name of the pipeline's part", r"(?P<layer>.+)\.lora_(?P<part>A|B)(\.default)?\.weight"),
        ("diffusers, without the name of the pipeline's part", r"(?P<layer>.+)\.lora_(?P<part>magnitude_vector)(\.weight)?"),
        ("diffusers' training scripts", r"(unet\.)?(?P<layer>.+)\.(?P<part>alpha)"),
    )
)  # fmt: skip
_TEXT_ENCODER = re.compile(r"(text_encoder|lora_te|te\d?)[._\d].*")
_OTHER_KINDS = {
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "oft_": "OFT",
    "dora_scale": "DoRA as kohya writes it",
    "lora_mid": "LoCon",
}


@dataclass(frozen=True)
class Names:
    """The meaning of a file's tensor names."""

    tensors: dict[str, str]  # ours, LAYER.lora_A.weight and so on, by the file's
    alphas: dict[str, str]  # layers, by the file's name of the scale of each
    strangers: tuple[str, ...]  # names that are of no LoRA
    formats: tuple[str, ...]  # as people call them; more than one in a file that mixes them

    @property
    def known_as(self) -> str:
        """The formats, unless they are the one that diffusers writes today."""
        return " and ".join(name for name in self.formats if name != DIFFUSERS)


def our_names(names: Iterable[str], layers: Iterable[str]) -> Names:
    """Sort the names of a file's tensors. layers: those of the base model, which are needed to read a flat name."""
    flat = _flat(layers)
    tensors, alphas, strangers, formats = dict[str, str](), dict[str, str](), list[str](), dict[str, None]()
    for name in sorted(names):
        found = next(((known, match) for known, pattern in _PATTERNS if (match := pattern.fullmatch(name))), None)
        if found is None or _TEXT_ENCODER.fullmatch(name):
            strangers.append(name)
            continue
        known, match = found
        formats[known] = None
        layer, part = _layer(match, flat), _part(match)
        if part == "alpha":
            alphas[name] = layer
        else:
            tensors[name] = f"{layer}.lora_{part}"
    return Names(tensors, alphas, tuple(strangers), tuple(formats))


def stranger_fault(names: Names, remedy: str = "") -> str:
    """Why a file with tensors that belong to no LoRA cannot be read. remedy: what to do, where the fault does not say it."""
    name = names.strangers[0]
    if _TEXT_ENCODER.fullmatch(name):
        return f"which has adapters on a text encoder ({name}); only those of a UNet are read. Keep only its UNet's tensors"
    kind = next((kind for word, kind in _OTHER_KINDS.items() if word in name), None)
    if kind:
        return f"which is {kind} ({name}), which cannot be converted exactly to a LoRA of this trainer{remedy}"
    return f"and {name} in it belongs to no known format of a LoRA or a UNet{remedy}"


def _flat(layers: Iterable[str]) -> dict[str, str]:
    """The layers by their names with underscores; none of those that two layers share."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        found.setdefault(layer.replace(".", "_"), []).append(layer)
    return {name: same[0] for name, same in found.items() if len(same) == 1}


def _layer(match: re.Match[str], flat: dict[str, str]) -> str:
    groups = match.groupdict()
    if "flat" in groups:
        return flat.get(groups["flat"], groups["flat"])
    own = groups.get("own")
    return f"{groups['layer']}.{'to_out.0' if own == 'to_out' else own}" if own else groups["layer"]


def _part(match: re.Match[str]) -> str:
    groups = match.groupdict()
    part = _HALVES[groups["half"]] if "half" in groups else groups["part"]
    return f"{part}.weight" if part in ("A", "B") else part

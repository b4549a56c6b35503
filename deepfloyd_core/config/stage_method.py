"""What is trained in a stage (adapters, biases, a ControlNet or all weights), and on which base model."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from deepfloyd_core.config.base import NameOrPath, PathOrNumber, Spec, closest
from deepfloyd_core.config.extras import missing_extra
from deepfloyd_core.config.flavours import FLAVOURS, NOT_ON_THE_WAY_DOWN
from deepfloyd_core.config.keys import CONTENT, LORA, key
from deepfloyd_core.config.stages import CONTROLLED
from deepfloyd_core.types import Conditioning

if TYPE_CHECKING:
    from deepfloyd_core.config.stage import StageConfig

BasePrecision = Literal["no_change", "int8", "nf4"]
ATTENTION_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")
_ADAPTERS: dict[str, tuple[object, ...]] = {"model_type": ("lora",), "use_bitfit": (False,)}


class MethodKeys(Spec):
    """The model and what is trained of it."""

    model_flavour: str = key(says="Which UNet: one of the flavours in the README.", makes=LORA)
    pretrained_model_name_or_path: NameOrPath | None = key(
        None, says="Hub id or directory of the weights, in place of the flavour's own.", makes=CONTENT
    )
    model_type: Literal["lora", "full"] = key(
        "lora", says="What is trained: adapters, or (`full`) every weight of the UNet.", makes=LORA
    )
    init_lora: PathOrNumber | int | None = key(
        None,
        says="Weights to start from: a folder or .safetensors file trained with the same settings, or the number of "
        "a published version. Unset: the base model.",
        makes=CONTENT,
    )
    lora_rank: int = key(
        16, ge=1, le=256, says="Rank of each adapter; file size grows linearly.", makes=LORA, only_with=_ADAPTERS
    )
    lora_alpha: float | None = key(
        None, gt=0, says="Scale numerator; the scale is alpha / rank. Unset: the rank.", makes=LORA, only_with=_ADAPTERS
    )
    lora_dropout: float = key(0.0, ge=0.0, lt=1.0, says="Dropout before each adapter.", makes=LORA, only_with=_ADAPTERS)
    lora_target_modules: tuple[str, ...] = key(
        ATTENTION_TARGETS,
        strict=False,
        min_length=1,
        says="Names of the layers that get an adapter.",
        makes=LORA,
        only_with=_ADAPTERS,
    )
    lora_init_type: Literal["default", "gaussian"] = key(
        "default",
        says="How adapters start: Kaiming-uniform, or normal with deviation 1 / rank; the product is 0.",
        makes=LORA,
        only_with=_ADAPTERS,
    )
    use_dora: bool = key(
        False,
        says="DoRA (Liu et al. 2024): the lengths of a weight's rows are trained apart from their directions.",
        makes=LORA,
        only_with=_ADAPTERS,
    )
    use_bitfit: bool = key(
        False,
        says="Train the UNet's own biases and nothing else, without adapters (BitFit, Ben Zaken et al. 2022).",
        makes=LORA,
        only_with={"model_type": ("lora",)},
    )
    controlnet: bool = key(
        False,
        says="Train a ControlNet-LoRA (Zhang et al. 2023): a Stage I with a picture as conditioning.",
        makes=(*LORA, "samples"),
        stages=CONTROLLED,
        only_with=_ADAPTERS,
    )
    controlnet_conditioning: Conditioning = key(
        "canny",
        says="The conditioning, computed from each training picture: `canny` edges, `grayscale`, or `low_res`, its "
        "colours without detail; or `paired`, separate pictures: see `conditioning_data` of the picture sets.",
        makes=LORA,
        stages=CONTROLLED,
        only_with={"controlnet": (True,)},
    )
    base_model_precision: BasePrecision = key(
        "no_change",
        says="The UNet's frozen weights in 8 or 4 bits, of linear layers and convolutions: a quarter or an eighth of "
        "fp32's memory, less exact.",
        makes=LORA,
    )


def method_faults(config: "StageConfig") -> Iterator[str]:
    """Why the method's settings cannot be used together; an empty text for each rule that is not broken."""
    yield _targets_fault(config)
    yield _precision_fault(config)
    yield _control_fault(config)


def flavour_fault(config: "StageConfig") -> str:
    """Why a model is not known; empty when it is. Without a known model the other rules cannot be checked."""
    if config.model_flavour in FLAVOURS:
        return ""
    near = closest(config.model_flavour, list(FLAVOURS)).replace("keys", "flavours")
    return f"model_flavour is {config.model_flavour!r}, which is not known. {near.rstrip('.')}"


def _targets_fault(config: "StageConfig") -> str:
    if "all-linear" not in config.lora_target_modules:
        return ""
    return (
        "lora_target_modules has 'all-linear', which names no layer here. Name those that get an adapter, for example "
        "to_q, to_k, to_v, to_out.0, add_k_proj and add_v_proj, or remove the key"
    )


def _precision_fault(config: "StageConfig") -> str:
    if config.base_model_precision == "no_change" or config.model_type != "full":
        return ""
    return (
        f"base_model_precision is {config.base_model_precision!r}, and model_type is 'full', which trains every weight; in "
        "8 or 4 bits none can be trained. Remove it, or set model_type = lora"
    )


def _control_fault(config: "StageConfig") -> str:
    if not config.controlnet or not config.flavour.kind.takes_controlnet:
        return ""
    beyond = [name for name in config.lora_target_modules if name.split(".")[0] in NOT_ON_THE_WAY_DOWN]
    if beyond:
        return (
            f"lora_target_modules has {beyond[0]!r}; controlnet adapts a copy of the UNet's down path, which lacks "
            "it. Remove it"
        )
    if config.controlnet_conditioning == "canny" and (missing := missing_extra(["skimage"], "controlnet")):
        unset = "" if "controlnet_conditioning" in config.model_fields_set else " unless it is set"
        return f"controlnet is True, its controlnet_conditioning is 'canny'{unset}, and {missing}"
    return ""

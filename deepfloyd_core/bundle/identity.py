"""Identity of a bundle. No torch: it is asked for before any model is loaded."""

from collections.abc import Mapping

from deepfloyd_core.store.artifacts import Request
from deepfloyd_core.types import Identity, names_of

BUNDLE_FORMAT = 5


def bundle_request(inputs: Mapping[str, Identity]) -> Request:
    """Identity of a bundle: what it is put together from, and the base model of each LoRA, which samples are made with."""
    loras = {name: artifact for name, artifact in inputs.items() if name.endswith("_lora")}
    models = {name.replace("_lora", "_model"): lora.inputs["model"] for name, lora in loras.items()}
    return Request("lora_bundle", BUNDLE_FORMAT, {}, {**names_of(inputs), **models})

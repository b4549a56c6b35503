"""Identities of what the torch jobs make: which settings and inputs decide the bytes of a LoRA, of samples, of a bundle.

No torch here: the flows ask for fingerprints before any model is loaded.
"""

from pathlib import Path
from typing import Any

from deepfloyd_core.artifacts import Artifact, Request
from deepfloyd_core.config import Run
from deepfloyd_core.embeds import model_fingerprint
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.flavours import Stage

LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for
BITFIT_FILE = "bitfit_biases.safetensors"  # in its place after a training with use_bitfit
LORA_FORMAT = BUNDLE_FORMAT = GENERATE_FORMAT = 1
SAMPLES_FORMAT = 2  # 2: more measures of Stage II
# Settings that change no byte of a LoRA: how often it is saved on the way, and how samples are made of it.
_NOT_IN_LORA = {"checkpointing_steps", "checkpoints_total_limit", "pretrained_model_name_or_path"}
_SAMPLING = {"validation_num_inference_steps", "validation_guidance", "validation_noise_level"}
_MODEL_PARTS = {1: ("unet", "scheduler"), 2: ("unet", "scheduler", "image_noising_scheduler")}


def product_file(folder: Path) -> str:
    """Name of the weights that a training left in a folder."""
    return BITFIT_FILE if (folder / BITFIT_FILE).exists() else LORA_FILE


def lora_request(run: Run, stage: Stage, folder: Path, inputs: dict[str, Artifact]) -> Request:
    """Identity of a stage's LoRA. `folder`: the base model; inputs: pixels, text, eval_set."""
    spec = run.config.stage(stage).model_dump(mode="json", exclude=_NOT_IN_LORA | _SAMPLING)
    spec |= {"seed": run.config.seed, "noise_level": run.config.stage(stage).validation_noise_level}
    spec |= {"shares": shares(run), "data_backend_sampling": run.config.data_backend_sampling}
    if stage == 1:
        del spec["noise_level"]  # of the held-out loss; Stage I has none
    return Request(f"stage{stage}_lora", LORA_FORMAT, spec, {**_ids(inputs), **_model(stage, folder)})


def shares(run: Run) -> dict[str, list[Any]]:
    """How the data sets take turns, as plain JSON: the arguments of `mixing.Share` for each."""
    return {dataset.id: [dataset.probability, dataset.start_step, dataset.end_step] for dataset in run.datasets}


def samples_request(run: Run, prompts: list[str], folders: dict[Stage, Path], inputs: dict[str, Artifact]) -> Request:
    """Identity of the cascade samples: prompts, seeds, sizes, sampler settings, base models and LoRAs."""
    config = run.config
    spec: dict[str, Any] = {
        "prompts": prompts,
        "negative_prompt": config.validation_negative_prompt,
        "size": list(config.sample_size_px),
        "seed": config.validation_seed,
        "images": config.num_validation_images,
        "upscaled": config.num_upscaled_images,
        "measure": config.sample_measure,
    }
    models: dict[str, str] = {}
    for stage in config.stages:
        spec[f"stage{stage}"] = config.stage(stage).model_dump(mode="json", include=_SAMPLING | {"mixed_precision"})
        models |= _model(stage, folders[stage], f"stage{stage}_model")
    return Request("cascade_samples", SAMPLES_FORMAT, spec, {**_ids(inputs), **models})


def check_base(lora: Artifact | None, stage: Stage, folder: Path) -> None:
    """Raises ConfigError when a LoRA was trained on another base model than the one in `folder`."""
    if lora is not None and lora.manifest["inputs"]["model"] != _model(stage, folder)["model"]:
        raise ConfigError(
            f"{lora.kind} {lora.fingerprint} was trained on other weights than those in {folder}. "
            f"Set stage{stage}.model_flavour to the flavour it was trained on."
        )


def bundle_request(inputs: dict[str, Artifact]) -> Request:
    """Identity of a bundle: what it is put together from."""
    return Request("lora_bundle", BUNDLE_FORMAT, {}, _ids(inputs))


def generate_request(
    run: Run, pictures: list[tuple[str, int]], version: str, folders: dict[Stage, Path], inputs: dict[str, Artifact]
) -> Request:
    """Identity of generated pictures: prompts, seeds, size, sampler settings, the models and the version's LoRAs."""
    spec: dict[str, Any] = {
        "pictures": [list(picture) for picture in pictures],
        "version": version,
        "size": list(run.config.sample_size_px),
        "negative_prompt": run.config.validation_negative_prompt,
        "text_encoder_dtype": run.config.text_encoder_dtype,
        "tokenizer_max_length": run.config.tokenizer_max_length,
    }
    if run.config.text_encoder_quantization != "none":
        spec["text_encoder_quantization"] = run.config.text_encoder_quantization
    models: dict[str, str] = {}
    for stage in run.config.stages:
        spec[f"stage{stage}"] = run.config.stage(stage).model_dump(mode="json", include=_SAMPLING | {"mixed_precision"})
        models |= _model(stage, folders[stage], f"stage{stage}_model")
    encoder = {"encoder": model_fingerprint(folders[min(folders)], ("text_encoder", "tokenizer"))}
    return Request("generated", GENERATE_FORMAT, spec, {**_ids(inputs), **models, **encoder})


def _ids(inputs: dict[str, Artifact]) -> dict[str, str]:
    return {name: artifact.fingerprint for name, artifact in inputs.items()}


def _model(stage: Stage, folder: Path, name: str = "model") -> dict[str, str]:
    return {name: model_fingerprint(folder, _MODEL_PARTS[stage])}

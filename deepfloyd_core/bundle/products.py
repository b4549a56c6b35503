"""Identities of what the torch jobs make: which settings and inputs decide the bytes of a LoRA, of samples, of a bundle.

No torch here: the flows ask for fingerprints before any model is loaded.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepfloyd_core.config.flavours import Stage
from deepfloyd_core.config.run import Run
from deepfloyd_core.crops.identity import eval_identity
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.files import sha256_file
from deepfloyd_core.store.artifacts import Artifact, Request
from deepfloyd_core.text.embeds import model_fingerprint
from deepfloyd_core.text.projection import text_identity
from deepfloyd_core.types import Identity, names_of

GENERATE_FORMAT = 3  # 2: of Stage II alone the noise level and back-projection in PNGs. 3: of a bundle
# 2: gains on held-out pictures. 3: how many pictures were trained on. 4: base models in its inputs. 5: a card whose code
# makes a picture, and tables of measures
BUNDLE_FORMAT = 5
LOW_RES_FORMAT = 1
# 3: the buckets. 4: frozen convolutions channels_last and torch's fused AdamW, which round otherwise. 5: how many pictures.
# 6: the plot of few steps
LORA_FORMAT = 6
SAMPLES_FORMAT = 9  # 6: more in PNGs. 7, 8: columns of eval.parquet. 9: spoilt low-res pictures, and the sheets' titles
# Settings that change no byte of a LoRA: how often it is saved on the way, and how samples are made of it.
# Of init_lora and the model the bytes count, not the path; of Stage I's low-res pictures what they are.
_NOT_IN_LORA = {
    "checkpoint_step_interval", "checkpointing_minutes", "checkpoints_total_limit", "pretrained_model_name_or_path",
    "init_lora", "num_train_epochs",
    "validation_step_interval", "gradient_checkpointing", "dataloader_num_workers", "low_res_stage1_strength",
}  # fmt: skip
# Keys that came later: at their default a LoRA is what it was before there were such keys.
_LATER_KEYS = {
    "low_res_stage1_share": 0, "base_model_precision": "no_change", "dynamo_backend": "no",
    "scheduled_sampling_max_step_offset": 0, "scheduled_sampling_probability": 0,
}  # fmt: skip
_SAMPLING_STAGE2 = {"validation_noise_level", "validation_back_projection"}
_SAMPLING = {"validation_num_inference_steps", "validation_guidance"} | _SAMPLING_STAGE2
_MEASURING = {"validation_noise_levels"}
_MODEL_PARTS = {1: ("unet", "scheduler"), 2: ("unet", "scheduler", "image_noising_scheduler")}


def lora_request(
    run: Run, stage: Stage, folder: Path, inputs: Mapping[str, Identity], prompts: Sequence[str] = (),
    parent_sha256: str | None = None,
) -> Request:  # fmt: skip
    """Identity of a stage's LoRA. `folder`: the base model; inputs: pixels, text, eval_set, what a ControlNet follows for
    both, the low-res pictures that Stage I made; prompts: of its validations; parent: the weights that it starts from.

    Which texts are stored does not matter, as long as those of its pictures are: so a new prompt trains nothing anew. Of
    the eval set only what is there for this stage does.
    """
    spec = run.config.stage(stage).model_dump(mode="json", exclude=_NOT_IN_LORA | _SAMPLING | _MEASURING)
    spec |= {"lr_end": run.config.stage(stage).final_learning_rate, "lr_scheduler": run.config.stage(stage).schedule}
    spec["max_train_steps"] = run.config.stage(stage).steps  # epochs are steps by now
    spec |= {"seed": run.config.seed, "noise_level": run.config.stage(stage).validation_noise_level}
    spec |= {"shares": shares(run, stage), "data_backend_sampling": run.config.data_backend_sampling}
    for key, unset in _LATER_KEYS.items():
        if spec[key] == unset:
            del spec[key]
    if run.config.stage(stage).dynamo_backend != "no":
        # What is compiled with the recomputation in it may round otherwise.
        spec["gradient_checkpointing"] = run.config.stage(stage).gradient_checkpointing
    if run.config.stage(stage).scheduled_sampling_max_step_offset:
        spec["back_projection"] = run.config.stage(stage).validation_back_projection  # of the guesses as well
    if run.config.stage(stage).stage2_patch:
        spec["windows"] = 2  # 2: they start with a pixel of the low-res picture
    if stage == 1:
        del spec["noise_level"]  # of the held-out loss; Stage I has none
    if run.config.stage(stage).validation_step_interval:
        spec["validation"] = _validation(run, stage, prompts)
    ids = {**names_of(inputs), "text": text_identity(inputs["text"])}
    ids["eval_set"] = eval_identity(inputs["eval_set"], stage)
    parent = {} if parent_sha256 is None else {"parent": parent_sha256}
    return Request(f"stage{stage}_lora", LORA_FORMAT, spec, {**ids, **_model(stage, folder), **parent})


def _validation(run: Run, stage: Stage, prompts: Sequence[str]) -> dict[str, Any]:
    """What decides the pictures that are made while a stage is trained."""
    config = run.config
    included = {"validation_step_interval"} | (_SAMPLING if stage == 2 else _SAMPLING - _SAMPLING_STAGE2)
    spec: dict[str, Any] = config.stage(stage).model_dump(mode="json", include=included)
    spec["negative_prompt"] = config.validation_negative_prompt
    if stage == 2:
        return {**spec, "images": config.num_upscaled_images}
    if config.stage(stage).controlnet:
        return {**spec, "images": config.num_validation_images}
    sizes, images = [list(size) for size in config.sample_sizes_px], config.num_validation_images
    return {**spec, "prompts": list(prompts), "sizes": sizes, "seed": config.validation_seed, "images": images}


def shares(run: Run, stage: Stage) -> dict[str, list[Any]]:
    """How the data sets that feed a stage take turns, as plain JSON: the arguments of `mixing.Share` for each."""
    fed = [dataset for dataset in run.datasets if dataset.factor(stage) is not None]
    return {dataset.id: [dataset.probability, dataset.start_step, dataset.end_step] for dataset in fed}


def low_res_request(run: Run, folder: Path, inputs: Mapping[str, Identity]) -> Request:
    """Identity of Stage I's remakes of Stage II's low-res pictures. `folder`: Stage I's base model; inputs: pixels,
    stage1_lora, text_embeds.
    """
    included = (_SAMPLING - _SAMPLING_STAGE2) | {"mixed_precision"}
    spec = run.config.stage(1).model_dump(mode="json", include=included)
    spec |= {"strength": run.config.stage(2).low_res_stage1_strength, "seed": run.config.seed}
    spec |= {"negative_prompt": run.config.validation_negative_prompt}
    ids = {**names_of(inputs), "text_embeds": text_identity(inputs["text_embeds"])}
    return Request("stage2_low_res", LOW_RES_FORMAT, spec, {**ids, **_model(1, folder)})


def samples_request(
    run: Run, prompts: list[str], folders: dict[Stage, Path], inputs: Mapping[str, Identity]
) -> Request:
    """Identity of the cascade samples: prompts, seeds, sizes, sampler settings, base models and LoRAs."""
    config = run.config
    asked: dict[str, Any] = {
        "prompts": prompts,
        "sizes": [list(size) for size in config.sample_sizes_px] if config.stage1 else [],
        "seed": config.validation_seed,
    }
    if config.stage1 and config.stage1.controlnet:
        asked = {}  # held-out pictures are followed, with captions, sizes and seeds of their own
    spec: dict[str, Any] = {
        **asked,
        "negative_prompt": config.validation_negative_prompt,
        "images": config.num_validation_images,
        "upscaled": config.num_upscaled_images,
        "measure": config.sample_measure,
    }
    models: dict[str, str] = {}
    for stage in config.stages:
        included = _SAMPLING | {"mixed_precision"} | (_MEASURING if stage == 2 else set())
        spec[f"stage{stage}"] = config.stage(stage).model_dump(mode="json", include=included)
        models |= _model(stage, folders[stage], f"stage{stage}_model")
    if config.eval_clip_model is not None:
        models["clip"] = model_fingerprint(Path(config.eval_clip_model), ("",))
    if config.eval_lpips_model is not None:
        models["lpips"] = sha256_file(Path(config.eval_lpips_model))[:16]
    return Request("cascade_samples", SAMPLES_FORMAT, spec, {**names_of(inputs), **models})


def check_base(bundle: Artifact, stage: Stage, folder: Path) -> None:
    """Raises ConfigError when what a bundle has of a stage was trained on another base model than the one in `folder`."""
    trained_on = bundle.inputs.get(f"stage{stage}_model")
    if trained_on is not None and trained_on != _model(stage, folder)["model"]:
        raise ConfigError(
            f"{bundle.kind} {bundle.fingerprint} was trained on other weights of stage {stage} than those in {folder}. "
            f"Set stage{stage}.model_flavour to the flavour it was trained on."
        )


def bundle_request(inputs: Mapping[str, Identity]) -> Request:
    """Identity of a bundle: what it is put together from, and the base model of each LoRA, which samples are made with."""
    loras = {name: artifact for name, artifact in inputs.items() if name.endswith("_lora")}
    models = {name.replace("_lora", "_model"): lora.inputs["model"] for name, lora in loras.items()}
    return Request("lora_bundle", BUNDLE_FORMAT, {}, {**names_of(inputs), **models})


def generate_request(
    run: Run, pictures: list[tuple[str, int]], version: str, folders: dict[Stage, Path], bundle: Artifact | None,
    control_sha256: str | None = None,
) -> Request:  # fmt: skip
    """Identity of generated pictures: prompts, seeds, size, sampler settings, the models and the version's bundle; and
    the bytes of the picture that a ControlNet follows.
    """
    spec: dict[str, Any] = {
        "pictures": [list(picture) for picture in pictures],
        "version": version,
        "size": list(run.config.sample_sizes_px[0]),
        "negative_prompt": run.config.validation_negative_prompt,
        "text_encoder_dtype": run.config.text_encoder_dtype,
        "tokenizer_max_length": run.config.tokenizer_max_length,
    }
    if run.config.text_encoder_quantization != "none":
        spec["text_encoder_quantization"] = run.config.text_encoder_quantization
    if control_sha256 is not None:
        spec["control"] = control_sha256
    models: dict[str, str] = {}
    for stage in run.config.stages:
        spec[f"stage{stage}"] = run.config.stage(stage).model_dump(mode="json", include=_SAMPLING | {"mixed_precision"})
        models |= _model(stage, folders[stage], f"stage{stage}_model")
    encoder = {"encoder": model_fingerprint(folders[min(folders)], ("text_encoder", "tokenizer"))}
    published = {} if bundle is None else names_of({"lora_bundle": bundle})
    return Request("generated", GENERATE_FORMAT, spec, {**published, **models, **encoder})


def _model(stage: Stage, folder: Path, name: str = "model") -> dict[str, str]:
    return {name: model_fingerprint(folder, _MODEL_PARTS[stage])}

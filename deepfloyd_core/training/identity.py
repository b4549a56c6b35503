"""Identity of a LoRA: which settings and inputs decide its bytes. No torch: it is asked for before any model is loaded."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepfloyd_core.config.flavours import Stage
from deepfloyd_core.config.run import Run
from deepfloyd_core.crops.identity import eval_identity
from deepfloyd_core.models.identity import base_model
from deepfloyd_core.sampling.identity import _MEASURING, _SAMPLING, _SAMPLING_STAGE2
from deepfloyd_core.store.artifacts import Request
from deepfloyd_core.text.projection import text_identity
from deepfloyd_core.types import Identity, names_of

# 3: the buckets. 4: frozen convolutions channels_last and torch's fused AdamW, which round otherwise. 5: how many pictures.
# 6: the plot of few steps
LORA_FORMAT = 6
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
    return Request(f"stage{stage}_lora", LORA_FORMAT, spec, {**ids, **base_model(stage, folder), **parent})


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

"""Identity of a LoRA: the settings and inputs that decide its bytes. No torch: it is needed before any model is loaded."""

from collections.abc import Sequence
from pathlib import Path

from deepfloyd_core.config.keys import read_by
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.crops.identity import eval_identity
from deepfloyd_core.models.identity import base_model
from deepfloyd_core.store.artifacts import Request
from deepfloyd_core.store.inputs import A
from deepfloyd_core.text.projection import text_identity
from deepfloyd_core.training.jobs import TrainingInputs
from deepfloyd_core.training.mixing import shares
from deepfloyd_core.types import Json

LORA_FORMAT = 8


def lora_request(
    run: Run, stage: Stage, folder: Path, inputs: TrainingInputs[A], prompts: Sequence[str] = (),
    parent_sha256: str | None = None,
) -> Request:  # fmt: skip
    """Identity of a stage's LoRA. `folder`: the base model; prompts: of its validations; parent: the weights that it
    starts from.

    Only the texts of its pictures count, not which other texts are stored: so a new prompt causes no new training. Of
    the eval set only this stage's part counts.
    """
    config = run.config.stage(stage)
    spec = read_by(config, "lora", stage)
    # Epochs have been converted to steps.
    spec |= {"lr_end": config.final_learning_rate, "lr_scheduler": config.schedule, "max_train_steps": config.steps}
    spec |= {"seed": run.config.seed, "data_backend_sampling": run.config.data_backend_sampling}
    spec["shares"] = {name: [own.weight, own.start_step, own.end_step] for name, own in shares(run, stage).items()}
    if config.dynamo_backend != "no":
        # A graph compiled with the recomputation may round differently.
        spec["gradient_checkpointing"] = config.gradient_checkpointing
    if config.scheduled_sampling_max_step_offset:
        spec["back_projection"] = config.validation_back_projection  # also of the estimates
    if inputs.start is not None:
        spec["warm_new_share"] = run.config.warm_new_share
    if config.validation_step_interval:
        spec["validation"] = _validation(run, stage, prompts)
    ids = {**inputs.names, "text": text_identity(inputs.text), "eval_set": eval_identity(inputs.eval_set, stage)}
    parent = {} if parent_sha256 is None else {"parent": parent_sha256}
    return Request(f"stage{stage}_lora", LORA_FORMAT, spec, {**ids, **base_model(stage, folder), **parent})


def _validation(run: Run, stage: Stage, prompts: Sequence[str]) -> Json:
    """The settings that decide the pictures of a stage's validations."""
    config = run.config
    spec = read_by(config.stage(stage), "validation", stage)
    spec["negative_prompt"] = config.validation_negative_prompt
    if STAGES[stage].is_upscaler:
        return {**spec, "images": config.num_upscaled_images}
    if config.stage(stage).controlnet:
        return {**spec, "images": config.num_validation_images}
    sizes, images = [list(size) for size in config.sample_sizes_px], config.num_validation_images
    return {**spec, "prompts": list(prompts), "sizes": sizes, "seed": config.validation_seed, "images": images}

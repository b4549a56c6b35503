"""Identities of sampled pictures: the settings, models and inputs that decide the bytes of remakes and samples. No torch.

Sampled pictures are Stage I's remakes, the cascade's samples and generated pictures. Identities are needed before any
model is loaded.
"""

from collections.abc import Sequence
from pathlib import Path

from deepfloyd_core.adapters.mixed import MixedLora
from deepfloyd_core.config.keys import read_by
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.files import canonical_json
from deepfloyd_core.hashing import digest
from deepfloyd_core.measures.registry import COLUMNS, networks_of
from deepfloyd_core.models.identity import base_model, model_fingerprint
from deepfloyd_core.models.text_encoders import text_encoder_of
from deepfloyd_core.sampling.jobs import PROBED, DrawnFrom, LowResInputs, SampleInputs
from deepfloyd_core.sampling.pictures import Picture, asked_digest
from deepfloyd_core.sampling.stage3_jobs import Stage3
from deepfloyd_core.sampling.upscale_jobs import OwnPicture
from deepfloyd_core.store.artifacts import Artifact, Request
from deepfloyd_core.store.events import OF_FOLDER
from deepfloyd_core.store.inputs import A
from deepfloyd_core.text.projection import text_identity
from deepfloyd_core.types import Json

GENERATE_FORMAT = 5
LOW_RES_FORMAT = 2
SAMPLES_FORMAT = 11
UPSCALE_FORMAT = 1


def low_res_request(run: Run, stage: Stage, folder: Path, inputs: LowResInputs[A]) -> Request:
    """Identity of the remakes of an upscaler's low-res pictures. `folder`: the base model of the stage before it."""
    source = STAGES[stage].upscales
    assert source is not None
    spec = read_by(run.config.stage(source), "low_res", source)
    spec |= {"strength": run.config.stage(stage).low_res_stage1_strength, "seed": run.config.seed}
    spec |= {"negative_prompt": run.config.validation_negative_prompt}
    ids = {**inputs.names, "text_embeds": text_identity(inputs.text_embeds)}
    return Request(f"stage{stage}_low_res", LOW_RES_FORMAT, spec, {**ids, **base_model(source, folder)})


def samples_request(run: Run, prompts: list[str], folders: dict[Stage, Path], inputs: SampleInputs[A]) -> Request:
    """Identity of the cascade samples: prompts, seeds, sizes, sampler settings, base models and LoRAs."""
    config = run.config
    asked: Json = {
        "prompts": prompts,
        "sizes": [list(size) for size in config.sample_sizes_px] if config.text_to_image else [],
        "seed": config.validation_seed,
    }
    if config.text_to_image and config.text_to_image.controlnet:
        asked = {}  # held-out pictures are followed, with captions, sizes and seeds of their own
    spec: Json = {
        **asked,
        "negative_prompt": config.validation_negative_prompt,
        "images": config.num_validation_images,
        "upscaled": config.num_upscaled_images,
        "measure": config.sample_measure,
    }
    models: dict[str, str] = {}
    for stage in config.stages:
        spec[f"stage{stage}"] = read_by(config.stage(stage), "samples", stage)
        models |= base_model(stage, folders[stage], f"stage{stage}_model")
    if config.probes:
        spec["probes"] = {"prompts": list(config.probes), **PROBED}
    if config.upscalers:
        spec["columns"] = list(COLUMNS)  # samples with fewer would be taken for finished ones
    for network, weights in networks_of(config):
        models[network.key] = network.fingerprint(weights)
    return Request("cascade_samples", SAMPLES_FORMAT, spec, {**inputs.names, **models})


def check_base(bundle: Artifact, stage: Stage, folder: Path) -> None:
    """Raises ConfigError when a bundle's weights of a stage were trained on another base model than the one in `folder`."""
    trained_on = bundle.inputs.get(f"stage{stage}_model")
    if trained_on is not None and trained_on != base_model(stage, folder)["model"]:
        raise ConfigError(
            f"{bundle.kind} {bundle.fingerprint} was trained on other weights of stage {stage} than those in {folder}. "
            f"Set stage{stage}.model_flavour to the flavour it was trained on."
        )


def generate_request(
    run: Run, pictures: Sequence[Picture], version: str, folders: dict[Stage, Path], bundle: Artifact | None,
    drawn_from: DrawnFrom | None = None, stage3: Stage3 | None = None,
) -> Request:  # fmt: skip
    """Identity of generated pictures: these, sampler settings, the models and the version's bundle; and what else they are
    drawn from. folders: of the stages that draw.
    """
    spec: Json = {"version": version, **read_by(run.config, "generated"), "asked": asked_digest(pictures)}
    for each_has in ("validation_resolution", "validation_negative_prompt"):
        del spec[each_has]
    spec |= drawn_from.identity if drawn_from else {}
    models: dict[str, str] = {}
    for stage, folder in folders.items():
        spec[f"stage{stage}"] = read_by(run.config.stage(stage), "generated", stage)
        models |= base_model(stage, folder, f"stage{stage}_model")
    if stage3 is not None:
        spec |= stage3.identity
        models |= stage3.inputs
    first = run.config.first_stage
    encoder = {"encoder": model_fingerprint(folders[first], text_encoder_of(first).parts)}
    published = _published(version, bundle)
    return Request("generated", GENERATE_FORMAT, spec, {**published, **models, **encoder})


def _published(version: str, bundle: Artifact | None) -> dict[str, str]:
    """The bundle that draws, as an input: an artifact of the workspace only if it is a version's."""
    if bundle is None:
        return {}
    return {"bundle": bundle.fingerprint} if version.startswith(OF_FOLDER) else {"lora_bundle": bundle.name}


def upscale_request(
    run: Run, pictures: Sequence[OwnPicture], seed: int, version: str, folders: dict[Stage, Path],
    bundle: Artifact | None, loras: Sequence[MixedLora] = (),
) -> Request:  # fmt: skip
    """Identity of upscaled pictures: their bytes, names and prompts, sampler settings, the model, the version's bundle or
    the LoRAs.
    """
    config, stage = run.config, run.config.upscalers[0]
    asked = [[one.name, one.source.sha256, one.prompt] for one in pictures]
    spec: Json = {
        "version": version,
        "seed": seed,
        **read_by(config, "generated"),
        "asked": digest(canonical_json(asked)),
    }
    del spec["validation_resolution"]
    spec |= {"loras": [one.identity for one in loras]} if loras else {}
    spec[STAGES[stage].table] = read_by(config.stage(stage), "generated", stage)
    encoder = model_fingerprint(folders[config.first_stage], text_encoder_of(config.first_stage).parts)
    published = _published(version, bundle)
    models = base_model(stage, folders[stage], f"{STAGES[stage].table}_model")
    return Request("upscaled", UPSCALE_FORMAT, spec, {**published, **models, "encoder": encoder})


def enlarge_request(run: Run, pictures: Sequence[OwnPicture], seed: int, stage3: Stage3) -> Request:
    """Identity of pictures that Stage III has upscaled: their bytes, names and prompts, its settings and its model."""
    asked = [[one.name, one.source.sha256, one.prompt] for one in pictures]
    spec: Json = {
        "seed": seed,
        "negative_prompt": run.config.validation_negative_prompt,
        "asked": digest(canonical_json(asked)),
        **stage3.identity,
    }
    return Request("upscaled", UPSCALE_FORMAT, spec, stage3.inputs)

"""Generate: prompts through Stage I and Stage II, with what a version published or with the base models."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from deepfloyd_core.adapters.controlnet import control_of
from deepfloyd_core.config.flavours import Stage
from deepfloyd_core.diffusion.conditioning import as_conditioning, conditioning_picture
from deepfloyd_core.diffusion.loss import to_bytes, to_model_range
from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.files import sha256_file
from deepfloyd_core.models.unet import use_threads
from deepfloyd_core.pictures.decode import read_fitted
from deepfloyd_core.processes.jobs import Job
from deepfloyd_core.sampling.cascade import Sample, sampler_settings, save_png
from deepfloyd_core.sampling.sampler import Sampler, make_sampler, sample_stage1, sample_stage2
from deepfloyd_core.store.versions import stage_folder
from deepfloyd_core.text.encode import encode_prompts

CONDITIONING = "conditioning.png"


def generate_job(job: Job) -> dict[str, Any]:
    """Sample job.options["pictures"], a list of [prompt, seed], into PNGs; one file a stage and picture."""
    use_threads(job.config.num_threads)
    pictures: list[tuple[str, int]] = [(prompt, seed) for prompt, seed in job.options["pictures"]]
    size = (job.options["size"][0], job.options["size"][1])
    prompts = [prompt for prompt, _ in pictures]
    text, negative = _encode(job, prompts)
    small, files, done = None, [], 0
    control = job.options["control"]

    def sampled(count: int) -> None:
        nonlocal done
        done += count
        job.report(done, len(pictures) * len(job.config.stages), "pictures")

    for stage in job.config.stages:
        folder = Path(job.options["models"][str(stage)])
        sampler = make_sampler(job.config, stage, folder, _tuned(job, stage), sampled)
        seeds = [seed for _, seed in pictures]
        if small is None:
            follow = _conditioning(job, sampler, size) if control else None
            made = small = sample_stage1(sampler, text, negative, seeds, size, follow)
        else:
            made = sample_stage2(sampler, text, negative, seeds, small)
        files += _save(job, stage, pictures, made)
    return {"pictures": files, "prompts": prompts * len(job.config.stages)}


def _tuned(job: Job, stage: Stage) -> Path | None:
    """The folder of what a version published of a stage; None where it published nothing of it."""
    bundle = job.inputs.get("lora_bundle")
    if bundle is None or f"stage{stage}_lora" not in bundle.inputs:
        return None
    return stage_folder(bundle.path, stage)


def _conditioning(job: Job, sampler: Sampler, size: tuple[int, int]) -> torch.Tensor:
    """What the pictures follow, one for each; also written beside them, to be looked at."""
    found = control_of(sampler.pipeline.unet)
    assert found is not None  # the flow saw to it
    picture, sha256 = Path(job.options["control"][0]), job.options["control"][1]
    if not picture.is_file() or sha256_file(picture) != sha256:
        raise ArtifactError(f"{picture}, which is to be followed, changed since the run began. Start it again.")
    fitted = torch.from_numpy(np.array(read_fitted(picture, size)))[None]
    if found.conditioning == "paired":
        made = as_conditioning(fitted)
    else:
        made = conditioning_picture(found.conditioning, to_model_range(fitted))
    settings = {"conditioning": found.conditioning, "picture": sha256}
    array = to_bytes(made * 2 - 1)[0].numpy()
    save_png(array, Sample("", 0, job.options["version"], settings), job.out / CONDITIONING)
    return made.expand(len(job.options["pictures"]), -1, -1, -1)


def _encode(job: Job, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the prompts and of the negative prompt, each (N, T, D); the encoder is gone when this returns."""
    rows = encode_prompts([*prompts, job.config.validation_negative_prompt], Path(job.options["encoder"]), job.config)
    return rows[:-1], rows[-1:].expand(len(prompts), -1, -1)


def _save(job: Job, stage: Stage, pictures: list[tuple[str, int]], made: torch.Tensor) -> list[str]:
    files = []
    bundle = job.inputs.get("lora_bundle")
    lora = bundle.inputs.get(f"stage{stage}_lora") if bundle else None
    settings = {**sampler_settings(job.config, stage), "lora": lora, "bundle": bundle.fingerprint if bundle else None}
    for number, ((prompt, seed), array) in enumerate(zip(pictures, to_bytes(made).numpy(), strict=True)):
        height, width = array.shape[:2]
        name = f"picture-{number:03d}-seed-{seed}-{width}x{height}.png"
        save_png(array, Sample(prompt, seed, job.options["version"], settings), job.out / name)
        files.append(name)
    return files

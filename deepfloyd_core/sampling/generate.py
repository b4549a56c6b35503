"""Generate: samples prompts with every stage of a run, with the trained weights of a version or with the base models."""

from pathlib import Path

import numpy as np
import torch

from deepfloyd_core.adapters.controlnet import control_of
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.diffusion.conditioning import as_conditioning, conditioning_picture
from deepfloyd_core.diffusion.loss import to_bytes, to_model_range
from deepfloyd_core.models.unet import use_threads
from deepfloyd_core.pictures.decode import read_fitted
from deepfloyd_core.processes.jobs import Job
from deepfloyd_core.sampling.cascade import Sample, sampler_settings, save_png
from deepfloyd_core.sampling.jobs import GeneratedSummary, GenerateRequest, SampledStage
from deepfloyd_core.sampling.parts import Parts
from deepfloyd_core.sampling.sampler import Sampler, make_sampler, sample
from deepfloyd_core.store.pinned import PinnedFile
from deepfloyd_core.store.versions import stage_folder
from deepfloyd_core.text.encode import encode_prompts

CONDITIONING = "conditioning.png"


def generate_pictures(job: Job[GenerateRequest]) -> GeneratedSummary:
    """Sample the pictures into PNGs; one file a stage and picture."""
    request, stages = job.request, job.request.cascade.stages
    use_threads(request.machine.num_threads)
    prompts, seeds = [prompt for prompt, _ in request.pictures], [seed for _, seed in request.pictures]
    text, negative = _encode(request, prompts)
    made, files, parts = None, list[str](), Parts(job.report, len(stages))
    for one in stages:
        sampled = parts.begin(f"{STAGES[one.stage].title}'s pictures", len(seeds))
        sampler = make_sampler(one, _trained(request, one.stage), request.machine, sampled)
        if not STAGES[one.stage].is_upscaler:
            made = _conditioning(job, request.control, sampler) if request.control else None
        made = sample(sampler, text, negative, seeds, request.size, made)
        files += _save(job, one, made)
    return GeneratedSummary(pictures=tuple(files), prompts=tuple(prompts * len(stages)))


def _trained(request: GenerateRequest, stage: Stage) -> Path | None:
    """The folder with a stage's trained weights in a version; None if the version has none for it."""
    bundle = request.bundle
    if bundle is None or f"stage{stage}_lora" not in bundle.inputs:
        return None
    return stage_folder(bundle.path, stage)


def _conditioning(job: Job[GenerateRequest], control: PinnedFile, sampler: Sampler) -> torch.Tensor:
    """The conditioning of the pictures, one for each; also written beside them for people."""
    request, controlnet = job.request, control_of(sampler.pipeline.unet)
    assert controlnet is not None  # the flow saw to it
    fitted = torch.from_numpy(np.array(read_fitted(control.checked("is the conditioning picture"), request.size)))[None]
    if controlnet.conditioning == "paired":
        hint = as_conditioning(fitted)
    else:
        hint = conditioning_picture(controlnet.conditioning, to_model_range(fitted))
    settings = {"conditioning": controlnet.conditioning, "picture": control.sha256}
    save_png(to_bytes(hint * 2 - 1)[0].numpy(), Sample("", 0, request.version, settings), job.out / CONDITIONING)
    return hint.expand(len(request.pictures), -1, -1, -1)


def _encode(request: GenerateRequest, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of the prompts and of the negative prompt, each (N, T, D); the encoder is freed on return."""
    texts, name = [*prompts, request.negative_prompt], request.encoder_name
    rows = encode_prompts(texts, name, request.encoder, request.text, request.machine)
    return rows[:-1], rows[-1:].expand(len(prompts), -1, -1)


def _save(job: Job[GenerateRequest], one: SampledStage, made: torch.Tensor) -> list[str]:
    files, request, bundle = [], job.request, job.request.bundle
    lora = bundle.inputs.get(f"stage{one.stage}_lora") if bundle else None
    settings = sampler_settings(one, request.negative_prompt)
    settings |= {"lora": lora, "bundle": bundle.fingerprint if bundle else None}
    for number, ((prompt, seed), array) in enumerate(zip(request.pictures, to_bytes(made).numpy(), strict=True)):
        height, width = array.shape[:2]
        name = f"picture-{number:03d}-seed-{seed}-{width}x{height}.png"
        save_png(array, Sample(prompt, seed, request.version, settings), job.out / name)
        files.append(name)
    return files

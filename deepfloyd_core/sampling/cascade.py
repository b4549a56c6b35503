"""Cascade samples: base against fine-tuned, same prompts and seeds; and the upscaler measured on held-out pictures."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stage_sampling import SCHEDULER_KINDS, NoiseScheduler
from deepfloyd_core.config.stages import STAGES
from deepfloyd_core.crops.rows import shard_files
from deepfloyd_core.diffusion.conditioning import conditioning_picture
from deepfloyd_core.diffusion.loss import to_bytes
from deepfloyd_core.files import atomic_path, canonical_json
from deepfloyd_core.measures.figures import UpscalingFigures
from deepfloyd_core.measures.files import UpscalingFiles
from deepfloyd_core.measures.measure import MeasureFn
from deepfloyd_core.measures.pixel import mean
from deepfloyd_core.measures.registry import networks_of
from deepfloyd_core.measures.upscaling import Row, measure_samples, measure_upscalers
from deepfloyd_core.models.torch_device import pick_device
from deepfloyd_core.models.unet import use_threads
from deepfloyd_core.pictures.sheets import save_picture, titled_rows
from deepfloyd_core.processes.jobs import Job
from deepfloyd_core.sampling.cascade_draws import (
    VARIANTS,
    Drawer,
    drawer,
    from_text,
    held_out_count,
    held_out_upscaler,
    prompt_embeds,
    spoiler,
    text_specs,
    upscaled_samples,
)
from deepfloyd_core.sampling.drawn_picture import RECORD
from deepfloyd_core.sampling.forgetting import DrawnProbes, ProbeLoss, write_probes
from deepfloyd_core.sampling.jobs import SampledStage, SampleRequest, SamplesSummary
from deepfloyd_core.sampling.parts import Parts, Sampled
from deepfloyd_core.sampling.specs import SampleSpec
from deepfloyd_core.types import Json

SHEET = "sheet.png"
SHEET_COLUMNS = 8


@dataclass(frozen=True)
class Sample:
    """The settings of one picture; they are written into its PNG."""

    prompt: str
    seed: int
    variant: str  # what drew it: a version, or base or tuned; empty: it has neither
    settings: Json


def sample_cascade(job: Job[SampleRequest]) -> SamplesSummary:
    """Sample both variants of every trained stage, write PNGs and sheets, return the measures."""
    request, cascade = job.request, job.request.cascade
    use_threads(request.machine.num_threads)
    figures: dict[str, float | UpscalingFigures] = {}
    rows: list[tuple[str, list[np.ndarray]]] = []
    small: dict[str, list[torch.Tensor]] = {}
    first, upscaler = cascade.text_to_image, cascade.upscaler
    specs, held_out = text_specs(request), held_out_count(request)
    parts = Parts(job.report, len(VARIANTS) * (bool(specs) + (upscaler is not None) * (bool(specs) + bool(held_out))))
    if first is not None and specs:
        forgotten = _Forgetting(request)
        for variant in VARIANTS:
            by = drawer(job, first, variant, _begun(request, first, variant, len(specs), parts))
            small[variant] = from_text(request, by, variant, specs)
            forgotten.measure(by, variant)
            del by  # and its model, before the next one is loaded
            pictures = _save(job, first, variant, specs, small[variant])
            if specs[0].input_picture is not None and not first.settings.paired:
                figures[f"control_error_{variant}"] = control_error(first.settings, specs, small[variant])
            rows.append((f"{STAGES[first.stage].title}, {variant}", pictures[:SHEET_COLUMNS]))
            if request.validation.sample_measure == "drawn_world":
                figures[f"concept_share_{variant}"] = concept_share(pictures, [item.prompt for item in specs])
        figures |= forgotten.figures(job.out)
    if upscaler is not None:
        upscaled = specs[: request.validation.num_upscaled_images]
        table: list[Row] = []
        if small:
            large, outputs = upscaled_samples(job, upscaler, upscaled, small, parts)
            table, figures["samples"] = _measure_samples(upscaler, upscaled, small, outputs)
            title = STAGES[upscaler.stage].title
            rows += [
                (f"{title}, {variant}", _save(job, upscaler, variant, upscaled, large[variant])) for variant in VARIANTS
            ]
        if held_out:
            figures |= _measure_upscaler(job, upscaler, table, parts)
    if any(item.input_picture is not None for item in specs):
        rows = _with_conditioning(rows, specs[:SHEET_COLUMNS])
    if rows:
        prompts = ", ".join(dict.fromkeys(" ".join(item.prompt.split()) for item in specs))
        title = f"base and fine-tuned, same seeds: {prompts}"
        save_picture(titled_rows(rows, 128, title), job.out / SHEET)
    return SamplesSummary.model_validate(figures)


def concept_share(pictures: list[np.ndarray], prompts: list[str]) -> float:
    """Share of uint8 pictures that show their prompt's colour (and the star, if the prompt names one)."""
    from deepfloyd_core.measures.drawn_world import shows

    return mean([float(shows(picture, prompt)) for picture, prompt in zip(pictures, prompts, strict=True)])


def control_error(settings: StageConfig, specs: list[SampleSpec], made: list[torch.Tensor]) -> float:
    """How far pictures (C, H, W) in [-1, 1] differ from their conditioning: mean |difference| of both conditionings.

    Not for pairs: the pair of a sample is not known.
    """
    kind = settings.controlnet_conditioning
    assert kind != "paired"
    pairs = [(conditioning_picture(kind, picture[None]), item.input_picture)
             for picture, item in zip(made, specs, strict=True)]  # fmt: skip
    return mean([float((own - hint).abs().mean()) for own, hint in pairs if hint is not None])


def _with_conditioning(
    rows: list[tuple[str, list[np.ndarray]]], specs: list[SampleSpec]
) -> list[tuple[str, list[np.ndarray]]]:
    """Rows for the sheet: the conditioning above the samples; below those made from text the pictures that the
    conditioning was computed from, or whose pair it is.
    """
    hints = [to_bytes(item.input_picture * 2 - 1)[0].numpy() for item in specs if item.input_picture is not None]
    truths = [item.truth for item in specs if item.truth is not None]
    return [("conditioning", hints), *rows[: len(VARIANTS)], ("truth", truths), *rows[len(VARIANTS) :]]


def sampler_settings(one: SampledStage, negative_prompt: str) -> Json:
    """A stage's sampler settings, as its PNGs record them."""
    own = one.settings
    settings: Json = {
        "stage": one.stage,
        "steps": own.validation_num_inference_steps,
        "scheduler": own.validation_noise_scheduler,
        "guidance": own.validation_guidance,
        "negative_prompt": negative_prompt,
    }
    if STAGES[one.stage].is_upscaler:
        settings |= {"noise_level": own.validation_noise_level, "back_projection": own.validation_back_projection}
    return settings


def save_png(picture: np.ndarray, sample: Sample, path: Path) -> None:
    """Write one sample durably, its settings as the PNG texts `deepfloyd` (JSON) and `parameters`, which many viewers show.
    The same sample gives the same bytes.
    """
    info = PngInfo()
    variant = {"variant": sample.variant} if sample.variant else {}
    record = {"prompt": sample.prompt, "seed": sample.seed, **variant, **sample.settings}
    info.add_itxt(RECORD, json.dumps(record, sort_keys=True, ensure_ascii=False))
    if "negative_prompt" in sample.settings:
        info.add_itxt("parameters", _parameters(picture, sample))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as tmp:
        Image.fromarray(picture).save(tmp, format="PNG", pnginfo=info)


def _parameters(picture: np.ndarray, sample: Sample) -> str:
    """The settings in the form that is customary in PNGs: the prompt, the negative prompt, then names and values."""
    settings, (height, width) = sample.settings, picture.shape[:2]
    scheduler: NoiseScheduler | None = settings.get("scheduler")
    told = {
        "Steps": settings.get("steps"), "Sampler": SCHEDULER_KINDS[scheduler].title if scheduler else None,
        "CFG scale": settings.get("guidance"), "Hires upscaler": settings.get("enlarged_by"), "Seed": sample.seed,
        "Size": f"{width}x{height}", "Model": settings.get("model"), "Version": sample.variant or None,
        "Noise level": settings.get("noise_level"), "Denoising strength": settings.get("strength"),
        "Style": settings.get("style"), "LoRA": " ".join(settings.get("loras", ())) or None,
    }  # fmt: skip
    values = ", ".join(f"{name}: {value}" for name, value in told.items() if value is not None)
    return "\n".join([sample.prompt, f"Negative prompt: {settings['negative_prompt']}", values])


class _Forgetting:
    """The probes of a run: drawn by the base, which is the first variant, and measured with both."""

    def __init__(self, request: SampleRequest) -> None:
        self._request, self._rows = request, list[ProbeLoss]()
        self._drawn: DrawnProbes | None = None

    def measure(self, by: Drawer, variant: str) -> None:
        probes = self._request.probes
        if not probes.prompts:
            return
        sampler = by.load()
        if self._drawn is None:
            self._drawn = DrawnProbes.of(sampler, probes, prompt_embeds(self._request, list(probes.prompts))[0])
        self._rows += self._drawn.losses(sampler, variant)

    def figures(self, out: Path) -> dict[str, float]:
        return write_probes(self._drawn, self._rows, out) if self._drawn else {}


def _begun(request: SampleRequest, first: SampledStage, variant: str, samples: int, parts: Parts) -> Sampled:
    """Begin the part of the samples from text, and of the probes, which the base draws."""
    drawn = len(request.probes.prompts) if variant == VARIANTS[0] else 0
    probes = " and probes" if drawn else ""
    return parts.begin(f"{STAGES[first.stage].title}'s samples{probes}, {variant}", samples + drawn)


def _measure_samples(
    upscaler: SampledStage, specs: list[SampleSpec], small: dict[str, list[torch.Tensor]],
    outputs: dict[tuple[str, int], list[torch.Tensor]],
) -> tuple[list[Row], UpscalingFigures]:  # fmt: skip
    """The measures of both variants of the upscaler on the tuned pictures, at every noise level: rows and their summary."""
    names = [f"{item.prompt}, seed {item.seed}, {item.size[0]}x{item.size[1]}" for item in specs]
    source = STAGES[upscaler.stage].upscales
    assert source is not None
    low = small["tuned"][: len(specs)]
    return measure_samples(source, names, low, outputs, upscaler.settings.measured_noise_levels)


def _save(
    job: Job[SampleRequest], one: SampledStage, variant: str, specs: list[SampleSpec], pictures: list[torch.Tensor]
) -> list[np.ndarray]:
    request = job.request
    settings = sampler_settings(one, request.validation.validation_negative_prompt)
    arrays = [to_bytes(picture[None])[0].numpy() for picture in pictures]
    for number, (item, array) in enumerate(zip(specs, arrays, strict=True)):
        path = job.out / STAGES[one.stage].table / f"{variant}-{number:03d}.png"
        save_png(array, Sample(item.prompt, item.seed, variant, settings), path)
    return arrays


def _measure_upscaler(
    job: Job[SampleRequest], one: SampledStage, table: list[Row], parts: Parts
) -> dict[str, UpscalingFigures]:
    """Measure untuned and tuned model on the held-out pictures, with interpolation. table: further rows of its file."""
    request, settings = job.request, one.settings
    files = shard_files(request.inputs.eval_set, one.stage)
    upscalers = {variant: partial(held_out_upscaler, job, one, variant, parts) for variant in VARIANTS}
    sampled_with = sampler_settings(one, request.validation.validation_negative_prompt)
    del sampled_with["noise_level"]  # a column of its own
    return measure_upscalers(
        files, upscalers, settings.measured_noise_levels, UpscalingFiles(one.stage, job.out), table, _looks(request),
        spoiler(one), canonical_json(sampled_with),
    )  # fmt: skip


def _looks(request: SampleRequest) -> list[MeasureFn]:
    """The networks for which the run file names weights, loaded."""
    device = pick_device(request.machine.device)
    return [network.load(path, device) for network, path in networks_of(request.validation)]

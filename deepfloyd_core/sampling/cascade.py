"""Cascade samples: base against fine-tuned, same prompts and seeds; and the upscaler measured on held-out pictures."""

import json
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stage_sampling import SCHEDULER_KINDS, NoiseScheduler
from deepfloyd_core.config.stages import STAGES
from deepfloyd_core.crops.rows import shard_files
from deepfloyd_core.crops.shards import ShardRow, read_rows
from deepfloyd_core.diffusion.conditioning import conditioning_picture
from deepfloyd_core.diffusion.degradations import spoilt
from deepfloyd_core.diffusion.loss import to_bytes
from deepfloyd_core.files import atomic_path, canonical_json
from deepfloyd_core.hashing import hash_seed
from deepfloyd_core.measures.figures import UpscalingFigures
from deepfloyd_core.measures.files import UpscalingFiles
from deepfloyd_core.measures.measure import MeasureFn
from deepfloyd_core.measures.pixel import mean
from deepfloyd_core.measures.registry import networks_of
from deepfloyd_core.measures.upscaling import Row, Upscaler, measure_samples, measure_upscalers
from deepfloyd_core.models.torch_device import pick_device
from deepfloyd_core.models.unet import use_threads
from deepfloyd_core.pictures.sheets import save_picture, titled_rows
from deepfloyd_core.processes.jobs import Job
from deepfloyd_core.sampling.drawn_picture import RECORD
from deepfloyd_core.sampling.forgetting import DrawnProbes, ProbeLoss, write_probes
from deepfloyd_core.sampling.jobs import SampledStage, SampleRequest, SamplesSummary
from deepfloyd_core.sampling.parts import Parts, Sampled
from deepfloyd_core.sampling.sampler import Sampler, make_sampler, sample
from deepfloyd_core.sampling.specs import SampleSpec, sample_specs
from deepfloyd_core.text.embeds import Embeds
from deepfloyd_core.types import Json

VARIANTS = ("base", "tuned")
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
    specs = [] if first is None else _specs(request, first)
    held_out = _held_out(request)
    parts = Parts(job.report, len(VARIANTS) * (bool(specs) + (upscaler is not None) * (bool(specs) + bool(held_out))))
    if first is not None and specs:
        forgotten = _Forgetting(request)
        for variant in VARIANTS:
            sampler = _sampler(request, first, variant, _begun(request, first, variant, len(specs), parts))
            small[variant] = _from_text(request, sampler, variant, specs)
            forgotten.measure(sampler, variant)
            del sampler  # and its model, before the next one is loaded
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
            large, table, figures["samples"] = _upscale_samples(request, upscaler, upscaled, small, parts)
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


def _specs(request: SampleRequest, first: SampledStage) -> list[SampleSpec]:
    """The samples from text."""
    inputs, validation = request.inputs, request.validation
    return sample_specs(
        first.stage, first.settings, validation, request.prompts, inputs.eval_set, inputs.eval_conditioning
    )


def prompt_embeds(request: SampleRequest, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Stored text embeds of prompts, and that of the negative prompt as often: each (B, T, D)."""
    embeds = Embeds(request.inputs.text_embeds)
    negative = embeds.of(request.validation.validation_negative_prompt)
    return torch.stack([embeds.of(prompt) for prompt in prompts]), torch.stack([negative] * len(prompts))


def _held_out(request: SampleRequest) -> int:
    """How many pictures the upscaler is measured on."""
    upscaler = request.cascade.upscaler
    if upscaler is None:
        return 0
    return sum(len(read_rows(file)) for file in shard_files(request.inputs.eval_set, upscaler.stage))


def _sampler(request: SampleRequest, one: SampledStage, variant: str, sampled: Sampled) -> Sampler:
    trained = request.inputs.loras[one.stage].path if variant == "tuned" else None
    return make_sampler(one, trained, request.machine, sampled)


class _Forgetting:
    """The probes of a run: drawn by the base, which is the first variant, and measured with both."""

    def __init__(self, request: SampleRequest) -> None:
        self._request, self._rows = request, list[ProbeLoss]()
        self._drawn: DrawnProbes | None = None

    def measure(self, sampler: Sampler, variant: str) -> None:
        probes = self._request.probes
        if not probes.prompts:
            return
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


def _from_text(request: SampleRequest, sampler: Sampler, variant: str, specs: list[SampleSpec]) -> list[torch.Tensor]:
    """Pictures (C, H, W), in their order."""
    made: list[torch.Tensor] = []
    for size, group in groupby(specs, key=lambda item: item.size):
        part = list(group)
        text, negative = prompt_embeds(request, [item.prompt for item in part])
        hints = [item.input_picture for item in part if item.input_picture is not None and variant == "tuned"]
        seeds, control = [item.seed for item in part], torch.cat(hints) if hints else None
        made += list(sample(sampler, text, negative, seeds, size, control))
    return made


def _upscale_samples(
    request: SampleRequest,
    upscaler: SampledStage,
    specs: list[SampleSpec],
    small: dict[str, list[torch.Tensor]],
    parts: Parts,
) -> tuple[dict[str, list[torch.Tensor]], list[Row], UpscalingFigures]:
    """The pictures from text, upscaled by each variant of the cascade; and the measures of both variants of the upscaler
    on the tuned pictures, at every noise level: rows and their summary.
    """
    levels = upscaler.settings.measured_noise_levels
    low = {variant: pictures[: len(specs)] for variant, pictures in small.items()}
    large, outputs = {}, {}
    for variant in VARIANTS:
        count = len(specs) * (len(levels) + (variant == "base"))  # base's samples by the base; tuned ones by both
        sampled = parts.begin(f"{STAGES[upscaler.stage].title}'s samples, {variant}", count)
        sampler = _sampler(request, upscaler, variant, sampled)
        for level in levels:
            outputs[variant, level] = _upscaled(request, sampler.at(level), specs, low["tuned"])
        large[variant] = (
            outputs["tuned", levels[0]] if variant == "tuned" else _upscaled(request, sampler, specs, low["base"])
        )
        del sampler  # and its model, before the next one is loaded
    names = [f"{item.prompt}, seed {item.seed}, {item.size[0]}x{item.size[1]}" for item in specs]
    source = STAGES[upscaler.stage].upscales
    assert source is not None
    return large, *measure_samples(source, names, low["tuned"], outputs, levels)


def _upscaled(
    request: SampleRequest, sampler: Sampler, specs: list[SampleSpec], small: list[torch.Tensor]
) -> list[torch.Tensor]:
    """small: low-res pictures (C, h, w). Returns them upscaled, (C, 4h, 4w)."""
    made: list[torch.Tensor] = []
    for size, group in groupby(zip(specs, small, strict=True), key=lambda pair: pair[0].size):
        part, pictures = zip(*group, strict=True)
        text, negative = prompt_embeds(request, [item.prompt for item in part])
        made += list(sample(sampler, text, negative, [item.seed for item in part], size, torch.stack(pictures)))
    return made


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

    def upscaler(variant: str) -> Upscaler:
        count = _held_out(request) * (len(settings.measured_noise_levels) + settings.degrades_low_res)
        sampled = parts.begin(f"held-out pictures upscaled, {variant}", count)
        sampler = _sampler(request, one, variant, sampled)

        def upscale(rows: list[ShardRow], small: torch.Tensor, noise_level: int) -> torch.Tensor:
            seeds = [hash_seed("eval", row.image_id) % 2**32 for row in rows]
            text, negative = prompt_embeds(request, [row.caption for row in rows])
            size = small.shape[3], small.shape[2]
            return sample(sampler.at(noise_level), text, negative, seeds, size, small)

        return upscale

    files = shard_files(request.inputs.eval_set, one.stage)
    upscalers = {variant: partial(upscaler, variant) for variant in VARIANTS}

    def spoil(rows: list[ShardRow], small: torch.Tensor) -> torch.Tensor:
        return spoilt(settings, [row.image_id for row in rows], small)

    sampled_with = sampler_settings(one, request.validation.validation_negative_prompt)
    del sampled_with["noise_level"]  # a column of its own
    return measure_upscalers(
        files, upscalers, settings.measured_noise_levels, UpscalingFiles(one.stage, job.out), table, _looks(request),
        spoil if settings.degrades_low_res else None, canonical_json(sampled_with),
    )  # fmt: skip


def _looks(request: SampleRequest) -> list[MeasureFn]:
    """The networks for which the run file names weights, loaded."""
    device = pick_device(request.machine.device)
    return [network.load(path, device) for network, path in networks_of(request.validation)]

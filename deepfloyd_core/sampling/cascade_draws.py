"""What the cascade samples draw: the variants of each stage, from text, from these samples, and from held-out pictures.

A picture is drawn in a batch of its stage. A part of the job draws some of the batches, and keeps them beside the artifact's
files; the job itself takes those that are there, and draws the others. The batches are the same for any number of parts, so
the bytes are.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from deepfloyd_core.config.stages import STAGES
from deepfloyd_core.crops.rows import shard_files
from deepfloyd_core.crops.shards import ShardRow, read_rows
from deepfloyd_core.diffusion.degradations import spoilt
from deepfloyd_core.hashing import digest, hash_seed
from deepfloyd_core.measures.upscaling import HELD_OUT, Upscaler, held_out_pictures
from deepfloyd_core.models.unet import use_threads
from deepfloyd_core.processes.jobs import Job
from deepfloyd_core.sampling.jobs import PartDrawn, SampledStage, SamplePartRequest, SamplesCascade
from deepfloyd_core.sampling.parts import Parts, Sampled
from deepfloyd_core.sampling.sampler import Sampler, make_sampler, sample
from deepfloyd_core.sampling.specs import SampleSpec, sample_specs
from deepfloyd_core.sampling.stored import DRAWN, store_tensor, stored_tensor
from deepfloyd_core.store.parts import part_is_whole
from deepfloyd_core.text.embeds import Embeds

VARIANTS = ("base", "tuned")
Batch = tuple[int, int]  # number of the group of pictures, all of one size, and the first one's number in it
_NOT_HERE = torch.empty(0)  # in place of a picture that another part draws
_Job = Job[SamplesCascade[Any]]


@dataclass(frozen=True)
class Drawer:
    """A variant of a stage that draws what is not there. `load` is called when the first batch is missing."""

    folder: Path
    name: str  # of stage and variant
    at_once: int  # pictures of a batch
    load: Callable[[], Sampler]
    sampled: Sampled
    own: Collection[Batch] | None  # the batches that a part draws and keeps; None: all, and none is kept

    def pictures(
        self, kind: str, group: int, count: int, draw: Callable[[Sampler, slice], torch.Tensor]
    ) -> list[torch.Tensor]:
        """Pictures (C, H, W) of a group, in their order. kind: what else tells them from others of the same name and
        group. draw: those of a slice.
        """
        made: list[torch.Tensor] = []
        for start in range(0, count, self.at_once):
            part = slice(start, min(start + self.at_once, count))
            file = self.folder / f"{self.name}-{kind}-{group}-{start}.safetensors"
            is_own = self.own is None or (group, start) in self.own
            if is_own and part_is_whole(file):
                made += list(stored_tensor(file))
                self.sampled(part.stop - start)
            elif is_own:
                drawn = draw(self.load(), part)
                if self.own is not None:
                    file.parent.mkdir(exist_ok=True)
                    store_tensor(drawn, file)
                made += list(drawn)
            else:
                made += [_NOT_HERE] * (part.stop - start)
        return made


def drawer(
    job: _Job, one: SampledStage, variant: str, sampled: Sampled, own: Collection[Batch] | None = None
) -> Drawer:
    """A variant of a stage of the job."""
    request = job.request
    trained = request.inputs.loras[one.stage].path if variant == "tuned" else None
    load = cache(partial(make_sampler, one, trained, request.machine, sampled, gpu=job.gpu))
    name = f"{STAGES[one.stage].table}-{variant}"
    return Drawer(job.out / DRAWN, name, one.settings.sampled_at_once, load, sampled, own)


def text_specs(request: SamplesCascade[Any]) -> list[SampleSpec]:
    """The samples from text."""
    first, inputs = request.cascade.text_to_image, request.inputs
    if first is None:
        return []
    return sample_specs(
        first.stage, first.settings, request.validation, request.prompts, inputs.eval_set, inputs.eval_conditioning
    )


def prompt_embeds(request: SamplesCascade[Any], prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Stored text embeds of prompts, and that of the negative prompt as often: each (B, T, D)."""
    embeds = Embeds(request.inputs.text_embeds)
    negative = embeds.of(request.validation.validation_negative_prompt)
    return torch.stack([embeds.of(prompt) for prompt in prompts]), torch.stack([negative] * len(prompts))


def from_text(
    request: SamplesCascade[Any], drawer: Drawer, variant: str, specs: list[SampleSpec]
) -> list[torch.Tensor]:
    """Pictures (C, H, W), in their order."""
    made: list[torch.Tensor] = []
    for number, group in enumerate(_groups(specs)):

        def draw(sampler: Sampler, part: slice, group: list[SampleSpec] = group) -> torch.Tensor:
            text, negative = prompt_embeds(request, [item.prompt for item in group[part]])
            hints = [item.input_picture for item in group[part] if item.input_picture is not None]
            control = torch.cat(hints) if hints and variant == "tuned" else None
            return sample(sampler, text, negative, [item.seed for item in group[part]], group[0].size, control)

        made += drawer.pictures("text", number, len(group), draw)
    return made


def upscaled_samples(
    job: _Job, upscaler: SampledStage, specs: list[SampleSpec], small: dict[str, list[torch.Tensor]], parts: Parts,
    own: Collection[Batch] | None = None,
) -> tuple[dict[str, list[torch.Tensor]], dict[tuple[str, int], list[torch.Tensor]]]:  # fmt: skip
    """The pictures from text, `small`, upscaled by each variant of the cascade; and the tuned ones upscaled by both variants
    of the upscaler, at every noise level.
    """
    request, levels = job.request, upscaler.settings.measured_noise_levels
    low = {variant: pictures[: len(specs)] for variant, pictures in small.items()}
    large, outputs = {}, {}
    pictures = len(specs) if own is None else _count(own, [len(group) for group in _groups(specs)], upscaler)
    for variant in VARIANTS:
        count = pictures * (len(levels) + (variant == "base"))  # base's samples by the base; tuned ones by both
        sampled = parts.begin(f"{STAGES[upscaler.stage].title}'s samples, {variant}", count)
        by = drawer(job, upscaler, variant, sampled, own)
        for level in levels:
            outputs[variant, level] = _upscaled(request, by, level, specs, ("tuned", low["tuned"]))
        if variant == "tuned":
            large[variant] = outputs["tuned", levels[0]]
        else:
            level = upscaler.settings.validation_noise_level
            large[variant] = _upscaled(request, by, level, specs, ("base", low["base"]))
        del by  # and its model, before the next one is loaded
    return large, outputs


def _upscaled(
    request: SamplesCascade[Any], drawer: Drawer, level: int, specs: list[SampleSpec],
    low: tuple[str, list[torch.Tensor]],
) -> list[torch.Tensor]:  # fmt: skip
    """low: the variant that drew low-res pictures, and these, (C, h, w). Returns them upscaled, (C, 4h, 4w)."""
    of, small = low
    made: list[torch.Tensor] = []
    for number, group in enumerate(_groups(specs)):
        own = small[len(made) : len(made) + len(group)]

        def draw(
            sampler: Sampler, part: slice, group: list[SampleSpec] = group, own: list[torch.Tensor] = own
        ) -> torch.Tensor:
            text, negative = prompt_embeds(request, [item.prompt for item in group[part]])
            seeds = [item.seed for item in group[part]]
            return sample(sampler.at(level), text, negative, seeds, group[0].size, torch.stack(own[part]))

        made += drawer.pictures(f"of-{of}-{level}", number, len(group), draw)
    return made


def held_out_count(request: SamplesCascade[Any]) -> int:
    """How many pictures the upscaler is measured on."""
    return sum(_held_out_groups(request))


def held_out_upscaler(
    job: _Job, one: SampledStage, variant: str, parts: Parts, own: Collection[Batch] | None = None
) -> Upscaler:
    """A variant of the upscaler, for held-out pictures."""
    request, settings, groups = job.request, one.settings, _held_out_groups(job.request)
    pictures = sum(groups) if own is None else _count(own, groups, one)
    count = pictures * (len(settings.measured_noise_levels) + settings.degrades_low_res)
    by = drawer(job, one, variant, parts.begin(f"held-out pictures upscaled, {variant}", count), own)
    sizes = [(rows[0].width, rows[0].height) for rows in map(read_rows, _held_out_files(request))]

    def upscale(rows: list[ShardRow], small: torch.Tensor, noise_level: int) -> torch.Tensor:
        def draw(sampler: Sampler, part: slice) -> torch.Tensor:
            seeds = [hash_seed("eval", row.image_id) % 2**32 for row in rows[part]]
            text, negative = prompt_embeds(request, [row.caption for row in rows[part]])
            size = small.shape[3], small.shape[2]
            return sample(sampler.at(noise_level), text, negative, seeds, size, small[part])

        # By their bytes: they are the downscales of held-out pictures, or these as they are spoilt.
        kind = f"held-out-{noise_level}-{digest(small.numpy().tobytes())}"
        group = sizes.index((rows[0].width, rows[0].height))
        made = by.pictures(kind, group, len(rows), draw)
        return torch.stack(made) if own is None else _NOT_HERE

    return upscale


def spoiler(one: SampledStage) -> Callable[[list[ShardRow], torch.Tensor], torch.Tensor] | None:
    """Degrades low-res pictures as in training; None: that does not."""
    if not one.settings.degrades_low_res:
        return None
    return lambda rows, small: spoilt(one.settings, [row.image_id for row in rows], small)


def sample_part(job: Job[SamplePartRequest]) -> PartDrawn:
    """Draw every nth batch of each stage, and what its pictures are drawn from, and nothing else, as one of n processes."""
    request, cascade = job.request, job.request.cascade
    use_threads(request.machine.num_threads)
    first, upscaler, specs = cascade.text_to_image, cascade.upscaler, text_specs(request)
    held_out = _held_out_groups(request)
    parts = Parts(job.report, len(VARIANTS) * (bool(specs) + (upscaler is not None) * (bool(specs) + bool(held_out))))
    upscaled = specs[: request.validation.num_upscaled_images]
    of_upscaler = _share(request, upscaler, [len(group) for group in _groups(upscaled)]) if upscaler else []
    small: dict[str, list[torch.Tensor]] = {}
    if first is not None and specs:
        groups = [len(group) for group in _groups(specs)]
        own = {*_share(request, first, groups), *(_around(of_upscaler, upscaler, first) if upscaler else ())}
        for variant in VARIANTS:
            sampled = parts.begin(f"{STAGES[first.stage].title}'s samples, {variant}", _count(own, groups, first))
            small[variant] = from_text(request, drawer(job, first, variant, sampled, own), variant, specs)
    if upscaler is None:
        return PartDrawn()
    if small:
        upscaled_samples(job, upscaler, upscaled, small, parts, of_upscaler)
    if held_out:
        _draw_held_out(job, upscaler, parts, _share(request, upscaler, held_out))
    return PartDrawn()


def _draw_held_out(job: Job[SamplePartRequest], upscaler: SampledStage, parts: Parts, own: list[Batch]) -> None:
    truth, small = held_out_pictures(_held_out_files(job.request), spoiler(upscaler))
    levels = upscaler.settings.measured_noise_levels
    for variant in VARIANTS:
        upscale = held_out_upscaler(job, upscaler, variant, parts, own)
        for kind, pictures in small.items():
            for level in levels if kind == HELD_OUT else levels[:1]:
                for (_, rows), part in zip(truth, pictures, strict=True):
                    upscale(rows, part, level)


def _share(request: SamplePartRequest, one: SampledStage, groups: list[int]) -> list[Batch]:
    """Every nth batch of a stage. groups: how many pictures each has."""
    at_once = one.settings.sampled_at_once
    batches = [(number, start) for number, count in enumerate(groups) for start in range(0, count, at_once)]
    return batches[request.number :: request.parts]


def _around(batches: Iterable[Batch], upscaler: SampledStage, first: SampledStage) -> set[Batch]:
    """The batches of the first stage that have the low-res pictures of an upscaler's."""
    small, large = first.settings.sampled_at_once, upscaler.settings.sampled_at_once
    return {(group, number // small * small) for group, start in batches for number in range(start, start + large)}


def _count(own: Collection[Batch], groups: list[int], one: SampledStage) -> int:
    """The pictures of some batches of a stage."""
    return sum(
        min(one.settings.sampled_at_once, groups[group] - start) for group, start in own if start < groups[group]
    )


def _groups(specs: list[SampleSpec]) -> list[list[SampleSpec]]:
    return [list(group) for _, group in groupby(specs, key=lambda item: item.size)]


def _held_out_files(request: SamplesCascade[Any]) -> list[Path]:
    upscaler = request.cascade.upscaler
    return [] if upscaler is None else shard_files(request.inputs.eval_set, upscaler.stage)


def _held_out_groups(request: SamplesCascade[Any]) -> list[int]:
    """How many held-out pictures each file has; all of one are of one size."""
    return [len(read_rows(file)) for file in _held_out_files(request)]

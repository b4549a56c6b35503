"""Checks the options of `generate` against a run, its versions and their models."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deepfloyd_core.config.run import Run
from deepfloyd_core.config.run_validation import MOST_PICTURES
from deepfloyd_core.config.stages import CONTROLLED, Stage
from deepfloyd_core.errors import ConfigError, DeepFloydError, attempt
from deepfloyd_core.preflight.unet_sizes import sample_size_faults

if TYPE_CHECKING:
    from deepfloyd_core.store.artifacts import Artifact

BASE = "base"  # in place of a version: the base models
SEEDS = 2**32  # as many as `validation_seed` can have


@dataclass(frozen=True)
class GenerateOptions:
    """The pictures that `generate` is asked for."""

    prompts: tuple[str, ...]
    version: str  # `latest`, a number, or BASE
    control: Path | None = None  # the conditioning picture of a ControlNet
    seed: int = 0  # of each prompt's first picture
    images: int = 1  # of each prompt


def version_bundle(run: Run, version: str) -> "Artifact | None":
    """The bundle of a version; None for the base models. Raises ConfigError or ArtifactError if it is not complete."""
    # Not above, as other imports here: a wrong key is answered without them.
    from deepfloyd_core.store.versions import bundle_of, find_version

    return None if version == BASE else bundle_of(run.workspace, find_version(run.workspace, version))


def prompt_faults(prompts: Sequence[str]) -> Iterator[str]:
    """Empty prompts, and prompts that would give the same pictures again."""
    if not prompts or not all(text.strip() for text in prompts):
        yield "The prompt is empty." if len(prompts) < 2 else "One of the prompts is empty."
    for text in dict.fromkeys(prompts):
        if text.strip() and prompts.count(text) > 1:
            yield f"The prompt {text!r} is given twice, which repeats its pictures. For more pictures raise images."


def _count_faults(options: GenerateOptions) -> Iterator[str]:
    """Invalid numbers of pictures, and seeds out of range."""
    if not 1 <= options.images <= MOST_PICTURES:
        yield f"images is {options.images}; from 1 to {MOST_PICTURES} pictures of each prompt can be drawn."
    if not 0 <= options.seed < SEEDS:
        yield f"seed is {options.seed}; it must be from 0 to {SEEDS - 1}."


def check_generate(run: Run, options: GenerateOptions, faults: list[DeepFloydError]) -> None:
    """All checks of the options that need no models."""
    faults += map(ConfigError, _count_faults(options))
    if run.config.text_to_image is None:
        faults.append(ConfigError("generate starts from Stage I: add a [stage1] table with a model_flavour."))
    size, *others = run.config.sample_sizes_px
    if others:
        prefix = f"validation_resolution is {run.config.validation_resolution!r}"
        faults.append(ConfigError(f"{prefix}; generate makes one size: give it with --size."))
    if options.control is not None:
        # Not above: it takes Pillow, which other options do not need.
        from deepfloyd_core.pictures.decode import read_fitted

        attempt(faults, read_fitted, options.control, size)
    found: list[DeepFloydError] = []
    bundle = attempt(found, version_bundle, run, options.version)
    faults += found or map(ConfigError, _control_faults(bundle, options))


def generate_model_faults(run: Run, options: GenerateOptions, stage: Stage, folder: Path) -> list[DeepFloydError]:
    """Why a stage's base model cannot be sampled: sizes, or a version that was trained on another base model."""
    from deepfloyd_core.sampling.identity import check_base

    faults: list[DeepFloydError] = [ConfigError(fault) for fault in sample_size_faults(run, stage, folder)]
    if bundle := attempt([], version_bundle, run, options.version):
        attempt(faults, check_base, bundle, stage, folder)
    return faults


def _control_faults(bundle: "Artifact | None", options: GenerateOptions) -> Iterator[str]:
    """A ControlNet without a conditioning picture, and a conditioning picture without a ControlNet."""
    from deepfloyd_core.adapters.files import CONTROL_FILE, product_name
    from deepfloyd_core.store.versions import stage_folder

    follows = bundle is not None and any(
        product_name(stage_folder(bundle.path, stage)) == CONTROL_FILE for stage in CONTROLLED
    )
    if follows and options.control is None:
        yield f"Version {options.version!r} is a ControlNet: give its conditioning picture with --control."
    if options.control is not None and not follows:
        yield f"Version {options.version!r} is no ControlNet and takes no conditioning picture. Remove --control."

"""Checks the options of `generate` against a run, its versions and their models."""

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deepfloyd_core.config.run import Run, RunConfig
from deepfloyd_core.config.stage3 import SOURCE, STAGE3, DrawnStage
from deepfloyd_core.config.stages import CONTROLLED, Stage
from deepfloyd_core.errors import ConfigError, DeepFloydError, attempt, raise_together
from deepfloyd_core.preflight.drawn_from import asked_lora_faults, asked_loras, asked_version, lora_faults, start_faults
from deepfloyd_core.preflight.unet_sizes import asked_size_faults
from deepfloyd_core.preflight.versions import base_faults, drawn_version, is_missing, names_a_folder

if TYPE_CHECKING:
    from deepfloyd_core.adapters.mixed import AskedLora
    from deepfloyd_core.sampling.drawn_picture import DrawnPicture
    from deepfloyd_core.sampling.pictures import Picture, PromptRow, Size
    from deepfloyd_core.store.artifacts import Artifact


@dataclass(frozen=True)
class GenerateOptions:
    """The pictures that `generate` is asked for."""

    prompts: tuple[str, ...] = ()
    version: str | None = None  # as of `drawn_version`; None: the one that serves, or with LoRAs the base models
    _: KW_ONLY
    compare: tuple[str, ...] = ()  # several, in place of `version`: they draw the same pictures
    seeds: str = "0"  # such as 0-7,42: of each prompt at each size
    sizes: str | None = None  # such as 64,96x64, of Stage I; None: the run's
    prompt_file: Path | None = None  # see `sampling.pictures`
    control: Path | None = None  # the conditioning picture of a ControlNet
    image: Path | None = None  # that they start from; None: from noise
    mask: Path | None = None  # white where the image is drawn anew; None: everywhere
    strength: float | None = None  # of the noise on the image, above 0, at most 1; None: `noise_strength`
    style: str | None = None  # a text whose style the image takes; without a prompt it is that too
    loras: tuple[str, ...] = ()  # such as version:3@0.7: all at once, in place of a version's
    stages: str | None = None  # `1`, `1-2` or `1-3`; None: those that the run trains
    again: "DrawnPicture | None" = None  # that is drawn again

    @property
    def by_lanczos(self) -> bool:
        """Whether the picture that is drawn again ended with Lanczos' filter, whatever the run file has now."""
        return self.again is not None and self.again.by_lanczos

    @property
    def versions(self) -> tuple[str, ...]:
        """Each of those that are asked for."""
        return self.compare or (asked_version(self.version, self.loras),)

    @property
    def asked_loras(self) -> "tuple[AskedLora, ...]":
        """The LoRAs. Raises ConfigError for one that cannot be understood."""
        return asked_loras(self.loras)

    @property
    def noise_strength(self) -> float:
        """The strength; unset as in diffusers' pipelines: 0.7 to vary a picture, 1 to draw a part of it anew; and as in IF's
        own library to give it another style.
        """
        if self.strength is not None:
            return self.strength
        return 0.5 if self.style is not None else 0.7 if self.mask is None else 1.0


def drawn_stages(config: RunConfig, stages: str | None) -> tuple[DrawnStage, ...]:
    """The stages that draw, in their order. stages: as of the options. Raises ConfigError for one that the run lacks."""
    if stages is None:
        return config.stages
    last = int(stages[-1])
    own: tuple[DrawnStage, ...] = tuple(stage for stage in config.stages if stage <= last)
    if own[-1:] != (min(last, SOURCE),):
        table = f"stage{min(last, SOURCE)}"
        raise ConfigError(f"--stages {stages} needs a [{table}] table with a model_flavour, and the run file has none.")
    return own if last != STAGE3 else (*own, STAGE3)


def trained_stages(config: RunConfig, stages: str | None) -> tuple[Stage, ...]:
    """Those of `drawn_stages` that the run trains; all of the run's for stages that cannot be drawn."""
    drawn = attempt([], drawn_stages, config, stages) or config.stages
    return tuple(stage for stage in config.stages if stage in drawn)


def pictures_of(run: Run, options: GenerateOptions) -> "tuple[Picture, ...]":
    """The pictures, in their order. Raises ConfigError for all options that cannot be understood, and for sizes that no
    picture can have.
    """
    from deepfloyd_core.sampling.pictures import grid, parse_seeds, parse_sizes

    faults: list[DeepFloydError] = []
    sizes = run.config.sample_sizes_px if options.sizes is None else attempt(faults, parse_sizes, options.sizes) or ()
    seeds = attempt(faults, parse_seeds, options.seeds) or ()
    rows = attempt(faults, prompt_rows, options) or []
    faults += _size_faults(run, rows, sizes)
    pictures = attempt(faults, grid, rows, seeds, sizes, run.config.validation_negative_prompt)
    raise_together(faults)
    return pictures or ()


def _size_faults(run: Run, rows: "list[PromptRow]", sizes: "tuple[Size, ...]") -> list[ConfigError]:
    """Sizes that no picture can have: of all prompts, and of single rows."""
    from deepfloyd_core.sampling.pictures import first_faults

    own = [(f"{row.where}: the", size) for row in rows for size in row.sizes or ()]
    common = [("The", size) for size in sizes if not all(row.sizes for row in rows)]
    return first_faults([
        ConfigError(f"{start} size is {size[0]}x{size[1]}; {fault}.")
        for start, size in (*common, *own) if (fault := run.config.size_fault(size))
    ])  # fmt: skip


def prompt_rows(options: GenerateOptions) -> "list[PromptRow]":
    """The prompts of the command line, then those of the file. Raises ConfigError."""
    from deepfloyd_core.sampling.pictures import PromptRow, read_prompts

    prompts = options.prompts or ((options.style,) if options.style and options.prompt_file is None else ())
    rows = [PromptRow(prompt=prompt) for prompt in prompts]
    return rows + (read_prompts(options.prompt_file) if options.prompt_file else [])


def prompt_faults(options: GenerateOptions) -> list[DeepFloydError]:
    """What can be said of the prompts, the seeds and the sizes without the run file."""
    from deepfloyd_core.sampling.pictures import parse_seeds, parse_sizes

    faults: list[DeepFloydError] = []
    if not all(text.strip() for text in options.prompts):
        faults.append(
            ConfigError("The prompt is empty." if len(options.prompts) < 2 else "One of the prompts is empty.")
        )
    elif not options.prompts and options.prompt_file is None and options.style is None:
        faults.append(ConfigError("There is no prompt: give --prompt TEXT, or --prompt-file FILE."))
    attempt(faults, prompt_rows, options)
    attempt(faults, parse_seeds, options.seeds)
    if options.sizes is not None:
        attempt(faults, parse_sizes, options.sizes)
    return [*faults, *version_faults(options), *asked_lora_faults(options.loras, options.version)]


def version_faults(options: GenerateOptions) -> list[DeepFloydError]:
    """What can be said of the versions without the workspace."""
    found = []
    if options.compare and (options.version is not None or options.loras):
        found.append("--compare names all that draws. Give neither --version nor --lora beside it.")
    if options.compare and (len(options.compare) < 2 or not all(options.compare)):
        found.append(f"--compare is {','.join(options.compare)!r}; give several, such as base,3,champion.")
    if "," in (options.version or "") and not names_a_folder(options.version):
        found.append(
            f"--version is {options.version!r}; it names one. To draw with several: --compare {options.version}."
        )
    return [ConfigError(fault) for fault in found]


def check_generate(run: Run, options: GenerateOptions, faults: list[DeepFloydError]) -> None:
    """All checks of the options that need no models, beside `prompt_faults`."""
    if run.config.text_to_image is None:
        faults.append(ConfigError("generate starts from Stage I: add a [stage1] table with a model_flavour."))
    attempt(faults, drawn_stages, run.config, options.stages)
    drawing = trained_stages(run.config, options.stages)
    pictures = None
    if run.config.text_to_image is not None:
        wrong: list[DeepFloydError] = []
        pictures = attempt(wrong, pictures_of, run, options)
        known = set(map(str, faults))  # as `prompt_faults` has told them
        faults += [fault for fault in wrong if str(fault) not in known]
    if options.control is not None:
        # Not above: it takes Pillow, which other options do not need.
        from deepfloyd_core.pictures.decode import read_fitted

        attempt(faults, read_fitted, options.control, pictures[0].size if pictures else (64, 64))
    small = [picture.size for picture in pictures or ()]
    faults += map(ConfigError, start_faults(run, options, drawing, small))
    for version in (one for one in options.versions if not is_missing(one)):
        found: list[DeepFloydError] = []
        drawn = attempt(found, drawn_version, run, version)
        faults += found or map(ConfigError, _control_faults(drawn.bundle if drawn else None, version, options))


def generate_model_faults(run: Run, options: GenerateOptions, stage: Stage, folder: Path) -> list[DeepFloydError]:
    """Why a stage's base model cannot be sampled: sizes, or a version that was trained on another base model."""
    faults: list[DeepFloydError] = []
    if pictures := attempt([], pictures_of, run, options):
        sizes = {picture.size for picture in pictures}
        faults += map(ConfigError, asked_size_faults(run, stage, folder, sizes))
    asked = attempt([], lambda: options.asked_loras) or ()
    versions = [*options.versions, *(one.version for one in asked if one.version)]
    drawing = trained_stages(run.config, options.stages)
    return [*faults, *lora_faults(run, asked, stage, folder, drawing), *base_faults(run, versions, stage, folder)]


def _control_faults(bundle: "Artifact | None", version: str, options: GenerateOptions) -> Iterator[str]:
    """A ControlNet without a conditioning picture, or with a style; and a conditioning picture without a ControlNet."""
    from deepfloyd_core.adapters.files import CONTROL_FILE, product_name
    from deepfloyd_core.store.versions import stage_folder

    follows = bundle is not None and any(
        product_name(stage_folder(bundle.path, stage)) == CONTROL_FILE for stage in CONTROLLED
    )
    if follows and options.style is not None:
        yield f"Version {version!r} is a ControlNet, which draws in no other style. Remove --style, or give --version base."
    elif follows and options.control is None:
        yield f"Version {version!r} is a ControlNet: give its conditioning picture with --control."
    if options.control is not None and not follows:
        yield f"Version {version!r} is no ControlNet and takes no conditioning picture. Remove --control."

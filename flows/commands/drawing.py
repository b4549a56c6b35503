"""The commands that use a version: `generate`, `upscale` and `export`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flows.commands.arguments import (
    Compared,
    ConfigPath,
    Control,
    FromPicture,
    Image,
    Loras,
    Mask,
    OneVersion,
    Overrides,
    PromptFile,
    Prompts,
    Seeds,
    Sizes,
    Stages,
    Strength,
    Style,
    here,
    user_path,
)
from flows.commands.session import err, load, out, session

if TYPE_CHECKING:
    from deepfloyd_core.processes.fork_server import ForkServer


@contextmanager
def _jobs_of(worker: "ForkServer") -> Iterator[None]:
    """The jobs of this block are those of a process that runs already."""
    from deepfloyd_core.processes.jobs import job_starter

    with job_starter(ahead=worker):
        yield


def _print_places(folder: Path, index: str, sheet: str | None = None) -> None:
    """Say where pictures, their index and their sheet are."""
    err.print(f"Pictures  {folder}")
    err.print(f"Index     {folder / index}")
    if sheet:
        err.print(f"Sheet     {folder / sheet}")


def generate(
    config: ConfigPath,
    prompt: Prompts = None,
    prompt_file: PromptFile = None,
    seeds: Seeds = "0",
    sizes: Sizes = None,
    version: OneVersion = None,
    compare: Compared = None,
    lora: Loras = None,
    control: Control = None,
    image: Image = None,
    mask: Mask = None,
    strength: Strength = None,
    style: Style = None,
    stages: Stages = None,
    from_picture: FromPicture = None,
    overrides: Overrides = None,
) -> None:
    """Draw pictures with a published version, or with the base models: each prompt at each size with each seed."""
    from deepfloyd_core.processes.ahead import DRAWING, worker_ahead

    with worker_ahead(DRAWING) as worker:  # imports torch while this process reads the run file, and imports Prefect
        from deepfloyd_core.preflight.drawn_again import recorded_options, with_recorded
        from deepfloyd_core.preflight.generate import GenerateOptions

        versions = tuple(one.strip() for one in compare.split(",")) if compare is not None else ()
        asked = GenerateOptions(
            tuple(prompt or ()), version, compare=versions, seeds=seeds, sizes=sizes, prompt_file=prompt_file,
            control=control, image=image, mask=mask, strength=strength, style=style, loras=here(lora), stages=stages,
        )  # fmt: skip
        options, recorded = recorded_options(asked, from_picture)
        loaded = load(config, with_recorded(recorded, overrides), options)
        files = {
            "prompt_file": prompt_file, "control": control, "image": image, "mask": mask, "from_picture": from_picture,
        }  # fmt: skip
        paths = {name: str(path.absolute()) for name, path in files.items() if path}
        with _jobs_of(worker), session(loaded, "flows.generate:generate") as call:
            artifacts = call(
                prompt=prompt, version=version, compare=list(versions) or None, lora=list(options.loras) or None,
                seeds=seeds, sizes=sizes, strength=strength, style=style, stages=stages, **paths,
            )  # fmt: skip
    from deepfloyd_core.sampling.pictures import INDEX, SHEET, drawn

    rows = [row for artifact in artifacts for row in drawn(artifact.path)]
    has_others = len({prompt for prompt, _ in rows}) > 1
    for text, file in rows:
        out.print(f"{file}  {' '.join(text.split())}" if has_others else str(file))
    for artifact in artifacts:
        _print_places(artifact.path, INDEX, SHEET)


def upscale(
    config: ConfigPath,
    pictures: Annotated[
        Path, typer.Argument(metavar="PICTURES", parser=user_path, help="A picture, or a folder of them.")
    ],
    prompt: Annotated[
        str,
        typer.Option(help="What they show, where no NAME.txt lies beside them; else what `generate` drew them with."),
    ] = "",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of each picture's noise.")] = 0,
    version: OneVersion = None,
    lora: Loras = None,
    stage: Annotated[int, typer.Option(min=2, max=3, help="2: Stage II. 3: the table stage3 of the run file.")] = 2,
    overrides: Overrides = None,
) -> None:
    """Make pictures of your own four times as wide and high, with a published version, the base model, or Stage III."""
    from deepfloyd_core.processes.ahead import DRAWING, worker_ahead

    with worker_ahead(DRAWING) as worker:
        from deepfloyd_core.preflight.upscale import UpscaleOptions

        options = UpscaleOptions(pictures, version, prompt, seed, here(lora), stage)
        loaded = load(config, overrides, options)
        with _jobs_of(worker), session(loaded, "flows.upscale:upscale") as call:
            artifact = call(
                pictures=str(pictures.absolute()), prompt=prompt, seed=seed, version=version,
                lora=list(options.loras) or None, stage=stage,
            )  # fmt: skip
    from deepfloyd_core.sampling.own_pictures import upscaled_files
    from deepfloyd_core.sampling.pictures import INDEX

    for file in upscaled_files(artifact.path):
        out.print(str(file))
    _print_places(artifact.path, INDEX)


def export(
    config: ConfigPath,
    version: Annotated[str, typer.Argument(metavar="VERSION", help="A number, or `champion`.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", parser=user_path, help="An empty folder, or a new one.")],
    form: Annotated[
        Literal["merged", "kohya"],
        typer.Option(help="merged: whole UNets, with what was trained in their weights; kohya: a file of each LoRA."),
    ] = "merged",
    bf16: Annotated[bool, typer.Option("--bf16", help="Weights in half the bytes, rounded.")] = False,
    overrides: Overrides = None,
) -> None:
    """Write a version's weights for other programs: as whole UNets that diffusers loads, or as kohya's LoRA files."""
    from deepfloyd_core.bundle.publish_files import need_empty
    from deepfloyd_core.models.folders import resolve
    from deepfloyd_core.preflight.load import load_run
    from deepfloyd_core.store.versions import bundle_of, find_version

    run = load_run(config, tuple(overrides or ()), data=False)

    need_empty(folder)
    bundle = bundle_of(run.workspace, find_version(run.workspace, version))
    bases = {stage: resolve(run.config.stage(stage).model, stage) for stage in run.config.stages}
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")  # they warn of parts that no LoRA here has
    from deepfloyd_core.bundle.export import export_version  # takes torch: a fault above is told without

    with err.status("exporting"):
        files = export_version(run, bundle, bases, form, folder, bf16)
    for file in files:
        out.print(str(file), soft_wrap=True)

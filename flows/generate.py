"""Generate pictures with a published version, or with the base models."""

from pathlib import Path

from prefect import flow

from deepfloyd_core.drawing.generated import listed_pictures
from deepfloyd_core.preflight.check import check_run
from deepfloyd_core.preflight.drawn_again import recorded_options, with_recorded
from deepfloyd_core.preflight.generate import GenerateOptions
from deepfloyd_core.preflight.versions import drawn_version
from deepfloyd_core.processes.ahead import DRAWING
from deepfloyd_core.processes.jobs import warm_job_starter
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.store.leases import leased
from flows.deployable import deployable
from flows.parameters import Compared, DrawnName, Loras, Overrides, Prompts, Seeds, Sizes, Stages, Strength, text_of
from flows.runs.run_lease import gpu_of, rename_run
from tasks import VERSION
from tasks.generated import compare_versions, generated


@flow(name="generate", version=VERSION)
@deployable
@leased
@warm_job_starter(DRAWING)
def generate(
    config: str, prompt: Prompts = None, prompt_file: str | None = None, seeds: Seeds = "0", sizes: Sizes = None,
    version: DrawnName | None = None, compare: Compared = None, lora: Loras = None, control: str | None = None,
    image: str | None = None, mask: str | None = None, strength: Strength = None, style: str | None = None,
    stages: Stages = None, from_picture: str | None = None, overrides: Overrides = None,
) -> list[Artifact]:  # fmt: skip
    """Draw pictures with a published version, or with the base models: each prompt at each size with each seed. Several
    versions draw the same ones, and are compared.

    Args:
        config: The run file, from the project's folder.
        prompt: What the pictures show; may be a list.
        prompt_file: More prompts: one a line, a JSON library, or a table of prompt, negative_prompt, seed, size.
        seeds: Seeds, such as 7 or 0-7,42.
        sizes: Stage I sizes, such as 64 or 64,96x64 (width x height); empty: those of the run file.
        version: A number, `champion` (or `latest`), `base` for no LoRA, a bundle's folder or its `owner/name` on the Hub.
            Empty: the champion, with `lora` the base.
        compare: Several of these, in place of `version`: they draw the same pictures, shown below each other.
        lora: LoRAs to draw with together on the base models, each as version:N, a file or a name of the Hub: version:3@0.7.
        control: A picture that they follow, with a version that is a ControlNet.
        image: A picture that all start from, in place of noise.
        mask: A picture of the image's size, white where the image is drawn anew; empty: everywhere.
        strength: Of the noise on the image, above 0, at most 1; empty: 0.7, with a mask 1, with a style 0.5.
        style: A text whose style the image takes, such as "an oil painting"; `prompt` says what it shows, unless empty.
        stages: The stages that draw; empty: those of the run file, I and II. 1-3 ends with its Stage III, or Lanczos.
        from_picture: A picture that was drawn before, to draw it again; its prompt, seed, size, version and settings are
            in it. Give its control, image and mask again.
        overrides: Keys of the run file, each as KEY=VALUE; KEY= removes one.
    """
    texts = (prompt,) if isinstance(prompt, str) else tuple(prompt or ())
    texts = () if style and texts == ("",) else texts
    table, hint, first, part, drawn_before = (
        Path(name) if name else None for name in (prompt_file, control, image, mask, from_picture)
    )
    asked = GenerateOptions(
        texts, text_of(version), compare=tuple(map(str, compare or ())), seeds=str(seeds), sizes=text_of(sizes),
        prompt_file=table, control=hint, image=first, mask=part, strength=strength, style=style or None,
        loras=tuple(lora or ()), stages=text_of(stages),
    )  # fmt: skip
    options, recorded = recorded_options(asked, drawn_before)
    # The command line has added those of the picture already.
    run = check_run(Path(config), tuple(with_recorded(recorded, overrides)), options)
    pictures = listed_pictures(run, options)
    rename_run(run.workspace)
    with gpu_of(run):
        versions = {found.name: found for found in (drawn_version(run, one) for one in options.versions)}
        drawn = {name: generated(run, pictures, version, options) for name, version in versions.items()}
    if len(drawn) > 1:
        compare_versions(run, pictures, drawn)
    return list(drawn.values())

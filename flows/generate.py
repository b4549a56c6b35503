"""Generate pictures with a published version, or with the base models."""

from pathlib import Path

from prefect import flow

from deepfloyd_core.preflight.check import check_run
from deepfloyd_core.preflight.generate import generate_options, pictures_of, version_number
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.store.leases import leased
from flows.deployable import deployable
from flows.parameters import Overrides, Prompts, Seeds, Sizes, VersionName
from flows.runs.run_lease import gpu_of, rename_run
from tasks import VERSION
from tasks.generated import compare_versions, generated


@flow(name="generate", version=VERSION)
@deployable
@leased
def generate(
    config: str, prompt: Prompts = None, prompt_file: str | None = None, seeds: Seeds = "0", sizes: Sizes = None,
    version: VersionName = "latest", control: str | None = None, from_picture: str | None = None,
    overrides: Overrides = None,
) -> list[Artifact]:  # fmt: skip
    """Draw pictures with a published version, or with the base models: each prompt at each size with each seed. Several
    versions draw the same ones, and are compared.

    Args:
        config: The run file, from the project's folder.
        prompt: What the pictures show; may be a list.
        prompt_file: A file with more prompts: one a line, a JSON library, or a table with the columns prompt,
            negative_prompt, seed, size.
        seeds: Seeds, such as 7 or 0-7,42.
        sizes: Stage I sizes, such as 64 or 64,96x64 (width x height); empty: those of the run file.
        version: A version number, `latest`, or `base` for no LoRA; several with commas, such as base,3,latest.
        control: A picture that they follow, with a version that is a ControlNet.
        from_picture: A picture that was drawn before, to draw it again; its prompt, seed, size, version and settings are
            in it.
        overrides: Keys of the run file, each as KEY=VALUE; KEY= removes one.
    """
    texts = (prompt,) if isinstance(prompt, str) else tuple(prompt or ())
    files = (Path(name) if name else None for name in (prompt_file, control, from_picture))
    options, recorded = generate_options(texts, seeds, sizes, str(version), *files)
    changed = dict.fromkeys((*recorded, *(overrides or ())))  # the command line has added those of the picture already
    run = check_run(Path(config), tuple(changed), options)
    pictures = pictures_of(run, options)
    rename_run(run.workspace)
    with gpu_of(run):
        drawn = {
            version: generated(run, pictures, version, options.control, options.again)
            for version in dict.fromkeys(version_number(run, one) for one in options.versions)
        }
    if len(drawn) > 1:
        compare_versions(run, pictures, drawn)
    return list(drawn.values())

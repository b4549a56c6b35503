"""Generate pictures with a published version, or with the base models."""

from pathlib import Path

from prefect import flow

from deepfloyd_core.preflight.check import check_run
from deepfloyd_core.preflight.generate import GenerateOptions
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.store.leases import leased
from flows.deployable import deployable
from flows.parameters import Overrides, Pictures, Prompts, Seed, Size, VersionName
from flows.runs.run_lease import gpu_of, rename_run
from tasks import VERSION
from tasks.generated import generated


@flow(name="generate", version=VERSION)
@deployable
@leased
def generate(
    config: str, prompt: Prompts, seed: Seed = 0, images: Pictures = 1, version: VersionName = "latest",
    size: Size = None, control: str | None = None, overrides: Overrides = None,
) -> Artifact:  # fmt: skip
    """Draw pictures with a published version, or with the base models.

    Args:
        config: The run file, from the project's folder.
        prompt: What the pictures show; a list draws `images` of each.
        seed: Seed of a prompt's first picture; the next ones count up.
        images: How many pictures of each prompt.
        version: A version number, `latest`, or `base` for no LoRA.
        size: Stage I size, e.g. 64 or 96x64 (width x height); empty: the run file's.
        control: A picture that they follow, with a version that is a ControlNet.
        overrides: Keys of the run file, each as KEY=VALUE; KEY= removes one.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    sized = (f'validation_resolution="{size}"',) if size else ()
    options = GenerateOptions(tuple(prompts), str(version), Path(control) if control else None, seed, images)
    run = check_run(Path(config), (*(overrides or ()), *sized), options)
    pictures = [(text, seed + number) for text in prompts for number in range(images)]
    rename_run(run.workspace)
    with gpu_of(run):
        return generated(run, pictures, options.version, options.control)

"""Generate pictures with a published version, or with the base models."""

from pathlib import Path

from prefect import flow

from deepfloyd_core.preflight.check import check_run
from deepfloyd_core.preflight.generate import GenerateOptions
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.store.leases import leased
from flows.deployable import deployable
from tasks import VERSION
from tasks.generated import generated


@flow(name="generate", version=VERSION)
@deployable
@leased
def generate(
    config: str, prompt: str | list[str], seed: int = 0, images: int = 1, version: str | int = "latest",
    size: str | None = None, control: str | None = None, overrides: list[str] | None = None,
) -> Artifact:  # fmt: skip
    """Sample `images` pictures of each prompt, with seeds counting up from `seed`; size is Stage I's, e.g. 96x64.

    control: a picture that they follow, with a version that is a ControlNet.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    sized = (f'validation_resolution="{size}"',) if size else ()
    options = GenerateOptions(tuple(prompts), str(version), Path(control) if control else None, seed, images)
    run = check_run(Path(config), (*(overrides or ()), *sized), options)
    pictures = [(text, seed + number) for text in prompts for number in range(images)]
    return generated(run, pictures, options.version, options.control)

"""Generate pictures with a published version, or with the base models."""

from pathlib import Path

from prefect import flow

from deepfloyd_core.artifacts import Artifact
from deepfloyd_core.config import load_run
from deepfloyd_core.errors import ConfigError
from tasks.generated import generated
from tasks.outbox import server_awaited


@flow(name="generate")
@server_awaited
def generate(
    config: str, prompt: str, seed: int = 0, images: int = 1, version: str = "latest", size: str | None = None,
    control: str | None = None, overrides: list[str] | None = None,
) -> Artifact:  # fmt: skip
    """Sample `images` pictures of a prompt, with seeds counting up from `seed`; size is Stage I's, e.g. 96x64.

    control: a picture that they follow, with a version that is a ControlNet.
    """
    if not prompt.strip():
        raise ConfigError("The prompt is empty.")
    sized = (f'validation_resolution="{size}"',) if size else ()
    run = load_run(Path(config), (*(overrides or ()), *sized))
    return generated(
        run, [(prompt, seed + number) for number in range(images)], version, Path(control) if control else None
    )

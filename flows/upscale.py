"""Upscale pictures of one's own with a published version, with the base model, or with Stage III."""

from pathlib import Path
from typing import Literal

from prefect import flow

from deepfloyd_core.preflight.check import check_run
from deepfloyd_core.preflight.upscale import UpscaleOptions, upscaled_by
from deepfloyd_core.processes.ahead import DRAWING
from deepfloyd_core.processes.jobs import warm_job_starter
from deepfloyd_core.sampling.own_pictures import own_pictures
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.store.leases import leased
from flows.deployable import deployable
from flows.parameters import DrawnName, Loras, Overrides, Seed, text_of
from flows.runs.run_lease import gpu_of, rename_run
from tasks import VERSION
from tasks.upscaled import upscaled


@flow(name="upscale", version=VERSION)
@deployable
@leased
@warm_job_starter(DRAWING)
def upscale(
    config: str, pictures: str, prompt: str = "", seed: Seed = 0, version: DrawnName | None = None, lora: Loras = None,
    stage: Literal[2, 3] = 2, overrides: Overrides = None,
) -> Artifact:  # fmt: skip
    """Make pictures of one's own four times as wide and high, with a published version, the base model, or Stage III.

    Args:
        config: The run file, from the project's folder.
        pictures: A picture, or a folder of pictures, from the project's folder.
        prompt: What the pictures show, where no caption in NAME.txt lies beside them; empty: what `generate` drew them with.
        seed: Seed of each picture's noise.
        version: A version number, `champion` or `latest` for the one that serves, `base` for no LoRA, a bundle's folder,
            or `owner/name` of the Hub. Empty: the champion, with `lora` the base.
        lora: LoRAs to upscale with on the base model, each as version:N, a file or a name of the Hub: version:3@0.7.
        stage: Stage II, or the Stage III of the run file, which makes 1,024 px of 256 px and has no versions.
        overrides: Keys of the run file, each as KEY=VALUE; KEY= removes one.
    """
    options = UpscaleOptions(Path(pictures), text_of(version), prompt, seed, tuple(lora or ()), stage)
    run = check_run(Path(config), tuple(overrides or ()), options)
    rename_run(run.workspace)
    with gpu_of(run):
        return upscaled(run, own_pictures(options.pictures, prompt), upscaled_by(run, options), options)

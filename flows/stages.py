"""One flow for each stage of the pipeline, to run or schedule a stage alone."""

from pathlib import Path

from prefect import flow

from deepfloyd_core.bundle.planned import sample_prompts
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.preflight.check import check_run, trained_with
from deepfloyd_core.processes.jobs import job_starter
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.store.leases import leased
from flows.dag import make_pictures, make_trainings, mended
from flows.deployable import deployable
from flows.parameters import Overrides
from flows.runs.run_lease import sole_run
from tasks import VERSION
from tasks.fitting import fitted
from tasks.image_index import image_index
from tasks.text_embeds import text_embeds


@flow(name="prepare", version=VERSION)
@deployable
@leased
def prepare(config: str, overrides: Overrides = None) -> list[Artifact]:
    """Index the pictures and cut the crops of every stage, the eval set, and what a ControlNet follows for both.

    Args:
        config: The run file, from the project's folder.
        overrides: Keys of the run file, each as KEY=VALUE; KEY= removes one.
    """
    run = check_run(Path(config), tuple(overrides or ()), "crops")
    with sole_run(run):
        return mended(make_pictures)(run, image_index(run), run.config.stages).artifacts


@flow(name="embed", version=VERSION)
@deployable
@leased
def embed(config: str, overrides: Overrides = None) -> list[Artifact]:
    """Encode every caption and prompt.

    Args:
        config: The run file, from the project's folder.
        overrides: Keys of the run file, each as KEY=VALUE; KEY= removes one.
    """
    run = check_run(Path(config), tuple(overrides or ()), "text_embeds")
    with sole_run(run):
        index = image_index(run)
        return [index, mended(text_embeds)(fitted(run, index), index)]


@flow(name="train-stage1", version=VERSION)
@deployable
@leased
def train_stage1(config: str, overrides: Overrides = None) -> list[Artifact]:
    """Train the Stage I LoRA, and make what it needs.

    Args:
        config: The run file, from the project's folder.
        overrides: Keys of the run file, each as KEY=VALUE; KEY= removes one.
    """
    return _train(check_run(Path(config), tuple(overrides or ()), 1), 1)


@flow(name="train-stage2", version=VERSION)
@deployable
@leased
def train_stage2(config: str, overrides: Overrides = None) -> list[Artifact]:
    """Train the Stage II LoRA, and make what it needs: Stage I's as well, where that makes low-res pictures for it.

    Args:
        config: The run file, from the project's folder.
        overrides: Keys of the run file, each as KEY=VALUE; KEY= removes one.
    """
    return _train(check_run(Path(config), tuple(overrides or ()), 2), 2)


@job_starter()
def _train(run: Run, stage: Stage) -> list[Artifact]:
    with sole_run(run):
        index = image_index(run)
        return _trained(fitted(run, index), index, stage)


@mended
def _trained(run: Run, index: Artifact, stage: Stage) -> list[Artifact]:
    """Everything after the index."""
    pictures = make_pictures(run, index, trained_with(run.config, stage))
    embeds = text_embeds(run, index)
    trainings = make_trainings(run, pictures, embeds, sample_prompts(run, index))
    trained = [artifact for training in trainings.values() for artifact in training.artifacts]
    return list(dict.fromkeys([*pictures.artifacts, embeds, *trained]))  # the text can be the embeds themselves

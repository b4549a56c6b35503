"""The main flow: from a folder of captioned pictures to a published bundle. Each line makes one artifact."""

from pathlib import Path

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed

from deepfloyd_core.bundle.identity import BundleInputs
from deepfloyd_core.bundle.planned import FROM_BASE, Starts, sample_prompts
from deepfloyd_core.config.run import Run
from deepfloyd_core.preflight.check import check_run
from deepfloyd_core.processes.jobs import job_starter
from deepfloyd_core.sampling.jobs import SampleInputs, lora_fields
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.store.leases import leased
from deepfloyd_core.store.registry import Outcome, news_of
from flows.dag import make_pictures, make_trainings, mended
from flows.deployable import deployable
from flows.parameters import Overrides, Steps, settings
from flows.runs.run_lease import rename_run, sole_run
from tasks import VERSION
from tasks.cascade_samples import cascade_samples
from tasks.events import versions_told
from tasks.fitting import fitted
from tasks.image_index import image_index
from tasks.lora_bundle import lora_bundle, publish_version
from tasks.text_embeds import text_embeds


@flow(name="finetune", version=VERSION)
@deployable
@leased
def finetune(
    config: str, stage1_steps: Steps = None, stage2_steps: Steps = None, overrides: Overrides = None
) -> "State[Outcome]":
    """Fine-tune the stages that a run file names and publish the result as a new version, unless its bundle is the
    champion's or was blocked.

    Args:
        config: The run file, from the project's folder.
        stage1_steps: Steps of Stage I's training, in place of the run file's.
        stage2_steps: Steps of Stage II's training, in place of the run file's.
        overrides: Further keys of the run file, each as KEY=VALUE; KEY= removes one.
    """
    changed = settings(overrides, stage1__max_train_steps=stage1_steps, stage2__max_train_steps=stage2_steps)
    run = check_run(Path(config), changed, "lora_bundle")
    with sole_run(run), versions_told(run.workspace):
        outcome = make_bundle(run, image_index(run, plans=True))
        rename_run(run.workspace, outcome.version.number)
        return ended(run, outcome)


def ended(run: Run, outcome: Outcome) -> "State[Outcome]":
    """The end of a run: `Blocked` and `Candidate` say at a glance that its version does not serve."""
    names = {"blocked": "Blocked", "candidate": "Candidate"} if outcome.is_new else {}
    return Completed(name=names.get(outcome.state), message=news_of(run.workspace, outcome), data=outcome)


def make_bundle(run: Run, index: Artifact, starts: Starts = FROM_BASE, start: str = "") -> Outcome:
    """Everything after the index, and its publication. start: the starts in words."""
    return publish_version(run, unpublished_bundle(run, index, starts), index, start)


@job_starter()
@mended
def unpublished_bundle(run: Run, index: Artifact, starts: Starts = FROM_BASE) -> Artifact:
    """Everything after the index; what is already there is reused. Pictures come first: T5 takes long, and they may fail."""
    run = fitted(run, index)
    pictures = make_pictures(run, index, run.config.stages)
    embeds = text_embeds(run, index)
    prompts = sample_prompts(run, index)
    trainings = make_trainings(run, pictures, embeds, prompts, starts)
    loras = {stage: training.lora for stage, training in trainings.items()}
    sampled_from = SampleInputs(
        text_embeds=embeds, eval_set=pictures.eval_set, conditioning=pictures.conditioning,
        eval_conditioning=pictures.eval_conditioning, **lora_fields(loras),
    )  # fmt: skip
    samples = cascade_samples(run, prompts, sampled_from)
    bundled = BundleInputs(image_index=index, cascade_samples=samples, **lora_fields(loras))
    return lora_bundle(run, prompts, bundled)

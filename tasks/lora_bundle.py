"""The bundle of a run, and its version."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from deepfloyd_core.bundle.build import build_bundle
from deepfloyd_core.bundle.gate import gate_of
from deepfloyd_core.bundle.identity import BundleInputs, bundle_request
from deepfloyd_core.bundle.recipe import recipe_of
from deepfloyd_core.config.run import Run
from deepfloyd_core.store.artifacts import Artifact, materialise
from deepfloyd_core.store.registry import Outcome, publish
from deepfloyd_core.store.versions import Origin
from tasks.version_page import show_version


@task(name="lora_bundle", cache_policy=NO_CACHE)
def lora_bundle(run: Run, prompts: list[str], inputs: BundleInputs[Artifact]) -> Artifact:
    """What is published of a run. prompts: those of its samples."""
    return materialise(run.workspace, bundle_request(inputs), lambda work: build_bundle(run, inputs, prompts, work))


@task(name="publish_version", cache_policy=NO_CACHE)
def publish_version(run: Run, bundle: Artifact, index: Artifact, start: str = "") -> Outcome:
    """The bundle's version, a new one unless the bundle is the champion's or was blocked; its report and its page.

    start: see `Origin`.
    """
    origin, waits = Origin(run.file, recipe_of(run, bundle), start), run.config.gate == "manual"
    outcome = publish(run.workspace, bundle, index, origin, gate_of(run), waits)
    show_version(run.workspace, outcome)
    return outcome

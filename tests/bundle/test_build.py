"""The bundle: it takes over what was trained to the byte, and nothing that was damaged since."""

from dataclasses import replace

import pytest
from bundle_parts import INDEX, SCHEDULER, TRAINING, make
from data_world import DataWorld

from deepfloyd_core.adapters.files import LORA_FILE
from deepfloyd_core.bundle.build import build_bundle
from deepfloyd_core.bundle.identity import BundleInputs, bundle_request
from deepfloyd_core.config.run import Run
from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.sampling.jobs import SamplesSummary
from deepfloyd_core.store.artifacts import Artifact, materialise, verify_artifact
from deepfloyd_core.store.versions import stage_folder


@pytest.fixture
def inputs(world: DataWorld) -> BundleInputs[Artifact]:
    """What a bundle of Stage I is put together from, without the training."""
    run = world.load(stages=(1,))
    trained = {LORA_FILE: b"weights" * 99, SCHEDULER: b"{}", "loss.png": b"a sheet of the training"}
    return BundleInputs(
        image_index=make(run, "image_index", {}, INDEX, data="1" * 16),
        stage1_lora=make(run, "stage1_lora", trained, TRAINING, model="2" * 16),
        cascade_samples=make(run, "cascade_samples", {"sheet.png": b"samples", "eval.parquet": b""}, SamplesSummary()),
    )


def bundle(run: Run, inputs: BundleInputs[Artifact]) -> Artifact:
    return materialise(run.workspace, bundle_request(inputs), lambda work: build_bundle(run, inputs, ["a"], work))


def test_a_bundle_has_the_bytes_of_what_was_made(world: DataWorld, inputs: BundleInputs[Artifact]) -> None:
    made = bundle(world.load(stages=(1,)), inputs)
    stage1 = stage_folder(made.path, 1)
    for name in (LORA_FILE, SCHEDULER):
        assert (stage1 / name).read_bytes() == (inputs.loras[1].path / name).read_bytes()
    assert (made.path / "sheet.png").read_bytes() == b"samples"
    files = {"README.md", "metrics.json", "sheet.png", f"stage1/{LORA_FILE}", f"stage1/{SCHEDULER}"}
    assert made.hashes.keys() == files and verify_artifact(made) == []


@pytest.mark.parametrize(
    ("kind", "name"), [("stage1_lora", LORA_FILE), ("stage1_lora", SCHEDULER), ("cascade_samples", "sheet.png")]
)
def test_what_was_damaged_is_named_and_gets_into_no_bundle(
    world: DataWorld, inputs: BundleInputs[Artifact], kind: str, name: str
) -> None:
    file = inputs.by_field[kind].path / name
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"!")  # of the same size
    run = world.load(stages=(1,))
    with pytest.raises(
        ArtifactError,
        match=f"{inputs.by_field[kind].path}/{name} has other bytes than its manifest says. Move its artifact out",
    ):
        bundle(run, inputs)
    file.write_bytes(whole)
    assert verify_artifact(bundle(run, inputs)) == []


def test_a_bundle_that_was_begun_takes_what_was_trained_anew(world: DataWorld, inputs: BundleInputs[Artifact]) -> None:
    """The machine that trains again may round otherwise: the weights are those that the figures are of."""
    run, lora, sheet = world.load(stages=(1,)), inputs.loras[1], inputs.cascade_samples.path / "sheet.png"
    sheet.rename(sheet.with_suffix(".away"))
    sheet.write_bytes(b"damaged")
    with pytest.raises(ArtifactError):
        bundle(run, inputs)
    (begun,) = (run.workspace / "lora_bundle").glob("*/stage1")
    assert not (begun / LORA_FILE).samefile(lora.path / LORA_FILE), "a release shares no bytes with its training"
    lora.path.rename(f"{lora.path}-before")
    trained = {LORA_FILE: b"otherwise" * 77, SCHEDULER: b"{}"}
    again = make(run, "stage1_lora", trained, TRAINING, model="2" * 16)
    sheet.with_suffix(".away").rename(sheet)
    made = bundle(run, replace(inputs, stage1_lora=again))
    assert (begun / LORA_FILE).read_bytes() == trained[LORA_FILE] and verify_artifact(made) == []

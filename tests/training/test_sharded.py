"""A UNet that is trained whole is spread over the ranks: the same training, of which each holds its part."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_world import DataWorld
from ranked import Killer, small, train, with_stage
from safetensors.torch import load_file
from training_parts import FOLDERS, newest_checkpoint

from deepfloyd_core.adapters.files import UNET_FOLDER
from deepfloyd_core.errors import JobError
from deepfloyd_core.models.headers import UNET_WEIGHTS
from deepfloyd_core.processes.jobs import job_starter
from deepfloyd_core.store.artifacts import Artifact

FULL: dict[str, Any] = {
    "model_type": "full", "gradient_accumulation_steps": 2, "use_ema": True, "learning_rate": 1e-4, "snr_gamma": 5.0,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_starter() -> Iterator[None]:
    """The processes of all trainings here are forks of one."""
    with job_starter():
        yield


def unet_of(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_file(folder / UNET_FOLDER / UNET_WEIGHTS)
    return weights


def apart(one: Artifact, other: Artifact) -> float:
    """How far two trained UNets are apart, as a share of how far the first one is from the base."""
    base, first, second = unet_of(FOLDERS[1]), unet_of(one.path), unet_of(other.path)
    assert base.keys() == first.keys() == second.keys()

    def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        return float(np.sqrt(sum(float((a[name].double() - b[name].double()).square().sum()) for name in a)))

    return distance(first, second) / distance(first, base)


@pytest.mark.slow
def test_it_ends_near_one_process_and_is_the_same_when_repeated_stopped_and_gone_on_with(
    world: DataWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also after kills of a rank, and with one process for the rest: a checkpoint has the whole tensors."""
    run, made = small(world, 1, **FULL, max_train_steps=6)
    one, two = train(run, made, 1, tmp_path / "one", 1), train(run, made, 1, tmp_path / "two", 2)
    assert two.fingerprint == one.fingerprint and 0 < apart(one, two) < 5e-4
    with Killer(tmp_path / "once", rank=1, times=1):
        once = train(run, made, 1, tmp_path / "once", 2)
    assert once.hashes == two.hashes and "it is tried once more" in caplog.text
    with Killer(tmp_path / "twice", rank=0, times=2), pytest.raises(JobError, match="was killed by SIGKILL, twice"):
        train(run, made, 1, tmp_path / "twice", 2)
    done = newest_checkpoint(tmp_path / "twice")
    alone = train(run, made, 1, tmp_path / "twice", 1)
    assert alone.manifest.summary["steps_of_this_process"] == 6 - done and apart(one, alone) < 5e-4


@pytest.mark.slow
def test_ranks_that_have_less_to_compute_make_the_same_passes(world: DataWorld, tmp_path: Path) -> None:
    """Batches of three cut for three ranks, of which short ones have fewer samples than there are ranks; own errors, which
    take a pass more in some batches.
    """
    keys = {**FULL, "gradient_accumulation_steps": 1, "train_batch_size": 3, "max_train_steps": 4,
            "scheduled_sampling_max_step_offset": 400, "scheduled_sampling_probability": 0.3}  # fmt: skip
    run, made = small(world, 1, **keys)
    one = train(with_stage(run, micro_batch_size=1), made, 1, tmp_path / "one", 1)
    three = train(run, made, 1, tmp_path / "three", 3)
    assert 0 < apart(one, three) < 5e-4

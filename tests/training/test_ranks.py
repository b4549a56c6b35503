"""Several processes that share the steps of a training end with what one process makes."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from data_world import DataWorld
from ranked import Killer, small, train, with_ranks, with_stage
from training_parts import difference, newest_checkpoint, weights

from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.errors import ConfigError, JobError
from deepfloyd_core.processes.jobs import job_starter
from deepfloyd_core.training.ranks import joined
from deepfloyd_core.training.turns import turns_of

LORA = {"lora_rank": 4}
WHOLE = {"model_type": "full", "train_batch_size": 4}
TWO: dict[str, tuple[Stage, dict[str, Any]]] = {
    "LoRA with dropout, moving average": (1, {
        **LORA, "lora_dropout": 0.1, "use_ema": True, "snr_gamma": 5.0, "random_flip": True,
    }),
    "DoRA, own errors": (1, {
        **LORA, "use_dora": True, "scheduled_sampling_max_step_offset": 400, "scheduled_sampling_probability": 0.5,
        "snr_gamma": 5.0,
    }),
    "BitFit": (1, {"use_bitfit": True, "train_variance": True}),
    "windows of Stage II": (2, {
        **LORA, "stage2_patch": 64, "low_res_blur": 0.5, "max_train_steps": 2, "validation_step_interval": 0,
    }),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_starter() -> Iterator[None]:
    """The processes of all trainings here are forks of one."""
    with job_starter():
        yield


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO)
def test_two_processes_that_share_two_batches_end_with_the_bytes_of_one(
    world: DataWorld, tmp_path: Path, name: str
) -> None:
    """Weights, metrics, held-out losses, pictures of validations: every published file."""
    stage, keys = TWO[name]
    run, made = small(world, stage, gradient_accumulation_steps=2, **keys)
    one = train(run, made, stage, tmp_path / "one", 1)
    two = train(run, made, stage, tmp_path / "two", 2)
    assert two.hashes == one.hashes and two.fingerprint == one.fingerprint
    assert "ranks" not in one.manifest.summary and two.manifest.summary["ranks"] == {"0": 2}
    assert [file for file in two.path.rglob("*") if file.name.startswith(".")] == []


@pytest.mark.slow
def test_processes_that_share_each_batch_end_with_the_bytes_of_one_that_computes_the_same_parts(
    world: DataWorld, tmp_path: Path
) -> None:
    """Batches of five in parts of two, two and one; of the short ones a process may have none."""
    run, made = small(world, 1, **LORA, train_batch_size=3, snr_gamma=5.0)
    parts = with_stage(run, micro_batch_size=1)
    one = train(parts, made, 1, tmp_path / "one", 1)
    ordered = train(with_ranks(run, exact_ranks=True), made, 1, tmp_path / "ordered", 3)
    three = train(run, made, 1, tmp_path / "three", 3)
    assert ordered.hashes == one.hashes
    assert difference(weights(one), weights(three)) < 1e-5


@pytest.mark.slow
def test_more_than_two_processes_end_near_one_and_in_order_with_its_bytes(world: DataWorld, tmp_path: Path) -> None:
    run, made = small(world, 1, **LORA, gradient_accumulation_steps=6, max_train_steps=3, use_ema=True)
    one = train(run, made, 1, tmp_path / "one", 1)
    ordered = train(with_ranks(run, exact_ranks=True), made, 1, tmp_path / "ordered", 3)
    three = train(run, made, 1, tmp_path / "three", 3)
    assert ordered.hashes == one.hashes
    assert 0 < difference(weights(one), weights(three)) < 1e-5


@pytest.mark.slow
def test_a_killed_rank_costs_no_byte(world: DataWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One of two is killed: both begin again by themselves at the checkpoint. Killed twice, the error names it, and the
    next run goes on, also with one process.
    """
    run, made = small(world, 1, **LORA, gradient_accumulation_steps=2, max_train_steps=12)
    whole = train(run, made, 1, tmp_path / "whole", 2)
    with Killer(tmp_path / "once", rank=1, times=1):
        once = train(run, made, 1, tmp_path / "once", 2)
    assert once.hashes == whole.hashes
    assert "The train-1 job was killed by SIGKILL; it is tried once more" in caplog.text
    with (
        Killer(tmp_path / "twice", rank=0, times=2),
        pytest.raises(JobError, match="The train job was killed by SIGKILL, twice"),
    ):
        train(run, made, 1, tmp_path / "twice", 2)
    assert newest_checkpoint(tmp_path / "twice") >= 1
    alone = train(run, made, 1, tmp_path / "twice", 1)
    assert alone.hashes == whole.hashes, "two processes and two batches: one sum, whoever makes it"
    assert alone.manifest.summary["ranks"][str(12 - alone.manifest.summary["steps_of_this_process"])] == 1


@pytest.mark.slow
def test_a_stop_reaches_every_rank_and_leaves_one_checkpoint(world: DataWorld, tmp_path: Path) -> None:
    run, made = small(
        world, 1, **LORA, gradient_accumulation_steps=2, max_train_steps=20, checkpoint_step_interval=1000
    )
    found: list[BaseException] = []

    def stop() -> None:
        try:
            train(run, made, 1, tmp_path / "stopped", 2)
        except JobError as error:
            found.append(error)

    with Killer(tmp_path / "stopped", rank=1, times=1, number=signal.SIGTERM) as killer:
        stop()
    assert killer.addresses == {"127.0.0.1"}, "the network reaches no rank"
    (error,) = found
    assert "was stopped; run it again to continue" in str(error)
    step = newest_checkpoint(tmp_path / "stopped")
    assert 1 <= step < 20
    again = train(run, made, 1, tmp_path / "stopped", 2)
    assert again.manifest.summary["steps_of_this_process"] == 20 - step


def test_what_cannot_be_shared_out_is_refused(world: DataWorld) -> None:
    """Before anything is made, with the numbers that are wrong and what to set."""
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"num_processes": 3}, {"train_batch_size": 4, "gradient_accumulation_steps": 2}, "3, which divides neither"),
        ({"num_processes": 2}, {"train_batch_size": 4, "lora_dropout": 0.1}, "to a multiple of 2"),
        ({"num_processes": 2}, {**WHOLE, "optimizer": "adafactor"}, "whole tensors. Use one of adamw, adamw_bf16"),
        ({"num_processes": 2}, {**WHOLE, "dynamo_backend": "aot_eager"}, "gathers no weights. Set it to no"),
        ({"num_processes": 2, "exact_ranks": True}, WHOLE, "needs whole gradients. Remove one"),
        ({"num_processes": 0}, {}, "num_processes"),
        ({"num_processes": "many"}, {}, "num_processes"),
        ({"num_processes": 2, "exact_ranks": True}, {"train_batch_size": 4, "micro_batch_size": 1}, "exact_ranks is true"),
    ]  # fmt: skip
    for keys, settings, words in cases:
        with pytest.raises(ConfigError, match=words):
            world.load(stages=(1,), **keys, stage1={**settings, "model_flavour": "tiny-i"})
    world.load(stages=(1,), num_processes="auto", stage1={"train_batch_size": 3, "model_flavour": "tiny-i"})


def test_each_rank_needs_a_gpu_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device, gpus in (("cuda", 2), ("mps", 1)):
        words = f"num_processes is 3, .* of which this machine has {gpus}"
        with pytest.raises(ConfigError, match=words), joined(0, 3, False, torch.device(device), tmp_path / "meeting"):
            pass


@pytest.mark.parametrize(("passes", "size", "ranks"), [(2, 4, 2), (6, 1, 3), (1, 4, 2), (3, 8, 4), (4, 3, 1)])
def test_the_turns_of_all_ranks_are_the_step(passes: int, size: int, ranks: int) -> None:
    """Each sample of each batch once, and as many turns for every rank."""
    config = StageConfig(model_flavour="tiny-i", train_batch_size=size, gradient_accumulation_steps=passes)
    for length in range(1, size + 1):
        seen = list[tuple[int, int]]()
        for rank in range(ranks):
            turns = turns_of(config, rank, ranks)
            for turn in range(3 * turns.per_step, 4 * turns.per_step):
                edges = list(range(0, length, turns.pass_size))
                for first in turns.parts(edges):
                    seen += [
                        (turns.number(turn), sample) for sample in range(first, min(first + turns.pass_size, length))
                    ]
        assert sorted(seen) == [(3 * passes + number, sample) for number in range(passes) for sample in range(length)]

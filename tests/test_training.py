"""Training: the LoRA that comes out is the one diffusers loads, and a killed trainer loses nothing."""

import importlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from deepfloyd_core.artifacts import Artifact, Request, WorkDir, materialise
from deepfloyd_core.config import Run, RunConfig, load_run
from deepfloyd_core.embeds import embeds_request, run_captions
from deepfloyd_core.errors import JobError
from deepfloyd_core.flavours import FLAVOURS, Stage
from deepfloyd_core.jobs import JOBS, Job, run_job
from deepfloyd_core.ledger import caption_counts
from deepfloyd_core.models import load_scheduler, load_text_modules, load_unet
from deepfloyd_core.products import BITFIT_FILE, LORA_FILE, lora_request
from deepfloyd_core.projected import text_is_frozen, text_request
from deepfloyd_core.sampling import make_sampler, sample_stage1
from deepfloyd_core.types import no_report

FOLDERS = {1: Path(FLAVOURS["tiny-i"].repo), 2: Path(FLAVOURS["tiny-ii"].repo)}


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory,
    new_small_run: Callable[[Path], Any],
    new_world: Callable[[Path], Any],
) -> tuple[Run, dict[str, Artifact]]:
    """A small run and everything that training needs."""
    run = load_run(new_small_run(tmp_path_factory.mktemp("training") / "run").config)
    stages = new_world(run.workspace)
    index = stages.index(run)
    made = {"image_index": index, "eval_set": stages.eval_set(run, index)}
    made |= {f"stage{stage}_pixels": stages.pixels(run, index, stage) for stage in run.config.stages}
    captions = run_captions(run, caption_counts(index))
    options = {"captions": captions, "encoder": str(FOLDERS[1])}
    made["text_embeds"], _ = materialise(
        run.workspace,
        embeds_request(run, captions, FOLDERS[1]),
        lambda work: run_here("embed", run.config, {}, options, work),
    )
    return run, made


def _text(run: Run, stage: Stage, embeds: Artifact) -> Artifact:
    if not text_is_frozen(run.config.stage(stage)):
        return embeds
    options = {"stage": stage, "model": str(FOLDERS[stage])}
    request = text_request(run, stage, FOLDERS[stage], embeds)
    inputs = {"text_embeds": embeds}
    return materialise(run.workspace, request, lambda work: run_here("project", run.config, inputs, options, work))[0]


def run_here(name: str, config: RunConfig, inputs: dict[str, Artifact], options: dict[str, Any], work: WorkDir) -> Any:
    """A job in this process: a child takes 8 s to import torch."""
    module, function = JOBS[name].split(":")
    with restored_sigterm():
        return getattr(importlib.import_module(module), function)(Job(config, inputs, options, work.path, no_report))


@contextmanager
def restored_sigterm() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _train(
    run: Run,
    made: dict[str, Artifact],
    stage: Stage,
    workspace: Path,
    text: Artifact | None = None,
    how: Callable[..., Any] = run_job,
) -> Artifact:
    text = text or _text(run, stage, made["text_embeds"])
    inputs = {"pixels": made[f"stage{stage}_pixels"], "text": text, "eval_set": made["eval_set"]}
    options = {"stage": stage, "model": str(FOLDERS[stage])}
    request = lora_request(run, stage, FOLDERS[stage], inputs)
    return materialise(workspace, request, lambda work: how("train", run.config, inputs, options, work))[0]


@pytest.fixture(scope="module")
def loras(world: tuple[Run, dict[str, Artifact]]) -> dict[int, Artifact]:
    """Both LoRAs, trained without interruption."""
    run, made = world
    return {stage: _train(run, made, stage, run.workspace, how=run_here) for stage in run.config.stages}


@pytest.mark.parametrize("stage", [1, 2])
def test_the_lora_loads_in_stock_diffusers_whole(loras: dict[int, Artifact], stage: int) -> None:
    from diffusers import IFPipeline, IFSuperResolutionPipeline

    cls = {1: IFPipeline, 2: IFSuperResolutionPipeline}[stage]
    pipeline = cls.from_pretrained(
        FOLDERS[stage], safety_checker=None, feature_extractor=None, watermarker=None, requires_safety_checker=False
    )
    pipeline.load_lora_weights(loras[stage].path)
    file = load_file(loras[stage].path / LORA_FILE)
    loaded = {name: tensor for name, tensor in pipeline.unet.state_dict().items() if "lora_" in name}
    assert len(loaded) == len(file) > 0  # none missing, none unexpected
    for name, tensor in file.items():
        twin = (
            name.removeprefix("unet.")
            .replace(".lora_A.", ".lora_A.default_0.")
            .replace(".lora_B.", ".lora_B.default_0.")
        )
        assert torch.equal(loaded[twin], tensor)
    assert any(tensor.abs().max() > 0 for name, tensor in file.items() if "lora_B" in name)
    targets = {name.split(".lora_")[0].rsplit("attentions", 1)[1].split(".", 2)[2] for name in file}
    missing_in_stage2 = {"to_k", "to_v"} if stage == 2 else set()
    assert targets == {"to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"} - missing_in_stage2
    assert loras[stage].summary["reload_difference"] == 0.0


def test_the_file_carries_its_alpha_and_no_dropout(loras: dict[int, Artifact]) -> None:
    with safe_open(loras[1].path / LORA_FILE, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["unet.lora_alpha"] == 4 and metadata["unet.r"] == 4
    assert metadata["unet.lora_dropout"] == 0.0  # the run has 0.1; loaded, it would stay on while sampling


def test_the_exported_scheduler_has_a_fixed_variance(loras: dict[int, Artifact]) -> None:
    for lora in loras.values():
        config = json.loads((lora.path / "scheduler" / "scheduler_config.json").read_text())
        assert config["variance_type"] == "fixed_small"


def test_the_trainer_does_not_load_the_text_modules(loras: dict[int, Artifact]) -> None:
    for stage, lora in loras.items():
        stock = sum(param.numel() for param in load_unet(FOLDERS[stage], torch.float32).parameters())
        text = sum(param.numel() for param in load_text_modules(FOLDERS[stage], torch.float32).parameters())
        assert text > 20_000
        assert lora.summary["frozen_parameters"] == stock - text


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), [(1, "no"), (1, "bf16"), (2, "no")])
def test_training_on_the_stored_text_gives_the_bytes_of_training_on_the_raw_rows(
    world: tuple[Run, dict[str, Artifact]], tmp_path: Path, stage: Stage, precision: str
) -> None:
    """At batch size 1; in larger ones a stock UNet rounds its own projections otherwise."""
    first, made = world
    settings = ("train_batch_size=1", "max_train_steps=3", f"mixed_precision={precision}")
    run = load_run(first.workspace.parent / "run.toml", tuple(f"stage{stage}.{key}" for key in settings))
    ours, stock = (_train(run, made, stage, tmp_path, text, run_here) for text in (None, made["text_embeds"]))
    assert ours.fingerprint != stock.fingerprint
    assert ours.summary["frozen_parameters"] < stock.summary["frozen_parameters"]
    for name in (LORA_FILE, "metrics.parquet"):
        assert (ours.path / name).read_bytes() == (stock.path / name).read_bytes()


@pytest.mark.slow
def test_adapters_on_the_text_modules_train_on_the_raw_rows(
    world: tuple[Run, dict[str, Artifact]], tmp_path: Path
) -> None:
    first, made = world
    keys = ('stage1.lora_target_modules=["to_q","encoder_hid_proj"]', "stage1.max_train_steps=2")
    run = load_run(first.workspace.parent / "run.toml", keys)
    lora = _train(run, made, 1, tmp_path, how=run_here)
    assert lora.manifest["inputs"]["text"] == made["text_embeds"].fingerprint
    assert lora.summary["reload_difference"] == 0.0
    assert load_file(lora.path / LORA_FILE)["unet.encoder_hid_proj.lora_B.weight"].abs().max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_a_trainer_killed_again_and_again_makes_the_same_bytes(
    world: tuple[Run, dict[str, Artifact]], loras: dict[int, Artifact], tmp_path: Path, stage: Stage
) -> None:
    run, made = world
    kills = 0
    while kills < 20:
        killer = _Killer(tmp_path, after_steps=4)
        killer.start()
        try:
            lora = _train(run, made, stage, tmp_path)
            break
        except JobError as error:
            assert "SIGKILL" in str(error)
            kills += 1
        finally:
            killer.done.set()
            killer.join()
    assert kills >= 1, "the trainer was never killed"
    for name in (LORA_FILE, "metrics.parquet"):
        assert (lora.path / name).read_bytes() == (loras[stage].path / name).read_bytes()
    assert lora.summary["steps_of_this_process"] < run.config.stage(stage).max_train_steps


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(
    world: tuple[Run, dict[str, Artifact]], loras: dict[int, Artifact], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, made = world
    killer = _Killer(tmp_path, after_steps=6)
    killer.start()
    with pytest.raises(JobError):
        _train(run, made, 1, tmp_path)
    killer.join()
    newest = max(tmp_path.glob("stage1_lora/*/.checkpoints/step-*/adapter.safetensors"))
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(bytes(data))
    lora = _train(run, made, 1, tmp_path)
    assert (lora.path / LORA_FILE).read_bytes() == (loras[1].path / LORA_FILE).read_bytes()


@pytest.mark.slow
def test_sigterm_writes_a_checkpoint_and_ends(
    world: tuple[Run, dict[str, Artifact]], loras: dict[int, Artifact], tmp_path: Path
) -> None:
    run, made = world
    run = load_run(
        Path(run.workspace).parent / "run.toml", (f"workspace={tmp_path}", "stage1.checkpointing_steps=1000")
    )
    stopper = _Killer(tmp_path, after_steps=0, number=signal.SIGTERM)
    stopper.start()
    with pytest.raises(JobError, match="stopped"):
        _train(run, made, 1, tmp_path)
    stopper.join()
    assert list(tmp_path.glob("stage1_lora/*/.checkpoints/step-*/checkpoint.json"))
    lora = _train(run, made, 1, tmp_path)
    assert (lora.path / LORA_FILE).read_bytes() == (loras[1].path / LORA_FILE).read_bytes()


@pytest.mark.slow
def test_with_use_ema_the_moving_average_is_saved(world: tuple[Run, dict[str, Artifact]], tmp_path: Path) -> None:
    """Against the adapters after 1, 2 and 3 steps, averaged here: decays 0, 2/11 and 3/12, as in diffusers' EMAModel."""
    run, made = world

    def trained(steps: int, ema: str) -> dict[str, torch.Tensor]:
        settings = ("stage1.lr_scheduler=constant", f"stage1.max_train_steps={steps}", f"stage1.use_ema={ema}")
        changed = load_run(Path(run.workspace).parent / "run.toml", settings)
        return load_file(_train(changed, made, 1, tmp_path, how=run_here).path / LORA_FILE)

    after = [trained(steps, "false") for steps in (1, 2, 3)]
    average = trained(3, "true")
    for name, tensor in average.items():
        first, second, third = (step[name].double() for step in after)
        expected = 3 / 12 * (2 / 11 * first + 9 / 11 * second) + 9 / 12 * third
        assert torch.allclose(tensor.double(), expected, atol=1e-7), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        ("optimizer=adamw_bf16", "mixed_precision=bf16", "use_ema=true", "gradient_accumulation_steps=2"),
        ("use_dora=true", "optimizer=adamw_bf16", "mixed_precision=bf16", "use_ema=true"),
        ("use_bitfit=true", "lora_rank=16", "lora_dropout=0.0"),
        ("optimizer=prodigy", "learning_rate=1.0", "train_variance=true"),
        ("optimizer=adamw_schedulefree", "lr_scheduler=constant", "use_ema=false", "loss_type=huber"),
    ],
)
def test_other_trainings_survive_a_kill_and_can_be_sampled_from(
    world: tuple[Run, dict[str, Artifact]], loras: dict[int, Artifact], tmp_path: Path, keys: tuple[str, ...]
) -> None:
    first, made = world
    settings = tuple(f"stage1.{key}" for key in ("max_train_steps=6", "checkpointing_steps=1", *keys))
    run = load_run(first.workspace.parent / "run.toml", settings)
    whole = _train(run, made, 1, tmp_path / "whole", how=run_here)
    killer = _Killer(tmp_path / "killed", after_steps=3)
    killer.start()
    with pytest.raises(JobError, match="SIGKILL"):
        _train(run, made, 1, tmp_path / "killed")
    killer.join()
    lora = _train(run, made, 1, tmp_path / "killed")
    for name in (BITFIT_FILE if "use_bitfit=true" in keys else LORA_FILE, "metrics.parquet"):
        assert (lora.path / name).read_bytes() == (whole.path / name).read_bytes()
    assert lora.summary["steps_of_this_process"] < 6
    assert lora.summary["reload_difference"] == 0.0
    assert lora.summary["eval_loss"] != lora.summary["eval_loss_base"]
    if "mixed_precision=bf16" not in keys:
        assert lora.summary["eval_loss_base"] == loras[1].summary["eval_loss_base"], (
            "the base itself, whatever was trained"
        )
    scheduler = load_scheduler(lora.path)
    assert scheduler.config.variance_type == ("learned_range" if "train_variance=true" in keys else "fixed_small")
    sampler = make_sampler(run.config, 1, FOLDERS[1], lora.path, lambda count: None)
    assert sampler.pipeline.scheduler.config.variance_type == scheduler.config.variance_type
    text = torch.zeros(1, 77, sampler.pipeline.unet.config.encoder_hid_dim)
    assert bool(sample_stage1(sampler, text, text, [0], (64, 64)).isfinite().all())


class _Killer(threading.Thread):
    """Signals the training process once it has a checkpoint this many steps beyond those it started with."""

    def __init__(self, workspace: Path, after_steps: int, number: int = signal.SIGKILL) -> None:
        super().__init__(daemon=True)
        self.workspace, self.after, self.number, self.done = workspace, after_steps, number, threading.Event()

    def newest(self) -> int:
        """Step of the newest checkpoint, 0 without one."""
        records = self.workspace.glob("stage*_lora/*/.checkpoints/*/checkpoint.json")
        return max((int(path.parent.name.removeprefix("step-")) for path in records), default=0)

    def run(self) -> None:
        first = self.newest()
        while not self.done.wait(0.01):
            reported = [
                path for path in self.workspace.glob("stage*_lora/*/.job-train.progress") if path.stat().st_size
            ]
            process = _job_process() if reported and self.newest() - first >= self.after else None
            if process:
                os.kill(process, self.number)
                return


def _job_process() -> int | None:
    """The child of this process that trains."""
    for child in psutil.Process().children():
        if child.cmdline()[-2:-1] == ["train"]:
            return child.pid
    return None


@pytest.mark.slow
def test_a_job_that_dies_says_how_and_shows_its_log(tmp_path: Path, world: tuple[Run, dict[str, Artifact]]) -> None:
    run, _ = world
    options = {"captions": ["x"], "encoder": str(tmp_path / "nowhere")}
    request = Request("text_embeds", 1, {"x": 1}, {})
    with pytest.raises(JobError, match="Its log is") as caught:
        materialise(tmp_path, request, lambda work: run_job("embed", run.config, {}, options, work))
    assert "nowhere" in str(caught.value)

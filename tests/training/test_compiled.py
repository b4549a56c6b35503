"""torch.compile of training steps: the same gradients but for rounding, the same bytes after a kill, and what is refused.

With `aot_eager`, which needs no compiler. A small network stands in for the UNet where its blocks do not matter: to
trace a UNet takes seconds.
"""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import which
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from artifact_rows import SOME_EVAL_SET
from diffusers import UNet2DConditionModel
from inputs import training_inputs
from small_run import SmallRun

from deepfloyd_core.adapters.lora import trainable
from deepfloyd_core.adapters.method import method_of
from deepfloyd_core.config import stage_run
from deepfloyd_core.config.flavours import FLAVOURS
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stage_run import device_fault
from deepfloyd_core.diffusion.loss import CONTROL_IMAGE, Text
from deepfloyd_core.errors import ConfigError, Stop
from deepfloyd_core.models.quantized import code_pairs, quantize_layer
from deepfloyd_core.models.unet import load_scheduler
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.processes.jobs import Job
from deepfloyd_core.store.artifacts import Artifact, Request
from deepfloyd_core.training import trainer as train
from deepfloyd_core.training.batches import Batch
from deepfloyd_core.training.checkpoints import StepMetrics
from deepfloyd_core.training.compiled import check_backend, compiled_unet
from deepfloyd_core.training.forward import TrainingContext, prepare
from deepfloyd_core.training.identity import lora_request
from deepfloyd_core.training.jobs import TrainingInputs, train_job
from deepfloyd_core.training.recompute import recompute_activations
from deepfloyd_core.training.state import training_state
from deepfloyd_core.training.steps import run_steps
from deepfloyd_core.training.validation import Validation
from deepfloyd_core.types import Json, no_report

TINY, CPU = Path(FLAVOURS["tiny-i"].repo), torch.device("cpu")
# Batches of a run: how many pictures, height and width.
SIZES = ((2, 16, 16), (3, 24, 24), (2, 16, 16), (4, 32, 40), (3, 24, 24), (2, 16, 16))


def stage(**keys: Any) -> StageConfig:
    return StageConfig.model_validate({"model_flavour": "tiny-i", "mixed_precision": "no", **keys})


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """What torch compiled in this process is forgotten, and the signal that the loop catches given back."""
    before = signal.getsignal(signal.SIGTERM)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    signal.signal(signal.SIGTERM, before)


# ---- a whole UNet --------------------------------------------------------------------------------------------------


def small_unet(config: StageConfig) -> UNet2DConditionModel:
    """One level of the tiny UNet's kinds of blocks, with what is trained moved off its start."""
    whole = UNet2DConditionModel.load_config(TINY, subfolder="unet")
    down, up = whole["down_block_types"], whole["up_block_types"]
    levels = {"block_out_channels": [16], "down_block_types": down[1:2], "up_block_types": up[:1]}
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config({**whole, **levels, "attention_head_dim": 16})
    unet.requires_grad_(False)
    if config.base_model_precision != "no_change":
        pairs = code_pairs(torch.float32, CPU) if config.base_model_precision == "nf4" else None
        for layer in [layer for layer in unet.modules() if type(layer) in (torch.nn.Linear, torch.nn.Conv2d)]:
            quantize_layer(layer, pairs)
    method_of(config).prepare(unet, config, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in trainable(unet).values():
            param.add_(0.02 * torch.randn(param.shape, generator=generator))
    if config.gradient_checkpointing:
        recompute_activations(unet)
    return unet.train()


def gradients(called: Callable[..., Any], unet: UNet2DConditionModel, control: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    x, text = torch.randn((2, 3, 16, 16), generator=generator), torch.randn((2, 77, 64), generator=generator)
    given = {CONTROL_IMAGE: torch.rand((2, 3, 16, 16), generator=generator)} if control else None
    torch.manual_seed(3)  # of the dropout
    out = called(x, torch.tensor([7, 500]), text, cross_attention_kwargs=given, return_dict=False)[0]
    unet.zero_grad()
    out.square().mean().backward()
    return {name: param.grad.clone() for name, param in unet.named_parameters() if param.grad is not None}


METHODS: dict[str, dict[str, Any]] = {
    "LoRA beside int8": {"base_model_precision": "int8", "lora_target_modules": ["to_q", "conv1"]},
    "LoRA beside nf4": {"base_model_precision": "nf4", "lora_target_modules": ["to_q", "conv1"]},
    "LoRA": {"lora_dropout": 0.3, "lora_target_modules": ["to_q", "to_out.0", "conv1"]},
    "recomputed": {"lora_dropout": 0.3, "lora_target_modules": ["to_q"], "gradient_checkpointing": True},
    "BitFit": {"use_bitfit": True},
    "full": {"model_type": "full"},
    "ControlNet": {"controlnet": True, "controlnet_conditioning": "grayscale"},
    "plain attention": {"attention_mechanism": "math"},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_each_way_to_train_is_compiled_in_one_graph_and_learns_what_it_did(method: str) -> None:
    config = stage(**METHODS[method])
    unet = small_unet(config)
    expected, names = gradients(unet, unet, config.controlnet), list(unet.state_dict())
    torch._dynamo.utils.counters.clear()
    in_steps = compiled_unet(unet, "aot_eager")
    found = gradients(in_steps, unet, config.controlnet)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert list(unet.state_dict()) == names and not hasattr(unet, "_orig_mod"), "names of a saved file"
    assert found.keys() == expected.keys() and len(found) > 4
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6 * largest)
    assert gradients(in_steps, unet, config.controlnet).keys() == found.keys()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "nothing is compiled twice"


# ---- the trainer's loop --------------------------------------------------------------------------------------------


class Small(torch.nn.Module):
    """Called as a UNet is, and says in which sizes it was traced."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.time = torch.nn.Conv2d(3, 6, 3, padding=1), torch.nn.Linear(1, 6)
        self.drop = torch.nn.Dropout(0.2)

    def forward(self, x: torch.Tensor, t: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        return (self.drop(self.conv(x)) + self.time(t[:, None] / 1000)[:, :, None, None],)


def run_loop(out: Path, backend: str, stop_in: int | None = None) -> tuple[dict[str, torch.Tensor], list[StepMetrics]]:
    """The trainer's own loop and loss over batches of several sizes; `stop_in`: dies in that step."""
    config = stage(max_train_steps=len(SIZES), checkpoint_step_interval=1, learning_rate=1e-2, dynamo_backend=backend)

    def take(number: int) -> Batch:
        count, height, width = SIZES[number]
        generator = torch.Generator().manual_seed(number)
        pixels = torch.randint(0, 256, (count, height, width, 3), generator=generator, dtype=torch.uint8)
        return Batch(pixels, ["id"] * count, np.arange(count))

    def report(done: int, total: int, line: str) -> None:
        if done == stop_in:
            raise Stop

    torch._dynamo.reset()  # as in a process of its own
    unet = Small()
    context = TrainingContext(
        1, config, 3, unet, load_scheduler(TINY), None, lambda names: Text(torch.zeros(len(names), 1, 1)), CPU, out,
        compiled_unet(unet, backend),
    )  # fmt: skip
    state = training_state(context)
    run_steps(
        context, state, lambda number: prepare(context, take(number), number, []), cast(Validation, None),
        lambda step, values, pictures: None, report,
    )  # fmt: skip
    return {name: param.detach().clone() for name, param in unet.named_parameters()}, state.metrics


def test_a_compiled_run_that_dies_ends_with_the_bytes_of_an_unbroken_one(tmp_path: Path) -> None:
    """The process that goes on compiles for itself and sees the sizes in another order."""
    torch._dynamo.utils.counters.clear()
    expected, metrics = run_loop(tmp_path / "whole", "aot_eager")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(set(SIZES)), (
        "a graph for each size, none symbolic"
    )
    for step in (2, 4):
        with pytest.raises(Stop):
            run_loop(tmp_path / "broken", "aot_eager", stop_in=step)
    found, resumed = run_loop(tmp_path / "broken", "aot_eager")
    assert resumed == metrics
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    plain, _ = run_loop(tmp_path / "plain", "no")
    for name in expected:
        torch.testing.assert_close(plain[name], expected[name], rtol=1e-4, atol=1e-6)


def test_as_many_sizes_as_a_run_has_are_compiled() -> None:
    """torch alone stops after 8, and then either fails or goes on without compiling."""
    small = Small()
    in_steps = compiled_unet(small, "aot_eager")
    torch._dynamo.utils.counters.clear()
    for edge in range(4, 16):
        in_steps(torch.zeros(2, 3, edge, edge), torch.ones(2))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 12


def test_what_cannot_be_traced_whole_is_an_error() -> None:
    class Broken(Small):
        def forward(self, x: torch.Tensor, t: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
            torch._dynamo.graph_break()
            return super().forward(x, t)

    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled_unet(Broken(), "aot_eager")(torch.zeros(2, 3, 8, 8), torch.ones(2))


def test_without_the_key_the_unet_itself_is_called() -> None:
    unet = Small()
    assert compiled_unet(unet, "no") is unet


def test_the_trainer_compiles_what_the_key_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_run: SmallRun
) -> None:
    asked: list[tuple[Any, str]] = []

    def compiled(unet: UNet2DConditionModel, backend: str) -> str:
        asked.append((unet, backend))
        return "compiled"

    monkeypatch.setattr(train, "Projected", lambda text: SimpleNamespace(batch=None))
    monkeypatch.setattr(train, "compiled_unet", compiled)
    run = load_run(small_run.config, ("stage1.dynamo_backend=aot_eager",))
    text = Artifact("stage1_text", "none", tmp_path)
    inputs = TrainingInputs(pixels=text, text=text, eval_set=text)
    job = Job(train_job(run, 1, TINY, inputs, [], None), tmp_path, no_report)
    context = train.set_up(job)
    assert asked == [(context.unet, "aot_eager")] and cast(Any, context.compiled) == "compiled"


# ---- identity and refusals -----------------------------------------------------------------------------------------


def test_a_fingerprint_has_the_backend_and_with_one_also_the_recomputation(small_run: SmallRun) -> None:
    text = Request("stage1_text", 1, {}, {"text_embeds": "0", "unet": "0"})

    def spec(*keys: str) -> Json:
        run = load_run(small_run.config, tuple(f"stage1.{key}" for key in keys))
        return lora_request(run, 1, TINY, training_inputs(text=text, eval_set=SOME_EVAL_SET)).spec

    plain = spec()
    assert plain["dynamo_backend"] == "no" and "gradient_checkpointing" not in plain
    assert spec("gradient_checkpointing=true") == plain, "the same bits"
    found = spec("dynamo_backend=aot_eager")
    assert found == {**plain, "dynamo_backend": "aot_eager", "gradient_checkpointing": False}
    recomputed = spec("dynamo_backend=aot_eager", "gradient_checkpointing=true")
    assert recomputed == {**found, "gradient_checkpointing": True}


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (
            ("dynamo_backend=aot_eager", "use_dora=true"),
            r"stage1: dynamo_backend is 'aot_eager', and torch cannot trace peft's DoRA. Set it to no",
        ),
        (
            ("dynamo_backend=aot_eager", "attention_mechanism=xformers"),
            "torch cannot trace xformers. Set it to no, or attention_mechanism",
        ),
        (("dynamo_backend=cudagraphs",), "stage1.dynamo_backend is 'cudagraphs'"),
    ],
)
def test_what_cannot_be_compiled_is_refused(keys: tuple[str, ...], says: str, small_run: SmallRun) -> None:
    with pytest.raises(ConfigError, match=says):
        load_run(small_run.config, tuple(f"stage1.{key}" for key in keys))


def test_inductor_needs_a_compiler_and_on_a_gpu_triton(monkeypatch: pytest.MonkeyPatch, small_run: SmallRun) -> None:
    config = stage(dynamo_backend="inductor")
    assert "whose kernels for mps are a prototype" in device_fault(config, "mps")
    monkeypatch.setattr(stage_run, "which", lambda name: "/usr/bin/g++" if name == "g++" else None)
    assert device_fault(config, "cpu") == device_fault(config, "auto") == ""
    monkeypatch.setattr(stage_run, "find_spec", lambda name: None)
    for device in ("cuda", "rocm"):
        assert "triton cannot be imported. Set it to no" in device_fault(config, device)
    monkeypatch.setattr(stage_run, "which", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"stage1.dynamo_backend is 'inductor', and none of g\+\+, clang\+\+, c\+\+ is"
    ):
        load_run(small_run.config, ("stage1.dynamo_backend=inductor",))
    load_run(small_run.config, ("stage1.dynamo_backend=aot_eager",))


def test_a_compiler_that_does_not_work_is_found_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_run: SmallRun
) -> None:
    """The whole way, of a compiler that is in PATH and is none."""
    import torch._inductor.config as inductor

    (tmp_path / "g++").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(train, "load_base", lambda *_: pytest.fail("the model is loaded"))
    run = load_run(small_run.config, ("stage1.dynamo_backend=inductor",))
    text = Artifact("stage1_text", "none", tmp_path)
    inputs = TrainingInputs(pixels=text, text=text, eval_set=text)
    job = Job(train_job(run, 1, TINY, inputs, [], None), tmp_path, no_report)
    says = (
        r"stage1.dynamo_backend is 'inductor', and nothing can be compiled for cpu on this machine: .*g\+\+ python3-dev"
    )
    with inductor.patch({"cpp.cxx": (None, str(tmp_path / "g++"))}), pytest.raises(ConfigError, match=says) as refused:
        train.set_up(job)
    said = str(refused.value)
    assert len(said.splitlines()) == 1 and "InvalidCxxCompiler" in said and "TORCHDYNAMO_VERBOSE" not in said


@pytest.mark.skipif(not which("g++"), reason="no g++: apt-get install g++")
@pytest.mark.slow
def test_inductor_compiles_what_a_step_calls() -> None:
    check_backend("inductor", CPU, "it")
    small = Small().eval()
    x, t = torch.randn(2, 3, 16, 16), torch.ones(2)
    torch.testing.assert_close(compiled_unet(small, "inductor")(x, t), small(x, t))

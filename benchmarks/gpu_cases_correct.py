"""The cases of group a: on the card the tiny cascade must do what it does on the CPU, and twice the same bytes.

The shipped weights, few pictures, the product's own jobs. TF32 is off in the comparisons, for it would hide a fault below
its own rounding; it stays as it is where bytes are compared.
"""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers.pipelines.deepfloyd_if import pipeline_if_superresolution
from gpu_cases_sample import pictures
from gpu_plan import Asked, Yields
from gpu_world import kernels, noise, run_of, stand_in_text
from train_step import Enough, training_job

from deepfloyd_core.config.flavours import FLAVOURS
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.diffusion.loss import Text, low_res
from deepfloyd_core.files import sha256_file
from deepfloyd_core.hashing import caption_id
from deepfloyd_core.models.unet import load_scheduler, load_unet, order_channels_last, stock_pipeline
from deepfloyd_core.processes.jobs import Job
from deepfloyd_core.sampling.jobs import SampledStage
from deepfloyd_core.sampling.sampler import make_sampler
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.text.embeds import Embeds, encode_job
from deepfloyd_core.text.encode import encode_captions
from deepfloyd_core.text.projection import Projected, project_captions, project_job
from deepfloyd_core.training import eval_loss as held_out
from deepfloyd_core.training import steps as loop
from deepfloyd_core.training import trainer as train
from deepfloyd_core.training.batches import draw
from deepfloyd_core.training.checkpoints import StepMetrics
from deepfloyd_core.training.forward import TrainingContext, feed, predict_noise
from deepfloyd_core.training.jobs import TrainingSummary
from deepfloyd_core.types import no_report

TINY = {stage: Path(FLAVOURS[f"tiny-{'i' * stage}"].repo) for stage in (1, 2)}
BATCH = 2


@dataclass
class Trained:
    """The first step of a training, on the CPU."""

    row: StepMetrics | None = None
    grads: list[torch.Tensor] = field(default_factory=list)  # behind the clipping
    before: list[torch.Tensor] = field(default_factory=list)
    after: list[torch.Tensor] = field(default_factory=list)
    summary: TrainingSummary | None = None  # None: it was stopped


def first_step(asked: Asked, stage: Stage = 1, **keys: Any) -> Yields:
    """Loss, gradients and update of a first step, and what is saved and loaded again after the second."""
    run = _run(asked, stage, max_train_steps=2, **keys)
    with _without_tf32():
        on_cpu = _trained(asked, _on_cpu(run), asked.folder / "cpu", 1)
        found = _trained(asked, run, asked.folder / "device", 2)
    assert found.row is not None and on_cpu.row is not None
    yield "loss, off by", abs(found.row.loss / on_cpu.row.loss - 1), f"loss {found.row.loss:.4f}"
    yield "gradients, off by", _off(_flat(found.grads), _flat(on_cpu.grads)), f"{len(found.grads)} tensors"
    yield "first update, off by", *_update_off(found, run.config.stage(stage))
    assert found.summary is not None
    yield "reloaded, off by", found.summary.reload_difference, ""


def resumed(asked: Asked, **keys: Any) -> Yields:
    """A training twice, and once more stopped after three steps of four and taken up at the checkpoint of the second."""
    run = _run(asked, 1, max_train_steps=4, checkpoint_step_interval=2, **keys)
    outs = [asked.folder / name for name in ("unbroken", "again", "stopped")]
    for out, stops in zip(outs, ((4,), (4,), (3, 4)), strict=True):
        ends = [_trained(asked, run, out, last, fresh=place == 0) for place, last in enumerate(stops)]
        last_end = ends[-1].summary
        assert last_end is not None and last_end.steps_of_this_process == 4 - (2 if len(stops) == 2 else 0)
    first, *others = ({path.name: sha256_file(path) for path in _products(out)} for out in outs)
    for what, other in zip(("unbroken, twice", "killed and resumed"), others, strict=True):
        differ = [name for name in sorted(first.keys() | other.keys()) if first.get(name) != other.get(name)]
        yield f"{what}: files that differ", float(len(differ)), ", ".join(differ) or f"of {len(first)}"


def channels_last(asked: Asked) -> Yields:
    """The output of a UNet whose weights lie as the trainer orders them, against the same one as it was loaded."""
    unet = load_unet(TINY[1], torch.float32).to(asked.device)
    x, text = _random((2, 3, 64, 64)), _random((2, 77, unet.config.encoder_hid_dim))
    with _without_tf32(), torch.inference_mode():
        outputs = []
        for ordered in (False, True):
            if ordered:
                order_channels_last(unet)
            t = torch.full((2,), 500, device=asked.device)
            outputs.append(unet(x.to(asked.device), t, text.to(asked.device))[0].cpu())
    yield "output, off by", _off(outputs[1], outputs[0]), ""


def stage2_input(asked: Asked) -> Yields:
    """What the trainer feeds a Stage II UNet on the device, against what the stock pipeline there feeds it."""
    unet = load_unet(TINY[2], torch.float32).to(asked.device)
    noising, scheduler = load_scheduler(TINY[2], "image_noising_scheduler"), load_scheduler(TINY[2])
    x_0, rows = _random((1, 3, 256, 256)).clamp(-1, 1), _random((77, unet.config.encoder_hid_dim))
    t, level = 700, 250
    draws = replace(draw(x_0.shape, 0, 0, 0.0), t=torch.tensor([t]), level=torch.tensor([level]))
    config = StageConfig(model_flavour="tiny-ii", mixed_precision="no")
    texts = Text(rows[None])
    context = TrainingContext(
        2, config, 0, unet, scheduler, noising, lambda names: texts, torch.device(asked.device), asked.folder
    )
    with _spied(unet) as ours:
        predict_noise(context, feed(context, x_0, draws, ["caption"]))
    bars = scheduler.alphas_cumprod
    made = iter([bars[t].sqrt() * x_0 + (1 - bars[t]).sqrt() * draws.noise, draws.low_res_noise])
    pipeline = stock_pipeline(TINY[2], 2, unet, load_scheduler(TINY[2]))
    pictures = {"image": low_res(x_0).to(asked.device), "height": 256, "width": 256, "output_type": "pt"}
    how = {"noise_level": level, "timesteps": [t], "guidance_scale": 1.0}
    given = rows[None].to(asked.device)
    with (
        _spied(unet) as theirs,
        patch.object(pipeline_if_superresolution, "randn_tensor", lambda *_, **__: next(made).to(asked.device)),
    ):
        pipeline(prompt_embeds=given, negative_prompt_embeds=given, **pictures, **how)
    same = all(torch.equal(ours[name].flatten().cpu(), theirs[name].flatten().cpu()) for name in ("t", "class_labels"))
    off = float((ours["x"].cpu() - theirs["x"].cpu()).abs().max())
    yield "against the stock pipeline, off by", off if same else float("nan"), "t and class label equal" if same else ""


def text(asked: Asked) -> Yields:
    """T5's rows of captions of several lengths, and a stage's text of them."""
    run = _run(asked, 1)
    captions = ["a red circle", "a small blue square on a plain white ground", ""]
    devices = {"cpu": _on_cpu(run), "device": run}
    embeds, projected = {}, {}
    with _without_tf32():
        for name, one in devices.items():
            out = _empty(asked.folder / f"embeds-{name}")
            encode_captions(Job(encode_job(one, captions, TINY[1]), out, no_report))
            embeds[name] = Artifact("text_embeds", name, out)
        for name, one in devices.items():
            out = _empty(asked.folder / f"text-{name}")
            project_captions(Job(project_job(one, 1, TINY[1], embeds["cpu"]), out, no_report))
            found = Projected(Artifact("stage1_text", name, out)).batch([caption_id(caption) for caption in captions])
            assert found.pooled is not None
            projected[name] = _flat([found.rows, found.pooled])
    rows = {name: _flat([Embeds(found).of(caption) for caption in captions]) for name, found in embeds.items()}
    yield "T5's rows, off by", _off(rows["device"], rows["cpu"]), "bf16"
    yield "text of Stage I, off by", _off(projected["device"], projected["cpu"]), "fp32"


def sampling(asked: Asked) -> Yields:
    """Two guided steps of each stage: twice on the device, and once on the CPU."""
    stages: tuple[Stage, ...] = (1, 2)
    for stage in stages:
        run = _run(asked, stage, validation_num_inference_steps=2)
        with _without_tf32():
            made = [
                pictures(
                    make_sampler(
                        SampledStage(stage=stage, settings=one.config.stage(stage), model=TINY[stage]),
                        None,
                        one.config,
                        lambda count: None,
                    ),
                    3 - stage,
                )
                for one in (run, run, _on_cpu(run))
            ]
        for what, other in (("twice", made[1]), ("against the CPU", made[2])):
            yield f"Stage {'I' * stage}, {what}, off by", float((made[0] - other).abs().max()), "of a range of 2"


def _run(asked: Asked, stage: Stage, **keys: Any) -> Run:
    keys = {"mixed_precision": "no", "max_train_steps": 2, **keys}
    return run_of(asked, TINY[stage], stage, 1 if asked.tiny else BATCH, **keys)


def _on_cpu(run: Run) -> Run:
    return replace(run, config=run.config.model_copy(update={"device": "cpu"}))


def _trained(asked: Asked, run: Run, out: Path, last: int, fresh: bool = True) -> Trained:
    """Train into a folder, to the end or until step `last` was reported."""
    found, (real_step, real_clip) = Trained(), (loop.take_step, torch.nn.utils.clip_grad_norm_)
    (stage,) = run.config.stages
    folder = TINY[stage]

    def report(done: int, total: int, line: str) -> None:
        if done == last < run.config.stage(stage).max_train_steps:
            raise Enough

    def step(context: Any, state: Any, *more: Any, **named: Any) -> tuple[StepMetrics, bool]:
        params = state.params.values()
        if found.row is not None:
            return real_step(context, state, *more, **named)
        found.before = _copies(params)
        found.row, stop = real_step(context, state, *more, **named)
        found.after = _copies(params)
        return found.row, stop

    def clip(params: Any, most: float) -> torch.Tensor:
        params = list(params)
        norm = real_clip(params, most)
        found.grads = found.grads or _copies(param.grad for param in params)
        return norm

    job = replace(training_job(run, folder, report, noise, stand_in_text), out=_empty(out) if fresh else out)
    with ExitStack() as stack:
        stack.enter_context(patch.object(loop, "take_step", step))
        stack.enter_context(patch.object(torch.nn.utils, "clip_grad_norm_", clip))
        stack.enter_context(patch.object(held_out, "TIMESTEPS", held_out.TIMESTEPS[:1]))
        stack.enter_context(kernels(asked))
        stack.enter_context(suppress(Enough))
        found.summary = train.train(job)
    return found


def _update_off(found: Trained, config: StageConfig) -> tuple[float, str]:
    """How far a first update is from AdamW's in fp64: of its length; of weights in bf16 the farthest one in spacings."""
    assert found.row is not None
    lr, expected = found.row.lr, []
    for param, grad in zip(found.before, found.grads, strict=True):
        kept = param.double() * (1 - lr * config.adam_weight_decay)
        expected.append(kept - lr * grad.double() / (grad.double().abs() + config.adam_epsilon))
    if found.after[0].dtype != torch.bfloat16:
        before = _flat(found.before)
        return _off(_flat(found.after) - before, _flat(expected) - before), "of its length"
    after, wanted = _flat(found.after), _flat(expected)
    spacing = torch.ldexp(torch.ones_like(wanted), torch.frexp(wanted).exponent - 8)
    return float(((after - wanted).abs() / spacing).max()), "spacings of bf16, the farthest weight"


def _products(out: Path) -> Iterator[Path]:
    return (path for path in sorted(out.rglob("*")) if path.suffix in (".safetensors", ".parquet"))


@contextmanager
def _without_tf32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextmanager
def _spied(unet: Any) -> Iterator[dict[str, Any]]:
    """Keep what a UNet is fed, and end the forward pass there."""
    fed: dict[str, Any] = {}

    def hook(module: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        fed.update({"x": positional[0], "t": positional[1], **named})
        raise Enough

    handle = unet.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with suppress(Enough):
            yield fed
    finally:
        handle.remove()


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _random(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _copies(tensors: Any) -> list[torch.Tensor]:
    return [tensor.detach().cpu().clone() for tensor in tensors]


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.double().flatten() for tensor in tensors])


def _off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Distance of a result over the length of the one that it should be."""
    return float((found - wanted).norm() / wanted.norm())

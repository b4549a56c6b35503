"""Forgetting: the base's own pictures, and the loss of both models on them."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DDPMScheduler
from inputs import sample_inputs
from small_run import SmallRun

from deepfloyd_core.config.flavours import FLAVOURS, MOST_PROBES, PUBLISHED
from deepfloyd_core.config.stages import STAGES
from deepfloyd_core.hashing import hash_seed
from deepfloyd_core.measures.drawn_world import BASE_CAPTIONS
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.sampling.forgetting import DrawnProbes, ProbeLoss, write_probes
from deepfloyd_core.sampling.identity import samples_request
from deepfloyd_core.sampling.jobs import PROBED, Probes, SampledStage
from deepfloyd_core.sampling.sampler import Sampler, make_sampler
from deepfloyd_core.text.encode import encode_prompts

TINY = Path(FLAVOURS["tiny-i"].repo)
PROMPTS = ("a red circle", "a blue triangle")


@pytest.fixture
def base(small_run: SmallRun) -> Sampler:
    run = load_run(small_run.config).config
    one = SampledStage(stage=1, settings=run.stage(1), model=TINY)
    return make_sampler(one, None, run, lambda count: None)


@pytest.fixture
def text(small_run: SmallRun) -> torch.Tensor:
    run = load_run(small_run.config).config
    return encode_prompts(list(PROMPTS), "t5", TINY, run, run)


def means(rows: list[ProbeLoss], prompt: str) -> float:
    own = [row.loss for row in rows if row.prompt == prompt]
    assert len(own) == len(PROBED["t"])
    return sum(own) / len(own)


def test_a_model_with_other_weights_has_forgotten_and_the_base_itself_has_not(
    base: Sampler, text: torch.Tensor, tmp_path: Path
) -> None:
    drawn = DrawnProbes.of(base, Probes(prompts=PROMPTS, conditions="c"), text)
    assert drawn.pictures.shape == (2, 64, 64, 3) and drawn.pictures.dtype == torch.uint8
    before, again = drawn.losses(base, "base"), drawn.losses(base, "tuned")
    assert [row.loss for row in before] == [row.loss for row in again]
    (mean,) = {means(before, PROMPTS[0])}
    assert mean < 0.02, "the base knows what it drew"
    alone = DrawnProbes.of(base, Probes(prompts=PROMPTS[1:], conditions="c"), text[1:])
    assert (alone.pictures[0].int() - drawn.pictures[1].int()).abs().max() <= 1, "draws follow from the prompt"
    assert means(alone.losses(base, "base"), PROMPTS[1]) == pytest.approx(means(before, PROMPTS[1]), rel=1e-3)
    with torch.no_grad():
        for parameter in base.pipeline.unet.up_blocks.parameters():
            parameter.mul_(0.8)
    harmed = drawn.losses(base, "tuned")
    assert all(means(harmed, prompt) > 1.5 * means(before, prompt) for prompt in PROMPTS)
    figures = write_probes(drawn, [*before, *harmed], tmp_path)
    table = pq.read_table(tmp_path / "probes.parquet").to_pylist()
    tuned = [row["loss"] for row in table if row["way"] == "tuned"]
    assert figures["probe_loss_tuned"] == pytest.approx(sum(tuned) / len(tuned)) and len(table) == 16
    assert (tmp_path / "probes.png").stat().st_size > 1000


def test_the_loss_is_that_of_the_stock_pipelines_unet_for_the_schedulers_x_t(base: Sampler, text: torch.Tensor) -> None:
    pictures = torch.full((1, 64, 64, 3), 90, dtype=torch.uint8)
    drawn = DrawnProbes(Probes(prompts=PROMPTS[:1], conditions="c"), pictures, text[:1])
    (row,) = (row for row in drawn.losses(base, "base") if row.t == 400)
    noise = torch.randn((3, 64, 64), generator=torch.Generator().manual_seed(hash_seed("probe", PROMPTS[0], 400)))
    scheduler, t = DDPMScheduler.from_pretrained(TINY, subfolder="scheduler"), torch.tensor([400])
    x_t = scheduler.add_noise(torch.full((1, 3, 64, 64), 90 / 127.5 - 1), noise[None], t)
    with torch.no_grad():
        out = base.pipeline.unet(x_t, t, encoder_hidden_states=text[:1]).sample[:, :3]
    assert row.loss == pytest.approx(float((out - noise).square().mean()), rel=1e-4)


def test_every_flavour_has_its_probes_and_the_tiny_cascade_those_of_its_world() -> None:
    for flavour in PUBLISHED.values():
        assert len(set(flavour.probes)) == len(flavour.probes) == MOST_PROBES
    assert set(FLAVOURS["tiny-i"].probes) == set(BASE_CAPTIONS)
    words = [prompt.split()[1:] for prompt in FLAVOURS["tiny-i"].probes[:8]]
    assert {word for words_ in words for word in words_} == {
        word for name in BASE_CAPTIONS for word in name.split()[1:]
    }


def test_the_probes_are_those_asked_for_and_none_with_a_controlnet_or_without_stage1(small_run: SmallRun) -> None:
    def probes(*keys: str) -> tuple[str, ...]:
        return load_run(small_run.config, ("forgetting_probes=2", *keys)).config.probes

    assert probes() == FLAVOURS["tiny-i"].probes[:2]
    assert probes("stage1.controlnet=true", "stage1.controlnet_conditioning=grayscale") == ()
    folders = {stage: Path(FLAVOURS[f"tiny-{'i' * stage}"].repo) for stage in STAGES}
    requests = [
        samples_request(load_run(small_run.config, (f"forgetting_probes={count}",)), ["a"], folders, sample_inputs())
        for count in (0, 1, 2)
    ]
    assert len({request.fingerprint for request in requests}) == 3

"""Stage II from scratch: the product's loss teaches what inference feeds; the recipe of other trainers does not.

The parity tests hold the UNet's input equal to the stock pipeline's; this one shows that the difference decides what is
learnt. `pytest -rP tests/training/test_stage2_learns.py` prints the figures.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from training_parts import FOLDERS, recipe_of_other_trainers

from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.diffusion.loss import Text, low_res, to_model_range
from deepfloyd_core.models.unet import load_scheduler
from deepfloyd_core.training import forward as stage_loss
from deepfloyd_core.training.batches import Batch

STEPS, BATCH, RATE, EDGE = 140, 8, 6e-3, 16
TIMESTEPS, LEVELS = (100, 300, 500, 700, 900), (0, 250)
DIFFUSION, NOISING = load_scheduler(FOLDERS[2]), load_scheduler(FOLDERS[2], "image_noising_scheduler")


def new_unet() -> UNet2DConditionModel:
    """Stage II's traits (six channels in and out, the noise level as class label, attention to the text) in 215,318
    weights, which are the same for each recipe."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=EDGE, in_channels=6, out_channels=6, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", cross_attention_dim=32, attention_head_dim=16,
        cross_attention_norm="group_norm", only_cross_attention=True, norm_num_groups=4, act_fn="gelu",
        class_embed_type="timestep", time_embedding_act_fn="gelu", resnet_time_scale_shift="scale_shift",
        resnet_skip_time_act=True, resnet_out_scale_factor=1 / 0.7071, mid_block_scale_factor=1 / 0.7071,
    )  # fmt: skip


def pictures(count: int, seed: int) -> torch.Tensor:
    """Four drawn colours blended from corner to corner: uint8 (N, H, W, 3). Their downscale says nearly all of them."""
    corners = torch.rand((count, 3, 2, 2), generator=torch.Generator().manual_seed(seed))
    blended = F.interpolate(corners, (EDGE, EDGE), mode="bilinear", align_corners=True)
    return (blended * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def no_text(names: list[str]) -> Text:
    return Text(torch.zeros(len(names), 4, 32))


def trained(unet: UNet2DConditionModel) -> Iterator[float]:
    """Train with the product's loss and yield it, step by step."""
    config = StageConfig(model_flavour="tiny-ii", mixed_precision="no")
    context = stage_loss.TrainingContext(2, config, 0, unet, DIFFUSION, NOISING, no_text, torch.device("cpu"), Path())
    optimizer = torch.optim.AdamW(unet.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.05)
    for step in range(STEPS):
        batch = Batch(pictures(BATCH, step), [""] * BATCH, np.arange(BATCH))
        loss = stage_loss.batch_loss(context, stage_loss.prepare(context, batch, step, []))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield loss.item()


def loss_in_use(unet: UNet2DConditionModel) -> float:
    """Epsilon loss on what inference feeds, mean over TIMESTEPS and LEVELS, on pictures that were not trained on."""
    x_0, generator, losses = to_model_range(pictures(BATCH, STEPS)), torch.Generator().manual_seed(1), []
    enlarged = F.interpolate(low_res(x_0), (EDGE, EDGE), mode="bilinear", align_corners=True)
    for t, level in ((t, level) for t in TIMESTEPS for level in LEVELS):
        noise, low_res_noise = torch.randn((2, *x_0.shape), generator=generator)
        numbers, levels = torch.full((BATCH,), t), torch.full((BATCH,), level)
        x_t, condition = (
            DIFFUSION.add_noise(x_0, noise, numbers), NOISING.add_noise(enlarged, low_res_noise, levels)
        )  # fmt: skip
        with torch.inference_mode():
            fed = torch.cat([x_t, condition], dim=1)
            out = unet(fed, numbers, encoder_hidden_states=no_text([""] * BATCH).rows, class_labels=levels).sample
        losses.append(float((out[:, :3] - noise).square().mean()))
    return float(np.mean(losses))


@dataclass(frozen=True)
class Learnt:
    before: float  # in use
    training: float  # mean of the last 20 steps
    after: float  # in use


def learnt() -> Learnt:
    unet = new_unet()
    return Learnt(loss_in_use(unet), float(np.mean(list(trained(unet))[-20:])), loss_in_use(unet))


@pytest.mark.slow
def test_stage2_learns_what_inference_feeds_and_by_the_recipe_of_other_trainers_it_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = learnt()
    monkeypatch.setattr(stage_loss, "feed", recipe_of_other_trainers)
    other = learnt()
    for name, found in (("ours", ours), ("concat(x_t, x_t), label t", other)):
        print(f"| {name} | {found.training:.3f} | {found.before:.3f} | {found.after:.3f} |")
    assert ours.before == other.before > 1, "the same weights, and nothing learnt yet"
    assert ours.after < 0.1
    assert other.training < 0.1, "its own loss looks as well"
    assert other.after > 3 * ours.after

"""What the photographs of `stage2_learning.py` can teach an upscaler at all, without diffusion.

A residual network on top of bicubic enlargement, at the low-res size and trained by squared error alone, which is the best
thing for PSNR, on the same crops; its best moment is picked on the held-out pictures themselves, so it is an upper bound.
Beside it bicubic enlargement that is back-projected, which learns nothing.
"""

import argparse
import os
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from stage2_learning import eval_set, make_run
from worlds import prepare

from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import UPSCALE
from deepfloyd_core.crops.rows import read_row_list
from deepfloyd_core.diffusion.back_projection import back_projected
from deepfloyd_core.diffusion.loss import low_res, to_bytes, to_model_range
from deepfloyd_core.measures.comparison import enlarged
from deepfloyd_core.measures.pixel import mean_and_interval, psnr, ssim
from deepfloyd_core.training.batches import TrainingRows

CHANNELS, BLOCKS, BATCH, WINDOW, RATE = 32, 6, 8, 32, 1.5e-3
EVERY = 100  # steps between looks at the held-out pictures


class Residual(torch.nn.Module):
    """Low-res (B, 3, h, w) in [-1, 1] -> (B, 3, 4h, 4w): bicubic, and what convolutions at the low-res size add to it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(
                torch.nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), torch.nn.GELU(),
                torch.nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
            ) for _ in range(BLOCKS)
        )  # fmt: skip
        self.last = torch.nn.Conv2d(CHANNELS, 3 * UPSCALE**2, 3, padding=1)

    def forward(self, small: torch.Tensor) -> torch.Tensor:
        """Enlarge."""
        hidden = self.first(small)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return enlarged(small, "bicubic") + 0.3 * F.pixel_shuffle(self.last(hidden), UPSCALE)


def looks(steps: int, crops: torch.Tensor, held_out: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Train, and now and then enlarge the held-out low-res pictures. crops: (N, 3, H, W) in [-1, 1]."""
    torch.manual_seed(0)
    net, small, draw = Residual(), low_res(crops), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(net.parameters(), RATE)
    room = small.shape[-1] - WINDOW + 1
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - (step - 1) / steps)
        chosen = torch.randint(len(crops), (BATCH,), generator=draw)
        top, left = torch.randint(room, (2,), generator=draw).tolist()
        low = small[chosen, :, top : top + WINDOW, left : left + WINDOW]
        high = crops[chosen][..., UPSCALE * top : UPSCALE * (top + WINDOW), UPSCALE * left : UPSCALE * (left + WINDOW)]
        loss = (net(low) - high).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % EVERY == 0:
            with torch.no_grad():
                yield step, net(held_out).clamp(-1, 1)


def measured(pictures: torch.Tensor, truths: np.ndarray) -> np.ndarray:
    """PSNR and SSIM of each picture: (N, 2)."""
    made = to_bytes(pictures).numpy()
    return np.array([(psnr(one, two), ssim(one, two)) for one, two in zip(made, truths, strict=True)])


def main() -> None:
    """Read the arguments and make the run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--repeats", type=int, default=29, help="further crops of each picture")
    parser.add_argument("--debian", type=Path, help="as in stage2_learning.py")
    parser.add_argument("--folder", type=Path, help="that of stage2_learning.py, or a new one")
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; torch {torch.__version__}")
    wanted.inference_steps, wanted.threads, wanted.max_step_offset, wanted.batch = 8, 1, 0, BATCH
    with tempfile.TemporaryDirectory() as name:
        folder = wanted.folder or Path(name)
        folder.mkdir(exist_ok=True)
        compare(make_run(folder, "photographs", wanted, True), wanted.steps)


def compare(run: Run, steps: int) -> None:
    """Train the network on a run's crops, and print the means on its held-out pictures and what is gained on bicubic."""
    index, pixels = prepare(run, 2)
    held_out = eval_set(run, index)
    names = frozenset(read_row_list(held_out.path)["image_id"].to_pylist())
    truths, crops = TrainingRows(held_out, frozenset()), TrainingRows(pixels, names)
    (size,) = truths.counts
    true = truths.take(size, np.arange(truths.counts[size])).pixels
    small = low_res(to_model_range(true))
    taught = to_model_range(crops.take(size, np.arange(crops.counts[size])).pixels)
    bicubic = enlarged(small, "bicubic")
    found = {"bicubic": measured(bicubic, true.numpy())}
    found["bicubic, back-projected twice"] = measured(
        back_projected(back_projected(bicubic, small), small), true.numpy()
    )
    best = max(looks(steps, taught, small), key=lambda look: measured(look[1], true.numpy())[:, 0].mean())
    found[f"regression, after {best[0]} steps"] = measured(best[1], true.numpy())
    for name, figures in found.items():
        gain = (figures - found["bicubic"]).T
        ends = ["{:+.3f} ({:+.3f} to {:+.3f})".format(*mean_and_interval(list(one))) for one in gain]
        each = " ".join(f"{value:.1f}" for value in figures[:, 0])
        print(f"| {name} | {figures[:, 0].mean():.2f} | {figures[:, 1].mean():.4f} | {' | '.join(ends)} | {each} |")


if __name__ == "__main__":
    main()

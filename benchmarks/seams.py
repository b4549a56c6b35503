"""Do the windows of `upscale` show? `python benchmarks/seams.py`, some minutes on two cores.

Pictures of 1,024 px are scaled down to 256 and upscaled by the tiny cascade's Stage II through windows. A seam would be an
error (mean |difference| from the truth, levels of 255) that is larger along the borders of windows than elsewhere, or that
jumps there. Where the shapes lie moves the first by chance: the more pictures, the less.
"""

import argparse

import numpy as np
import torch
from PIL import Image

from deepfloyd_core.config.flavours import FLAVOURS
from deepfloyd_core.config.run_machine import Machine
from deepfloyd_core.config.run_text import TextKeys
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.diffusion.loss import to_bytes, to_model_range
from deepfloyd_core.measures import drawn_world
from deepfloyd_core.models.folders import resolve
from deepfloyd_core.sampling.jobs import SampledStage
from deepfloyd_core.sampling.sampler import Sampler, make_sampler, sample_upscaled
from deepfloyd_core.sampling.windows import OVERLAP_PX, WINDOW_PX, WindowedUnet, windows
from deepfloyd_core.text.encode import encode_prompts

EDGE, NEAR = 1024, 8  # px; of a border
PROMPT = "a purple star"


def windowed_sampler(steps: int) -> Sampler:
    """The tiny Stage II, with windows."""
    keys = {
        "model_flavour": "tiny-ii", "mixed_precision": "no", "validation_num_inference_steps": steps,
        "validation_guidance": 1.0, "validation_noise_level": 50,
    }  # fmt: skip
    one = SampledStage(stage=2, settings=StageConfig.model_validate(keys), model=resolve(FLAVOURS["tiny-ii"].repo, 2))
    made = make_sampler(one, None, Machine(device="cpu"), lambda _: None)
    made.pipeline.unet = WindowedUnet(made.pipeline.unet)
    return made


def errors(sampler: Sampler, truth: np.ndarray, text: torch.Tensor, seed: int) -> np.ndarray:
    """Mean |difference| from the truth of each pixel, (H, W), levels of 255."""
    small = Image.fromarray(truth).resize((EDGE // 4, EDGE // 4), Image.Resampling.BICUBIC)
    given = to_model_range(torch.from_numpy(np.array(small))[None])
    out = to_bytes(sample_upscaled(sampler, text[:1], text[1:], [seed], given))[0].numpy()
    found: np.ndarray = np.abs(out.astype(float) - truth).mean(axis=2)
    return found


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=6)
    parser.add_argument("--steps", type=int, default=8)
    wanted = parser.parse_args()
    sampler, machine = windowed_sampler(wanted.steps), Machine(device="cpu")
    folder = resolve(FLAVOURS["tiny-i"].repo, 1, text=True)
    text = encode_prompts([PROMPT, ""], "t5", folder, TextKeys(text_encoder_dtype="fp32"), machine)
    ends = {end for start, size in windows(EDGE, WINDOW_PX, OVERLAP_PX) for end in (start, start + size)} - {0, EDGE}
    near = np.zeros((EDGE, EDGE), bool)
    for end in ends:
        near[end - NEAR : end + NEAR] = True
        near[:, end - NEAR : end + NEAR] = True
    at, elsewhere, jumps, others = list[float](), list[float](), list[float](), list[float]()
    for number in range(wanted.pictures):
        truth = np.asarray(drawn_world.draw(np.random.default_rng(number), PROMPT, EDGE, EDGE))
        found = errors(sampler, truth, text, number)
        steps = np.abs(np.diff(found, axis=0)).mean(axis=1)
        at.append(found[near].mean())
        elsewhere.append(found[~near].mean())
        jumps.append(float(np.mean([steps[end - 1] for end in ends])))
        others.append(float(np.mean(steps)))
        print(f"picture {number}: error along borders {at[-1]:.3f}, elsewhere {elsewhere[-1]:.3f}", flush=True)
    for name, ours, theirs in (
        ("error along borders, elsewhere", at, elsewhere),
        ("jump there, elsewhere", jumps, others),
    ):
        print(f"| {name} | {np.mean(ours):.3f}, {np.mean(theirs):.3f} | {np.mean(ours) / np.mean(theirs):.3f} |")


if __name__ == "__main__":
    main()

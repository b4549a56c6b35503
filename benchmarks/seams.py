"""Do the windows of `upscale` show? `python benchmarks/seams.py`, some minutes on two cores.

Pictures of 1,024 px are scaled down to 256 and upscaled by the tiny cascade's Stage II, as a whole and through windows. A
seam would be an error (mean |difference| from the truth, levels of 255) that is larger along the borders of windows than
elsewhere, or that jumps there. Shapes lie where they lie, so both are told of pictures that were sampled as a whole, too.

With --photographs: parts of the only photograph of that size in scikit-image, the back of an eye. Each is upscaled twice,
the second time cut SHIFT px further: so the same places are compared with a border through them and without.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from photographs import photographs, upright_rgb

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

EDGE, NEAR, SHIFT = 1024, 8, 96  # px; NEAR: of a border
PROMPT = "a purple star"


def tiny_sampler(steps: int, windowed: bool) -> Sampler:
    """The tiny Stage II."""
    keys = {
        "model_flavour": "tiny-ii", "mixed_precision": "no", "validation_num_inference_steps": steps,
        "validation_guidance": 1.0, "validation_noise_level": 50,
    }  # fmt: skip
    one = SampledStage(stage=2, settings=StageConfig.model_validate(keys), model=resolve(FLAVOURS["tiny-ii"].repo, 2))
    made = make_sampler(one, None, Machine(device="cpu"), lambda _: None)
    if windowed:
        made.pipeline.unet = WindowedUnet(made.pipeline.unet)
    return made


def drawn(count: int) -> Iterator[np.ndarray]:
    """Pictures of the tiny cascade's world, uint8 (EDGE, EDGE, 3)."""
    for seed in range(count):
        yield np.asarray(drawn_world.draw(np.random.default_rng(seed), PROMPT, EDGE, EDGE))


def on_photographs(count: int, steps: int, text: torch.Tensor, near: np.ndarray) -> None:
    """Print the errors of the same places with a border and without. near: the pixels along borders, (EDGE, EDGE)."""
    rng, whole = np.random.default_rng(0), np.asarray(upright_rgb(photographs()["skimage/retina.jpg"]))
    sampler = tiny_sampler(steps, windowed=True)
    # Of the first cut, without its edges and those of the second.
    inner = slice(OVERLAP_PX + SHIFT, EDGE - OVERLAP_PX)
    moved = slice(inner.start - SHIFT, inner.stop - SHIFT)
    one, two = near[inner, inner], near[moved, moved]
    found: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for number in range(count):
        top, left = (int(rng.integers(0, edge - EDGE - SHIFT + 1)) for edge in whole.shape[:2])
        first, second = (
            errors(sampler, whole[top + by : top + by + EDGE, left + by : left + by + EDGE], text, number)
            for by in (0, SHIFT)
        )
        first, second = first[inner, inner], second[moved, moved]
        found[True] += [first[one & ~two], second[two & ~one]]
        found[False] += [second[one & ~two], first[two & ~one]]
    along, without = (float(np.concatenate(found[key]).mean()) for key in (True, False))
    told = f"with a border {along:.3f}, without {without:.3f}, {along / without - 1:+.2%}"
    print(f"error of the same places of {count} photographs: {told}")


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
    parser.add_argument("--photographs", action="store_true")
    wanted = parser.parse_args()
    folder, machine = resolve(FLAVOURS["tiny-i"].repo, 1, text=True), Machine(device="cpu")
    text = encode_prompts([PROMPT, ""], "t5", folder, TextKeys(text_encoder_dtype="fp32"), machine)
    ends = {end for start, size in windows(EDGE, WINDOW_PX, OVERLAP_PX) for end in (start, start + size)} - {0, EDGE}
    near = np.zeros((EDGE, EDGE), bool)
    for end in ends:
        near[end - NEAR : end + NEAR] = True
        near[:, end - NEAR : end + NEAR] = True
    if wanted.photographs:
        on_photographs(wanted.pictures, wanted.steps, text, near)
        return
    truths = list(drawn(wanted.pictures))
    ratios = {}
    print("| sampled | error along borders | elsewhere | ratio | jump there | elsewhere | ratio |")
    print("|---|---|---|---|---|---|---|")
    for name in ("whole", "through windows"):
        sampler = tiny_sampler(wanted.steps, windowed=name != "whole")
        found = [errors(sampler, truth, text, number) for number, truth in enumerate(truths)]
        steps = [np.abs(np.diff(each, axis=0)).mean(axis=1) for each in found]
        at, rest = (float(np.mean([each[where].mean() for each in found])) for where in (near, ~near))
        jump = float(np.mean([each[[end - 1 for end in ends]].mean() for each in steps]))
        usual = float(np.mean([each.mean() for each in steps]))
        ratios[name] = at / rest
        cells = f"{at:.3f} | {rest:.3f} | {at / rest:.4f} | {jump:.3f} | {usual:.3f} | {jump / usual:.4f}"
        print(f"| {name} | {cells} |", flush=True)
    print(f"windows move the ratio of the errors by {ratios['through windows'] / ratios['whole'] - 1:+.2%}")


if __name__ == "__main__":
    main()

"""LPIPS (Zhang et al. 2018): a distance of two pictures in a network's features, calibrated on human judgements.

PSNR rewards the blurred mean of all pictures that a low-res picture could show; this distance does not. Version 0.1 of
the authors' `lpips` package, written in torch alone: the package needs torchvision, reads pickles, and downloads its
trunk.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deepfloyd_core.files import sha256_file
from deepfloyd_core.measures.lpips_weights import (
    SCALE,
    SHIFT,
    Trunk,
    check_lpips_file,
    conv_name,
    lin_name,
    trunk_of,
)
from deepfloyd_core.measures.measure import Enlargement, Figures, MeasureFn, Network, Outputs

if TYPE_CHECKING:
    import numpy as np
    import torch

# uint8 pictures (H, W, 3) and their common ground truth, of their size -> distances, 0 when equal to it
Distances = Callable[[Sequence["np.ndarray"], "np.ndarray"], list[float]]
_EPS = 1e-10  # beside the length of a feature, as the package has it


def load_lpips(file: Path, device: "torch.device") -> MeasureFn:
    """The measure `lpips` with the weights of a file."""
    distances_to = load_distances(file, device)

    def look(outputs: Outputs) -> Figures:
        distances: dict[Enlargement, list[float]] = {enlargement: [] for enlargement in outputs.pictures}
        for place, truth in enumerate(
            outputs.truths
        ):  # outer loop, so that the features of a ground truth are computed once
            row = distances_to([pictures[place] for pictures in outputs.pictures.values()], truth)
            for parts, distance in zip(distances.values(), row, strict=True):
                parts.append(distance)
        return Figures({"lpips": distances}, {})

    return look


LPIPS = Network("eval_lpips_model", check_lpips_file, lambda file: sha256_file(file)[:16], load_lpips)


def load_distances(file: Path, device: "torch.device") -> Distances:
    """LPIPS in fp32, with the weights of a file that `check_lpips_file` has accepted.

    Eq. 1 of the paper: at each of five layers the feature vectors of every position are normalised to length 1; their
    squared differences are weighted by channel, summed, and averaged over the positions; the five figures are added.
    """
    import torch
    import torch.nn.functional as F
    from safetensors.torch import load_file

    from deepfloyd_core.diffusion.loss import to_model_range

    weights = load_file(file, str(device))
    trunk = trunk_of({name: tuple(tensor.shape) for name, tensor in weights.items()})
    assert trunk is not None  # the file was checked before the run

    def directions(picture: "np.ndarray") -> list[torch.Tensor]:
        layers = list(_features(to_model_range(torch.from_numpy(picture)[None]).to(device), trunk, weights))
        return [layer / (layer.square().sum(1, keepdim=True).sqrt() + _EPS) for layer in layers]

    def distance(seen: list[torch.Tensor], true: list[torch.Tensor]) -> float:
        pairs = enumerate(zip(seen, true, strict=True))
        return float(sum(F.conv2d((x - y).square(), weights[lin_name(place)]).mean() for place, (x, y) in pairs))

    @torch.no_grad()
    def distances(pictures: Sequence["np.ndarray"], truth: "np.ndarray") -> list[float]:
        true = directions(truth)
        return [distance(directions(picture), true) for picture in pictures]

    return distances


def _features(x: "torch.Tensor", trunk: Trunk, weights: dict[str, "torch.Tensor"]) -> Iterator["torch.Tensor"]:
    """The outputs of the trunk's slices for pictures (B, 3, H, W) in [-1, 1]: each (B, C, h, w).

    The file's shift and scale are ImageNet's mean and deviation, which torchvision's classifiers were trained with
    (0.485 0.456 0.406 and 0.229 0.224 0.225 of [0, 1]), converted to [-1, 1].
    """
    import torch.nn.functional as F

    x = (x - weights[SHIFT]) / weights[SCALE]
    for place, numbers in enumerate(trunk.slices):
        if place in trunk.pooled:
            x = F.max_pool2d(x, trunk.pool_px, stride=2)
        for number in numbers:
            first = number == 0
            stride, padding = (trunk.stride, trunk.padding) if first else (1, trunk.kernels[place] // 2)
            name = conv_name(place, number)
            x = F.relu(F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride, padding))
        yield x

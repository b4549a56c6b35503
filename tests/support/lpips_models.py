"""LPIPS's weights drawn at random in the layout of the `lpips` package, and the measure written a second time, in NumPy.

The layout is written out, as `{name: tuple(tensor.shape) for name, tensor in lpips.LPIPS(net=...).state_dict().items()}`
of version 0.1.4 gives it, and the networks as the paper's tables of AlexNet and VGG-16 have them.
"""

from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from safetensors.numpy import load_file, save_file

# slice, number, channels out and in, kernel
_CONVS = {
    "alex": ["1.0 64 3 11", "2.3 192 64 5", "3.6 384 192 3", "4.8 256 384 3", "5.10 256 256 3"],
    "vgg": [
        "1.0 64 3 3", "1.2 64 64 3", "2.5 128 64 3", "2.7 128 128 3", "3.10 256 128 3", "3.12 256 256 3",
        "3.14 256 256 3", "4.17 512 256 3", "4.19 512 512 3", "4.21 512 512 3", "5.24 512 512 3", "5.26 512 512 3",
        "5.28 512 512 3",
    ],
}  # fmt: skip
# What is done to a picture, in order: a convolution (name, stride, padding) and its ReLU, a max-pooling (edge), or a look.
_STEPS = {
    "alex": "1.0/4/2 look pool3 2.3/1/2 look pool3 3.6/1/1 look 4.8/1/1 look 5.10/1/1 look",
    "vgg": "1.0/1/1 1.2/1/1 look pool2 2.5/1/1 2.7/1/1 look pool2 3.10/1/1 3.12/1/1 3.14/1/1 look "
    "pool2 4.17/1/1 4.19/1/1 4.21/1/1 look pool2 5.24/1/1 5.26/1/1 5.28/1/1 look",
}


def random_weights(kind: str, seed: int) -> dict[str, np.ndarray]:
    """A state dict. Weights of a deviation that keeps the features' size; LPIPS's own are not negative."""
    rng, found = np.random.default_rng(seed), {}
    for line in _CONVS[kind]:
        name, out, channels, kernel = line.split()
        shape = (int(out), int(channels), int(kernel), int(kernel))
        found[f"net.slice{name}.weight"] = rng.standard_normal(shape, np.float32) * (2 / np.prod(shape[1:])) ** 0.5
        found[f"net.slice{name}.bias"] = rng.standard_normal(shape[0], np.float32) / 10
        found[f"lin{int(name[0]) - 1}.model.1.weight"] = rng.random((1, shape[0], 1, 1), np.float32)
    found["scaling_layer.shift"] = np.array([-0.030, -0.088, -0.188], np.float32)[None, :, None, None]
    found["scaling_layer.scale"] = np.array([0.458, 0.448, 0.450], np.float32)[None, :, None, None]
    return {name: value.astype(np.float32) for name, value in found.items()}


def save_lpips(file: Path, kind: str = "alex", seed: int = 0) -> Path:
    """A file of random weights."""
    save_file(random_weights(kind, seed), file)
    return file


def lpips_by_hand(file: Path, kind: str, picture: np.ndarray, truth: np.ndarray) -> float:
    """LPIPS of two uint8 pictures (H, W, 3), in float64 and without torch."""
    weights, total = load_file(file), 0.0
    looks = zip(_looks(weights, kind, picture), _looks(weights, kind, truth), strict=True)
    for place, (seen, true) in enumerate(looks):
        learned = weights[f"lin{place}.model.1.weight"].astype(np.float64).reshape(-1)
        one, other = (look / (np.sqrt((look**2).sum(2, keepdims=True)) + 1e-10) for look in (seen, true))
        total += float(((one - other) ** 2 @ learned).mean())
    return total


def _looks(weights: dict[str, np.ndarray], kind: str, picture: np.ndarray) -> list[np.ndarray]:
    """Features (h, w, C) of the five layers."""
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    x, looks = (picture / 255 - mean) / deviation, []
    for step in _STEPS[kind].split():
        if step == "look":
            looks.append(x)
        elif step.startswith("pool"):
            edge = int(step[4:])
            x = sliding_window_view(x, (edge, edge), (0, 1))[::2, ::2].max((3, 4))
        else:
            name, stride, padding = step.split("/")
            kernel = weights[f"net.slice{name}.weight"].astype(np.float64)  # (out, in, k, k)
            x = np.pad(x, ((int(padding),) * 2, (int(padding),) * 2, (0, 0)))
            windows = sliding_window_view(x, kernel.shape[2:], (0, 1))[:: int(stride), :: int(stride)]
            x = np.maximum(np.tensordot(windows, kernel, ([2, 3, 4], [1, 2, 3])) + weights[f"net.slice{name}.bias"], 0)
    return looks

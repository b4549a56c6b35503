"""T5's frozen weights in 8 or 4 bits, by torchao: only those of linear layers; products stay in the layer's dtype.

`int8`: a scale for each row, half of bf16's bytes, 0.4 % error. `nf4`: QLoRA's 4-bit normal float (Dettmers et al.
2023) in blocks of 64, a quarter of the bytes, 9 % error. torchao is an extra: it takes seconds to import, and most runs
need none.
"""

import math
from typing import TYPE_CHECKING

from deepfloyd_core.config.extras import Quantization

if TYPE_CHECKING:
    import torch

_BLOCK, _SCALES = 64, 256  # NF4: values to a scale, scales that are quantised together


def quantize(module: "torch.nn.Module", quantization: Quantization) -> None:
    """Quantise the weights of a module's linear layers in place. Agrees with torchao's Int8WeightOnlyConfig, to_nf4."""
    if quantization == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(module, Int8WeightOnlyConfig())
    elif quantization == "nf4":
        import torch
        from torchao.quantization import to_nf4

        for layer in module.modules():
            if isinstance(layer, torch.nn.Linear) and layer.weight.numel() % _BLOCK == 0:
                together = math.gcd(layer.weight.numel() // _BLOCK, _SCALES)
                small = to_nf4(layer.weight.detach(), _BLOCK, together)
                layer.weight = torch.nn.Parameter(small, requires_grad=False)

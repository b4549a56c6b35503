"""Calculates what a training step costs, on fake tensors: they have shapes and no values, so no weights are read.

The step is the trainer's own: its model with adapters, its attention, its recomputing, forward and backward. Every
storage that it would allocate is counted until it would be freed, and every operation with its products and bytes. It
takes 4 to 8 s, whatever the model's size. The
tensors are those of a CPU: builds of torch without CUDA have no others.

`python -P -m deepfloyd_core.training.measured_costs REQUEST` prints the record of a request, both as JSON.
"""

import sys
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from deepfloyd_core.adapters.method import base_dtype, method_of
from deepfloyd_core.config.stages import STAGES
from deepfloyd_core.diffusion.loss import Text, predict, squared_error
from deepfloyd_core.models.memory import Counted, default_dtype
from deepfloyd_core.models.operations import Operations
from deepfloyd_core.models.quantized import frozen_bytes, quantize_frozen
from deepfloyd_core.models.unet import DTYPES, autocast, order_frozen_channels_last, unet_on_meta
from deepfloyd_core.models.work import Work
from deepfloyd_core.text.projection import text_is_frozen
from deepfloyd_core.training.attention import set_attention
from deepfloyd_core.training.costs import CostRequest, StepCosts
from deepfloyd_core.training.recompute import recompute_activations

_CPU = torch.device("cpu")


def step_costs(request: CostRequest) -> StepCosts:
    """The record of a step. Raises ConfigError when no layer has the name of an adapter's target."""
    kept, recomputed = (_Model(request, recomputes) for recomputes in (False, True))
    one, two = (kept.step(batch) for batch in (1, 2))
    one_again, two_again = (recomputed.step(batch) for batch in (1, 2))
    drawn, drawn_two = (kept.call(pictures) for pictures in (1, 2))
    params = [param for param in kept.unet.parameters() if param.requires_grad]
    return StepCosts(
        frozen=frozen_bytes(kept.unet),
        trained=sum(param.numel() for param in params),
        trained_bytes=sum(param.nbytes for param in params),
        kept=(one.peak, two.peak),
        recomputed=(one_again.peak, two_again.peak),
        sampled=(drawn.peak, drawn_two.peak),
        kept_blocks=one.blocks,
        recomputed_blocks=one_again.blocks,
        trained_tensors=len(params),
        kept_work=(one.work, two.work),
        recomputed_work=(one_again.work, two_again.work),
        sampled_work=(drawn.work, drawn_two.work),
    )


@dataclass(frozen=True)
class _Cost:
    peak: int
    blocks: tuple[int, ...]
    work: Work


class _Model:
    """The trainer's UNet of fake tensors."""

    def __init__(self, request: CostRequest, recomputes: bool) -> None:
        self.config, self.size = request.settings, request.size
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with torch.device("meta"), default_dtype(base_dtype(self.config)):
            self.unet = unet_on_meta(request.unet, text_is_frozen(self.config))
            self.unet.requires_grad_(False)
            quantize_frozen(self.unet, self.config.base_model_precision, base_dtype(self.config))
            method_of(self.config).prepare(self.unet, self.config, 0)
        _make_fake(self.unet, self.mode)
        set_attention(self.unet, self.config.attention_mechanism)
        if recomputes:
            recompute_activations(self.unet)
        with self.mode:
            for _ in order_frozen_channels_last(self.unet):
                pass

    def step(self, batch: int) -> _Cost:
        """A forward and a backward pass."""
        self.unet.train()
        found = self._counted(batch, with_gradients=True)
        self.unet.zero_grad()
        return found

    def call(self, pictures: int) -> _Cost:
        """A call of the UNet without gradients."""
        self.unet.eval()
        with torch.no_grad():
            return self._counted(pictures, with_gradients=False)

    def _counted(self, batch: int, with_gradients: bool) -> _Cost:
        counted, operations = Counted([param.untyped_storage() for param in self.unet.parameters()]), Operations()
        with self.mode:
            inputs = self._inputs(batch)
            with counted, operations:
                eps = self._predict(*inputs)
                if with_gradients:
                    squared_error(eps, torch.empty_like(eps, dtype=torch.float32)).mean().backward()
                del eps
        return _Cost(counted.peak, tuple(counted.blocks), operations.work)

    def _predict(
        self, x: torch.Tensor, t: torch.Tensor, text: Text, level: torch.Tensor | None, control: torch.Tensor | None
    ) -> torch.Tensor:
        with autocast(_CPU, self.config.mixed_precision):
            return predict(self.unet, x, t, text, level, control)[0]

    def _inputs(self, batch: int) -> tuple[torch.Tensor, torch.Tensor, Text, torch.Tensor | None, torch.Tensor | None]:
        """As `forward.predict_noise` has them."""
        stage, dtype, (width, height) = (
            STAGES[self.config.flavour.stage],
            DTYPES[self.config.mixed_precision],
            self.size,
        )
        x = torch.empty(batch, 6 if stage.is_upscaler else 3, height, width, dtype=dtype)
        t = torch.zeros(batch, dtype=torch.long)
        if text_is_frozen(self.config):
            rows = torch.empty(batch, 77, self.unet.config.cross_attention_dim, dtype=dtype)
            text = Text(rows, torch.empty(batch, self.unet.time_embedding.linear_2.out_features))
        else:
            text = Text(torch.empty(batch, 77, self.unet.config.encoder_hid_dim, dtype=dtype))
        control = torch.empty(batch, 3, height, width) if self.config.controlnet else None
        return x, t, text, t if stage.is_upscaler else None, control


def _make_fake(unet: UNet2DConditionModel, mode: FakeTensorMode) -> None:
    """Replace a UNet's tensors, which lie on `meta`, by fake ones of a CPU; shared ones stay shared."""
    known: dict[int, torch.Tensor] = {}
    for module in unet.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in known:
                    known[id(tensor)] = _fake(tensor, mode)
                tensors[name] = known[id(tensor)]


def _fake(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    fake = FakeTensor(mode, tensor.detach().to("meta"), _CPU)
    return torch.nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else fake


if __name__ == "__main__":
    sys.stdout.write(step_costs(CostRequest.model_validate_json(sys.argv[1])).model_dump_json())

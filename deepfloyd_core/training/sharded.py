"""A UNet that is trained whole, spread over the ranks of a training: torch's FSDP2 (`fully_shard`).

Of each tensor a rank holds an equal part of the rows, with its gradient, its optimizer's state and its moving average; a
block's weights are whole while it is computed. So what a rank holds between two steps is the share of one of them. All
ranks make the same forward and backward passes, because each gathers from the others.

The optimizer sees this rank's parts as plain tensors, so it must update each number by itself (`OptimizerKind.by_number`).
Whatever is not a training step, validations, the product and its checks, has a plain UNet with all weights.
"""

from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from deepfloyd_core.training.ranks import lost_peers


class Shards:
    """The weights of a UNet, of which each rank holds its parts."""

    def __init__(
        self, unet: UNet2DConditionModel, ranks: int, device: torch.device, plain: Callable[[], UNet2DConditionModel]
    ) -> None:
        """Spread a UNet, which is on the device; it is changed. plain: makes another one on the device, with any weights."""
        mesh = init_device_mesh(device.type, (ranks,))
        with lost_peers():
            for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks, unet):
                fully_shard(block, mesh=mesh)
        for module in unet.modules():
            if isinstance(module, FSDPModule):  # the loss is a mean over the step, so ranks' gradients are summed
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo cannot multiply while it sums
        self._plain, self._held = plain, {name: _spread(param) for name, param in unet.named_parameters()}
        self.parts = {name: torch.nn.Parameter(held.detach().to_local()) for name, held in self._held.items()}

    def clip(self, most: float) -> float:
        """Hand the gradients of a step, summed over the ranks, to the parts; their norm is at most `most`. Returns the norm
        before. All ranks call it.
        """
        with lost_peers():
            norm = torch.nn.utils.clip_grad_norm_(list(self._held.values()), most)
            whole = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        for name, held in self._held.items():
            self.parts[name].grad = None if held.grad is None else _spread(held.grad).to_local()
            held.grad = None
        return whole

    def is_part(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether a tensor of a parameter's state has a number for each of this rank's."""
        return tensor.dim() > 0 and tensor.shape == self.parts[name].shape

    def whole(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """What every rank has a part of, on the CPU. All ranks call it, with the same parameter's parts."""
        held = self._held[name]
        own = part.detach().to(held.device)
        with lost_peers():
            spread = DTensor.from_local(
                own, held.device_mesh, held.placements, run_check=False, shape=held.shape, stride=held.stride()
            )
            whole: torch.Tensor = spread.full_tensor()
        return whole.cpu()

    def part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of what has a number for each of a parameter's; anything else as it is."""
        held = self._held[name]
        if whole.shape != held.shape:
            return whole
        rows = -(-len(whole) // held.device_mesh.size())
        first = rows * held.device_mesh.get_local_rank()
        return whole[first : first + rows].clone()

    def whole_unet(self) -> UNet2DConditionModel:
        """A plain UNet with the weights as they are now. All ranks call it, and each gets one."""
        unet = self._plain()
        with torch.no_grad():
            for name, param in unet.named_parameters():
                param.copy_(self.whole(name, self.parts[name]))
        return unet


def _spread(tensor: torch.Tensor) -> DTensor:
    assert isinstance(tensor, DTensor)  # fully_shard has made it one
    return tensor

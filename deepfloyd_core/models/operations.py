"""Counts the operations of torch in a block: their products, their bytes and their number. Also those on fake tensors."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from deepfloyd_core.models.work import Work

_EMPTY = (torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.empty_strided)
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Operations(TorchDispatchMode):
    """What was computed in its block so far is in `work`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._flops = self._bytes = self._calls = 0

    @property
    def work(self) -> Work:
        """The sums."""
        return Work(flops=self._flops, bytes=self._bytes, calls=self._calls)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace != "prim":  # of a fake tensor even its device is asked that way
            self._flops += _flops(func._overloadpacket, args, kwargs or {}, out)
            self._bytes += _bytes(func, (args, kwargs), out)
            self._calls += 1
        return out


def _bytes(func: Any, given: Any, out: Any) -> int:
    """Of all tensors; of a view, and of new memory, none is touched."""
    inputs, outputs = _tensors(given), _tensors(out)
    held = {tensor.untyped_storage()._cdata for tensor in inputs}
    is_view = not func._schema.is_mutable and all(tensor.untyped_storage()._cdata in held for tensor in outputs)
    if is_view or func._overloadpacket in _EMPTY:
        return 0
    return sum(tensor.nbytes for tensor in (*inputs, *outputs))


def _flops(operation: Any, args: Any, kwargs: Any, out: Any) -> int:
    # torch's own counter does not know the attention of a CPU.
    if operation is _ATTENTION:
        return int(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))
    if operation is _ATTENTION_BACKWARD:
        return int(sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4])))
    count = flop_registry.get(operation)
    return 0 if count is None else int(count(*args, **kwargs, out_val=out))


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]

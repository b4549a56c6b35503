"""Arrow files on disk as tables and tensors that share their pages."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    import torch


def mapped_table(path: Path) -> pa.Table:
    """The table of an Arrow file, memory-mapped; its descriptor is given back, so that thousands can be open."""
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


def mapped_tensor(raw: np.ndarray, dtype: str) -> "torch.Tensor":
    """Bytes (uint8, any number of values) as a flat tensor of `bf16` or `fp32` that shares them. Never write to it."""
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(raw).view({"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])

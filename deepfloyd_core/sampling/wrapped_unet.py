"""What a module needs that takes the place of a pipeline's UNet."""

from typing import Any

import torch


class WrappedUnet(torch.nn.Module):
    """A UNet whose inputs or outputs are changed on the way: for the pipeline it looks like the UNet."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    @property
    def config(self) -> Any:
        """Of the UNet."""
        return self.unet.config

    @property
    def dtype(self) -> torch.dtype:
        """Of the UNet."""
        found: torch.dtype = self.unet.dtype
        return found

    @property
    def device(self) -> torch.device:
        """Of the UNet."""
        found: torch.device = self.unet.device
        return found

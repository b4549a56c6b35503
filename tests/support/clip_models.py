"""A small CLIP model with random weights, and what transformers itself says of pictures with it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch


def save_clip(folder: Path) -> Path:
    """A CLIP model with random weights, as transformers saves one."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**small, "vocab_size": 64, "max_position_embeddings": 8},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def features(folder: Path, shown: Sequence[np.ndarray]) -> np.ndarray:
    """CLIPModel.get_image_features, each brought to length 1: (N, E)."""
    from transformers import CLIPImageProcessor, CLIPModel

    given = CLIPImageProcessor.from_pretrained(folder)(list(shown), return_tensors="pt")
    with torch.no_grad():
        found = CLIPModel.from_pretrained(folder).eval().get_image_features(given["pixel_values"])
    found = getattr(found, "pooler_output", found)  # transformers 5 wraps them
    unit: np.ndarray = torch.nn.functional.normalize(found, dim=1).numpy()
    return unit

"""Measures from CLIP (Radford et al. 2021), for users who have a folder with a model; none is shipped or downloaded.

PSNR and SSIM reward the blurred mean of all pictures that a low-res picture could show; a learned network does not. One
model gives two figures: how similar a picture and its ground truth are, and how similar two sets of pictures are as
sets, regardless of which picture belongs to which.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deepfloyd_core.config.base import is_file
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.files import parsed_json
from deepfloyd_core.measures.measure import Figures, MeasureFn, Network, Outputs
from deepfloyd_core.models.identity import model_fingerprint

if TYPE_CHECKING:
    import numpy as np
    import torch

# uint8 pictures (H, W, 3) -> their embeddings, float64 (N, E), each of length 1
Embed = Callable[[Sequence["np.ndarray"]], "np.ndarray"]
FEWEST_OF_A_SET = 10
_FILES = ("config.json", "model.safetensors", "preprocessor_config.json")
_BATCH = 16


def check_clip_folder(folder: Path) -> None:
    """Raises ConfigError unless a folder holds a CLIP model as transformers saves it, in safetensors. Loads nothing."""
    lacking = [name for name in _FILES if not is_file(folder / name)]
    if lacking:
        raise ConfigError(
            f"eval_clip_model is {str(folder)!r}, which has no {', no '.join(lacking)}. Give a folder of a CLIP "
            "model, for example from `hf download openai/clip-vit-base-patch32 --local-dir FOLDER`, or remove the "
            "key."
        )
    # Of a picture encoder alone transformers' file may not say the size of its embeddings, and is then loaded at random.
    try:
        kind = parsed_json((folder / "config.json").read_bytes()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"eval_clip_model is {str(folder)!r}, whose config.json cannot be read: {error}. Download it again."
        ) from None
    if kind != "clip":
        raise ConfigError(
            f"eval_clip_model is {str(folder)!r}, a model of the type {kind!r}; a whole CLIP model is needed."
        )


def load_clip(folder: Path, device: "torch.device") -> MeasureFn:
    """The measures `clip` and `clip_distance` with the model of a folder."""
    embed = load_embed(folder, device)

    def look(outputs: Outputs) -> Figures:
        truths, likeness, distances = embed(outputs.truths), {}, {}
        for enlargement, pictures in outputs.pictures.items():
            embedded = embed(pictures)
            likeness[enlargement] = alike(embedded, truths)
            distances[enlargement] = set_distance(embedded, truths)
        return Figures({"clip": likeness}, {"clip_distance": distances})

    return look


CLIP = Network("eval_clip_model", check_clip_folder, lambda folder: model_fingerprint(folder, ("",)), load_clip)


def load_embed(folder: Path, device: "torch.device") -> Embed:
    """CLIP's picture encoder of a folder, in fp32. Agrees with transformers' CLIPModel.get_image_features, normalised."""
    import torch
    from transformers import CLIPImageProcessor, CLIPModel

    model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    model = model.to(device, torch.float32).eval()
    processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)

    @torch.no_grad()
    def embed(pictures: Sequence["np.ndarray"]) -> "np.ndarray":
        parts = []
        for start in range(0, len(pictures), _BATCH):
            inputs = processor(list(pictures[start : start + _BATCH]), return_tensors="pt").to(device)
            pooled = model.vision_model(pixel_values=inputs["pixel_values"]).pooler_output
            parts.append(model.visual_projection(pooled).double().cpu())
        embedded = torch.cat(parts)
        unit: np.ndarray = (embedded / embedded.norm(dim=1, keepdim=True)).numpy()
        return unit

    return embed


def alike(pictures: "np.ndarray", truths: "np.ndarray") -> list[float]:
    """Cosine of the embeddings (N, E) of each picture and its ground truth: 1 when CLIP sees no difference."""
    return [float(cosine) for cosine in (pictures * truths).sum(1)]


def set_distance(pictures: "np.ndarray", truths: "np.ndarray") -> float | None:
    """Kernel distance of two sets of embeddings (N, E): the unbiased squared MMD with (x.y + 1)^3. None below ten of a set.

    The estimator of KID (Binkowski et al. 2018, eq. 3) with CLIP in Inception's place, as Jayasumana et al. 2024 advise.
    Embeddings have length 1, so x.y is not divided by E. Near 0 for sets alike; below it by chance.
    """
    if min(len(pictures), len(truths)) < FEWEST_OF_A_SET:
        return None

    def within(rows: "np.ndarray") -> float:
        kernel = (rows @ rows.T + 1) ** 3
        return float((kernel.sum() - kernel.trace()) / (len(rows) * (len(rows) - 1)))

    return within(pictures) + within(truths) - 2 * float(((pictures @ truths.T + 1) ** 3).mean())

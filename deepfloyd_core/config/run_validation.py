"""Which samples a run makes, while it trains and for its bundle, and how these are measured."""

from typing import Annotated, Literal

from pydantic import Field

from deepfloyd_core.config.base import HomePath, Spec
from deepfloyd_core.config.flavours import MOST_PROBES
from deepfloyd_core.config.keys import CONTENT, NOTHING, key
from deepfloyd_core.config.stage_sampling import SAMPLED
from deepfloyd_core.config.stages import UPSCALERS

MOST_PICTURES = 4096  # that can be asked for, of each prompt


class ValidationKeys(Spec):
    """Which samples are made, and how they are measured."""

    validation_prompt: str | Annotated[tuple[str, ...], Field(strict=False)] = key(
        "",
        says="Prompt (or prompts) of the samples; unset: the most frequent caption.",
        makes=("embeds", "validation", "samples"),
    )
    validation_negative_prompt: str = key(
        "", says="Negative prompt of the samples.", makes=("embeds", "low_res", *SAMPLED)
    )
    validation_resolution: str | int = key(
        "64",
        says="Sizes of Stage I's samples (width x height), e.g. 64 or 96x64, or several: 64,96x64. In a run of "
        "Stage II alone, of Stage II's.",
        makes=SAMPLED,
    )
    validation_seed: int = key(
        0, ge=0, lt=2**32, says="Seed of the first sample; the next ones count up.", makes=("validation", "samples")
    )
    num_validation_images: int = key(
        4,
        ge=1,
        le=MOST_PICTURES,
        says="Stage I samples for each prompt; with `controlnet` conditioning pictures.",
        makes=("validation", "samples"),
    )
    num_upscaled_images: int = key(
        4, ge=1, le=MOST_PICTURES, says="How many of them Stage II upscales.", makes=("validation", "samples")
    )
    eval_clip_model: HomePath | None = key(
        None,
        stages=UPSCALERS,
        says="Folder of a CLIP model (transformers', in safetensors): Stage II's held-out pictures are also "
        "measured by its embeddings.",
        makes=CONTENT,
    )
    eval_lpips_model: HomePath | None = key(
        None,
        stages=UPSCALERS,
        says="File of LPIPS's weights (the `lpips` package's, in safetensors): Stage II's held-out pictures are "
        "also measured by LPIPS.",
        makes=CONTENT,
    )
    sample_measure: Literal["drawn_world"] | None = key(
        None,
        says="`drawn_world`: measure the share of samples that show their prompt (flat shapes only).",
        makes=("samples",),
    )

    forgetting_probes: int = key(
        8,
        ge=0,
        le=MOST_PROBES,
        says="Forgetting is measured on so many prompts of the base model's own world: on pictures that the base draws of "
        "them the trained Stage I should predict the noise as well as before. 0: not measured, as with a ControlNet.",
        makes=("embeds", "samples"),
    )
    gate: Literal["auto", "manual", "off"] = key(
        "auto",
        says="Which new version serves (`latest`). `auto`: one that passes all rules of the gate; others are blocked. "
        "`manual`: none until `deepfloyd promote`. `off`: each; the rules are still reported.",
        makes=NOTHING,
    )
    gate_tolerance: float = key(
        0.1,
        ge=0,
        lt=1,
        says="Share of what the version that serves has gained over the base, in held-out loss and in the upscaler's "
        "measures, that a new version may lose: two trainings on the same pictures differ by chance. 0: none.",
        makes=NOTHING,
    )

    @property
    def sample_sizes_px(self) -> tuple[tuple[int, int], ...]:
        """(width, height) of the samples, each once. Raises ValueError when they are not of the form 64 or 64,96x64."""
        return sizes_px(str(self.validation_resolution), "validation_resolution")

    @property
    def prompts(self) -> tuple[str, ...]:
        """The validation prompts; empty when the most frequent caption is to be used."""
        if isinstance(self.validation_prompt, str):
            return (self.validation_prompt,) if self.validation_prompt else ()
        return self.validation_prompt


def sizes_px(text: str, name: str) -> tuple[tuple[int, int], ...]:
    """(width, height) of sizes such as `64` or `64,96x64`, each once. Raises ValueError. name: for its message."""
    sizes = []
    for one in text.lower().split(","):
        parts = one.strip().split("x")
        if not all(part.isdecimal() for part in parts) or len(parts) > 2:
            raise ValueError(f"{name} is {text!r}; give sizes, for example 64 or 64,96x64")
        sizes.append((int(parts[0]), int(parts[-1])))
    return tuple(dict.fromkeys(sizes))

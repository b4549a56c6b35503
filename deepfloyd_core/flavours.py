"""The one table of model flavours: where the weights are, which stage they serve, which sizes are legal."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from deepfloyd_core.errors import ConfigError, ModelError
from deepfloyd_core.spec import is_there

Stage = Literal[1, 2]
STAGES: tuple[Stage, ...] = (1, 2)
UPSCALE = 4  # Stage II makes 4x4 pixels of each of Stage I's
TINY = Path(__file__).parent / "tiny"
RANDOM = "random:"  # before a name: the same architecture with random weights


@dataclass(frozen=True)
class Flavour:
    """One published (or shipped) UNet."""

    name: str
    stage: Stage
    repo: str  # hub id, a directory for the shipped ones, the name itself for random weights
    size_px: int  # the native edge of its output
    alignment_px: int  # every edge must divide by this: IF-I halves three times, Stage II makes four times its sizes


_TABLE = (
    Flavour("i-medium-400m", 1, "DeepFloyd/IF-I-M-v1.0", 64, 8),
    Flavour("i-large-900m", 1, "DeepFloyd/IF-I-L-v1.0", 64, 8),
    Flavour("i-xlarge-4.3b", 1, "DeepFloyd/IF-I-XL-v1.0", 64, 8),
    Flavour("ii-medium-450m", 2, "DeepFloyd/IF-II-M-v1.0", 256, 32),
    Flavour("ii-large-1.2b", 2, "DeepFloyd/IF-II-L-v1.0", 256, 32),
    Flavour("tiny-i", 1, str(TINY / "i"), 64, 8),
    Flavour("tiny-ii", 2, str(TINY / "ii"), 256, 32),
)
PUBLISHED = {flavour.name: flavour for flavour in _TABLE}
_RANDOM = [replace(flavour, name=RANDOM + flavour.name, repo=RANDOM + flavour.name) for flavour in _TABLE]
FLAVOURS = PUBLISHED | {flavour.name: flavour for flavour in _RANDOM}


def flavour(name: str) -> Flavour:
    """Look a flavour up. Raises ConfigError naming the known ones."""
    if name not in FLAVOURS:
        raise ConfigError(f"model_flavour is {name!r}; known are {', '.join(PUBLISHED)}.")
    return FLAVOURS[name]


# What a stock pipeline of one stage needs; `text` marks what only the text encoder's process reads.
_UNET_FILES = ("unet/config.json", "unet/*.safetensors", "scheduler/scheduler_config.json")
_STAGE2_FILES = ("image_noising_scheduler/scheduler_config.json",)
_TEXT_FILES = ("text_encoder/config.json", "text_encoder/*.safetensors", "tokenizer/tokenizer_config.json")


def resolve(model: str, stage: Stage, text: bool = False) -> Path:
    """The local folder of a model given as a directory, a hub id or `random:<flavour>`; downloads or writes it if it must.

    `text`: the text encoder and tokenizer are needed as well. Raises ModelError that lists the missing files and how
    to get them: a directory lacks some, the hub cannot be reached, the licence is not accepted.
    """
    wanted = _UNET_FILES + (_STAGE2_FILES if stage == 2 else ()) + (_TEXT_FILES if text else ())
    folder = Path(model)
    if model in FLAVOURS and model.startswith(RANDOM):
        from deepfloyd_core.random_models import random_folder

        folder = random_folder(model, text)
    elif not is_there(folder) or not folder.is_dir():
        if folder.is_absolute() or model.count("/") != 1:
            raise ModelError(f"{model} is not a directory, nor a hub id of the form owner/name.")
        folder = _download(model, wanted)
    missing = [pattern for pattern in wanted if not any(folder.glob(pattern))]
    if missing:
        raise ModelError(f"{folder} lacks {', '.join(missing)}. Put these files there (safetensors only, no .bin).")
    return folder


def _download(repo: str, wanted: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    patterns = [*wanted, "model_index.json", "tokenizer/*", "unet/*.json", "text_encoder/*.json"]
    patterns = [pattern for pattern in patterns if "text_encoder/*.safetensors" in wanted or "tokenizer" not in pattern]
    files = ", ".join(wanted)
    accept = f"Accept the licence at https://huggingface.co/{repo} and run `hf auth login`"
    local = "or point pretrained_model_name_or_path at a directory that holds them"
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns, ignore_patterns=["*.bin", "*.fp16.*"]))
    except GatedRepoError:
        raise ModelError(f"{repo} is gated: {files} cannot be read. {accept}, {local}.") from None
    except (HfHubHTTPError, OSError) as error:
        if away := _why_away(error):
            raise ModelError(f"Of {repo} this machine lacks {files}, and {away}, {local}.") from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{repo} could not be had ({reason}); needed: {files}. {accept}, {local}.") from None


def _why_away(error: Exception) -> str:
    """Why the hub was not asked, or did not answer, and what to do; empty where it answered, or the fault is another."""
    from huggingface_hub import constants, is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if not isinstance(error, LocalEntryNotFoundError) or isinstance(error.__cause__, HfHubHTTPError):
        return ""
    if is_offline_mode():
        return "HF_HUB_OFFLINE forbids to download it. Unset that"
    return f"the hub at {constants.ENDPOINT} cannot be reached ({error.__cause__}). Run this again when it can"

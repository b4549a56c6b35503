"""Repositories of the Hugging Face Hub: the files of one that are needed, here or downloaded."""

import re
from collections.abc import Sequence
from pathlib import Path

from deepfloyd_core.errors import ModelError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NEVER = ["*.bin", "*.fp16.*"]
OTHERWISE = "or give the folder of a copy on this machine"
_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")  # ends of a path, and of no repository


def is_hub_id(name: str) -> bool:
    """Whether a name may be that of a repository, `owner/name`; a path may look so too."""
    return _ID.fullmatch(name) is not None and not name.endswith(_FILES)


def snapshot_here(repo: str, patterns: Sequence[str]) -> Path | None:
    """What is here of the files of a repository by patterns; None: nothing, or not all that is known of, or no name that the
    hub knows. Uses no network.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(repo, local_files_only=True, allow_patterns=list(patterns), ignore_patterns=_NEVER)
        )
    except (OSError, ValueError):
        return None


def download(repo: str, patterns: Sequence[str], files: str, otherwise: str) -> Path:
    """The newest files of a repository by patterns, downloaded as far as they are not here. files: those, in words;
    otherwise: how to do without the hub.

    Raises ModelError for a repository that is gated, and where the hub cannot be reached or has no such files.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError

    accept = f"Accept the licence at https://huggingface.co/{repo} and run `hf auth login`"
    try:
        return Path(snapshot_download(repo, allow_patterns=list(patterns), ignore_patterns=_NEVER))
    except GatedRepoError:
        raise ModelError(f"{repo} is gated: {files} cannot be read. {accept}, {otherwise}.") from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        if away := _why_away(error):
            raise ModelError(f"{repo} lacks {files} on this machine, and {away}, {otherwise}.") from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{repo} could not be downloaded ({reason}); needed: {files}. {accept}, {otherwise}."
        ) from None


def _why_away(error: Exception) -> str:
    """Why the hub was not asked, or did not answer, and what to do; empty if it answered, or the fault is another one."""
    from huggingface_hub import constants, is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if not isinstance(error, LocalEntryNotFoundError) or isinstance(error.__cause__, HfHubHTTPError):
        return ""
    if is_offline_mode():
        return "HF_HUB_OFFLINE forbids to download it. Unset that"
    return f"the hub at {constants.ENDPOINT} cannot be reached ({error.__cause__}). Run this again when it can"

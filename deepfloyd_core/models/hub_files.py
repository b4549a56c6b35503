"""The files of a model on the hub: what of them is needed, how many bytes they are, their download. No torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deepfloyd_core.errors import ModelError

OR = " or "
LOCAL = "or point pretrained_model_name_or_path at a copy of the model on this machine"
_IGNORED = ["*.bin", "*.fp16.*"]


@dataclass(frozen=True)
class ModelFiles:
    """Patterns of what a stock pipeline needs of a model's folder (of those with OR between them one), and of what else is
    downloaded if it is there.
    """

    needed: tuple[str, ...]
    beside: tuple[str, ...]

    @property
    def patterns(self) -> list[str]:
        """Of all that is downloaded."""
        return [one for pattern in (*self.needed, *self.beside) for one in pattern.split(OR)]


def download(repo: str, files: ModelFiles) -> Path:
    """Download what is missing or newer. Returns the snapshot. Raises ModelError."""
    from huggingface_hub import snapshot_download

    with _told(repo, files):
        return Path(snapshot_download(repo, allow_patterns=files.patterns, ignore_patterns=_IGNORED))


def bytes_to_download(repo: str, files: ModelFiles) -> int:
    """Bytes that `download` would transfer. Writes nothing. Raises ModelError as `download` would."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.utils._paths import filter_repo_objects

    with _told(repo, files):
        found = HfApi().model_info(repo, files_metadata=True)
        HfApi().auth_check(repo)
    sizes = {each.rfilename: each.size or 0 for each in found.siblings or ()}
    names = filter_repo_objects(sizes, allow_patterns=files.patterns, ignore_patterns=_IGNORED)
    cached = {name: isinstance(try_to_load_from_cache(repo, name, revision=found.sha), str) for name in names}
    return sum(sizes[name] for name, is_here in cached.items() if not is_here)


@contextmanager
def _told(repo: str, wanted: ModelFiles) -> Iterator[None]:
    """The library's errors as ModelError: what is missing, why it does not come, what to do."""
    from httpx2 import InvalidURL, TransportError
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError

    files = ", ".join(wanted.needed)
    accept = f"Accept the licence at https://huggingface.co/{repo} and run `hf auth login`"
    try:
        yield
    except GatedRepoError:
        raise ModelError(f"{repo} is gated: {files} cannot be read. {accept}, {LOCAL}.") from None
    except (HfHubHTTPError, HFValidationError, TransportError, InvalidURL, ImportError, OSError) as error:
        if away := _why_away(error):
            raise ModelError(f"{repo} lacks {files} on this machine, and {away}, {LOCAL}.") from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{repo} could not be downloaded ({reason}); needed: {files}. {accept}, {LOCAL}.") from None


def _why_away(error: Exception) -> str:
    """Why the hub was not asked, or did not answer, and what to do; empty if it answered, or the fault is another one."""
    from httpx2 import InvalidURL, TransportError
    from huggingface_hub import constants, is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    # A download tells what it met in the error that the library raises from it; other calls raise it as it is. The last two
    # are of a proxy whose address is none, or whose kind the library does not know.
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
    kinds = LocalEntryNotFoundError, TransportError, OfflineModeIsEnabled, InvalidURL, ImportError
    asked = isinstance(error, kinds)
    if not asked or isinstance(cause, HfHubHTTPError):
        return ""
    if is_offline_mode():
        return "HF_HUB_OFFLINE forbids to download it. Unset that"
    return f"the hub at {constants.ENDPOINT} cannot be reached ({cause}). Run this again when it can"

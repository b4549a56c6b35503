"""Repositories of the Hugging Face Hub: the files of one that are needed, here or downloaded."""

import errno
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from deepfloyd_core.errors import ModelError
from deepfloyd_core.store.file_faults import FULL, storage_error, system_error

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

    with _told(repo, files, otherwise), _stored():
        return Path(snapshot_download(repo, allow_patterns=list(patterns), ignore_patterns=_NEVER))


def bytes_to_download(repo: str, patterns: Sequence[str], files: str, otherwise: str) -> int:
    """Bytes that `download` would transfer. Writes nothing. Raises ModelError as `download` would."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.utils._paths import filter_repo_objects

    with _told(repo, files, otherwise):
        found = HfApi().model_info(repo, files_metadata=True)
        HfApi().auth_check(repo)
    sizes = {each.rfilename: each.size or 0 for each in found.siblings or ()}
    names = filter_repo_objects(sizes, allow_patterns=list(patterns), ignore_patterns=_NEVER)
    cached = {name: isinstance(try_to_load_from_cache(repo, name, revision=found.sha), str) for name in names}
    return sum(sizes[name] for name, is_here in cached.items() if not is_here)


@contextmanager
def _stored() -> Iterator[None]:
    """Raise StorageError where the disk of the hub's cache does not take a download."""
    from huggingface_hub import constants

    try:
        yield
    except (OSError, RuntimeError) as error:  # the second: of the library's part in Rust
        refused = system_error(str(error)) if isinstance(error, RuntimeError) else error
        if refused is None or refused.errno not in (*FULL, errno.EROFS, errno.EACCES):
            raise
        raise storage_error(refused, "written", Path(constants.HF_HUB_CACHE)) from None


@contextmanager
def _told(repo: str, files: str, otherwise: str) -> Iterator[None]:
    """The library's errors as ModelError: what is missing, why it does not come, what to do."""
    from httpx2 import InvalidURL, TransportError
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError

    accept = f"Accept the licence at https://huggingface.co/{repo} and run `hf auth login`"
    try:
        yield
    except GatedRepoError:
        raise ModelError(f"{repo} is gated: {files} cannot be read. {accept}, {otherwise}.") from None
    except (HfHubHTTPError, HFValidationError, TransportError, InvalidURL, ImportError, OSError) as error:
        if away := _why_away(error):
            raise ModelError(f"{repo} lacks {files} on this machine, and {away}, {otherwise}.") from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{repo} could not be downloaded ({reason}); needed: {files}. {accept}, {otherwise}."
        ) from None


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

"""A repository of the Hugging Face Hub as a place to publish to, by `huggingface_hub`.

The token comes from the environment (HF_TOKEN) or from its login, and is in no message. Large files that the Hub has
already, also of an interrupted publication, are not sent again: it knows them by their sha256.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from deepfloyd_core.bundle.publish_files import (
    OTHERS,
    RECORD,
    SUMS,
    Known,
    PublishedFile,
    parsed_record,
    sums_text,
    whole_record,
)
from deepfloyd_core.errors import ConfigError, StorageError
from deepfloyd_core.types import Report

HUB = "hf://"
_PAUSES_S = 1.0, 4.0
_SILENCE_S = (
    120.0  # after which a Hub that is connected and says nothing does not answer; the library would wait for ever
)
_OF_THE_HUB = {".gitattributes"}  # what a new repository has
_LATER = 408, 429  # of the refusals those that may end by themselves
T = TypeVar("T")


class HubPlace:
    """`hf://OWNER/NAME`, a repository of models. A new one is private unless told."""

    def __init__(self, target: str, public: bool) -> None:
        """Raises ConfigError for a name that no repository can have."""
        from huggingface_hub import HfApi, get_session
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils._validators import validate_repo_id

        self.name, self._id, self._public = target.rstrip("/"), target.removeprefix(HUB).strip("/"), public
        try:
            validate_repo_id(self._id)
        except HFValidationError as error:
            raise ConfigError(f"{target} names no repository: {error}. Give {HUB}OWNER/NAME.") from None
        if "/" not in self._id:
            raise ConfigError(f"{target} names no repository. Give {HUB}OWNER/NAME.")
        self._api = HfApi()
        hooks = get_session().event_hooks["request"]
        if _not_for_ever not in hooks:
            hooks.append(_not_for_ever)

    def known(self, files: Sequence[PublishedFile]) -> Known:
        """See `Place`."""
        if not self._asked(self._exists):
            return Known(frozenset(), frozenset(), False)
        if not self._public and not self._asked(partial(self._api.model_info, self._id)).private:
            raise ConfigError(f"{self.name} is public. Add --public if this version is to be, or name another.")
        there = {entry.path: entry for entry in self._asked(self._tree)}
        if RECORD not in there and there.keys() - _OF_THE_HUB:
            raise ConfigError(f"{self.name} {OTHERS}")
        record = self._asked(self._record) if RECORD in there else {}
        same = {one.name for one in files if one.name in there and _is_same(there[one.name], one)}
        names = {one.name for one in files}
        return Known(frozenset(same), frozenset(record.keys() & there.keys()), same == names == record.keys() - {SUMS})

    def send(
        self, files: Sequence[PublishedFile], removed: Sequence[str], digests: Mapping[str, str], title: str,
        report: Report,
    ) -> str:  # fmt: skip
        """See `Place`. One commit, so that nobody sees half of a version."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        if not self._asked(self._exists):
            self._asked(partial(self._api.create_repo, self._id, private=not self._public, exist_ok=True))
        report(0, len(files), "files sent")
        texts = {SUMS: sums_text(digests), RECORD: whole_record(digests)}
        operations: list[Any] = [CommitOperationAdd(one.name, str(one.path)) for one in files]
        operations += [CommitOperationAdd(name, text.encode()) for name, text in texts.items()]
        operations += map(CommitOperationDelete, removed)
        self._asked(partial(self._api.create_commit, self._id, operations, commit_message=title))
        report(len(files), len(files), "files sent")
        return f"{self._api.endpoint}/{self._id}"

    def _exists(self) -> bool:
        return bool(self._api.repo_exists(self._id))

    def _tree(self) -> list[Any]:
        from huggingface_hub.hf_api import RepoFile

        return [entry for entry in self._api.list_repo_tree(self._id, recursive=True) if isinstance(entry, RepoFile)]

    def _record(self) -> dict[str, str | None]:
        with TemporaryDirectory() as folder:
            file = self._api.hf_hub_download(self._id, RECORD, local_dir=folder)
            return parsed_record(Path(file).read_bytes(), self.name)

    def _asked(self, ask: Callable[[], T]) -> T:
        """What the Hub answers; it is asked again when it does not, after a pause. Raises as `_told`."""
        for pause_s in _PAUSES_S:
            try:
                with self._told():
                    return ask()
            except StorageError:
                time.sleep(pause_s)
        with self._told():
            return ask()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """The library's errors as ours: ConfigError for a login that may not, StorageError for no answer."""
        import httpx2
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalTokenNotFoundError

        try:
            yield
        except LocalTokenNotFoundError:
            raise ConfigError(f"{self.name} needs a login: set HF_TOKEN, or run `hf auth login`.") from None
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if status in (401, 403):
                raise ConfigError(
                    f"{self.name} refuses this login ({status}): HF_TOKEN, or that of `hf auth login`, may not write there."
                ) from None
            told = f"{self.name} cannot be published to: the Hub answers {status} {error.server_message or ''}".strip()
            if 400 <= status < 500 and status not in _LATER:
                raise ConfigError(f"{told}.") from None
            raise StorageError(f"{told}.") from None
        except (httpx2.HTTPError, EntryNotFoundError, OSError, RuntimeError) as error:
            raise StorageError(f"{self.name} cannot be published to: {type(error).__name__}: {error}.") from None


def _not_for_ever(request: Any) -> None:
    """A limit for each wait of a request that has none: most of the library's calls ask for none."""
    limits = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        kind: limits.get(kind) or _SILENCE_S for kind in ("connect", "read", "write", "pool")
    }


def _is_same(there: Any, one: PublishedFile) -> bool:
    """Whether a file of the Hub has the bytes of ours: large ones it knows by sha256, small ones as git does."""
    if there.size != one.bytes:
        return False
    if there.lfs is not None:
        return bool(there.lfs.sha256 == one.sha256)
    data = one.path.read_bytes()
    return bool(hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == there.blob_id)

"""The S3 API as a workspace needs it, through s3fs: whole objects, listings, and writes under a condition.

A store that is busy (503), a connection that breaks and an answer that is cut short are tried again, by botocore, s3fs and
here. An answer that is lost makes the second try of a conditional write fail on the first one's object: what is written
under a condition therefore differs from all that others write, and is compared. What is still refused after that is one
sentence.
"""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from deepfloyd_core.errors import ConfigError, StorageError

S3_CONFIG = {"connect_timeout": 10, "read_timeout": 30, "retries": {"mode": "standard", "max_attempts": 8}}
# botocore tries 4 times, s3fs twice that, and the tries here again: an address where nothing listens is told after 20 s. A
# run that has its turn waits for minutes, rather than lose hours.
_CONFIG = {**S3_CONFIG, "retries": {"mode": "standard", "max_attempts": 4}, "max_pool_connections": 32}
_S3FS_TRIES, _TRIES, PATIENT_TRIES = 2, 3, 12
_PAUSE_S, _LONGEST_PAUSE_S = 0.3, 20.0
PIECE = 16 << 20  # bytes of a request
_NOT_FOUND = ("NoSuchKey", "404", "NotFound")
_REFUSED = ("PreconditionFailed", "412")
_AGAIN = ("ConditionalRequestConflict", "OperationAborted", "SlowDown", "503", "500", "InternalError", "RequestTimeout",
          "ServiceUnavailable", "IncompleteBody", "BadDigest", "409")  # fmt: skip
_NO_CONDITIONS = ("NotImplemented", "501", "InvalidArgument")
_LOGIN = (
    "Credentials come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE) or the machine's role, "
    "the address of a store that is not Amazon's from AWS_ENDPOINT_URL"
)
_ADDRESS = (
    "Start the store, or correct its address (AWS_ENDPOINT_URL; without it Amazon's), and run the same command again"
)
T = TypeVar("T")


def failures(fs: Any) -> tuple[type[Exception], ...]:
    """The exceptions that a file system raises when a file cannot be read."""
    if "s3" not in fs.protocol:
        return (OSError, ValueError)
    from aiohttp import ClientError as AiohttpError
    from botocore.exceptions import BotoCoreError, ClientError

    return (OSError, ValueError, BotoCoreError, ClientError, AiohttpError)  # s3fs translates only some of them


@dataclass(frozen=True)
class Listed:
    """An object of a listing."""

    bytes: int
    etag: str
    changed_s: float  # Unix time by the store's clock


class Bucket:
    """A prefix of a bucket. Keys are relative to it. Every method raises StorageError where the store refuses."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError when s3fs is not installed."""
        self.url = url
        self._bucket, _, self._prefix = url.removeprefix("s3://").partition("/")
        import fsspec  # 0.05 s, which a plain workspace need not take

        try:
            self._fs: Any = fsspec.filesystem(
                "s3",
                config_kwargs=_CONFIG,
                use_listings_cache=False,
                max_concurrency=1,
                skip_instance_cache=True,
            )
        except ImportError as error:
            raise ConfigError(
                f"{url} needs a package that is not installed ({error}): pip install 'deepfloyd-pipeline[s3]'."
            ) from None
        self._fs.retries, self.tries = _S3FS_TRIES, _TRIES
        self._failures, self._sync = failures(self._fs), fsspec.asyn.sync

    def get(self, key: str) -> tuple[bytes, str] | None:
        """An object's bytes and its ETag; None: there is no such object."""

        async def read() -> tuple[bytes, str]:
            answer = await self._fs._call_s3("get_object", Bucket=self._bucket, Key=self._at(key))
            async with answer["Body"] as body:
                return bytes(await body.read()), str(answer["ETag"])

        return self._asked(f"read ({key})", read)

    def put(self, key: str, data: bytes) -> str:
        """Write an object, whatever is there. Returns its ETag."""
        return self._put(key, data, {}) or ""

    def put_new(self, key: str, data: bytes) -> str | None:
        """Write an object if there is none; its ETag. None: another one is there. An equal one counts as this one."""
        return self._put(key, data, {"IfNoneMatch": "*"})

    def put_if(self, key: str, data: bytes, etag: str) -> str | None:
        """Write an object over the one with this ETag; its new ETag. None: there is another one, or none any more."""
        return self._put(key, data, {"IfMatch": etag})

    def size(self, key: str) -> int | None:
        """The bytes of an object; None: there is none."""

        async def head() -> int:
            answer = await self._fs._call_s3("head_object", Bucket=self._bucket, Key=self._at(key))
            return int(answer["ContentLength"])

        return self._asked(f"read ({key})", head)

    def upload(self, file: Path, key: str) -> None:
        """Write a file of any size as an object."""

        async def put() -> None:
            await self._fs._put_file(str(file), f"{self._bucket}/{self._at(key)}", chunksize=PIECE)

        if file.stat().st_size <= PIECE:
            self.put(key, file.read_bytes())
        else:
            self._asked(f"written ({key})", put)

    def piece(self, key: str, start: int, end: int) -> bytes | None:
        """Bytes of an object, from a place to another; None: there is no such object."""

        async def read() -> bytes:
            span = f"bytes={start}-{end - 1}"
            answer = await self._fs._call_s3("get_object", Bucket=self._bucket, Key=self._at(key), Range=span)
            async with answer["Body"] as body:
                return bytes(await body.read())

        return self._asked(f"read ({key})", read)

    def list(self, below: str) -> dict[str, Listed]:
        """The objects whose keys begin so, by the rest of their keys."""
        start, found, token = self._at(below), dict[str, Listed](), dict[str, str]()
        while True:

            async def page(token: dict[str, str] = token) -> Any:
                return await self._fs._call_s3("list_objects_v2", Bucket=self._bucket, Prefix=start, **token)

            answer = self._asked("listed", page) or {}
            for each in answer.get("Contents", ()):
                changed = each["LastModified"].timestamp()
                found[each["Key"].removeprefix(start)] = Listed(int(each["Size"]), each["ETag"], changed)
            if not answer.get("IsTruncated"):
                return found
            token = {"ContinuationToken": answer["NextContinuationToken"]}

    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""

        async def delete() -> Any:
            return await self._fs._call_s3("delete_object", Bucket=self._bucket, Key=self._at(key))

        self._asked(f"changed (delete {key})", delete)

    def _at(self, key: str) -> str:
        return f"{self._prefix}/{key}"

    def _put(self, key: str, data: bytes, condition: dict[str, str]) -> str | None:
        async def put() -> str:
            answer = await self._fs._call_s3(
                "put_object", Bucket=self._bucket, Key=self._at(key), Body=data, **condition
            )
            return str(answer["ETag"])

        try:
            etag = self._asked(f"written ({key})", put, bool(condition))
        except FileExistsError:
            etag = None
        if etag is None and (now := self.get(key)) and now[0] == data:
            return now[1]  # the answer to an earlier try was lost
        return etag

    def _asked(self, act: str, ask: Callable[[], Awaitable[T]], conditional: bool = False) -> T | None:
        """What the store answers; None: no such object. Raises FileExistsError where a condition is not met."""
        for attempt in count(1):
            try:
                answer: T = self._sync(self._fs.loop, ask)
                return answer
            except self._failures as error:
                code = _code(error)
                if code in _NOT_FOUND:
                    return None
                if conditional and code in _REFUSED:
                    raise FileExistsError(act) from None
                if attempt >= self.tries or not _passes(error, code):
                    raise self._sentence(act, error, code, conditional) from None
                time.sleep(min(_PAUSE_S * 2**attempt, _LONGEST_PAUSE_S))
        raise AssertionError

    def _sentence(self, act: str, error: Exception, code: str, conditional: bool) -> StorageError:
        if code == "NoSuchBucket":
            return StorageError(f"{self.url}: there is no bucket {self._bucket!r}. Create it, or correct `workspace`.")
        if conditional and code in _NO_CONDITIONS:
            return StorageError(
                f"{self.url}: this store has no conditional writes ({code}), without which two runs at once would spoil "
                "each other's records. Use a store that has them (If-None-Match and If-Match), or a folder."
            )
        told = " ".join(f"{code or type(error).__name__}: {error}".split())
        from botocore.exceptions import HTTPClientError

        advice = _ADDRESS if isinstance(error, HTTPClientError | TimeoutError) else _LOGIN
        return StorageError(f"{self.url} cannot be {act}: {told.rstrip('.')}. {advice}.")


def _code(error: Exception) -> str:
    """The S3 error code of a failure; empty: it has none."""
    for each in (error, error.__cause__):
        answer = getattr(each, "response", None)
        if isinstance(answer, dict):
            return str(answer.get("Error", {}).get("Code", ""))
    return "NoSuchKey" if isinstance(error, FileNotFoundError) else ""


def _passes(error: Exception, code: str) -> bool:
    """Whether a failure may pass. s3fs has tried some of them before."""
    if code:
        return code in _AGAIN
    from botocore.exceptions import NoCredentialsError, PartialCredentialsError

    return not isinstance(error, PermissionError | NoCredentialsError | PartialCredentialsError | ValueError)

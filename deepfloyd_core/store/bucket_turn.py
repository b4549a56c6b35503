"""One run at a time in a workspace that is in a bucket, whichever machines the runs are on.

An object, `turn.json`, says who has the turn. It is written under conditions only. Its holder writes it anew every BEAT_S,
with another body, because equal bytes have equal ETags. Who waits takes it over when its ETag has stood still for LEASE_S by
the waiting machine's own monotonic clock: no wall clock is compared, so one that is an hour off does nothing. A run of the
same mirror takes it over at once: the lock of that folder says that the holder is dead.

A holder that could not write it for LEASE_S may have lost it. So before each manifest and each record it writes it once more
(`Turn.check`), and a run that finds another one's name there writes nothing.
"""

import json
import logging
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deepfloyd_core.errors import BusyError, StorageError
from deepfloyd_core.files import parsed_json
from deepfloyd_core.store.bucket import PATIENT_TRIES
from deepfloyd_core.store.mirror import FOLDER, PLACE, Mirror, fences, mirror_of, refresh
from deepfloyd_core.store.mirror_files import push_unsent
from deepfloyd_core.types import Json

log = logging.getLogger(__name__)

KEY = "turn.json"
LEASE_S, BEAT_S, _LOOK_S = 60.0, 10.0, 2.0
_CONDITIONS = "conditions"  # a file of the mirror: the store has been seen to keep them


class Turn:
    """The turn of a run, which it holds until `end`."""

    def __init__(self, mirror: Mirror, name: str) -> None:
        self._mirror, self._name = mirror, name
        self._etag, self._lost_to, self._renewed = "", "", time.monotonic()
        self._over, self._writing = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._beat, name="turn in a bucket", daemon=True)

    def take(self, wait: bool) -> None:
        """Take the turn; waits for another run until it ends, or has not been heard of for LEASE_S.

        wait: False raises BusyError for a run that is heard of.
        """
        etag, since, told = "", time.monotonic(), False
        while not self._taken(etag, since):
            record, now = self._read()
            if now != etag:
                if etag and not wait:
                    raise BusyError(f"{record.get('name', 'another run')} is at work in {self._mirror.url}.")
                etag, since = now, time.monotonic()
            if not told:
                told = True
                log.info("waiting for %s, which is at work in %s", record.get("name", "another run"), self._mirror.url)
            time.sleep(min(_LOOK_S, LEASE_S / 4))
        self._thread.start()

    def check(self) -> None:
        """Raise StorageError unless the turn is this run's still."""
        self._renew()
        if self._lost_to:
            raise StorageError(
                f"{self._lost_to} has taken the turn in {self._mirror.url}, because this run was not heard of for "
                f"{LEASE_S:g} s. What it made since is in {self._mirror.workspace} only; the same command goes on with it."
            )

    def end(self) -> None:
        """Give the turn back."""
        self._over.set()
        self._thread.join()
        with self._writing, suppress(StorageError):  # else it is taken over later
            if not self._lost_to:
                self._mirror.bucket.put_if(KEY, self._body(name=""), self._etag)

    def _taken(self, still: str, since: float) -> bool:
        """Whether the turn is this run's now: it was free, of a dead run of this mirror, or `still` for long enough."""
        bucket, found = self._mirror.bucket, self._mirror.bucket.get(KEY)
        if found is None:
            self._etag = bucket.put_new(KEY, self._body()) or ""
            return bool(self._etag)
        record, etag = _parsed(found[0]), found[1]
        ours = record.get("mirror") == _identity(self._mirror)
        if record.get("name") and not ours and not (etag == still and time.monotonic() - since >= LEASE_S):
            return False
        self._etag = bucket.put_if(KEY, self._body(), etag) or ""
        if self._etag and record.get("name") and not ours:
            log.warning("%s has not been heard of for %g s: its turn is taken over", record["name"], LEASE_S)
        return bool(self._etag)

    def _read(self) -> tuple[Json, str]:
        found = self._mirror.bucket.get(KEY)
        return (_parsed(found[0]), found[1]) if found else ({}, "")

    def _renew(self) -> None:
        with self._writing:
            if self._lost_to or self._over.is_set():
                return
            if etag := self._mirror.bucket.put_if(KEY, self._body(), self._etag):
                self._etag = etag
            else:
                self._lost_to = str(self._read()[0].get("name") or "another run")

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            try:
                self._renew()
            except StorageError as error:
                log.warning("the turn of this run cannot be renewed: %s", error)

    def _body(self, name: str | None = None) -> bytes:
        record = {
            "name": self._name if name is None else name, "mirror": _identity(self._mirror), "beat": secrets.token_hex(8),
        }  # fmt: skip
        return json.dumps(record).encode()


@contextmanager
def bucket_turn(workspace: Path, name: str, *, wait: bool) -> Iterator[None]:
    """In this block no other run makes artifacts in a workspace, whichever machine it is on. Does nothing in a plain
    workspace: `only_run` is enough there, and is held here as well.

    name: of this run, for those that wait for it. Raises BusyError as `Turn.take`.
    """
    mirror = mirror_of(workspace)
    if mirror is None:
        yield
        return
    if not (mirror.workspace / FOLDER / _CONDITIONS).exists():
        try_conditions(mirror)
    turn = Turn(mirror, f"{name} on {socket.gethostname()}")
    turn.take(wait)
    fences[workspace], mirror.bucket.tries = turn.check, PATIENT_TRIES
    try:
        refresh(mirror)  # what others made meanwhile
        push_unsent(mirror)
        yield
    finally:
        del fences[workspace]
        turn.end()


def try_conditions(mirror: Mirror) -> None:
    """Try what a run needs. Raises StorageError for a bucket that may not be written, and for a store that accepts
    conditional writes and does not keep their conditions.
    """
    noted, key, bucket = mirror.workspace / FOLDER / _CONDITIONS, f"trials/{secrets.token_hex(8)}", mirror.bucket
    etag = bucket.put_new(key, b"1")
    kept = (
        etag and not bucket.put_new(key, b"2") and bucket.put_if(key, b"3", etag) and not bucket.put_if(key, b"4", etag)
    )
    bucket.delete(key)
    if not kept:
        raise StorageError(
            f"{mirror.url}: this store does not keep the conditions of writes (If-None-Match, If-Match), without which two "
            "runs at once would spoil each other's records. Use a store that does, or a folder."
        )
    noted.touch()


def _identity(mirror: Mirror) -> str:
    """Tells mirrors apart, also one that was copied with its machine's disk."""
    found = (mirror.workspace / FOLDER / PLACE).stat()
    return f"{mirror.id} {socket.gethostname()} {found.st_ino} {found.st_ctime_ns}"


def _parsed(data: bytes) -> Json:
    try:
        record = parsed_json(data)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}

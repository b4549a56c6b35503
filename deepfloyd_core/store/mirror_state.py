"""The state of an unfinished training in a bucket, so that another machine goes on with it where this one was lost.

While a training runs in a workspace that is in a bucket, each new checkpoint is sent, with all that lies in the training's
directory: stored losses, notes, pictures. `<prefix>/working/KIND/FINGERPRINT/` has each file by its sha256, and
`state.json`, which is written last and lists them. Files that it does not list any more are removed after that. What other
builders leave unfinished stays on its machine.
"""

import logging
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepfloyd_core.errors import ArtifactError, StorageError
from deepfloyd_core.files import TMP_PREFIX, canonical_json, parsed_json, sha256_file
from deepfloyd_core.store.bucket import PIECE, Bucket
from deepfloyd_core.store.file_faults import written
from deepfloyd_core.store.following import following
from deepfloyd_core.store.mirror import FOLDER, PARTS, Mirror, at_once, check_turn, fences, leads_inside, mirror_of
from deepfloyd_core.store.working_state import REQUEST

log = logging.getLogger(__name__)

WORKING = "working/"
_STATE = "state.json"
_SEALS = ".checkpoints/step-*/checkpoint.json"
_LOOK_S = 2.0
_OF_JOBS = ".job-"  # logs and requests of processes


@contextmanager
def sent_meanwhile(folder: Path) -> Iterator[None]:
    """In this block an artifact is built: bring its state first, if the bucket has a newer one, and send each new one.

    Does nothing in a plain workspace, and for a run without its turn. folder: of the artifact.
    """
    mirror = mirror_of(folder.parent.parent)
    if mirror is None or mirror.workspace not in fences:
        yield
        return
    _bring_state(mirror, folder)
    sent = [_step(folder)]

    def send() -> None:
        if (step := _step(folder)) > sent[0]:
            try:
                _send_state(mirror, folder)
                sent[0] = step
            except (StorageError, OSError, ArtifactError) as error:  # it is whole here, and the next one may pass
                log.warning("the state of %s is not in %s: %s", folder.parent.name, mirror.url, error)

    try:
        with following(send, _LOOK_S):
            yield
    finally:
        send()


def drop_state(folder: Path) -> None:
    """Remove the state of an artifact that is finished now."""
    mirror = mirror_of(folder.parent.parent)
    if mirror is not None and mirror.workspace in fences:
        bucket, below = mirror.bucket, _below(folder)
        found = sorted(bucket.list(below), key=lambda name: name != _STATE)
        for name in found:
            bucket.delete(below + name)


def _send_state(mirror: Mirror, folder: Path) -> None:
    newest, bucket, below = _newest(folder), mirror.bucket, _below(folder)
    assert newest is not None
    files = dict[str, tuple[int, str]]()
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        old = name.startswith(".checkpoints/") and newest not in file.parents
        if file.is_file() and not old and not file.name.startswith((_OF_JOBS, TMP_PREFIX)) and name != REQUEST:
            files[name] = file.stat().st_size, sha256_file(file)
    there = bucket.list(below)

    def send(name: str) -> None:
        size, sha256 = files[name]
        if sha256 not in there or there[sha256].bytes != size:
            bucket.upload(folder / name, f"{below}{sha256}")

    at_once(send, files)
    check_turn(mirror.workspace)
    bucket.put(below + _STATE, canonical_json({"step": _step(folder), "files": files}).encode())
    listed = {sha256 for _, sha256 in files.values()} | {_STATE}
    for name in there.keys() - listed:
        bucket.delete(below + name)


def _bring_state(mirror: Mirror, folder: Path) -> None:
    """Replace the state that is here by that of the bucket, if that is of a later step and whole."""
    bucket, below = mirror.bucket, _below(folder)
    found = bucket.get(below + _STATE)
    if found is None:
        return
    state = _parsed(found[0])
    if state is None:
        log.warning("%s%s of %s is damaged: the state there is not used", below, _STATE, mirror.url)
        return
    step, files = state
    if step <= _step(folder):
        return
    part = mirror.workspace / FOLDER / PARTS / secrets.token_hex(8)
    with written(mirror.workspace):
        faults = at_once(lambda name: _brought(bucket, below, part / name, *files[name]), files)
        if not all(faults):
            log.warning("the state of %s in %s is damaged, and not used", folder.parent.name, mirror.url)
            shutil.rmtree(part)
            return
        for name in sorted(files, key=lambda name: name.endswith("/checkpoint.json")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (part / name).replace(folder / name)
        shutil.rmtree(part)
    log.info("%s %s: goes on from step %d, which is in %s", folder.parent.name, folder.name, step, mirror.url)


def _brought(bucket: Bucket, below: str, file: Path, size: int, sha256: str) -> bool:
    """Bring a file. Returns whether it is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as out:
        for start in range(0, size, PIECE):
            out.write(bucket.piece(f"{below}{sha256}", start, min(start + PIECE, size)) or b"")
    return sha256_file(file) == sha256


def _parsed(data: bytes) -> tuple[int, dict[str, tuple[int, str]]] | None:
    """The step of a state, and its files: size and sha256 by name. None: it is none, or a name leads elsewhere."""
    try:
        record = parsed_json(data)
        files = {str(name): (int(size), str(sha256)) for name, (size, sha256) in record["files"].items()}
        step = int(record["step"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return (step, files) if all(map(leads_inside, files)) else None


def _newest(folder: Path) -> Path | None:
    """The newest checkpoint of a training's directory."""
    return max((seal.parent for seal in folder.glob(_SEALS)), default=None)


def _step(folder: Path) -> int:
    """The step of the newest checkpoint; 0 without any."""
    newest = _newest(folder)
    return int(newest.name.removeprefix("step-")) if newest else 0


def _below(folder: Path) -> str:
    return f"{WORKING}{folder.parent.name}/{folder.name}/"

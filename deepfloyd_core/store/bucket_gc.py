"""Removes from a bucket what no record of its workspace names: bytes of artifacts that `gc` removed, and of sends that died.

An artifact's bytes are in the bucket before its manifest. So what is younger than a day stays, by the store's own clock: its
manifest may be on its way. `gc` has the turn of the workspace, so no run is sending; only pictures that another machine
draws may be on their way, and where these lose a file, they are drawn again.
"""

import logging
from pathlib import Path

from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.store.bucket_turn import KEY
from deepfloyd_core.store.manifest import MANIFEST, read_manifest
from deepfloyd_core.store.mirror import at_once, mirror_of, refresh
from deepfloyd_core.store.mirror_files import OBJECTS
from deepfloyd_core.store.mirror_state import WORKING

log = logging.getLogger(__name__)

_YOUNG_DAYS = 1.0
_DAY_S = 86400.0


def drop_unnamed(workspace: Path, keep_days: float) -> None:
    """Does nothing in a plain workspace, and while a manifest cannot be read. keep_days: how old the state of an unfinished
    training may become; for bytes without a manifest a day is enough.
    """
    mirror = mirror_of(workspace)
    if mirror is None:
        return
    refresh(mirror)
    try:
        files = [file for path in workspace.glob(f"*/*/{MANIFEST}") for file in read_manifest(path.parent).files]
    except ArtifactError as error:
        log.warning("nothing else is removed from %s: %s", mirror.url, error)
        return
    bucket, named = mirror.bucket, {file.sha256 for file in files}
    now = next(each.changed_s for each in bucket.list(KEY).values())  # of the turn, which was renewed just now
    young, kept = min(keep_days, _YOUNG_DAYS) * _DAY_S, keep_days * _DAY_S
    gone = [OBJECTS + key for key, each in bucket.list(OBJECTS).items()
            if key.rpartition("/")[2] not in named and now - each.changed_s >= young]  # fmt: skip
    states = {key: each.changed_s for key, each in bucket.list(WORKING).items()}
    newest = {_training(key): 0.0 for key in states}
    for key, changed in states.items():
        newest[_training(key)] = max(newest[_training(key)], changed)
    gone += [WORKING + key for key in states if now - newest[_training(key)] >= kept]
    at_once(bucket.delete, gone)


def _training(key: str) -> str:
    """KIND/FINGERPRINT of a key below WORKING."""
    return "/".join(key.split("/")[:2])

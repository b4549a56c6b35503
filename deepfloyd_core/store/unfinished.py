"""Reads what an unfinished artifact is made from: the request that `materialise` wrote before its builder began."""

from pathlib import Path

from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.files import read_sealed
from deepfloyd_core.store.artifacts import Request
from deepfloyd_core.store.working_state import REQUEST

_WRITTEN_ANEW = "A run with its settings writes it anew and goes on with what is there"


def read_request(path: Path) -> Request:
    """The request of an unfinished artifact's directory. Raises ArtifactError when it is damaged, OSError where a disk
    fails.
    """
    file = path / REQUEST
    record = read_sealed(file, _WRITTEN_ANEW)
    try:
        request = Request(path.parent.name, **record)
    except TypeError:
        raise ArtifactError(f"{file} is a sealed record, and not of a request. {_WRITTEN_ANEW}.") from None
    if request.name != f"{path.parent.name}/{path.name}":
        raise ArtifactError(f"{path} holds the request of {request.name}. {_WRITTEN_ANEW}.")
    return request

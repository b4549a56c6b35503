"""One picture's header, and if asked for a decode and its face: what a child process does, because a file can harm it."""

from dataclasses import dataclass
from pathlib import Path

from deepfloyd_core.files import read_file
from deepfloyd_core.pictures.decode import check_decodes, check_fits, decode_rgb, read_header
from deepfloyd_core.pictures.faces import find_face
from deepfloyd_core.pictures.faults import Unreadable
from deepfloyd_core.sources.listing import FILE_BYTES
from deepfloyd_core.sources.names import starts_like_picture


@dataclass(frozen=True)
class Asked:
    """What is to be looked at."""

    path: str
    memory_mib: int  # that a whole decode may take
    sure: bool = True  # its name says that it is a picture
    decode: bool = False
    face: bool = False  # decodes it as well


@dataclass(frozen=True)
class Glimpse:
    """What was seen. `reason`: the ledger's word for why a run could not use it; empty if it can."""

    width: int = 0  # upright, px
    height: int = 0
    format: str = ""
    face: bool | None = None  # None: not looked for
    reason: str = ""
    detail: str = ""
    is_input: bool = True  # False: no picture, and its name does not say that it is one


def glimpse(asked: Asked) -> Glimpse:
    """Look at one file. Raises nothing for a bad one."""
    try:
        data = read_file(Path(asked.path), FILE_BYTES)
    except OSError as error:
        return Glimpse(reason="unreadable", detail=str(error.strerror or error))
    if not asked.sure and not starts_like_picture(data[:64]):
        return Glimpse(is_input=False)
    try:
        header = read_header(data)
        check_fits(header.size, asked.memory_mib)
        face = None
        if asked.face:
            face = find_face(decode_rgb(data)) is not None
        elif asked.decode:
            check_decodes(data)
    except Unreadable as error:
        return Glimpse(reason=error.reason, detail=str(error))
    return Glimpse(*header.size, header.format, face)

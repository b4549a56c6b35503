"""A picture as text inside a page, which then needs no other file."""

import base64
import io
from pathlib import Path

from PIL import Image

LIMIT_BYTES = 150 << 10


def data_uri(path: Path, limit: int = LIMIT_BYTES) -> str:
    """A picture as `data:` URI of at most `limit` bytes before base64; smaller JPEGs are tried until one fits.

    Raises OSError when it cannot be read.
    """
    data, kind = path.read_bytes(), "jpeg" if path.suffix == ".jpg" else "png"
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    return _uri(data, kind) if len(data) <= limit else picture_uri(picture, limit)


def picture_uri(picture: Image.Image, limit: int = LIMIT_BYTES) -> str:
    """A picture in memory (RGB) as `data_uri`, as a JPEG."""
    data = _jpeg(picture)
    while len(data) > limit:
        picture = picture.resize((max(1, picture.width * 3 // 4), max(1, picture.height * 3 // 4)))
        data = _jpeg(picture)
    return _uri(data, "jpeg")


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"

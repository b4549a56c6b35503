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
    while len(data) > limit:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=80)
        data, kind = buffer.getvalue(), "jpeg"
        picture = picture.resize((max(1, picture.width * 3 // 4), max(1, picture.height * 3 // 4)))
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"

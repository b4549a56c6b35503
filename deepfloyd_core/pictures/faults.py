"""Reasons why a picture cannot be read: the exception, and what Pillow raises for broken pixels."""

import struct

from PIL import Image

PIXEL_ERRORS = (
    OSError, ValueError, SyntaxError, MemoryError, RuntimeError, NotImplementedError, struct.error, EOFError,
    IndexError, KeyError, TypeError, OverflowError, ZeroDivisionError, AttributeError,
    AssertionError,
)  # fmt: skip


class Unreadable(Exception):
    """A picture that cannot be used; `reason` is the ledger's word, the message its detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def too_large(picture: Image.Image) -> Unreadable:
    return Unreadable("out_of_memory", f"{picture.width}x{picture.height} px do not fit into the memory that is left")

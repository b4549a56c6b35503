"""Names and seeds from hashes: pure functions of their arguments, the same on every machine."""

import hashlib

import xxhash


def hash_seed(*parts: object) -> int:
    """A 63-bit seed that is a pure function of its arguments."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def digest(*parts: bytes | str | int) -> str:
    """16 hex digits of sha256 over parts, each with its length before it."""
    whole = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        whole.update(len(data).to_bytes(8, "big") + data)
    return whole.hexdigest()[:16]


def checksum(data: bytes | memoryview, form: bytes = b"") -> int:
    """64 bits (XXH3) over bytes as they were read: 0.4 us for a crop of 12 KiB, 25 GB/s. It finds accidents, and no forger.

    form: what the bytes mean, such as their dtype, which has to fit as well.
    """
    return xxhash.xxh3_64_intdigest(data, checksum(form) if form else 0)


def caption_id(caption: str) -> str:
    """Name of a caption in shards and embeds: 16 hex digits of sha256 over its UTF-8 bytes."""
    return hashlib.sha256(caption.encode()).hexdigest()[:16]

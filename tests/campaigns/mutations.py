"""Damage to good files, from a seed: of bytes, of texts token by token, and of formats whose checksums are repaired.

A reader refuses most random bytes at its first check. So what has a checksum gets the right one again, and a text keeps
most of its tokens: the damage then reaches the code behind the check.
"""

import json
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

Mutation = Callable[[Random, bytes], bytes]

_BYTES = (
    b"\0",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\n",
    b"\r",
    b'"',
    b"\\",
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
    b"\x1b[2J",
    b"%",
)
_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_TOKEN = re.compile(r'"(?:[^"\\\n]|\\.)*"|[\w.+-]+|\s+|.', re.DOTALL)
_ODD_TOKENS = (
    "null", "true", "false", "NaN", "-Infinity", "1e999", "-1", "0", "1" * 400, "1" * 5000, "0x" + "f" * 2000, '""',
    '"\\u0000"', '"\\ud800"', "[" * 50, "[" * 3000, '{"a":' * 3000, "]", "}", "[]", "{}", "#", "//", "''", '"""', "\ufeff",
    "\u2028", "\x1b[31m", "\x00", "a." * 200, "x" * 3000, "inf", "1979-05-27T07:32:00", "12:00:00", '"~nobody/x"',
    '"/dev/zero"', '"../x"', "=", ",", ":", "\n", "\r", "\t",
)  # fmt: skip
PNG, _CHUNK = b"\x89PNG\r\n\x1a\n", struct.Struct(">I4s")


def damaged(rng: Random, data: bytes) -> bytes:
    """One to four damages to bytes."""
    made = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        rng.choice(_DAMAGES)(rng, made)
    return bytes(made)


def _flip(rng: Random, data: bytearray) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _put(rng: Random, data: bytearray) -> None:
    place, odd = rng.randrange(len(data) + 1), rng.choice(_BYTES)
    data[place : place + rng.choice((0, len(odd)))] = odd


def _number(rng: Random, data: bytearray) -> None:
    if len(data) > 8:
        size = rng.choice((1, 2, 4, 8))
        place, order = rng.randrange(len(data) - 8), rng.choice(("little", "big"))
        value = rng.choice(_NUMBERS) & ((1 << 8 * size) - 1)
        data[place : place + size] = value.to_bytes(size, "little" if order == "little" else "big")


def _remove(rng: Random, data: bytearray) -> None:
    start = rng.randrange(len(data) + 1)
    del data[start : start + rng.choice((1, 4, 64, 1024))]


def _repeat(rng: Random, data: bytearray) -> None:
    start = rng.randrange(len(data) + 1)
    part = bytes(data[start : start + rng.choice((1, 4, 64, 512))])
    data[start:start] = part * rng.choice((1, 2, 20))


def _cut(rng: Random, data: bytearray) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _move(rng: Random, data: bytearray) -> None:
    one, other, size = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1), rng.choice((4, 16, 256))
    data[other : other + size] = data[one : one + size]


_DAMAGES = (_flip, _flip, _flip, _put, _number, _number, _remove, _repeat, _cut, _move)


def damaged_text(words: Sequence[str] = ()) -> Mutation:
    """Damage to a text token by token; `words`: what its reader knows beside what stands in it."""

    def mutate(rng: Random, data: bytes) -> bytes:
        tokens = _TOKEN.findall(data.decode("utf-8", "surrogateescape"))
        for _ in range(rng.choice((1, 1, 2, 3, 6))):
            if not tokens:
                break
            place, how = rng.randrange(len(tokens)), rng.randrange(6)
            if how == 0:
                del tokens[place : place + rng.choice((1, 1, 2, 9))]
            elif how == 1:
                tokens[place:place] = tokens[place : place + rng.choice((1, 3, 12))] * rng.choice((1, 1, 2, 30))
            elif how == 2:
                other = rng.randrange(len(tokens))
                tokens[place], tokens[other] = tokens[other], tokens[place]
            else:
                pool = words if words and rng.random() < 0.4 else _ODD_TOKENS if rng.random() < 0.6 else tokens
                tokens[place] = rng.choice(pool)
        text = "".join(tokens).encode("utf-8", "surrogateescape")
        return damaged(rng, text) if rng.random() < 0.15 else text

    return mutate


def damaged_json(rng: Random, value: Any) -> Any:
    """A value of JSON in which one place has another value."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        if rng.random() < 0.2:
            changed = {name: each for name, each in value.items() if name != key}
            return (
                changed if rng.random() < 0.5 else changed | {rng.choice(("", "x", key + "\0", "\x1b[31m")): value[key]}
            )
        return value | {key: damaged_json(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.85:
        place = rng.randrange(len(value))
        return [*value[:place], damaged_json(rng, value[place]), *value[place + 1 :], *value[: rng.randrange(2)]]
    if isinstance(value, str) and value and rng.random() < 0.4:
        return rng.choice((value[:-1], value + "/../x", value * 2, value.upper(), "/" + value, value + "\0"))
    if isinstance(value, int | float) and rng.random() < 0.5:
        return rng.choice((-value, value + 1, value * 10**9, float(value), str(value)))
    odd: tuple[Any, ...] = (
        None,
        True,
        0,
        -1,
        1e300,
        10**25,
        "",
        "x",
        "\0",
        "../x",
        "/dev/zero",
        [],
        {},
        [[]],
        {"a": {}},
    )
    return rng.choice(odd)


def damaged_png(rng: Random, data: bytes) -> bytes:
    """Damage to a PNG's chunks, or to the pixels' lines before they are deflated; each checksum fits."""
    chunks, place = list[tuple[bytes, bytes]](), len(PNG)
    while place + 12 <= len(data):
        size, kind = _CHUNK.unpack_from(data, place)
        chunks.append((kind, data[place + 8 : place + 8 + size]))
        place += 12 + size
    number, how = rng.randrange(len(chunks)), rng.randrange(5)
    kind, body = chunks[number]
    if how == 0:
        chunks.insert(rng.randrange(len(chunks) + 1), (kind, body))
    elif how == 1:
        odd = rng.choice(
            (b"tRNS", b"gAMA", b"iCCP", b"PLTE", b"acTL", b"fcTL", b"eXIf", b"iTXt", b"sBIT", b"xxXx", b"IDAT")
        )
        chunks[number:number] = [(odd, damaged(rng, body[:40]))]
    elif how == 2 and kind == b"IDAT":
        lines = damaged(rng, zlib.decompressobj().decompress(body))
        chunks[number] = kind, zlib.compress(lines, 1)
    elif how == 3:
        del chunks[number]
    else:
        chunks[number] = kind, damaged(rng, body)
    return PNG + b"".join(
        _CHUNK.pack(len(body), kind) + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def damaged_riff(rng: Random, data: bytes) -> bytes:
    """Damage to one chunk of a WebP, with lengths that fit."""
    chunks, place = list[tuple[bytes, bytes]](), 12
    while place + 8 <= len(data):
        size = int.from_bytes(data[place + 4 : place + 8], "little")
        chunks.append((data[place : place + 4], data[place + 8 : place + 8 + size]))
        place += 8 + size + size % 2
    number = rng.randrange(len(chunks))
    kind, body = chunks[number]
    choices = [
        [(kind, damaged(rng, body))],
        [(kind, body)] * 2,
        [],
        [(b"ICCP", body[:64]), (kind, body)],
        [(b"ANIM", body)],
    ]
    chunks[number : number + 1] = rng.choice(choices)
    made = b"".join(kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2) for kind, body in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(made)) + b"WEBP" + made


def damaged_jpeg(rng: Random, data: bytes) -> bytes:
    """Damage to one marker segment of a JPEG before its scan, with a length that fits."""
    segments, place = list[tuple[int, bytes]](), 2
    while place + 4 <= len(data) and data[place] == 0xFF and data[place + 1] != 0xDA:
        size = int.from_bytes(data[place + 2 : place + 4], "big")
        segments.append((data[place + 1], data[place + 4 : place + 2 + size]))
        place += 2 + size
    number = rng.randrange(len(segments))
    marker, body = segments[number]
    choices = [[(marker, damaged(rng, body))], [(marker, body)] * 2, [], [(rng.randrange(0xC0, 0xFF), body)]]
    segments[number : number + 1] = rng.choice([*choices, choices[0], choices[0]])
    made = b"".join(
        bytes([0xFF, marker]) + struct.pack(">H", (len(body) + 2) & 0xFFFF) + body for marker, body in segments
    )
    return data[:2] + made + data[place:]


def damaged_safetensors(rng: Random, data: bytes) -> bytes:
    """Damage to the header of a safetensors file, with a length that fits."""
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    for _ in range(rng.randint(1, 2)):
        if not isinstance(header, dict) or not header:
            break
        names = list(header)
        name, how = rng.choice(names), rng.randrange(4)
        if how == 0:
            new = rng.choice(
                (name + "x", name.replace(".", "_"), name.replace("weight", "bias"), name[3:], "alpha", name + ".alpha")
            )
            header[new] = header.pop(name)
        elif how == 1:
            header["__metadata__"] = damaged_json(rng, header.get("__metadata__", {"format": "pt"}))
        elif how == 2:
            header[name] = header[rng.choice(names)]
        else:
            header = damaged_json(rng, header)
    text = json.dumps(header).encode()
    text = damaged(rng, text) if rng.random() < 0.1 else text
    return len(text).to_bytes(8, "little") + text + body


def one_of(*mutations: Mutation) -> Mutation:
    """Any of some mutations."""
    return lambda rng, data: rng.choice(mutations)(rng, data)

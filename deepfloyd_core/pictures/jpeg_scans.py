"""Works on a JPEG's bytes before it is decoded: a sample of its blocks, and a copy without scans that do not show.

A small crop needs a decode at one eighth only, but such a decode hides the detail inside a block. `sample_jpegs` shows
this detail for a few per cent of a full decode: it cuts pieces from all over the file, and puts them together as a tiny
JPEG with the same tables. A piece may start inside a Huffman code; the decoder falls into step again within a few
blocks, which the reader leaves out. Layout and names: ITU-T T.81, annex B. For an unusual file the result is None, and
the caller decodes the whole file.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from struct import error as StructError
from struct import pack, unpack_from

SAMPLE_ROWS, SAMPLE_BLOCKS = 12, 32  # 12 strips of 256 px
MAX_LOST = 0.75  # levels of 255, of one coefficient: its last bit from quality 75 on, its last two from 92 on
_BASELINE, _EXTENDED, _PROGRESSIVE, _HUFFMAN, _QUANTA = 0xC0, 0xC1, 0xC2, 0xC4, 0xDB
_SCAN, _END, _RESTARTS, _LATE_HEIGHT = 0xDA, 0xD9, 0xDD, 0xDC
_COLOUR = (0xE0, 0xEE)  # JFIF and Adobe: they say what the components mean
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # in coded bytes: neither stuffing nor a restart
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_START, _FINISH = b"\xff\xd8", b"\xff\xd9"


@dataclass(frozen=True)
class Segment:
    """A marker and its data. A scan's segment ends with its coded bytes, which begin at `coded`."""

    marker: int
    start: int
    coded: int
    end: int


@dataclass(frozen=True)
class Scan:
    """Coefficients `first` to `last` of some components; `known` and `left`: T.81's Ah and Al."""

    segment: Segment
    components: bytes
    first: int
    last: int
    known: int
    left: int


@dataclass(frozen=True)
class Layout:
    """The structure of the first picture of a JPEG file. `sampling`: a component's factors, 4 bits horizontal and 4
    vertical.
    """

    progressive: bool
    size: tuple[int, int]
    sampling: dict[int, int]
    frame: Segment
    segments: tuple[Segment, ...]
    scans: tuple[Scan, ...]

    @property
    def unit(self) -> tuple[int, int]:
        """Blocks across and down that a coded unit of all components covers."""
        return max(value >> 4 for value in self.sampling.values()), max(value & 15 for value in self.sampling.values())


def read_layout(data: bytes) -> Layout | None:
    """Parse a Huffman-coded JPEG of 8 bits; None when anything about it is unusual."""
    try:
        segments = tuple(_segments(data))
        frames = [segment for segment in segments if segment.marker in (_BASELINE, _EXTENDED, _PROGRESSIVE)]
        scans = tuple(_scan(data, segment) for segment in segments if segment.marker == _SCAN)
        bits, height, width, count = unpack_from(">BHHB", data, frames[0].start + 4)
        body = data[frames[0].start + 10 : frames[0].end]
        sampling = {body[3 * n]: body[3 * n + 1] for n in range(count)}
    except (IndexError, ValueError, StructError):
        return None
    usual = len(frames) == 1 and bits == 8 and width and height and scans and len(sampling) == count == len(body) / 3
    fit = all(1 <= value >> 4 <= 4 and 1 <= value & 15 <= 4 for value in sampling.values())
    alone = all(len(scan.components) == 1 for scan in scans if scan.first)  # T.81 G.1.1.1.1
    named = all(scan.components and set(scan.components) <= set(sampling) for scan in scans)
    if not (usual and fit and alone and named):
        return None
    return Layout(frames[0].marker == _PROGRESSIVE, (width, height), sampling, frames[0], segments, scans)


def all_scans_are_there(data: bytes) -> bool:
    """Whether a JPEG's scans contain every bit of every component; False also when anything about it is unusual."""
    layout = read_layout(data)
    if layout is None:
        return False
    if layout.progressive:
        return all(_is_complete(layout, name) for name in layout.sampling)
    return {name for scan in layout.scans for name in scan.components} == set(layout.sampling)


def sample_jpegs(data: bytes, layout: Layout) -> list[tuple[int, bytes]] | None:
    """Tiny JPEGs of SAMPLE_ROWS strips from all over the picture, their means near mid-gray; the first strip is exact.

    One with all components (number 0) of a baseline JPEG; of a progressive one a gray one, with the component's number,
    for each scan that brings new detail.
    """
    if not layout.progressive:
        whole = len(layout.scans[0].components) == len(layout.sampling)
        return [(0, _sample(data, layout, layout.scans[0]))] if whole else None
    order = list(layout.sampling)
    new = [scan for scan in layout.scans if scan.first and not scan.known]
    return [(order.index(scan.components[0]), _sample(data, layout, scan)) for scan in new]


def without_detail(data: bytes, layout: Layout, divisor: int) -> bytes | None:
    """A copy of a progressive JPEG without scans that do not or hardly show when it is decoded at 1 / divisor.

    Which scans go depends on how many pixels a component's block becomes. One pixel: it is the block's mean, so all
    other scans go, and the decode has the same bits. 2x2 pixels: an output pixel averages at least as many
    (resize.MIN_RATIO), so scans go that only refine what is known to MAX_LOST. Measured against the literal recipe,
    crops of 40 to 48 dB lose up to 0.5 dB, better ones up to 0.7. Finer means keep all scans.

    A scan of zeros closes each component: without it libjpeg would assume missing bits and smooth over the blocks.
    None: there is nothing to leave out.
    """
    restarts = any(segment.marker == _RESTARTS for segment in layout.segments)
    if not layout.progressive or restarts or not all(_is_complete(layout, name) for name in layout.sampling):
        return None
    (across, down), steps, luma = layout.unit, _mean_steps(data, layout), next(iter(layout.sampling))
    dropped: set[Segment] = set()
    zeros: list[bytes] = []
    for name, factors in layout.sampling.items():
        whole = factors == across << 4 | down
        shown = 8 // divisor * max(-(-across // (factors >> 4)), -(-down // (factors & 15)))  # pixels along a block
        detail = [scan for scan in layout.scans if scan.first and scan.components[0] == name]
        fine = [scan for scan in detail if scan.known and name in steps and _lost(scan, steps[name]) <= MAX_LOST]
        if shown == 1:
            dropped |= {scan.segment for scan in detail}
            zeros.append(_zeros(name, 1, 63, 0) + _no_detail(layout))
        elif shown == 2 and (name == luma or not whole):  # full colours as well would double the loss
            dropped |= {scan.segment for scan in fine}
            # Where its bytes end libjpeg leaves the coefficients as they are, which is faster than reading zeros.
            zeros += [_zeros(name, scan.first, scan.last, scan.known << 4 | scan.left) + bytes(2) for scan in fine]
    if not dropped:
        return None
    kept = (layout.frame.marker, _HUFFMAN, _QUANTA, _SCAN, *_COLOUR)
    parts = [data[part.start : part.end] for part in layout.segments if part.marker in kept and part not in dropped]
    table = pack(">BBHB16BB", 0xFF, _HUFFMAN, 20, 0x10, 1, *bytes(15), 0xE0)
    return b"".join([_START, *parts, table, *zeros, _FINISH])


def _zeros(component: int, first: int, last: int, bits: int) -> bytes:
    return pack(">BBHBBBBBB", 0xFF, _SCAN, 8, 1, component, 0, first, last, bits)


def _no_detail(layout: Layout) -> bytes:
    """Coded bytes for blocks without coefficients: code 0 and 14 zero bits stand for the next 2^14 blocks."""
    codes = -(-layout.size[0] // 8) * -(-layout.size[1] // 8) // 2**14 + 1
    return bytes(-(-15 * codes // 8))


def _lost(scan: Scan, step: float) -> float:
    """Levels by which a coefficient is wrong at most without a refining scan and those after it, rms over its block."""
    return ((1 << scan.known) - 1) * step / 8


def _mean_steps(data: bytes, layout: Layout) -> dict[int, float]:
    """Each component's quantisation step, the mean of the five lowest frequencies: most of what 2x2 pixels show.

    A component is left out when its table is not there, or there twice.
    """
    tables: dict[int, list[float]] = {}
    for segment in layout.segments:
        place = segment.start + 4
        while segment.marker == _QUANTA and place < segment.end:
            width = 1 + (data[place] >> 4)
            low = range(place + 1 + width, place + 1 + 6 * width, width)
            steps = [int.from_bytes(data[at : at + width], "big") for at in low]
            tables.setdefault(data[place] & 15, []).append(sum(steps) / len(steps))
            place += 1 + 64 * width
    body = data[layout.frame.start + 10 : layout.frame.end]
    used = {body[at]: tables.get(body[at + 2], []) for at in range(0, 3 * len(layout.sampling), 3)}
    return {name: found[0] for name, found in used.items() if len(found) == 1}


def _segments(data: bytes) -> Iterator[Segment]:
    """The segments up to the end of the first picture. Raises IndexError or struct.error when it is not there."""
    place, search = 2, False
    while True:
        while data[place : place + 2] == b"\xff\xff":  # fill bytes
            place += 1
        marker = data[place + 1]
        if data[place] != 0xFF or marker in (0, 1, _LATE_HEIGHT) or 0xD0 <= marker <= 0xD8:
            raise IndexError(place)
        if marker == _END:
            return
        coded = end = place + 2 + unpack_from(">H", data, place + 2)[0]
        if marker == _SCAN:
            # Looking for it costs 1 ms a megabyte; the one scan of a baseline file ends with the file.
            found = _MARKER.search(data, coded) if search or not data.endswith(_FINISH) else None
            end = found.start() if found else len(data) - 2
        if not coded <= end <= len(data):
            raise IndexError(end)
        search |= marker == _PROGRESSIVE or data[place + 4 : place + 8] == b"MPF\0"  # several pictures in one file
        yield Segment(marker, place, coded, end)
        place = end


def _scan(data: bytes, segment: Segment) -> Scan:
    count = data[segment.start + 4]
    names = data[segment.start + 5 : segment.start + 5 + 2 * count : 2]
    first, last, bits = data[segment.start + 5 + 2 * count : segment.start + 8 + 2 * count]
    return Scan(segment, names, first, last, bits >> 4, bits & 15)


def _is_complete(layout: Layout, component: int) -> bool:
    """Whether the scans bring all 64 coefficients of a component down to the last bit."""
    done: set[int] = set()
    for scan in layout.scans:
        if component in scan.components and not scan.left:
            done.update(range(scan.first, scan.last + 1))
    return done == set(range(64))


def _sample(data: bytes, layout: Layout, scan: Scan) -> bytes:
    """A JPEG of pieces of one scan, each a row of units and a restart interval of its own."""
    coded, end = scan.segment.coded, scan.segment.end
    frame = bytearray(data[layout.frame.start : layout.frame.end])
    across, down = layout.unit
    if len(scan.components) == 1:  # coded block by block, whatever its factors
        across = down = 1
        place = next(n for n in range(10, len(frame), 3) if frame[n] == scan.components[0])
        frame = bytearray(pack(">HHBIB", unpack_from(">H", frame)[0], 11, 8, 0, 1)) + frame[place : place + 3]
        frame[11] = 0x11
    row_units = SAMPLE_BLOCKS // across
    frame[5:9] = pack(">HH", SAMPLE_ROWS * down * 8, row_units * across * 8)
    units = -(-layout.size[0] // (8 * across)) * -(-layout.size[1] // (8 * down))
    length = 2 * row_units * (end - coded) // units + 64  # twice the mean: what is left over is skipped
    parts = [_START]
    for segment in layout.segments:
        before = segment.start < scan.segment.start
        if before and segment.marker == _QUANTA:
            parts.append(_unit_mean(data[segment.start : segment.end]))
        elif before and segment.marker in (_HUFFMAN, *_COLOUR):
            parts.append(data[segment.start : segment.end])
    parts += [bytes(frame), pack(">BBHH", 0xFF, _RESTARTS, 4, row_units), data[scan.segment.start : coded]]
    for row in range(SAMPLE_ROWS):
        start = coded + max(0, end - coded - length) * row // (SAMPLE_ROWS - 1)
        start += data[start - 1] == 0xFF and data[start] == 0  # the second half of a stuffed byte
        piece = max(_RESTART.split(data[start : min(start + length, end)]), key=len)
        parts += [piece.removesuffix(b"\xff"), bytes((0xFF, 0xD0 + row % 8))]
    return b"".join(parts[:-1]) + _FINISH


def _unit_mean(tables: bytes) -> bytes:
    """Tables with a step of 1 for the mean: a piece does not know it, and it must not drive pixels to 0 or 255."""
    changed, place = bytearray(tables), 4
    while place < len(changed):
        width = 1 + (changed[place] >> 4)
        changed[place + 1 : place + 1 + width] = (1).to_bytes(width, "big")
        place += 1 + 64 * width
    return bytes(changed)

"""Pairs: conditioning pictures for a ControlNet, read from a second place, not computed from the training pictures.

A picture's pair has the same name, apart from the extension. It may have another size, but must have the same aspect
ratio: it is cropped and resized like its picture.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.pictures.decode import check_decodes, check_fits, read_header
from deepfloyd_core.pictures.faults import Unreadable
from deepfloyd_core.pictures.geometry import Size
from deepfloyd_core.sources.source import read_again

ASPECT_TOLERANCE = 0.01  # of width / height; beside it what rounding both edges of the smaller one can make
PAIR_REASONS = ("conditioning_missing", "conditioning_ambiguous", "conditioning_unreadable", "conditioning_aspect")
_EXTENSION = r"(?s)^(.*[^/])\.[^./]+$"  # what comes before it is what `text_name` keeps


def with_pairs(found: pa.Table, pairs: pa.Table) -> pa.Table:
    """Joins the scan of pictures with the scan of the pairs' place.

    `conditioning`: the names of the files that may be a picture's pair, null if there are none; `conditioning_id`: the
    sha256 of the pair, null unless there is exactly one that can be read.
    """
    pairs = pairs.sort_by("source")
    stems = _stems(pairs["source"]).dictionary_encode()
    numbers = stems.indices.to_numpy()
    order, counts = np.argsort(numbers, kind="stable"), np.bincount(numbers, minlength=len(stems.dictionary))
    starts = np.append(0, np.cumsum(counts))
    names = pa.ListArray.from_arrays(pa.array(starts, pa.int32()), _whole(pairs["source"]).take(pa.array(order)))
    ids = _whole(pairs["sha256"]).take(pa.array(order[starts[:-1]], mask=counts != 1))
    place = pc.index_in(_stems(found["source"]), value_set=stems.dictionary)
    return found.append_column("conditioning", names.take(place)).append_column("conditioning_id", ids.take(place))


def missing_pair(names: tuple[str, ...], sha256: str | None) -> tuple[str | None, str | None]:
    """Why a picture has no pair, given the candidates' names: the ledger's word and its detail; None if it has one."""
    if not names:
        return "conditioning_missing", None
    if len(names) > 1:
        return "conditioning_ambiguous", " and ".join(names)
    return (None, None) if sha256 else ("conditioning_unreadable", names[0])


def check_pair(place: ImageDataset, name: str, sha256: str, size: Size, memory_mib: int) -> None:
    """Raises Unreadable unless a pair can be decoded in `memory_mib` and has the aspect ratio of its picture, of
    upright `size`.
    """
    try:
        data = read_again(place, name, sha256)
        if data is None:
            raise Unreadable("conditioning_unreadable", f"{name} changed while the index was made")
        own = read_header(data).size
        if not same_aspect(own, size):
            detail = f"{name} is {own[0]}x{own[1]} px, its picture {size[0]}x{size[1]} px"
            raise Unreadable("conditioning_aspect", detail)
        check_fits(own, memory_mib)
        check_decodes(data)
    except OSError as error:
        raise Unreadable("conditioning_unreadable", str(error)) from None
    except Unreadable as error:
        if error.reason in PAIR_REASONS:
            raise
        raise Unreadable("conditioning_unreadable", f"{name}: {error.reason.replace('_', ' ')}, {error}") from None


def same_aspect(one: Size, other: Size) -> bool:
    """Whether two sizes have the same aspect ratio, within ASPECT_TOLERANCE or half a pixel of each edge of the smaller
    one.
    """
    across, down = one[0] * other[1], other[0] * one[1]
    return abs(across - down) <= max(ASPECT_TOLERANCE * max(across, down), sum(one) / 2, sum(other) / 2)


def _stems(names: pa.ChunkedArray) -> pa.Array:
    return _whole(pc.replace_substring_regex(names, _EXTENSION, r"\1"))


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)

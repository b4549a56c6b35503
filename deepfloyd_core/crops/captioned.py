"""Contact sheets of crops for people, with each one's file and caption: a sheet for each size.

They are made anew for each page that shows them, from the crops alone, and are part of no artifact.
"""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from deepfloyd_core.crops.rows import read_row_list, shard_files
from deepfloyd_core.crops.shards import open_shard, read_rows
from deepfloyd_core.pictures.sheets import Cell, captioned_sheet, fitted, wrapped
from deepfloyd_core.store.artifacts import Artifact

SIZES, CROPS, COLUMNS, CELL_PX = 3, 12, 6, 128
FILES, READ = 3, 10_000  # the crops of a size are from so many files at most: the other rows of a file are read as well
_CAPTION_LINES, _TEXT_PX = 2, 12


def captioned_crops(crops: Artifact) -> Iterator[tuple[str, Image.Image]]:
    """A title and a sheet for each of the sizes with most crops, at most SIZES."""
    rows, files = read_row_list(crops.path), shard_files(crops)
    width, height, file, place = (rows[name].to_numpy() for name in ("width", "height", "file", "place"))
    sizes, counts = np.unique(np.stack([width, height], 1), axis=0, return_counts=True)
    for size, count in sorted(zip(sizes.tolist(), counts.tolist(), strict=True), key=lambda pair: -pair[1])[:SIZES]:
        of_size = np.flatnonzero((width == size[0]) & (height == size[1]))
        few = of_size[np.isin(file[of_size], list(dict.fromkeys(file[of_size[:READ]].tolist()))[:FILES])]
        chosen = few[np.linspace(0, len(few) - 1, min(CROPS, len(few))).astype(int)]
        cells = []
        for number in dict.fromkeys(file[chosen].tolist()):
            known, pixels = read_rows(files[number]), open_shard(files[number])
            for row in place[chosen[file[chosen] == number]].tolist():
                cells.append(_cell(pixels[row], known[row].source, known[row].caption))
        sheet = captioned_sheet(cells, COLUMNS, CELL_PX, f"{len(cells)} of {count:,} crops")
        yield f"Crops of {size[0]}x{size[1]} px", sheet


def _cell(pixels: np.ndarray, source: str, caption: str) -> Cell:
    name = fitted(source, CELL_PX, _TEXT_PX, keep_end=True)
    return Cell(pixels, "", (name, *wrapped(caption, CELL_PX, _CAPTION_LINES)))

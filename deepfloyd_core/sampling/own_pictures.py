"""The user's own pictures that are upscaled: a file, or the files of a folder with captions beside them. No torch."""

from collections import Counter
from pathlib import Path

from deepfloyd_core.errors import ConfigError
from deepfloyd_core.sampling.drawn_picture import drawn_picture
from deepfloyd_core.sampling.pictures import INDEX
from deepfloyd_core.sampling.upscale_jobs import OwnPicture
from deepfloyd_core.sources.names import CAPTIONS
from deepfloyd_core.store.pinned import pinned

MOST_PICTURES = 4096
MOST_BYTES = 64 << 20  # of a picture's file
MOST_LETTERS = 4000  # of a caption


def picture_files(path: Path) -> list[Path]:
    """The files of pictures at a path, by name: itself, or those of a folder; hidden files and captions are none.

    Raises ConfigError where there is none, for too many, for a file that is too large, and for a name that is no text.
    """
    if not path.exists():
        raise ConfigError(f"{path} is not there. Give a picture, or a folder of pictures.")
    files = sorted(_candidates(path)) if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"{path} has no pictures.")
    if len(files) > MOST_PICTURES:
        raise ConfigError(f"{path} has {len(files):,} files; at most {MOST_PICTURES:,} are upscaled at once.")
    for file in files:
        _check(file)
    return files


def own_pictures(path: Path, prompt: str) -> tuple[OwnPicture, ...]:
    """The pictures of a file or a folder, hashed. prompt: of those without a caption in NAME.txt beside them; empty: what
    `generate` has recorded. Raises as `picture_files`.
    """
    files = picture_files(path)
    stems = Counter(file.stem for file in files)
    return tuple(
        OwnPicture(
            name=file.name,
            file=f"{file.stem if stems[file.stem] == 1 else file.name}.png",
            prompt=_caption(file) or prompt or _recorded(file),
            source=pinned(file),
        )
        for file in files
    )


def upscaled_files(folder: Path) -> list[Path]:
    """The pictures that were made of them, in a folder of `upscale`."""
    import pyarrow.parquet as pq

    names = pq.read_table(folder / INDEX, columns=["file"]).column("file").to_pylist()
    return [folder / name for name in names if name]


def _candidates(folder: Path) -> list[Path]:
    others = {f".{suffix}" for suffix in CAPTIONS}
    return [file for file in folder.iterdir()
            if file.is_file() and not file.name.startswith(".") and file.suffix.lower() not in others]  # fmt: skip


def _check(file: Path) -> None:
    try:
        file.name.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{file.name!r} is no text in UTF-8. Rename the file.") from None
    if not file.is_file():
        raise ConfigError(f"{file} is no file.")
    if (size := file.stat().st_size) > MOST_BYTES:
        raise ConfigError(f"{file} has {size:,} bytes; a picture to upscale may have {MOST_BYTES:,}.")


def _caption(file: Path) -> str:
    """The text of NAME.txt; empty: there is none."""
    try:
        with file.with_suffix(".txt").open(encoding="utf-8", errors="replace") as caption:
            return " ".join(caption.read(MOST_LETTERS).split())
    except OSError:
        return ""


def _recorded(file: Path) -> str:
    """The prompt that `generate` drew a picture with; empty: it did not draw it."""
    try:
        return drawn_picture(file).prompt[:MOST_LETTERS]
    except ConfigError:
        return ""

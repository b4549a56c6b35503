"""What a file's name tells: whether it is a picture, a caption, something else, or unknown.

The name only decides which files are read; the bytes decide what a file is. So a JPEG named .png is a picture, and so
is one without an extension. A film, a sidecar or a file manager's thumbnail is no input, and is not read.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Literal

from deepfloyd_core.sources.picture_bytes import AVIF_BRANDS, HEIF_BRANDS

Kind = Literal["picture", "unsure", "caption", "other"]


def words(text: str) -> frozenset[str]:
    """A set of words, written as a text."""
    return frozenset(text.split())


PICTURES = words(
    "jpg jpeg jpe jfif jfi jif pjpeg pjp mpo png apng webp bmp dib gif tif tiff avif avifs heic heics heif heifs hif jxl "
    "jp2 j2k jpf jpx pbm pgm ppm pnm tga exr hdr ico dds pcx"
)
CAPTIONS = ("txt", "caption")
_CAPTION_ENDS = tuple(f".{extension}" for extension in CAPTIONS)
_METADATA = ("json",)
# The rest would only cost a read each, but for those whose first bytes are a picture's: raw files, previews, back-ups.
OTHERS = words(
    "aae xmp thm pp3 dop on1 cos lrprev lrcat csv tsv jsonl ndjson parquet arrow feather npz npy pt pth ckpt safetensors "
    "bin pkl h5 db sqlite ini cfg yaml yml toml xml html htm md rst rtf pdf doc docx odt xls xlsx log lnk url info gpx srt "
    "mov mp4 m4v avi mkv webm 3gp mts m2ts mpg mpeg wmv flv mp3 wav m4a aac flac ogg opus "
    "zip tar gz tgz bz2 xz zst 7z rar exe dll so py ipynb sh bat c h js css idx "
    "psd psb xcf kra ai svg svgz eps indd sketch blend "
    "cr2 cr3 crw nef nrw arw srf sr2 dng orf rw2 raf pef srw 3fr fff iiq x3f raw rwl "
    "bak orig old tmp part partial crdownload"
)
# Folders of file managers and network drives, with small copies of the pictures.
JUNK_FOLDERS = frozenset(
    {"@eadir", "__macosx", "$recycle.bin", "#recycle", "#snapshot", "lost+found", "system volume information"}
)
_BACKUP = ("_original", "~")  # exiftool's and editors'


def kind(name: str) -> Kind:
    """The kind of a file by its path in a source: `caption` for what belongs to pictures, `unsure` if only its bytes
    can tell.
    """
    folders, _, last = name.rpartition("/")
    extension = _extension(last)
    if extension in PICTURES and not folders:
        return "picture"  # nearly all of them
    if last.endswith(_BACKUP) or (folders and any(folder.lower() in JUNK_FOLDERS for folder in folders.split("/"))):
        return "other"
    if extension in PICTURES:
        return "picture"
    if extension in CAPTIONS or extension in _METADATA:
        return "caption"
    return "other" if extension in OTHERS else "unsure"


def starts_like_picture(data: bytes) -> bool:
    """Whether the first bytes are those of a picture format, also of one that is not supported here."""
    if data[4:8] == b"ftyp":
        brands = data[8 : min(len(data), int.from_bytes(data[:4], "big"), 64)]
        return any(brands[at : at + 4] in AVIF_BRANDS + HEIF_BRANDS for at in range(0, len(brands), 4))
    if data[:4] == b"RIFF":
        return data[8:12] == b"WEBP"
    if data[:2] == b"BM":
        return int.from_bytes(data[14:18], "little") in (12, 40, 52, 56, 64, 108, 124)  # lengths of its header
    return data.startswith(_STARTS)


_STARTS = (
    b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+",
    b"\xff\n", b"\0\0\0\x0cJXL ",
)  # fmt: skip


def label(name: str) -> str:
    """A word for the kind of another file by its name: `.mov`, or `@eaDir/`."""
    *folders, last = name.split("/")
    for folder in folders:
        if folder.lower() in JUNK_FOLDERS:
            return f"{folder}/"
    extension = _extension(last)
    return f".{extension}" if extension else "no extension"


def counted(counts: Mapping[str, int], most: int = 6) -> str:
    """Counts as words, the largest first: `.mov 12, .aae 12, 3 others`."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown, rest = ranked[:most], sum(count for _, count in ranked[most:])
    return ", ".join([*(f"{name} {count}" for name, count in shown), *([f"{rest} others"] if rest else [])])


def count_labels(names: Iterable[str]) -> Counter[str]:
    """How many other files of each kind there are."""
    return Counter(label(name) for name in names)


def caption_names(picture: str) -> tuple[str, ...]:
    """The names that a picture's caption file may have, in order of precedence: cat.txt, cat.jpg.txt, cat.caption."""
    stem = without_extension(picture)
    return tuple(dict.fromkeys(f"{base}.{extension}" for extension in CAPTIONS for base in (stem, picture)))


def caption_files(names: Iterable[str]) -> dict[str, str]:
    """The caption files among some names, by their name with the extension in lower case.

    Of cat.TXT and cat.txt the second counts; of cat.TXT and cat.Txt the first in alphabetical order.
    """
    files: dict[str, str] = {}
    for name in names:
        if name.lower().endswith(_CAPTION_ENDS):
            lowered = _lowered(name)
            other = files.get(lowered, name)
            files[lowered] = lowered if lowered in (name, other) else min(name, other)
    return files


def caption_file(picture: str, files: Mapping[str, str]) -> str | None:
    """The caption file of a picture among `caption_files`."""
    if not files:
        return None
    usual = files.get(f"{without_extension(picture)}.txt")
    return usual or next((files[name] for name in caption_names(picture) if name in files), None)


def without_extension(name: str) -> str:
    """The same as pathlib's `with_suffix("")` of a name."""
    folder, slash, last = name.rpartition("/")
    dot = last.rfind(".")
    return f"{folder}{slash}{last[:dot] if 0 < dot < len(last) - 1 else last}"


def _lowered(name: str) -> str:
    stem = without_extension(name)
    return stem + name[len(stem) :].lower()


def _extension(last: str) -> str:
    dot = last.rfind(".")
    return last[dot + 1 :].lower() if 0 < dot < len(last) - 1 else ""

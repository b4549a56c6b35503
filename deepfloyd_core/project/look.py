"""Looks at a folder of pictures: how many, which sizes and shapes, faces or not, captions, what cannot be used.

Every file is listed, which costs 8 us each. Of many files a sample is opened, those with the smallest hashes of their
names: so the same ones in every look, a fair part of every subfolder, and a few hundred names in memory at a time.
Headers are read first, because sizes are all that most choices need; then as many pictures are decoded as 200
megapixels are, and faces are looked for in the first of these, 0.3 s each. 5,000 photographs of 12 megapixels take
5 s of CPU time. Files are only read. Those that harm their reader harm a child process.
"""

import heapq
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.config.run import RunConfig
from deepfloyd_core.errors import ConfigError, DataError
from deepfloyd_core.hashing import hash_seed
from deepfloyd_core.index.scan import UNSURE_BYTES
from deepfloyd_core.pictures.faces import missing_detector
from deepfloyd_core.processes.pool import Children, Limits, Lost
from deepfloyd_core.project.captions import CaptionsSeen, caption_table, seen_captions
from deepfloyd_core.project.glimpse import Asked, Glimpse, glimpse
from deepfloyd_core.sources.folder import Folder
from deepfloyd_core.sources.listing import FILE_BYTES, Listed
from deepfloyd_core.sources.names import counted, label
from deepfloyd_core.store.counts import many

MOST_OPENED, MOST_BYTES = 500, 1 << 30  # files of a sample, and their size together
LEAST_OPENED = 24  # however large they are
MOST_PIXELS = 200_000_000  # decoded
MOST_FACES = 24  # pictures that a face is looked for in
_MEMORY_MIB = int(RunConfig.model_fields["decode_memory_mib"].default)
_SECONDS = 20.0  # for one picture: a run is more patient
_EXAMPLES = 3  # unusable files that are named


@dataclass(frozen=True)
class Seen:
    """A picture of the sample that a run can read."""

    source: str  # its path in the folder
    width: int  # upright, px
    height: int
    format: str
    face: bool | None = None  # None: not looked for
    decoded: bool = False

    @property
    def aspect(self) -> float:
        """Width / height."""
        return self.width / self.height

    @property
    def short_px(self) -> int:
        """The shorter edge."""
        return min(self.width, self.height)


@dataclass(frozen=True)
class FolderLook:
    """What a folder has."""

    folder: Path  # absolute
    files: int  # that are pictures by their names or bytes; with those that cannot be read
    opened: int  # of these: the sample, or all
    pictures: int  # that can be read: counted, or in a sample as many as its share makes likely
    seen: tuple[Seen, ...]  # of the opened ones, in the order of their hashes
    unusable: tuple[tuple[str, int], ...]  # reason and count, of the opened ones and of the listing
    examples: tuple[str, ...]  # `NAME: why`, of the unusable ones
    others: str  # files that are no pictures, in words
    subfolders: int  # with pictures
    detects: str  # empty: faces can be looked for; else why not
    captions: CaptionsSeen

    @property
    def is_sample(self) -> bool:
        """Whether only a part was opened."""
        return self.opened < self.files

    @property
    def with_face(self) -> tuple[int, int]:
        """In how many pictures a face is, and in how many it was looked for."""
        looked = [one.face for one in self.seen if one.face is not None]
        return sum(looked), len(looked)


@dataclass
class _Tally:
    """What the listing counts on its way."""

    files: int = 0
    candidates: int = 0  # of these without those that the listing refuses
    with_text: int = 0
    places: set[str] = field(default_factory=set)
    others: Counter[str] = field(default_factory=Counter)
    tables: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def refuse(self, source: str, reason: str, detail: str | None) -> None:
        """Count a file that cannot be used."""
        self.refused[reason] += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(f"{source}: {detail or reason.replace('_', ' ')}")


def look_at(folder: Path) -> FolderLook:
    """Look at a folder. Raises ConfigError if it is none, DataError if nothing in it can be used."""
    check_folder(folder)
    tally = _Tally()
    source = Folder(ImageDataset(id="look", type="local", instance_data_dir=str(folder)))
    sample = heapq.nsmallest(
        MOST_OPENED, _candidates(source, tally), key=lambda listed: hash_seed("look", listed.source)
    )
    sample = _affordable(sample)
    is_whole = len(sample) == tally.candidates
    seen, opened = _opened(folder, sample, tally)
    if not seen:
        raise DataError(_nothing(folder, tally, opened))
    captions = seen_captions(folder, [one.source for one in seen], tally.with_text, sorted(tally.tables))
    return FolderLook(
        folder=Path(os.path.normpath(folder.absolute())),
        files=tally.files,
        opened=tally.files if is_whole else opened,
        pictures=len(seen) if is_whole else round(tally.candidates * len(seen) / opened),
        seen=tuple(seen),
        unusable=tuple(sorted(tally.refused.items())),
        examples=tuple(tally.examples),
        others=counted(tally.others) if tally.others else "",
        subfolders=len(tally.places - {""}),
        detects=missing_detector(),
        captions=captions,
    )


def check_folder(folder: Path) -> None:
    """Raise ConfigError for what is no folder, or one that cannot be used at all."""
    try:
        if not folder.is_dir():
            there = "is a file" if folder.exists() else "is not there"
            raise ConfigError(f"{folder} {there}. Give the folder that has your pictures.")
        os.scandir(folder).close()
        str(folder.absolute()).encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"The name of {str(folder)!r} is no UTF-8, and a run file cannot hold it. Rename the folder."
        ) from None
    except OSError as error:
        reason = str(error.strerror or error).lower()
        raise ConfigError(f"{folder} cannot be listed: {reason}. Give a folder that you may read.") from None


def _candidates(source: Folder, tally: _Tally) -> Iterator[Listed]:
    """The files that may be pictures; all others are counted."""
    for listed in source.listing():
        is_large = listed.bytes > (UNSURE_BYTES if listed.kind == "unsure" else FILE_BYTES)
        if listed.kind == "other" or (is_large and listed.kind == "unsure"):
            tally.others[label(listed.source)] += 1
            tally.tables += [listed.source] if caption_table(listed.source) else []
            continue
        tally.files += 1
        if listed.reason or is_large:
            tally.refuse(listed.source, listed.reason or "unreadable", listed.detail or "it is larger than 1 GiB")
            continue
        tally.candidates += 1
        tally.with_text += listed.text_stamp != "none"
        tally.places.add(listed.source.rpartition("/")[0])
        yield listed


def _affordable(sample: list[Listed]) -> list[Listed]:
    """The first files of a sample, as many as are read in seconds."""
    total = 0
    for number, listed in enumerate(sample):
        total += listed.bytes
        if number >= LEAST_OPENED and total > MOST_BYTES:
            return sample[:number]
    return sample


def _opened(folder: Path, sample: list[Listed], tally: _Tally) -> tuple[list[Seen], int]:
    """The usable pictures of a sample, and how many of its files are pictures by their names or bytes."""
    limits = Limits(_MEMORY_MIB, _SECONDS)
    with Children(min(4, os.cpu_count() or 2), limits, (glimpse.__module__,)) as children:
        asked = [Asked(str(folder / one.source), _MEMORY_MIB, sure=one.kind == "picture") for one in sample]
        seen, strangers = [], 0
        for listed, answer in zip(sample, children.map(glimpse, asked), strict=True):
            one = _settled(answer)
            if not one.is_input:
                strangers += 1
                tally.files -= 1
                tally.others[label(listed.source)] += 1
            elif one.reason:
                tally.refuse(listed.source, one.reason, one.detail)
            else:
                seen.append(Seen(listed.source, one.width, one.height, one.format))
        seen = _decoded(folder, seen, children, tally)
    tally.candidates -= strangers
    return seen, len(sample) - strangers


def _decoded(folder: Path, seen: list[Seen], children: Children, tally: _Tally) -> list[Seen]:
    """The same pictures, the first of them decoded; without those of which that fails."""
    count, pixels = 0, 0
    while count < len(seen) and pixels + seen[count].width * seen[count].height <= MOST_PIXELS:
        pixels += seen[count].width * seen[count].height
        count += 1
    faces = 0 if missing_detector() else MOST_FACES
    asked = [Asked(str(folder / one.source), _MEMORY_MIB, decode=True, face=number < faces)
             for number, one in enumerate(seen[:count])]  # fmt: skip
    kept = []
    for one, answer in zip(seen, children.map(glimpse, asked), strict=False):
        found = _settled(answer)
        if found.reason:
            tally.refuse(one.source, found.reason, found.detail)
        else:
            kept.append(replace(one, face=found.face, decoded=True))
    return kept + seen[count:]


def _settled(answer: Glimpse | Lost) -> Glimpse:
    return Glimpse(reason=answer.reason, detail=answer.detail) if isinstance(answer, Lost) else answer


def _nothing(folder: Path, tally: _Tally, opened: int) -> str:
    """Why a folder cannot be trained on."""
    beside = f" It has other files: {counted(tally.others)}." if tally.others else ""
    if not tally.files or not tally.examples:
        return f"There is no picture in {folder}.{beside} Put pictures there, or give another folder."
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(tally.refused.items()))
    some = f" of the {opened:,} that were opened" if opened < tally.candidates else ""
    return (
        f"No picture{some} in {folder} can be used ({reasons}). For example {tally.examples[0]}. Convert or replace them, "
        "or give another folder."
    )


def in_words(look: FolderLook) -> str:
    """How much of the folder was opened."""
    if not look.is_sample:
        return f"all {many(look.files, 'file')} opened" if look.files > 1 else "the one file opened"
    return f"a sample: {look.opened:,} of {look.files:,} files opened, those with the smallest hashes of their names"

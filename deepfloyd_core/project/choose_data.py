"""Chooses the keys of a data set: crop by shapes and faces, captions by where they are. Pure."""

import math
import re
import unicodedata
from collections import Counter
from pathlib import PurePath
from statistics import fmean

import numpy as np

from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.config.run import RunConfig
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.pictures.geometry import geometry, judge_sizes
from deepfloyd_core.project.captions import FILTERS
from deepfloyd_core.project.choices import Choice
from deepfloyd_core.project.look import FolderLook, Seen
from deepfloyd_core.sources.names import words
from deepfloyd_core.store.counts import many

EDGE_PX = STAGES[1].size_px
BATCH = 4  # samples of a step
# Shapes (width / height) of cameras, phones and screens: at 64 px each has a training size of its own.
SHAPES = (0.5, 0.5625, 0.6667, 0.75, 0.8, 1.0, 1.25, 1.3333, 1.5, 1.7778, 2.0)
MOST_SHAPES = 5
SQUARE_CUT = 0.1  # a square crop may cut off this share of the pictures, on average
RARE = 0.05  # share of the pictures below which a shape gets no size of its own
EXTREME = 3.0  # times as long as wide, or more: a crop would lose most of the picture
FACES = 0.5  # share of pictures with a face from which on crops are placed by it
MOST_REPEATS = 10
TOKEN = "sks"  # the rare word of DreamBooth's examples, which T5 knows nothing of
# Words of folders that do not name what is in the pictures.
_EMPTY_WORDS = words(
    "a an and the my our of in from with for new old all photo photos pic pics picture pictures image images img imgs foto "
    "fotos bilder jpg jpeg png heic dcim camera apple iphone android phone mobile whatsapp export exports folder directory "
    "data dataset datasets train training download downloads desktop documents temp tmp test input inputs raw untitled "
    "cropped resized final ordner neu mixed misc various one two three four five six"
)


def data_choices(look: FolderLook, name: str, place: str) -> tuple[Choice, ...]:
    """The keys of the data set. name: its id; place: its directory, as the data file is to name it."""
    return (
        Choice("id", name, "Name of the data set in every ledger row: from the folder's name."),
        Choice("type", "local", "A directory on this machine, with everything below it."),
        Choice("instance_data_dir", place, _place(look)),
        Choice("resolution", EDGE_PX, "px of Stage I, which makes 64 px; four times as much of Stage II."),
        _minimum(look.seen),
        *_crop(look),
        *_captions(look, place),
        *_repeats(look),
    )


def fitting(data: tuple[Choice, ...], seen: tuple[Seen, ...], stage: Stage) -> int:
    """How many of the pictures a stage can use, by the rules of the run itself."""
    keys = {choice.key: choice.value for choice in data if choice.value is not None and choice.key != "parquet"}
    dataset = ImageDataset.model_validate({**keys, "caption_strategy": "filename"})
    rules = geometry(RunConfig.model_construct(aspect_bucket_rounding=None, aspect_bucket_alignment=8), dataset, stage)
    assert rules is not None
    return int((judge_sizes(np.array([(one.width, one.height) for one in seen]), rules) == 0).sum())


def sample_size(data: tuple[Choice, ...], seen: tuple[Seen, ...]) -> str:
    """`validation_resolution`: Stage I's training size of most pictures."""
    buckets = next((choice.value for choice in data if choice.key == "crop_aspect_buckets"), (1.0,))
    assert isinstance(buckets, tuple)
    counts = Counter(nearest(one.aspect, tuple(map(float, buckets))) for one in seen)
    aspect = counts.most_common(1)[0][0]
    unit = STAGES[1].alignment_px
    longer = unit * round(EDGE_PX * max(aspect, 1 / aspect) / unit)
    if longer == EDGE_PX:
        return str(EDGE_PX)
    return f"{EDGE_PX}x{longer}" if aspect < 1 else f"{longer}x{EDGE_PX}"


def nearest(aspect: float, shapes: tuple[float, ...]) -> float:
    """The shape that cuts off least of a picture."""
    return min(shapes, key=lambda shape: abs(math.log(aspect / shape)))


def subject(folder: PurePath, has_faces: bool) -> str:
    """What the pictures show, for a prompt: `person` where faces are seen, else the words of the folder's name."""
    if has_faces:
        return "person"
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", unicodedata.normalize("NFC", folder.name))
    kept = [word for word in re.findall(r"[^\W\d_]+", name) if word.lower() not in _EMPTY_WORDS]
    return " ".join(kept[:4]).lower()


def has_faces(look: FolderLook) -> bool:
    """Whether most pictures show a face."""
    faces, looked = look.with_face
    return bool(looked) and faces >= FACES * looked


def _place(look: FolderLook) -> str:
    beside = f" Other files there, which are no input: {look.others}." if look.others else ""
    below = f" {many(look.subfolders, 'subfolder')} with pictures." if look.subfolders else ""
    return f"{many(look.files, 'file')} that may be pictures.{below}{beside} Nothing in it is ever changed."


def _minimum(seen: tuple[Seen, ...]) -> Choice:
    small = sum(one.short_px < EDGE_PX for one in seen)
    if small:
        are = "is" if small == 1 else "are"
        why = f"{small:,} of the {many(len(seen), 'opened picture')} {are} smaller and left out: nothing is ever upsampled."
    else:
        least = min(seen, key=lambda one: one.short_px)
        why = f"Smaller pictures would be left out: nothing is upsampled. The smallest is {least.width}x{least.height} px."
    return Choice("minimum_image_size", EDGE_PX, f"{why} The shorter edge, px.", "smallest size" if small else "")


def _crop(look: FolderLook) -> tuple[Choice, ...]:
    seen = [one for one in look.seen if one.short_px >= EDGE_PX] or list(look.seen)
    extreme = [one for one in seen if not 1 / EXTREME <= one.aspect <= EXTREME]
    limits: tuple[Choice, ...] = ()
    if 0 < len(extreme) <= len(seen) / 4:
        seen = [one for one in seen if one not in extreme]
        are = "is" if len(extreme) == 1 else "are"
        why = (
            f"{many(len(extreme), 'picture')} {are} more than {EXTREME:g} times as long as wide: left out, because a crop "
            "would lose most."
        )
        limits = (
            Choice("minimum_aspect_ratio", round(1 / EXTREME, 4), why, "extreme shapes"),
            Choice("maximum_aspect_ratio", EXTREME, "The same for the other direction."),
        )
    cut = fmean(1 - min(one.aspect, 1 / one.aspect) for one in seen)
    style = _style(look)
    shapes = _shapes(seen)
    if has_faces(look) or cut <= SQUARE_CUT or not shapes:
        why = f"A square cuts off {cut:.0%} of a picture on average."
        if cut > SQUARE_CUT:
            why += (
                " The crop follows the faces."
                if has_faces(look)
                else " No shape is common enough for a size of its own."
            )
        return (Choice("crop_aspect", "square", why + " IF makes squares.", "shape"), style, *limits)
    covered = sum(nearest(one.aspect, SHAPES) in shapes for one in seen)
    told = "all of them" if covered == len(seen) else f"{covered:,} of {len(seen):,}"
    why = (
        f"A square would cut off {cut:.0%} of a picture on average, so each is cut to the nearest of some common shapes, "
        f"which {told} nearly have already."
    )
    least = (
        f" A batch has one size, so a shape needs {BATCH} pictures and {RARE:.0%} of them." if len(seen) > BATCH else ""
    )
    return (
        Choice("crop_aspect", "closest", why + least, "shape"),
        Choice("crop_aspect_buckets", shapes, "Width / height, the commonest first."),
        style,
        *limits,
    )


def _shapes(seen: list[Seen]) -> tuple[float, ...]:
    """The common shapes, the commonest first; empty if they are not those of most pictures."""
    counts = Counter(nearest(one.aspect, SHAPES) for one in seen)
    least = max(BATCH, RARE * len(seen)) if len(seen) >= BATCH else 1
    common = [(shape, count) for shape, count in counts.most_common(MOST_SHAPES) if count >= least]
    return tuple(shape for shape, _ in common) if 2 * sum(count for _, count in common) > len(seen) else ()


def _style(look: FolderLook) -> Choice:
    faces, looked = look.with_face
    if look.detects:
        return Choice("crop_style", "center", f"Faces were not looked for: {look.detects}", "place of the crop")
    found = f"A face was found in {faces} of {many(looked, 'picture')}"
    if has_faces(look):
        return Choice("crop_style", "face", f"{found}: crops are centred on it.", "place of the crop")
    told = f"{found}, too few to place crops by." if faces else f"No face was found in {many(looked, 'picture')}."
    return Choice("crop_style", "center", f"{told} The centre is where people put what they take.", "place of the crop")


def _captions(look: FolderLook, place: str) -> tuple[Choice, ...]:
    found = look.captions
    if found.strategy == "instanceprompt":
        return _prompt(look)
    total = len(found.texts) + found.missing
    told = f"{len(found.texts):,} of {many(total, 'picture')} have a caption"
    missing = f"; the others are left out ({found.fault})" if found.missing else ""
    where = {"textfile": "in text files beside them", "filename": "in their names"}.get(found.strategy, "in a table")
    chosen = [Choice("caption_strategy", found.strategy, f"{told} {where}{missing}.", "captions")]
    if found.table is not None:
        table = found.table.model_copy(update={"path": f"{place}/{PurePath(found.table.path).name}"})
        chosen.append(Choice("parquet", table, "The table, and its columns with names of files and captions."))
    if found.strips_numbers:
        chosen.append(Choice("caption_filter_list", FILTERS, "Numbers at the end of a name are no caption: removed."))
    return tuple(chosen)


def _prompt(look: FolderLook) -> tuple[Choice, ...]:
    beside = f" ({look.captions.beside})" if look.captions.beside else ""
    noun = subject(look.folder, has_faces(look))
    prompt = f"a photo of {TOKEN} {noun}" if noun else f"a picture in the style of {TOKEN}"
    source = "faces were seen" if has_faces(look) else "by the folder's name"
    kind = (
        f"and what it is ({source})" if noun else "as a style, because the folder's name does not tell what they show"
    )
    return (
        Choice("caption_strategy", "instanceprompt", f"There are no captions{beside}: all share a prompt.", "captions"),
        Choice(
            "instance_prompt",
            prompt,
            f"DreamBooth's form: a rare word that is to become the name of what is shown, {kind}. LOOK AT THIS ONE: what "
            f"the pictures show cannot be seen by a program. For a cat write `a photo of {TOKEN} cat`.",
            "prompt",
        ),
    )


def _repeats(look: FolderLook) -> tuple[Choice, ...]:
    most = min(look.captions.most, MOST_REPEATS + 1)
    if most > 1:
        why = f"Up to {look.captions.most} captions of a picture: a pass shows one, so an epoch has {most} passes."
        return (Choice("repeats", most - 1, why),)
    if look.pictures < BATCH:
        why = f"{many(look.pictures, 'picture')} would leave batches of {BATCH} unfilled; {BATCH} passes fill them."
        return (Choice("repeats", BATCH - 1, why),)
    return ()

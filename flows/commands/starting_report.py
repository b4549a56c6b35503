"""What `deepfloyd init` prints: what was seen, what was chosen and why, and what comes next."""

from collections import Counter
from collections.abc import Iterator
from statistics import median

from rich.console import Console
from rich.table import Table

from deepfloyd_core.config.flavours import PUBLISHED
from deepfloyd_core.config.run import Run
from deepfloyd_core.project.choices import Choice, Choices
from deepfloyd_core.project.look import FolderLook, Seen, in_words
from deepfloyd_core.project.write import plain
from deepfloyd_core.store.counts import many
from tasks.terminal import print_table

_FORMATS = 4


def print_look(out: Console, look: FolderLook) -> None:
    """What is in the folder."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for what, told in _looked(look):
        table.add_row(what, plain(told))
    print_table(out, table)


def print_choices(out: Console, choices: Choices, files: tuple[str, str]) -> None:
    """What decides the run, a line each. The files have every value with all of its reason."""
    out.print("")
    out.print(f"Chosen (every value with its reason: {' and '.join(files)}):")
    chosen = [choice for choice in choices.data if choice.title] + [choice for choice in choices.run if choice.title]
    for stage in choices.stages:
        chosen += [choice for choice in stage.keys if choice.title and not stage.left_out]
        chosen += [Choice(stage.table, "left out", stage.left_out, stage.title)] if stage.left_out else []
    width = max(len(choice.title) for choice in chosen)
    for choice in chosen:
        out.print(f"  {choice.title:<{width}}  {_told(choice)}")
    out.print("")


def print_next(out: Console, choices: Choices, run: Run) -> None:
    """What to look at, and the commands to give."""
    if (prompt := choices.of("instance_prompt")) is not None:
        out.print(
            f"Look at one value: instance_prompt in {choices.name}.json is {plain(str(prompt))!r}, which should say what "
            "your pictures show."
        )
    repos = [PUBLISHED[run.config.stage(stage).model_flavour].repo for stage in run.config.stages]
    out.print(f"Weights, once: accept the licence at https://huggingface.co/{repos[0]}, then `hf auth login`.")
    out.print("Next:")
    out.print(f"  deepfloyd doctor {choices.name}.toml")
    out.print(f"  deepfloyd plan {choices.name}.toml")
    out.print(f"  deepfloyd run {choices.name}.toml")


def _looked(look: FolderLook) -> Iterator[tuple[str, str]]:
    yield "folder", str(look.folder)
    about = "about " if look.is_sample else ""
    below = f", in {many(look.subfolders, 'subfolder')}" if look.subfolders else ""
    yield "pictures", f"{about}{many(look.pictures, 'usable picture')} ({in_words(look)}{below})"
    formats = Counter(one.format for one in look.seen).most_common(_FORMATS)
    yield "formats", ", ".join(f"{name} {count:,}" for name, count in formats)
    yield "sizes", _sizes(look.seen)
    yield "shapes", _shapes(look.seen)
    faces, looked = look.with_face
    yield "faces", f"in {faces} of {many(looked, 'picture')}" if looked else f"not looked for: {look.detects}"
    yield "captions", _captions(look)
    if look.unusable:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in look.unusable)
        yield "unusable", f"{reasons}; for example {look.examples[0]}"
    if look.others:
        yield "other files", f"{look.others} (no pictures, left alone)"


def _sizes(seen: tuple[Seen, ...]) -> str:
    order = sorted(seen, key=lambda one: (one.width * one.height, one.width))
    least, most = order[0], order[-1]
    if (least.width, least.height) == (most.width, most.height):
        return f"{most.width}x{most.height} px"
    middle = order[len(order) // 2]
    return (
        f"{least.width}x{least.height} to {most.width}x{most.height} px, in the middle {middle.width}x{middle.height}"
    )


def _shapes(seen: tuple[Seen, ...]) -> str:
    kinds = Counter(
        "square" if 0.95 <= one.aspect <= 1 / 0.95 else "upright" if one.aspect < 1 else "wide" for one in seen
    )
    told = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    return f"{told}; width / height {median(one.aspect for one in seen):.2f} in the middle"


def _captions(look: FolderLook) -> str:
    found = look.captions
    if found.strategy == "instanceprompt":
        return f"none{f' ({found.beside})' if found.beside else ''}"
    total = len(found.texts) + found.missing
    where = {"textfile": "in text files", "filename": "in file names"}.get(found.strategy, "in a table")
    lines = f", up to {found.most} of a picture" if found.most > 1 else ""
    return f"{where}: {len(found.texts):,} of {many(total, 'picture')}{lines}, for example {found.texts[0][0]!r}"


def _told(choice: Choice) -> str:
    """A value and the first sentence of its reason, in a line."""
    reason, found, _ = choice.why.partition(". ")
    reason = plain(reason if found else choice.why.removesuffix("."))
    if choice.value is None:
        return reason
    value = ", ".join(map(str, choice.value)) if isinstance(choice.value, tuple) else str(choice.value)
    return f"{plain(value)} ({reason})"

"""Writes the choices as a run file (TOML) and a data file (JSON with whole-line comments), each value below its reason.

Text of the user can be anything: a folder's name with quotation marks, a caption with line breaks. Values are escaped as
both formats read them; in a comment, where nothing can be escaped, what is not printable is shown as its escape.
"""

import json
import re
import textwrap
import unicodedata
from pathlib import Path

from deepfloyd_core.config.data_blocks import CaptionTable
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.files import write_bytes
from deepfloyd_core.project.choices import Choice, Choices, StageChoices, Value

WIDTH = 110  # of a comment's line
_LONGEST_NAME = 40  # characters: at most 160 bytes, of the 255 that a file's name may have
_SET = "--set KEY=VALUE tries another value without an edit; docs/config.md has every key."


def safe_name(name: str) -> str:
    """A file's name from a folder's: letters and digits of any alphabet, and hyphens between them."""
    kept = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFC", name)).strip("-")
    return kept[:_LONGEST_NAME].strip("-") or "pictures"


def files_of(name: str, folder: Path) -> tuple[Path, Path]:
    """Where the run file and the data file of a name are written."""
    return folder / f"{name}.toml", folder / f"{name}.json"


def check_free(name: str, folder: Path) -> None:
    """Raise ConfigError if one of the files is there."""
    there = [path for path in files_of(name, folder) if path.exists() or path.is_symlink()]
    if there:
        names = " and ".join(path.name for path in there)
        raise ConfigError(
            f"{names} {'is' if len(there) == 1 else 'are'} in {folder} already, and nothing is overwritten. Edit, rename or "
            "remove what is there, or start the command in another directory."
        )


def write_project(choices: Choices, folder: Path) -> tuple[Path, Path]:
    """Write both files, whole or not at all. Raises ConfigError if one is there, OSError if they cannot be written."""
    check_free(choices.name, folder)
    run_file, data_file = files_of(choices.name, folder)
    write_bytes(data_file, data_text(choices).encode())
    try:
        write_bytes(run_file, run_text(choices).encode())
    except OSError:
        data_file.unlink(missing_ok=True)  # else the next try would find it
        raise
    return run_file, data_file


def run_text(choices: Choices) -> str:
    """The run file."""
    head = f"Made by `deepfloyd init` for {choices.seen}. Every value stands below its reason. {_SET}"
    parts = [comment(head), "", *(_toml_lines(choice) for choice in choices.run)]
    for stage in choices.stages:
        parts += ["", _stage_text(stage)]
    return "\n".join(parts) + "\n"


def data_text(choices: Choices) -> str:
    """The data file."""
    head = f"The data set of {choices.name}.toml: {choices.seen}. Lines that begin with # are comments."
    lines = [comment(head), "[", "  {"]
    kept = [choice for choice in choices.data if choice.value is not None]
    for number, choice in enumerate(kept, 1):
        end = "," if number < len(kept) else ""
        lines.append(textwrap.indent(comment(choice.why), "    "))
        lines.append(f"    {json.dumps(choice.key)}: {_json(choice.value)}{end}")
    return "\n".join([*lines, "  }", "]"]) + "\n"


def comment(text: str) -> str:
    """A text as lines of comments, which hold nothing but printable characters."""
    return textwrap.fill(
        plain(text), WIDTH, initial_indent="# ", subsequent_indent="# ", break_long_words=False, break_on_hyphens=False
    )


def plain(text: str) -> str:
    """A text in one line in which what is not printable is shown as its escape."""
    return "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape", "surrogatepass").decode() for sign in text
    )


def _stage_text(stage: StageChoices) -> str:
    if not stage.left_out:
        return "\n".join([f"[{stage.table}]", *map(_toml_lines, stage.keys)])
    kept = [line for choice in stage.keys for line in _toml_lines(choice).split("\n")]
    body = [f"[{stage.table}]", *kept]
    head = comment(
        f"[{stage.table}] is left out. {stage.left_out} With the `#` of the lines below removed it is trained."
    )
    return "\n".join([head, *(f"#{line}" for line in body)])


def _toml_lines(choice: Choice) -> str:
    if choice.value is None:
        return comment(f"{choice.key} is not set. {choice.why}") + "\n"
    return f"{comment(choice.why)}\n{choice.key} = {_toml(choice.value)}"


def _toml(value: Value) -> str:
    """A value as TOML writes it. JSON's escapes are all TOML's too; TOML also wants DEL escaped."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _json(value: Value) -> str:
    if isinstance(value, CaptionTable):
        return json.dumps(value.model_dump(exclude_defaults=True), ensure_ascii=False)
    return json.dumps(value, ensure_ascii=False)

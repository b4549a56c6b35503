"""What happens to other people's files: each run file and data file of SimpleTuner's in a folder is tried as it is.

    python -P benchmarks/simpletuner_files.py FOLDER [--all]

It looks for config*.json, config*.env*, *databackend*.json and other lists of data sets, and for JSON in the code blocks of
*.md; an OPTIONS.md is asked whether each of its options has an answer. Only the form of a file is tried: folders of pictures
are on other machines. A run file for another family of models is tried a second time as if it were for DeepFloyd, so that
its other keys are asked too.

A file loads, or is refused with a reason, or is refused wrongly: for a key of its own that has no answer, for a key that it
does not have, or with any other exception than a ConfigError.
"""

import argparse
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepfloyd_core.config.data_file import load_data_file
from deepfloyd_core.config.env_file import is_env_file
from deepfloyd_core.config.run_reader import read_run_config
from deepfloyd_core.config.simpletuner import answer_of
from deepfloyd_core.config.simpletuner_data import data_answer_of
from deepfloyd_core.errors import ConfigError, raise_together

KINDS = ("run files", "run files as if for DeepFloyd", "data files", "blocks of run files", "blocks of data files")
DEEPFLOYD = {"model_family": "deepfloyd", "model_flavour": "i-medium-400m", "model_type": "lora"}
NEEDED = {"workspace": "w", "data_backend_config": "data.json"}


@dataclass(frozen=True)
class Tried:
    """One file or block, and what became of it."""

    kind: str
    name: str
    verdict: str  # loads | refused | wrongly
    message: str = ""


def main() -> None:
    """Try all files, print the refusals and the counts; exit 1 when any was refused wrongly."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--all", action="store_true", help="print every refusal, not the wrong ones alone")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        tried = list(every_file(asked.folder, Path(scratch)))
    for one in tried:
        if one.verdict == "wrongly" or (asked.all and one.verdict == "refused"):
            print(f"{one.verdict:8} {one.kind}: {one.name}\n         {one.message.replace(chr(10), chr(10) + ' ' * 9)}")
    print(f"\n{'':34}{'tried':>7}{'loads':>7}{'refused with a reason':>23}{'refused wrongly':>17}")
    for kind in KINDS:
        counts = Counter(one.verdict for one in tried if one.kind == kind)
        print(f"{kind:34}{counts.total():7}{counts['loads']:7}{counts['refused']:23}{counts['wrongly']:17}")
    unanswered = [name for path in asked.folder.rglob("OPTIONS.md") for name in options_without_answer(path)]
    print(f"options of OPTIONS.md without an answer: {', '.join(unanswered) or 'none'}")
    sys.exit(bool(unanswered) or any(one.verdict == "wrongly" for one in tried))


def every_file(folder: Path, scratch: Path) -> Iterator[Tried]:
    """Try each file below a folder."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if "databackend" in path.name and ".json" in path.name:
            yield try_data(KINDS[2], name, path)
        elif path.name.startswith("config") and (".json" in path.name or is_env_file(path)):
            yield from try_run(name, path, scratch)
        elif path.suffix == ".json" and is_data(parsed(path.read_text(encoding="utf-8", errors="replace"))):
            yield try_data(KINDS[2], name, path)
        elif path.suffix == ".md":
            yield from try_blocks(name, path.read_text(encoding="utf-8"), scratch)


def try_run(name: str, path: Path, scratch: Path) -> Iterator[Tried]:
    """A run file as it is, and if it is for other models as if it were not."""
    as_it_is = attempt(KINDS[0], name, path)
    yield as_it_is
    if as_it_is.verdict == "refused" and "model_family" in as_it_is.message and ".json" in path.name:
        values = json.loads(path.read_text(encoding="utf-8"))
        yield try_values(KINDS[1], name, {**NEEDED, **without_model(values), **DEEPFLOYD}, scratch)


def try_values(kind: str, name: str, values: dict[str, Any], scratch: Path) -> Tried:
    """Keys and values as a file."""
    path = scratch / "config.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    return attempt(kind, name, path)


def without_model(values: dict[str, Any]) -> dict[str, Any]:
    """A run file's keys without those that name the model, dashes removed."""
    plain = {key.lstrip("-"): value for key, value in values.items()}
    return {key: value for key, value in plain.items() if key not in (*DEEPFLOYD, "pretrained_model_name_or_path")}


def try_data(kind: str, name: str, path: Path) -> Tried:
    """A data file."""
    try:
        raise_together(load_data_file(path).faults)
    except ConfigError as error:
        return judged(kind, name, str(error), path)
    except Exception as error:  # what the count is for
        return Tried(kind, name, "wrongly", f"{type(error).__name__}: {error}")
    return Tried(kind, name, "loads")


def attempt(kind: str, name: str, path: Path) -> Tried:
    """A run file, by its form."""
    try:
        read_run_config(path)
    except ConfigError as error:
        return judged(kind, name, str(error), path)
    except Exception as error:  # what the count is for
        return Tried(kind, name, "wrongly", f"{type(error).__name__}: {error}")
    return Tried(kind, name, "loads")


def judged(kind: str, name: str, message: str, path: Path) -> Tried:
    """A refusal: each line names a key of the file, or one that it lacks; and no key with an answer is unknown."""
    text = path.read_text(encoding="utf-8", errors="replace")
    own = {
        key.lower()
        for pair in re.findall(r'"-*(\w+)"\s*:|^\s*(?:export )?(\w+)\+?=|--(\w+)', text, re.M)
        for key in pair
    }
    plain = message.replace(f"{path}: ", "").replace(str(path), name)
    fine = True
    for line in plain.splitlines():
        if re.fullmatch(r"\d+ faults to correct:", line):
            continue
        unknown = re.match(r"(?:- )?(?:[^:]*: )?(?:\w+\.)*(\w+) is not a known key", line)
        named = bool(own & set(re.findall(r"\w+", line.lower())))
        lacking = any(part in line for part in ("is missing", "not valid JSON", "no enabled data set"))
        fine &= answer_of(unknown[1]) is None and data_answer_of(unknown[1]) is None if unknown else named or lacking
    return Tried(kind, name, "refused" if fine else "wrongly", plain)


def try_blocks(name: str, text: str, scratch: Path) -> Iterator[Tried]:
    """JSON in a page's code blocks: lists of data sets, and objects or bare lines of a run file's keys."""
    for number, block in enumerate(re.findall(r"```\w*\n(.*?)```", text, re.S), 1):
        where = f"{name}, block {number}"
        lines = [line for line in block.splitlines() if not line.lstrip().startswith(("#", "//"))]
        bare = "\n".join(lines).strip()
        values = parsed(bare) or parsed("{" + bare.rstrip(",") + "}")
        if is_data(values):
            path = scratch / "databackend.json"
            path.write_text(json.dumps(values), encoding="utf-8")
            yield try_data(KINDS[4], where, path)
        elif isinstance(values, dict) and is_run(values):
            yield try_values(KINDS[3], where, {**NEEDED, **without_model(values), **DEEPFLOYD}, scratch)


def is_data(values: Any) -> bool:
    """Whether it is a list of data sets."""
    return (
        isinstance(values, list) and bool(values) and all(isinstance(entry, dict) and "id" in entry for entry in values)
    )


def is_run(values: dict[str, Any]) -> bool:
    """Whether an object has keys of a run file: most of them are options."""
    plain = [key.lstrip("-") for key in values]
    options = [key for key in plain if answer_of(key) is not None]
    of_sets = [key for key in plain if data_answer_of(key) is not None]
    return len(options) > len(plain) / 2 and len(options) > len(of_sets) and "id" not in values


def parsed(text: str) -> Any:
    """JSON, or None."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def options_without_answer(path: Path) -> list[str]:
    """Options that the page has a heading for, or its usage shows."""
    text = path.read_text(encoding="utf-8")
    usage = text[text.find("usage: train.py") :]
    named = re.findall(r"^#+ .*?`--([a-z0-9_]+)`", text, re.M)
    named += re.findall(r"^\s*(?:usage: \S+ )?\[?--([a-z0-9_]+)", usage, re.M)
    return sorted({name for name in named if answer_of(name) is None} - {"help"})


if __name__ == "__main__":
    main()

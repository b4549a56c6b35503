"""Where the relative paths of a run start: at the folder where its data file is found.

That is the current directory, as for SimpleTuner's files, or else the nearest folder from the run file's folder
upwards. So `deepfloyd run project/flows/configs/demo.toml` makes the same artifacts from any directory.
"""

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from deepfloyd_core.config.base import home_path, is_there, names_a_path, names_something_else
from deepfloyd_core.config.overrides import override_texts
from deepfloyd_core.config.run import RunConfig
from deepfloyd_core.config.stage import StageConfig

_FIELDS = {**RunConfig.model_fields, **StageConfig.model_fields}


@cache
def path_keys() -> frozenset[str]:
    """Keys of a run file that name a file or folder."""
    return frozenset(name for name, field in _FIELDS.items() if names_a_path(field))


def start_of_paths(run_file: Path, data_file: object) -> Path | None:
    """The folder. None: the current directory, or the data file is nowhere."""
    if not isinstance(data_file, str) or not data_file:
        return None  # a fault that the models tell
    file = home_path(Path(data_file))
    if file.is_absolute() or is_there(file):
        return None
    return next((folder for folder in run_file.absolute().parents if is_there(folder / file)), None)


def no_data_file(data_file: str) -> str:
    """The fault of a data file that is nowhere."""
    fault = f"data_backend_config is {data_file}, and there is no such file"
    if not Path(data_file).is_absolute():
        fault += f", neither in the current directory, {Path.cwd()}, nor beside the run file or in a folder above it"
    return f"{fault}. Correct it."


def from_here(override: str) -> str:
    """An override (KEY=VALUE) that is a relative path, from the current directory, in which it was typed."""
    return _placed(override, Path.cwd(), lambda name: name == "workspace")


def from_folder(override: str, folder: Path) -> str:
    """An override that is a relative path, from a folder, also where nothing is there yet."""
    return _placed(override, folder, lambda name: not names_something_else(_FIELDS[name]))


def _placed(override: str, folder: Path, always: Callable[[str], bool]) -> str:
    key, _, value = override.partition("=")
    name, text = key.strip().rpartition(".")[2], value.strip().strip("\"'")
    if name not in path_keys() or not text or text.startswith("~") or "://" in text:
        return override
    placed = folder / text
    return f"{key}={json.dumps(str(placed))}" if always(name) or is_there(placed) else override


def paths_in(override: str) -> Iterator[str]:
    """The paths in the value of an override, also in a table. Raises ConfigError."""
    return (text for key, text in override_texts(override) if key in path_keys())

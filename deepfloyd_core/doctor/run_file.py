"""The run file itself, and the files that it names."""

from collections.abc import Iterator
from pathlib import Path

from deepfloyd_core.config.base import Spec, is_there, names_a_path
from deepfloyd_core.config.extras import every_extra
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.source_keys import SOURCE_TYPES
from deepfloyd_core.config.stages import STAGES
from deepfloyd_core.doctor.finding import Finding, told
from deepfloyd_core.errors import DeepFloydError, attempt
from deepfloyd_core.preflight.check import Checked, first_round
from deepfloyd_core.preflight.load import NO_DATA
from deepfloyd_core.store.counts import many, size

_NAME = "run file"
_SHOWN_ELSEWHERE = {"workspace", "pretrained_model_name_or_path", "csv_cache_dir"}


def read_checked(path: Path, overrides: tuple[str, ...]) -> tuple[Run | None, list[Finding]]:
    """A run as far as its files make one, and a finding for each of its faults, as `deepfloyd run` tells them.

    Missing extras are faults, and hide nothing: without them most settings can still be looked at.
    """
    faults: list[DeepFloydError] = []
    run = _read(path, overrides, faults)
    if run is None:
        with every_extra():
            run = _read(path, overrides, [])
    found = [
        Finding(_NAME, "note", f"{path}: it names no pictures, so it can draw and not train") if NO_DATA in text
        else told(_NAME, fault)
        for text, fault in {str(fault): fault for fault in faults}.items()
    ]  # fmt: skip
    if run is None:
        hidden = "its models, their memory and their room on the disk are looked at when it has no such faults"
        return None, [*found, Finding(_NAME, "note", hidden)]
    return run, found or [_summary(path, run)]


def _read(path: Path, overrides: tuple[str, ...], faults: list[DeepFloydError]) -> Run | None:
    checked: Checked = {}
    return attempt(faults, first_round, path, overrides, "lora_bundle", faults, checked)


def file_findings(run: Run) -> list[Finding]:
    """A finding for each file and folder that the run file and its data file name, and that is there. What is missing is
    a fault of the run file.
    """
    found = dict.fromkeys(_named(run))
    return [Finding("file", "fine", f"{key}: {_told(path)}") for key, path in found if is_there(path)]


def _summary(path: Path, run: Run) -> Finding:
    stages = " and ".join(STAGES[stage].title for stage in run.config.stages)
    return Finding(_NAME, "fine", f"{path}: {stages}, {many(len(run.datasets), 'data set')}")


def _named(run: Run) -> Iterator[tuple[str, Path]]:
    yield from _paths(run.config, "")
    for stage in run.config.stages:
        yield from _paths(run.config.stage(stage), f"stage{stage}.")
    for dataset in (*run.datasets, *run.conditioning):
        if SOURCE_TYPES[dataset.type].is_folder or dataset.csv_file:
            yield from _paths(dataset, f"{dataset.id}: ")


def _paths(spec: Spec, prefix: str) -> Iterator[tuple[str, Path]]:
    """The keys of a model that name files or folders, with their values."""
    for name, field in type(spec).model_fields.items():
        value = getattr(spec, name)
        if name not in _SHOWN_ELSEWHERE and names_a_path(field) and isinstance(value, str) and value:
            yield f"{prefix}{name}", Path(value)


def _told(path: Path) -> str:
    return f"{path}, a folder" if path.is_dir() else f"{path}, {size(path.stat().st_size)}"

"""Python, the packages that this one requires, its extras, and compilers. Imports none of them."""

import importlib.util
import platform
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stage_run import COMPILERS
from deepfloyd_core.doctor.finding import Finding
from deepfloyd_core.store.counts import many
from deepfloyd_core.store.provenance import DISTRIBUTION

NAMED = ("torch", "diffusers", "transformers", "peft", "prefect", "pyarrow", "pillow", "numpy", "huggingface_hub")
_OURS = ("test", "dev", "bench")  # extras that no run file needs
_HEADERS = "apt-get install g++ python3-dev"


def versions() -> dict[str, str]:
    """The installed versions of this package and of those that a report on a bug is asked for."""
    found = {name: _version(name) for name in (DISTRIBUTION, *NAMED)}
    return {name: version for name, version in found.items() if version}


def python_finding() -> Finding:
    """Python's version and place, and the operating system."""
    return Finding("python", "fine", f"{platform.python_version()} ({sys.executable}) on {platform.platform()}")


def package_finding() -> Finding:
    """Whether each required package is installed, in a version that is allowed."""
    try:
        required = [one for one in _requirements() if one.marker is None or one.marker.evaluate({"extra": ""})]
    except metadata.PackageNotFoundError:
        text = f"{DISTRIBUTION} is not installed itself, so the versions of what it needs cannot be compared"
        return Finding("packages", "note", text, "pip install -e .")
    wrong = {one: version for one in required if not _fits(one, version := _version(one.name))}
    if not wrong:
        shown = ", ".join(f"{name} {_version(name)}" for name in NAMED if _version(name))
        return Finding("packages", "fine", f"{many(len(required), 'package')} as required: {shown}")
    told = [f"{one.name} is {version or 'not installed'}" for one, version in wrong.items()]
    install = " ".join(f"'{one.name}{one.specifier}'" for one in wrong)
    return Finding("packages", "fault", ", ".join(told), f"pip install {install}")


def extras_finding() -> Finding:
    """Which extras are installed. Those that a run file needs and that are missing are faults of its own check."""
    try:
        requirements = [one for one in _requirements() if one.marker is not None]
    except metadata.PackageNotFoundError:
        return Finding("extras", "note", "not known")
    names = [name for name in metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or [] if name not in _OURS]
    here, missing = list[str](), list[str]()
    for name in names:
        parts = [one for one in requirements if one.marker and one.marker.evaluate({"extra": name})]
        (here if all(_fits(one, _version(one.name)) for one in parts) else missing).append(name)
    lists = {"installed": here, "not installed, and needed only by run files that ask for them": missing}
    return Finding("extras", "fine", "; ".join(f"{what}: {', '.join(each)}" for what, each in lists.items() if each))


def compiler_finding(run: Run | None) -> Finding:
    """Whether torch can compile: a C++ compiler and Python's headers. Only `dynamo_backend` needs them."""
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    has_headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    lacks = [*([] if compiler else ["C++ compiler"]), *([] if has_headers else ["Python headers"])]
    if not lacks:
        return Finding("compilers", "fine", f"{compiler}, with Python's headers")
    compiled = [f"stage{stage}" for stage in _compiled_stages(run)]
    text = f"no {' and no '.join(lacks)}"
    if compiled:
        return Finding("compilers", "fault", f"{text}, and {compiled[0]}.dynamo_backend is 'inductor'", _HEADERS)
    return Finding("compilers", "fine", f"{text}; only dynamo_backend = inductor needs that")


def _compiled_stages(run: Run | None) -> Iterator[int]:
    for stage in run.config.stages if run else ():
        if run and run.config.stage(stage).dynamo_backend == "inductor":
            yield stage


def is_installed(module: str) -> bool:
    """Whether a module can be found, without importing it."""
    return importlib.util.find_spec(module) is not None


def _requirements() -> list[Requirement]:
    return [Requirement(text) for text in metadata.requires(DISTRIBUTION) or []]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _fits(one: Requirement, version: str | None) -> bool:
    """Whether an installed version is allowed; an extra of ours that requires others of ours is judged by those alone."""
    if one.name == DISTRIBUTION:
        return True
    return version is not None and one.specifier.contains(version, prereleases=True)

"""Provenance of an artifact: when, with which versions and on which machine it was made."""

import platform
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from importlib import metadata

from deepfloyd_core.store.manifest import Provenance

DISTRIBUTION = "deepfloyd-pipeline"
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "pillow", "pillow-heif", "pyarrow", "prefect")


def provenance(started: datetime) -> Provenance:
    """The provenance of an artifact that is finished now."""
    finished = datetime.now(UTC)
    return Provenance(
        started=started.isoformat(timespec="seconds"),
        seconds=round((finished - started).total_seconds(), 2),
        python=platform.python_version(),
        machine=platform.machine(),
        packages=package_versions(),
    )


@cache  # a process keeps the packages that it has imported
def package_versions() -> dict[str, str]:
    """The versions of the installed packages that decide bytes."""
    versions = {}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):  # the core works without Prefect
            versions[name] = metadata.version(name)
    return versions

"""When, with which versions and on what an artifact was made."""

import platform
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

_PACKAGES = ("torch", "diffusers", "transformers", "peft", "pillow", "imagehash", "pyarrow", "prefect")


def provenance(started: datetime) -> dict[str, Any]:
    """When, with which versions, on what: for people, never part of a fingerprint."""
    versions = {name: metadata.version(name) for name in _PACKAGES}
    finished = datetime.now(UTC)
    return {
        "started": started.isoformat(timespec="seconds"),
        "seconds": round((finished - started).total_seconds(), 2),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "packages": versions,
    }

"""What draws, by the name that a user gives it: the base models, a version of the workspace, or a bundle: a folder, or a
repository of the Hub, which `fetch_from_hub` downloads once everything else is right.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deepfloyd_core.config.base import home_path, is_folder
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.errors import ConfigError, DeepFloydError, attempt
from deepfloyd_core.models.hub import OTHERWISE, download, is_hub_id, snapshot_here
from deepfloyd_core.preflight.drawn_from import BASE
from deepfloyd_core.store.events import OF_FOLDER, SERVING

if TYPE_CHECKING:
    from deepfloyd_core.adapters.mixed import AskedLora
    from deepfloyd_core.store.artifacts import Artifact

_BUNDLE = ("manifest.json", *(f"{kind.table}/*" for kind in STAGES.values()))  # what is needed of a repository


@dataclass(frozen=True)
class DrawnVersion:
    """What draws."""

    name: str  # a number, `base`, or `bundle FINGERPRINT` for one that lies in a folder: what pictures record
    bundle: "Artifact | None"  # None: the base models


def names_a_folder(version: str | None) -> bool:
    """Whether what a user calls a version is the path of a bundle's folder."""
    if not version or version.isdecimal() or version in (BASE, *SERVING):
        return False
    return "/" in version or is_folder(Path(version))


def drawn_version(run: Run, version: str) -> DrawnVersion:
    """What a user calls a version: one of SERVING, a number, `base`, or a bundle by its folder or its name on the Hub. Uses
    no network.

    Raises ConfigError where it is not there, ArtifactError where it is not complete or, as a bundle, damaged.
    """
    if version == BASE:
        return DrawnVersion(BASE, None)
    # Not above, as other imports here: a wrong key is answered without them.
    from deepfloyd_core.store.bundle_folders import bundle_in
    from deepfloyd_core.store.versions import bundle_of, find_version

    if not names_a_folder(version):
        found = find_version(run.workspace, version)
        return DrawnVersion(str(found.number), bundle_of(run.workspace, found))
    folder = _snapshot(version) if is_on_hub(version) else home_path(Path(version)).absolute()
    if folder is None or not is_folder(folder):
        raise ConfigError(
            f"The version is {version}, and there is no such folder. Give a bundle's folder, or a number."
        )
    bundle = bundle_in(folder)
    return DrawnVersion(f"{OF_FOLDER}{bundle.fingerprint}", bundle)


def is_on_hub(version: str) -> bool:
    """Whether what a user calls a version is a repository of the Hub."""
    return is_hub_id(version) and names_a_folder(version) and not is_folder(Path(version))


def is_missing(version: str) -> bool:
    """Whether it must still be downloaded."""
    return is_on_hub(version) and _snapshot(version) is None


def fetch_from_hub(versions: Iterable[str], loras: "Iterable[AskedLora]") -> bool:
    """Download what is named of the Hub, or is newer there. Returns whether there is any. Raises ModelError."""
    of_hub = [version for version in versions if is_on_hub(version)]
    for version in of_hub:
        download(version, _BUNDLE, "a bundle", OTHERWISE)
    # Not above: it takes safetensors, which other options do not need.
    asked = list(loras)
    if asked:
        from deepfloyd_core.adapters.mixed import fetch_lora, is_lora_on_hub

        asked = [one for one in asked if is_lora_on_hub(one)]
        for one in asked:
            fetch_lora(one)
    return bool(of_hub or asked)


def _snapshot(version: str) -> Path | None:
    """A bundle of the Hub on this machine; None: it is not, or not all of it."""
    from deepfloyd_core.store.bundle_folders import is_whole

    folder = snapshot_here(version, _BUNDLE)
    return folder if folder is not None and is_whole(folder) else None


def base_faults(run: Run, versions: Sequence[str], stage: Stage, folder: Path) -> list[DeepFloydError]:
    """Versions that were trained on another base model of a stage than the one in a folder."""
    from deepfloyd_core.sampling.identity import check_base

    faults: list[DeepFloydError] = []
    for version in versions:
        found = attempt([], drawn_version, run, version)
        if found is not None and found.bundle is not None:
            attempt(faults, check_base, found.bundle, stage, folder)
    return faults

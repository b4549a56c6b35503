"""What draws, by the name that a user gives it: the base models, a version of the workspace, or a bundle's folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deepfloyd_core.config.base import home_path
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.errors import ConfigError, DeepFloydError, attempt
from deepfloyd_core.preflight.drawn_from import BASE
from deepfloyd_core.store.events import SERVING

if TYPE_CHECKING:
    from deepfloyd_core.store.artifacts import Artifact

OF_FOLDER = "bundle "  # how the name of one begins that lies in a folder


@dataclass(frozen=True)
class DrawnVersion:
    """What draws."""

    name: str  # a number, `base`, or `bundle FINGERPRINT` for one that lies in a folder: what pictures record
    bundle: "Artifact | None"  # None: the base models


def names_a_folder(version: str | None) -> bool:
    """Whether what a user calls a version is the path of a bundle's folder."""
    if not version or version.isdecimal() or version in (BASE, *SERVING):
        return False
    return "/" in version or Path(version).is_dir()


def drawn_version(run: Run, version: str) -> DrawnVersion:
    """What a user calls a version: one of SERVING, a number, `base`, or the folder of a bundle.

    Raises ConfigError where it is not there, ArtifactError where it is not complete or, in a folder, damaged.
    """
    if version == BASE:
        return DrawnVersion(BASE, None)
    # Not above, as other imports here: a wrong key is answered without them.
    from deepfloyd_core.store.bundle_folders import bundle_in
    from deepfloyd_core.store.versions import bundle_of, find_version

    if not names_a_folder(version):
        found = find_version(run.workspace, version)
        return DrawnVersion(str(found.number), bundle_of(run.workspace, found))
    folder = home_path(Path(version)).absolute()
    if not folder.is_dir():
        raise ConfigError(
            f"The version is {version}, and there is no such folder. Give a bundle's folder, or a number."
        )
    bundle = bundle_in(folder)
    return DrawnVersion(f"{OF_FOLDER}{bundle.fingerprint}", bundle)


def base_faults(run: Run, versions: Sequence[str], stage: Stage, folder: Path) -> list[DeepFloydError]:
    """Versions that were trained on another base model of a stage than the one in a folder."""
    from deepfloyd_core.sampling.identity import check_base

    faults: list[DeepFloydError] = []
    for version in versions:
        found = attempt([], drawn_version, run, version)
        if found is not None and found.bundle is not None:
            attempt(faults, check_base, found.bundle, stage, folder)
    return faults

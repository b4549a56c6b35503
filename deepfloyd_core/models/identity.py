"""Identity of models: the files that decide their outputs. They are read as bytes, never loaded."""

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.files import sha256_file

ROUNDING = 1e-5  # the most that the outputs of equal weights differ by, in fp32


def model_fingerprint(folder: Path, parts: Iterable[str]) -> str:
    """Fingerprint of a model's files: sha256 over the names and contents of the given subfolders.

    A hub snapshot's files are links to blobs named by their hash, so they need not be read. Other files are read once
    in a process, until their size, times or inode change.
    """
    digest = hashlib.sha256()
    for part in parts:
        for file in sorted((folder / part).iterdir()):
            if file.suffix in (".safetensors", ".json", ".model", ".txt"):
                blob = file.resolve()
                name = blob.name if blob.parent.name == "blobs" else _sha256(blob, _stamp(blob))
                digest.update(f"{part}/{file.name} {name}\n".encode())
    return digest.hexdigest()[:16]


def _stamp(file: Path) -> tuple[int, ...]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


@lru_cache(maxsize=1024)
def _sha256(file: Path, stamp: tuple[int, ...]) -> str:
    return sha256_file(file)


def base_model(stage: Stage, folder: Path, name: str = "model") -> dict[str, str]:
    """The fingerprint of a stage's base model, without its text encoder, as an input of a request called `name`."""
    return {name: model_fingerprint(folder, STAGES[stage].parts)}

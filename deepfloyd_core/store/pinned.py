"""A user's file that a run reads twice: its sha256 is taken when the run begins, and checked before the later use."""

from dataclasses import dataclass
from pathlib import Path

from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.files import sha256_file


@dataclass(frozen=True)
class PinnedFile:
    """A file with the sha256 that it had when the run began."""

    path: Path  # absolute
    sha256: str

    def checked(self, use: str) -> Path:
        """The path. use: in words. Raises ArtifactError when the file's bytes have changed."""
        if not self.path.is_file() or sha256_file(self.path) != self.sha256:
            raise ArtifactError(f"{self.path}, which {use}, changed since the run began. Start it again.")
        return self.path


def pinned(path: Path) -> PinnedFile:
    """Pin a file as it is now."""
    return PinnedFile(path.absolute(), sha256_file(path))

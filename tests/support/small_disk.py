"""Disks that are full, or can only be read: a tmpfs for one folder, which needs root; tests are skipped without."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

PAGE = 4096  # bytes; a tmpfs takes whole pages


@dataclass(frozen=True)
class SmallDisk:
    """A mounted file system."""

    folder: Path

    def resize(self, size: int) -> None:
        """Give it so many bytes, no fewer than it holds."""
        self._remount(f"size={size}")

    def protect(self) -> None:
        """Let nobody write to it any more, root neither."""
        self._remount("ro")

    def _remount(self, option: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{option}", str(self.folder)], check=True)


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[SmallDisk]:
    """A file system of so many bytes at a folder that does not exist yet."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)

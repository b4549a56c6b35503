"""Reads of local files: nothing but regular files, and no more than a limit."""

import os
from pathlib import Path

import pytest

from deepfloyd_core.files import file_pieces, read_file
from deepfloyd_core.sources.folder import leads_out


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    file = tmp_path / "x"
    data = os.urandom((3 << 20) + 5)
    file.write_bytes(data)
    assert read_file(file, len(data)) == data
    with pytest.raises(OSError, match=r"x is larger than 1 MiB"):
        read_file(file, 1 << 20)


def test_a_file_that_grows_while_it_is_read_is_not_read_on(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(bytes(2 << 20))
    pieces = file_pieces(file, 3 << 20)
    next(pieces)
    with file.open("r+b") as handle:
        handle.truncate(40 << 30)
    with pytest.raises(OSError, match="larger than 3 MiB"):
        list(pieces)


@pytest.mark.parametrize("name", ["pipe", "/dev/zero", "/dev/null", ".", "none", "loop"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError):
        read_file(tmp_path / name, 1 << 20)


def test_a_path_leads_out_by_its_links(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").write_bytes(b"")
    (tmp_path / "in" / "link").symlink_to("../out")
    inside = [(tmp_path / "in").resolve()]
    assert leads_out(tmp_path / "in" / "link", inside) and leads_out(tmp_path / "in" / ".." / "out", inside)
    assert not leads_out(tmp_path / "in" / "none", inside) and not leads_out(
        tmp_path / "in" / ".." / "in" / "x", inside
    )

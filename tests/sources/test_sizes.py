"""Files that are far too large: sizes are checked first, reads are bounded, and what is hashed is not held."""

import io
import json
import tarfile

import numpy as np
import pytest
from data_world import DataWorld
from releases import deepfloyd
from small_run import SmallRun
from traced import traced_peak

from deepfloyd_core.errors import ConfigError
from deepfloyd_core.files import sha256_file
from deepfloyd_core.index.ledger import read_index
from deepfloyd_core.index.scan import scan


def test_a_caption_file_that_is_too_large_is_not_read(world: DataWorld) -> None:
    """`truncate -s 40G a.txt`; in a folder, and in tar files."""
    for name in ("a", "b"):
        world.add(f"{name}.png", np.full((80, 90, 3), ord(name), np.uint8), "a star")
    with (world.folder / "pictures" / "a.txt").open("wb") as handle:
        handle.truncate(40 << 30)
    tar = world.folder / "tars" / "0.tar"
    tar.parent.mkdir()
    with tarfile.open(tar, "w") as archive:
        for name in ("a.png", "b.png", "b.txt"):
            archive.add(world.folder / "pictures" / name, name)
        text = tarfile.TarInfo("a.txt")
        text.size = (1 << 20) + 1
        archive.addfile(text, io.BytesIO(bytes(text.size)))
    in_tars = {"type": "webdataset", "instance_data_dir": str(tar.parent), "caption_strategy": "textfile"}
    for entry in ({}, in_tars):
        rows = read_index(world.index(world.load(entry, stages=(1,), max_rejected_share=1.0)))
        found = {row.source.removeprefix("0.tar/"): (row.reason, row.detail) for row in rows}
        assert found == {
            "a.png": ("caption_missing", "a.txt is larger than 1 MiB; no caption is"),
            "b.png": (None, None),
        }


def test_a_scan_holds_no_whole_file(world: DataWorld) -> None:
    with (world.folder / "pictures" / "a.png").open("wb") as handle:
        handle.truncate(96 << 20)
    run = world.load({"caption_strategy": "filename"}, stages=(1,))
    with traced_peak() as peak:
        found = scan(run).to_pylist()
    assert peak[0] < 16 << 20
    assert [row["sha256"] for row in found] == [sha256_file(world.folder / "pictures" / "a.png")]


@pytest.mark.parametrize("name", ["x.toml", "x.json", "data.json", "filters.txt", "prompts.txt"])
def test_a_configuration_file_that_is_too_large_is_not_read(small_run: SmallRun, name: str) -> None:
    file = small_run.folder / name
    data, config = small_run.folder / "data.json", str(small_run.config)
    if name == "filters.txt":
        (entry,) = json.loads(data.read_text())
        data.write_text(json.dumps([entry | {"caption_filter_list": str(file)}]))
    with file.open("wb") as handle:
        handle.truncate(40 << 30)
    said = {"prompts.txt": ("generate", config, "--prompt-file", str(file))}.get(name)
    result = deepfloyd(*(said or ("plan", str(file) if name.startswith("x.") else config)))
    assert isinstance(result.exception, ConfigError) and "larger than" in str(result.exception), result.output

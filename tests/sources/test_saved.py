"""A saved data set from elsewhere: what its rows name is read within the rules of a local folder."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from data_world import DataWorld

from deepfloyd_core.index.scan import scan
from deepfloyd_core.sources import huggingface

pytest.importorskip("datasets", reason="datasets is not installed: make test-extras")

Cell = dict[str, bytes | str | None]


def save(folder: Path, cells: list[Cell]) -> None:
    """The files that save_to_disk writes; it would read what a row names."""
    folder.mkdir(exist_ok=True)
    picture = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table({"image": pa.array(cells, picture), "caption": ["a caption"] * len(cells)})
    with pa.ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table)
    state: dict[str, Any] = dict.fromkeys(("_format_columns", "_format_type", "_indices_files"))
    state |= {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "f" * 16, "_split": "train"}
    features = {"image": {"_type": "Image"}, "caption": {"dtype": "string", "_type": "Value"}}
    (folder / "state.json").write_text(json.dumps(state | {"_format_kwargs": {}, "_output_all_columns": False}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))


def faults(world: DataWorld, **keys: Any) -> list[str | None]:
    """Of each row why it cannot be read."""
    entry = {"type": "huggingface", "dataset_name": str(world.folder / "saved"), "caption_strategy": "huggingface"}
    rows = scan(world.load(entry | keys, stages=(1,))).to_pylist()
    assert all(row["reason"] == ("unreadable" if row["sha256"] is None else None) for row in rows)
    return [row["detail"] for row in rows]


def test_a_row_reads_no_file_outside_of_the_data_set(world: DataWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor a pipe, which would never end, a device, which has no end, and what is larger than a picture."""
    folder, secret = world.folder / "saved", world.folder / "secret.png"
    folder.mkdir()
    for file in (secret, folder / "inside.png"):
        file.write_bytes(b"a picture")
    (folder / "link.png").symlink_to(secret)
    (folder / "loop.png").symlink_to("loop.png")
    os.mkfifo(folder / "pipe.png")
    with (folder / "large.png").open("wb") as handle:
        handle.truncate(40 << 30)
    monkeypatch.chdir(folder)
    inside = [str(folder / "inside.png"), "inside.png"]
    outside = [str(secret), "../secret.png", f"{folder}/../secret.png", "link.png", "/dev/zero", "/proc/self/environ"]
    bad = ["pipe.png", "large.png", "loop.png", "none.png", "", "a\0b", "x" * 5000, "."]
    cells: list[Cell] = [{"bytes": None, "path": path} for path in (*inside, *outside, *bad)]
    save(folder, [*cells, {"bytes": b"its own", "path": "../secret.png"}])
    found = faults(world)
    assert found[:2] == [None, None] and found[-1] is None
    for path, fault in zip(outside, found[2:8], strict=True):
        assert fault and f"names {path}, out of {folder}; set follow_links = true" in fault
    for path, fault in zip(bad, found[8:16], strict=True):
        assert fault, path
    assert "no regular file" in str(found[8]) and "larger than 1,024 MiB" in str(found[9])


def test_follow_links_reads_what_a_row_names(world: DataWorld) -> None:
    (world.folder / "other.png").write_bytes(b"a picture")
    save(world.folder / "saved", [{"bytes": None, "path": str(world.folder / "other.png")},
                                  {"bytes": None, "path": "/dev/zero"}])  # fmt: skip
    assert faults(world, follow_links=True) == [None, "/dev/zero is no regular file"]


def test_rows_of_a_data_set_of_the_hub_read_its_caches_alone(world: DataWorld) -> None:
    save(world.folder / "saved", [{"bytes": None, "path": "/etc/hostname"}])
    entry = {"type": "huggingface", "dataset_name": str(world.folder / "saved"), "caption_strategy": "huggingface"}
    dataset = world.load(entry, stages=(1,)).datasets[0]
    places = huggingface._places(dataset.model_copy(update={"dataset_name": "someone/pictures"}))
    assert places and not any(place == Path("/") or place == Path.cwd() for place in places)

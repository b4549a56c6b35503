"""A disk that fills at any moment of the data stages: one error that says so, and the next run goes on."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_world import DataWorld
from small_disk import PAGE, small_disk

from deepfloyd_core.config.run import Run
from deepfloyd_core.errors import StorageError
from deepfloyd_core.store.leases import leased
from deepfloyd_core.store.locks import only_run

_EDGES = range(90, 102)  # px


def _world(world: DataWorld) -> Run:
    rng = np.random.default_rng(0)
    for number, edge in enumerate(_EDGES):
        world.add(f"{number}.png", rng.integers(0, 255, (edge, edge, 3), np.uint8))
    world.add("broken.png", b"not a picture")
    return world.load(stages=(1,), max_rejected_share=0.5)


def _stages(world: DataWorld, run: Run) -> None:
    index = world.index(run)
    world.pixels(run, index, 1)
    world.eval_set(run, index)


def _bytes_of(workspace: Path) -> dict[str, str]:
    files = [path for path in workspace.glob("*/*/**/*") if path.is_file() and path.name != "manifest.json"]
    return {str(path.relative_to(workspace)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_data_stages_on_a_disk_that_grows_page_by_page_go_on_where_it_was_full(
    world: DataWorld, tmp_path: Path
) -> None:
    run = _world(world)
    _stages(world, run)
    whole = _bytes_of(run.workspace)
    with small_disk(tmp_path / "small", PAGE) as disk:
        there = replace(run, config=run.config.model_copy(update={"workspace": str(disk.folder)}))
        full, pages, done = 0, 1, False
        while not done:
            pages += 1
            disk.resize(pages * PAGE)
            try:
                _stages(world, there)
                done = True
            except StorageError as error:
                said = str(error)
                assert said.startswith(f"{disk.folder}/") or said[0].isdigit(), said
                assert f"(tmpfs at {disk.folder}, " in said and " free)" in said, said
                assert "Free some space there" in said or "Make room" in said, said
                full += "no space left on device" in said
        assert full > 10 and _bytes_of(disk.folder) == whole


def test_in_a_complete_workspace_that_can_only_be_read_everything_is_reused_and_the_first_write_says_so(
    world: DataWorld, tmp_path: Path
) -> None:
    run = _world(world)
    with small_disk(tmp_path / "small", 2**20) as disk:
        there = replace(run, config=run.config.model_copy(update={"workspace": str(disk.folder)}))
        using = leased(lambda: _stages(world, there))
        using()
        before = sorted(disk.folder.rglob("*"))
        disk.protect()
        using()
        with only_run(disk.folder, "a run", wait=False):
            assert sorted(disk.folder.rglob("*")) == before
        world.add("new.png", np.zeros((99, 99, 3), np.uint8))
        with pytest.raises(StorageError, match=rf"^{disk.folder}/.* cannot be written: read-only file system"):
            using()

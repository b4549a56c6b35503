"""What several benchmarks stand on: a run of the tiny cascade over one data set, its index and its pixels."""

import json
from pathlib import Path
from typing import Any

from deepfloyd_core.artifacts import Artifact, materialise
from deepfloyd_core.config import Run, load_run
from deepfloyd_core.flavours import Stage
from deepfloyd_core.image_index import build_index, index_request, judges
from deepfloyd_core.pixels import build_shards, pixels_request, plan_shards
from deepfloyd_core.scan import scan


def one_set(folder: Path, stage: Stage, entry: dict[str, Any], **keys: Any) -> Run:
    """A run that trains one stage; `entry`: its data set, which is the folder `pictures` unless it says otherwise."""
    data = {"id": "set", "type": "local", "instance_data_dir": str(folder / "pictures"), **entry}
    (folder / "data.json").write_text(json.dumps([data]))
    where = {"workspace": str(folder / "workspace"), "data_backend_config": str(folder / "data.json")}
    flavour = {f"stage{stage}": {"model_flavour": f"tiny-{'i' * stage}"}}
    (folder / "run.json").write_text(json.dumps({**where, **flavour, **keys}))
    return load_run(folder / "run.json")


def prepare(run: Run, stage: Stage) -> tuple[Artifact, Artifact]:
    """Index and pixels, as `deepfloyd prepare` makes them, in this thread."""
    with judges(run) as children:
        found = scan(run)
        index, _ = materialise(
            run.workspace, index_request(run, found), lambda work: build_index(run, found, children, work)
        )
    request = pixels_request(run, index, stage)
    pixels, _ = materialise(
        run.workspace, request, lambda work: build_shards(plan_shards(run, index, stage, work), work)
    )
    return index, pixels

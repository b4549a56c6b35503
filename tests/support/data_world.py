"""Pictures with a data file and a run file, and the data stages without the flows around them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.crops.conditioning import plan_conditioning, plan_eval_conditioning
from deepfloyd_core.crops.identity import conditioning_request, eval_request, pixels_request
from deepfloyd_core.crops.pixels import PARTS, Layout, build_shards, plan_eval, plan_shards
from deepfloyd_core.crops.summary import CropsSummary
from deepfloyd_core.index.identity import index_request
from deepfloyd_core.index.index import build_index
from deepfloyd_core.index.ledger import INDEX_FILE, check_share
from deepfloyd_core.index.scan import scan
from deepfloyd_core.index.summary import IndexSummary
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.processes.pool import Children
from deepfloyd_core.store.artifacts import Artifact, WorkDir, materialise

Picture = Image.Image | np.ndarray | bytes  # bytes: the file


@dataclass(frozen=True)
class DataWorld:
    """A folder of pictures with its data file and run file, and the data stages as the tasks chain them."""

    folder: Path
    children: Children

    def add(self, name: str, picture: Picture, caption: str | None = "a caption") -> Path:
        """Put one file (an array or picture is saved in the format of its name) and its caption into `pictures`."""
        path = self.folder / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(picture, bytes):
            path.write_bytes(picture)
        else:
            opened = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
            opened.save(path, compress_level=1)  # of a PNG: a third of the time
        if caption is not None:
            path.with_suffix(".txt").write_text(caption, encoding="utf-8")
        return path

    def load(self, *entries: dict[str, Any], stages: tuple[Stage, ...] = (1, 2), **keys: Any) -> Run:
        """Write the files and load them. Each entry is one data set; without one, `pictures` at 64 px."""
        common = {"type": "local", "instance_data_dir": str(self.folder / "pictures"), "caption_strategy": "textfile"}
        data = [{"id": "set", **common, **entry} for entry in entries or ({},)]
        (self.folder / "data.json").write_text(json.dumps(data))
        flavours = {f"stage{stage}": {"model_flavour": f"tiny-{'i' * stage}"} for stage in stages}
        where = {"workspace": str(self.folder / "workspace"), "data_backend_config": str(self.folder / "data.json")}
        (self.folder / "run.json").write_text(json.dumps({**where, "num_eval_images": 1, **flavours, **keys}))
        return load_run(self.folder / "run.json")

    def index(self, run: Run) -> Artifact:
        """The image index, checked against the limit of rejects."""
        found = scan(run)
        request = index_request(run, found)
        index = materialise(run.workspace, request, lambda work: build_index(run, found, self.children, work))
        check_share(index.summary(IndexSummary), run.config.max_rejected_share, index.path / INDEX_FILE)
        return index

    def pixels(self, run: Run, index: Artifact, stage: Stage) -> Artifact:
        """The shards of a stage."""
        request = pixels_request(run, index, stage)

        def shards(work: WorkDir) -> CropsSummary:
            return self.shards(plan_shards(run, index, stage, work), work)

        return materialise(run.workspace, request, shards, PARTS)

    def conditioning(self, run: Run, index: Artifact, of: Artifact) -> Artifact:
        """The pairs of Stage I's pixels, or of the eval set."""
        plan = plan_conditioning if of.kind == "stage1_pixels" else plan_eval_conditioning
        request = conditioning_request(run, index, of)
        return materialise(run.workspace, request, lambda work: self.shards(plan(run, index, work), work, of), PARTS)

    def eval_set(self, run: Run, index: Artifact) -> Artifact:
        """The held-out pictures."""
        request = eval_request(run, index)
        return materialise(run.workspace, request, lambda work: self.shards(plan_eval(run, index, work), work), PARTS)

    def shards(self, layout: Layout, work: WorkDir, beside: Artifact | None = None) -> CropsSummary:
        """Make the shards of a layout, one after the other."""
        return build_shards(layout, work, beside)

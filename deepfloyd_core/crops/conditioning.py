"""Conditioning pictures of a paired ControlNet: the same crops of each pair, for Stage I's pixels and the eval set.

They are planned, cut into shards, reused and finished like the pixels (`pixels.py`), in the same order: row n of their
list of rows belongs to row n of the pixels' list. So pixel shards do not depend on pairs, and a changed pair costs only
its own rows.
"""

from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.crops.older_shards import left_over
from deepfloyd_core.crops.pixels import FORMAT, Layout, lay_out, with_room, write_eval_plan
from deepfloyd_core.crops.plan import write_plan
from deepfloyd_core.index.ledger import PAIR
from deepfloyd_core.store.artifacts import Artifact, WorkDir, newest


def plan_conditioning(run: Run, index: Artifact, work: WorkDir) -> Layout:
    """The shards of the pairs of a stage's pixels."""
    stage = _stage(run)
    older = left_over(work) or newest(work.workspace, f"stage{stage}_conditioning", FORMAT)
    plans = write_plan(run, index, stage, work.path, PAIR)
    return with_room(lay_out(plans, _places(run), int(run.config.shard_mib * 2**20), older), work)


def plan_eval_conditioning(run: Run, index: Artifact, work: WorkDir) -> Layout:
    """One file for each size with the pairs of a stage's held-out pictures, in the order of theirs."""
    return lay_out(write_eval_plan(run, index, (_stage(run),), work.path, PAIR), _places(run), 1 << 30, left_over(work))


def _stage(run: Run) -> Stage:
    """The stage whose ControlNet uses the pairs."""
    assert run.config.paired_stage is not None  # else they are not made
    return run.config.paired_stage


def _places(run: Run) -> dict[str, ImageDataset]:
    """The places of the pairs of each data set."""
    places = {dataset.id: run.pairs_of(dataset) for dataset in run.datasets}
    return {name: place for name, place in places.items() if place is not None}

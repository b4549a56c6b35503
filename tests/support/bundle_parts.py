"""What a bundle is put together from, as small files: no training."""

from deepfloyd_core.config.run import Run
from deepfloyd_core.index.summary import IndexSummary
from deepfloyd_core.store.artifacts import Artifact, Request, WorkDir, materialise
from deepfloyd_core.store.manifest import Summary
from deepfloyd_core.training.jobs import TrainingSummary

SCHEDULER = "scheduler/scheduler_config.json"
INDEX = IndexSummary(
    inputs=1, accepted=1, rejected=0, reasons={}, stage1=1, stage2=0, bytes=1, twin_groups=0, twins=0, judged_now=1,
    judged_before=0, captions_per_picture={}, examples={}, decode_timeout_s=1.0, other_files={}, rows={},
)  # fmt: skip
TRAINING = TrainingSummary(
    steps=1, rows=1, pictures=1, trainable_parameters=1, frozen_parameters=1, frozen_bytes=1, first_loss=0.5, last_loss=0.25,
    buckets=(), reload_difference=0.0, steps_of_this_process=1,
)  # fmt: skip


def make(run: Run, kind: str, files: dict[str, bytes], summary: Summary, **inputs: str) -> Artifact:
    def build(work: WorkDir) -> Summary:
        for name, data in files.items():
            (work.path / name).parent.mkdir(exist_ok=True)
            (work.path / name).write_bytes(data)
        return summary

    return materialise(run.workspace, Request(kind, 1, {}, inputs), build)

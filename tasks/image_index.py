"""The image index: scan the sources, judge every file, write the ledger."""

import logging

from prefect import task
from prefect.cache_policies import NO_CACHE

from deepfloyd_core.config.run import Run
from deepfloyd_core.crops.eval_choice import check_left, choice_notes, choose_held_out
from deepfloyd_core.index.changed_pictures import picture_changes
from deepfloyd_core.index.identity import index_request
from deepfloyd_core.index.index import build_index, judges
from deepfloyd_core.index.ledger import INDEX_FILE, captions_left_out, check_share
from deepfloyd_core.index.scan import others_of, scan
from deepfloyd_core.index.summary import IndexSummary
from deepfloyd_core.store.artifacts import Artifact, WorkDir, materialise, newest
from tasks.endings import twins_line
from tasks.events import emit_data_changed
from tasks.judged_blocks import cluster_judges
from tasks.plan_page import show_plan
from tasks.progress import progress
from tasks.ui_pages import show_index

log = logging.getLogger(__name__)


@task(name="image_index", cache_policy=NO_CACHE)
def image_index(run: Run, plans: bool = False) -> Artifact:
    """Every input file as one row. plans: show first what the whole run is going to do.

    Raises DataError for none, for too many rejected, or when none is left to train on.
    """

    def build(work: WorkDir) -> IndexSummary:
        return build_index(run, scanned, children, work, report, cluster_judges(run, scanned, work, report))

    with progress("image index") as report, judges(run) as children:
        scanned = scan(run, report)
        request = index_request(run, scanned)
        before = newest(run.workspace, request.kind, request.format)
        index = materialise(run.workspace, request, build)
    if before is not None and not index.reused:
        lines = _picture_changes(before, index)
        for line in lines:
            log.info("image_index %s: %s", index.fingerprint, line)
        if lines:
            emit_data_changed(run.workspace, lines)
    summary = index.summary(IndexSummary)
    if plans:
        show_plan(run, index)
    show_index(index, summary, run.config.stages, others_of(scanned))
    if summary.twin_groups:
        log.info("image_index %s: %s", index.fingerprint, twins_line(summary))
    for line in captions_left_out(summary.captions_per_picture, {one.id: one.repeats for one in run.datasets}):
        log.warning("%s", line)
    check_share(summary, run.config.max_rejected_share, index.path / INDEX_FILE)
    choices = choose_held_out(run, index)
    for line in choice_notes(run, choices) + check_left(run, index, choices):
        log.warning("%s", line)
    return index


def _picture_changes(before: Artifact, index: Artifact) -> list[str]:
    """How the pictures differ from those of the index before; nothing if that index is damaged or missing."""
    ledgers = before.path / INDEX_FILE, index.path / INDEX_FILE
    try:
        return picture_changes(*ledgers)
    except (OSError, ValueError):  # pyarrow's errors are both
        return []

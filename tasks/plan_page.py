"""The page of a run's plan: what it is going to do, before it does."""

import logging

from deepfloyd_core.bundle.planned import FROM_BASE, Starts
from deepfloyd_core.config.run import Run
from deepfloyd_core.errors import DeepFloydError
from deepfloyd_core.planning.plan import plan_after_index
from deepfloyd_core.planning.tables import plan_tables, verdict
from deepfloyd_core.store.artifacts import Artifact
from tasks.markdown import items, plain, titled_table
from tasks.outbox import create_markdown_artifact
from tasks.page_keys import workspace_key

log = logging.getLogger(__name__)
_CELL = 90  # characters; the UI cuts off what is longer


def show_plan(run: Run, index: Artifact, starts: Starts = FROM_BASE) -> None:
    """Show it, and log its verdict. A fault that keeps it from being made is the run's own, which tells it."""
    try:
        plan = plan_after_index(run, index, starts)
    except (DeepFloydError, OSError, ValueError) as error:  # pyarrow's are the last two
        log.info("there is no plan: %s", error)
        return
    said = verdict(plan)
    lines = [*items(said), *items(plan.notes)]
    for table in plan_tables(plan):
        heads = tuple(head or " " for head in table.heads)
        lines += titled_table(table.title, heads, [tuple(plain(cell, _CELL) for cell in row) for row in table.rows])
    about = plain(f"plan: {said[0]}")
    create_markdown_artifact("\n".join(lines), key=workspace_key("plan", run.workspace), description=about)
    log.info("plan: %s", said[0])

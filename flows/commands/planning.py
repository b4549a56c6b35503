"""The command `plan`: what a run would do, before it does."""

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from flows.commands.arguments import ConfigPath, Overrides
from flows.commands.session import load, out, print_notes

if TYPE_CHECKING:
    from deepfloyd_core.planning.tables import PlanTable


def plan(config: ConfigPath, overrides: Overrides = None) -> None:
    """Tell what `run` would do, and make nothing: pictures, artifacts, steps, memory, disk and time."""
    run = load(config, overrides, "lora_bundle").run
    print_notes(run.notes)
    from deepfloyd_core.planning.plan import plan_run
    from deepfloyd_core.planning.tables import plan_tables, verdict

    planned = plan_run(run)
    print_notes(planned.notes)
    for change in planned.changes:
        out.print(Text(change))
    for table in plan_tables(planned):
        out.print(_drawn(table))
    for line in verdict(planned):
        out.print(Text(line))


def _drawn(table: "PlanTable") -> Table:
    drawn = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for number, head in enumerate(table.heads):
        last = number == len(table.heads) - 1
        drawn.add_column(Text(head or (table.title if number == 0 else "")), overflow="fold", no_wrap=not last)
    for row in table.rows:
        drawn.add_row(*map(Text, row))
    return drawn

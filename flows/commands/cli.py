"""The command line `deepfloyd`: the only argument parser, and the only place that reads the environment.

Nothing heavy is imported before the configuration is known to be good: `--help` and a wrong key answer at once.
Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 128 + the number of the signal that ended it.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from deepfloyd_core.errors import DeepFloydError
from deepfloyd_core.store.file_faults import storage_error
from flows.commands.arguments import (
    ConfigPath,
    Overrides,
    Workspace,
    user_path,
)
from flows.commands.doctor import doctor
from flows.commands.drawing import export, generate, upscale
from flows.commands.planning import plan
from flows.commands.session import err, load, out, print_notes, session, stopping
from flows.commands.starting import init
from flows.commands.stopping import Stopped
from flows.commands.version_commands import Number, block, diff, history, promote, publish, rollback
from flows.commands.workspace_commands import gc, list_workspace, show, verify
from tasks.terminal import labelled

if TYPE_CHECKING:
    from deepfloyd_core.preflight.check import Goal


class _EachOnce(TyperGroup):
    """Commands that take each option once, unless it is a list: of two values the parser would drop the first silently."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As the parser's own. Fails (exit code 2) for an option that is given twice."""
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None:
            inner = command.context_class(command, info_name=name, parent=ctx, resilient_parsing=True)
            order = command.make_parser(inner).parse_args(list(rest))[2]
            for option in {param for param in order if order.count(param) > 1}:
                if option.param_type_name == "option" and not getattr(option, "multiple", False):
                    inner.fail(f"{option.opts[0]} is given {order.count(option)} times; give it once.")
        return name, command, rest


app = typer.Typer(
    cls=_EachOnce, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
    help="Fine-tune DeepFloyd IF on your own pictures: from a folder with captions to a LoRA that diffusers loads.",
)  # fmt: skip


def main() -> None:
    """Entry of the console script: one clear message for every error that is meant for the user."""
    code = 1
    try:
        stopping.take_signals()
        app()
    except SystemExit as end:
        code = int(end.code or 0)
    except Stopped:
        pass
    except (DeepFloydError, OSError) as error:
        told = storage_error(error, "used") if isinstance(error, OSError) else error
        code = told.exit_code
        if not stopping.asked:  # else it comes of the signal
            err.print(labelled("error", "bold red", str(told)))
    finally:
        code = stopping.finish(code)
    sys.exit(code)


app.command()(init)


@app.command()
def run(config: ConfigPath, overrides: Overrides = None) -> None:
    """Make every artifact, from the pictures to the published bundle."""
    loaded = load(config, overrides, "lora_bundle")
    with session(loaded, "flows.finetune:finetune") as call:
        outcome = call()
    from flows.commands.report import print_outcome

    print_outcome(out, loaded.run.workspace, outcome)


app.command()(plan)


@app.command()
def prepare(
    config: ConfigPath,
    preview: Annotated[
        int, typer.Option(min=0, max=1000, help="Only draw a PNG of this many pictures with their crops.")
    ] = 0,
    overrides: Overrides = None,
) -> None:
    """Index the pictures and cut the crops of every stage, and the eval set."""
    if not preview:
        _stage_flow("prepare", config, overrides, "crops")
        return
    run = load(config, overrides, "crops").run
    print_notes(run.notes)
    from deepfloyd_core.crops.preview import PREVIEW_FILE, save_preview
    from deepfloyd_core.store.counts import many

    path = run.workspace / PREVIEW_FILE
    shown, unusable = save_preview(run, preview, path)
    print_notes([unusable] if unusable else [])
    out.print(f"{many(shown, 'picture with its crop', 'pictures with their crops')}: {path}")


@app.command()
def embed(config: ConfigPath, overrides: Overrides = None) -> None:
    """Encode every caption and prompt with T5."""
    _stage_flow("embed", config, overrides, "text_embeds")


@app.command("train-stage1")
def train_stage1(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train the Stage I LoRA, and make what it needs."""
    _stage_flow("train_stage1", config, overrides, 1)


@app.command("train-stage2")
def train_stage2(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train the Stage II LoRA, and make what it needs."""
    _stage_flow("train_stage2", config, overrides, 2)


@app.command()
def retrain(config: ConfigPath, overrides: Overrides = None) -> None:
    """Publish a new version if data or settings are not those of the champion; else say "no change"."""
    loaded = load(config, overrides, "lora_bundle")
    with session(loaded, "flows.retrain:retrain") as call:
        outcome = call()
    from flows.commands.report import print_news, print_outcome

    (print_outcome if outcome.is_new else print_news)(out, loaded.run.workspace, outcome)


@app.command()
def reproduce(
    workspace: Workspace,
    number: Number,
    check: Annotated[bool, typer.Option("--check", help="Only say whether everything that it needs is there.")] = False,
    scratch: Annotated[
        Path | None, typer.Option(parser=user_path, metavar="FOLDER", help="Where; it is removed if all is equal.")
    ] = None,
) -> None:
    """Make a version again from its recorded data and settings, and compare every byte; exit 1 on any difference."""
    from flows.commands.reproduction import announced, compared, prepared

    found = announced(out, workspace, number)
    if check:
        return
    folder, config = prepared(workspace, found, scratch)
    with session(load(config, None, "lora_bundle"), "flows.reproduce:reproduce") as call:
        again = call()
    if not compared(out, found, folder, again):
        raise typer.Exit(1)


app.command()(doctor)
app.command()(generate)
app.command()(upscale)
app.command()(export)
app.command()(verify)
app.command("ls")(list_workspace)
app.command()(history)
app.command()(diff)
app.command()(promote)
app.command()(rollback)
app.command()(block)
app.command()(publish)
app.command()(show)
app.command()(gc)


@app.command()
def ui(
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Port of the Prefect UI, on 127.0.0.1; 4200 unless a server runs already."),
    ] = None,
    deploy: Annotated[
        bool, typer.Option("--deploy", help="Also deploy prefect.yaml to the server that PREFECT_API_URL names.")
    ] = False,
) -> None:
    """Start the Prefect server, a worker and the deployments of prefect.yaml; Ctrl-C stops them."""
    from flows.serving.ui import serve_ui

    stopping.kept = "The worker, its runs and the server are stopped; finished artifacts and checkpoints are kept."
    serve_ui(port, deploy, out)


def _stage_flow(name: str, config: Path, overrides: list[str] | None, goal: "Goal") -> None:
    with session(load(config, overrides, goal), f"flows.stages:{name}") as call:
        for artifact in call():
            out.print(f"{artifact.kind:<16} {artifact.path}")

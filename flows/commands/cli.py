"""The command line `deepfloyd`: the only argument parser, and the only place that reads the environment.

Nothing heavy is imported before the configuration is known to be good: `--help` and a wrong key answer at once.
Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 128 + the number of the signal that ended it.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from deepfloyd_core.errors import DeepFloydError
from deepfloyd_core.store.file_faults import storage_error
from flows.commands.arguments import (
    ConfigPath,
    Control,
    FromPicture,
    Image,
    Mask,
    Overrides,
    PromptFile,
    Prompts,
    Seeds,
    Sizes,
    Strength,
    Versions,
    Workspace,
    user_path,
)
from flows.commands.stopping import Stopped, Stopping
from flows.commands.version_commands import Number, block, diff, history, promote, rollback
from flows.commands.workspace_commands import gc, list_workspace, show, verify
from tasks.terminal import console, is_watched, labelled

if TYPE_CHECKING:
    from deepfloyd_core.config.run import Run
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
out, err = console(), console(stderr=True)
stopping = Stopping(err)


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


@app.command()
def run(config: ConfigPath, overrides: Overrides = None) -> None:
    """Make every artifact, from the pictures to the published bundle."""
    loaded = _load(config, overrides, "lora_bundle")
    with _session(loaded) as call:
        from flows.finetune import finetune

        outcome = call(finetune)
    from flows.commands.report import print_outcome

    print_outcome(out, loaded.run.workspace, outcome)


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
    run = _load(config, overrides, "crops").run
    _print_notes(run.notes)
    from deepfloyd_core.crops.preview import PREVIEW_FILE, save_preview
    from deepfloyd_core.store.counts import many

    path = run.workspace / PREVIEW_FILE
    shown, unusable = save_preview(run, preview, path)
    _print_notes([unusable] if unusable else [])
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
    loaded = _load(config, overrides, "lora_bundle")
    with _session(loaded) as call:
        from flows.retrain import retrain as flow

        outcome = call(flow)
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
    with _session(_load(config, None, "lora_bundle")) as call:
        from flows.reproduce import reproduce as flow

        again = call(flow)
    if not compared(out, found, folder, again):
        raise typer.Exit(1)


@app.command()
def generate(
    config: ConfigPath,
    prompt: Prompts = None,
    prompt_file: PromptFile = None,
    seeds: Seeds = "0",
    sizes: Sizes = None,
    version: Versions = "latest",
    control: Control = None,
    image: Image = None,
    mask: Mask = None,
    strength: Strength = None,
    from_picture: FromPicture = None,
    overrides: Overrides = None,
) -> None:
    """Draw pictures with a published version, or with the base models: each prompt at each size with each seed."""
    from deepfloyd_core.preflight.generate import GenerateOptions, recorded_options

    asked = GenerateOptions(
        tuple(prompt or ()), version, seeds=seeds, sizes=sizes, strength=strength, prompt_file=prompt_file,
        control=control, image=image, mask=mask,
    )  # fmt: skip
    options, recorded = recorded_options(asked, from_picture)
    with _session(_load(config, [*recorded, *(overrides or [])], options)) as call:
        from flows.generate import generate as flow

        files = {
            "prompt_file": prompt_file, "control": control, "image": image, "mask": mask, "from_picture": from_picture,
        }  # fmt: skip
        paths = {name: str(path.absolute()) for name, path in files.items() if path}
        artifacts = call(flow, prompt=prompt, version=version, seeds=seeds, sizes=sizes, strength=strength, **paths)
    from deepfloyd_core.sampling.pictures import drawn

    rows = [row for artifact in artifacts for row in drawn(artifact.path)]
    has_others = len({prompt for prompt, _ in rows}) > 1
    for text, file in rows:
        out.print(f"{file}  {' '.join(text.split())}" if has_others else str(file))


@app.command()
def upscale(
    config: ConfigPath,
    pictures: Annotated[
        Path, typer.Argument(metavar="PICTURES", parser=user_path, help="A picture, or a folder of them.")
    ],
    prompt: Annotated[str, typer.Option(help="What they show, where no caption in NAME.txt lies beside them.")] = "",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of each picture's noise.")] = 0,
    version: Annotated[
        str, typer.Option(help="A number, `latest` for the champion, or `base` for no LoRA.")
    ] = "latest",
    overrides: Overrides = None,
) -> None:
    """Make pictures of your own four times as wide and high, with a published version or with the base model."""
    from deepfloyd_core.preflight.upscale import UpscaleOptions

    with _session(_load(config, overrides, UpscaleOptions(pictures, version, prompt, seed))) as call:
        from flows.upscale import upscale as flow

        artifact = call(flow, pictures=str(pictures.absolute()), prompt=prompt, seed=seed, version=version)
    from deepfloyd_core.sampling.own_pictures import upscaled_files

    for file in upscaled_files(artifact.path):
        out.print(str(file))


app.command()(verify)
app.command("ls")(list_workspace)
app.command()(history)
app.command()(diff)
app.command()(promote)
app.command()(rollback)
app.command()(block)
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
    with _session(_load(config, overrides, goal)) as call:
        from flows import stages

        for artifact in call(getattr(stages, name)):
            out.print(f"{artifact.kind:<16} {artifact.path}")


@dataclass(frozen=True)
class _Loaded:
    """The run file that a command names, and the run that it holds. A flow is called with the file: it loads it itself."""

    config: Path
    overrides: list[str]
    run: "Run"


def _load(config: Path, overrides: list[str] | None, goal: "Goal") -> _Loaded:
    """Called once a command, because it opens every source of the run. Checks this machine only; the flow checks the
    rest as well.
    """
    from deepfloyd_core.preflight.check import check_run

    return _Loaded(config, overrides or [], check_run(config, tuple(overrides or ()), goal, elsewhere=False))


def _print_notes(notes: Iterable[str]) -> None:
    for note in notes:
        err.print(labelled("note", "yellow", note))


@contextmanager
def _session(loaded: _Loaded) -> Iterator[Callable[..., Any]]:
    """Print the notes on the configuration, join a Prefect server, and yield a function that calls flows."""
    from deepfloyd_core.store.versions import damaged_records
    from flows.serving.api import server_needed
    from flows.serving.home import default_home
    from flows.serving.server import page_address, prefect_server
    from flows.serving.terminal_log import log_to_terminal

    workspace = loaded.run.workspace
    _print_notes([*loaded.run.notes, *damaged_records(workspace)])
    stopping.kept = f"Finished work is kept in {workspace}; the same command resumes it."
    if err.is_terminal:  # else nothing is seen until the server answers: 6 s, on a busy machine 30
        err.print("Prefect: joining a server, or starting one, which takes some seconds")
    with prefect_server(default_home()) as url:
        for name in ("CONSOLE", "DEBUG"):
            os.environ[f"PREFECT_LOGGING_HANDLERS_{name}_LEVEL"] = "CRITICAL"  # for the workers that a run starts
        log_to_terminal()
        from flows.runs.dead_runs import settle_here

        _print_notes(settle_here())

        def call(flow: Any, **parameters: Any) -> Any:
            err.print(f"Prefect: {page_address(url, default_home(), is_watched(err))}")
            with server_needed(url):
                return flow(config=str(loaded.config), overrides=loaded.overrides, **parameters)

        try:
            yield call
        finally:
            _flush_prefect()


def _flush_prefect() -> None:
    """Send the requests that Prefect has queued; without the server, the last task runs and log lines would be lost."""
    from prefect.events.worker import EventsWorker

    from tasks.outbox import send_what_waits

    patience_s = 1.0 if stopping.asked else 10.0
    send_what_waits(patience_s)
    EventsWorker.drain_all(timeout=patience_s)

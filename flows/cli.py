"""The command line `deepfloyd`: the only argument parser, and the only place that reads the environment.

Nothing heavy is imported before the configuration is known to be good: `--help` and a wrong key answer at once.
Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 128 + the number of the signal that ended it.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from deepfloyd_core.errors import DeepFloydError
from deepfloyd_core.spec import home_path
from deepfloyd_core.storage import storage_error
from flows.stopping import Stopped, Stopping
from tasks.terminal import console, labelled


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
    help=__doc__.split("\n")[0],
)  # fmt: skip
out, err = console(), console(stderr=True)
stopping = Stopping(err)


def _path(text: str) -> Path:
    """A path of the command line; the shell leaves `~` in quotes as it is."""
    return home_path(Path(text))


ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", parser=_path, help="The run file (TOML or JSON).")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the run file; KEY= removes it."),
]
Workspace = Annotated[Path, typer.Argument(metavar="WORKSPACE", parser=_path, help="Directory of the artifacts.")]


def main() -> None:
    """Entry of the console script: one clear message for every error that is meant for the user."""
    stopping.take_signals()
    code = 1
    try:
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
    from deepfloyd_core.versions import current

    workspace = _load(config, overrides).workspace
    before = current(workspace)
    with _session(config, overrides) as call:
        from flows.finetune import finetune

        version = call(finetune)
    _print_version(workspace, version, before)


@app.command()
def prepare(
    config: ConfigPath,
    preview: Annotated[
        int, typer.Option(min=0, max=1000, help="Only draw this many pictures with their crops into a PNG.")
    ] = 0,
    overrides: Overrides = None,
) -> None:
    """Index the pictures and cut the crops of every stage, and the eval set."""
    if not preview:
        _stage_flow("prepare", config, overrides)
        return
    checked = _load(config, overrides)
    _print_notes(checked)
    from deepfloyd_core.preview import PREVIEW_FILE, save_preview

    path = checked.workspace / PREVIEW_FILE
    shown = save_preview(checked, preview, path)
    out.print(f"{shown} pictures with their crops: {path}")


@app.command()
def embed(config: ConfigPath, overrides: Overrides = None) -> None:
    """Encode every caption and prompt with T5."""
    _stage_flow("embed", config, overrides)


@app.command("train-stage1")
def train_stage1(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train the Stage I LoRA, and make what it needs."""
    _stage_flow("train_stage1", config, overrides)


@app.command("train-stage2")
def train_stage2(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train the Stage II LoRA, and make what it needs."""
    _stage_flow("train_stage2", config, overrides)


@app.command()
def retrain(config: ConfigPath, overrides: Overrides = None) -> None:
    """Publish a new version if data or settings are not those of the current one; else say "no change"."""
    from deepfloyd_core.versions import current

    workspace = _load(config, overrides).workspace
    before = current(workspace)
    with _session(config, overrides) as call:
        from flows.retrain import retrain as flow

        version = call(flow)
    if version is None:
        out.print("no change")
    else:
        _print_version(workspace, version, before)


@app.command()
def generate(
    config: ConfigPath,
    prompt: Annotated[list[str], typer.Option(help="What to draw; may be given several times.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of a prompt's first picture; the next ones count up.")] = 0,
    images: Annotated[int, typer.Option(min=1, max=4096, help="How many pictures of each prompt.")] = 1,
    version: Annotated[str, typer.Option(help="A version number, `latest`, or `base` for no LoRA.")] = "latest",
    size: Annotated[str | None, typer.Option(help="Stage I size, e.g. 64 or 96x64 (width x height).")] = None,
    control: Annotated[
        Path | None,
        typer.Option(metavar="PICTURE", parser=_path, help="A picture to follow, with a version that is a ControlNet."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Draw pictures with a published version, or with the base models."""
    sized = [f'validation_resolution="{size}"'] if size else []
    checked = _load(config, [*(overrides or []), *sized])
    from deepfloyd_core.versions import bundle_of, find_version

    if version != "base":
        bundle_of(checked.workspace, find_version(checked.workspace, version))
    with _session(config, overrides) as call:
        from flows.generate import generate as flow

        made = call(
            flow,
            prompt=prompt,
            seed=seed,
            images=images,
            version=version,
            size=size,
            control=str(control.absolute()) if control else None,
        )
    for name, text in zip(made.summary["pictures"], made.summary["prompts"], strict=True):
        out.print(f"{made.path / name}{f'  {text}' if len(prompt) > 1 else ''}")


@app.command()
def verify(workspace: Workspace) -> None:
    """Re-hash every artifact and version of a workspace, and all that a version needs; exit 1 on any fault."""
    from deepfloyd_core.verify import verify_workspace

    _need_workspace(workspace)
    found = verify_workspace(workspace)
    faults = {"missing": found.missing, "damaged": found.damaged, "version": found.records}
    for label, lines in faults.items():
        for line in lines:
            out.print(labelled(label, "bold red", line))
    for line in found.notes:
        out.print(labelled("note", "yellow", line))
    out.print(f"{found.artifacts} artifacts and {found.versions} versions checked, {found.faults} faults")
    if found.missing or found.damaged:
        out.print(
            "`deepfloyd run` makes again what is missing, from the settings and pictures of the version that needs it. "
            "Of what is damaged remove the directory before."
        )
    if found.faults:
        raise typer.Exit(1)


@app.command("ls")
def list_artifacts(workspace: Workspace) -> None:
    """List the artifacts and versions of a workspace."""
    from rich.table import Table
    from rich.text import Text

    from deepfloyd_core.artifacts import all_artifacts
    from deepfloyd_core.errors import ArtifactError
    from deepfloyd_core.versions import bundle_of, readable_versions

    _need_workspace(workspace)
    table = Table("kind", "fingerprint", "made", "files", "bytes")
    for artifact in all_artifacts(workspace):
        try:
            record = artifact.manifest
        except ArtifactError:
            table.add_row(artifact.kind, artifact.fingerprint, Text("damaged", "bold red"), "", "")
            continue
        size = sum(entry["bytes"] for entry in record["files"])
        made = record["provenance"]["started"][:19].replace("T", " ")
        table.add_row(artifact.kind, artifact.fingerprint, made, str(len(record["files"])), f"{size:,}")
    out.print(table)
    published, faults = readable_versions(workspace)
    for version in published:
        out.print(f"version {version.number}: lora_bundle {version.bundle}")
        try:
            bundle_of(workspace, version)
        except ArtifactError as error:
            faults.append(str(error))
    for fault in faults:
        out.print(labelled("fault", "bold red", fault))


@app.command()
def show(
    workspace: Workspace, fingerprint: Annotated[str, typer.Argument(help="Of an artifact; the first digits will do.")]
) -> None:
    """Print the manifest of an artifact: spec, inputs, summary, files."""
    from deepfloyd_core.artifacts import all_artifacts
    from deepfloyd_core.errors import ConfigError
    from deepfloyd_core.versions import bundle_of, readable_versions

    _need_workspace(workspace)
    for version in readable_versions(workspace)[0]:
        if version.bundle.startswith(fingerprint):
            bundle_of(workspace, version)  # one that is lost is an error of its own
    found = [artifact for artifact in all_artifacts(workspace) if artifact.fingerprint.startswith(fingerprint)]
    if len(found) != 1:
        raise ConfigError(f"{fingerprint!r} names {len(found)} artifacts of {workspace}; `deepfloyd ls` lists them.")
    out.print_json(data=found[0].manifest)


@app.command()
def ui(
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Port of the Prefect UI, on 127.0.0.1; 4200 unless a server runs already."),
    ] = None,
) -> None:
    """Start the Prefect server, a worker and the deployments of prefect.yaml; Ctrl-C stops them."""
    from flows.ui import serve_ui

    stopping.kept = "The worker, its runs and the server are stopped; finished artifacts and checkpoints are kept."
    serve_ui(port, out)


def _stage_flow(name: str, config: Path, overrides: list[str] | None) -> None:
    with _session(config, overrides) as call:
        from flows import stages

        for artifact in call(getattr(stages, name)):
            out.print(f"{artifact.kind:<16} {artifact.path}")


def _load(config: Path, overrides: list[str] | None) -> Any:
    from deepfloyd_core.config import load_run

    return load_run(config, tuple(overrides or ()))


def _print_notes(checked: Any) -> None:
    for note in checked.notes:
        err.print(labelled("note", "yellow", note))


@contextmanager
def _session(config: Path, overrides: list[str] | None) -> Iterator[Callable[..., Any]]:
    """Check the configuration, join a Prefect server, and yield a caller for flows."""
    from flows.api import server_needed
    from flows.server import default_home, prefect_server

    checked = _load(config, overrides)
    _print_notes(checked)
    stopping.kept = f"What is finished is kept in {checked.workspace}; the same command goes on from there."
    with prefect_server(default_home()) as url:
        _log_to_terminal()

        def call(flow: Any, **parameters: Any) -> Any:
            err.print(f"Prefect: {url.removesuffix('/api')}")
            with server_needed(url):
                return flow(config=str(config), overrides=overrides or [], **parameters)

        try:
            yield call
        finally:
            _flush_prefect()


def _log_to_terminal() -> None:
    """Our own records above the progress bars; Prefect's go to its server, not to the terminal."""
    os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "CRITICAL"  # for the workers that a run starts
    import prefect.main  # noqa: F401  (sets its logging up)

    from tasks.progress import LogLines

    for handler in logging.getLogger().handlers + logging.getLogger("prefect._internal").handlers:
        handler.setLevel(logging.CRITICAL + 1)  # errors reach the user once, through main()
    logger = logging.getLogger("deepfloyd_core")
    logger.addHandler(LogLines())
    logger.setLevel(logging.INFO)


def _flush_prefect() -> None:
    """Send what Prefect has queued: with the server gone the last task runs and log lines would be lost."""
    from prefect.events.worker import EventsWorker

    from tasks.outbox import send_what_waits

    patience_s = 1.0 if stopping.asked else 10.0
    send_what_waits(patience_s)
    EventsWorker.drain_all(timeout=patience_s)


def _print_version(workspace: Path, version: Any, before: Any) -> None:
    from deepfloyd_core.versions import bundle_of, news_of

    bundle = bundle_of(workspace, version)
    samples = bundle.summary["samples"]
    out.print()
    for stage in (1, 2):
        if measured := bundle.summary.get(f"stage{stage}"):
            _print_held_out(stage, measured)
    for key, value in samples.items():
        if not isinstance(value, dict):
            out.print(f"{key.replace('_', ' '):<22} {value}")
    _print_upscaled(samples)
    out.print(news_of(workspace, version, before))
    out.print(f"bundle                 {bundle.path}")
    sheets = {
        "sheet.png": "contact sheet", "eval.png": "held-out pictures", "eval_details.png": "zoomed details",
        "eval_spoilt.png": "low-res spoilt",
    }  # fmt: skip
    for name, label in sheets.items():
        if (bundle.path / name).exists():
            out.print(f"{label:<22} {bundle.path / name}")


def _print_held_out(stage: int, measured: dict[str, Any]) -> None:
    """The loss on pictures that were not trained on: of the base, or of a parent, and of the tuned model."""
    for before, gain in (("eval_loss_base", "eval_gain"), ("eval_loss_parent", "eval_gain_on_parent")):
        if before in measured:
            middle, *interval = measured[gain]
            ends = " ({:+.4f} to {:+.4f}, 95 %)".format(*(-value for value in reversed(interval))) if interval else ""
            name = f"stage {'I' * stage} {'held-out loss' if before == 'eval_loss_base' else 'from its parent'}"
            out.print(f"{name:<22} {measured[before]:.4f} -> {measured['eval_loss']:.4f}, {-middle:+.4f}{ends}")


def _print_upscaled(samples: dict[str, Any]) -> None:
    """Stage II's measures, on the held-out pictures and on Stage I's samples."""
    from deepfloyd_core.metrics import MEASURES, SAMPLE_MEASURES

    _print_measures("Stage II on held-out pictures, upscaled by", samples, MEASURES, "psnr")
    title = "Stage II on held-out pictures, low-res spoilt as in training, upscaled by"
    _print_measures(title, samples.get("spoilt", {}), MEASURES, "psnr")
    on_samples = samples.get("upscaled_samples", {})
    _print_measures("Stage II on Stage I's samples, upscaled by", on_samples, SAMPLE_MEASURES, "consistency")


# Of measures that are not named by their words.
_HEADS = {"psnr": "PSNR, dB", "ssim": "SSIM", "clip": "CLIP", "lpips": "LPIPS"}


def _print_measures(title: str, summary: dict[str, Any], names: dict[str, str], gain: str) -> None:
    """A line for each way and noise level, and what the tuned model gains on each other way in one measure."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from deepfloyd_core.metrics import UPSCALED_BY, by_noise_level, gained

    levels = by_noise_level(summary)
    if not levels:
        return
    table = Table("", "noise level", box=SIMPLE_HEAD, padding=(0, 1))
    there = [name for name in names if name in summary["upscaled"]["bicubic"]]
    for name in there:
        table.add_column(_HEADS.get(name, name.replace("_", " ")), justify="right")
    gains = []
    for level, measured in levels.items():
        for way in (way for way in UPSCALED_BY if way in measured["upscaled"]):
            found = (measured["upscaled"][way][name] for name in there)
            shown = ("" if value is None else f"{value:.3g}" if value < 10 else f"{value:.2f}" for value in found)
            plain = way not in ("base", "tuned")
            if not plain or measured is summary:  # the figures of a plain enlargement are the same at every level
                table.add_row(way, "" if plain else str(level), *shown)
            if way in measured["gain"]:
                label = f"tuned over {way}" + (f", {level}" if len(levels) > 1 else "")
                gains.append(f"{label:<{22 if len(levels) == 1 else 26}} {gained(measured['gain'][way][gain])}")
    out.print(f"\n{title}")
    out.print(table)
    for line in gains:
        out.print(line)


def _need_workspace(workspace: Path) -> None:
    from deepfloyd_core.artifacts import is_workspace
    from deepfloyd_core.errors import ConfigError

    if not is_workspace(workspace):
        fault = "holds no artifacts" if workspace.is_dir() else "is no folder" if workspace.exists() else "is not there"
        raise ConfigError(f"{workspace} {fault}. Give the folder that `workspace` of the run file names.")


if __name__ == "__main__":
    main()

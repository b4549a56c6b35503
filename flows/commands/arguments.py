"""Arguments that several commands take."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from deepfloyd_core.config.base import home_path


def user_path(text: str) -> Path:
    """A path of the command line; the shell leaves `~` in quotes as it is."""
    return home_path(Path(text))


def here(loras: list[str] | None) -> tuple[str, ...]:
    """LoRAs of the command line, their paths from its folder. Raises ConfigError."""
    if not loras:
        return ()
    from deepfloyd_core.adapters.mixed import placed_lora

    return tuple(placed_lora(lora, lambda source: user_path(source).absolute()) for lora in loras)


def workspace_path(text: str) -> Path:
    """A workspace of the command line: a folder, or the URL of one in a bucket, whose records are then brought. Raises
    ConfigError unless it holds artifacts.
    """
    # Not above: a command that is only asked for its help needs no artifacts.
    from deepfloyd_core.store.lookup import opened_workspace

    return opened_workspace(text)


ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", parser=user_path, help="The run file (TOML or JSON).")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the run file; KEY= removes it."),
]
Workspace = Annotated[
    Path,
    typer.Argument(
        metavar="WORKSPACE", parser=workspace_path, help="Directory of the artifacts, or s3://BUCKET/PREFIX."
    ),
]

# Of `generate`.
Prompts = Annotated[list[str] | None, typer.Option("--prompt", help="Prompt; may be given several times.")]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        parser=user_path,
        help="More prompts: one a line, a JSON library, or a table (CSV, TSV, JSON lines, Parquet) with the columns prompt, "
        "negative_prompt, seed, size.",
    ),
]
Sizes = Annotated[
    str | None, typer.Option(help="Stage I sizes, such as 64 or 64,96x64 (width x height); else the run file's.")
]
Control = Annotated[
    Path | None,
    typer.Option(metavar="PICTURE", parser=user_path, help="Conditioning picture, for a version that is a ControlNet."),
]
Image = Annotated[
    Path | None,
    typer.Option(metavar="PICTURE", parser=user_path, help="A picture that all start from, in place of noise."),
]
Mask = Annotated[
    Path | None,
    typer.Option(metavar="PICTURE", parser=user_path, help="White: drawn anew. Without a mask: everything."),
]
Strength = Annotated[
    float | None,
    typer.Option(help="How much noise the image gets, above 0, at most 1; else 0.7, with a mask 1, with a style 0.5."),
]
Style = Annotated[
    str | None, typer.Option(metavar="TEXT", help="Give the image the style of this text; --prompt says what it shows.")
]
Stages = Annotated[
    Literal["1", "1-2", "1-3"] | None,
    typer.Option(
        help="The stages that draw; else I and II, as the run file has them. 1-3 ends with its table stage3, or Lanczos."
    ),
]
Seeds = Annotated[str, typer.Option(help="Seeds of each prompt, such as 7 or 0-7,42.")]
OneVersion = Annotated[
    str | None,
    typer.Option(
        "--version",
        help="A number, `champion` (unless told), `base` for no LoRA, a bundle's folder or `owner/name` of the Hub.",
    ),
]
Compared = Annotated[
    str | None,
    typer.Option(
        metavar="VERSIONS",
        help="Several that draw the same pictures, in place of --version: base,3,champion for example.",
    ),
]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="SOURCE@WEIGHT",
        help="A LoRA to draw with on the base models: version:N, a file or `owner/name` of the Hub, at a weight (1 unless "
        "told); may be repeated.",
    ),
]
FromPicture = Annotated[
    Path | None,
    typer.Option(
        "--from",
        metavar="PICTURE",
        parser=user_path,
        help="Draw this picture again, by what is recorded in it. Give its control, image, mask and LoRAs again.",
    ),
]

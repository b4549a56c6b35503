"""Parameters of flows, as the form of a deployment shows them: typed and bounded, so that a wrong value is refused there.

Prefect's server checks them before a run begins, and the flow again: the server takes a parameter that it does not know.
"""

from typing import Annotated, Literal

from pydantic import Field

from deepfloyd_core.errors import ConfigError
from deepfloyd_core.preflight.drawn_from import MOST_LORAS

Overrides = Annotated[list[Annotated[str, Field(pattern=r"^\s*[\w.]+\s*=")]] | None, Field(max_length=100)]
Steps = Annotated[int | None, Field(ge=1, le=10_000_000)]
# A number alone is one: `prefect deployment run -p seeds=7` gives no text.
Seeds = Annotated[str, Field(pattern=r"^\s*\d+(-\d+)?(\s*,\s*\d+(-\d+)?)*\s*$")] | Annotated[int, Field(ge=0, lt=2**32)]
Number = Annotated[int, Field(ge=1)]
Prompts = str | list[str] | None
Sizes = Annotated[str, Field(pattern=r"^\s*\d+(x\d+)?(\s*,\s*\d+(x\d+)?)*\s*$")] | Annotated[int, Field(ge=1)] | None
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Loras = Annotated[list[str] | None, Field(max_length=MOST_LORAS)]
Stages = Literal["1", "1-2", "1-3", 1] | None
Strength = Annotated[float | None, Field(gt=0, le=1)]
OneVersion = Annotated[str, Field(pattern=r"^(latest|champion|\d+)$")] | Annotated[int, Field(ge=1)]
DrawnName = Annotated[str, Field(min_length=1, max_length=4096)] | Annotated[int, Field(ge=1)]  # a folder too
Compared = Annotated[list[DrawnName] | None, Field(min_length=2, max_length=16)]


def text_of(value: str | int | None) -> str | None:
    """A parameter that may be given as a number, as text."""
    return None if value is None else str(value)


def settings(overrides: list[str] | None, **fields: object) -> tuple[str, ...]:
    """The overrides of a run file, with those from fields of their own: KEY for a field KEY, TABLE.KEY for TABLE__KEY.

    Raises ConfigError for a key that has both.
    """
    named = {name.replace("__", "."): value for name, value in fields.items() if value is not None}
    given = list(overrides or ())
    if twice := sorted(named.keys() & {one.partition("=")[0].strip() for one in given}):
        raise ConfigError(f"{twice[0]} is set by a field of its own and in `overrides`. Remove one of them.")
    return (
        *given,
        *(f"{key}={value!r}" if isinstance(value, str) else f"{key}={value}" for key, value in named.items()),
    )

"""A choice: a key of a run file or a data file, its value, and why it has that value."""

from dataclasses import dataclass

from deepfloyd_core.config.data_blocks import CaptionTable

Value = str | int | float | bool | tuple[str, ...] | tuple[float, ...] | CaptionTable | None


@dataclass(frozen=True)
class Choice:
    """One key. `value` None: it is not set, so its default rules, and `why` says what follows."""

    key: str
    value: Value
    why: str
    title: str = ""  # what it decides, for the terminal; empty: it stands in the file alone


@dataclass(frozen=True)
class StageChoices:
    """The table of a stage. `left_out`: why the run does not have it; it is then written as comments."""

    table: str
    title: str
    keys: tuple[Choice, ...]
    left_out: str = ""


@dataclass(frozen=True)
class Choices:
    """All of a project."""

    name: str
    seen: str  # what was looked at, in a sentence
    run: tuple[Choice, ...]
    stages: tuple[StageChoices, ...]
    data: tuple[Choice, ...]

    def of(self, key: str) -> Value:
        """The value of a key of the data file, else of the run file outside of its stages; None: it is not set."""
        return next((choice.value for choice in (*self.data, *self.run) if choice.key == key), None)

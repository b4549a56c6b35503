"""From a run file to its configuration: its keys in our spelling, checked together. No other file is read."""

from pathlib import Path

from deepfloyd_core.config.base import parse_spec, relative_to
from deepfloyd_core.config.relative_paths import from_here, start_of_paths
from deepfloyd_core.config.run import RunConfig
from deepfloyd_core.config.run_file import ParsedRunFile, in_its_words, read_run_file
from deepfloyd_core.config.simpletuner_options import ALIASES
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.errors import ConfigError, DeepFloydError, each_line, raise_together


def read_run_config(path: Path, overrides: tuple[str, ...] = ()) -> tuple[RunConfig, ParsedRunFile]:
    """A run file's configuration, and the notes about it. No other file is read.

    Raises ConfigError that reports all faults at once.
    """
    written, config, faults = read_written(path, overrides)
    raise_together(faults)
    assert config is not None
    return config, written


def read_written(
    path: Path, overrides: tuple[str, ...] = ()
) -> tuple[ParsedRunFile, RunConfig | None, list[DeepFloydError]]:
    """A run file as it is written, its configuration (None: it has faults), and all faults.

    Raises ConfigError for a file or overrides that cannot be parsed at all.
    """
    written = read_run_file(path, overrides, RunConfig, StageConfig)
    start = start_of_paths(path, written.values.get("data_backend_config"))
    if start is not None:
        written = read_run_file(path, tuple(map(from_here, overrides)), RunConfig, StageConfig)
    if not written.staged:
        return written, None, list(written.faults)
    try:
        with relative_to(start):
            config = parse_spec(RunConfig, written.values, str(path), also=(*StageConfig.model_fields, *ALIASES))
    except ConfigError as error:
        # Of several contradictions only the first has the file's name yet.
        lines = (line.removeprefix(f"{path}: ") for line in str(error).splitlines())
        told = in_its_words("\n".join(f"{path}: {line}" for line in lines), path, written.aliases)
        return written, None, [*written.faults, *each_line(ConfigError(told))]
    return written, config, list(written.faults)

"""From a run file to a checked run: reads run file and data file, and checks everything that they name. No torch.

Faults are collected: first those of the run file, then of the data file, then conflicts between the two. A fault that
may only follow from another one is not reported. So when the run file has faults, the data file is checked alone; when
an entry of the data file cannot be read, the other entries are checked one by one only. What draws or exports trains on
nothing, so for that the data file is neither required nor read.
"""

from pathlib import Path

from deepfloyd_core.config.base import home_path, is_there, relative_to
from deepfloyd_core.config.bucket_workspace import checked_url, is_url
from deepfloyd_core.config.data_file import DataFile, load_data_file
from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.config.relative_paths import no_data_file, start_of_paths
from deepfloyd_core.config.run import Run, RunConfig
from deepfloyd_core.config.run_file import ParsedRunFile
from deepfloyd_core.config.run_reader import read_written
from deepfloyd_core.config.run_text import TOKENS
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.errors import ConfigError, DeepFloydError, attempt, raise_together
from deepfloyd_core.preflight.data_sets import (
    detector_fault,
    low_res_faults,
    pair_faults,
    pair_notes,
    pair_places,
    size_fault,
    text_embeds_faults,
    unfed_fault,
    with_filters,
    workspace_faults,
)
from deepfloyd_core.sources.source import open_source
from deepfloyd_core.training.mixing import check_steps

NO_DATA = (
    "data_backend_config is missing, which names the pictures to train on. `deepfloyd init FOLDER` writes one; "
    "`generate --version base` draws without."
)


def load_run(path: Path, overrides: tuple[str, ...] = (), data: bool = True) -> Run:
    """Read and check a run file and its data file; `overrides` are KEY=VALUE, KEY dotted, VALUE as in TOML; KEY= removes it.

    data: False leaves the data file out; the run then has no data sets. Raises ConfigError that reports all faults at once.
    Imports nothing heavy.
    """
    faults: list[DeepFloydError] = []
    run = attempt(faults, read_run, path, overrides, faults, data)
    raise_together(faults)
    assert run is not None  # without one there are faults
    return run


def read_run(path: Path, overrides: tuple[str, ...], faults: list[DeepFloydError], data: bool = True) -> Run | None:
    """A run, as far as its files could be read; their faults are added to `faults`. None: the run file makes no run.

    data: as of `load_run`. Raises ConfigError for a run file or overrides that cannot be parsed at all.
    """
    path = home_path(path)
    written, config, found = read_written(path, overrides)
    faults += found
    start = start_of_paths(path, written.values.get("data_backend_config"))
    notes = [*written.notes, *([f"{path}: relative paths start at {start}, where the data file is"] if start else [])]
    place = _data_file_place(config, written, start) if data else None
    if place is not None and not is_there(Path(place)):
        faults.append(ConfigError(f"{path}: {no_data_file(place)}"))
        place = None
    elif data and not written.values.get("data_backend_config"):
        faults.append(ConfigError(f"{path}: {NO_DATA}"))
    if config is not None:
        _check_measures(config, faults)
    file, datasets = None, tuple[ImageDataset, ...]()
    if place is not None:
        with relative_to(start):
            file = attempt(faults, load_data_file, Path(place), written.data_defaults)
            datasets = _data_sets(Path(place), file, faults) if file is not None else ()
    if config is None:
        return None
    attempt(faults, open_workspace, config)
    if is_url(config.workspace):
        notes.append(f"{config.workspace} is mirrored in {config.workspace_folder}")
    notes += _run_notes(path, config)
    conditioning = file.conditioning if file is not None else ()
    if file is not None:
        notes += _check_together(path, config, datasets, file, faults) + list(file.notes)
    return Run(config, datasets, tuple(notes), conditioning, str(path.absolute()))


def open_workspace(config: RunConfig) -> None:
    """Bring the records of a workspace that is in a bucket. Raises StorageError where the bucket refuses."""
    if is_url(config.workspace):
        from deepfloyd_core.store.mirror import open_mirror
        from deepfloyd_core.store.mirror_cache import set_limit

        set_limit(open_mirror(checked_url(config.workspace), config.workspace_folder), config.workspace_cache_gib)


def _data_file_place(config: RunConfig | None, written: ParsedRunFile, start: Path | None) -> str | None:
    """Where the data file should be; None if the run file does not name it."""
    if config is not None:
        return config.data_backend_config
    value = written.values.get("data_backend_config")
    path = attempt([], home_path, Path(value)) if isinstance(value, str) and value else None
    return None if path is None else str(start / path if start else path)


def _check_measures(config: RunConfig, faults: list[DeepFloydError]) -> None:
    """Check the models that measure pictures."""
    # Not above: the table of measures takes NumPy, 0.1 s more until a wrong key is answered.
    from deepfloyd_core.measures.registry import networks_of

    for network, weights in networks_of(config):
        attempt(faults, network.check, weights)


def _data_sets(path: Path, file: DataFile, faults: list[DeepFloydError]) -> tuple[ImageDataset, ...]:
    """The data sets with their filters; missing places and filters that cannot be read are faults."""
    faults += file.faults
    for dataset in file.datasets:
        if fault := detector_fault(dataset):
            faults.append(ConfigError(f"{path}: {fault}"))
        try:
            open_source(dataset)
        except ConfigError as error:
            faults.append(ConfigError(f"{path}: {error}"))
    if file.whole:
        faults += [ConfigError(f"{path}: {fault}") for fault in text_embeds_faults(file.datasets, file.text_embeds)]
    found = [attempt(faults, with_filters, path, dataset, file.text_embeds) or dataset for dataset in file.datasets]
    return tuple(found)


def _check_together(
    path: Path, config: RunConfig, datasets: tuple[ImageDataset, ...], file: DataFile, faults: list[DeepFloydError]
) -> list[str]:
    """Check a run file and a data file against each other. Returns notes."""
    notes = []
    if file.whole:
        faults += map(ConfigError, _eval_dataset_faults(path, config, datasets))
    for dataset in datasets:
        found = (size_fault(config.stage(stage).flavour, dataset, stage) for stage in config.stages)
        faults += [ConfigError(fault) for fault in found if fault][:1]  # what mends one stage mends the other
    faults += map(ConfigError, workspace_faults(config.workspace_folder, datasets))
    for stage in config.stages:
        if file.whole:
            notes += _check_turns(config, datasets, stage, faults)
    for stage in config.upscalers:
        if config.stage(stage).remakes_low_res:
            faults += map(ConfigError, low_res_faults(config, stage, datasets))
    if config.paired_stage is not None:
        faults += map(ConfigError, pair_faults(datasets, config.paired_stage))
        for place in pair_places(datasets, file.conditioning, config.paired_stage):
            attempt(faults, open_source, place)
    return notes + pair_notes(datasets, config.paired_stage)


def _check_turns(
    config: RunConfig, datasets: tuple[ImageDataset, ...], stage: Stage, faults: list[DeepFloydError]
) -> list[str]:
    """Check that a data set feeds each step of a stage; the steps of epochs are counted later. Returns notes."""
    if fault := unfed_fault(config.stage(stage).flavour, datasets, stage):
        faults.append(ConfigError(fault))
        return []
    if config.stage(stage).num_train_epochs:
        return []
    return attempt(faults, check_steps, datasets, stage, config.stage(stage).steps) or []


def _eval_dataset_faults(path: Path, config: RunConfig, datasets: tuple[ImageDataset, ...]) -> list[str]:
    """An `eval_dataset_id` that no data set of pictures has, or one that does not feed a stage."""
    if config.eval_dataset_id is None or not datasets:
        return []
    prefix, names = f"{path}: eval_dataset_id is {config.eval_dataset_id!r}", [dataset.id for dataset in datasets]
    chosen = next((dataset for dataset in datasets if dataset.id == config.eval_dataset_id), None)
    if chosen is None:
        return [f"{prefix}; {config.data_backend_config} has {', '.join(names)}. Use one of these, or remove it."]
    return [
        f"{prefix}, which does not feed stage {stage}, so nothing could be measured at that stage. Name one that feeds "
        "every stage of the run, or remove it."
        for stage in config.stages
        if chosen.factor(stage) is None
    ]


def _run_notes(path: Path, config: RunConfig) -> list[str]:
    """What a user should know of a run file's settings."""
    notes = []
    if config.tokenizer_max_length > TOKENS:
        notes.append(
            f"{path}: tokenizer_max_length is {config.tokenizer_max_length}; IF was trained with {TOKENS} rows of "
            "text and attends to all of them, so more rows, also for short captions, change the base model's output"
        )
    if config.num_processes != 1 and path.suffix != ".toml":
        notes.append(
            f"{path}: num_processes is {config.num_processes}: they share the batches of each step. SimpleTuner gives "
            "each a batch of its own; for its steps multiply gradient_accumulation_steps by their number"
        )
    first = config.text_to_image
    if first and first.controlnet and config.prompts:
        notes.append(
            f"{path}: validation_prompt is ignored where {first.flavour.kind.title} is sampled; with controlnet its "
            "samples use held-out pictures as conditioning, each with its caption"
        )
    return notes + [f"{path}: stage{stage}.{note}" for stage in config.stages for note in config.stage(stage).notes]

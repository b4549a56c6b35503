"""From a run file to a checked run: both files read, and everything that they name looked at. No torch."""

from pathlib import Path

from deepfloyd_core.config.base import home_path, is_there, relative_to
from deepfloyd_core.config.data_file import load_data_file
from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.config.relative_paths import no_data_file, start_of_paths
from deepfloyd_core.config.run import TOKENS, Run, RunConfig, read_run_config
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.preflight.data_sets import check_datasets, check_low_res, check_pairs, check_places, with_filters


def _check_eval_dataset(config: RunConfig, datasets: tuple[ImageDataset, ...], path: Path) -> None:
    """Raises ConfigError for an `eval_dataset_id` that no data set of pictures has, or one that a stage is not fed by."""
    if config.eval_dataset_id is None:
        return
    said, names = f"{path}: eval_dataset_id is {config.eval_dataset_id!r}", [dataset.id for dataset in datasets]
    chosen = next((dataset for dataset in datasets if dataset.id == config.eval_dataset_id), None)
    if chosen is None:
        raise ConfigError(
            f"{said}; {config.data_backend_config} has {', '.join(names)}. Use one of these, or remove it."
        )
    for stage in config.stages:
        if chosen.factor(stage) is None:
            raise ConfigError(
                f"{said}, which does not feed stage {stage}, so nothing could be measured there. Name one that feeds "
                "every stage of the run, or remove it."
            )


def _known_steps(config: StageConfig) -> int | None:
    """Steps of a training, unless they are counted later."""
    return None if config.num_train_epochs else config.steps


def load_run(path: Path, overrides: tuple[str, ...] = ()) -> Run:
    """Read and check a run file and its data file; `overrides` are KEY=VALUE, KEY dotted, VALUE as in TOML; KEY= removes it.

    Raises ConfigError with one line for each fault. Imports nothing heavy.
    """
    path = home_path(path)
    config, written = read_run_config(path, overrides)
    start = start_of_paths(path, written.values["data_backend_config"])
    if start is None and not is_there(Path(config.data_backend_config)):
        raise ConfigError(f"{path}: {no_data_file(config.data_backend_config)}")
    notes = [*written.notes, *([f"{path}: relative paths start at {start}, where the data file is"] if start else [])]
    if config.tokenizer_max_length > TOKENS:
        notes.append(
            f"{path}: tokenizer_max_length is {config.tokenizer_max_length}; IF was trained with {TOKENS} rows of text and "
            "attends to all of them, so more rows, also for short captions, shift what the base model does"
        )
    # Not above: the table of measures takes NumPy, 0.1 s more until a wrong key is answered.
    from deepfloyd_core.measures.registry import networks_of

    for network, weights in networks_of(config):
        network.check(weights)
    with relative_to(start):
        file_path = Path(config.data_backend_config)
        file = load_data_file(file_path, written.data_defaults)
        check_places(file_path, file.datasets)
        datasets = tuple(with_filters(file_path, dataset, file.text_embeds) for dataset in file.datasets)
    _check_eval_dataset(config, datasets, path)
    if config.stage1 and config.stage1.controlnet and config.prompts:
        notes.append(
            f"{path}: validation_prompt is ignored where Stage I is sampled; with controlnet it follows held-out pictures, "
            "each with its caption"
        )
    for stage in config.stages:
        notes += [f"{path}: stage{stage}.{note}" for note in config.stage(stage).notes]
        notes += check_datasets(config.stage(stage).flavour, datasets, stage, _known_steps(config.stage(stage)))
    if config.stage2 and config.remakes_low_res:
        check_low_res(config.stage1, config.stage2, datasets)
    notes += check_pairs(config.paired, datasets, file.conditioning)
    return Run(config, datasets, (*notes, *file.notes), file.conditioning, str(path.absolute()))

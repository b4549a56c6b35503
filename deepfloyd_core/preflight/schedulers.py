"""Checks what the scheduler in a model's folder says its UNet predicts, before any model is loaded.

IF predicts epsilon, the noise of x_t, and beside it the variance as a share of its range. Training and sampling assume both
(`diffusion.loss`, the stock pipelines): a model that predicts something else would be sampled without an error, into
pictures that are wrong. Stage III is not trained, and its scheduler computes with what its own file says.
"""

from pathlib import Path
from typing import Any

from deepfloyd_core.config.stage3 import TABLE, TITLE
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.errors import ConfigError, ModelError
from deepfloyd_core.files import parsed_json

_PREDICTION, _VARIANCE = "epsilon", "learned_range"
_OF_SCHEDULERS = (_PREDICTION, "sample", "v_prediction")  # what diffusers' DDIM and DDPM can compute with


def check_scheduler(stage: Stage, folder: Path) -> None:
    """Raise ConfigError for a model whose scheduler does not fit IF's prediction, ModelError for a file that is none."""
    kind, file = STAGES[stage], _file(folder)
    found = _read(file)
    prediction = found.get("prediction_type", _PREDICTION)
    wrong = [f"prediction_type {prediction!r} in place of {_PREDICTION!r}"] if prediction != _PREDICTION else []
    if found.get("variance_type") == "learned":
        wrong.append(f"variance_type 'learned' in place of {_VARIANCE!r}")
    if wrong:
        raise ConfigError(
            f"{kind.table}: {file} has {' and '.join(wrong)}, and {kind.title} of IF is trained and sampled as one that "
            f"predicts the noise. Give {kind.table}.pretrained_model_name_or_path a model that does, or correct the file."
        )


def check_stage3_scheduler(folder: Path) -> None:
    """Raise ConfigError for a prediction of Stage III that no scheduler computes with. Errors as of `check_scheduler`."""
    prediction = _read(_file(folder)).get("prediction_type", _PREDICTION)
    if prediction not in _OF_SCHEDULERS:
        raise ConfigError(
            f"{TABLE}: {_file(folder)} has prediction_type {prediction!r}; a scheduler of {TITLE} computes with "
            f"{', '.join(_OF_SCHEDULERS)}. Correct the file, or give {TABLE}.pretrained_model_name_or_path another model."
        )


def _file(folder: Path) -> Path:
    return folder / "scheduler" / "scheduler_config.json"


def _read(file: Path) -> dict[str, Any]:
    try:
        found = parsed_json(file.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("it holds no table of keys")
        return found
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{file} is no scheduler's configuration ({error}). Put the one that belongs to the weights there."
        ) from None

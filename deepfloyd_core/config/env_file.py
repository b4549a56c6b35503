"""SimpleTuner's older run file, `config.env`: a shell script of variables, read as text and never run.

A variable is one of three kinds: it sets an option of another name, it sets the option that has its own name in lower
case, or it is only used in the values of other variables.
"""

import re
from pathlib import Path

from deepfloyd_core.config.base import read_config_text
from deepfloyd_core.config.shell_text import read_assignments
from deepfloyd_core.errors import ConfigError

# Variables whose option does not have the variable's name in lower case.
_OPTIONS = {
    "ACCELERATE_CONFIG_PATH": "accelerate_config",
    "CHECKPOINTING_LIMIT": "checkpoints_total_limit",
    "DATALOADER_CONFIG": "data_backend_config",
    "HUB_MODEL_NAME": "hub_model_id",
    "LR_SCHEDULE": "lr_scheduler",
    "MAX_NUM_STEPS": "max_train_steps",
    "MINIMUM_RESOLUTION": "minimum_image_size",
    "MIN_SNR_GAMMA": "snr_gamma",
    "MODEL_NAME": "pretrained_model_name_or_path",
    "NUM_EPOCHS": "num_train_epochs",
    "PUSH_CHECKPOINTS": "push_checkpoints_to_hub",
    "RESUME_CHECKPOINT": "resume_from_checkpoint",
    "TRAINER_DYNAMO_BACKEND": "dynamo_backend",
    "TRAINING_DYNAMO_BACKEND": "dynamo_backend",
    "TRAINING_NUM_MACHINES": "num_machines",
    "TRAINING_NUM_PROCESSES": "num_processes",
    "TRAINING_SEED": "seed",
    "USE_XFORMERS": "enable_xformers_memory_efficient_attention",
}
# Before MODEL_FAMILY existed, each switched a family of models on.
_FAMILIES = ("STABLE_DIFFUSION_3", "STABLE_DIFFUSION_LEGACY", "PIXART_SIGMA", "KOLORS", "FLUX", "AURA_FLOW",
             "AURA_DIFFUSION", "HUNYUAN_DIT")  # fmt: skip
_EXTRA = ("TRAINER_EXTRA_ARGS", "DEBUG_EXTRA_ARGS")
# SimpleTuner puts the extra arguments on a command line without quotes: there a shell splits them at blanks, leaves quotes
# as they are, and takes the others for patterns.
_NOT_SPLIT = re.compile(r"""['"\\*?\[]""")


def is_env_file(path: Path) -> bool:
    """Whether a run file is a shell script, by its name: config.env, config.env.example, env.sh."""
    return path.suffix.lower() == ".sh" or (
        ".env" in path.name.lower() and path.suffix.lower() not in (".toml", ".json")
    )


def read_env_file(path: Path, options: frozenset[str]) -> tuple[dict[str, str], list[str], dict[str, str]]:
    """Returns the options that a script sets, as text; the variables that set none of `options`; and for each option
    that has another name in the script that name.

    Raises ConfigError for a file that cannot be read, and for a line that a shell would read differently.
    """
    text = read_config_text(path)
    try:
        variables = read_assignments(text)
    except ValueError as error:
        raise ConfigError(f"{path}, {error}.") from None
    found, helpers = _options_of(variables, options, path)
    for name in _EXTRA:
        found |= _arguments(variables.get(name, ""), f"{path}: {name}")
    if not {"model_type", "model_family", "model_flavour"} & found.keys():
        beside = path.with_name("config.json")
        there = f" SimpleTuner reads the other keys from {beside}: give that file." if beside.exists() else ""
        raise ConfigError(f"{path}: MODEL_TYPE is missing, for example deepfloyd-lora.{there}")
    return found, helpers, {option: name for name, option in _OPTIONS.items() if name in variables}


def _options_of(variables: dict[str, str], options: frozenset[str], path: Path) -> tuple[dict[str, str], list[str]]:
    """The options that variables set, and those that set none. Raises ConfigError for two values of one option."""
    found: dict[str, str] = {}
    setters: dict[str, str] = {}
    helpers = []
    for name, value in variables.items():
        option = _OPTIONS.get(name, name.lower())
        if name in _EXTRA or (name in _FAMILIES and value.lower() != "true"):
            continue
        if name in _FAMILIES:
            option, value = "model_family", name.lower()
        elif option not in options:
            helpers.append(name)
            continue
        if found.get(option, value) != value:
            raise ConfigError(f"{path}: {setters[option]} and {name} are one option, {option}. Keep one of them.")
        found[option], setters[option] = value, name
    return found, helpers


def _arguments(text: str, where: str) -> dict[str, str]:
    """Options of a command line: --key=value, --key value, --switch."""
    found: dict[str, str] = {}
    name = ""
    if match := _NOT_SPLIT.search(text):
        raise ConfigError(
            f"{where}: {match[0]} cannot be in a value: SimpleTuner would split the text there. Remove it."
        )
    for word in text.split():
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            name = name.replace("-", "_")
            found[name] = value if equals else "true"
            name = "" if equals else name
        elif name:
            found[name], name = word, ""
        else:
            raise ConfigError(f"{where}: {word!r} belongs to no --option.")
    return found

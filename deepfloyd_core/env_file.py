"""SimpleTuner's older run file, `config.env`: a shell script of variables, read as text and never run.

A variable may stand for an option under another name, be one by its own name in lower case, or only help to write others.
`$NAME` and `${NAME}` are what the file set before; `$((NAME / 10))` is the whole number.
"""

import re
import shlex
from pathlib import Path

from deepfloyd_core.errors import ConfigError

# Variables whose option has another name than their own in lower case.
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
# Each switched a family of models on, before there was MODEL_FAMILY.
_FAMILIES = ("STABLE_DIFFUSION_3", "STABLE_DIFFUSION_LEGACY", "PIXART_SIGMA", "KOLORS", "FLUX", "AURA_FLOW",
             "AURA_DIFFUSION", "HUNYUAN_DIT")  # fmt: skip
_EXTRA = ("TRAINER_EXTRA_ARGS", "DEBUG_EXTRA_ARGS")
_REFERENCE = re.compile(r"\$\{(\w+)\}|\$(\w+)")
_CONDITION = re.compile(r"""(?:el)?if \[\[? *"?\$\{?(\w+)\}?"? *(==?|!=) *["']?([^"']*?)["']? *\]?\] *;? *(?:then)?$""")
_ARITHMETIC = re.compile(r"\$\(\(\s*\$?(\w+)\s*([-+*/])\s*\$?(\w+)\s*\)\)")


def is_env_file(path: Path) -> bool:
    """Whether a run file is such a script, by its name: config.env, config.env.example, env.sh."""
    return path.suffix.lower() == ".sh" or (
        ".env" in path.name.lower() and path.suffix.lower() not in (".toml", ".json")
    )


def read_env_file(path: Path, options: frozenset[str]) -> tuple[dict[str, str], list[str], dict[str, str]]:
    """The options that a script sets, as text; its variables that are none of `options`; options by other names there.

    Raises ConfigError for a file that cannot be read, a line that is no assignment, a variable that is not set.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise ConfigError(f"{path} cannot be read: {reason}.") from None
    variables = {"HOME": "~"}
    branches = _Branches()
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        if not branches.take(line.strip(), variables, where) and branches.alive:
            _assign(line, variables, where)
    found: dict[str, str] = {}
    helpers = []
    for name, value in variables.items():
        option = _OPTIONS.get(name, name.lower())
        if name in _FAMILIES and value.lower() == "true":
            found["model_family"] = name.lower()
        elif name in _EXTRA:
            continue
        elif option in options:
            found[option] = value
        elif name not in (*_FAMILIES, "HOME"):
            helpers.append(name)
    for name in _EXTRA:
        found |= _arguments(variables.get(name, ""), f"{path}: {name}")
    if not {"model_type", "model_family", "model_flavour"} & found.keys():
        beside = path.with_name("config.json")
        there = f" SimpleTuner reads the other keys from {beside}: give that." if beside.exists() else ""
        raise ConfigError(f"{path}: MODEL_TYPE is missing, for example deepfloyd-lora.{there}")
    return found, helpers, {option: name for name, option in _OPTIONS.items() if name in variables}


class _Branches:
    """Which lines of a script count: those outside of `if [[ "$NAME" == "text" ]]; then`, or in a branch that is taken."""

    def __init__(self) -> None:
        self._open: list[
            tuple[bool, bool]
        ] = []  # of each block: whether its present branch counts, and whether one did

    @property
    def alive(self) -> bool:
        return all(counts for counts, _ in self._open)

    def take(self, line: str, variables: dict[str, str], where: str) -> bool:
        """Whether a line opens, turns or ends a block. Raises ConfigError for another condition, or an end of nothing."""
        word = line.split(" ")[0].rstrip(";")
        if word not in ("if", "elif", "else", "fi", "then"):
            return False
        if word != "if" and not self._open:
            raise ConfigError(f"{where}: {word} without an if.")
        _, did = self._open.pop() if word not in ("if", "then") else (False, False)
        if word in ("if", "elif"):
            match = _CONDITION.match(line)
            if match is None:
                raise ConfigError(f'{where}: a condition is read as if [[ "$NAME" == "text" ]]; then.')
            counts = (variables.get(match[1], "") == match[3]) == (match[2] != "!=") and not did
            self._open.append((counts, did or counts))
        elif word == "else":
            self._open.append((not did, True))
        return True


def _assign(line: str, variables: dict[str, str], where: str) -> None:
    try:
        words = shlex.split(line, comments=True)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}.") from None
    if words[:1] == ["export"]:
        del words[0]
    for word in [" ".join(words)] if words and "$((" in line else words:
        name, equals, text = word.partition("=")
        added = name.endswith("+")
        if not equals or not re.fullmatch(r"\w+", name.removesuffix("+")):
            raise ConfigError(f"{where}: {word!r} is no NAME=value; a run file is read, not run.")
        value = _filled(text, variables, where)
        name = name.removesuffix("+")
        variables[name] = f"{variables.get(name, '')} {value}".strip() if added else value


def _filled(text: str, variables: dict[str, str], where: str) -> str:
    """A value with what its references stand for."""

    def number(name: str) -> int:
        value = variables.get(name, name)
        if not re.fullmatch(r"-?\d+", value):
            raise ConfigError(f"{where}: {name} is no whole number.")
        return int(value)

    def computed(match: re.Match[str]) -> str:
        left, right = number(match[1]), number(match[3])
        if match[2] == "/" and right == 0:
            raise ConfigError(f"{where}: {match[0]} divides by 0.")
        ways = {"+": left + right, "-": left - right, "*": left * right, "/": left // (right or 1)}
        return str(ways[match[2]])

    def found(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in variables:
            raise ConfigError(f"{where}: ${name} is not set in the file. Write its value there.")
        return variables[name]

    return _REFERENCE.sub(found, _ARITHMETIC.sub(computed, text))


def _arguments(text: str, where: str) -> dict[str, str]:
    """Options of a command line: --key=value, --key value, --switch."""
    found: dict[str, str] = {}
    name = ""
    for word in shlex.split(text):
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

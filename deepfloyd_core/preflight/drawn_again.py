"""Checks a picture that is drawn again (`generate --from`): its record, and the user's files that it was drawn with."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from deepfloyd_core.config.base import is_file
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.errors import ConfigError, DeepFloydError, attempt, raise_together
from deepfloyd_core.preflight.generate import GenerateOptions
from deepfloyd_core.preflight.versions import names_a_folder
from deepfloyd_core.store.events import OF_FOLDER

if TYPE_CHECKING:
    from deepfloyd_core.sampling.drawn_picture import DrawnPicture

_FILES = {"control": "conditioning", "image": "start", "mask": "mask"}  # each option, and what its picture is


def recorded_options(options: GenerateOptions, drawn: Path | None) -> tuple[GenerateOptions, tuple[str, ...]]:
    """The options, and overrides of the run file: of a picture that is drawn again all that it records, but the user's own
    files.

    Raises ConfigError for that one with other options, for a file that is no picture of `generate`, and for pictures of the
    user's own that are missing, or are others than it was drawn with.
    """
    if drawn is None:
        return options, ()
    own = GenerateOptions(
        version=options.version if names_a_folder(options.version) else None, control=options.control, image=options.image,
        mask=options.mask, loras=options.loras,
    )  # fmt: skip
    if options != own:
        raise ConfigError(
            f"{drawn} records its prompt, style, seed, size, stages, version and strength. Give none of these beside "
            "--from, or leave it out."
        )
    # Not above: it takes Pillow.
    from deepfloyd_core.sampling.drawn_picture import drawn_picture

    again = drawn_picture(drawn)
    raise_together(map(ConfigError, [*_version_faults(again, options), *_file_faults(again, options)]))
    width, height = again.size
    version = own.version if again.version.startswith(OF_FOLDER) else again.version
    options = replace(
        own, prompts=(again.prompt,), version=version, seeds=str(again.seed), sizes=f"{width}x{height}",
        strength=again.strength, style=again.style, stages=again.stages, again=again,
    )  # fmt: skip
    return options, tuple(again.overrides())


def with_recorded(recorded: Sequence[str], overrides: Sequence[str] | None) -> list[str]:
    """The overrides of a picture's record, then the user's own, each once. Raises ConfigError where both set a key to
    different values: it would be another picture.
    """
    known = {text.partition("=")[0]: text for text in recorded}
    for text in overrides or ():
        key = text.partition("=")[0]
        if known.get(key, text) != text:
            raise ConfigError(f"The picture of --from was drawn with {known[key]}. Leave out --set {key}, or --from.")
    return list(dict.fromkeys((*recorded, *(overrides or ()))))


def lora_again_faults(run: Run, options: GenerateOptions, folders: Mapping[Stage, Path]) -> list[DeepFloydError]:
    """LoRAs, or weights of them, that are others than the picture was drawn with. folders: of the models that draw."""
    if options.again is None or not options.loras:
        return []
    # Not above: it takes safetensors.
    from deepfloyd_core.adapters.mixed import mixed_loras

    faults: list[DeepFloydError] = []
    given = attempt([], mixed_loras, run, options.asked_loras, folders) or ()
    recorded = options.again.loras
    if given and [one.identity for one in given] != recorded:
        weights = ", ".join(f"{one[3]:g}" for one in recorded)
        faults.append(
            ConfigError(
                f"{options.again.path} was drawn with other LoRAs, or with others' weights, than --lora gives "
                f"({', '.join(one.told for one in given)}). Give those of that time in their order, with weights {weights}."
            )
        )
    return faults


def _version_faults(again: "DrawnPicture", options: GenerateOptions) -> Iterator[str]:
    of_folder = again.version.startswith(OF_FOLDER)
    if of_folder and options.version is None:
        yield f"{again.path} was drawn with the {again.version}, which lay in a folder. Give that with --version."
    elif not of_folder and options.version is not None:
        yield f"{again.path} was drawn with {again.version}, not with a folder. Leave out --version."


def _file_faults(again: "DrawnPicture", options: GenerateOptions) -> Iterator[str]:
    """The user's files that are missing, too many, or others."""
    from deepfloyd_core.files import sha256_file

    for name, role in _FILES.items():
        given, recorded = getattr(options, name), again.files.get(name)
        if recorded is None and given is not None:
            yield f"{again.path} was drawn without a {role} picture. Leave out --{name}."
        elif recorded is not None and given is None:
            yield f"{again.path} was drawn with a {role} picture of yours. Give that beside --from with --{name}."
        elif given is not None and not is_file(given):
            yield f"--{name} is {given}, and there is no such file. Give the picture that {again.path} was drawn with."
        elif given is not None and sha256_file(given) != recorded:
            yield f"{again.path} was drawn with another {role} picture than {given}. Give that one with --{name}."
    if again.loras and not options.loras:
        yield f"{again.path} was drawn with LoRAs. Give them beside --from with --lora, each at its weight."
    elif options.loras and not again.loras:
        yield f"{again.path} was drawn without LoRAs. Leave out --lora."

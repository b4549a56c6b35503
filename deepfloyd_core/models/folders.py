"""The folder of a model: the user's own directory, a downloaded one, or random weights of the same shapes."""

from dataclasses import dataclass
from pathlib import Path

from deepfloyd_core.config.base import is_folder
from deepfloyd_core.config.flavours import FLAVOURS, RANDOM, RANDOM_STAGE3
from deepfloyd_core.config.stage3 import STAGE3, DrawnStage
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.errors import ModelError
from deepfloyd_core.models.headers import UNET_WEIGHTS
from deepfloyd_core.models.hub import bytes_to_download, download, snapshot_here
from deepfloyd_core.models.text_encoders import TEXT_ENCODERS, text_encoder_of
from deepfloyd_core.models.whole_weights import lacking, weight_faults

_OR = " or "
_LOCAL = "or point pretrained_model_name_or_path at a copy of the model on this machine"
_UNET_FILES = ("unet/config.json", "unet/*.safetensors")
_WEIGHTS = {"unet": UNET_WEIGHTS, "vae": UNET_WEIGHTS} | {
    kind.weights_folder: kind.weights_file for kind in TEXT_ENCODERS.values()
}  # by folder


@dataclass(frozen=True)
class _Files:
    """Patterns of what a stock pipeline needs of a model's folder (of those with _OR between them one), and of what else is
    downloaded if it is there.
    """

    needed: tuple[str, ...]
    beside: tuple[str, ...]

    @property
    def patterns(self) -> list[str]:
        """All of them, as the hub takes them."""
        return [one for pattern in (*self.needed, *self.beside) for one in pattern.split(_OR)]


_STAGE3 = _Files(
    (
        *_UNET_FILES, "vae/config.json", "vae/*.safetensors", "text_encoder/config.json", "text_encoder/*.safetensors",
        "tokenizer/tokenizer_config.json", f"tokenizer/vocab.json{_OR}tokenizer/tokenizer.json",
        "scheduler/scheduler_config.json", "low_res_scheduler/scheduler_config.json",
    ),
    ("model_index.json", "tokenizer/*", "unet/*.json", "vae/*.json", "text_encoder/*.json"),
)  # fmt: skip


def _of_stage(stage: Stage, text: bool) -> _Files:
    """text: of its text encoder and tokenizer too."""
    schedulers = tuple(f"{name}/scheduler_config.json" for name in STAGES[stage].schedulers)
    encoder = text_encoder_of(stage)
    beside = ("model_index.json", "unet/*.json", f"{encoder.weights_folder}/*.json")
    return _Files(
        _UNET_FILES + schedulers + (encoder.files if text else ()),
        (*beside, f"{encoder.tokenizer_folder}/*") if text else beside,
    )


def resolve(model: str, stage: DrawnStage, text: bool = False) -> Path:
    """The local folder of a model given as a directory, a hub id or `random:<flavour>`; downloads or writes it if necessary.

    `text`: the text encoder and tokenizer are needed, too; Stage III always needs its own. Raises ModelError that lists the
    missing files and how to get them (a directory lacks some, the hub cannot be reached, the licence is not accepted), and
    for damaged weights.
    """
    if stage == STAGE3:
        if model == RANDOM_STAGE3:
            from deepfloyd_core.models.random_stage3 import random_stage3

            return _whole(random_stage3(), _STAGE3)
        return _resolved(model, _STAGE3)
    if _is_random(model):
        from deepfloyd_core.models.random_weights import random_folder

        return _whole(random_folder(model, text), _of_stage(stage, text))
    return _resolved(model, _of_stage(stage, text))


def _resolved(model: str, files: _Files) -> Path:
    if folder := _directory(model):
        return _whole(folder, files)
    folder = download(model, files.patterns, ", ".join(files.needed), _LOCAL)
    if missing := _missing(folder, files):  # of what was begun earlier, where the hub is away
        raise ModelError(
            f"{model} lacks {', '.join(missing)} on this machine, and the hub cannot be reached, or has no such file. "
            f"Run this again when it can, {_LOCAL}."
        )
    return _undamaged(folder, files)


def folder_here(model: str, stage: DrawnStage, text: bool = False) -> Path | None:
    """`resolve` for a model on this machine; None: it must still be downloaded or written. Uses no network.

    Raises ModelError for a directory that lacks files, for damaged weights, and for neither a directory nor a hub id.
    """
    files = _STAGE3 if stage == STAGE3 else _of_stage(stage, text)
    if stage == STAGE3 and model == RANDOM_STAGE3:
        from deepfloyd_core.models.random_stage3 import written_stage3

        return written_stage3()
    if _is_random(model):
        from deepfloyd_core.models.random_weights import written_folder

        return written_folder(model, text)
    if folder := _directory(model):
        return _whole(folder, files)
    snapshot = snapshot_here(model, files.patterns)
    return None if snapshot is None or _missing(snapshot, files) else _undamaged(snapshot, files)


def size_on_hub(model: str, stage: DrawnStage, text: bool = False) -> int:
    """Bytes that `resolve` would download of a hub id now. Asks the hub, and writes nothing.

    Raises the ModelError of `resolve`: the hub cannot be reached, the licence is not accepted.
    """
    files = _STAGE3 if stage == STAGE3 else _of_stage(stage, text)
    return bytes_to_download(model, files.patterns, ", ".join(files.needed), _LOCAL)


def is_on_hub(model: str) -> bool:
    """Whether a model is a hub id: neither a directory nor random weights. Raises ModelError for a name that is neither."""
    return not model.startswith(RANDOM) and _directory(model) is None


def _is_random(model: str) -> bool:
    return model in FLAVOURS and model.startswith(RANDOM)


def _directory(model: str) -> Path | None:
    """A model's directory; None for a hub id. Raises ModelError for a name that is neither."""
    folder = Path(model)
    if is_folder(folder):
        return folder
    if folder.is_absolute() or model.count("/") != 1:
        raise ModelError(f"{model} is not a directory, nor a hub id of the form owner/name.")
    return None


def _weights(pattern: str) -> tuple[str, str] | None:
    """Of a pattern of weights: their folder, and their name if they are one file; None for other files."""
    part, _, name = pattern.partition("/")
    return (part, _WEIGHTS[part]) if name == "*.safetensors" else None


def _missing(folder: Path, files: _Files) -> list[str]:
    missing = []
    for pattern in files.needed:
        if not any(any(folder.glob(one)) for one in pattern.split(_OR)):
            missing.append(pattern)
        elif found := _weights(pattern):
            part, file = found
            missing += [f"{part}/{name}" for name in lacking(folder / part, file)]
    return missing


def _whole(folder: Path, files: _Files) -> Path:
    if missing := _missing(folder, files):
        raise ModelError(f"{folder} lacks {', '.join(missing)}. Put these files there (safetensors only, no .bin).")
    return _undamaged(folder, files)


def _undamaged(folder: Path, files: _Files) -> Path:
    parts = [found for pattern in files.needed if (found := _weights(pattern))]
    if faults := [fault for part, name in parts for fault in weight_faults(folder / part, name)]:
        it = "it" if len(faults) == 1 else "them"
        cached = folder.parent.name == "snapshots"
        again = "run this again, which downloads" if cached else "download"
        raise ModelError(f"{'; '.join(faults)}. Remove {it} and {again} {it} again.")
    return folder

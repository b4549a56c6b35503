"""The pictures that a person looks at to judge a version, as far as they exist."""

from dataclasses import dataclass
from pathlib import Path

from deepfloyd_core.config.stages import STAGES, UPSCALERS
from deepfloyd_core.measures.files import UpscalingFiles
from deepfloyd_core.store.versions import Version, index_of, part_of


@dataclass(frozen=True)
class Sheet:
    """A picture with its title."""

    title: str
    file: Path
    is_main: bool = False  # one of those that are shown first


def sheets_of(workspace: Path, version: Version) -> tuple[Sheet, ...]:
    """Samples and held-out pictures first, then loss curves, crops, rejected files, duplicates."""
    bundle = workspace / "lora_bundle" / version.bundle
    sheets = [Sheet("Samples: base and tuned, same seeds", bundle / "sheet.png", True)]
    for files in (UpscalingFiles(stage, bundle) for stage in UPSCALERS):
        on = f"{files.kind.title} on held-out pictures"
        sheets += [Sheet(on, files.sheet, True), Sheet(f"{on}, zoomed", files.details)]
        sheets.append(Sheet(f"{on}, low-res degraded as in training", files.spoilt[0]))
    for kind, name, title in (
        *((f"{one.table}_lora", "loss.png", f"{one.title}: loss while it trained") for one in STAGES.values()),
        *((f"{one.table}_lora", "validation.png", f"{one.title}: samples while it trained") for one in STAGES.values()),
        *((f"{one.table}_pixels", "sheet.jpg", f"{one.title}: crops that it was trained on") for one in STAGES.values()),
        ("eval_set", "sheet.jpg", "Held-out pictures"),
    ):  # fmt: skip
        if part := part_of(workspace, version, kind):
            sheets.append(Sheet(title, part.path / name))
    index = index_of(workspace, version).path
    sheets += [Sheet("Some rejected files", index / "rejected.png"), Sheet("Some duplicates", index / "twins.png")]
    return tuple(sheet for sheet in sheets if sheet.file.is_file())

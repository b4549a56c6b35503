"""Everything that a person is told of a version, read from the records of its workspace: for any version, at any time.

No torch. Nothing here raises for what is lost, damaged or collected: the report names it in the place of what it had.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from deepfloyd_core.bundle.card_code import HERE
from deepfloyd_core.bundle.difference import picture_lines, setting_lines
from deepfloyd_core.bundle.named_files import CutCaption, Rejected, cut_captions, rejected_files
from deepfloyd_core.bundle.version_chart import Series, version_series
from deepfloyd_core.bundle.version_figures import MainFigure, Measurements, main_figures, measurements_of
from deepfloyd_core.bundle.version_lineage import Parts, Step, lineage_steps, parts_of
from deepfloyd_core.bundle.version_sheets import Sheet, sheets_of
from deepfloyd_core.config.stages import STAGES
from deepfloyd_core.crops.summary import CropsSummary
from deepfloyd_core.errors import ArtifactError
from deepfloyd_core.index.summary import IndexSummary
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.store.events import Event, State, fold, read_events
from deepfloyd_core.store.file_faults import storage_error
from deepfloyd_core.store.manifest import FileEntry, Manifest
from deepfloyd_core.store.settings import changed_settings
from deepfloyd_core.store.verdicts import Verdict
from deepfloyd_core.store.versions import Version, bundle_of, index_of, versions
from deepfloyd_core.text.embeds import EmbedsSummary

MOST_NAMED = 30  # files
_CODE = "```python\n"


@dataclass(frozen=True)
class Judgement:
    """The state of a version, and why."""

    state: State
    reason: str
    when: str  # of its first event, UTC; empty: it has none
    against: int | None  # the champion that it was judged against
    verdicts: tuple[Verdict, ...]
    serves: int | None  # the champion now; None: there is none, or it is not known
    is_replaceable: bool = False  # the champion: another version would serve without it


@dataclass(frozen=True)
class PictureCounts:
    """What became of the pictures. None: it is not known."""

    inputs: int | None
    accepted: int | None
    rejected: int | None
    reasons: Mapping[str, int]
    trained_on: Mapping[str, int]  # by the stage's title
    held_out: int | None
    rejected_files: tuple[Rejected, ...]  # the first ones of each reason
    cut_captions: tuple[CutCaption, ...] = ()  # those that lose most tokens


@dataclass(frozen=True)
class Since:
    """What changed since an earlier version."""

    before: int
    pictures: tuple[str, ...]  # and captions
    settings: tuple[str, ...]


@dataclass(frozen=True)
class VersionReport:
    """What is said of a version."""

    workspace: Path  # absolute
    number: int
    run_file: Path | None
    data: str  # fingerprint
    start: str  # what its training started from; empty: from the base model, because nobody asked for more
    made: str  # when the report was, UTC
    judgement: Judgement
    figures: tuple[MainFigure, ...]
    pictures: PictureCounts
    since: Since | None  # None: no version is before it
    lineage: tuple[Step, ...]
    settings: Mapping[str, tuple[str, str]]  # value and default of those that are not the default
    bundle: Path  # absolute
    fault: str  # why the bundle cannot be used; empty: it can
    files: tuple[FileEntry, ...]
    code: str  # how to load it; empty: it is lost with the bundle
    sheets: tuple[Sheet, ...]
    series: tuple[Series, ...]  # of figures over all versions

    @property
    def name(self) -> str:
        """Of the model."""
        return self.workspace.name

    @property
    def main(self) -> MainFigure | None:
        """The figure that is told first."""
        return next(iter(self.figures), None)


def version_report(workspace: Path, version: Version) -> VersionReport:
    """The report on a version."""
    parts, judgement = parts_of(workspace, version), _judgement(workspace, version)
    bundle = parts[f"lora_bundle/{version.bundle}"]
    record = bundle.record if bundle and isinstance(bundle.record, Manifest) else None
    champion = next((one for one in versions(workspace) if one.number == judgement.against), None)
    one = measurements_of(workspace, version)
    place = (workspace / "lora_bundle" / version.bundle).absolute()
    return VersionReport(
        workspace=workspace.absolute(), number=version.number,
        run_file=(workspace / version.run_file).resolve() if version.run_file else None,
        data=version.data, start=version.start, made=datetime.now(UTC).isoformat(timespec="seconds"), judgement=judgement,
        figures=main_figures(one, measurements_of(workspace, champion) if champion else None) if one else (),
        pictures=_pictures(workspace, version, parts, one), since=_since(workspace, version),
        lineage=lineage_steps(version, parts), settings=_settings(parts), bundle=place, fault=_fault(workspace, version),
        files=record.files if record else (), code=_code(place / "README.md"), sheets=sheets_of(workspace, version),
        series=tuple(version_series(workspace)),
    )  # fmt: skip


def _settings(parts: Parts) -> dict[str, tuple[str, str]]:
    """Those of the whole run first."""
    settings: dict[str, tuple[str, str]] = {}
    for part in filter(None, parts.values()):
        settings |= changed_settings(part.record.kind, part.record.spec)
    return dict(sorted(settings.items(), key=lambda pair: ("." in pair[0], pair[0])))


def _judgement(workspace: Path, version: Version) -> Judgement:
    events = read_events(workspace)
    own = [event for event in events if isinstance(event, Event) and event.version == version.number]
    report = next((event.report for event in reversed(own) if event.report), None)
    now, serves, before = fold(events), None, None
    with suppress(ArtifactError):
        serves = now.champion
        before = now.champion_without(serves)
    return Judgement(
        state=now.state_of(version.number), reason=own[-1].reason if own else "its run ended before it was judged",
        when=own[0].when if own else "", against=report.against if report else None,
        verdicts=report.verdicts if report else (), serves=serves, is_replaceable=before is not None,
    )  # fmt: skip


def _pictures(workspace: Path, version: Version, parts: Parts, one: Measurements | None) -> PictureCounts:
    counts, held_out, embeds = None, None, None
    for part in filter(None, parts.values()):
        if not isinstance(part.record, Manifest):
            continue
        with suppress(ArtifactError):
            if part.record.kind == "image_index":
                counts = IndexSummary.of_record(part.record.summary, part.name)
            elif part.record.kind == "eval_set":
                held_out = CropsSummary.of_record(part.record.summary, part.name).pictures
            elif (
                part.record.kind == "text_embeds" and EmbedsSummary.of_record(part.record.summary, part.name).truncated
            ):
                embeds = Artifact(part.record.kind, part.record.fingerprint, part.path)
    index = index_of(workspace, version)
    trained_on = (
        {STAGES[stage].title: training.pictures for stage, training in one.summary.trainings.items()} if one else {}
    )
    if counts is None:
        return PictureCounts(None, None, None, {}, trained_on, held_out, ())
    return PictureCounts(
        counts.inputs, counts.accepted, counts.rejected, counts.reasons, trained_on, held_out,
        tuple(rejected_files(index, counts.reasons, MOST_NAMED)) if counts.rejected else (),
        tuple(cut_captions(embeds, index, MOST_NAMED)) if embeds else (),
    )  # fmt: skip


def _since(workspace: Path, version: Version) -> Since | None:
    """Since the last version before it of the same run file, or of any."""
    earlier = [one for one in versions(workspace) if one.number < version.number]
    same = [one for one in earlier if one.run_file == version.run_file]
    before = next(reversed(same or earlier), None)
    if before is None:
        return None
    if before.bundle == version.bundle:
        return Since(before.number, (), ())
    pictures = picture_lines(workspace, before, version) if before.image_index != version.image_index else []
    return Since(before.number, tuple(pictures), tuple(setting_lines(workspace, before, version)))


def _fault(workspace: Path, version: Version) -> str:
    try:
        bundle_of(workspace, version, is_used=False)
    except ArtifactError as error:
        return str(error)
    except OSError as error:
        return str(storage_error(error, "read"))
    return ""


def _code(card: Path) -> str:
    """The code of a model card; empty if that cannot be read."""
    with suppress(OSError, UnicodeDecodeError):
        _, _, code = card.read_text(encoding="utf-8").partition(_CODE)
        return code.partition("```")[0].replace(
            HERE, f"# Run this in {card.parent.absolute()}, or where that was copied to."
        )
    return ""

"""The gate: judges a candidate against the champion by GATE_RULES, and decides by the run's key `gate` what follows."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from deepfloyd_core.bundle.gate_rules import COMPARED, GATE_RULES, GateContext, Measured
from deepfloyd_core.bundle.identity import BundleSummary
from deepfloyd_core.bundle.known_pictures import ledger_then, missing
from deepfloyd_core.bundle.picture_figures import picture_colours, picture_losses, picture_measures, probe_losses
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import STAGES, UPSCALERS
from deepfloyd_core.errors import ArtifactError, ConfigError, DeepFloydError
from deepfloyd_core.index.summary import IndexSummary
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.store.collected import collected
from deepfloyd_core.store.events import Standing, standing
from deepfloyd_core.store.file_faults import storage_error
from deepfloyd_core.store.manifest import Manifest
from deepfloyd_core.store.registry import Decision, Judge
from deepfloyd_core.store.verdicts import GateReport, Verdict
from deepfloyd_core.store.versions import (
    Version,
    bundle_of,
    find_version,
    index_of,
    part_of,
    trained_parts,
    versions,
)
from deepfloyd_core.training.start import StartSummary, start_kind

GATE_OFF = "the gate is off"


def gate_of(run: Run) -> Judge:
    """The judge of a run's candidates."""

    def judge(version: Version, champion: int | None) -> Decision:
        report = report_on(run.workspace, version, champion, run.config.max_rejected_share, run.config.gate_tolerance)
        gain, reasons = main_gain(report), "; ".join(report.reasons)
        if run.config.gate == "off":
            off = f"{GATE_OFF}, and would have blocked it: {reasons}" if reasons else GATE_OFF
            return Decision("promoted", "; ".join(filter(None, [gain if report.passed else "", off])), report)
        if run.config.gate == "manual":
            return Decision("candidate", gain if report.passed else f"would be blocked: {reasons}", report)
        if report.passed:
            return Decision("promoted", gain, report)
        return Decision(
            "blocked", "; ".join(filter(None, [reasons, withdrawn_pictures(run, champion, version)])), report
        )

    return judge


def withdrawn_pictures(run: Run, champion: int | None, candidate: Version) -> str:
    """Which pictures the champion was trained on and a blocked candidate not, because they were taken out of the data: a
    person may promote the candidate for that. Empty: none, or the lists cannot be read.
    """
    try:
        serving = None if champion is None else find_version(run.workspace, str(champion))
        ledgers = [ledger_then(run.workspace, version) for version in (serving, candidate) if version]
    except (DeepFloydError, OSError, ValueError):  # pyarrow's errors are the last two
        return ""
    gone = missing(ledgers[0], ledgers[1], run.config.stages) if len(ledgers) == 2 else None
    if gone is None or not gone.taken_out:
        return ""
    return f"but version {champion} was trained on pictures that are no longer in the data: {gone.taken_out}"


def report_on(
    workspace: Path, version: Version, champion: int | None, max_rejected_share: float, tolerance: float
) -> GateReport:
    """The verdicts on a candidate. What is damaged or missing does not pass.

    Raises StorageError where a disk fails, and ArtifactError when it is not known which version serves: that says nothing
    of the candidate, and the next run judges it.
    """
    now = standing(workspace)
    served = now.served
    try:
        starts = tuple(_blocked_starts(workspace, version, now))
        before = None if champion is None else measured(workspace, find_version(workspace, str(champion)))
        formers = tuple(_formers(workspace, [one for one in served if one != champion]))
        context = GateContext(measured(workspace, version), before, formers, max_rejected_share, tolerance)
    except (ArtifactError, ConfigError) as error:  # the latter: the champion's record is missing
        fault = Verdict(rule="figures", about="", passed=False, reason=" ".join(str(error).split()).removesuffix("."))
        return GateReport(against=champion, verdicts=(fault,))
    except OSError as error:
        raise storage_error(error, "read", workspace) from error
    judged = (one for rule in GATE_RULES.values() for one in rule(context))
    return GateReport(against=champion, verdicts=(*starts, *judged))


def _blocked_starts(workspace: Path, version: Version, now: Standing) -> Iterator[Verdict]:
    """A failed verdict for each training that started from weights which were blocked while it went on: of a version that
    was rolled back, without another one that has them.

    What a version that serves or would serve again was trained from is no case: that version was judged.
    """
    known = versions(workspace)
    kept = {lora for one in known if one.number in now.served for lora in trained_parts(one)}
    for stage, each in STAGES.items() if now.blocked else ():
        start, lora = (part_of(workspace, version, kind) for kind in (start_kind(stage), f"{each.table}_lora"))
        if start is None or (lora is not None and lora.name in kept):
            continue
        record = _manifest(workspace, start)
        first = StartSummary.of_record(record.summary, start.path).version
        others = (one for one in known if one.number not in now.blocked and one.number != version.number)
        if first in now.blocked and not any(_has(workspace, one, record.inputs["weights"]) for one in others):
            reason = f"{each.title} started from the weights of version {first}, which was blocked meanwhile"
            yield Verdict(rule="start", about=each.title, passed=False, reason=reason)


def _has(workspace: Path, version: Version, sha256: str) -> bool:
    """Whether a version's bundle has a file. One that is lost has none."""
    bundle = Artifact("lora_bundle", version.bundle, workspace / "lora_bundle" / version.bundle)
    with suppress(ArtifactError):
        return any(entry.sha256 == sha256 for entry in _manifest(workspace, bundle).files)
    return False


def _formers(workspace: Path, numbers: list[int]) -> Iterator[Measured]:
    """The versions that served before the champion, were not blocked, and are kept."""
    for number in numbers:
        with suppress(ArtifactError, ConfigError):  # gc removed it, or it or its record is lost: `verify` says so
            yield measured(workspace, find_version(workspace, str(number)))


def measured(workspace: Path, version: Version) -> Measured:
    """The stored figures of a version. Raises ArtifactError for what is missing or unreadable."""
    bundle = bundle_of(workspace, version)
    summary = bundle.summary(BundleSummary)
    losses = {stage: picture_losses(bundle.path, stage) for stage in summary.trainings}
    colours = {stage: picture_colours(bundle.path, stage) for stage in summary.trainings if stage not in UPSCALERS}
    upscaled = {}
    held_out = summary.samples.held_out
    for stage in (stage for stage in UPSCALERS if stage in summary.trainings and held_out):
        assert held_out is not None
        upscaled = {
            measure: picture_measures(bundle.path, stage, measure, held_out.noise_level) for measure in COMPARED
        }
    probes = None if summary.samples.probe_loss_tuned is None else probe_losses(bundle.path)
    return Measured(version.number, summary, _index_summary(workspace, version), losses, colours, upscaled, probes)


def _index_summary(workspace: Path, version: Version) -> IndexSummary:
    """The counts of a version's index, also of one that `gc` removed."""
    index = index_of(workspace, version)
    return IndexSummary.of_record(_manifest(workspace, index).summary, index.path)


def _manifest(workspace: Path, artifact: Artifact) -> Manifest:
    """The manifest of an artifact, also of one that `gc` removed."""
    record = collected(workspace, artifact.name)
    return record.manifest if record else artifact.manifest


def main_gain(report: GateReport) -> str:
    """The first comparison that was made, with the champion if there is one; empty without any."""
    return next((one.reason for one in report.verdicts if one.about and one.figure is not None), "")

"""The page of a version in the UI, and its report on disk.

The page has the report's sentences and the samples' sheet. The artifact list of the UI loads every page, so it stays below
300 KiB.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

from deepfloyd_core.bundle.version_chart import chart_uri
from deepfloyd_core.bundle.version_figures import three
from deepfloyd_core.bundle.version_page import write_report
from deepfloyd_core.bundle.version_report import VersionReport, version_report
from deepfloyd_core.bundle.version_words import named_lines, next_steps, picture_lines, standing_words, who_serves, why
from deepfloyd_core.errors import ArtifactError, StorageError
from deepfloyd_core.pictures.data_uri import data_uri
from deepfloyd_core.store.counts import duration
from deepfloyd_core.store.registry import Outcome
from deepfloyd_core.store.versions import Version, champion, find_version, report_file, versions
from tasks.markdown import code, items, plain
from tasks.outbox import create_markdown_artifact
from tasks.page_keys import workspace_key

MOST_LINES = 20  # of what changed
log = logging.getLogger(__name__)


def show_version(workspace: Path, outcome: Outcome) -> None:
    """Write the report on a run's version, again if the version has a new state, and show its page."""
    version, file = outcome.version, report_file(workspace, outcome.version.number)
    try:
        if outcome.is_new or not file.exists():
            write_report(workspace, version)
        if outcome.is_new and outcome.state == "champion" and outcome.before is not None:
            # It served when its report was written.
            write_report(workspace, find_version(workspace, str(outcome.before)))
    except (OSError, StorageError, ArtifactError) as error:  # the version is published all the same
        log.warning("The report on version %d was not written: %s", version.number, error)
    _show_page(workspace, version)


def show_serving_version(workspace: Path) -> None:
    """Show the page of the champion after a decision; without a champion that of the newest version."""
    try:
        if version := champion(workspace) or next(reversed(versions(workspace)), None):
            _show_page(workspace, version)
    except ArtifactError as error:  # what was decided stands
        log.warning("The page of the workspace's version tells its earlier state: %s", error)


def _show_page(workspace: Path, version: Version) -> None:
    report = version_report(workspace, version)
    page = markdown_page(report, report_file(workspace, version.number))
    description = f"Version {version.number} of {report.name} {standing_words(report)}"
    create_markdown_artifact(page, key=workspace_key("version", workspace), description=description)


def markdown_page(report: VersionReport, file: Path) -> str:
    """The report as markdown. file: of the whole report."""
    lines = [f"# Version {report.number} {standing_words(report)}", ""]
    lines += items([*why(report), *filter(None, [who_serves(report)])])
    lines += [*_figures(report), *_sheet(report)]
    lines += [
        "### Pictures",
        "",
        *items([*picture_lines(report.pictures, report.start), *named_lines(report.pictures)]),
    ]
    if since := report.since:
        changed = [*since.pictures, *since.settings] or ["neither pictures nor settings"]
        more = [f"and {len(changed) - MOST_LINES} more, in the report"] if len(changed) > MOST_LINES else []
        lines += [f"### Changed since version {since.before}", "", *items([*changed[:MOST_LINES], *more])]
    if chart := chart_uri(report.series):
        lines += ["### All versions", "", f"![figures of all versions]({chart})", ""]
    seconds = [node.seconds for step in report.lineage for node in step.nodes if node.seconds is not None]
    lines += [f"### Made from, in {duration(sum(seconds))} together", "", *_lineage(report)]
    lines += ["### Where it is", "", f"- bundle: {code(report.bundle)}"]
    lines += [f"- report, for a browser: {code(file.absolute())}"] if file.exists() else []
    lines += ["", "### Next", "", *(f"- {code(command)} {does}" for command, does in next_steps(report)), ""]
    return "\n".join(lines)


def _figures(report: VersionReport) -> Iterator[str]:
    """The main figures, and others that have become worse. The UI breaks no cell, and cuts what is beyond some 100
    characters.
    """
    against = report.judgement.against
    heads = ["held-out pictures", "base", *([f"version {against}"] if against else []), "this version"]
    heads.append(f"change from version {against}" if against else "change from the base")
    if not report.figures:
        return
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    for one in report.figures:
        change = one.since_champion if against else one.since_base
        if not (one.is_main or (change and change.verdict == "worse")):
            continue
        changed = f"{change.verdict}: {change.short(one.decimals)}" if change else "not comparable"
        name = f"{one.name}{f', {one.unit}' if one.unit == 'dB' else ''}"
        cells = [name, three(one.base), *([three(one.champion)] if against else []), f"**{three(one.value)}**", changed]
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield "A change is the mean over the same pictures, with its 95 % interval. Of losses and distances less is better."
    yield ""


def _sheet(report: VersionReport) -> Iterator[str]:
    """The first picture that can be read."""
    for sheet in report.sheets:
        try:
            yield from (f"![{sheet.title}]({data_uri(sheet.file)})", "")
        except OSError:
            continue
        return


def _lineage(report: VersionReport) -> Iterator[str]:
    """A numbered step for each kind of work, with what it made. No table: the UI would cut it off."""
    for number, step in enumerate(report.lineage, 1):
        yield f"{number}. **{step.title}**"
        for node in step.nodes:
            took = "" if node.seconds is None else f"in {duration(node.seconds)}"
            told = ", ".join(filter(None, [plain(node.counts), node.state, took]))
            yield f"    - {node.title} `{node.fingerprint}`{f': {told}' if told else ''}"
    yield ""

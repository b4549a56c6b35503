"""The report on a version as one HTML file that needs nothing else: it opens from disk, by mail, without a network.

`<workspace>/versions/reports/NNNN.html` is part of no artifact, so it is made again whenever that is asked for. Its
pictures are shrunk: such a file has at most some 1.5 MB, whatever the sheets have.
"""

import logging
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from deepfloyd_core.bundle.version_chart import chart_uri
from deepfloyd_core.bundle.version_figures import three
from deepfloyd_core.bundle.version_report import VersionReport, version_report
from deepfloyd_core.bundle.version_words import next_steps, standing_words, tiles, verdict_rows, who_serves, why
from deepfloyd_core.errors import StorageError
from deepfloyd_core.files import write_bytes
from deepfloyd_core.pictures.data_uri import data_uri
from deepfloyd_core.store.counts import duration, many, size
from deepfloyd_core.store.events import Standing, standing
from deepfloyd_core.store.file_faults import written
from deepfloyd_core.store.versions import Version, report_file, versions

log = logging.getLogger(__name__)

_MAIN_BYTES, _OTHER_BYTES = 150 << 10, 60 << 10  # of a picture


@dataclass(frozen=True)
class _Picture:
    title: str
    uri: str
    is_main: bool


def write_report(workspace: Path, version: Version, file: Path | None = None) -> Path:
    """Write the report on a version, to its place unless another is named. Raises StorageError if it cannot be written."""
    file = file or report_file(workspace, version.number)
    with written(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, page(version_report(workspace, version)).encode())
    return file


def write_changed_reports(workspace: Path, before: Standing) -> None:
    """Write again the reports of the versions that have another state than before; of those alone that have one."""
    now = standing(workspace)
    for version in versions(workspace):
        number = version.number
        if now.state_of(number) != before.state_of(number) and report_file(workspace, number).exists():
            try:
                write_report(workspace, version)
            except StorageError as error:  # what was decided stands
                log.warning("The report on version %d still tells its earlier state: %s", number, error)


def page(report: VersionReport) -> str:
    """The HTML of a report. Everything that comes from the user's files is escaped."""
    html: str = _template().render(
        report=report, pictures=_pictures(report), tiles=tiles(report), verdict=standing_words(report),
        rows=verdict_rows(report), steps=next_steps(report), reasons=why(report), serving=who_serves(report),
        chart=chart_uri(report.series),
    )  # fmt: skip
    return html


@cache
def _template() -> Template:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        autoescape=True, loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(three=three, bytes=size, duration=duration, when=_when)
    environment.filters.update(pictures=lambda count: many(count, "picture"))
    return environment.get_template("version_page.html")


def _when(time: str) -> str:
    return f"{time[:16].replace('T', ' ')} UTC" if time else "not known"


def _pictures(report: VersionReport) -> list[_Picture]:
    """Those that can be read."""
    pictures = []
    for sheet in report.sheets:
        with suppress(OSError):
            uri = data_uri(sheet.file, _MAIN_BYTES if sheet.is_main else _OTHER_BYTES)
            pictures.append(_Picture(sheet.title, uri, sheet.is_main))
    return pictures

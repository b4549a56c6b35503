"""The report on a version: what it says of a published, a blocked and a lost one, and that its file needs nothing else."""

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from candidates import Candidate
from PIL import Image
from releases import deepfloyd
from small_run import SmallRun

from deepfloyd_core.bundle.card_code import HERE
from deepfloyd_core.bundle.picture_figures import picture_measures
from deepfloyd_core.bundle.version_chart import Point, Series, chart_uri, svg
from deepfloyd_core.bundle.version_page import page, write_report
from deepfloyd_core.bundle.version_report import VersionReport, version_report
from deepfloyd_core.bundle.version_words import next_steps, why
from deepfloyd_core.config.run import Run
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.measures.pixel import mean_and_interval
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.store.versions import find_version, report_file

GOOD = Candidate()
HOSTILE = "<script>alert('1')</script> \"quoted\" & <img src=https://example.com/x.png>"


@pytest.fixture
def run(small_run: SmallRun) -> Run:
    run = load_run(small_run.config)
    return Run(**{**vars(run), "config": run.config.model_copy(update={"gate": "auto"})})


def report(run: Run, number: int) -> VersionReport:
    return version_report(run.workspace, find_version(run.workspace, str(number)))


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text without the style."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text += data


def needs_nothing_else(html: str) -> bool:
    """Whether no tag runs a script or names a file that is not in the page itself."""
    names = {"src", "href", "srcset", "data", "action", "poster", "background", "formaction"}
    tags = Page(html).tags
    named = [value or "" for _, attrs in tags for name, value in attrs.items() if name in names]
    style = re.findall(r"url\(|@import", html.partition("</style>")[0])
    active = [tag for tag, attrs in tags if tag in ("script", "iframe", "object", "embed", "link", "base", "form")
              or any(name.startswith("on") for name in attrs)]  # fmt: skip
    return not style and not active and all(value.startswith("data:image/") for value in named)


def test_a_promoted_version_says_its_figures_against_the_base_and_the_champion_as_an_independent_computation(
    run: Run,
) -> None:
    GOOD.publish(run)
    better = GOOD.with_(loss=-0.06, psnr=1.5, seed=1)
    better.publish(run)
    found = report(run, 2)
    assert (found.judgement.state, found.judgement.against) == ("champion", 1)
    main = found.main
    assert main and main.name == "Stage II: PSNR to the truth" and main.since_base and main.since_champion
    new, old = (picture_measures(one.bundle(run.workspace).path, 2, "psnr", 100).tuned for one in (better, GOOD))
    mean, low, high = mean_and_interval([new[key] - old[key] for key in sorted(new, key=str)])
    assert main.since_champion.difference == pytest.approx(mean)
    assert main.since_champion.interval == pytest.approx((low, high))
    assert (main.since_champion.verdict, main.since_champion.pictures, main.less) == ("better", 12, False)
    loss = next(one for one in found.figures if one.name == "Stage I: held-out loss")
    forgot = next(one for one in found.figures if one.name == "Stage I: loss on the base's own pictures")
    assert (forgot.base, forgot.value, forgot.less, forgot.is_main) == (0.01, 0.02, True, False)
    assert forgot.since_base and forgot.since_base.difference == pytest.approx(0.03, abs=0.003)
    assert loss.since_champion and loss.since_champion.difference == pytest.approx(-0.01, abs=0.002)
    assert loss.since_champion.verdict == "better" and loss.champion == pytest.approx(0.45)
    text = Page(page(found)).text
    assert "Version 2 serves" in re.sub(r"\s+", " ", text) and "better than version 1" in text
    assert str(found.bundle) in text and "1 of 101 files rejected" in text


def test_what_to_do_next_is_what_can_be_done(run: Run) -> None:
    def advised(number: int) -> list[str]:
        return [command.split()[1] for command, _ in next_steps(report(run, number))]

    GOOD.publish(run)
    assert advised(1) == ["history"], "there is no version before it"
    GOOD.with_(loss=-0.06, psnr=1.5, seed=1).publish(run)
    assert advised(2) == ["rollback", "diff", "history"] and advised(1)[0] == "promote"


def test_the_code_names_the_folder_that_it_runs_in(run: Run) -> None:
    bundle = GOOD.bundle(run.workspace).path
    (bundle / "README.md").write_text(f"# A card\n```python\n{HERE}\nimport torch\n```\n")
    GOOD.publish(run)
    assert report(run, 1).code == f"# Run this in {bundle.absolute()}, or where that was copied to.\nimport torch\n"


def test_a_difference_that_rounds_to_none_is_neither_better_nor_worse(run: Run) -> None:
    GOOD.publish(run)
    GOOD.with_(psnr=1.001, spread=0.0, seed=1, consistency=1.0).publish(run)
    assert all(one.since_champion.verdict == "no clear difference" for one in report(run, 2).figures
               if one.since_champion and "PSNR to" in one.name)  # fmt: skip


def test_a_blocked_version_says_each_rule_that_it_did_not_pass_with_figure_and_limit(run: Run) -> None:
    GOOD.publish(run)
    GOOD.with_(loss=0.02, rejected=15, seed=1).publish(run)
    found = report(run, 2)
    assert found.judgement.state == "blocked"
    failed = [one for one in found.judgement.verdicts if not one.passed]
    assert {one.rule for one in failed} == {"champion's loss", "base's loss", "rejected pictures"}
    html = page(found)
    head = html.partition("</section>")[0]
    assert all(one.reason.replace("'", "&#39;") in head for one in failed) and "is blocked" in head
    assert "Version 1 serves." in head
    (share,) = (one for one in failed if one.rule == "rejected pictures")
    assert f"{share.figure:.1%}" in html and f"{share.limit:.1%}" in html


def test_the_report_of_a_version_whose_bundle_is_lost_says_so_and_keeps_its_verdict(run: Run) -> None:
    GOOD.publish(run)
    version = find_version(run.workspace, "1")
    shutil.rmtree(run.workspace / "lora_bundle" / version.bundle)
    found = report(run, 1)
    assert "cannot be used" in found.fault and not found.figures and not found.files
    assert found.judgement.verdicts and found.judgement.state == "champion"
    html = page(found)
    assert "lost or damaged" in html and "the bundle is lost" in html and needs_nothing_else(html)


def test_a_person_s_reason_is_told_and_not_the_gate_s_of_before(run: Run) -> None:
    GOOD.publish(run)
    GOOD.with_(loss=0.02, seed=1).publish(run)
    for command in (["promote"], ["block", "--reason", "the colours are off"]):
        assert deepfloyd(command[0], str(run.workspace), "2", *command[1:]).exit_code == 0
    assert why(report(run, 2)) == ["the colours are off"]


def test_a_report_of_lost_pictures_keeps_the_figures(run: Run) -> None:
    GOOD.publish(run)
    shutil.rmtree(run.workspace / "image_index")
    found = report(run, 1)
    assert found.figures and found.pictures.inputs is None
    assert "lost or damaged" in page(found)


def test_a_record_that_cannot_be_read_is_named_where_settings_are_compared(run: Run) -> None:
    GOOD.publish(run)
    GOOD.with_(loss=-0.06, seed=1).publish(run)
    (record,) = run.workspace.glob("image_index/*/manifest.json")
    record.unlink()
    record.mkdir()
    since = report(run, 2).since
    assert since and any(str(record) in line for line in since.settings)


def test_captions_names_and_reasons_are_text_in_the_page_and_nothing_comes_from_elsewhere(run: Run) -> None:
    GOOD.publish(run)
    first = GOOD.bundle(run.workspace)
    index = run.workspace / "image_index" / GOOD.index(run.workspace).fingerprint
    rows = [{"status": "rejected", "source": f"{HOSTILE}.png", "reason": "corrupt", "detail": HOSTILE}]
    pq.write_table(pa.Table.from_pylist(rows), index / "index.parquet")
    for name in ("sheet.png", "eval.png"):
        Image.effect_noise((900, 900), 99).save(first.path / name)
    (first.path / "README.md").write_text(f"```python\n# {HOSTILE}\n```\n")
    (first.path / "eval_details.png").write_bytes(b"not a picture")
    assert deepfloyd("block", str(run.workspace), "1", "--reason", HOSTILE).exit_code == 0
    html = page(report(run, 1))
    assert needs_nothing_else(html)
    text = Page(html).text
    assert text.count(HOSTILE) >= 4  # the reason, a file's name and its detail, the code
    pictures = [attrs["src"] or "" for tag, attrs in Page(html).tags if tag == "img"]
    assert len(pictures) == 2 and all(len(uri) < 210 << 10 for uri in pictures)
    assert not needs_nothing_else(html.replace("&lt;", "<").replace("&gt;", ">"))  # the check itself sees them


def test_show_writes_the_report_and_nothing_trips_over_the_folder(run: Run, tmp_path: Path) -> None:
    GOOD.publish(run)
    write_report(run.workspace, find_version(run.workspace, "1"))
    file = tmp_path / "a folder" / "one.html"
    shown = deepfloyd("show", str(run.workspace), "1", "--html", str(file))
    assert shown.exit_code == 0 and str(file) in shown.stdout.replace("\n", "")
    assert re.sub(r"\d\d:\d\d", "", file.read_text()) == re.sub(
        r"\d\d:\d\d", "", report_file(run.workspace, 1).read_text()
    )
    assert GOOD.with_(seed=3).publish(run).version.number == 2
    for command in ("ls", "gc", "history"):
        done = deepfloyd(command, str(run.workspace))
        assert done.exit_code == 0 and "reports" not in done.stdout, done.output
    assert "reports" not in deepfloyd("verify", str(run.workspace)).stdout
    refused = deepfloyd("show", str(run.workspace), "abcdef", "--html", str(file))
    folder = deepfloyd("show", str(run.workspace), "1", "--html", "").exception
    assert isinstance(folder, ConfigError) and "a folder. Give the file" in str(folder)
    assert refused.exit_code != 0 and "names none" in str(refused.exception or refused.output)


def test_reports_follow_what_a_person_decides(run: Run) -> None:
    for one in (GOOD, GOOD.with_(loss=-0.06, seed=1)):
        number = one.publish(run).version.number
        write_report(run.workspace, find_version(run.workspace, str(number)))
    publish_time = report_file(run.workspace, 1).stat().st_mtime_ns
    heads = {
        "rollback": ("Version 1 serves", "Version 2 is blocked"),
        "promote": ("Version 1 served", "Version 2 serves"),
    }
    for command, words in heads.items():
        done = deepfloyd(command, str(run.workspace), *(["2"] if command == "promote" else []))
        assert done.exit_code == 0, done.output
        for number, head in enumerate(words, 1):
            text = Page(report_file(run.workspace, number).read_text()).text
            assert head in re.sub(r"\s+", " ", text)
    assert report_file(run.workspace, 1).stat().st_mtime_ns > publish_time
    report_file(run.workspace, 1).unlink()
    assert deepfloyd("rollback", str(run.workspace)).exit_code == 0
    assert not report_file(run.workspace, 1).exists()  # nobody asked for one


def test_the_drawing_has_a_point_for_each_of_the_last_versions_higher_where_the_figure_is(run: Run) -> None:
    GOOD.publish(run)
    assert report(run, 1).series == () and "All versions" not in page(report(run, 1))
    for seed, loss in enumerate((-0.06, 0.02, -0.07), 1):
        GOOD.with_(loss=loss, seed=seed).publish(run)
    series = {one.name: one for one in report(run, 4).series}
    losses = series["Stage I: held-out loss (less is better)"]
    assert [point.value for point in losses.points] == pytest.approx([0.45, 0.44, 0.52, 0.43])
    assert [point.state for point in losses.points] == ["former", "former", "blocked", "champion"]
    drawn = ElementTree.fromstring(svg([losses]))
    circles = [each.attrib for each in drawn.iter("{http://www.w3.org/2000/svg}circle")][:4]
    assert sorted(range(4), key=lambda number: -float(circles[number]["cy"])) == [3, 1, 0, 2]
    assert "All versions" in page(report(run, 4)) and needs_nothing_else(page(report(run, 4)))


def test_the_drawing_of_a_year_is_small_and_one_of_equal_figures_can_be_drawn() -> None:
    points = tuple(Point(number, 0.1234567, 0.1234567, "former") for number in range(900, 1000))
    assert len(chart_uri([Series("a loss", points)] * 4)) < 80_000

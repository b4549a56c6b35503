"""The pages of artifacts in the UI: words and units, file names and captions, durations; and pages that change."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_world import DataWorld
from PIL import Image

from deepfloyd_core.bundle import named_files
from deepfloyd_core.bundle.named_files import CutCaption, cut_captions, rejected_files
from deepfloyd_core.crops import captioned
from deepfloyd_core.crops.captioned import captioned_crops
from deepfloyd_core.hashing import caption_id
from deepfloyd_core.index.summary import IndexSummary
from deepfloyd_core.pictures.sheets import Cell, captioned_sheet
from deepfloyd_core.store.counts import duration
from deepfloyd_core.text.embeds import TruncatedText
from tasks import artifact_page, growing_page, ui_pages
from tasks.growing_page import GrowingPage, watched
from tasks.markdown import code, plain
from tasks.progress import progress


def noise(edge: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (edge, edge, 3), np.uint8)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min"), (200, "3 min 20 s"), (3599.7, "1 h"),
     (7500, "2 h 5 min"), (86_370, "1 day"), (273_600, "3 days 4 h")],
)  # fmt: skip
def test_a_duration_is_told_as_a_person_says_it(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_page_of_crops_shows_each_size_with_file_names_and_captions(
    world: DataWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "a very long caption of a picture " * 9
    for number in range(3):
        world.add(f"folder with spaces/picture {number}.png", noise(300, number), long)
    run = world.load()
    index = world.index(run)
    crops = world.pixels(run, index, 2)
    texts: list[str] = []

    def drawn(cells: list[Cell], columns: int, cell_px: int, title: str) -> Image.Image:
        texts.extend(line for cell in cells for line in cell.lines)
        return captioned_sheet(cells, columns, cell_px, title)

    monkeypatch.setattr(captioned, "captioned_sheet", drawn)
    ((title, sheet),) = captioned_crops(crops)
    assert title == "Crops of 256x256 px" and sheet.width < 1000
    assert sum(line.endswith("picture 1.png") for line in texts) == 1
    assert texts[1] == "a very long caption of" and texts[2].endswith("...") and len(texts) == 9

    pages, told = list[str](), list[str]()

    def create(page: str, key: str, description: str) -> None:
        pages.append(page)
        told.append(description)

    monkeypatch.setattr(artifact_page, "create_markdown_artifact", create)
    ui_pages.show_crops(crops)
    ui_pages.show_crops(replace(crops, reused=True))
    assert (
        told == ["Stage II pixels: 3 crops of 3 pictures, 256x256"] * 2 and "- crops: **3 of 3 pictures**" in pages[0]
    )
    assert re.search(r"^Made in \d+\.\d s\.$", pages[0], re.MULTILINE)
    assert "Nothing to do: it was made before, in " in pages[1]
    assert pages[0].endswith(f"in `{crops.path.absolute()}`") and pages[0].count("](data:image/") == 1


def test_a_page_of_damaged_or_of_no_crops_is_shown_all_the_same(
    world: DataWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.add("one.png", noise(300))
    run = world.load(stages=(1,), num_eval_images=0)
    index = world.index(run)
    crops, none = world.pixels(run, index, 1), world.eval_set(run, index)
    next(crops.path.glob("*.parquet")).write_bytes(b"damaged")
    pages: list[str] = []
    monkeypatch.setattr(artifact_page, "create_markdown_artifact", lambda page, **_: pages.append(page))
    for artifact in (crops, none):
        ui_pages.show_crops(artifact)
    assert len(pages) == 2 and not any("](data:" in page for page in pages)


def test_of_each_reason_some_rejected_files_are_named(world: DataWorld) -> None:
    world.add("good.png", noise(300))
    for number in range(30):
        world.add(f"small_{number:02d}.png", noise(20, number))
    whole = world.add("cut.png", noise(300)).read_bytes()
    world.add("z_cut.jpg", whole[: len(whole) // 2])
    index = world.index(world.load(max_rejected_share=1.0))
    reasons = index.summary(IndexSummary).reasons
    named = [one.file for one in rejected_files(index, reasons, 6)]
    assert "z_cut.jpg" in named and len(named) == 4
    assert rejected_files(replace(index, folder=index.path / "lost"), reasons, 6) == []


def test_captions_that_t5_cuts_are_named_with_their_files(world: DataWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    long = "many words " * 60
    for name, caption in (("a", long), ("b", "short"), ("c", long)):
        world.add(f"{name}.png", noise(300, ord(name)), caption)
    index = world.index(world.load())
    cut = [
        TruncatedText(long.strip(), 43, 77, (caption_id(long.strip()),)),
        TruncatedText("a prompt", 2, 77, ("0" * 16,)),
    ]
    monkeypatch.setattr(named_files, "truncated_texts", lambda embeds, most: cut)
    found = cut_captions(index, index, 10)
    assert found == [CutCaption(long.strip(), 43, ("a.png", "c.png")), CutCaption("a prompt", 2, ())]


def test_names_and_captions_of_the_user_are_no_markup() -> None:
    assert plain("a|b [x](y) *z* <img>") == r"a\|b \[x\]\(y\) \*z\* \<img\>"
    assert plain("word " * 50, 20) == "word word word word…"
    assert code("a|b\n`c`.png") == "`` a\\|b `c`.png ``"


def test_a_page_that_grows_is_made_once_and_then_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, now, shown = tmp_path / "loss.png", 0.0, list[tuple[Path, ...]]()
    monkeypatch.setattr("tasks.growing_page.time.monotonic", lambda: now)
    told: list[int] = []
    report = watched(lambda done, total, line: told.append(done), (file, tmp_path / "never.png"), shown.append)
    for step in range(1, 7):
        now += growing_page.LOOK_EVERY_S
        if step in (2, 4):
            Image.new("RGB", (9, 9)).save(file)
        report(step, 6, "")
        report(step, 6, "at once: nobody looks")
    assert shown == [(file,)] * 2 and told == [step for step in range(1, 7) for _ in range(2)]

    sent: list[tuple[str, str]] = []
    monkeypatch.setattr(growing_page, "show_newest", lambda slot, function, *arguments: function(*arguments))

    def create(page: str, key: str, description: str) -> str:
        sent.append(("made", page))
        return "id"

    monkeypatch.setattr(growing_page, "create_markdown_artifact", create)

    class Client:
        def __enter__(self) -> "Client":
            return self

        def __exit__(self, *_: object) -> None: ...

        def update_artifact(self, name: str, artifact: object) -> None:
            sent.append((name, artifact.data))  # type: ignore[attr-defined]

    monkeypatch.setattr(growing_page, "get_client", lambda sync_client: Client())
    page = GrowingPage("stage1-lora-x")
    for text in ("under way", "later", "done"):
        page.put(text, "Stage I LoRA")
    assert sent == [("made", "under way"), ("id", "later"), ("id", "done")]


def test_each_part_of_a_job_has_a_time_left_of_its_own(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty quick steps say nothing of the slow pictures after them, a minute each, of which two are done."""
    now = 100.0
    monkeypatch.setattr("tasks.progress.time.monotonic", lambda: now)
    monkeypatch.setattr("tasks.progress.CONSOLE.get_time", lambda: now)
    caplog.set_level("INFO", "tasks.progress")
    with progress("stage I LoRA") as report:
        for step in range(1, 21):
            now += 1
            report(step, 20, "loss 0.1")
        for picture in range(5):
            report(picture, 6, "samples at step 20")
            now += 60
    assert caplog.messages[-1] == "stage I LoRA 4/6  samples at step 20  2 min left"

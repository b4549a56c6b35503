"""`deepfloyd init`: six folders, and what is wrong with others. Entered by the command; what it chose is counted by hand."""

import json
import os
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import picture_folders
import pytest
from command_here import call_here
from PIL import Image
from releases import deepfloyd
from typer.testing import Result

from deepfloyd_core.config.run import Run
from deepfloyd_core.errors import ConfigError, DataError, DeepFloydError
from deepfloyd_core.pictures.faces import missing_detector
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.project.captions import NONE
from deepfloyd_core.project.look import FolderLook, Seen
from deepfloyd_core.project.machine import MachineLook

CPU = MachineLook("cpu", "", 24 << 30, False)
GPU = MachineLook("cuda", "NVIDIA Test", int(23.6 * 2**30), True)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, of a machine with a GPU of 24 GB."""
    monkeypatch.chdir(tmp_path)
    on(monkeypatch, GPU)
    return tmp_path


def on(monkeypatch: pytest.MonkeyPatch, machine: MachineLook) -> None:
    monkeypatch.setattr("deepfloyd_core.project.machine.asked_machine", lambda: lambda: machine)


def digest(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything in a folder, as far as a write would change it."""
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def made(folder: Path, name: str) -> tuple[Run, str]:
    """The run of what `deepfloyd init` writes for a folder, and what it prints. The folder stays as it was."""
    before = digest(folder)
    done = deepfloyd("init", str(folder))
    assert done.exit_code == 0, done.exception
    assert digest(folder) == before
    run = load_run(Path(f"{name}.toml"))
    assert run.notes == ()
    assert f"deepfloyd plan {name}.toml\n" in done.stdout and f"deepfloyd run {name}.toml\n" in done.stdout
    assert f"workspace/{name}/preview.png" in done.stdout
    assert Image.open(f"workspace/{name}/preview.png").width > 500
    return run, done.stdout


def comments(name: str) -> str:
    """All comments of both files, in one line."""
    lines = [*Path(f"{name}.toml").read_text().splitlines(), *Path(f"{name}.json").read_text().splitlines()]
    return " ".join(line.strip().lstrip("#").strip() for line in lines if line.lstrip().startswith("#"))


def test_a_pet_in_twelve_upright_pictures_without_captions(here: Path) -> None:
    picture_folders.pet(here / "My dog Rex!")
    run, printed = made(here / "My dog Rex!", "My-dog-Rex")
    (dataset,) = run.datasets
    assert dataset.instance_data_dir == "My dog Rex!" and run.config.workspace == "workspace/My-dog-Rex"
    assert dataset.prompts == ("a photo of sks dog rex",) and "'a photo of sks dog rex'" in printed
    # 360 x 480: a square would lose a quarter. 64 / (3 / 4) is 85 px, in eights 88.
    assert (dataset.crop_aspect, dataset.buckets) == ("closest", ((0.75, 1.0),))
    assert run.config.sample_sizes_px == ((64, 88),)
    first, second = run.config.stage(1), run.config.stage(2)
    assert (first.model_flavour, second.model_flavour) == ("i-xlarge-4.3b", "ii-large-1.2b")
    assert (first.steps, first.train_batch_size, first.mixed_precision) == (1200, 4, "bf16")
    assert run.config.num_eval_images is None and "Of 12 pictures 1 is held out" in comments("My-dog-Rex")
    assert "A square would cut off 25% of a picture on average" in comments("My-dog-Rex")
    assert dataset.repeats == 0 and run.config.max_rejected_share == 0.25


@pytest.mark.skipif(bool(missing_detector()), reason="needs the extra face")
def test_a_face_is_found_and_followed(here: Path) -> None:
    picture_folders.face(here / "anna")
    run, printed = made(here / "anna", "anna")
    (dataset,) = run.datasets
    assert (dataset.crop_aspect, dataset.crop_style) == ("square", "face")
    assert dataset.prompts == ("a photo of sks person",)
    assert "A face was found in 9 of 9 pictures" in comments("anna") and "in 9 of 9 pictures" in printed


def test_drawings_have_their_own_captions_and_are_square(here: Path) -> None:
    picture_folders.drawings(here / "drawings")
    run, printed = made(here / "drawings", "drawings")
    (dataset,) = run.datasets
    assert (dataset.caption_strategy, dataset.crop_aspect, dataset.crop_style) == ("textfile", "square", "center")
    assert run.config.validation_prompt[0] == "an ink drawing of a cat"
    assert set(run.config.validation_prompt) == {f"an ink drawing of a {what}" for what in ("cat", "tree", "boat")}
    assert "instance_prompt" not in printed and dataset.instance_prompt is None
    # 100 steps for each would be 3,000: the usual 2,000, in which 4 x 2,000 / 30 pictures are shown.
    assert run.config.stage(1).steps == 2000 and "is shown 267 times" in comments("drawings")
    assert "Of 30 pictures 3 are held out" in comments("drawings")


def test_a_phones_export_with_films_edits_and_a_damaged_picture(here: Path) -> None:
    picture_folders.phone_export(here / "phone export")
    run, printed = made(here / "phone export", "phone-export")
    (dataset,) = run.datasets
    assert "17 usable pictures (all 18 files opened)" in printed
    assert ".aae 1, .mov 1" in printed and "1 truncated" in printed and '"broken" #1.jpg' in printed
    assert "JPEG 10, HEIF 6, PNG 1" in printed
    # Upright, as a person sees them: ten of 3:4, six of 4:3.
    assert [aspect for aspect, _ in dataset.buckets] == [0.75, 1.3333]
    assert dataset.prompts == ("a picture in the style of sks",)
    assert run.config.stage(1).steps == 1700


def test_one_picture_fills_its_batches_and_none_is_held_out(here: Path) -> None:
    picture_folders.one(here / "one")
    run, _ = made(here / "one", "one")
    (dataset,) = run.datasets
    assert dataset.repeats == 3 and run.config.stage(1).steps == 400
    assert "Of 1 picture none is held out" in comments("one")


def test_5000_mixed_pictures_are_sampled_in_seconds(here: Path) -> None:
    picture_folders.mixed(here / "mixed")
    began = time.monotonic()
    run, printed = made(here / "mixed", "mixed")
    assert time.monotonic() - began < 20
    (dataset,) = run.datasets
    assert "a sample: 500 of 5,000 files opened" in printed and "in 5 subfolders" in printed
    # A fifth is too small for Stage I, and the limit is above that; a sample of 500 is within 5 % of it.
    assert "of the 500 opened pictures are smaller and left out" in printed
    assert 0.3 <= run.config.max_rejected_share <= 0.4
    assert 3800 <= run.config.stage(1).steps <= 4200
    assert sorted(aspect for aspect, _ in dataset.buckets) == [0.75, 1.0, 1.3333, 1.7778]
    assert run.config.stages == (1, 2)


def test_without_a_gpu_the_smallest_model_and_no_stage_2(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture_folders.pet(here / "cat")
    on(monkeypatch, CPU)
    run, _ = made(here / "cat", "cat")
    assert run.config.stages == (1,) and run.config.stage(1).model_flavour == "i-medium-400m"
    assert run.config.stage(1).mixed_precision == "no"
    assert "no GPU was found (24 GiB of main memory)" in comments("cat")
    text = Path("cat.toml").read_text()
    first, found, rest = text.partition("#[stage2]")
    assert found
    # As its comment says: without one `#` a line, it is a table that trains.
    Path("both.toml").write_text(first + "[stage2]" + "\n".join(line.removeprefix("#") for line in rest.split("\n")))
    assert load_run(Path("both.toml")).config.stages == (1, 2)


@pytest.mark.parametrize(
    ("gib", "bf16", "first", "second", "batch", "streams"),
    [
        (79.2, True, "i-xlarge-4.3b", "ii-large-1.2b", 4, False),
        (15.7, True, "i-large-900m", "ii-medium-450m", 4, False),
        (31.7, False, "i-large-900m", "ii-medium-450m", 4, False),
        (11.6, True, "i-medium-400m", "ii-medium-450m", 4, True),
        (3.9, False, "i-medium-400m", "ii-medium-450m", 1, True),
    ],
)
def test_the_memory_of_the_gpu_decides_the_flavours(
    here: Path, monkeypatch: pytest.MonkeyPatch, gib: float, bf16: bool, first: str, second: str, batch: int, streams: bool
) -> None:  # fmt: skip
    picture_folders.one(here / "a cat")
    seen = FolderLook(
        here / "a cat", files=1, opened=1, pictures=1, seen=(Seen("a.png", *picture_folders.ONES_SIZE, "PNG", None, True),),
        unusable=(), examples=(), others="", subfolders=0, detects="", captions=NONE,
    )  # fmt: skip
    monkeypatch.setattr("deepfloyd_core.project.look.look_at", lambda folder: seen)  # which takes a second each
    on(monkeypatch, MachineLook("cuda", "Card", int(gib * 2**30), bf16))
    config = made(here / "a cat", "a-cat")[0].config
    stage1, stage2 = config.stage(1), config.stage(2)
    assert (stage1.model_flavour, stage2.model_flavour) == (first, second)
    assert stage1.train_batch_size == batch and stage1.samples_per_step == stage2.samples_per_step == 4
    assert config.text_encoder_streaming == streams
    assert {stage1.mixed_precision, stage2.mixed_precision} == {"bf16" if bf16 else "no"}
    assert stage2.stage2_patch == (64 if gib < 8 else 128)


def test_pictures_too_small_for_256_px_leave_stage_2_out(here: Path) -> None:
    for number in range(9):
        (here / "icons").mkdir(exist_ok=True)
        picture_folders.smooth(number, 128, 128).save(here / "icons" / f"{number}.png")
    picture_folders.smooth(9, 600, 600).save(here / "icons" / "9.png")
    run, printed = made(here / "icons", "icons")
    assert run.config.stages == (1,) and "Only 10% of the pictures are large enough for 256 px" in printed


# ---- captions ---------------------------------------------------------------------------------------------------------


def _tabled(folder: Path, names: list[str]) -> list[tuple[str, str]]:
    folder.mkdir()
    for number, name in enumerate(names):
        picture_folders.smooth(number, 96, 96).save(folder / name)
    return [(name, f'a "{name}", drawn') for name in names]


def _jsonl(folder: Path, rows: list[tuple[str, str]]) -> None:
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def _csv(folder: Path, rows: list[tuple[str, str]]) -> None:
    lines = ["Image,Caption", *(f'{Path(name).stem},"{text.replace(chr(34), chr(34) * 2)}"' for name, text in rows)]
    (folder / "captions.csv").write_text("\n".join(lines))


def _parquet(folder: Path, rows: list[tuple[str, str]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(
        pa.table({"filename": [name for name, _ in rows], "caption": [text for _, text in rows]}), folder / "t.parquet"
    )


@pytest.mark.parametrize("write", [_jsonl, _csv, _parquet])
def test_a_table_in_the_folder_has_the_captions(
    here: Path, write: Callable[[Path, list[tuple[str, str]]], None]
) -> None:
    rows = _tabled(here / "tabled", [f"IMG_{number}.png" for number in range(5)])
    write(here / "tabled", rows)
    (here / "metadata.jsonl").write_text("another table, in the current directory")
    run, printed = made(here / "tabled", "tabled")
    assert "in a table: 5 of 5 pictures" in printed
    assert set(run.config.validation_prompt) <= {text for _, text in rows} and run.config.validation_prompt
    assert run.datasets[0].parquet is not None


def test_names_that_are_texts_are_captions_without_their_numbers(here: Path) -> None:
    _tabled(here / "named", [f"a {colour} car {number}.png" for number, colour in enumerate(("red", "blue", "old"))])
    run, printed = made(here / "named", "named")
    assert run.datasets[0].caption_strategy == "filename" and "in file names: 3 of 3" in printed
    assert set(run.config.validation_prompt) == {"a red car", "a blue car", "a old car"}


def test_captions_in_another_encoding_are_told_and_not_used(here: Path) -> None:
    for name, _ in _tabled(here / "latin", [f"{number}.png" for number in range(4)]):
        (here / "latin" / name).with_suffix(".txt").write_bytes("ein grünes Haus".encode("latin-1"))
    run, printed = made(here / "latin", "latin")
    assert run.datasets[0].caption_strategy == "instanceprompt"
    assert "0 of 4 pictures with a caption file" in printed and "save it as UTF-8" in printed


def test_captions_of_most_pictures_are_used_and_the_others_left_out(here: Path) -> None:
    for name, text in _tabled(here / "partly", [f"{number}.png" for number in range(10)])[:6]:
        (here / "partly" / name).with_suffix(".txt").write_bytes(f"{text}\nsecond line".encode("utf-16"))
    run, printed = made(here / "partly", "partly")
    (dataset,) = run.datasets
    assert dataset.caption_strategy == "textfile" and "6 of 10 pictures, up to 2 of a picture" in printed
    assert dataset.repeats == 1 and run.config.max_rejected_share >= 0.4


# ---- what is wrong ----------------------------------------------------------------------------------------------------


def failed(*arguments: str) -> DeepFloydError:
    """The error of the command, which has written nothing."""
    before = set(Path().iterdir())
    done: Result = deepfloyd("init", *arguments)
    assert isinstance(done.exception, DeepFloydError), done.exception
    assert set(Path().iterdir()) == before and "\n" not in str(done.exception)
    return done.exception


def test_a_folder_that_cannot_be_used_is_a_sentence(here: Path) -> None:
    (here / "file").write_text("x")
    for name in ("empty", "films", "broken", "tiny", "links"):
        (here / name).mkdir()
    (here / "films" / "a.mov").write_bytes(b"\0")
    (here / "broken" / "a.jpg").write_bytes(b"not a picture")
    (here / "notes").mkdir()
    (here / "notes" / "todo").write_text("no picture, and its name does not say so")
    picture_folders.smooth(0, 40, 50).save(here / "tiny" / "a.png")
    picture_folders.smooth(0, 80, 80).save(here / "elsewhere.png")
    (here / "links" / "a.png").symlink_to(here / "elsewhere.png")
    for name, kind, said in (
        ("missing", ConfigError, "missing is not there. Give the folder"),
        ("file", ConfigError, "file is a file. Give the folder"),
        ("empty", DataError, "There is no picture in empty."),
        ("films", DataError, "There is no picture in films. It has other files: .mov 1."),
        ("notes", DataError, "There is no picture in notes."),
        ("broken", DataError, "No picture in broken can be used (1 unsupported). For example a.jpg: "),
        ("tiny", DataError, "The largest is 40x50 px (a.png)"),
        ("links", DataError, "set follow_links = true"),
    ):
        error = failed(name)
        assert type(error) is kind and said in str(error), str(error)


def test_a_folder_without_permission_is_a_sentence(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "closed").mkdir()

    def refused(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("deepfloyd_core.project.look.os.scandir", refused)  # a superuser may read everything
    assert str(failed("closed")) == "closed cannot be listed: permission denied. Give a folder that you may read."


def test_many_files_that_only_may_be_pictures_are_no_picture(here: Path) -> None:
    (here / "many").mkdir()
    for number in range(700):
        (here / "many" / f"f{number}").write_text("hello")
    told = deepfloyd("init", "many")
    assert isinstance(told.exception, DataError) and str(told.exception).startswith("There is no picture in ")


@pytest.mark.parametrize("place", ["workspace", "workspace/cats"])
def test_pictures_where_runs_are_kept_are_a_sentence(here: Path, place: str) -> None:
    (here / place).mkdir(parents=True)
    Image.new("RGB", (300, 300)).save(here / place / "a.png")
    told = deepfloyd("init", place)
    assert isinstance(told.exception, ConfigError) and "in the folder of the pictures" in str(told.exception)
    assert not list(here.glob("*.toml"))


def test_nothing_is_overwritten_and_no_half_is_left(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture_folders.one(here / "one")
    (here / "one.json").write_text("mine")
    assert str(failed("one")).startswith(f"one.json is in {here} already, and nothing is overwritten. ")
    assert (here / "one.json").read_text() == "mine"
    (here / "one.json").unlink()
    from deepfloyd_core.project import write

    def full(path: Path, data: bytes) -> None:
        if path.suffix == ".toml":
            raise OSError(28, "No space left on device", str(path))
        path.write_bytes(data)

    monkeypatch.setattr(write, "write_bytes", full)
    done = deepfloyd("init", "one")
    assert isinstance(done.exception, OSError) and list(Path().iterdir()) == [Path("one")]


def test_a_current_directory_that_cannot_hold_the_files_is_a_sentence(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture_folders.one(here / "one")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert f"The current directory, {here}, cannot be written" in str(failed("one"))
    monkeypatch.undo()
    monkeypatch.chdir(here / "one")
    (here / "link").symlink_to(here / "one")
    for folder in (".", str(here / "one"), "../link", ".."):
        assert "is in the folder of the pictures" in str(failed(folder))


def test_an_odd_folder_outside_is_named_as_it_is(here: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("x") / '~it\'s "a\\b"\n# [猫] \x7f'
    picture_folders.one(folder)
    run, _ = made(folder, "it-s-a-b-猫")
    assert run.datasets[0].instance_data_dir == str(folder)
    picture_folders.one(here / "~below")
    assert made(here / "~below", "below")[0].datasets[0].instance_data_dir == "./~below"


def test_a_name_that_is_no_utf_8_is_a_sentence(here: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    picture_folders.one(here / name)
    assert "is no UTF-8, and a run file cannot hold it. Rename the folder." in str(failed(name))


def test_a_decompression_bomb_costs_itself_alone(here: Path) -> None:
    """A PNG of a hundred bytes whose pixels would take 10 GB."""
    picture_folders.pet(here / "bombs")

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    (here / "bombs" / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"x"))
    _, printed = made(here / "bombs", "bombs")
    assert "12 usable pictures" in printed and "1 decompression_bomb" in printed


# ---- whole runs -------------------------------------------------------------------------------------------------------

_TINY = {
    "stage1.model_flavour": "tiny-i", "stage2.model_flavour": "tiny-ii", "stage1.max_train_steps": 3,
    "stage2.max_train_steps": 2, "lr_warmup_steps": 1, "validation_num_inference_steps": 2, "num_threads": 1,
    "num_validation_images": 1, "num_upscaled_images": 1, "forgetting_probes": 0, "mixed_precision": "no",
    "text_encoder_dtype": "fp32", "device": "cpu",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("fill", "held_out"), [(picture_folders.one, 0), (picture_folders.drawings, 3)])
def test_a_run_needs_no_edit(here: Path, fill: Callable[[Path], None], held_out: int) -> None:
    """But for a model that is small enough for a test, and few steps."""
    fill(here / "pictures")
    made(here / "pictures", "pictures")
    sets = [part for key, value in _TINY.items() for part in ("--set", f"{key}={value}")]
    done = call_here(("run", "pictures.toml", *sets), here)
    assert done.returncode == 0, done.stderr
    assert list((here / "workspace/pictures/versions").glob("0001.json"))
    (eval_set,) = (here / "workspace/pictures/eval_set").iterdir()
    figures = json.loads((eval_set / "manifest.json").read_text())
    assert np.array(figures["summary"]["pictures"]).sum() == held_out

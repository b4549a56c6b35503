"""A picture that is drawn again, by its record: what is said of it is what was done."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from data_world import DataWorld
from draws_here import draw_in_this_process
from moved_bundles import moved_bundle
from PIL import Image
from releases import deepfloyd
from small_run import SmallRun

from deepfloyd_core.api import GenerateOptions, generate
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.preflight.drawn_again import recorded_options, with_recorded


def drawn_again(run: SmallRun, picture: Path) -> Path:
    """The picture that its record makes."""
    options, keys = recorded_options(GenerateOptions(), picture)
    (file,) = generate(run.config, options, keys)
    return file


def test_a_copy_of_what_is_kept_is_compared_and_else_it_is_drawn(
    small_run: SmallRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    requests = draw_in_this_process(monkeypatch)
    (made,) = generate(small_run.config, GenerateOptions(("a red circle",), "base", stages="1"))
    copy = Path(shutil.copy(made, small_run.folder / "copy.png"))
    assert drawn_again(small_run, copy) == made and len(requests) == 1
    compared = f"{copy} was not drawn again, but compared with {made}, which the same record has drawn before: "
    assert caplog.messages[-1] == f"{compared}every byte is equal"
    copy.write_bytes(copy.read_bytes() + b" ")
    drawn_again(small_run, copy)
    assert caplog.messages[-1].startswith(f"{compared}it has other bytes") and len(requests) == 1
    shutil.copy(made, copy)
    shutil.rmtree(made.parent)
    assert drawn_again(small_run, copy).read_bytes() == copy.read_bytes() and len(requests) == 2
    assert caplog.messages[-1] == f"{copy} was drawn again: every byte is equal"
    drawn_again(small_run, made)
    assert "there is nothing to draw again" in caplog.messages[-1]


def test_what_is_other_than_the_last_pictures_is_told_by_the_options_of_the_command(
    small_run: SmallRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    draw_in_this_process(monkeypatch)
    folder, lines = small_run.folder, list[str]()
    for name, shade in (("image", 90), ("other", 200), ("mask", 255)):
        Image.new("L", (64, 64), shade).convert("RGB").save(folder / f"{name}.png")
    varied: dict[str, Any] = {"image": folder / "image.png", "strength": 0.6}
    for changed in (
        {}, varied, {**varied, "strength": 1.0}, {**varied, "image": folder / "other.png", "strength": 1.0},
        {**varied, "mask": folder / "mask.png"}, {**varied, "style": "in oil"}, {"prompts": ("a star",)},
    ):  # fmt: skip
        caplog.clear()
        with caplog.at_level("INFO"):
            generate(
                small_run.config, GenerateOptions(**{"prompts": ("x",), "version": "base", "stages": "1", **changed})
            )
        lines += [line.partition(": ")[2] for line in caplog.messages if ": other than the last ones: " in line]
    assert lines == [
        f"other than the last ones: {words}"
        for words in (
            "--image added", "--strength 0.6 -> 1", "--image changed",
            "--image changed; --mask added; --strength 1 -> 0.6", "--mask removed; --style added",
            "other pictures are asked for; --image removed; --style removed",
        )
    ]  # fmt: skip


def refused(run: SmallRun, picture: Path, **files: Any) -> str:
    """What is said of a picture that is to be drawn again by the command, before it looks for a server."""
    options = [f"--{name}={value}" for name, value in files.items()]
    done = deepfloyd("generate", str(run.config), "--from", str(picture), *options)
    assert isinstance(done.exception, ConfigError), done.output
    return str(done.exception)


def test_other_files_than_it_was_drawn_with_are_told_before_a_server_starts(
    small_run: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_in_this_process(monkeypatch)
    monkeypatch.setattr("flows.commands.drawing.session", lambda *_: pytest.fail("a server is asked for"))
    files = {name: small_run.folder / f"{name}.png" for name in ("image", "mask", "other")}
    for shade, file in zip((90, 255, 254), files.values(), strict=True):
        Image.new("L", (64, 64), shade).convert("RGB").save(file)
    own: dict[str, Any] = {name: files[name] for name in ("image", "mask")}
    asked: dict[str, Any] = {"prompts": ("x",), "version": "base", "stages": "1"}
    (inpainted,) = generate(small_run.config, GenerateOptions(**asked, **own))
    (plain,) = generate(small_run.config, GenerateOptions(**asked))
    assert refused(small_run, inpainted).count("of yours. Give that beside --from with --") == 2
    assert refused(small_run, inpainted, image=own["image"]) == (
        f"{inpainted} was drawn with a mask picture of yours. Give that beside --from with --mask."
    )
    told = refused(small_run, inpainted, image=own["image"], mask=files["other"])
    assert told.endswith(f"was drawn with another mask picture than {files['other']}. Give that one with --mask.")
    assert "and there is no such file" in refused(small_run, inpainted, image=own["image"], mask="gone.png")
    assert refused(small_run, plain, image=own["image"]).endswith("drawn without a start picture. Leave out --image.")
    assert refused(small_run, plain, lora="x.safetensors").endswith("was drawn without LoRAs. Leave out --lora.")


def test_so_are_other_loras(world: DataWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_in_this_process(monkeypatch)
    monkeypatch.setattr("flows.commands.drawing.session", lambda *_: pytest.fail("a server is asked for"))
    _, bundle, _ = moved_bundle(
        world, stage1={"model_flavour": "tiny-i", "mixed_precision": "no", "validation_num_inference_steps": 2}
    )
    lora = bundle.path / "stage1"
    run_file = world.folder / "run.json"
    (made,) = generate(run_file, GenerateOptions(("x",), loras=(f"{lora}@0.5",)), ("num_threads=1",))
    for given, says in (
        ((), "was drawn with LoRAs. Give them beside --from with --lora, each at its weight."),
        ((f"--lora={lora}@0.7",), "Give those of that time in their order, with weights 0.5."),
    ):
        done = deepfloyd("generate", str(run_file), "--from", str(made), *given)
        assert isinstance(done.exception, ConfigError) and str(done.exception).endswith(says)
    options, keys = recorded_options(GenerateOptions(loras=(f"{lora}@0.5",)), made)
    assert generate(run_file, options, ("num_threads=1", *keys)) == [made]


def test_a_setting_of_the_picture_is_not_set_anew_beside_it() -> None:
    recorded = ("stage1.validation_num_inference_steps=4", "seed=3")
    assert with_recorded(recorded, None) == list(recorded)
    assert with_recorded(recorded, ["seed=3", "workspace=x"]) == [*recorded, "workspace=x"]
    with pytest.raises(ConfigError, match=r"was drawn with seed=3. Leave out --set seed, or --from"):
        with_recorded(recorded, ["seed=4"])

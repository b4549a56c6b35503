"""Text embeds: the rows that the stock pipeline computes, each text once, in files that are never rewritten."""

import logging
import multiprocessing
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from child_functions import make_embeds
from diffusers import IFPipeline
from flipped import flip, times_found
from small_run import SmallRun
from text_encoders import stock_encoder, tokenised

from deepfloyd_core.config.flavours import FLAVOURS
from deepfloyd_core.config.run import Run
from deepfloyd_core.errors import ArtifactError, ConfigError, DamagedError, ModelError, StorageError
from deepfloyd_core.hashing import caption_id
from deepfloyd_core.models import torch_device
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.processes.jobs import Job, run_parts
from deepfloyd_core.store import manifest
from deepfloyd_core.store import reuse as take_over
from deepfloyd_core.store.artifacts import Artifact, WorkDir, materialise, verify_artifact
from deepfloyd_core.text import encode, t5
from deepfloyd_core.text.embed_file import embed_schema, stored_row, unpacked
from deepfloyd_core.text.embeds import (
    FILES,
    Embeds,
    EmbedsSummary,
    embeds_request,
    encode_job,
    encode_parts,
    older_embeds,
    truncated_texts,
)
from tasks.endings import ending

TINY = Path(FLAVOURS["tiny-i"].repo)
WORDS = (
    "red",
    "circle",
    "blue",
    "star",
    "dark",
    "photo",
    "of",
    "a",
    "the",
    "purple",
    "square",
    "green",
    "on",
    "7",
    "x",
)
NATURAL = [
    "", "a purple star", "A Purple  STAR", "  a red circle, on plain ground. ", "caf\u00e9 &amp; <b>bold</b> star",
    "https://example.org/a.png a red star", "@someone's photo #12345", "日本語の星", "x " * 200, "\u202eright to left",
]  # fmt: skip


def captions_of(count: int, seed: int = 0, most: int = 60) -> list[str]:
    """Captions of 1 to `most` words."""
    rng = np.random.default_rng(seed)
    return [f"{number} " + " ".join(rng.choice(WORDS, rng.integers(1, most))) for number in range(count)]


@dataclass(frozen=True)
class EmbedWorld:
    """A run, an encoder of its own, and the making of embeds in this process."""

    folder: Path
    run: Run
    encoder: Path
    reports: list[tuple[int, int, str]]

    def with_settings(self, *overrides: str) -> "EmbedWorld":
        return replace(self, run=load_run(self.folder / "run" / "run.toml", overrides), reports=[])

    def make(self, captions: list[str], encoder: Path | None = None) -> Artifact:
        """Embeds as the task makes them; `encoder`: a folder to read in place of the one that was asked for."""
        captions = sorted(set(captions))
        request = embeds_request(self.run, captions, self.encoder)
        older = older_embeds(self.run.workspace, request)

        def report(done: int, total: int, line: str) -> None:
            self.reports.append((done, total, line))

        def build(work: WorkDir) -> EmbedsSummary:
            job = encode_job(self.run, captions, encoder or self.encoder, work.before or older)
            return encode.encode_captions(Job(job, work.path, report))

        return materialise(self.run.workspace, request, build, parts=FILES)


@pytest.fixture
def world(tmp_path: Path, new_small_run: Callable[[Path], SmallRun], monkeypatch: pytest.MonkeyPatch) -> EmbedWorld:
    """The picture of the token counts, which takes longer than the tiny T5, is left empty."""
    monkeypatch.setattr(encode, "save_token_counts", lambda counts, length, path: path.touch())
    run = load_run(new_small_run(tmp_path / "run").config)
    encoder = tmp_path / "encoder"
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(TINY / part, encoder / part)
    return EmbedWorld(tmp_path, run, encoder, [])


@pytest.fixture(scope="module")
def pipeline() -> IFPipeline:
    return IFPipeline.from_pretrained(
        TINY, safety_checker=None, feature_extractor=None, watermarker=None, requires_safety_checker=False
    )


def inodes(embeds: Artifact) -> dict[str, tuple[int, int]]:
    """What a file keeps as long as nobody writes it."""
    stats = {file.name: file.stat() for file in embeds.path.glob(FILES)}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def contents(embeds: Artifact) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in embeds.path.iterdir() if file.name != "manifest.json"}


def test_embeds_are_the_rows_of_the_stock_pipeline(world: EmbedWorld, pipeline: IFPipeline) -> None:
    captions = [*NATURAL, *captions_of(20)]
    embeds = Embeds(world.make(captions))
    for caption in captions:
        expected, _ = pipeline.encode_prompt(
            caption.replace("</s>", ""), do_classifier_free_guidance=False, clean_caption=True
        )
        assert torch.equal(embeds.of(caption), expected[0]), caption
        assert expected.shape[1] == 77
    assert embeds.ids() == sorted(caption_id(caption) for caption in set(captions))


def test_a_special_token_in_a_caption_is_taken_out_and_counted(world: EmbedWorld, pipeline: IFPipeline) -> None:
    made = world.make(["star </s> circle <pad>", "star circle"])
    assert made.manifest.summary["special_tokens_removed"] == 2
    expected, _ = pipeline.encode_prompt("star circle", do_classifier_free_guidance=False)
    assert torch.equal(Embeds(made).of("star </s> circle <pad>"), expected[0])
    assert t5.clean_captions(["a [END] star"], ["end"]) == (["a   star"], 1)  # one that looks like no tag


def test_captions_without_a_word_after_cleaning_are_counted_and_named(world: EmbedWorld) -> None:
    empty = ["https://example.org/a.png", "<br/>", "一只猫", "20240101 123456", "..."]
    made = world.make([*empty, "", "a star", "7", "🦊", "café"])
    assert made.manifest.summary["emptied"] == 5 and made.manifest.summary["emptied_captions"] == sorted(empty)
    lines = ending(made, made.summary(EmbedsSummary))
    assert lines[0].startswith("text embeds: 10 captions and prompts") and "tokens.png" in lines[0]
    assert lines[1].startswith("5 captions without a word after IF's cleaning") and "'<br/>'" in lines[1]
    plain = world.make(["a star"])
    assert len(ending(plain, plain.summary(EmbedsSummary))) == 1


def test_captions_that_clean_slowly_are_cut_and_counted(world: EmbedWorld) -> None:
    """Cleaning takes time that grows with the square of a word's length: half a minute for one of these."""
    slow = ["a" * 80_000, "a." * 100_000, "<a b" * 50_000, f"a{' ' * 80_000}b", f"a star {'b' * 600}", "a star, " * 600]
    start = time.monotonic()
    made = world.make([*slow, "a star", "b" * 512])
    assert time.monotonic() - start < 10
    assert made.manifest.summary["shortened"] == len(slow)
    assert any(line.startswith("6 captions longer than 4,096") for line in ending(made, made.summary(EmbedsSummary)))
    assert t5.clean_captions([slow[3], f"a star {'b' * 600} c"], [])[0] == ["a b", f"a star {'b' * 512} c"]


def test_captions_that_clean_to_one_text_share_a_row(world: EmbedWorld) -> None:
    made = world.make(["A Red Circle", "a red circle", "a red circle  ", "a blue circle"])
    assert (made.manifest.summary["captions"], made.manifest.summary["texts"], made.manifest.summary["encoded"]) == (
        4,
        2,
        2,
    )
    (file,) = made.path.glob(FILES)
    table = pa.ipc.open_file(file.read_bytes()).read_all()
    assert table.column_names == ["caption_id", "caption", "tokens", "xxh3", "embedding"]
    assert sorted(table["caption"].to_pylist()) == ["a blue circle", "a red circle"]
    assert table["caption_id"].to_pylist() == [caption_id(text) for text in table["caption"].to_pylist()]
    embeds = Embeds(made)
    assert embeds.of("A Red Circle").data_ptr() == embeds.of("a red circle").data_ptr()  # zero-copy, one row
    with pytest.raises(ArtifactError, match="lack caption"):
        embeds.of("a green circle")


def test_a_row_of_an_unpacked_file_is_not_copied(world: EmbedWorld) -> None:
    made = world.make(captions_of(30))
    rows = Embeds(made).of(captions_of(30)[3])
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if "embeds-" in line]
    spans = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in maps]
    assert any(start <= rows.data_ptr() < end for start, end in spans)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_packed_and_unpacked_rows_are_the_same_bits(world: EmbedWorld, dtype: str) -> None:
    captions = [*NATURAL, *captions_of(40)]
    plain = world.with_settings(f"text_encoder_dtype={dtype}").make(captions)
    packed = world.with_settings(f"text_encoder_dtype={dtype}", "embed_compression=packed").make(captions)
    assert packed.fingerprint != plain.fingerprint
    one, two = Embeds(plain), Embeds(packed)
    for caption in captions:
        assert one.of(caption).dtype == two.of(caption).dtype
        assert torch.equal(one.of(caption).view(torch.uint8), two.of(caption).view(torch.uint8))
    assert packed.manifest.summary["bytes"] < 0.9 * plain.manifest.summary["bytes"]


def test_packing_is_lossless_for_every_bit_pattern() -> None:
    words = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype, rows in (
        ("bf16", words.view(torch.bfloat16).reshape(-1, 64)),
        ("fp32", words.view(torch.float32).reshape(-1, 64)),
    ):
        back = unpacked(stored_row(rows, "packed"), rows.element_size())
        assert np.array_equal(back, rows.view(torch.uint8).numpy().reshape(-1)), dtype
        assert embed_schema(dtype, len(rows), 64, "none").field("embedding").type.byte_width == rows.numel() * (
            rows.element_size()
        )


def encoder_of(folder: Path, dtype: torch.dtype, **changes: Any) -> t5.TextEncoder:
    return replace(t5.load_encoder(folder, dtype, torch.device("cpu")), **changes)


@pytest.mark.parametrize(
    ("dtype", "arithmetic", "bound"),
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 0.04),
        (torch.bfloat16, torch.bfloat16, 0.06),  # both are 0.0040 from fp32 in the mean
    ],
)
def test_the_lean_forward_is_the_plain_one_but_for_rounding(
    dtype: torch.dtype, arithmetic: torch.dtype, bound: float
) -> None:
    tokenizer = t5.load_tokenizer(TINY)
    texts = ["", "a", *(" ".join(["star"] * count) for count in range(1, 80)), *captions_of(30)]
    ids = tokenizer(texts, truncation=True, max_length=77).input_ids
    assert {len(row) for row in ids} >= set(range(1, 78))
    plain = t5.encode(encoder_of(TINY, dtype, arithmetic=arithmetic, lean=False), ids, 77, 16 * 77)
    lean = t5.encode(encoder_of(TINY, dtype, arithmetic=arithmetic, lean=True), ids, 77, 16 * 77)
    assert not torch.equal(plain, lean)  # or this test compares one thing with itself
    assert (plain.float() - lean.float()).abs().max() < bound
    assert (plain.float() - lean.float()).abs().mean() < bound / 20


@pytest.mark.parametrize(("units", "has_bf16"), [(True, True), (True, False), (False, False)])
def test_bf16_is_computed_in_what_is_faster(monkeypatch: pytest.MonkeyPatch, units: bool, has_bf16: bool) -> None:
    """Against transformers' encoder with the same bf16 weights, in bf16 and in fp32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": units, "avx2": True, "cpu_name": "x"})
    monkeypatch.setattr(torch_device, "bf16_speed", lambda: 1.9 if has_bf16 else 0.5)
    batch, ids = tokenised(captions_of(4))
    models = stock_encoder(torch.bfloat16), stock_encoder(torch.bfloat16).float()
    with torch.inference_mode():
        in_bf16, in_fp32 = (model(batch.input_ids, batch.attention_mask)[0].float() for model in models)
    ours = t5.encode(encoder_of(TINY, torch.bfloat16), ids, 77, 16 * 77)
    assert ours.dtype == torch.bfloat16
    to_bf16, to_fp32 = ((ours.float() - theirs).abs().mean() for theirs in (in_bf16, in_fp32))
    once = (in_fp32.bfloat16().float() - in_fp32).abs().mean()
    if has_bf16:
        assert to_fp32 > 2 * once
    else:
        assert to_fp32 < 1.01 * once < to_bf16, "rounded once, at the end"


def test_padding_rows_that_come_out_equal_are_computed_once() -> None:
    """Compared with transformers' own encoder in float64, where equal rows are equal to the last digits."""
    tokenizer = t5.load_tokenizer(TINY)
    model = stock_encoder(torch.float64)
    computed = []
    for words in (1, 3, 7, 11, 19, 30):
        batch = tokenizer(" ".join(["star"] * words), padding="max_length", max_length=77, return_tensors="pt")
        with torch.inference_mode():
            rows = model(batch.input_ids, attention_mask=batch.attention_mask)[0][0]
        kept, spread = t5.distinct_positions(t5._buckets(model.config, 77), int(batch.attention_mask.sum()))
        assert torch.allclose(rows, rows[kept][spread], atol=1e-12)
        computed.append(len(kept))
    assert computed == sorted(computed) and computed[0] < 30 and computed[-2:] == [77, 77]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_encoder_read_layer_by_layer_gives_the_same_files(world: EmbedWorld, dtype: str) -> None:
    captions = [*NATURAL, *captions_of(40)]
    whole = contents(world.with_settings(f"text_encoder_dtype={dtype}").make(captions))
    shutil.rmtree(world.run.workspace)
    settings = (f"text_encoder_dtype={dtype}", "text_encoder_streaming=true")
    assert contents(world.with_settings(*settings).make(captions)) == whole


@pytest.mark.slow
def test_several_processes_make_the_same_files(world: EmbedWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # real processes draw the sheet
    world = world.with_settings("embed_file_mib=0.2", "embed_workers=3")  # 10 texts
    captions = sorted({*captions_of(45), ""})
    whole = contents(world.make(captions))
    shutil.rmtree(world.run.workspace)
    job = encode_job(world.run, captions, world.encoder)
    seen: list[tuple[int, int, str]] = []
    made = materialise(
        world.run.workspace, embeds_request(world.run, captions, world.encoder),
        lambda work: run_parts(job, encode_parts(job), work, lambda *args: seen.append(args)),
        parts=FILES,
    )  # fmt: skip
    assert contents(made) == whole and len(inodes(made)) == 5
    assert made.manifest.summary["encoded"] == 46 and made.manifest.summary["encoded_by_this_process"] == 0
    assert max(done for done, _, _ in seen) == 46


def test_a_streamed_encoder_is_read_from_the_files_that_the_library_takes(world: EmbedWorld) -> None:
    whole = contents(world.make(captions_of(10)))
    shutil.rmtree(world.run.workspace)
    (world.encoder / "text_encoder" / "model.variant.safetensors").write_bytes(b"not for us")
    streamed = world.with_settings("text_encoder_streaming=true").make(captions_of(10))
    assert {name: data for name, data in contents(streamed).items() if name in whole} == whole


def test_a_streamed_encoder_that_lacks_a_tensor_says_which(world: EmbedWorld) -> None:
    from safetensors.torch import load_file, save_file

    path = world.encoder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    del tensors["encoder.block.1.layer.0.SelfAttention.k.weight"]
    save_file(tensors, path)
    with pytest.raises(ModelError, match=r"has no tensor encoder\.block\.1\.layer\.0\.SelfAttention\.k\.weight"):
        world.with_settings("text_encoder_streaming=true").make(["a star"])


def test_new_captions_add_a_file_and_encode_nothing_else(world: EmbedWorld) -> None:
    old = captions_of(40)
    first = world.make(old)
    before = inodes(first)
    second = world.make([*old, "a new caption", "another one"])
    assert (second.manifest.summary["encoded"], second.manifest.summary["taken_over"]) == (2, 40)
    assert before.items() < inodes(second).items() and len(inodes(second)) == len(before) + 1
    assert not verify_artifact(first) and not verify_artifact(second)
    rows = {text: Embeds(second).of(text).clone() for text in [*old, "a new caption", "another one"]}
    shutil.rmtree(world.run.workspace)
    fresh = Embeds(world.make(list(rows)))
    assert all(torch.equal(fresh.of(text), row) for text, row in rows.items())  # as if all were made at once


def test_t5_is_not_loaded_when_every_text_is_there(world: EmbedWorld, tmp_path: Path) -> None:
    world.make(captions_of(40))
    hollow = tmp_path / "hollow"  # a tokenizer and a configuration, and no weights
    shutil.copytree(world.encoder / "tokenizer", hollow / "tokenizer")
    (hollow / "text_encoder").mkdir()
    shutil.copy(world.encoder / "text_encoder" / "config.json", hollow / "text_encoder")
    fewer = world.make(captions_of(40)[:30], hollow)
    assert fewer.manifest.summary["encoded"] == 0
    few = world.make([*captions_of(40)[:3], captions_of(40)[3].upper()], hollow)  # below half of the file: copied
    assert few.manifest.summary["encoded"] == 0 and few.manifest.summary["texts"] == 4
    with pytest.raises(StorageError, match="safetensors"):
        world.make(["a new one"], hollow)


@pytest.mark.slow
def test_many_small_files_are_put_together(world: EmbedWorld) -> None:
    captions = captions_of(33)
    for count in range(20, 33):
        made = world.make(captions[:count])
        assert made.manifest.summary["encoded"] == (1 if count > 20 else 20)
        assert len(inodes(made)) <= take_over.MAX_SMALL + 2
    fresh = world.make(captions[:32])
    embeds = Embeds(made)
    assert all(torch.equal(embeds.of(text), Embeds(fresh).of(text)) for text in captions[:32])


@pytest.mark.parametrize("setting", ["text_encoder_dtype=bf16", "tokenizer_max_length=128", "embed_compression=packed"])
def test_nothing_is_taken_over_from_embeds_of_another_kind(world: EmbedWorld, setting: str) -> None:
    captions = captions_of(10)
    first = world.make(captions)
    other = world.with_settings(setting).make(captions)
    assert other.fingerprint != first.fingerprint and other.manifest.summary["encoded"] == 10


def test_another_encoder_byte_or_cleaner_encodes_all_again(world: EmbedWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    captions = captions_of(10)
    first = world.make(captions)
    path = world.encoder / "text_encoder" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    second = world.make(captions)
    assert second.fingerprint != first.fingerprint and second.manifest.summary["encoded"] == 10
    real = embeds_request.__globals__["metadata"].version
    monkeypatch.setattr(embeds_request.__globals__["metadata"], "version", lambda name: real(name) + ".post1")
    third = world.make(captions)
    assert third.fingerprint != second.fingerprint and third.manifest.summary["encoded"] == 10


def test_a_flipped_byte_is_found_before_use_and_that_file_alone_made_again(
    world: EmbedWorld, caplog: pytest.LogCaptureFixture
) -> None:
    world = world.with_settings("embed_file_mib=0.2")  # 10 texts
    captions = captions_of(35)
    made = world.make(captions)
    whole, before = contents(made), inodes(made)
    assert len(before) == 4
    victim = sorted(made.path.glob(FILES))[1]
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 4
    victim.write_bytes(data)
    world.reports.clear()
    with caplog.at_level(logging.WARNING):
        again = world.make(captions)
    assert victim.name in caplog.text and "has other bytes than its manifest says" in caplog.text
    assert contents(again) == whole and not verify_artifact(again)
    encoded = again.manifest.summary["encoded_by_this_process"]
    assert encoded in (5, 10) and world.reports[0][:2] == (0, encoded)
    assert {name for name, inode in inodes(again).items() if inode != before[name]} == {victim.name}
    world.reports.clear()
    assert world.make(captions).path == again.path and not world.reports  # whole: reused


def test_no_flipped_bit_of_embeds_is_used(world: EmbedWorld) -> None:
    captions = captions_of(4)
    for packing in ("none", "packed"):
        made = world.with_settings(f"embed_compression={packing}").make(captions)
        (file,) = made.path.glob(FILES)
        whole, size = [Embeds(made).of(caption) for caption in captions], file.stat().st_size

        def read(made: Artifact = made) -> list[torch.Tensor]:
            return [Embeds(made).of(caption) for caption in captions]

        def same(found: list[torch.Tensor], whole: list[torch.Tensor] = whole) -> bool:
            return all(map(torch.equal, found, whole))

        places = [*range(0, 1200), *range(1200, size - 2000, size // 150), *range(size - 2000, size)][::3]
        assert times_found(file, places, 4, read, same) > len(places) / 3


def test_large_embeds_that_a_reader_found_damaged_are_made_again_alone_also_where_they_grew(
    world: EmbedWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "_SMALL_ROWS", 0)
    world = world.with_settings("embed_file_mib=0.2")  # 10 texts
    first = world.make(captions_of(25))
    grown = world.make(captions_of(40))
    (first.path / "manifest.json").unlink()
    files, before = sorted(grown.path.glob(FILES)), inodes(grown)
    whole = [file.read_bytes() for file in files]
    flip(files[1], len(whole[1]) // 2)
    assert world.make(captions_of(40)).reused
    with pytest.raises(DamagedError, match=f"{files[1].name} is damaged: row .* has other bytes than were written"):
        [Embeds(grown).of(caption) for caption in captions_of(40)]
    again = world.make(captions_of(40))
    assert not again.reused and verify_artifact(again) == [] and [file.read_bytes() for file in files] == whole
    assert {name for name, inode in inodes(again).items() if inode != before[name]} == {files[1].name}


def test_a_damaged_older_file_is_not_taken_over(world: EmbedWorld) -> None:
    made = world.make(captions_of(20))
    (file,) = made.path.glob(FILES)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    assert world.make(captions_of(21)).manifest.summary["encoded"] == 21


def test_a_full_disk_is_said_before_anything_is_encoded(world: EmbedWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(world.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    monkeypatch.setattr(t5, "load_encoder", lambda *_: pytest.fail("the encoder was loaded"))
    said = r"The embeds of 200 texts take \d+\.?\d* MB, and .* has less room \(.*, 1\.05 MB free\)\. Make room"
    with pytest.raises(StorageError, match=said):
        world.make(captions_of(200))


def test_values_that_are_not_finite_name_the_caption(world: EmbedWorld) -> None:
    from safetensors.torch import load_file, save_file

    path = world.encoder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    star = t5.load_tokenizer(world.encoder)("purple").input_ids[0]
    tensors["shared.weight"][star] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match="not finite for 'a purple star'"):
        world.make(["a red star", "a purple star", "a blue star"])


def test_captions_that_are_cut_are_counted_and_listed(world: EmbedWorld) -> None:
    world = world.with_settings("embed_file_mib=0.1")
    made = world.make([*captions_of(20, most=20), "star " * 80, "circle " * 100, "square " * 76])
    assert (made.manifest.summary["truncated"], made.manifest.summary["tokens_lost"]) == (2, 4 + 24)
    listed = truncated_texts(made, 10)
    assert [one.lost for one in listed] == [24, 4] and listed[0].text.startswith("circle circle")
    assert [one.captions for one in listed] == [(caption_id("circle " * 100),), (caption_id("star " * 80),)]
    assert truncated_texts(made, 1) == listed[:1]


def test_longer_texts_are_kept_whole_when_asked_and_the_risk_is_said(world: EmbedWorld, pipeline: IFPipeline) -> None:
    longer = world.with_settings("tokenizer_max_length=128")
    assert any("tokenizer_max_length is 128; IF was trained with 77" in note for note in longer.run.notes)
    assert not any("tokenizer_max_length" in note for note in world.run.notes)
    made = longer.make(["star " * 100, "a star"])
    assert made.manifest.summary["truncated"] == 0
    batch = pipeline.tokenizer(["star " * 100, "a star"], padding="max_length", max_length=128, return_tensors="pt")
    with torch.inference_mode():
        expected = pipeline.text_encoder(batch.input_ids, attention_mask=batch.attention_mask)[0]
    assert torch.equal(Embeds(made).of("star " * 100), expected[0]) and torch.equal(
        Embeds(made).of("a star"), expected[1]
    )
    with pytest.raises(ConfigError, match="tokenizer_max_length is 64"):
        world.with_settings("tokenizer_max_length=64")


KILLS = 20


@pytest.mark.slow
def test_twenty_kills_change_no_byte_and_nothing_finished_is_encoded_again(world: EmbedWorld) -> None:
    settings = ("embed_file_mib=0.1", "embed_batch_size=1")  # 5 texts a file
    captions = sorted(captions_of(150))
    request = embeds_request(world.with_settings(*settings).run, captions, world.encoder)
    # Importing torch takes longer than the whole build: processes are forked from one that has done so.
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["child_functions", "deepfloyd_core.text.encode"])

    def start(workspace: Path) -> BaseProcess:
        (world.folder / "reports").unlink(missing_ok=True)
        run_file, place = str(world.folder / "run" / "run.toml"), f"workspace={workspace}"
        child = forks.Process(
            target=make_embeds,
            args=(run_file, (*settings, place), captions, str(world.encoder), str(world.folder / "reports")),
        )
        child.start()
        return child

    def embeds_in(workspace: Path) -> Artifact:
        return Artifact("text_embeds", request.fingerprint, workspace / "text_embeds" / request.fingerprint)

    seconds = 0.0
    for name in ("warm", "unbroken"):  # the first one waits for the imports
        began, child = time.monotonic(), start(world.folder / name)
        child.join()
        seconds = time.monotonic() - began
        assert child.exitcode == 0
    wanted, broken = contents(embeds_in(world.folder / "unbroken")), world.folder / "broken"
    rng, kills, finished = np.random.default_rng(0), 0, 0
    while kills < KILLS:
        child = start(broken)
        child.join(rng.uniform(0, seconds / 2))
        kills += child.exitcode is None
        child.kill()
        child.join()
        reports = (world.folder / "reports").read_text().split() if (world.folder / "reports").exists() else []
        assert not reports or int(reports[0]) >= finished, "a finished file was encoded again"
        finished = 5 * len(list(embeds_in(broken).path.glob(".part-embeds-*")))
        if child.exitcode == 0:
            assert contents(embeds_in(broken)) == wanted
            shutil.rmtree(broken)
            finished = 0
    child = start(broken)
    child.join()
    assert contents(embeds_in(broken)) == wanted and not verify_artifact(embeds_in(broken))


@pytest.mark.slow
def test_a_run_with_128_tokens_trains_samples_and_generates(
    server: str, tmp_path: Path, new_small_run: Callable[[Path], SmallRun]
) -> None:
    small = new_small_run(tmp_path / "run")
    (small.pictures / "star_000.txt").write_text("a purple star " * 30)
    settings = ("tokenizer_max_length=128", "stage1.max_train_steps=2", "stage2.max_train_steps=2")
    sets = [part for setting in settings for part in ("--set", setting)]
    done = small.call_here("run", str(small.config), *sets)
    assert done.returncode == 0, done.stderr
    assert "tokenizer_max_length is 128; IF was trained with 77" in " ".join(done.stderr.split())
    (folder,) = (small.workspace / "text_embeds").glob("*")
    made = Artifact("text_embeds", folder.name, folder)
    assert made.manifest.summary["length"] == 128 and made.manifest.summary["truncated"] == 0
    assert Embeds(made).of("a purple star").shape == (128, 64)
    pictures = {}
    for length in ("128", "77"):
        arguments = ("--prompt", "a purple star", "--seeds", "1", "--set", f"tokenizer_max_length={length}")
        done = small.call_here("generate", str(small.config), *arguments)
        assert done.returncode == 0, done.stderr
        made_now = max((small.workspace / "generated").glob("*"), key=lambda path: path.stat().st_mtime_ns)
        pictures[length] = sorted(made_now.glob("*64x64.png"))[0].read_bytes()
    assert pictures["128"] != pictures["77"]  # the padding counts


def test_without_torchao_quantised_weights_are_refused_at_once(
    world: EmbedWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else there(name))
    with pytest.raises(ConfigError, match=r"text_encoder_quantization is 'int8'.*deepfloyd-pipeline\[quantization\]"):
        world.with_settings("text_encoder_quantization=int8")


def test_time_and_bytes_are_forecast_before_the_first_layer(world: EmbedWorld) -> None:
    world.make(captions_of(30))
    lines = [line for _, _, line in world.reports]
    expected = 30 * 77 * 64 * 4 / 2**20  # fp32 rows of the tiny T5
    assert re.fullmatch(rf"about \d+:\d\d:\d\d and {expected:.1f} MiB left", lines[1])
    assert lines[2].endswith(lines[1]) and "texts/s" in lines[2], "shown on, until a file is done"
    assert re.fullmatch(r"\d+\.\d texts/s", lines[-1]), "nothing is ahead when all is done"


def test_the_forecast_grows_with_texts_and_with_what_is_read_for_each_file() -> None:
    encoder = t5.load_encoder(TINY, torch.float32, torch.device("cpu"), streamed=True)
    few, many, often = (t5.forecast_s(encoder, *work, 77, 16 * 77) for work in ((10, 1), (10**6, 1), (10, 10**4)))
    assert 0 < few < 1 < many
    assert often > 1, "ten thousand times all layers from the files"

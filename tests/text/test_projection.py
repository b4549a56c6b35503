"""A stage's stored text gives the UNet what its own text modules would give, and costs a kill one file."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from flipped import flip, times_found
from safetensors.torch import load_file, save_file
from small_run import SmallRun

from deepfloyd_core.config.flavours import FLAVOURS, TEXT_MODULES
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.diffusion.loss import Text, predict
from deepfloyd_core.errors import ArtifactError, DamagedError, ModelError
from deepfloyd_core.hashing import caption_id
from deepfloyd_core.models.unet import (
    DTYPES,
    autocast,
    load_projected_unet,
    load_text_modules,
    load_unet,
)
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.processes.jobs import Job
from deepfloyd_core.store import manifest
from deepfloyd_core.store.artifacts import Artifact, materialise, verify_artifact
from deepfloyd_core.text import projection as projected
from deepfloyd_core.text.embeds import Embeds, embeds_request, encode_job
from deepfloyd_core.text.encode import encode_captions
from deepfloyd_core.text.projection import (
    TEXT_LAYERS,
    Projected,
    older_text,
    project_captions,
    project_job,
    text_is_frozen,
    text_request,
)
from deepfloyd_core.types import Report, no_report

FOLDERS: dict[Stage, Path] = {1: Path(FLAVOURS["tiny-i"].repo), 2: Path(FLAVOURS["tiny-ii"].repo)}
CAPTIONS = sorted(["", "a purple star", "A purple STAR", "a red circle", "a blue square on grey", "star " * 100])
IDS = [caption_id(caption) for caption in CAPTIONS]
CPU = torch.device("cpu")
PRECISIONS = ("no", "bf16")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, new_small_run: Callable[[Path], SmallRun]) -> Run:
    return load_run(new_small_run(tmp_path_factory.mktemp("projected") / "run").config)


@pytest.fixture(scope="module")
def embeds(run: Run) -> Artifact:
    """The rows of the captions, from the tiny T5."""
    request, job = embeds_request(run, CAPTIONS, FOLDERS[1]), encode_job(run, CAPTIONS, FOLDERS[1])
    return materialise(run.workspace, request, lambda work: encode_captions(Job(job, work.path, no_report)))


def project(
    run: Run, stage: Stage, embeds: Artifact, workspace: Path, folder: Path | None = None, report: Report = no_report
) -> Artifact:
    """A stage's text, as the task makes it, but in this process."""
    folder = folder or FOLDERS[stage]
    job = project_job(run, stage, folder, embeds)
    return materialise(
        workspace,
        text_request(run, stage, folder, embeds),
        lambda work: project_captions(Job(job, work.path, report)),
        projected.FILES,
    )


def grown(run: Run, workspace: Path, more: list[str], older: bool = True) -> Artifact:
    """Embeds and Stage I text of CAPTIONS and more; what was projected before is on offer unless `older` is false."""
    captions = sorted({*CAPTIONS, *more})
    encoding = encode_job(run, captions, FOLDERS[1])
    embeds = materialise(
        run.workspace, embeds_request(run, captions, FOLDERS[1]),
        lambda work: encode_captions(Job(encoding, work.path, no_report)),
    )  # fmt: skip
    request = text_request(run, 1, FOLDERS[1], embeds)
    found = older_text(workspace, request) if older else None
    job = project_job(run, 1, FOLDERS[1], embeds, found)
    return materialise(workspace, request, lambda work: project_captions(Job(job, work.path, no_report)))


def test_captions_that_were_projected_before_are_copied(
    run: Run, embeds: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = grown(run, tmp_path / "fresh", ["a green heart"], older=False)
    first = project(run, 1, embeds, tmp_path / "growing")
    projected_now: list[torch.Tensor] = []
    real = projected.projector

    def counting(modules: torch.nn.ModuleDict, precision: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        one = real(modules, precision)

        def counted(raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            projected_now.append(raw)
            return one(raw)

        return counted

    monkeypatch.setattr(projected, "projector", counting)
    second = grown(run, tmp_path / "growing", ["a green heart"])
    assert (first.manifest.summary["taken_over"], second.manifest.summary["taken_over"]) == (0, len(CAPTIONS))
    assert len(projected_now) <= 2, "the new caption, and once to see how long a row is"
    assert second.hashes == fresh.hashes

    damaged = next(second.path.glob("*.arrow"))
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(bytes(data))
    third = grown(run, tmp_path / "growing", ["a green heart", "a blue heart"])
    assert third.manifest.summary["taken_over"] == 0, "nothing is copied from a file with other bytes"


def test_another_unet_or_encoder_takes_no_captions_over(run: Run, embeds: Artifact, tmp_path: Path) -> None:
    project(run, 1, embeds, tmp_path)
    assert older_text(tmp_path, text_request(run, 2, FOLDERS[2], embeds)) is None
    request = text_request(run, 1, FOLDERS[1], embeds)
    others = {**request.inputs, "unet": "0" * 16}, {**request.inputs, "text_embeds": "0" * 16}
    assert older_text(tmp_path, replace(request, inputs=others[0])) is None
    assert older_text(tmp_path, replace(request, inputs=others[1])) is not None
    assert (
        older_text(tmp_path, replace(request, spec={**request.spec, "rows": {"encoder": "x"}}, inputs=others[1]))
        is None
    )


def with_precision(run: Run, precision: str) -> Run:
    keys = tuple(f"stage{stage}.mixed_precision={precision}" for stage in FOLDERS)
    return load_run(Path(run.workspace).parent / "run.toml", keys)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", [1, 2])
def test_the_unet_predicts_what_the_stock_unet_does(
    run: Run, embeds: Artifact, stage: Stage, precision: str, tmp_path: Path
) -> None:
    """Equal to the bit for one caption. In batches a stock UNet rounds its own projections otherwise (fp32: by 1e-6)."""
    dtype = DTYPES[precision]
    texts = Projected(project(with_precision(run, precision), stage, embeds, tmp_path))
    raw = Embeds(embeds)
    stock, ours = load_unet(FOLDERS[stage], dtype), load_projected_unet(FOLDERS[stage], dtype)

    def both(names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(len(names))
        edge = {1: 16, 2: 32}[stage]  # bf16 convolutions crawl on most CPUs
        x = torch.randn((len(names), stock.config.in_channels, edge, edge), generator=generator).to(dtype)
        t = torch.randint(0, 1000, (len(names),), generator=generator)
        level = t.flip(0) if stage == 2 else None
        rows = Text(torch.stack([raw[name] for name in names])).to(CPU, dtype)
        with torch.inference_mode(), autocast(CPU, precision):
            expected, _ = predict(stock, x, t, rows, level)
            return predict(ours, x, t, texts.batch(names).to(CPU, dtype), level)[0], expected

    for name in IDS:
        found, expected = both([name])
        assert found.dtype == dtype and torch.equal(found, expected)
    found, expected = both(IDS[:4])
    assert (found - expected).abs().max() <= {"no": 1e-5, "bf16": 0.1}[precision]
    other, _ = both([IDS[1], IDS[0], *IDS[2:4]])
    assert not torch.equal(found[0], other[0]), "the text has no effect"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_caption_takes_a_row_of_the_cross_attention_and_one_of_the_time_embedding(
    run: Run, embeds: Artifact, precision: str, tmp_path: Path
) -> None:
    text = project(with_precision(run, precision), 2, embeds, tmp_path)
    config = load_unet(FOLDERS[2], torch.float32).config
    batch = Projected(text).batch(IDS)
    assert batch.pooled is not None
    assert batch.rows.shape == (len(IDS), 77, config.cross_attention_dim)
    assert batch.pooled.shape == (len(IDS), config.time_embedding_dim)
    assert batch.rows.dtype == batch.pooled.dtype == DTYPES[precision]
    size = (77 * config.cross_attention_dim + config.time_embedding_dim) * DTYPES[precision].itemsize
    assert size * len(IDS) < text.manifest.summary["bytes"] < size * len(IDS) + 4096
    assert verify_artifact(text) == []


@pytest.mark.parametrize("stage", [1, 2])
def test_the_trainers_unet_has_every_tensor_of_the_stock_one_but_the_texts(stage: Stage) -> None:
    stock, ours = load_unet(FOLDERS[stage], torch.float32), load_projected_unet(FOLDERS[stage], torch.float32)
    kept = {name: tensor for name, tensor in stock.state_dict().items() if name.split(".")[0] not in TEXT_MODULES}
    assert kept.keys() == ours.state_dict().keys()
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in kept.items())
    modules = load_text_modules(FOLDERS[stage], torch.float32).state_dict()
    assert kept.keys() | modules.keys() == stock.state_dict().keys()
    assert all(torch.equal(tensor, stock.state_dict()[name]) for name, tensor in modules.items())


def test_other_weights_in_the_text_modules_make_another_artifact(run: Run, embeds: Artifact, tmp_path: Path) -> None:
    first = project(run, 1, embeds, tmp_path)
    shutil.copytree(FOLDERS[1], tmp_path / "changed")
    weights = tmp_path / "changed" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["encoder_hid_proj.weight"] *= 1.01
    save_file(tensors, weights)
    second = project(run, 1, embeds, tmp_path, tmp_path / "changed")
    assert second.fingerprint != first.fingerprint
    before, after = Projected(first).batch(IDS), Projected(second).batch(IDS)
    assert not torch.equal(before.rows, after.rows)
    assert before.pooled is not None and after.pooled is not None
    assert torch.equal(before.pooled, after.pooled)
    assert project(with_precision(run, "bf16"), 1, embeds, tmp_path).fingerprint != first.fingerprint
    assert project(run, 1, embeds, tmp_path) == first


def test_a_kill_costs_one_file(run: Run, embeds: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = project(run, 1, embeds, tmp_path / "whole")
    monkeypatch.setattr(projected, "FILE_BYTES", 2 * 77 * 64 * 4 + 2 * 64 * 4)  # two captions
    monkeypatch.setattr(projected, "WRITE_CAPTIONS", 1)

    class Killed(Exception):
        pass

    def kill(done: int, total: int, line: str) -> None:
        if done == 3:  # half of the second file
            raise Killed

    with pytest.raises(Killed):
        project(run, 1, embeds, tmp_path / "killed", report=kill)
    (first,) = tmp_path.glob("killed/stage1_text/*/*.arrow")
    written = first.stat().st_mtime_ns
    reports: list[int] = []
    resumed = project(run, 1, embeds, tmp_path / "killed", report=lambda done, total, line: reports.append(done))
    assert reports == [2, 3, 4, 5, 6]
    assert first.stat().st_mtime_ns == written
    unbroken = project(run, 1, embeds, tmp_path / "unbroken")
    names = ["text-00000.arrow", "text-00001.arrow", "text-00002.arrow"]
    assert [file.name for file in sorted(resumed.path.glob("*.arrow"))] == names
    assert all((resumed.path / name).read_bytes() == (unbroken.path / name).read_bytes() for name in names)
    assert torch.equal(Projected(resumed).batch(IDS).rows, Projected(whole).batch(IDS).rows)


def test_a_caption_that_is_not_there_and_a_cut_file_are_one_clear_error(
    run: Run, embeds: Artifact, tmp_path: Path
) -> None:
    text = project(run, 1, embeds, tmp_path)
    unknown = caption_id("a green zebra")
    with pytest.raises(
        ArtifactError, match=rf"stage1_text {text.fingerprint} lacks caption {unknown}.*deepfloyd verify"
    ):
        Projected(text).batch([IDS[0], unknown])
    (file,) = text.path.glob("*.arrow")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"text-00000.arrow is damaged.*The next run that needs it makes it again"):
        Projected(text)
    assert verify_artifact(text)
    assert not verify_artifact(project(run, 1, embeds, tmp_path)), "the next run rebuilds it"


def test_only_the_text_modules_are_read_also_from_sharded_weights(tmp_path: Path) -> None:
    unet = load_unet(FOLDERS[1], torch.float32)
    unet.save_pretrained(tmp_path / "unet", max_shard_size="1MB")
    shards = sorted((tmp_path / "unet").glob("*.safetensors"))
    assert len(shards) > 3
    expected = load_text_modules(FOLDERS[1], torch.bfloat16).state_dict()
    found = load_text_modules(tmp_path, torch.bfloat16).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    save_file({"conv_in.weight": torch.zeros(1)}, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ModelError, match=r"lacks the weights encoder_hid_proj.weight"):
        load_text_modules(tmp_path, torch.float32)


def test_a_config_that_only_gives_the_width_of_t5_is_enough(tmp_path: Path) -> None:
    """As files of older diffusers are written."""
    shutil.copytree(FOLDERS[1] / "unet", tmp_path / "unet")
    path = tmp_path / "unet" / "config.json"
    config = json.loads(path.read_text())
    del config["encoder_hid_dim_type"]
    path.write_text(json.dumps(config))
    assert set(load_text_modules(tmp_path, torch.float32)) == set(TEXT_MODULES)
    ours = load_projected_unet(tmp_path, torch.float32)
    assert not {name for name in ours.state_dict() if name.split(".")[0] in TEXT_MODULES}


def test_a_unet_of_another_family_is_refused(tmp_path: Path) -> None:
    UNet2DConditionModel(
        block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        mid_block_type=None, cross_attention_dim=32,
    ).save_pretrained(tmp_path / "unet")  # fmt: skip
    with pytest.raises(ModelError, match="a UNet of DeepFloyd IF has"):
        load_text_modules(tmp_path, torch.float32)


def test_adapters_on_the_text_modules_ask_for_the_raw_rows(run: Run) -> None:
    modules = load_text_modules(FOLDERS[1], torch.float32)
    linear = {name for name, module in modules.named_modules() if isinstance(module, torch.nn.Linear)}
    assert linear == set(TEXT_LAYERS)
    config = run.config.stage(1)
    assert text_is_frozen(config)
    for targets in (("to_q", "k_proj"), ("encoder_hid_proj",), ("pool.q_proj",), ("proj", "to_q")):
        assert not text_is_frozen(config.model_copy(update={"lora_target_modules": targets})), targets
    for targets in (("to_q", "add_k_proj"), ("hid_proj",), ("conv1",)):
        assert text_is_frozen(config.model_copy(update={"lora_target_modules": targets})), targets


def test_no_flipped_bit_of_stored_text_is_used(run: Run, embeds: Artifact, tmp_path: Path) -> None:
    text = project(run, 1, embeds, tmp_path)
    (file,) = text.path.glob("*.arrow")
    whole, size = Projected(text).batch(IDS), file.stat().st_size
    places = [*range(0, 1200), *range(1200, size - 2000, size // 150), *range(size - 2000, size)][::3]

    def same(read: Text) -> bool:
        return torch.equal(read.rows, whole.rows) and _equal(read.pooled, whole.pooled)

    assert times_found(file, places, 3, lambda: Projected(text).batch(IDS), same) > len(places) / 3


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


def test_a_large_file_of_text_that_a_reader_found_damaged_is_made_again_alone(
    run: Run, embeds: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projected, "FILE_BYTES", 1)  # a file for each caption
    text = project(run, 1, embeds, tmp_path)
    monkeypatch.setattr(manifest, "_SMALL_ROWS", 0)
    files = sorted(text.path.glob("*.arrow"))
    whole, inodes = [file.read_bytes() for file in files], [file.stat().st_ino for file in files]
    flip(files[2], len(whole[2]) // 2)
    assert project(run, 1, embeds, tmp_path).reused
    with pytest.raises(DamagedError, match=f"{files[2].name} is damaged: caption .* has other bytes than were written"):
        Projected(text).batch(IDS)
    again = project(run, 1, embeds, tmp_path)
    assert not again.reused and verify_artifact(again) == [] and [file.read_bytes() for file in files] == whole
    assert [number for number, file in enumerate(files) if file.stat().st_ino != inodes[number]] == [2]

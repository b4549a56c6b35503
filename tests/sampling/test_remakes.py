"""Stage I's remakes of Stage II's low-res pictures: as the stock img2img pipeline makes them; fed in their place."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from artifact_rows import finished_names, live_rows
from data_world import DataWorld
from diffusers import DDPMScheduler, IFImg2ImgPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from small_run import SmallRun
from training_parts import FOLDERS, planned_name, prepared, run_here, train_and_kill, train_stage

from deepfloyd_core.adapters.lora import trainable
from deepfloyd_core.adapters.method import method_of
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stages import STAGES
from deepfloyd_core.crops.rows import read_row_list
from deepfloyd_core.diffusion.degradations import degrade
from deepfloyd_core.diffusion.loss import Text
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.hashing import hash_seed
from deepfloyd_core.models.unet import load_scheduler, load_unet, trained_scheduler
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.sampling import remakes as stage1_low_res
from deepfloyd_core.sampling.identity import low_res_request
from deepfloyd_core.sampling.jobs import LowResInputs, remake_job
from deepfloyd_core.store.artifacts import Artifact, Request, WorkDir, materialise
from deepfloyd_core.store.manifest import Summary
from deepfloyd_core.store.parts import finish_part
from deepfloyd_core.training.batches import Batch, TrainingRows, draw
from deepfloyd_core.training.draws import vary
from deepfloyd_core.training.forward import Prepared, TrainingContext, feed, predict_noise, prepare
from deepfloyd_core.training.identity import lora_request
from deepfloyd_core.training.jobs import TrainingInputs

STAGE1 = {"model_flavour": "tiny-i", "mixed_precision": "no", "validation_num_inference_steps": 3,
          "validation_guidance": 2.0}  # fmt: skip
STAGE2 = {
    "model_flavour": "tiny-ii",
    "mixed_precision": "no",
    "low_res_stage1_share": 1.0,
    "low_res_stage1_strength": 0.7,
}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True, "lora_target_modules": ["to_q", "conv1"]},
    "bitfit": {"use_bitfit": True},
    "full": {"model_type": "full"},
}


@dataclass(frozen=True)
class Prepared2:
    """The data stages of a run, and a Stage I that is not its base."""

    run: Run
    made: dict[str, Artifact]

    def inputs(self, **others: Artifact) -> LowResInputs[Artifact]:
        own = {"pixels": "stage2_pixels", "stage1_lora": "stage1_lora", "text_embeds": "text_embeds"}
        return LowResInputs(**{name: self.made[kind] for name, kind in own.items()} | others)

    def remade(self, workspace: Path, **others: Artifact) -> Artifact:
        """The artifact, made in this process."""
        inputs = self.inputs(**others)
        request, job = low_res_request(self.run, 2, FOLDERS[1], inputs), remake_job(self.run, 2, FOLDERS[1], inputs)
        return materialise(workspace, request, lambda work: run_here(job, work))


def trained(workspace: Path, keys: dict[str, Any]) -> Artifact:
    """What a training of Stage I would leave, with weights that change its pictures much."""
    config, generator = StageConfig.model_validate({**STAGE1, **keys}), torch.Generator().manual_seed(3)
    method, unet = method_of(config), load_unet(FOLDERS[1], torch.float32)
    method.prepare(unet, config, 7)
    with torch.no_grad():
        for param in trainable(unet).values():
            param.add_((0.003 if "model_type" in keys else 0.2) * torch.randn(param.shape, generator=generator))

    def save(work: WorkDir) -> Summary:
        method.save(unet, 1, FOLDERS[1], work.path)
        trained_scheduler(FOLDERS[1], False).save_pretrained(work.path / "scheduler")
        return Summary()

    return materialise(workspace, Request("stage1_lora", 1, {"keys": str(keys)}, {}), save)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, new_world: Callable[[Path], DataWorld]) -> Prepared2:
    """Two crops of each of three sizes, of which two are the same, with captions of their own."""
    folder = tmp_path_factory.mktemp("low-res")
    (folder / "pictures").mkdir()
    world = new_world(folder)
    for number, size in enumerate([(280, 260), (400, 260), (260, 390)]):
        noise = np.random.default_rng(number).integers(0, 256, (5, 6, 3), np.uint8)
        picture = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
        world.add(f"{number}.png", picture, f"a {('red', 'green', 'blue')[number]} star")
    keys = {"crop_aspect": "preserve", "crop_style": "random", "repeats": 1}
    run = world.load(keys, stage1=STAGE1, stage2=STAGE2, text_encoder_dtype="fp32", num_threads=1, device="cpu")
    made = prepared(run, world)
    made["stage1_lora"] = trained(run.workspace, {})
    return Prepared2(run, made)


@pytest.fixture(scope="module")
def remakes(small: Prepared2) -> Artifact:
    return small.remade(small.run.workspace)


def pixels_of(row: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(row["pixels"], np.uint8).reshape(row["height"], row["width"], 3)


def downscaled(row: dict[str, Any]) -> torch.Tensor:
    crop = torch.from_numpy(pixels_of(row).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    size = (row["height"] // 4, row["width"] // 4)
    return F.interpolate(crop, size, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)


def stock(lora: Path, method: str) -> IFImg2ImgPipeline:
    """diffusers' own img2img pipeline with T5, and what was trained, loaded as the bundle's card says."""
    absent = dict.fromkeys(("safety_checker", "feature_extractor", "watermarker"))
    if method == "full":
        absent["unet"] = UNet2DConditionModel.from_pretrained(lora, subfolder="unet")
    pipeline = IFImg2ImgPipeline.from_pretrained(FOLDERS[1], **absent, requires_safety_checker=False)
    if method in ("lora", "dora"):
        pipeline.load_lora_weights(lora)
    if method == "bitfit":
        pipeline.unet.load_state_dict(load_file(lora / "bitfit_biases.safetensors"), strict=False)
    pipeline.scheduler = DDPMScheduler.from_pretrained(lora / "scheduler")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def resampled(pipeline: IFImg2ImgPipeline, row: dict[str, Any]) -> np.ndarray:
    """One crop by itself, uint8 (h, w, 3)."""
    seed = hash_seed("low-res of stage 1", 42, row["image_id"], row["repeat"])
    (made,) = pipeline(
        row["caption"], downscaled(row), strength=0.7, num_inference_steps=3, guidance_scale=2.0, negative_prompt="",
        generator=torch.Generator().manual_seed(seed), output_type="np",
    ).images  # fmt: skip
    return np.asarray((made * 255).round(), int)


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=pytest.mark.slow) for name in ("lora", "full", "dora", "bitfit")]
)
def test_remakes_are_those_of_the_stock_pipeline_for_every_crop_by_itself(
    small: Prepared2, tmp_path: Path, method: str
) -> None:
    workspace = small.run.workspace if method == "lora" else tmp_path  # where it is already
    lora = trained(workspace, METHODS[method])
    remakes = small.remade(workspace, stage1_lora=lora)
    rows, made = live_rows(small.made["stage2_pixels"]), live_rows(remakes)
    assert len({(row["width"], row["height"]) for row in rows}) == 3 and len(rows) == len(made) == 5
    shown = rows if method == "lora" else rows[:1] + rows[-1:]
    pipeline, base = stock(lora.path, method), stock(small.made["stage1_lora"].path, "base")
    for row, own in zip(rows, made, strict=True):
        assert (own["width"], own["height"]) == (row["width"] // 4, row["height"] // 4)
        same = ("image_id", "repeat", "source", "caption", "dataset_id", "crop_left")
        assert [own[name] for name in same] == [row[name] for name in same]
        if row in shown:
            found = pixels_of(own).astype(int)
            assert np.abs(found - resampled(pipeline, row)).max() <= 1
    found = pixels_of(made[0]).astype(int)
    assert np.abs(found - resampled(base, rows[0])).mean() > 2, "what was trained counts"


def test_no_two_crops_of_a_picture_are_remade_alike_and_the_sheet_shows_each_beside_its_truth(
    small: Prepared2, remakes: Artifact
) -> None:
    rows, made = live_rows(small.made["stage2_pixels"]), live_rows(remakes)
    assert len({own["pixels"] for own in made}) == len(made) == 5, "two passes drew the same crop"
    with Image.open(remakes.path / "sheet.jpg") as sheet:
        assert sheet.size == (8 * 70 + 6, 2 * 70 + 6)
        seen = np.asarray(sheet, int)
    for number in range(4):  # at the middle of each cell
        left, right = (seen[38, 6 + 70 * (2 * number + k) + 32] for k in (0, 1))
        true, own = downscaled(rows[number])[0].permute(1, 2, 0).numpy(), pixels_of(made[number])
        middle = true.shape[0] // 2, true.shape[1] // 2
        assert np.abs(left - (true[middle] + 1) * 127.5).max() < 40
        assert np.abs(right - own[middle].astype(int)).max() < 60


@pytest.mark.slow
def test_a_killed_build_goes_on_behind_its_last_shard_and_ends_with_the_same_bytes(
    small: Prepared2, remakes: Artifact, tmp_path: Path
) -> None:
    finished: list[Path] = []

    def finish_two_and_die(path: Path) -> None:
        finish_part(path)
        finished.append(path)
        if len(finished) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    def killed() -> None:
        stage1_low_res.finish_part = finish_two_and_die  # type: ignore[assignment, attr-defined]
        small.remade(tmp_path)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    (folder,) = (tmp_path / "stage2_low_res").iterdir()
    left = sorted(path.name for path in folder.glob("*.parquet"))
    assert left == ["stage2-000000.parquet", "stage2-000001.parquet"]
    damaged = folder / left[1]
    damaged.write_bytes(damaged.read_bytes()[:-100] + b"x" * 100)
    after = small.remade(tmp_path)
    assert after.hashes == remakes.hashes and len(after.hashes) == 3 + 2
    assert after.manifest.summary["sampled_by_this_process"] == 3, "the damaged shard and the one that was not there"
    assert remakes.manifest.summary["sampled_by_this_process"] == remakes.manifest.summary["rows"] == 5


@pytest.mark.parametrize("shard_rows", [1, 512])
def test_every_row_has_its_own_remake_however_shards_and_batches_are_cut(
    small: Prepared2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_rows: int
) -> None:
    """With a Stage I that gives back what it is given."""
    monkeypatch.setattr(stage1_low_res, "SHARD_ROWS", shard_rows)
    monkeypatch.setitem(STAGES, 1, replace(STAGES[1], sample_batch=1))
    monkeypatch.setattr(stage1_low_res, "make_sampler", lambda *_: None)
    monkeypatch.setattr(stage1_low_res, "sample_from_text", lambda *_, start: start.pictures)
    made = small.remade(tmp_path)
    assert made.manifest.summary["shards"] == {1: 5, 512: 3}[shard_rows]
    for row, own in zip(live_rows(small.made["stage2_pixels"]), live_rows(made), strict=True):
        true = (downscaled(row)[0].permute(1, 2, 0).numpy() + 1) * 127.5
        assert np.abs(pixels_of(own) - true).max() < 0.51


def test_the_order_of_rows_does_not_depend_on_how_the_pixels_lie_in_their_shards(
    small: Prepared2, remakes: Artifact
) -> None:
    rows, own = (read_row_list(one.path) for one in (small.made["stage2_pixels"], remakes))
    for name in ("key", "image_id", "dataset_id", "caption_id"):
        assert own[name].equals(rows[name])
    assert sorted(zip(own["file"].to_pylist(), own["place"].to_pylist(), strict=True)) == list(
        zip(own["file"].to_pylist(), own["place"].to_pylist(), strict=True)
    )
    with pytest.raises(ValueError, match="are not those of"):
        TrainingRows(small.made["stage2_pixels"], frozenset(), remakes=small.made["stage1_pixels"])


class FedToUNet(Exception):
    """Ends a forward pass where it begins."""


@pytest.fixture(scope="module")
def unet() -> Iterator[UNet2DConditionModel]:
    yield load_unet(FOLDERS[2], torch.float32)


def fed(unet: UNet2DConditionModel, batch: Batch, number: int, **keys: Any) -> tuple[Prepared, torch.Tensor]:
    """A forward pass of training, and what the UNet gets in it."""
    config = StageConfig.model_validate({**STAGE2, "random_flip": True, **keys})
    context = TrainingContext(
        2, config, 7, unet, load_scheduler(FOLDERS[2]), load_scheduler(FOLDERS[2], "image_noising_scheduler"),
        lambda names: Text(torch.zeros(len(names), 3, unet.config.encoder_hid_dim)), torch.device("cpu"), Path(),
    )  # fmt: skip
    got: list[torch.Tensor] = []

    def hook(module: torch.nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        got.append(positional[0])
        raise FedToUNet

    ready = prepare(context, batch, number, ["picture"] * len(batch.pixels))
    handle = unet.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with pytest.raises(FedToUNet):
            predict_noise(context, ready.fed)
    finally:
        handle.remove()
    return ready, got[0]


def batches(small: Prepared2, remakes: Artifact) -> Iterator[tuple[Batch, torch.Tensor, torch.Tensor]]:
    """A batch of each size; its true low-res pictures and their remakes by the Parquet files' own columns, in [-1, 1]."""
    rows = TrainingRows(small.made["stage2_pixels"], frozenset(), remakes=remakes)
    listed = live_rows(small.made["stage2_pixels"])
    named = {(row["image_id"], row["repeat"]): pixels_of(row) for row in live_rows(remakes)}
    for size, count in rows.counts.items():
        batch = rows.take(size, np.arange(count)[::-1])
        own = [listed[row] for row in batch.rows.tolist()]
        made = np.stack([named[row["image_id"], row["repeat"]] for row in own])
        true = torch.cat([downscaled(row) for row in own])
        yield batch, true, torch.from_numpy(made).permute(0, 3, 1, 2).float() / 127.5 - 1


def upscaled(small: torch.Tensor, ready: Prepared) -> torch.Tensor:
    """The second half of the UNet's input, mirrored first."""
    draws = ready.draws
    seen = torch.stack([one.flip(-1) if flip else one for one, flip in zip(small, draws.mirror.tolist(), strict=True)])
    if draws.degradation is not None:
        seen = degrade(seen, draws.degradation)
    large = F.interpolate(seen, draws.noise.shape[-2:], mode="bilinear", align_corners=True)
    noising = load_scheduler(FOLDERS[2], "image_noising_scheduler")
    return torch.as_tensor(noising.add_noise(large, draws.low_res_noise, draws.level))


@pytest.mark.parametrize("keys", [{}, {"low_res_blur": 1.5, "low_res_noise": 20.0, "low_res_jpeg_quality": 30}])
def test_with_a_share_of_1_the_unet_is_fed_the_remakes_alone(
    small: Prepared2, remakes: Artifact, unet: UNet2DConditionModel, keys: dict[str, Any]
) -> None:
    flips = set()
    for batch, true, made in batches(small, remakes):
        for number in range(4):
            ready, x = fed(unet, batch, number, **keys)
            assert torch.equal(x[:, 3:], upscaled(made, ready))
            assert not torch.allclose(x[:, 3:], upscaled(true, ready), atol=1e-2)
            flips |= set(ready.draws.mirror.tolist())
    assert flips == {True, False}


def test_a_share_of_a_half_mixes_both_and_changes_nothing_else(
    small: Prepared2, remakes: Artifact, unet: UNet2DConditionModel
) -> None:
    taken = []
    for batch, true, made in batches(small, remakes):
        for number in range(8):
            plain, before = fed(unet, replace(batch, remakes=None), number, low_res_stage1_share=0.0,
                                low_res_stage1_strength=0.3)  # fmt: skip
            ready, x = fed(unet, batch, number, low_res_stage1_share=0.5)
            assert plain.draws.remade is None and ready.draws.remade is not None
            for name in ("noise", "low_res_noise", "t", "level", "keep_caption", "mirror"):
                assert torch.equal(getattr(plain.draws, name), getattr(ready.draws, name))
            assert torch.equal(before[:, :3], x[:, :3])
            assert torch.allclose(before[:, 3:], upscaled(true, plain), atol=1e-5)
            drawn = ready.draws.remade
            assert torch.equal(x[~drawn, 3:], before[~drawn, 3:])
            assert torch.equal(x[drawn, 3:], upscaled(made, ready)[drawn])
            taken += drawn.tolist()
    assert 0.3 < np.mean(taken) < 0.7


def test_windows_are_cut_out_of_the_same_place_of_both(
    small: Prepared2, remakes: Artifact, unet: UNet2DConditionModel
) -> None:
    for batch, _, made in batches(small, remakes):
        ready, x = fed(unet, batch, 1, stage2_patch=64)
        assert x.shape[-2:] == (64, 64)
        assert torch.equal(x[:, 3:], ready.draws.cut(upscaled(made, ready)))


def test_which_samples_are_remade_is_a_function_of_seed_and_number() -> None:
    config, shape = StageConfig.model_validate({**STAGE2, "low_res_stage1_share": 0.5}), torch.Size((64, 3, 8, 8))
    drawn = [vary(draw(shape, 1, number, 0.1), config, 1, number).remade for number in (3, 3, 4)]
    assert all(one is not None for one in drawn)
    first, again, other = (one for one in drawn if one is not None)
    assert torch.equal(first, again) and not torch.equal(first, other) and 0 < int(first.sum()) < 64


def test_losses_on_the_grid_are_of_true_low_res_pictures(
    small: Prepared2, remakes: Artifact, unet: UNet2DConditionModel
) -> None:
    """They are fed without remakes: by plain draws, which take none."""
    batch, true, _ = next(batches(small, remakes))
    ready, _ = fed(unet, batch, 0)
    context = TrainingContext(
        2, StageConfig.model_validate(STAGE2), 7, unet, load_scheduler(FOLDERS[2]),
        load_scheduler(FOLDERS[2], "image_noising_scheduler"), lambda names: Text(torch.zeros(len(names), 3, 8)),
        torch.device("cpu"), Path(),
    )  # fmt: skip
    draws = replace(draw(ready.x_0.shape, 5, 0, 0.0), mirror=ready.draws.mirror)
    given = feed(context, ready.x_0, draws, [None] * len(true))
    assert torch.allclose(given.x[:, 3:], upscaled(true, replace(ready, draws=draws)), atol=1e-5)


def test_identities_hold_what_decides_the_bytes(small: Prepared2, remakes: Artifact) -> None:
    def remake_id(*, lora: Artifact | None = None, **keys: Any) -> str:
        stages = {name: dict(small.run.config.model_dump()[name]) for name in ("stage1", "stage2")}
        for key, value in list(keys.items()):
            if "__" in key:
                stage, own = key.split("__")
                stages[stage][own] = value
                del keys[key]
        config = small.run.config.model_validate({**small.run.config.model_dump(), **stages, **keys})
        inputs = small.inputs(**({"stage1_lora": lora} if lora else {}))
        return low_res_request(replace(small.run, config=config), 2, FOLDERS[1], inputs).fingerprint

    changed = [
        remake_id(),
        remake_id(seed=43),
        remake_id(validation_negative_prompt="blurred"),
        remake_id(stage2__low_res_stage1_strength=0.9),
        remake_id(stage1__validation_guidance=3.0),
        remake_id(stage1__validation_num_inference_steps=4),
        remake_id(stage1__mixed_precision="bf16"),
        remake_id(lora=small.made["stage2_pixels"]),
    ]
    assert len(set(changed)) == len(changed) and changed[0] == remakes.fingerprint
    assert remake_id(stage2__low_res_stage1_share=0.5, stage2__low_res_blur=1.0, validation_prompt="x") == changed[0]


def test_a_lora_has_the_share_of_remakes_and_the_remakes_but_not_how_they_are_made(
    small: Prepared2, remakes: Artifact
) -> None:
    made = TrainingInputs(
        pixels=small.made["stage2_pixels"], text=small.made["text_embeds"], eval_set=small.made["eval_set"]
    )

    def request(inputs: TrainingInputs[Artifact], **keys: Any) -> Request:
        config = small.run.config.model_dump()
        config["stage2"] |= keys
        run = replace(small.run, config=small.run.config.model_validate(config))
        return lora_request(run, 2, FOLDERS[2], inputs)

    off = request(made, low_res_stage1_share=0.0, low_res_stage1_strength=0.3)
    assert "low_res" not in off.inputs
    assert [key for key in off.spec if key.startswith("low_res_stage1")] == ["low_res_stage1_share"]
    on = request(replace(made, low_res=remakes))
    assert on.spec["low_res_stage1_share"] == 1.0 and on.inputs["low_res"] == f"stage2_low_res/{remakes.fingerprint}"
    half = request(replace(made, low_res=remakes), low_res_stage1_share=0.5)
    assert len({one.fingerprint for one in (off, on, half)}) == 3


BOTH: dict[str, dict[str, Any]] = {
    "stage1": {"model_flavour": "tiny-i"},
    "stage2": {"model_flavour": "tiny-ii", "low_res_stage1_share": 0.5},
}


@pytest.mark.parametrize(
    ("keys", "entry", "says"),
    [
        ({"stage1": {"model_flavour": "tiny-i", "controlnet": True, "controlnet_conditioning": "grayscale"}}, {},
         "stage1.controlnet is True: it needs conditioning pictures, and Stage II's crops have none"),
        ({"stage1": {"model_flavour": "tiny-i", "validation_num_inference_steps": 3}}, {},
         "num_inference_steps is 3, of which stage2.low_res_stage1_strength = 0.3 is less than one step. Use more"),
        ({"stage1": {"model_flavour": "tiny-i", "low_res_stage1_share": 0.5}}, {},
         "low_res_stage1_share is 0.5, and tiny-i is a Stage I model. Put it into [stage2]"),
        ({"stage1": {"model_flavour": "tiny-i", "low_res_stage1_strength": 0.5}}, {},
         "low_res_stage1_strength is 0.5, and tiny-i is a Stage I model. Put it into [stage2]"),
        ({"stage2": {"model_flavour": "tiny-ii", "low_res_stage1_strength": 0.5}}, {},
         "low_res_stage1_strength is 0.5, without effect while low_res_stage1_share is 0. Remove it, or set"),
        ({"stage2": {"model_flavour": "tiny-ii", "low_res_stage1_share": 1.5}}, {}, "low_res_stage1_share"),
        ({"stage2": {**BOTH["stage2"], "low_res_stage1_strength": 0.0}}, {}, "low_res_stage1_strength"),
        ({}, {"resolution": 256, "minimum_image_size": 256},
         "feeds Stage II alone (its resolution is 256): Stage I would remake crops that it was not trained on"),
    ],
)  # fmt: skip
def test_settings_under_which_stage1_cannot_remake_are_refused(
    world: DataWorld, keys: dict[str, Any], entry: dict[str, Any], says: str
) -> None:
    entries = [{}, {"id": "large", **entry}] if entry else [{}]
    with pytest.raises(ConfigError) as caught:
        world.load(*entries, **{**BOTH, **keys})
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_run_without_stage1_has_none_to_remake(world: DataWorld) -> None:
    with pytest.raises(ConfigError, match=r"share is 0.5, and the run has no Stage I .* Add a \[stage1\] table"):
        world.load(stages=(2,), stage2=BOTH["stage2"])
    assert world.load(stages=(1, 2), **BOTH).config.stage(2).remakes_low_res
    assert not world.load().config.stage(2).remakes_low_res


@pytest.mark.slow
def test_a_killed_training_on_remakes_ends_with_the_bytes_of_an_unbroken_one(
    small: Prepared2, remakes: Artifact, tmp_path: Path
) -> None:
    keys = {
        "max_train_steps": 6,
        "checkpoint_step_interval": 1,
        "train_batch_size": 2,
        "stage2_patch": 64,
        "random_flip": True,
    }

    def run(share: float) -> Run:
        strength = (
            small.run.config.stage(2).low_res_stage1_strength
            if share
            else StageConfig.model_fields["low_res_stage1_strength"].default
        )
        remade = {"low_res_stage1_share": share, "low_res_stage1_strength": strength}
        stage2 = small.run.config.stage(2).model_copy(update={**keys, **remade})
        return replace(small.run, config=small.run.config.model_copy(update={"stage2": stage2}))

    half, made = run(0.5), small.made | {"stage2_low_res": remakes}
    whole = train_stage(half, made, 2, tmp_path / "whole", how=run_here)
    train_and_kill(half, made, 2, tmp_path / "broken", 2)
    resumed = train_stage(half, made, 2, tmp_path / "broken", how=run_here)
    assert resumed.manifest.summary["steps_of_this_process"] < 6 and resumed.hashes == whole.hashes
    plain = train_stage(run(0.0), small.made, 2, tmp_path / "plain", how=run_here)
    lora = "pytorch_lora_weights.safetensors"
    assert plain.hashes[lora] != whole.hashes[lora]
    assert plain.manifest.summary["eval_loss_base"] == whole.manifest.summary["eval_loss_base"], (
        "measured on true low-res pictures"
    )


@pytest.mark.slow
def test_a_run_trains_stage2_on_stage1s_pictures_and_the_next_one_reuses_them(
    server: str, tmp_path: Path, new_small_run: Callable[[Path], SmallRun]
) -> None:
    """Through the command line: Stage II alone, the whole run, the same again, another strength."""
    run = new_small_run(tmp_path / "run")
    keys = [
        f"--set={key}" for key in ("stage2.low_res_stage1_share=0.5", "stage2.low_res_stage1_strength=0.5",
                                   "stage1.max_train_steps=3", "stage1.validation_step_interval=0",
                                   "stage2.max_train_steps=2")
    ]  # fmt: skip

    def made() -> set[str]:
        return finished_names(run.workspace)

    first = run.call_here("train-stage2", str(run.config), *keys)
    assert first.returncode == 0, first.stderr
    trained = made()
    assert {name.split("/")[0] for name in trained} == {
        "image_index", "text_embeds", "stage1_text", "stage2_text", "stage1_pixels", "stage2_pixels", "eval_set",
        "stage1_lora", "stage2_low_res", "stage2_lora",
    }  # fmt: skip
    whole = run.call_here("run", str(run.config), *keys)
    assert whole.returncode == 0, whole.stderr
    assert {name.split("/")[0] for name in made() - trained} == {"cascade_samples", "lora_bundle"}
    before = made()
    again = run.call_here("run", str(run.config), *keys)
    assert again.returncode == 0 and made() == before and ": built" not in again.stdout + again.stderr
    assert run.call_here("verify", str(run.workspace)).returncode == 0

    loaded = load_run(run.config, tuple(key.removeprefix("--set=") for key in keys))
    (folder,) = (run.workspace / "stage2_low_res").iterdir()
    remakes = Artifact("stage2_low_res", folder.name, folder)
    inputs = remakes.manifest.inputs
    assert inputs["stage1_lora"] in before
    assert planned_name(run, keys) in before, "what is made is known before it is"
    assert remakes.manifest.spec["strength"] == 0.5 and loaded.config.stage(2).remakes_low_res
    assert remakes.manifest.summary["rows"] == 16 and len(live_rows(remakes)) == 16

    off = run.call_here("train-stage2", str(run.config), *keys[2:])
    assert off.returncode == 0, off.stderr
    assert {name.split("/")[0] for name in made() - before} == {"stage2_lora"}
    before = made()
    other = run.call_here(
        "train-stage2", str(run.config), keys[0], "--set=stage2.low_res_stage1_strength=1.0", *keys[2:]
    )
    assert other.returncode == 0, other.stderr
    assert sorted(name.split("/")[0] for name in made() - before) == ["stage2_lora", "stage2_low_res"]

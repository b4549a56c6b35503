"""What each key says that a change of it rebuilds, held against the identities of the artifacts themselves."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import numpy as np
import pytest
from data_world import DataWorld
from PIL import Image

from deepfloyd_core.bundle.planned import planned
from deepfloyd_core.config.base import Spec, parse_spec
from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.config.keys import Reader, belongings, effects, keys_of
from deepfloyd_core.config.run import Run, RunConfig
from deepfloyd_core.config.source_keys import SourceKeys
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stage3 import Stage3Config
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.index.identity import index_request
from deepfloyd_core.index.scan import scan
from deepfloyd_core.models.folders import resolve
from deepfloyd_core.preflight.generate import GenerateOptions, pictures_of
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.sampling.identity import generate_request
from deepfloyd_core.sampling.stage3_jobs import stage3_of
from deepfloyd_core.store.artifacts import Request

# Another value, where it does not follow from the key's type; and what else must then be set.
OTHER: dict[str, Any] = {
    "num_eval_images": 2, "aspect_bucket_alignment": 16, "aspect_bucket_rounding": 2, "tokenizer_max_length": 80,
    "eval_dataset_id": "set", "validation_prompt": "a star", "validation_negative_prompt": "gray",
    "validation_resolution": "96x64",
    "lora_alpha": 3.0, "lora_target_modules": ["to_q"], "lr_end": 1e-6, "lr_scheduler": "linear", "snr_gamma": 5.0,
    "low_res_jpeg_quality": 50, "stage2_patch": 128, "validation_noise_levels": [50], "use_bitfit": True,
    "dynamo_backend": "aot_eager", "lr_warmup_steps": 2, "noise_level_begin": 100, "noise_level_end": 900,
    "timestep_bias_begin": 100, "timestep_bias_multiplier": 3.0, "timestep_bias_end": 500, "timestep_bias_strategy": "later",
    "ema_decay": 0.9,
    "resolution": 96, "minimum_image_size": 32, "maximum_image_size": 640, "target_downsample_size": 128,
    "minimum_aspect_ratio": 0.1, "maximum_aspect_ratio": 9.0, "crop_aspect_buckets": [1.0, 0.75], "max_num_samples": 5,
    "end_step": 500, "instance_prompt": "drawn", "caption_filter_list": ["x"], "caption_shuffle": {"enable": True},
    "caption_strategy": "textfile", "crop_aspect": "preserve", "optimizer": "adamw_bf16", "resolution_type": "pixel_area",
    "probability": 0.5, "random_crops": 3, "embed_file_mib": 8.0, "shard_mib": 8.0,
    "train_batch_size": 2, "attention_mechanism": "math", "max_train_steps": 500, "checkpointing_minutes": 5.0,
    "num_threads": 2, "micro_batch_size": 2, "sample_batch_size": 1, "workspace_cache_dir": "/cache",
    "workspace_cache_gib": 5.0,
}  # fmt: skip
BIAS: dict[str, Any] = {"timestep_bias_strategy": "range", "timestep_bias_multiplier": 2.0, "timestep_bias_end": 600}
SAMPLING: dict[str, Any] = {
    "scheduled_sampling_probability": 0.5, "scheduled_sampling_max_step_offset": 20, "snr_gamma": 5.0,
}  # fmt: skip
WITH: dict[str, dict[str, Any]] = {
    "ema_decay": {"use_ema": True},
    "input_perturbation_steps": {"input_perturbation": 0.1},
    "low_res_degraded_share": {"low_res_blur": 1.0},
    "timestep_bias_strategy": {**BIAS, "timestep_bias_strategy": "earlier", "timestep_bias_end": 1000},
    "timestep_bias_multiplier": BIAS,
    "timestep_bias_portion": {"timestep_bias_strategy": "earlier", "timestep_bias_multiplier": 2.0},
    "timestep_bias_begin": BIAS,
    "timestep_bias_end": BIAS,
    "scheduled_sampling_max_step_offset": SAMPLING,
    "scheduled_sampling_probability": SAMPLING,
    "maximum_image_size": {"maximum_image_size": 320, "target_downsample_size": 64},
    "target_downsample_size": {"maximum_image_size": 320, "target_downsample_size": 64},
    "prepend_instance_prompt": {"instance_prompt": "drawn"},
    "only_instance_prompt": {"instance_prompt": "drawn"},
}  # fmt: skip
# What needs another model, an extra or other files, and has tests of its own.
ELSEWHERE = {
    "workspace", "model_flavour", "base_model_precision", "num_train_epochs", "controlnet", "controlnet_conditioning",
    "text_encoder_quantization", "report_to", "sample_measure", "parquet", "task_runner_address",
    "warm_new_share",
}  # fmt: skip
KINDS: dict[Reader, str] = {
    "index": "image_index", "pixels": "pixels", "eval_set": "eval_set", "embeds": "text_embeds", "low_res": "low_res",
    "lora": "lora", "validation": "lora", "samples": "cascade_samples", "generated": "generated",
}  # fmt: skip
A_STAR = GenerateOptions(("a star",), "latest", seeds="3")
STAGES: dict[str, dict[str, Any]] = {
    "stage1": {"model_flavour": "tiny-i", "validation_step_interval": 5},
    "stage2": {"model_flavour": "tiny-ii", "validation_step_interval": 5, "low_res_stage1_share": 0.5},
    "stage3": {"model_flavour": "tiny-iii"},
}


class Case(NamedTuple):
    """A key of a model, and where a run's files have it."""

    model: type[Spec]
    name: str
    table: str  # of the run file; empty: its top level, or the data file

    @property
    def together(self) -> dict[str, Any]:
        """What else must be set for the key to have an effect."""
        needed = {other: values[0] for name, other, values in belongings(self.model) if name == self.name}
        return {**needed, **WITH.get(self.name, {})}


def cases() -> Iterator[Case]:
    """All keys that some artifact reads as they are, or none does."""
    for model in (RunConfig, StageConfig, Stage3Config, ImageDataset):
        for name, effect in effects(model).items():
            if name not in ELSEWHERE and not {"all", "content"} & {*effect.makes}:
                tables = {StageConfig: f"stage{effect.stages[0]}", Stage3Config: "stage3"}
                yield Case(model, name, tables.get(model, ""))


def other_value(case: Case, now: Any) -> Any:
    """One that the key does not have."""
    if case.name in OTHER:
        return OTHER[case.name]
    annotation = case.model.model_fields[case.name].annotation
    if get_origin(annotation) is Literal:
        return next(value for value in get_args(annotation) if value != now)
    if isinstance(now, bool):
        return not now
    return now + 1 if isinstance(now, int) else now / 2 or 0.5


@pytest.fixture(scope="module")
def requests_of(
    tmp_path_factory: pytest.TempPathFactory, new_world: Callable[[Path], DataWorld]
) -> Callable[..., dict[str, Request]]:
    """Writes a run of two data sets with some keys, and gives what it would make. The index is the same for all."""
    folder = tmp_path_factory.mktemp("keys")
    for name, count in {"set": 10, "other": 9}.items():
        (folder / name).mkdir()
        for number in range(count):
            cells = np.random.default_rng(100 * count + number).integers(0, 256, (4, 4, 3), np.uint8)
            pixels = cells.repeat(64, 0).repeat(72, 1)
            Image.fromarray(pixels).save(folder / name / f"{name} {number}.png")

    def load(run_keys: dict[str, Any], stage_keys: dict[str, dict[str, Any]], set_keys: dict[str, Any]) -> Run:
        sets = [{"id": name, "type": "local", "instance_data_dir": str(folder / name)} for name in ("set", "other")]
        (folder / "data.json").write_text(json.dumps([{**sets[0], **set_keys}, sets[1]]))
        where = {"workspace": str(folder / "workspace"), "data_backend_config": str(folder / "data.json")}
        tables = {table: {**keys, **stage_keys.get(table, {})} for table, keys in STAGES.items()}
        (folder / "run.json").write_text(json.dumps({**where, **run_keys, **tables}))
        return load_run(folder / "run.json")

    index = new_world(folder / "workspace").index(load({}, {}, {}))

    def requests(case: Case, keys: dict[str, Any]) -> dict[str, Request]:
        run_keys, set_keys = (keys if case.model is model else {} for model in (RunConfig, ImageDataset))
        run = load(run_keys, {case.table: keys}, set_keys)
        found = planned(run, index)
        assert found is not None
        folders = {stage: resolve(run.config.stage(stage).model, stage, text=stage == 1) for stage in run.config.stages}
        found["generated"] = generate_request(
            run, pictures_of(run, A_STAR), "latest", folders, None, stage3=stage3_of(run.config)
        )
        return {**found, "image_index": index_request(run, scan(run))}

    return requests


def read_anew(before: dict[str, Request], after: dict[str, Request]) -> set[str]:
    """The kinds, whatever their stage, whose own settings differ; of the eval set also the pictures chosen."""
    own = {
        kind: [request.spec, request.inputs if kind == "eval_set" else None]
        for kind, request in before.items()
        if not kind.endswith(
            "_text"
        )  # it has the embeds' settings in its own, and is not there when the text is trained
    }
    now = {kind: [after[kind].spec, after[kind].inputs if kind == "eval_set" else None] for kind in own}
    return {kind.split("_", 1)[1] if kind[:5] == "stage" else kind for kind in own if own[kind] != now[kind]}


@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case.model.__name__}.{case.name}")
def test_a_change_of_a_key_is_read_by_what_it_says(case: Case, requests_of: Callable[..., dict[str, Request]]) -> None:
    default = {**STAGES.get(case.table, {}), **case.together}.get(case.name, case.model.model_fields[case.name].default)
    before = requests_of(case, case.together)
    after = requests_of(case, {**case.together, case.name: other_value(case, default)})
    said = effects(case.model)[case.name].makes
    assert read_anew(before, after) == {KINDS[reader] for reader in said if reader in KINDS}


def test_what_decides_a_verdict_is_a_part_of_the_index() -> None:
    assert keys_of(ImageDataset, "verdict") < keys_of(ImageDataset, "index")


@pytest.mark.parametrize("model", [RunConfig, StageConfig, Stage3Config, SourceKeys, ImageDataset])
def test_every_key_says_what_a_change_of_it_makes_anew(model: type[Spec]) -> None:
    assert set(model.model_fields) - set(effects(model)) <= {"stage1", "stage2", "stage3"}


def test_a_stage_tells_all_that_contradicts_in_it_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_spec(
            StageConfig,
            {"model_flavour": "tiny-i", "huber_c": 0.5, "lr_power": 3.0, "low_res_blur": 1.0, "lr_end": 0.5},
            "run.toml: stage1",
        )
    lines = str(caught.value).splitlines()
    assert {line.split()[2] for line in lines} == {"lr_end", "lr_power", "huber_c", "low_res_blur"}

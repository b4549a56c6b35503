"""The run file and the data file: what is accepted unchanged, what is refused and in which words, and how fast."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from deepfloyd_core.config import stage_optimizer
from deepfloyd_core.config.data_blocks import CaptionTable
from deepfloyd_core.config.data_sets import ConditioningSet, ImageDataset, TextEmbedBackend
from deepfloyd_core.config.run import Run, RunConfig
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stage_method import ATTENTION_TARGETS
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.pictures.geometry import geometry, plan_crops
from deepfloyd_core.preflight.load import NO_DATA, load_run
from deepfloyd_core.training.schedule import learning_rate_at
from flows.commands import cli

ours = settings(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))

# The settings that SimpleTuner's guide to DeepFloyd prints, its comment lines included.
GUIDE_DATA_FILE = """
[
    {
        "id": "primary-dataset",
        "type": "local",
        "crop": true,
        "crop_aspect": "square",
        "crop_style": "random",
        # Pictures whose shorter edge is below 64 px are left out.
        "minimum_image_size": 64,
        "maximum_image_size": 256,
        "target_downsample_size": 128,
        "resolution": 64,
        "resolution_type": "pixel",
        "prepend_instance_prompt": false,
        "instance_prompt": "something special to you",
        "only_instance_prompt": false,
        "caption_strategy": "textfile",
        "instance_data_dir": "PICTURES",
        "cache_dir_vae": "/path/to/vae_cache",
        "repeats": 1
    },
    {
        "id": "an example backend for text embeds.",
        "dataset_type": "text_embeds",
        "default": true,
        "disable": false,
        "type": "local",
        "cache_dir": "/path/to/text_cache"
    }
]
"""
# Lowest and highest legal value of every number in a stage; None: no limit. Written down here a second time on purpose.
STAGE_BOUNDS: dict[str, tuple[type, float | None, float | None]] = {
    "lora_rank": (int, 1, 256),
    "lora_dropout": (float, 0, math.nextafter(1, 0)),
    "lora_alpha": (float, 5e-324, None),
    "learning_rate": (float, 5e-324, 1),
    "lr_end": (float, 0, None),
    "lr_warmup_steps": (int, 0, None),
    "lr_num_cycles": (int, 1, 10_000),
    "lr_power": (float, 5e-324, 100),
    "max_train_steps": (int, 1, None),
    "num_train_epochs": (int, 1, None),
    "train_batch_size": (int, 1, 4096),
    "gradient_accumulation_steps": (int, 1, 1024),
    "max_grad_norm": (float, 0, None),
    "micro_batch_size": (int, 1, None),
    "sample_batch_size": (int, 1, None),
    "dataloader_num_workers": (int, 0, 16),
    "adam_beta1": (float, 0, math.nextafter(1, 0)),
    "adam_beta2": (float, 0, math.nextafter(1, 0)),
    "adam_epsilon": (float, 5e-324, None),
    "adam_weight_decay": (float, 0, None),
    "huber_c": (float, 5e-324, 1),
    "snr_gamma": (float, 5e-324, None),
    "soft_min_snr_sigma_data": (float, 5e-324, 1000),
    "noise_offset": (float, 5e-324, 1),
    "noise_offset_probability": (float, 5e-324, 1),
    "input_perturbation": (float, 0, 1),
    "input_perturbation_steps": (int, 0, None),
    "scheduled_sampling_max_step_offset": (int, 0, 999),
    "scheduled_sampling_probability": (float, 0, 1),
    "timestep_bias_multiplier": (float, 5e-324, 1000),
    "timestep_bias_portion": (float, 0.001, math.nextafter(1, 0)),
    "timestep_bias_begin": (int, 0, 999),
    "timestep_bias_end": (int, 1, 1000),
    "caption_dropout_probability": (float, 0, 1),
    "ema_decay": (float, 0, math.nextafter(1, 0)),
    "checkpoint_step_interval": (int, 1, None),
    "checkpointing_minutes": (float, 5e-324, None),
    "checkpoints_total_limit": (int, 1, None),
    "validation_step_interval": (int, 0, None),
    "validation_num_inference_steps": (int, 1, 1000),
    "validation_guidance": (float, 1, None),
    "validation_noise_level": (int, 0, 999),
    "noise_level_begin": (int, 0, 999),
    "noise_level_end": (int, 1, 1000),
    "low_res_blur": (float, 0, 4),
    "low_res_noise": (float, 0, 64),
    "low_res_jpeg_quality": (int, 1, 100),
    "low_res_degraded_share": (float, 5e-324, 1),
    "low_res_stage1_share": (float, 0, 1),
    "low_res_stage1_strength": (float, 5e-324, 1),
}
RUN_BOUNDS: dict[str, tuple[type, float | None, float | None]] = {
    "seed": (int, 0, 2**32 - 1),
    "max_rejected_share": (float, 0, 1),
    "num_eval_images": (int, 0, None),
    "gate_tolerance": (float, 0, math.nextafter(1, 0)),
    "retrain_min_new_pictures": (int, 0, None),
    "retrain_min_days": (float, 0, 3650),
    "warm_new_share": (float, 5e-324, math.nextafter(1, 0)),
    "shard_mib": (float, 0.1, 1024),
    "aspect_bucket_rounding": (int, 1, 9),
    "tokenizer_max_length": (int, 77, 512),
    "embed_file_mib": (float, 0.1, 4096),
    "embed_batch_size": (int, 1, 4096),
    "workspace_cache_gib": (float, 5e-324, 1e6),
    "embed_workers": (int, 1, 64),
    "sample_workers": (int, 1, 64),
    "validation_seed": (int, 0, 2**32 - 1),
    "num_validation_images": (int, 1, 4096),
    "num_upscaled_images": (int, 1, 4096),
    "forgetting_probes": (int, 0, 12),
    "workers": (int, 1, 256),
    "decode_memory_mib": (int, 256, None),
    "decode_timeout_s": (float, 5e-324, 86_400),
    "num_threads": (int, 1, None),
}
DATA_BOUNDS: dict[str, tuple[type, float | None, float | None]] = {
    "resolution": (float, 5e-324, 2048),
    "minimum_image_size": (float, 0, None),
    "maximum_image_size": (float, 5e-324, None),
    "target_downsample_size": (float, 5e-324, None),
    "minimum_aspect_ratio": (float, 5e-324, None),
    "maximum_aspect_ratio": (float, 5e-324, None),
    "repeats": (int, 0, 10_000),
    "random_crops": (int, 1, 10_001),
    "probability": (float, 5e-324, 1e6),
    "max_num_samples": (int, 1, None),
    "start_step": (int, 0, None),
    "end_step": (int, 1, None),
}


class Files:
    """A run file, its data file and its directory of pictures, rewritten for each case."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "pictures").mkdir()

    def data(self, *entries: dict[str, Any], **keys: Any) -> str:
        path = self.folder / "data.json"
        entry = {"id": "set", "type": "local", "instance_data_dir": str(self.folder / "pictures"), **keys}
        path.write_text(json.dumps([entry, *entries]))
        return str(path)

    def load(self, run: dict[str, Any], *overrides: str, suffix: str = ".json") -> Run:
        """Load a run file; `workspace` and a good data file are filled in unless given."""
        if not (self.folder / "data.json").exists():
            self.data()
        path = self.folder / f"run{suffix}"
        path.write_text(json.dumps({"workspace": "w", "data_backend_config": str(self.folder / "data.json"), **run}))
        return load_run(path, overrides)

    def refusal(self, run: dict[str, Any], *overrides: str) -> str:
        """The message with which a run file is refused."""
        with pytest.raises(ConfigError) as caught:
            self.load(run, *overrides)
        assert "?." not in str(caught.value)
        assert ".." not in str(caught.value)
        return str(caught.value)

    def data_refusal(self, *entries: dict[str, Any], **keys: Any) -> str:
        """The message with which a data file is refused."""
        self.data(*entries, **keys)
        return self.refusal(BOTH)


BOTH = {"stage1": {"model_flavour": "tiny-i"}, "stage2": {"model_flavour": "tiny-ii"}}
TINY_I = {"stage1": {"model_flavour": "tiny-i"}}
TINY_II = {"stage2": {"model_flavour": "tiny-ii"}}


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


# ---- forms of the file --------------------------------------------------------------------------------------------


def test_toml_and_json_of_the_same_settings_give_the_same_run(files: Files) -> None:
    data = files.data()
    (files.folder / "run.toml").write_text(
        f"""
        workspace = "w"
        data_backend_config = "{data}"
        seed = 7
        learning_rate = 1e-4
        validation_prompt = ["a", "b"]
        [stage1]
        model_flavour = "tiny-i"
        lora_target_modules = ["to_q"]
        [stage2]
        model_flavour = "tiny-ii"
        learning_rate = 2e-4
        """
    )
    stages = {
        "stage1": {"model_flavour": "tiny-i", "lora_target_modules": ["to_q"]},
        "stage2": {"model_flavour": "tiny-ii", "learning_rate": 2e-4},
    }
    as_json = files.load({"seed": 7, "learning_rate": 1e-4, "validation_prompt": ["a", "b"], **stages})
    as_toml = load_run(files.folder / "run.toml")
    assert replace(as_toml, file=as_json.file) == as_json
    assert as_toml.config.stages == (1, 2)
    assert (as_toml.config.stage(1).learning_rate, as_toml.config.stage(2).learning_rate) == (1e-4, 2e-4)


def test_comment_lines_and_a_windows_byte_order_mark_are_tolerated_in_json(files: Files) -> None:
    path = files.folder / "run.json"
    lines = ["# for the demo", "{", ' "workspace": "w",', "   # where the pictures are"]
    lines += [f' "data_backend_config": "{files.data()}",', ' "model_flavour": "tiny-i"', "}", "# end"]
    path.write_text("\r\n".join(lines), encoding="utf-8-sig")
    assert load_run(path).config.workspace == "w"


def test_a_hash_inside_a_value_is_no_comment(files: Files) -> None:
    assert files.load({**TINY_I, "validation_prompt": "# 1 star"}).config.prompts == ("# 1 star",)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("run.toml", "workspace = ", "is not valid TOML"),
        ("run.toml", "workspace = my/folder", "(at line 1, column 13). Put texts in quotation marks; write true and "),
        ("run.toml", 'seed = 1\nworkspace = "C:\\Users\\me"', ". Write each \\ twice, or a path with /."),
        ("run.json", '{"workspace": "C:\\Users\\me"}', ". Write each \\ twice, or a path with /."),
        ("run.json", '{"workspace": "C:\\\\me\\"}', ". Write each \\ twice, or a path with /."),
        ("run.json", '{"workspace": "C:\\", "seed": 1}', ". Write each \\ twice, or a path with /."),
        ("run.toml", 'workspace = ["C:\\", "b"]', ". Write each \\ twice, or a path with /."),
        ("run.json", '{"workspace": "a \\"b\\" c" "seed": 1}', ". A comma may be missing before it."),
        ("run.json", '{"workspace": "C:\\\\me" "seed": 1}', " (char 23). A comma may be missing before it."),
        ("run.json", '{"workspace": "w"\n"seed": 1}', "line 2 column 1 (char 18). A comma may be missing before it."),
        ("run.toml", 'a = 1\na = 2\nworkspace = "w"', "is not valid TOML"),
        ("run.json", '{"workspace": "w",}', "omma"),  # Python's words differ: one too many, or that one
        ("run.json", '{\n\n"seed": NaN}', "NaN is not a valid JSON number"),
        ("run.json", "[]", "holds a list, as data files do. Give the run file, whose data_backend_config names it."),
        ("run.json", '"text"', "must be a table"),
    ],
)
def test_a_file_that_is_no_table_is_one_error_with_its_path(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_run(tmp_path / name)
    assert says in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


def test_a_file_that_cannot_be_read_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "latin1.toml").write_bytes('workspace = "caf\xe9"'.encode("latin-1"))
    for name, says in (
        ("nowhere.toml", "no such file"),
        (".", "read: it is a folder."),
        ("latin1.toml", "no text in UTF-8"),
    ):
        with pytest.raises(ConfigError, match=says):
            load_run(tmp_path / name)


# ---- unknown, double and wrong keys -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "key", "meant"),
    [
        ({**TINY_I, "max_rejected_shar": 0.5}, "max_rejected_shar", "max_rejected_share"),
        ({**TINY_I, "lora_rankk": 8}, "lora_rankk", "lora_rank"),
        ({"model_flavour": "tiny-i", "learning_rat": 1e-4}, "learning_rat", "learning_rate"),
        ({"stage1": {"model_flavour": "tiny-i", "lora_rnak": 8}}, "stage1.lora_rnak", "lora_rank"),
        ({**TINY_I, "workspce": "w"}, "workspce", "workspace"),
    ],
)
def test_an_unknown_key_names_the_closest_key(files: Files, run: dict[str, Any], key: str, meant: str) -> None:
    message = files.refusal(run)
    assert f"{key} is not a known key. Did you mean {meant}?" in message
    assert message.endswith("?")


def test_a_key_like_no_other_is_answered_without_a_list_of_all_keys(files: Files) -> None:
    message = files.refusal({**TINY_I, "zzzzzz": 1})
    assert message.endswith("zzzzzz is not a known key. docs/config.md has all keys.")


def test_an_unknown_key_that_is_like_several_names_at_most_three(files: Files) -> None:
    message = files.refusal({**TINY_I, "lora_ran_k_alpha": 1})
    assert message.endswith("lora_ran_k_alpha is not a known key. Did you mean lora_alpha or lora_rank?")
    assert files.refusal({**TINY_I, "validation_num_s": 1}).count(" or ") <= 2


def test_a_stage_does_not_suggest_keys_of_the_run(files: Files) -> None:
    assert "Did you mean seed" not in files.refusal({"stage1": {"model_flavour": "tiny-i", "seeds": 1}})


def test_an_unknown_key_of_the_data_file_names_the_closest_key_and_the_data_set(files: Files) -> None:
    message = files.data_refusal(id="stars", resolutoin=64)
    assert "stars: resolutoin is not a known key. Did you mean resolution?" in message


def test_an_unknown_flavour_names_the_closest_flavour(files: Files) -> None:
    message = files.refusal({"stage1": {"model_flavour": "tiny_i"}})
    assert message.endswith("stage1: model_flavour is 'tiny_i', which is not known. Did you mean tiny-i?")
    assert "known flavours: " in files.refusal({"stage1": {"model_flavour": "sdxl"}}).lower()
    assert "model_flavour is 'tiny_i'" in files.refusal({"model_flavour": "tiny_i"})
    message = files.refusal({"stage1": {"model_flavour": "random:tiny_i"}})
    assert "which is not known. Did you mean random:tiny-i" in message
    assert len(message.splitlines()) == 1
    assert "model_flavour is ['tiny-i']" in files.refusal({"model_flavour": ["tiny-i"]})


def test_every_fault_is_a_line_of_its_own(files: Files) -> None:
    message = files.refusal({"stage1": {"model_flavour": "tiny-i", "lora_rank": 0, "lora_rankk": 1}, "seed": -1})
    count, *lines = message.splitlines()
    assert count == "3 faults to correct:" and len(lines) == 3
    assert all(line.startswith(f"- {files.folder / 'run.json'}: ") for line in lines)
    for fault in ("seed is -1;", "stage1.lora_rank is 0;", "stage1.lora_rankk is not a known key"):
        assert len([line for line in lines if fault in line]) == 1


def test_two_spellings_of_one_key_are_refused_not_settled_silently(files: Files) -> None:
    message = files.refusal({"model_flavour": "tiny-i", "--lora_rank": 8, "LORA_RANK": 16})
    assert "--lora_rank and LORA_RANK are one key, lora_rank" in message


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (
            {"stage1": {"model_flavour": "tiny-i", "gradient_checkpointing": "False"}},
            "gradient_checkpointing is 'False'",
        ),
        ({"stage1": {"model_flavour": "tiny-i", "gradient_checkpointing": 1}}, "gradient_checkpointing is 1"),
        ({"stage1": {"model_flavour": "tiny-i", "lora_rank": "16"}}, "lora_rank is '16'"),
        ({"stage1": {"model_flavour": "tiny-i", "lora_rank": 16.0}}, "lora_rank is 16.0"),
        ({"stage1": {"model_flavour": "tiny-i", "lora_rank": True}}, "lora_rank is True"),
        ({"stage1": {"model_flavour": "tiny-i", "learning_rate": "1e-4"}}, "learning_rate is '1e-4'"),
        ({**TINY_I, "seed": None}, "seed is None"),
        ({**TINY_I, "device": "gpu"}, "device is 'gpu'"),
        ({**TINY_I, "validation_prompt": [1]}, "validation_prompt"),
        ({**TINY_I, "validation_resolution": 64.0}, "validation_resolution is 64.0"),
        ({"stage1": "tiny-i"}, "stage1 is 'tiny-i'; it must be a table"),
        ({"stage1": {"model_flavour": "tiny-i", "mixed_precision": "fp16"}}, "mixed_precision is 'fp16'"),
        ({**TINY_I, "use_ema": "False"}, "use_ema is 'False'"),
        ({**TINY_I, "use_dora": "False"}, "use_dora is 'False'"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_not_converted(files: Files, run: dict[str, Any], says: str) -> None:
    message = files.refusal(run)
    assert says in message
    assert ".str" not in message, "the name of a key as the user wrote it"


def test_text_that_is_no_truth_value_is_refused_in_the_data_file(files: Files) -> None:
    assert "crop is 'perhaps'" in files.data_refusal(crop="perhaps")
    assert "disabled is 'perhaps'" in files.data_refusal(disabled="perhaps")


# ---- bounds -------------------------------------------------------------------------------------------------------


def outside(bounds: tuple[type, float | None, float | None]) -> st.SearchStrategy[Any]:
    """Values of the field's own type below or above its bounds, and for floats those that are not finite."""
    kind, low, high = bounds
    numbers: Any = st.integers if kind is int else st.floats
    exact: dict[str, Any] = {} if kind is int else {"allow_nan": False, "allow_infinity": False}
    just = (
        (lambda edge, way: int(edge) + way) if kind is int else (lambda edge, way: math.nextafter(edge, way * math.inf))
    )
    parts = []
    if low is not None:
        parts.append(numbers(max_value=just(low, -1), **exact))
    if high is not None:
        parts.append(numbers(min_value=just(high, 1), **exact))
    if kind is float:
        parts.append(st.sampled_from([math.nan, math.inf, -math.inf]))
    return st.one_of(parts)


def draw_outside(table: dict[str, tuple[type, float | None, float | None]]) -> st.SearchStrategy[tuple[str, Any]]:
    return st.sampled_from(sorted(table)).flatmap(lambda name: st.tuples(st.just(name), outside(table[name])))


def toml_value(value: Any) -> str:
    """A value as TOML writes it; TOML, unlike JSON, can say nan and inf."""
    return repr(value)


def refused_toml(folder: Path, table: str, name: str, value: Any) -> str:
    path = folder / "bounds.toml"
    stage1, top = (f"{name} = {toml_value(value)}", "") if table else ("", f"{name} = {toml_value(value)}")
    path.write_text(
        f'workspace = "w"\ndata_backend_config = "{folder}/data.json"\n{top}\n[stage1]\nmodel_flavour = "tiny-i"\n{stage1}'
    )
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    return str(caught.value)


@ours
@given(draw_outside(STAGE_BOUNDS))
@example(("max_grad_norm", math.inf))
@example(("lr_end", math.nan))
def test_any_number_outside_a_stage_fields_bounds_is_refused_by_name(files: Files, case: tuple[str, Any]) -> None:
    files.data()
    assert f"stage1.{case[0]} is {case[1]!r}" in refused_toml(files.folder, "stage1", *case)


@ours
@given(draw_outside(RUN_BOUNDS))
def test_any_number_outside_a_run_fields_bounds_is_refused_by_name(files: Files, case: tuple[str, Any]) -> None:
    files.data()
    assert f": {case[0]} is {case[1]!r}" in refused_toml(files.folder, "", *case)


@ours
@given(draw_outside(DATA_BOUNDS).filter(lambda case: math.isfinite(case[1])))  # JSON knows no others
def test_any_number_outside_a_data_fields_bounds_is_refused_by_name(files: Files, case: tuple[str, Any]) -> None:
    assert f"set: {case[0]} is {case[1]!r}" in files.data_refusal(**dict([case]))


def test_the_tables_of_bounds_name_every_number_of_the_models() -> None:
    def numbers(model: type[Any]) -> set[str]:
        kinds = {int, float, int | None, float | None}
        return {name for name, field in model.model_fields.items() if field.annotation in kinds}

    assert numbers(StageConfig) == set(STAGE_BOUNDS)
    assert numbers(RunConfig) == set(RUN_BOUNDS)
    assert numbers(ImageDataset) == set(DATA_BOUNDS)


def test_every_field_has_a_help_text() -> None:
    for model in (RunConfig, StageConfig, ImageDataset, TextEmbedBackend):
        assert not [name for name, field in model.model_fields.items() if not field.description], model


# ---- a default never makes another key wrong ------------------------------------------------------------------------


def legal(bounds: tuple[type, float | None, float | None]) -> st.SearchStrategy[Any]:
    kind, low, high = bounds
    if kind is int:
        return st.integers(int(low or 0), int(high) if high is not None else 10**6)
    return st.floats(low, high if high is not None else 1e6, allow_nan=False)


def legal_values(model: type[Any], table: dict[str, tuple[type, float | None, float | None]]) -> dict[str, Any]:
    """For each key with numbers, choices or a truth value: a strategy of everything that it may be."""
    found: dict[str, Any] = {name: legal(bounds)
                             for name, bounds in table.items()}  # fmt: skip
    for name, field in model.model_fields.items():
        choices = [value for part in (field.annotation, *get_args(field.annotation))
                   if get_origin(part) is Literal for value in get_args(part)]  # fmt: skip
        if field.annotation is bool:
            choices = [False, True]
        if choices:
            found[name] = st.sampled_from(choices)
    return found


def single_keys() -> st.SearchStrategy[tuple[str, str, Any]]:
    """(where, key, value) of one key that a user sets and nothing else."""
    tables = [("stage1", StageConfig, STAGE_BOUNDS), ("stage2", StageConfig, STAGE_BOUNDS), ("", RunConfig, RUN_BOUNDS),
              ("data", ImageDataset, DATA_BOUNDS)]  # fmt: skip
    return st.one_of(
        [
            st.tuples(st.just(where), st.just(name), values)
            for where, model, table in tables
            for name, values in legal_values(model, table).items()
            if name not in ("type", "dataset_type", "disabled", "disable")
        ]
    )


@settings(ours, max_examples=300)
@given(single_keys())
@example(("stage1", "learning_rate", 1e-7))
@example(("stage2", "learning_rate", 5e-324))
@example(("stage1", "optimizer", "adamw_schedulefree"))
@example(("data", "resolution_type", "area"))
@example(("stage1", "controlnet", True))
def test_an_error_for_one_key_blames_that_key(files: Files, case: tuple[str, str, Any]) -> None:
    where, key, value = case
    files.data(**{key: value} if where == "data" else {})
    run = {**BOTH, key: value} if where == "" else BOTH
    if where in ("stage1", "stage2"):
        run = {where: {**BOTH[where], key: value}}
    try:
        files.load(run)
    except ConfigError as error:
        message = str(error).replace(str(files.folder), "")
        known = {*StageConfig.model_fields, *RunConfig.model_fields, *ImageDataset.model_fields} - {
            "stage1",
            "stage2",
            "id",
        }
        named = [word for word in re.findall(r"[a-z]\w+", message) if word in known]
        assert named[0] == key, message


@pytest.mark.parametrize("schedule", ["constant", "constant_with_warmup", "cosine"])
def test_the_learning_rate_of_full_training_needs_no_other_key(files: Files, schedule: str) -> None:
    keys = {"model_type": "full", "learning_rate": 1e-7, "lr_scheduler": schedule, "max_train_steps": 100}
    stage = files.load({"stage1": {**TINY_I["stage1"], **keys}}).config.stage(1)
    assert learning_rate_at(stage, 0) == 1e-7
    assert learning_rate_at(stage, 100) == pytest.approx(1e-8 if schedule == "cosine" else 1e-7)


def test_schedule_free_training_needs_no_schedule(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_optimizer, "missing_extra", lambda modules, extra: "")
    stage = files.load({"stage1": {**TINY_I["stage1"], "optimizer": "adamw_schedulefree"}}).config.stage(1)
    assert {learning_rate_at(stage, step) for step in range(1000)} == {stage.learning_rate}


def test_one_limit_of_the_aspect_does_not_contradict_the_others_default(files: Files) -> None:
    files.data(crop_aspect="preserve", minimum_aspect_ratio=5.0)
    low, high = files.load(BOTH).datasets[0].aspect_range
    assert low == 5 < high


# ---- the home folder ----------------------------------------------------------------------------------------------


def path_keys(model: type[Any]) -> set[str]:
    return {name for name, field in model.model_fields.items() if "placed" in f"{field.annotation} {field.metadata}"}


def test_every_key_that_names_a_path_is_of_the_type_that_expands_the_home_folder() -> None:
    ending = re.compile(r"(dir|file|path|workspace|config|model|lora)$")
    for model in (RunConfig, StageConfig, ImageDataset, ConditioningSet, CaptionTable):
        named = {
            name for name, field in model.model_fields.items() if ending.search(name) and "str" in str(field.annotation)
        }
        assert named <= path_keys(model) | {"sample_measure"}, model
    assert {"workspace", "data_backend_config", "eval_clip_model", "eval_lpips_model"} <= path_keys(RunConfig)
    assert {"init_lora", "pretrained_model_name_or_path"} <= path_keys(StageConfig)
    assert {"instance_data_dir", "csv_file", "csv_cache_dir", "dataset_name", "caption_filter_list"} <= path_keys(
        ImageDataset
    )


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize("name", sorted(path_keys(StageConfig)))
def test_a_stages_paths_begin_at_the_home_folder(files: Files, home: Path, name: str) -> None:
    stage = files.load({"stage1": {**TINY_I["stage1"], name: "~/a b/c"}}).config.stage(1)
    assert getattr(stage, name) == f"{home}/a b/c"


@pytest.mark.parametrize("name", sorted(path_keys(RunConfig)))
def test_a_runs_paths_begin_at_the_home_folder(files: Files, home: Path, name: str) -> None:
    if name == "workspace":
        assert files.load(BOTH, "workspace=~/runs/one").workspace == home / "runs/one"
    elif name == "workspace_cache_dir":
        assert files.load({**BOTH, name: "~/none"}).config.workspace_cache_dir == f"{home}/none"
    else:
        assert f"{home}/none" in files.refusal({**BOTH, name: "~/none"})


@pytest.mark.parametrize("name", sorted(path_keys(ImageDataset)))
def test_a_data_sets_paths_begin_at_the_home_folder(files: Files, home: Path, name: str) -> None:
    (home / "pictures").mkdir()
    (home / "pictures.txt").write_text("red")
    needed = {"csv_file": {"type": "csv", "csv_cache_dir": "c"}, "dataset_name": {"type": "huggingface"},
              "csv_cache_dir": {"type": "csv", "csv_file": "none.csv"}}  # fmt: skip
    written = "~/pictures.txt" if name == "caption_filter_list" else "~/pictures"
    entry = ImageDataset.model_validate(
        {"id": "a", "type": "local", "instance_data_dir": "p", **needed.get(name, {}), name: written}
    )
    assert getattr(entry, name) == written.replace("~", str(home))


def test_a_path_that_no_file_system_takes_is_one_that_is_not_there(files: Files) -> None:
    assert "no such file" in files.refusal({**BOTH, "data_backend_config": "x" * 300})


def test_a_home_folder_that_nobody_has_is_an_error(files: Files) -> None:
    assert "workspace: '~nobody-here/w' starts with an unknown home folder" in files.refusal(
        {**BOTH, "workspace": "~nobody-here/w"}
    )


def test_paths_of_the_command_line_begin_at_the_home_folder(home: Path) -> None:
    (home / "run.json").write_text("{")
    for arguments, said in (
        (["prepare", "~/run.json"], "run.json"),
        (["verify", "~/none"], "none"),
        (["ls", "~/none"], "none"),
    ):
        done = CliRunner().invoke(cli.app, arguments)
        assert f"{home}/{said}" in str(done.exception), arguments
    for command in cli.app.registered_commands:
        hints = get_type_hints(command.callback, include_extras=True)
        for name, (kind, *info) in (
            (name, get_args(hint)) for name, hint in hints.items() if get_origin(hint) is Annotated
        ):
            assert "Path" not in str(kind) or info[0].parser is not None, (command.callback, name)


# ---- nothing is rewritten -----------------------------------------------------------------------------------------


ROLLED = {
    "scheduled_sampling_max_step_offset": 700, "scheduled_sampling_probability": 1.0, "use_soft_min_snr": False,
    "snr_gamma": 5.0,
}  # fmt: skip
# Numbers whose legal values depend on other settings; tests of their own say how.
DEPENDENT = {
    "max_train_steps", "num_train_epochs", "lr_end", "lr_warmup_steps", "learning_rate", "lr_num_cycles", "lr_power",
    "huber_c", "soft_min_snr_sigma_data", "noise_offset", "noise_offset_probability", "input_perturbation_steps",
    "timestep_bias_multiplier", "timestep_bias_portion", "timestep_bias_begin", "timestep_bias_end",
    "scheduled_sampling_max_step_offset", "scheduled_sampling_probability",
    "noise_level_begin", "noise_level_end", "low_res_blur", "low_res_noise", "low_res_jpeg_quality",
    "low_res_degraded_share", "low_res_stage1_share", "low_res_stage1_strength", "micro_batch_size",
    "sample_batch_size",
}  # fmt: skip
STAGE_VALUES = st.fixed_dictionaries(
    {"max_train_steps": st.integers(1, 10**6)},
    optional={name: legal(STAGE_BOUNDS[name]) for name in STAGE_BOUNDS if name not in DEPENDENT}
    | {
        "lora_target_modules": st.lists(st.sampled_from(["to_q", "to_k", "to_v"]), min_size=1),
        "lr_scheduler": st.sampled_from(["constant", "linear", "sine"]),
        "gradient_checkpointing": st.booleans(),
        "offset_noise": st.booleans(),
        "train_variance": st.booleans(),
        "loss_type": st.sampled_from(["l2", "huber", "smooth_l1"]),
        "optimizer": st.sampled_from(["adamw", "adamw_bf16", "adafactor"]),
    },
)
SIGNS = st.characters(codec="utf-8", exclude_characters="\0")  # a zero byte is refused wherever it stands
RUN_VALUES = st.fixed_dictionaries(
    {"retrain_mode": st.just("warm")},
    optional={name: legal(bounds) for name, bounds in RUN_BOUNDS.items()}
    | {
        "validation_prompt": st.one_of(st.text(SIGNS), st.lists(st.text(SIGNS))),
        "validation_negative_prompt": st.text(SIGNS),
        "validation_resolution": st.sampled_from([64, "64", "96x64", "8X512"]),
    },
)


@settings(ours, max_examples=40)
@given(RUN_VALUES, STAGE_VALUES)
def test_every_legal_value_arrives_as_written_and_survives_the_way_to_a_job(
    files: Files, run: dict[str, Any], stage: dict[str, Any]
) -> None:
    config = files.load({**run, "stage1": {"model_flavour": "tiny-i", **stage}}).config
    found = config.model_dump(mode="json")
    assert {key: found[key] for key in run} == run
    assert {key: found["stage1"][key] for key in stage} == stage
    assert RunConfig.model_validate(json.loads(json.dumps(found))) == config


def test_a_run_file_and_its_data_file_are_never_written_to(files: Files) -> None:
    files.load(BOTH)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files.folder.glob("*.json")}
    load_run(files.folder / "run.json", ("seed=3",))
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files.folder.glob("*.json")}


def test_shared_keys_reach_both_stages_and_a_stages_own_key_wins(files: Files) -> None:
    run = {"lora_rank": 4, "lora_dropout": 0.5, "stage1": {"model_flavour": "tiny-i"},
           "stage2": {"model_flavour": "tiny-ii", "lora_rank": 8}}  # fmt: skip
    config = files.load(run).config
    assert [(config.stage(n).lora_rank, config.stage(n).lora_dropout) for n in config.stages] == [(4, 0.5), (8, 0.5)]


# ---- SimpleTuner's files ------------------------------------------------------------------------------------------


def flat(**keys: Any) -> dict[str, Any]:
    return {
        "--model_family": "deepfloyd", "--output_dir": "output/models",
        "--learning_rate": 4e-5, "--lr_end": 4e-6, "--lr_scheduler": "polynomial", "--lora_rank": 128,
        "--max_train_steps": 10_000, "--train_batch_size": 1, "--gradient_checkpointing": True, "--seed": 42,
        "--validation_resolution": "64", "--resume_from_checkpoint": "latest", "--report_to": "none",
        "--use_ema": False, **keys,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "flavour", "stages"),
    [("deepfloyd-lora", "i-medium-400m", (1,)), ("deepfloyd-stage2-lora", "ii-medium-450m", (2,)),
     ("lora", "tiny-i", (1,)), ("lora", "tiny-ii", (2,)), ("DeepFloyd-LoRA", "tiny-i", (1,))],
)  # fmt: skip
def test_simpletuners_flat_file_trains_the_one_stage_that_it_names(
    files: Files, model_type: str, flavour: str, stages: tuple[int, ...]
) -> None:
    config = files.load(flat(**{"MODEL_TYPE": model_type, "--model_flavour": flavour})).config
    assert config.stages == stages
    stage = config.stage(config.stages[0])
    assert (stage.lora_rank, stage.learning_rate, stage.lr_scheduler) == (128, 4e-5, "polynomial")
    assert stage.gradient_checkpointing is True


@pytest.mark.parametrize(
    ("model_type", "flavour", "stage"),
    [("deepfloyd-full", "i-medium-400m", 1), ("deepfloyd-stage2", "ii-medium-450m", 2), ("full", "tiny-ii", 2)],
)  # fmt: skip
def test_simpletuners_full_fine_tuning_is_ours(files: Files, model_type: str, flavour: str, stage: Stage) -> None:
    config = files.load(flat(**{"MODEL_TYPE": model_type, "--model_flavour": flavour, "--lora_rank": 16})).config
    assert config.stages == (stage,)
    assert config.stage(stage).model_type == "full"
    other = "ii-medium-450m" if stage == 1 else "i-medium-400m"
    if model_type != "full":
        message = files.refusal(flat(**{"MODEL_TYPE": model_type, "--model_flavour": other, "--lora_rank": 16}))
        assert f"stage{stage}.model_flavour is '{other}', a Stage" in message


def test_a_full_fine_tuning_at_a_loras_learning_rate_is_noted(files: Files) -> None:
    keys = {"model_flavour": "tiny-i", "model_type": "full"}
    (note,) = files.load({"stage1": keys}).notes
    assert "stage1.learning_rate is not set; 4e-05 is meant for a LoRA" in note
    assert not files.load({"stage1": {**keys, "learning_rate": 4e-5}}).notes


def test_the_guides_data_file_is_read_unchanged(files: Files) -> None:
    pictures = files.folder / "pictures"
    (files.folder / "guide.json").write_text(GUIDE_DATA_FILE.replace("PICTURES", str(pictures)))
    run = files.load({**BOTH, "data_backend_config": str(files.folder / "guide.json")})
    (dataset,) = run.datasets
    assert (dataset.maximum_image_size, dataset.target_downsample_size, dataset.resolution) == (256, 128, 64)
    assert (dataset.crop_style, dataset.repeats, dataset.instance_data_dir) == ("random", 1, str(pictures))
    assert [note for note in run.notes if "cache_dir_vae is ignored" in note]


def test_a_key_that_has_no_effect_is_reported_not_swallowed(files: Files) -> None:
    notes = files.load(flat(**{"--model_flavour": "tiny-i"})).notes
    assert [note for note in notes if "output_dir is ignored; artifacts lie in the workspace" in note]
    assert [note for note in notes if "resume_from_checkpoint is ignored; off, or always done here" in note]
    assert not [note for note in notes if "report_to" in note], "none is what it does"


@pytest.mark.parametrize(
    ("said", "trackers", "ignored"),
    [
        ("none", (), []), ("", (), []), ("tensorboard", ("tensorboard",), []), ("wandb", ("wandb",), []),
        ("wandb, TensorBoard", ("tensorboard", "wandb"), []), ("wandb,wandb", ("wandb",), []),
        ("all", (), ["all"]), ("comet_ml,wandb", ("wandb",), ["comet_ml"]), (None, (), []),
        (["wandb"], ("wandb",), []),
    ],
)  # fmt: skip
def test_simpletuners_lists_of_trackers(
    files: Files,
    monkeypatch: pytest.MonkeyPatch,
    said: str | list[str] | None,
    trackers: tuple[str, ...],
    ignored: list[str],
) -> None:
    monkeypatch.setattr("deepfloyd_core.config.run.missing_extra", lambda packages, extra: "")
    run = files.load({**BOTH, "report_to": said})
    assert run.config.trackers == trackers
    notes = [note for note in run.notes if "report_to" in note]
    assert len(notes) == len(ignored) and all(f"report_to = {name} is ignored" in " ".join(notes) for name in ignored)


def test_trackers_that_are_no_names_are_refused(files: Files) -> None:
    assert "report_to is True; it is a list of trackers: tensorboard, wandb." in files.refusal(
        {**BOTH, "report_to": True}
    )


def test_a_tracker_that_is_not_installed_says_what_installs_it(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "deepfloyd_core.config.extras.importlib.util.find_spec", lambda name: None if name == "wandb" else name
    )
    says = files.refusal({**BOTH, "report_to": "tensorboard,wandb"})
    assert "report_to is 'tensorboard,wandb', and wandb cannot be imported. Install the extra: pip install" in says
    assert "deepfloyd-pipeline[wandb]" in says


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [("prediction_type", "v_prediction", "predicts epsilon"), ("lora_type", "lycoris", "not LyCORIS"),
     ("tread_config", {"routes": []}, "not supported"), ("controlnet_custom_config", "x.json", "ControlNet-LoRA"),
     ("model_family", "flux", "trains deepfloyd only")],
)  # fmt: skip
def test_a_key_that_makes_no_sense_here_is_refused_with_the_reason(
    files: Files, key: str, value: Any, reason: str
) -> None:
    message = files.refusal({"model_flavour": "tiny-i", f"--{key}": value})
    assert key in message
    assert reason in message


def test_keys_of_the_data_file_that_make_no_sense_are_refused_with_the_reason(files: Files) -> None:
    assert "conditioning_data is 'depth'; enabled" in files.data_refusal(conditioning_data="depth")
    assert "not video" in files.data_refusal(video={"num_frames": 3})


def test_disabled_entries_are_left_out_under_both_spellings(files: Files) -> None:
    gone = {"type": "local", "instance_data_dir": "/nowhere"}
    files.data({"id": "a", "disabled": True, **gone}, {"id": "b", "disable": True, **gone})
    assert [dataset.id for dataset in files.load(BOTH).datasets] == ["set"]
    assert "has no enabled data set" in files.data_refusal(disabled=True)


# ---- overrides ----------------------------------------------------------------------------------------------------


def test_overrides_reach_nested_keys_and_keep_toml_types(files: Files) -> None:
    run = files.load(
        BOTH, "seed=7", "stage1.lora_rank=3", "stage2.learning_rate=1e-3", "workspace=/tmp/my space/x", "device=cpu",
        'validation_prompt=["a", "b"]', "validation_resolution=96x64", "stage2.gradient_checkpointing=true",
        'validation_negative_prompt="7"',
    )  # fmt: skip
    config = run.config
    assert (config.seed, config.workspace, config.device) == (7, "/tmp/my space/x", "cpu")
    assert config.stage(1).lora_rank == 3
    assert (config.stage(2).learning_rate, config.stage(2).gradient_checkpointing) == (1e-3, True)
    assert config.prompts == ("a", "b")
    assert config.sample_sizes_px == ((96, 64),)
    assert config.validation_negative_prompt == "7"


def test_an_override_wins_over_a_key_in_simpletuners_spelling(files: Files) -> None:
    config = files.load(flat(**{"--model_flavour": "tiny-i"}), "lora_rank=2", "seed=9").config
    assert (config.stage(1).lora_rank, config.seed) == (2, 9)


def test_an_override_wins_over_the_file_and_may_name_a_stage_the_file_lacks(files: Files) -> None:
    config = files.load({**TINY_I, "seed": 1}, "seed=2", "stage2.model_flavour=tiny-ii").config
    assert (config.seed, config.stages) == (2, (1, 2))


def test_an_override_without_a_table_wins_over_the_stages_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    demo = Path("flows/configs/demo.toml")
    config = load_run(demo, ("lora_rank=5", "max_train_steps=17", "learning_rate=1e-3")).config
    for stage in (config.stage(1), config.stage(2)):
        assert (stage.lora_rank, stage.max_train_steps, stage.learning_rate) == (5, 17, 1e-3)
    for both in (("stage1.lora_rank=3", "lora_rank=5"), ("lora_rank=5", "stage1.lora_rank=3")):
        config = load_run(demo, both).config
        assert (config.stage(1).lora_rank, config.stage(2).lora_rank) == (3, 5)
    config = load_run(demo, ("lora_target_modules=", "checkpointing_steps=4")).config
    assert config.stage(1).lora_target_modules == config.stage(2).lora_target_modules == ATTENTION_TARGETS
    assert config.stage(1).checkpoint_step_interval == config.stage(2).checkpoint_step_interval == 4


def test_an_override_wins_over_a_switch_and_a_switch_over_a_key(files: Files) -> None:
    run = {**BOTH, "validation_disable": True, "stage1": {"model_flavour": "tiny-i", "adam_bfloat16": True}}
    config = files.load(run, "validation_steps=9", "optimizer=adafactor").config
    assert [config.stage(stage).validation_step_interval for stage in (1, 2)] == [9, 9]
    assert [config.stage(stage).optimizer for stage in (1, 2)] == ["adafactor", "adafactor"]
    run = {"stage1": {"model_flavour": "tiny-i", "validation_step_interval": 5, "optimizer": "adafactor"}}
    stage = files.load(run, "validation_disable=true", "adam_bfloat16=true").config.stage(1)
    assert (stage.validation_step_interval, stage.optimizer) == (0, "adamw_bf16")


def test_two_overrides_of_one_key_are_refused_under_any_names(files: Files) -> None:
    for texts in (
        ("checkpointing_steps=8", "checkpoint_step_interval=9"),
        ("stage1.checkpointing_steps=8", "stage1.checkpoint_step_interval=9"),
        ("use_prodigy_optimizer=true", "optimizer=adamw"),
    ):
        first, second = (text.partition("=")[0] for text in texts)
        assert f"--set {first} and --set {second} are one key" in files.refusal(BOTH, *texts)
    assert "--set seed is given 3 times" in files.refusal(BOTH, "seed=1", "seed=2", " seed =")


@pytest.mark.parametrize("override", ["seed", "=3", "", "seed.x=3", "stage1.lora_rank.x=3"])
def test_an_override_of_the_wrong_form_is_a_config_error(files: Files, override: str) -> None:
    assert repr(override) in files.refusal({**BOTH, "seed": 1, "lora_rank": 2, "stage1": {
        "model_flavour": "tiny-i", "lora_rank": 1}}, override)  # fmt: skip


def test_an_override_is_checked_like_the_file(files: Files) -> None:
    assert "Did you mean seed?" in files.refusal(BOTH, "sed=3")
    assert "gradient_checkpointing is 'False'" in files.refusal(BOTH, "stage1.gradient_checkpointing=False")


# ---- sizes and other checks before anything is loaded --------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "says"),
    [
        ({"stage1": {"model_flavour": "tiny-ii"}}, "a Stage II model. Use one of i-medium-400m"),
        ({"stage2": {"model_flavour": "tiny-i"}}, "a Stage I model. Use one of ii-medium-450m"),
        ({}, "no stage to train"),
        ({"lora_rank": 8}, "the stage to train is unknown"),
        ({**TINY_I, "validation_resolution": 60}, "must divide by 8"),
        ({**TINY_I, "validation_resolution": 0}, "8 to 512"),
        ({**TINY_I, "validation_resolution": "64x520"}, "8 to 512"),
        ({**TINY_I, "validation_resolution": "64x64x64"}, "give sizes"),
        ({**TINY_I, "validation_resolution": "large"}, "give sizes"),
        ({**TINY_I, "validation_resolution": "\u00b2"}, "give sizes"),
        (
            {**TINY_I, "validation_resolution": 256},
            "Stage I makes 64 px, and the shorter edge must be at most twice that",
        ),
        ({**BOTH, "validation_resolution": "64,384x256"}, "Use for example 64 or 96x64"),
        ({**TINY_II, "validation_resolution": 0}, "Stage II makes 256 px of 64 and nothing smaller"),
        ({**TINY_II, "validation_resolution": "384x224"}, "Use for example 256 or 384x256"),
        ({**TINY_II, "validation_resolution": "272x256"}, "each edge of Stage II must divide by 32"),
        (
            {"stage1": {**TINY_I["stage1"], "lr_end": 1e-3}},
            "lr_end is 0.001, which must not be above learning_rate 4e-05",
        ),
        ({"stage1": {"model_flavour": "tiny-i", "max_train_steps": 5, "lr_warmup_steps": 5}}, "lr_warmup_steps is 5"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(files: Files, run: dict[str, Any], says: str) -> None:
    assert says in files.refusal(run)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"optimizer": "adamw_bf16", "mixed_precision": "no"}, "mixed_precision is 'no'. Set it to bf16, or use adamw"),
        ({"optimizer": "adamw_schedulefree", "lr_scheduler": "cosine"}, "lr_scheduler is 'cosine'. Use constant"),
        ({"optimizer": "adamw_schedulefree", "lr_scheduler": "constant", "use_ema": True}, "Remove use_ema"),
        ({"optimizer": "adamw_schedulefree", "lr_scheduler": "constant", "adam_beta1": 0.0}, "divides by adam_beta1"),
        ({"use_bitfit": True, "use_dora": True}, "use_dora is True, without effect while use_bitfit is True. Remove it"),
        ({"use_bitfit": True, "lora_rank": 8}, "lora_rank is 8, without effect while use_bitfit is True. Remove it"),
        ({"use_bitfit": True, "lora_alpha": 1.0}, "lora_alpha is 1.0, without effect while use_bitfit is True"),
        ({"use_bitfit": True, "lora_dropout": 0.1}, "lora_dropout is 0.1, without effect while use_bitfit is True"),
        ({"use_bitfit": True, "lora_init_type": "gaussian"}, "lora_init_type is gaussian, without effect"),
        ({"use_bitfit": True, "lora_target_modules": ["to_q"]}, "without effect while use_bitfit is True"),
        ({"lora_init_type": "pissa"}, "'default' or 'gaussian'"),
        ({"model_type": "full", "lora_rank": 8}, "lora_rank is 8, without effect while model_type is full. Remove it"),
        ({"model_type": "full", "use_dora": True}, "use_dora is True, without effect while model_type is full"),
        ({"model_type": "full", "use_bitfit": True}, "use_bitfit is True, without effect while model_type is full"),
        ({"model_type": "deepfloyd"}, "'lora' or 'full'"),
        ({"lr_power": 1.0}, "lr_power is 1.0, without effect while lr_scheduler is cosine"),
        ({"lr_num_cycles": 3, "lr_scheduler": "sine"}, "set lr_scheduler = cosine_with_restarts"),
        ({"huber_c": 0.2}, "huber_c is 0.2, without effect while loss_type is l2. Remove it, or set loss_type = huber"),
        ({"huber_schedule": "constant"}, "huber_schedule is constant, without effect"),
        ({"use_soft_min_snr": True, "snr_gamma": 5.0}, "two weights of the same loss"),
        ({"soft_min_snr_sigma_data": 1.0}, "set use_soft_min_snr = True"),
        ({"noise_offset": 0.2}, "set offset_noise = True"),
        ({"noise_offset_probability": 1.0}, "set offset_noise = True"),
        ({"input_perturbation_steps": 100}, "input_perturbation is 0"),
        ({"scheduled_sampling_probability": 0.5}, "scheduled_sampling_max_step_offset is 0. Set that, for example to 700"),
        ({"scheduled_sampling_max_step_offset": 700}, "scheduled_sampling_probability is 0. Set that, for example to 1"),
        ({**ROLLED, "snr_gamma": None}, "needs weights of the loss"),
        ({**ROLLED, "train_variance": True}, "which leaves none"),
        ({"timestep_bias_multiplier": 2.0}, "set timestep_bias_strategy = earlier or later or range"),
        ({"timestep_bias_strategy": "later"}, "timestep_bias_multiplier is 1"),
        ({"timestep_bias_strategy": "range", "timestep_bias_multiplier": 2.0}, "cover every timestep"),
        (
            {"timestep_bias_strategy": "range", "timestep_bias_multiplier": 2.0, "timestep_bias_begin": 300,
             "timestep_bias_end": 300}, "timestep_bias_begin (300) is not below timestep_bias_end (300)",
        ),
        ({"timestep_bias_strategy": "later", "timestep_bias_multiplier": 2.0, "timestep_bias_end": 9}, "without effect"),
    ],
)  # fmt: skip
def test_training_settings_without_effect_or_sense_are_refused(files: Files, keys: dict[str, Any], says: str) -> None:
    message = files.refusal({"stage1": {"model_flavour": "tiny-i", **keys}})
    assert says in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"noise_level_begin": 500, "noise_level_end": 500}, "begin (500) is not below noise_level_end (500). Set a"),
        ({"validation_noise_levels": [0, 1000]}, "validation_noise_levels"),
        (
            {"low_res_degraded_share": 0.5},
            "low_res_degraded_share is 0.5, without effect while there is no low_res_blur",
        ),
    ],
)
def test_settings_of_stage2_without_sense_are_refused(files: Files, keys: dict[str, Any], says: str) -> None:
    message = files.refusal({"stage2": {"model_flavour": "tiny-ii", **keys}})
    assert says in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    "keys",
    [{"noise_level_begin": 1}, {"noise_level_end": 9}, {"validation_noise_levels": [0]}, {"low_res_blur": 0.5},
     {"low_res_noise": 4.0}, {"low_res_jpeg_quality": 50}, {"stage2_patch": 64}, {"validation_back_projection": True}],
)  # fmt: skip
def test_settings_of_stage2_are_refused_for_stage1(files: Files, keys: dict[str, Any]) -> None:
    (key,) = keys
    message = files.refusal({**BOTH, **keys})
    assert f"stage1: {key} is {keys[key]}, and tiny-i is a Stage I model. Put it into [stage2]" in message
    assert len(message.splitlines()) == 1
    assert getattr(files.load({**BOTH, "stage2": {"model_flavour": "tiny-ii", **keys}}).config.stage(2), key)


def test_a_level_that_training_never_draws_is_noted(files: Files) -> None:
    stage = {"model_flavour": "tiny-ii", "noise_level_end": 251}
    assert not files.load({"stage2": {**stage, "validation_noise_levels": [0, 100]}}).notes
    (note,) = files.load({"stage2": {**stage, "validation_noise_levels": [251]}}).notes
    assert "stage2.validation_noise_levels is 251; training draws 0 to 250 alone" in note
    (note,) = files.load({"stage2": {**stage, "validation_noise_level": 300}}).notes
    assert "stage2.validation_noise_level is 300;" in note


@pytest.mark.parametrize(
    ("optimizer", "package", "extra"),
    [("prodigy", "prodigyopt", "optimizers"), ("adamw_schedulefree", "schedulefree", "optimizers"),
     ("adamw_8bit", "bitsandbytes", "bitsandbytes")],
)  # fmt: skip
def test_an_optimizer_whose_library_is_absent_is_refused_with_the_command_to_install_it(
    files: Files, monkeypatch: pytest.MonkeyPatch, optimizer: str, package: str, extra: str
) -> None:
    keys = {"optimizer": optimizer, "lr_scheduler": "constant", "learning_rate": 1.0}
    with monkeypatch.context() as patched:
        patched.setattr("importlib.util.find_spec", lambda name: None)
        message = files.refusal({"stage1": {"model_flavour": "tiny-i", **keys}})
    assert f"{package} cannot be imported. Install the extra: pip install 'deepfloyd-pipeline[{extra}]'" in message
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert files.load({"stage1": {"model_flavour": "tiny-i", **keys}}).config.stage(1).optimizer == optimizer


def test_8_bit_states_are_refused_where_they_have_no_kernel(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    run = {"stage1": {"model_flavour": "tiny-i", "optimizer": "adamw_8bit"}}
    assert "bitsandbytes has no 8-bit states on mps" in files.refusal({**run, "device": "mps"})
    assert files.load({**run, "device": "cuda"}).config.device == "cuda"


def test_a_user_hears_of_settings_that_an_optimizer_takes_otherwise(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    (note,) = files.load({"stage1": {"model_flavour": "tiny-i", "optimizer": "prodigy"}}).notes
    assert "stage1.learning_rate is 4e-05; prodigy finds the step size itself" in note
    assert not files.load({"stage1": {"model_flavour": "tiny-i", "optimizer": "prodigy", "learning_rate": 1.0}}).notes
    run = {"stage1": {"model_flavour": "tiny-i", "optimizer": "adafactor", "adam_beta1": 0.8}}
    assert ["adam_beta1 is ignored" in note for note in files.load(run).notes] == [True]


@pytest.mark.parametrize(
    ("run", "resolution", "says"),
    [
        (TINY_I, 60, "tiny-i needs a multiple of 8"),
        (TINY_II, 250, "tiny-ii needs a multiple of 32, four times a size of Stage I, which are multiples of 8"),
        (TINY_II, 272, "tiny-ii needs a multiple of 32"),
        (TINY_II, 66, "264 px at stage 2; tiny-ii needs a multiple of 32"),
        (TINY_II, 192, "tiny-ii makes 256 px and is not trained below that. Set resolution = 64."),
        (BOTH, 56, "set: resolution is 56, 224 px at stage 2; tiny-ii makes 256 px and is not trained below that"),
        ({"stage2": {"model_flavour": "ii-medium-450m"}}, 272, "needs a multiple of 32"),
        (TINY_II, 1024, "tiny-ii makes 256 px"),
        (
            TINY_I,
            256,
            "No data set feeds stage 1: resolution is 256 of set; tiny-i makes 64 px and is trained at up to 128",
        ),
        (BOTH, 256, "trained at up to 128. Set resolution = 64."),
    ],
)
def test_a_resolution_that_a_model_cannot_be_trained_at_is_refused(
    files: Files, run: dict[str, Any], resolution: int, says: str
) -> None:
    files.data(resolution=resolution)
    assert says in files.refusal(run)


@pytest.mark.parametrize(("kind", "resolution", "advised"), [("area", 0.25, 0.004096), ("pixel_area", 512, 64)])
def test_a_resolution_is_advised_in_the_data_sets_own_unit(
    files: Files, kind: str, resolution: float, advised: float
) -> None:
    files.data(resolution=resolution, resolution_type=kind)
    assert files.refusal(TINY_I).endswith(f"Set resolution = {advised:g}.")
    files.data(resolution=advised, resolution_type=kind)
    assert files.load(BOTH).config.stages == (1, 2)


@pytest.mark.parametrize(("megapixels", "legal"), [(0.0039, True), (0.0036, True), (0.0035, False), (0.05, False)])
def test_an_area_is_too_small_for_stage2_where_it_is_not_rounded_to_256_px(
    files: Files, megapixels: float, legal: bool
) -> None:
    files.data(resolution=megapixels, resolution_type="area")
    if not legal:
        assert "tiny-ii makes 256 px and is not trained below that" in files.refusal(TINY_II)
        return
    run = files.load(TINY_II)
    rules = geometry(run.config, run.datasets[0], 2)
    assert rules is not None
    square = plan_crops(np.array([[900, 900]]), rules, lambda name, part: np.full(1, 0.5))
    assert square.target.tolist() == [[256, 256]]


@pytest.mark.parametrize("run", [TINY_I, BOTH])
@pytest.mark.parametrize("said", ["128", "64x512", "128x256"])
def test_wide_samples_pass(files: Files, run: dict[str, Any], said: str) -> None:
    assert files.load({**run, "validation_resolution": said})


@pytest.mark.parametrize("said", ["256", "384x256", "256,256x512"])
def test_stage2s_own_sizes_pass_in_a_run_of_it_alone(files: Files, said: str) -> None:
    assert files.load({**TINY_II, "validation_resolution": said})


@pytest.mark.parametrize(("run", "resolution"), [(BOTH, 64), (TINY_I, 128), (TINY_II, 256), (BOTH, 72), (TINY_II, 512)])
def test_legal_resolutions_pass(files: Files, run: dict[str, Any], resolution: int) -> None:
    files.data(resolution=resolution)
    assert files.load(run).datasets[0].resolution == resolution


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"maximum_image_size": 128}, "target_downsample_size, to which larger pictures are downsampled, is missing"),
        ({"maximum_image_size": 128, "target_downsample_size": 32}, "the crop would not fit"),
        ({"maximum_image_size": 128, "target_downsample_size": 129}, "nothing is ever upsampled"),
        ({"caption_strategy": "instanceprompt"}, "instance_prompt is missing"),
        ({"only_instance_prompt": True}, "instance_prompt is missing"),
        ({"prepend_instance_prompt": True, "instance_prompt": "  "}, "instance_prompt is missing"),
        ({"instance_data_dir": "/nowhere/at/all"}, "'/nowhere/at/all', which is not a directory"),
        ({"type": "aws"}, "type is 'aws'"),
        ({"id": ""}, "id is ''"),
        ({"crop_style": "left"}, "crop_style is 'left'"),
    ],
)
def test_a_data_set_that_contradicts_itself_is_refused(files: Files, keys: dict[str, Any], says: str) -> None:
    assert says in files.data_refusal(**keys)


def test_the_data_file_as_a_whole_is_checked(files: Files) -> None:
    twice = {"id": "set", "type": "local", "instance_data_dir": str(files.folder)}
    assert "the id 'set' is used 2 times" in files.data_refusal(twice)
    for text in ("{}", "[]", "[3]", "3"):
        (files.folder / "data.json").write_text(text)
        assert str(files.folder / "data.json") in files.refusal(BOTH)
    assert "no such file" in files.refusal({**BOTH, "data_backend_config": "/nowhere.json"})


# ---- the command line ---------------------------------------------------------------------------------------------


def command(folder: Path, *arguments: str, python: tuple[str, ...] = ()) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *python, "-P", "-m", "flows", *arguments], capture_output=True, text=True, cwd=folder
    )


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["run", "bad.toml"], 2)])
def test_help_and_config_errors_answer_at_once(tmp_path: Path, arguments: list[str], code: int) -> None:
    (tmp_path / "bad.toml").write_text('workspace = "w"\ndata_backend_config = "x"\nlora_rankk = 8\n')
    before = os.times()
    done = command(tmp_path, *arguments)
    after = os.times()
    assert done.returncode == code
    assert code == 0 or "Did you mean lora_rank?" in done.stderr
    # Of the processor: by the clock, a busy machine takes any time.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1.5


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "bad.toml"], ["retrain", "bad.toml"], ["generate", "bad.toml", "--prompt", "x"]]
)
def test_a_config_error_imports_nothing_heavy(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "bad.toml").write_text('workspace = "w"\n')
    stderr = command(tmp_path, *arguments, python=("-X", "importtime")).stderr
    modules = {line.split("|")[-1].strip() for line in stderr.splitlines() if line.startswith("import time:")}
    assert "typer" in modules
    assert not modules & {"torch", "prefect", "diffusers", "transformers", "peft", "matplotlib"}
    assert not modules & {"numpy", "httpx", "deepfloyd_core.store.artifacts", "deepfloyd_core.store.versions"}


def test_a_config_error_is_one_line_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text('workspace = "w"\nstage1.model_flavour = "tiny-i"\n')
    done = command(tmp_path, "run", "bad.toml")
    assert " ".join(done.stderr.split()) == f"error: bad.toml: {NO_DATA}"
    assert done.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["bad.toml"], "nothing was started or written"


@pytest.mark.parametrize(
    "arguments",
    [["ls", "nowhere"], ["verify", "nowhere"],  ["run", "nowhere.toml"], ["nosuchcommand"],
     ["run"], ["run", "nowhere.toml", "--set"], ["generate", "nowhere.toml", "--prompt", "x", "--seeds", "no"]],
)  # fmt: skip
def test_wrong_usage_and_missing_directories_exit_with_2(tmp_path: Path, arguments: list[str]) -> None:
    done = command(tmp_path, *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.strip()


def test_the_shipped_run_files_are_legal(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)  # their paths start there, as their users do
    names = sorted((root / "flows" / "configs").glob("*.toml"))
    assert root / "flows" / "configs" / "demo.toml" in names
    for path in names:
        assert load_run(path, ("data_backend_config=datasets/demo.json",)).config.stages, path


@pytest.mark.parametrize(
    ("idle", "used"),
    [
        ({"lr_warmup_steps": 5, "lr_scheduler": "constant"}, {"lr_scheduler": "constant_with_warmup"}),
        ({"lr_end": 0.0, "lr_scheduler": "constant_with_warmup"}, {"lr_scheduler": "cosine"}),
        ({"ema_decay": 0.9}, {"use_ema": True}),
    ],
)
def test_a_common_setting_without_effect_is_noted(files: Files, idle: dict[str, Any], used: dict[str, Any]) -> None:
    key = next(iter(idle))
    stage = {"model_flavour": "tiny-i", **idle}
    assert [note for note in files.load({"stage1": stage}).notes if f"{key} is ignored" in note]
    assert not [note for note in files.load({"stage1": {**stage, **used}}).notes if key in note]

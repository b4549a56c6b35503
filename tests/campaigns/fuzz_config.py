"""Damaged run files, data files, overrides and SimpleTuner's files: accepted, or one error that names the file."""

import json
import shutil
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mutations import damaged_json, damaged_text, one_of
from small_run import RUN_FILE
from trials import Target, Trial, named_error

from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.config.run import RunConfig
from deepfloyd_core.config.simpletuner_options import ALIASES, IGNORED, REFUSED
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.errors import DeepFloydError
from deepfloyd_core.preflight.load import load_run

HERE = "@HERE@"  # in the good files: the folder that a trial works in
_VALUES = (
    '"tiny-i"',
    '"tiny-ii"',
    '"bf16"',
    '"full"',
    '"random"',
    "true",
    "false",
    "64",
    "0.5",
    "[1, 2]",
    '["a", "b"]',
    '{"a" = 1}',
)
_KEYS = (*RunConfig.model_fields, *StageConfig.model_fields, "stage1", "stage2", "[stage1]", "stage3")
_DATA_KEYS = tuple(f'"{key}"' for key in (*ImageDataset.model_fields, "disabled", "dataset_type", "parquet"))
_THEIRS = tuple(
    f'"{key}"'
    for key in (*ALIASES, *list(IGNORED)[:40], *list(REFUSED)[:40], *RunConfig.model_fields, *StageConfig.model_fields)
)
_ENTRY: dict[str, Any] = {
    "id": "stars", "type": "local", "instance_data_dir": f"{HERE}/pictures", "crop": True, "crop_aspect": "square",
    "crop_style": "random", "resolution": 64, "caption_strategy": "textfile", "repeats": 1, "minimum_image_size": 64,
    "maximum_image_size": 64, "target_downsample_size": 64, "caption_filter_list": ["a", "s/b/c/"],
}  # fmt: skip
_TABLE: dict[str, Any] = {
    "id": "table", "type": "local", "instance_data_dir": f"{HERE}/pictures", "caption_strategy": "parquet", "resolution": 64,
    "resolution_type": "pixel", "crop": True, "crop_aspect": "closest", "crop_aspect_buckets": [1.0, 0.75],
    "parquet": {"path": f"{HERE}/pictures/t.parquet", "filename_column": "f", "caption_column": "c"},
}  # fmt: skip
_URLS: dict[str, Any] = {
    "id": "urls", "type": "csv", "csv_file": f"{HERE}/pictures/t.csv", "csv_cache_dir": f"{HERE}/kept",
    "csv_url_column": "url", "caption_strategy": "csv", "csv_caption_column": "caption", "resolution": 64, "disabled": False,
}  # fmt: skip
_EMBEDS = {"id": "texts", "type": "local", "dataset_type": "text_embeds", "default": True, "cache_dir": "c"}
_THEIRS_FILE: dict[str, Any] = {
    "--model_type": "deepfloyd-lora", "--model_family": "deepfloyd", "--model_flavour": "i-medium-400m", "--lora_rank": 16,
    "--data_backend_config": f"{HERE}/data.json", "--output_dir": f"{HERE}/out", "--train_batch_size": "2",
    "--max_train_steps": 100, "--learning_rate": "1e-4", "--optimizer": "adamw_bf16", "--lr_scheduler": "cosine",
    "--mixed_precision": "bf16",
    "--validation_prompt": "a star", "--seed": 42, "--num_train_epochs": 0, "--report_to": "none", "--use_ema": "true",
}  # fmt: skip
_ENV = """
export MODEL_TYPE='deepfloyd-lora'
export MODEL_FLAVOUR="i-medium-400m"
DATALOADER_CONFIG="@HERE@/data.json"
export OUTPUT_DIR="$HOME/out" # a comment
export MAX_NUM_STEPS=100 LEARNING_RATE=1e-4
export TRAINER_EXTRA_ARGS="--lora_rank=8 --use_ema"
"""
_SETS = (
    "seed=3", "stage1.lora_rank=8", "validation_prompt=a star", 'stage1.lora_target_modules=["to_q"]', "gate=",
    "stage1.learning_rate=1e-4", "stage3.model_flavour=tiny-iii", "retention.keep=3", "stage1={max_train_steps=3}",
)  # fmt: skip
_IN_SHELL = ("$(", "`", "${X}", "'", "\\", "export ")


def _folder(folder: Path) -> None:
    """The good files, and what they name."""
    (folder / "pictures").mkdir()
    for name in ("pictures/t.parquet", "pictures/t.csv"):
        (folder / name).write_bytes(b"")
    for name, text in (("run.toml", _toml()[0]), ("data.json", _data()[0])):
        (folder / name).write_bytes(text.replace(HERE.encode(), str(folder).encode()))


def _toml() -> list[bytes]:
    whole = RUN_FILE.replace("{folder}", HERE)
    files = f'workspace = "{HERE}/w"\ndata_backend_config = "{HERE}/data.json"\n'
    plain = f'{files}model_flavour = "tiny-i"\nmax_train_steps = 3\n'
    return [whole.encode(), plain.encode(), f"{whole}\n[stage3]\nmodel_flavour = 'tiny-iii'\n".encode()]


def _data() -> list[bytes]:
    sets = ([_ENTRY], [_ENTRY, _EMBEDS], [_TABLE | {"id": "other"}, _ENTRY], [_URLS, _ENTRY])
    return [json.dumps(entries, indent=1).encode() for entries in sets]


def _json() -> list[bytes]:
    return [json.dumps(tomllib.loads(text.decode())).encode() for text in _toml()]


def _theirs() -> list[bytes]:
    return [
        json.dumps(_THEIRS_FILE, indent=1).encode(),
        json.dumps({key[2:]: value for key, value in _THEIRS_FILE.items()}).encode(),
    ]


def _reads(name: str) -> Any:
    """Trials that put the input into this file and load the run."""

    @contextmanager
    def opened(folder: Path) -> Iterator[Trial]:
        _folder(folder)
        file = folder / name
        config = folder / "run.toml" if name == "data.json" else file

        def trial(data: bytes) -> str:
            text = data.replace(HERE.encode(), str(folder).encode())
            file.write_bytes(text)
            try:
                load_run(config)
            except DeepFloydError as error:
                # A path: the file's, or that of a file which it names; `workspace` may be one, beside the process.
                return named_error(error, "/", "stage", "workspace")
            finally:
                assert file.read_bytes() == text, "the file was changed"
            return "accepted"

        yield trial
        shutil.rmtree(folder)

    return opened


@contextmanager
def _overridden(folder: Path) -> Iterator[Trial]:
    _folder(folder)

    def trial(data: bytes) -> str:
        text = data.decode("utf-8", "surrogateescape")
        try:
            load_run(folder / "run.toml", (text,))
        except DeepFloydError as error:
            return named_error(error, "--set", folder, text.partition("=")[0].strip())
        return "accepted"

    yield trial
    shutil.rmtree(folder)


_json_places = one_of(
    damaged_text((*_DATA_KEYS, *_THEIRS)), lambda rng, data: json.dumps(damaged_json(rng, json.loads(data))).encode()
)
TARGETS = (
    Target("run file (TOML)", _toml, damaged_text((*_KEYS, *_VALUES)), _reads("x.toml")),
    Target("run file (JSON)", _json, _json_places, _reads("x.json")),
    Target("data file (JSON)", _data, _json_places, _reads("data.json")),
    Target("SimpleTuner's config.json", _theirs, _json_places, _reads("config.json")),
    Target("SimpleTuner's config.env", lambda: [_ENV.encode()], damaged_text(_IN_SHELL), _reads("config.env")),
    Target("`--set`", lambda: [text.encode() for text in _SETS], damaged_text((*_KEYS, *_VALUES, "=", ".")), _overridden),
)  # fmt: skip

"""What artifacts are made of, and the LoRAs of a small training, held equal to golden.json: the guard of refactoring.

Where a change is meant to alter an artifact, this writes golden.json anew, and the commit says why:
`WRITE_GOLDEN=1 .venv/bin/python -P -m pytest tests/house/test_golden.py`. Its pictures are files of the demo, whose bytes
and names are in fingerprints.
Numbers are the same on every machine where they are computed in integers. A LoRA's are not, so of each tensor it has the
norm and a product with a fixed vector.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_world import DataWorld
from safetensors import safe_open
from training_parts import prepared, run_here, train_stage

import flows
from deepfloyd_core.adapters.files import LORA_FILE
from deepfloyd_core.bundle.planned import planned
from deepfloyd_core.config.run import Run
from deepfloyd_core.files import canonical_json, record_diff, sha256_bytes
from deepfloyd_core.index.identity import index_request
from deepfloyd_core.index.scan import scan
from deepfloyd_core.models.folders import resolve
from deepfloyd_core.preflight.generate import GenerateOptions, pictures_of
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.sampling.identity import generate_request
from deepfloyd_core.store.artifacts import Artifact, Request

FILE = Path(__file__).with_name("golden.json")
DEMO = Path(flows.__path__[0]).parent / "datasets" / "demo"
PICTURES = "star_00*", "star_[cst]*"  # nine, and those that the index rejects or turns
WRITE = bool(os.environ.get("WRITE_GOLDEN"))
# Share of a tensor's norm, or of LEAST: processors differ by 6e-5 of it. The gradients of Stage II's queries and keys are
# hardly above the rounding of what cancels in them, so that such tensors, of norms below 1e-4, are another's by some 1e-6.
TOLERANCE, LEAST = 1e-3, 1e-2

SIZES = {"minimum_image_size": 64, "maximum_image_size": 64, "target_downsample_size": 64}
STARS: dict[str, Any] = {"id": "stars", "type": "local", "caption_strategy": "textfile", **SIZES}
SHAPES: dict[str, Any] = {
    **STARS, "id": "shapes", "crop_aspect": "random", "crop_aspect_buckets": [1.0, 0.75, 1.5], "crop_style": "random",
    "repeats": 3, "random_crops": 2, "probability": 0.5, "prepend_instance_prompt": True, "instance_prompt": "drawn",
}  # fmt: skip
WHOLE: dict[str, Any] = {
    "id": "whole", "type": "local", "caption_strategy": "instanceprompt", "instance_prompt": ["a star", "a shape"],
    "crop": False, "max_num_samples": 6, "start_step": 2, "duplicates": "first",
}  # fmt: skip
PAIRS: dict[str, Any] = {"id": "pairs", "type": "local", "dataset_type": "conditioning"}
COMMON = {
    "num_eval_images": 2, "mixed_precision": "no", "text_encoder_dtype": "fp32", "shard_mib": 1.0, "device": "cpu",
    "num_threads": 1, "max_rejected_share": 0.5, "validation_num_inference_steps": 2, "max_train_steps": 3,
}  # fmt: skip
SMALL: dict[str, Any] = {
    **COMMON,
    "validation_prompt": "a purple star",
    "stage1": {
        "model_flavour": "tiny-i", "lora_rank": 4, "learning_rate": 1e-3, "train_batch_size": 2, "random_flip": True,
        "caption_dropout_probability": 0.3, "lora_dropout": 0.1, "use_ema": True, "snr_gamma": 5.0,
    },
    "stage2": {
        "model_flavour": "tiny-ii", "lora_rank": 4, "learning_rate": 1e-3, "train_batch_size": 1, "max_train_steps": 2,
        "low_res_jpeg_quality": 40, "stage2_patch": 128, "noise_level_end": 500,
    },
}  # fmt: skip
# Of each run its data sets and its run file. Together they have every kind of artifact.
RUNS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "cascade": (
        [STARS],
        {
            **SMALL,
            "stage1": {**SMALL["stage1"], "validation_step_interval": 2},
            "stage2": {
                **SMALL["stage2"], "low_res_stage1_share": 0.5, "low_res_stage1_strength": 0.5,
                "validation_noise_levels": [50],
            },
        },
    ),
    "varied": (
        [SHAPES, WHOLE],
        {
            **COMMON,
            "seed": 7, "data_backend_sampling": "uniform", "eval_dataset_id": "shapes", "tokenizer_max_length": 80,
            "embed_compression": "packed", "validation_resolution": "64,96x64", "validation_negative_prompt": "gray",
            "stage1": {
                "model_flavour": "tiny-i", "use_dora": True, "lora_alpha": 8.0, "lora_init_type": "gaussian",
                "snr_gamma": 5.0, "loss_type": "huber", "huber_schedule": "exponential", "offset_noise": True,
                "optimizer": "adamw_bf16", "lr_scheduler": "polynomial", "mixed_precision": "bf16",
                "timestep_bias_strategy": "later", "timestep_bias_multiplier": 2.0, "input_perturbation": 0.1,
                "validation_guidance": 3.0,
            },
            "stage2": {
                "model_flavour": "tiny-ii", "model_type": "full", "train_variance": True, "low_res_blur": 1.0,
                "low_res_noise": 4.0, "low_res_degraded_share": 0.5, "gradient_accumulation_steps": 2,
                "validation_step_interval": 1, "validation_back_projection": True,
                "scheduled_sampling_max_step_offset": 20, "scheduled_sampling_probability": 0.5, "use_soft_min_snr": True,
            },
        },
    ),
    "control": (
        [{**STARS, "conditioning_data": "pairs"}, PAIRS],
        {
            **COMMON,
            "stage1": {"model_flavour": "tiny-i", "controlnet": True, "controlnet_conditioning": "paired"},
        },
    ),
    "second": (
        [{**STARS, "crop_aspect": "preserve", "crop_style": "corner"}],
        {
            **COMMON,
            "validation_resolution": 256,
            "stage2": {"model_flavour": "tiny-ii", "use_bitfit": True, "dynamo_backend": "aot_eager"},
        },
    ),
}  # fmt: skip


def demo_run(folder: Path, entries: Iterable[dict[str, Any]], keys: dict[str, Any]) -> Run:
    """A run on pictures of the demo, in a folder of its own."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    for file in (file for pattern in PICTURES for file in DEMO.glob(pattern)):
        shutil.copy(file, pictures)
    (folder / "data.json").write_text(json.dumps([{**entry, "instance_data_dir": str(pictures)} for entry in entries]))
    where = {"workspace": str(folder / "workspace"), "data_backend_config": str(folder / "data.json")}
    (folder / "run.json").write_text(json.dumps({**where, **keys}))
    return load_run(folder / "run.json")


def hold(section: str, found: dict[str, Any]) -> None:
    """Compare with a section of the golden file, or write it there."""
    found = json.loads(canonical_json(found))  # tuples are lists
    if WRITE:
        write({**read(), section: found})
    assert not record_diff(read()[section], found), "\n".join(record_diff(read()[section], found))


def read() -> dict[str, dict[str, Any]]:
    """The sections of the golden file."""
    return dict(json.loads(FILE.read_text())) if FILE.exists() else {}


def write(sections: dict[str, dict[str, Any]]) -> None:
    """Write them, a line for each entry."""
    texts = []
    for section in sorted(sections):
        lines = [f"  {json.dumps(key)}: {canonical_json(value)}" for key, value in sorted(sections[section].items())]
        texts.append(f"{json.dumps(section)}: {{\n" + ",\n".join(lines) + "\n}")
    FILE.write_text("{" + ",\n".join(texts) + "}\n")


@pytest.fixture
def same_text_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """The versions of the libraries that clean captions are in the embeds' fingerprint; here they are always the same."""
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "1" if name in ("diffusers", "ftfy") else real(name))


@pytest.fixture(scope="module", params=RUNS)
def indexed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, new_world: Callable[[Path], DataWorld]
) -> tuple[str, Run, Artifact, DataWorld]:
    """The name of a run, its configuration and image index, and what makes the others of its data stages."""
    run = demo_run(tmp_path_factory.mktemp("golden") / "run", *RUNS[request.param])
    world = new_world(run.workspace)
    return request.param, run, world.index(run), world


def test_an_artifact_of_each_kind_has_the_fingerprint_that_it_had(
    indexed: tuple[str, Run, Artifact, DataWorld], same_text_libraries: None
) -> None:
    name, run, index, _ = indexed
    requests = planned(run, index)
    assert requests is not None
    requests["image_index"] = index_request(run, scan(run))
    assert requests["image_index"].name == index.name
    if run.config.stage1 and not run.config.paired:
        folders = {stage: resolve(run.config.stage(stage).model, stage, text=stage == 1) for stage in run.config.stages}
        bundle = Artifact("lora_bundle", requests["lora_bundle"].fingerprint, run.workspace)
        options = GenerateOptions(("a star",), "latest", seeds="3")
        requests["generated"] = generate_request(run, pictures_of(run, options), "latest", folders, bundle)
    hold(f"{name}, requests", {kind: told(request) for kind, request in requests.items()})


def told(request: Request) -> dict[str, Any]:
    """A request, and its fingerprint, which would change with the way in which it is taken as well."""
    return {**request.record, "fingerprint": request.fingerprint}


def test_the_index_and_the_crops_have_the_bytes_that_they_had(indexed: tuple[str, Run, Artifact, DataWorld]) -> None:
    name, run, index, world = indexed
    pixels = {stage: world.pixels(run, index, stage) for stage in run.config.stages}
    made = [index, *pixels.values(), world.eval_set(run, index)]
    if run.config.paired:
        made += [world.conditioning(run, index, of) for of in made[1:]]
    patterns = "*.parquet", "rows.arrow", "held_out.arrow"
    files = {f"{each.kind}/{pattern}": sorted(each.path.glob(pattern)) for each in made for pattern in patterns}
    hold(f"{name}, columns", {place: columns(paths) for place, paths in files.items() if paths})


def columns(paths: list[Path]) -> dict[str, str]:
    """sha256, 16 digits, of the files' names and of each column's values; not of the bytes, where a writer's version is, nor
    of the places of values among them.
    """
    values: dict[str, list[Any]] = {"files": [path.name for path in paths]}
    for path in paths:
        table = pq.read_table(path) if path.suffix == ".parquet" else pa.ipc.open_file(path).read_all()
        for column in set(table.column_names) - {"start"}:
            values.setdefault(column, []).extend(table[column].to_pylist())
    return {column: sha256_bytes(b"".join(map(as_bytes, rows)))[:16] for column, rows in values.items()}


def as_bytes(value: Any) -> bytes:
    """A value of a column, ended."""
    return value if isinstance(value, bytes) else canonical_json(value).encode() + b"\n"


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory, new_world: Callable[[Path], DataWorld]) -> dict[int, Artifact]:
    """Those of a small run of both stages."""
    run = demo_run(tmp_path_factory.mktemp("golden") / "run", [STARS], SMALL)
    made = prepared(run, new_world(run.workspace))
    return {stage: train_stage(run, made, stage, run.workspace, how=run_here) for stage in run.config.stages}


@pytest.mark.parametrize("stage", [1, 2])
def test_the_lora_of_a_stage_is_what_it_was(loras: dict[int, Artifact], stage: int) -> None:
    path, section = loras[stage].path / LORA_FILE, f"stage {stage} LoRA"
    found: dict[str, Any] = {name: list(values) for name, *values in tensors(path)}
    for name, values in () if WRITE else found.items():
        *_, norm, product = read()[section].get(name, values)
        assert values[-2:] == pytest.approx([norm, product], rel=0, abs=TOLERANCE * max(norm, LEAST)), name
        values[-2:] = norm, product
    with safe_open(path, "np") as file:
        hold(section, {**found, "metadata": file.metadata()})


def tensors(path: Path) -> Iterator[tuple[str, list[int], str, float, float]]:
    """Of each tensor its name, shape and dtype, its norm and its product with normal noise."""
    with safe_open(path, "np") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            flat = tensor.astype(np.float64).ravel()
            norm, product = np.linalg.norm(flat), flat @ np.random.default_rng(0).standard_normal(flat.size)
            yield name, list(tensor.shape), str(tensor.dtype), float(f"{norm:.7g}"), float(f"{product:.7g}")

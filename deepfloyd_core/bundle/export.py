"""Writes a version's weights in the forms of other programs: whole UNets, with all that was trained in their weights, or
kohya's single files of a LoRA. Loads torch.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file

from deepfloyd_core.adapters.files import CONTROL_FILE, LORA_FILE, product_name
from deepfloyd_core.adapters.full import save_unet
from deepfloyd_core.adapters.lora_file import adaptable_layers, lora_alpha
from deepfloyd_core.adapters.lora_formats import our_names
from deepfloyd_core.adapters.method import load_product
from deepfloyd_core.bundle.publish_files import SUMS, need_empty, sums_text
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stages import STAGES, Stage
from deepfloyd_core.errors import ArtifactError, ConfigError, DeepFloydError
from deepfloyd_core.files import sha256_file, write_bytes
from deepfloyd_core.models.headers import read_header, unet_shapes
from deepfloyd_core.models.same_output import output_change, small_change
from deepfloyd_core.models.tensor_files import save_tensors
from deepfloyd_core.models.unet import load_scheduler, load_unet, stock_pipeline
from deepfloyd_core.sampling.identity import check_base
from deepfloyd_core.store.artifacts import Artifact, verify_artifact
from deepfloyd_core.store.file_faults import written
from deepfloyd_core.store.versions import stage_folder

Form = Literal["merged", "kohya"]


@dataclass(frozen=True)
class _Exported:
    """A stage to write."""

    stage: Stage
    base: Path  # folder of its base model
    trained: Path  # folder with what was trained
    bf16: bool


def export_version(
    run: Run, bundle: Artifact, bases: Mapping[Stage, Path], form: Form, out: Path, bf16: bool = False
) -> list[Path]:
    """Write each trained stage of a version into an empty folder, and the sums of all files. bases: folders of base models;
    bf16: weights in half the bytes, rounded. Returns the files.

    Raises ConfigError for a folder with files in it, and for a stage that has no such form; ArtifactError when merged
    weights do something else than the trained ones.
    """
    need_empty(out)
    if damage := verify_artifact(bundle):
        raise ArtifactError(f"The version is not exported: {damage[0]}")
    if absent := [kind.title for stage, kind in STAGES.items()
                  if f"{kind.table}_lora" in bundle.inputs and stage not in run.config.stages]:  # fmt: skip
        raise ConfigError(
            f"The version has {' and '.join(absent)}, and the run file does not: its base model is not known."
        )
    stages = [stage for stage in run.config.stages if f"{STAGES[stage].table}_lora" in bundle.inputs]
    for stage in stages:
        check_base(bundle, stage, bases[stage])
        _FAULTS[form](STAGES[stage].title, stage_folder(bundle.path, stage))
    out.mkdir(parents=True, exist_ok=True)
    with _emptied_by_errors(out):
        for stage in stages:
            _WRITERS[form](_Exported(stage, bases[stage], stage_folder(bundle.path, stage), bf16), out)
        return _summed(out)


@contextmanager
def _emptied_by_errors(out: Path) -> Iterator[None]:
    """A block that fills an empty folder. After an error, of a full disk too, it is empty: the same command goes again."""
    try:
        with written(out):
            yield
    except DeepFloydError:
        for entry in out.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        raise


def _summed(out: Path) -> list[Path]:
    """All files of a folder, with that of their sums, which is written."""
    files = sorted(path for path in out.rglob("*") if path.is_file())
    digests = {str(path.relative_to(out)): sha256_file(path) for path in files}
    write_bytes(out / SUMS, sums_text(digests).encode())
    for file in files:  # safetensors writes files that only their owner can read
        file.chmod((out / SUMS).stat().st_mode)
    return [*files, out / SUMS]


def _merged_fault(title: str, trained: Path) -> None:
    if product_name(trained) == CONTROL_FILE:
        raise ConfigError(f"{title} is a ControlNet, whose layers are beside its UNet's: it cannot be merged.")


def _kohya_fault(title: str, trained: Path) -> None:
    if (name := product_name(trained)) != LORA_FILE:
        raise ConfigError(f"{title} has {name}; kohya's form is for LoRAs. Use --form merged.")
    if any("magnitude_vector" in name for name in read_header(trained / LORA_FILE).shapes):
        raise ConfigError(f"{title} has a LoRA with DoRA, which kohya's programs compute otherwise. Use --form merged.")


def _merged(one: _Exported, out: Path) -> None:
    """`stageN/unet` and `stageN/scheduler`, as diffusers reads them."""
    unet = load_unet(one.base, torch.float32)
    pipeline = stock_pipeline(one.base, one.stage, unet, load_scheduler(one.trained))
    load_product(pipeline, one.trained)
    unet.eval()
    change = output_change(unet, one.base, torch.float32)
    if product_name(one.trained) == LORA_FILE:
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    small_change(change, f"{one.trained}: the merged weights' output")
    folder = out / STAGES[one.stage].table
    folder.mkdir()
    save_unet(unet.to(torch.bfloat16) if one.bf16 else unet, one.stage, one.base, folder)
    shutil.copytree(one.trained / "scheduler", folder / "scheduler")


def _kohya(one: _Exported, out: Path) -> None:
    """`stageN.safetensors`: layers by names with underscores, halves called down and up, an alpha for each."""
    file = one.trained / LORA_FILE
    header, saved = read_header(file), load_file(file)
    layers = list(adaptable_layers(unet_shapes(one.base)))
    names = our_names(saved, layers)
    alpha = lora_alpha(file, header, names)
    flat = {layer: layer.replace(".", "_") for layer in layers}
    state: dict[str, torch.Tensor] = {}
    for theirs, ours in names.tensors.items():
        layer, _, part = ours.rpartition(".lora_")
        if list(flat.values()).count(flat[layer]) > 1:
            raise ConfigError(f"{STAGES[one.stage].title}: two layers are called {flat[layer]} in kohya's form.")
        half = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[part]
        tensor = saved[theirs]
        state[f"lora_unet_{flat[layer]}.{half}"] = tensor.bfloat16() if one.bf16 else tensor
        rank = tensor.shape[0] if half.startswith("lora_down") else tensor.shape[1]
        state[f"lora_unet_{flat[layer]}.alpha"] = torch.tensor(float(rank if alpha is None else alpha))
    save_tensors(state, out / f"{STAGES[one.stage].table}.safetensors")


_FAULTS: dict[Form, Callable[[str, Path], None]] = {"merged": _merged_fault, "kohya": _kohya_fault}
_WRITERS: dict[Form, Callable[[_Exported, Path], None]] = {"merged": _merged, "kohya": _kohya}

"""Going on from what was trained before: at step 0 the model is the parent's, and anything that cannot be is refused."""

import json
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact_rows import SOME_EVAL_SET, sealed_manifest
from diffusers import UNet2DConditionModel
from inputs import training_inputs
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_run import SmallRun

from deepfloyd_core.adapters.controlnet import Control, load_control
from deepfloyd_core.adapters.controlnet_file import new_shapes
from deepfloyd_core.adapters.files import CONTROL_FILE, LORA_FILE
from deepfloyd_core.adapters.lora import trainable
from deepfloyd_core.adapters.method import base_dtype, method_of
from deepfloyd_core.adapters.start_from import find_parent
from deepfloyd_core.config.flavours import FLAVOURS
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stages import Stage
from deepfloyd_core.errors import ArtifactError, ConfigError
from deepfloyd_core.files import sha256_file, write_sealed
from deepfloyd_core.models.random_weights import design_of
from deepfloyd_core.models.unet import load_scheduler, load_unet, stock_pipeline
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.store.artifacts import Artifact, Request
from deepfloyd_core.store.manifest import MANIFEST
from deepfloyd_core.training.identity import lora_request

FOLDERS = {1: Path(FLAVOURS["tiny-i"].repo), 2: Path(FLAVOURS["tiny-ii"].repo)}
LORA: dict[str, Any] = {"lora_rank": 4, "lora_alpha": 8.0}
DORA = {"lora_rank": 2, "use_dora": True, "lora_target_modules": ["to_q", "to_out.0", "conv1"]}
BITFIT = {"use_bitfit": True}
FULL = {"model_type": "full", "learning_rate": 1e-5}
CONTROL: dict[str, Any] = {**LORA, "controlnet": True, "controlnet_conditioning": "grayscale"}
CONTROL_DORA = {**DORA, "controlnet": True, "controlnet_conditioning": "low_res"}
PARENTS: tuple[tuple[str, Stage, dict[str, Any]], ...] = (
    ("lora", 1, LORA), ("dora", 1, DORA), ("biases", 1, BITFIT), ("full", 1, FULL), ("ii", 2, LORA),
    ("control", 1, CONTROL), ("control-dora", 1, CONTROL_DORA),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, new_small_run: Callable[[Path], SmallRun]) -> Path:
    """A data set to name, and parents of every kind by name; nothing is trained."""
    folder: Path = tmp_path_factory.mktemp("parents")
    new_small_run(folder / "run")
    for name, stage, keys in PARENTS:
        moved(folder / name, stage, keys)
    return folder


def stage_config(stage: Stage, keys: dict[str, Any]) -> StageConfig:
    first = {"model_flavour": f"tiny-{'i' * stage}", "mixed_precision": "no"}
    return StageConfig.model_validate({**first, **keys})


def moved(out: Path, stage: Stage, keys: dict[str, Any]) -> None:
    """What a training with these settings could have left in a folder."""
    config, generator = stage_config(stage, keys), torch.Generator().manual_seed(5)
    unet = load_unet(FOLDERS[stage], base_dtype(config))
    method_of(config).prepare(unet, config, 1)
    with torch.no_grad():
        for param in trainable(unet).values():
            param.add_(0.02 * torch.randn(param.shape, generator=generator))
    out.mkdir()
    method_of(config).save(unet, stage, FOLDERS[stage], out)


def new_run(folder: Path, parent: Path | str | None, stage: Stage = 1, **keys: Any) -> Run:
    """A run of one stage that starts from a parent."""
    table = {"model_flavour": f"tiny-{'i' * stage}", "mixed_precision": "no", **keys}
    table |= {} if parent is None else {"init_lora": str(parent)}
    config = {
        "workspace": str(folder / "workspace"), "data_backend_config": str(folder / "run" / "data.json"),
        f"stage{stage}": table,
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(config))
    return load_run(folder / "run.json")


def refusal(folder: Path, parent: Path | str, stage: Stage = 1, **keys: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        find_parent(new_run(folder, parent, stage, **keys), stage, FOLDERS[stage])
    message = str(caught.value)
    assert message.startswith(f"stage{stage}.init_lora is {str(parent)!r}")
    assert len(message.splitlines()) == 1
    return message


def output(unet: UNet2DConditionModel) -> torch.Tensor:
    """Epsilon and variance on a fixed input; of a UNet with a control as it follows a picture."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn((1, unet.config.in_channels, 32, 32), generator=generator)
    text = torch.randn((1, 77, unet.config.encoder_hid_dim), generator=generator)
    level = torch.tensor([250]) if unet.config.class_embed_type else None
    follow = {"control_image": torch.rand((1, 3, 32, 32), generator=generator)} if hasattr(unet, "control") else None
    with torch.inference_mode():
        called = unet.eval()(x, torch.tensor([500]), text, class_labels=level, cross_attention_kwargs=follow)
        return torch.as_tensor(called[0])


@pytest.mark.parametrize(("name", "stage", "keys"), PARENTS)
def test_training_starts_at_the_parent_exactly(folder: Path, name: str, stage: Stage, keys: dict[str, Any]) -> None:
    """Against a UNet into which the stock pipeline (for biases and UNets: diffusers and torch) loaded the parent; of a
    ControlNet-LoRA against one that is sampled with."""
    config = stage_config(stage, keys)
    parent = find_parent(new_run(folder, folder / name, stage, **keys), stage, FOLDERS[stage])
    assert parent is not None
    unet = load_unet(FOLDERS[stage], base_dtype(config))
    method_of(config).prepare(unet, config, 7)
    method_of(config).start(unet, parent.pinned.checked("the training starts from"))

    stock = stock_pipeline(
        FOLDERS[stage], stage, load_unet(FOLDERS[stage], torch.float32), load_scheduler(FOLDERS[stage])
    )
    untuned = output(stock.unet)
    if name == "full":
        stock.unet = UNet2DConditionModel.from_pretrained(folder / name, subfolder="unet")
    elif name == "biases":
        assert not stock.unet.load_state_dict(load_file(parent.file), strict=False).unexpected_keys
    elif config.controlnet:
        load_control(stock.unet, parent.file)
    else:
        stock.load_lora_weights(folder / name, adapter_name="default")
    for param in stock.unet.parameters():  # mapped tensors start anywhere in a file; products round accordingly
        param.data = param.data.clone()
    loaded = dict(stock.unet.named_parameters())
    assert all(torch.equal(param, loaded[name]) for name, param in trainable(unet).items())
    assert len(trainable(unet)) == len(load_file(parent.file))
    assert torch.equal(output(unet), output(stock.unet))
    assert (output(unet) - untuned).abs().max() > 1e-4


def test_the_bytes_of_the_parent_are_in_the_request_and_its_path_is_not(folder: Path, tmp_path: Path) -> None:
    def request(parent: Path | None) -> Request:
        run = new_run(folder, parent, **LORA)
        found = find_parent(run, 1, FOLDERS[1])
        return lora_request(run, 1, FOLDERS[1], inputs, (), found.pinned.sha256 if found else None)

    inputs = training_inputs(text=Artifact("stage1_text", "0" * 16, tmp_path), eval_set=SOME_EVAL_SET)
    write_sealed(tmp_path / MANIFEST, sealed_manifest(unet=""))
    file = folder / "lora" / LORA_FILE
    (tmp_path / "copy.safetensors").write_bytes(file.read_bytes())
    with safe_open(file, "pt") as opened:
        doubled = {name: tensor * 2 for name, tensor in load_file(file).items()}
        save_file(doubled, tmp_path / "changed.safetensors", opened.metadata())
    same = [request(path) for path in (folder / "lora", file, tmp_path / "copy.safetensors")]
    assert same[0] == same[1] == same[2]
    assert same[0].inputs["parent"] == sha256_file(file)
    assert "init_lora" not in same[0].spec
    without, changed = request(None), request(tmp_path / "changed.safetensors")
    assert "parent" not in without.inputs
    assert len({same[0].fingerprint, without.fingerprint, changed.fingerprint}) == 3


def test_when_checkpoints_are_written_is_in_no_fingerprint(folder: Path, tmp_path: Path) -> None:
    inputs = training_inputs(text=Artifact("stage1_text", "0" * 16, tmp_path), eval_set=SOME_EVAL_SET)
    write_sealed(tmp_path / MANIFEST, sealed_manifest(unet=""))

    def fingerprint(**keys: Any) -> str:
        return lora_request(new_run(folder, None, **keys), 1, FOLDERS[1], inputs).fingerprint

    rare = fingerprint(checkpointing_minutes=0.5, checkpoint_step_interval=7, checkpoints_total_limit=9)
    assert rare == fingerprint() != fingerprint(max_train_steps=7)


@pytest.mark.parametrize(
    ("name", "stage", "keys", "says"),
    [
        ("lora", 1, {}, "a LoRA of rank 4; lora_rank is 16. Set them alike."),
        ("lora", 1, {"lora_rank": 4}, "a LoRA with lora_alpha 8; this run has 4. Set them alike."),
        ("lora", 1, {**LORA, "use_dora": True}, "a LoRA without DoRA; use_dora is True."),
        ("dora", 1, {**DORA, "use_dora": False}, "a LoRA with DoRA; use_dora is False."),
        ("lora", 1, {**LORA, "lora_target_modules": ["to_q", "to_k"]},
         "a LoRA on add_k_proj add_v_proj to_k to_out.0 to_q to_v; lora_target_modules asks for to_k to_q. Set"),
        ("lora", 2, LORA, "does not fit tiny-ii: "),
        ("ii", 1, LORA, "does not fit tiny-i: "),
        ("full", 2, FULL, "does not fit tiny-ii: "),
        ("biases", 2, BITFIT, "does not fit tiny-ii: "),
        ("lora", 1, FULL, "which is a LoRA; the settings train a UNet. Set model_type = lora, or remove init_lora."),
        ("full", 1, LORA, "which is a UNet; the settings train a LoRA. Set model_type = full, or remove init_lora."),
        ("biases", 1, LORA, "which is biases; the settings train a LoRA. Set use_bitfit = true"),
        ("lora", 1, {**LORA, "mixed_precision": "bf16", "optimizer": "adamw_bf16"},
         "with weights in F32; adamw_bf16 starts exactly from BF16 only. Use adamw."),
        ("lora", 1, CONTROL,
         "which is a LoRA; the settings train a ControlNet-LoRA. Set controlnet = false, or remove init_lora."),
        ("control", 1, LORA,
         "which is a ControlNet-LoRA; the settings train a LoRA. Set controlnet = true, or remove init_lora."),
        ("control", 1, FULL, "the settings train a UNet. Set model_type = lora and controlnet = true, or remove init_lora."),
        ("full", 1, CONTROL, "which is a UNet; the settings train a ControlNet-LoRA. Set model_type = full and contr"),
        ("biases", 1, CONTROL, "which is biases; the settings train a ControlNet-LoRA. Set use_bitfit = true and control"),
        ("lora", 1, BITFIT, "which is a LoRA; the settings train biases. Set use_bitfit = false, or remove init_lora."),
        ("control", 2, LORA, "which is a ControlNet-LoRA, which only Stage I supports. Remove init_lora."),
        ("control", 1, {**CONTROL, "controlnet_conditioning": "canny"},
         "whose conditioning is grayscale; controlnet_conditioning is canny. Set them alike."),
        ("control", 1, {**CONTROL, "lora_rank": 8}, "a LoRA of rank 4; lora_rank is 8. Set them alike."),
        ("control", 1, {**CONTROL, "lora_alpha": 4.0}, "a LoRA with lora_alpha 8; this run has 4. Set them alike."),
        ("control", 1, {**CONTROL, "use_dora": True}, "a LoRA without DoRA; use_dora is True."),
        ("control-dora", 1, {**CONTROL_DORA, "use_dora": False}, "a LoRA with DoRA; use_dora is False."),
        ("control", 1, {**CONTROL, "lora_target_modules": ["to_q", "conv_in"]}, "asks for conv_in to_q. Set them alike."),
        ("control", 1, {**CONTROL, "mixed_precision": "bf16", "optimizer": "adamw_bf16"},
         "with weights in F32; adamw_bf16 starts exactly from BF16 only. Use adamw."),
        ("nowhere", 1, LORA, "there is no such file or folder"),
        ("run", 1, LORA, "has none of bitfit_biases.safetensors, controlnet_lora.safetensors, unet/diffusion_pytorch_model"),
        ("run/data.json", 1, LORA, "only .safetensors files are read, never a pickle"),
    ],
)  # fmt: skip
def test_a_parent_that_the_settings_do_not_go_on_from_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, stage: Stage, keys: dict[str, Any], says: str
) -> None:
    monkeypatch.setattr("diffusers.ModelMixin.from_pretrained", lambda *_, **__: pytest.fail("a model is loaded"))
    assert says in refusal(folder, folder / name, stage, **keys)


def test_damaged_and_foreign_files_are_refused(folder: Path, tmp_path: Path) -> None:
    file, whole = tmp_path / "parent.safetensors", (folder / "lora" / LORA_FILE).read_bytes()
    for damaged in (whole[:-1], whole[:50], b""):
        file.write_bytes(damaged)
        assert f"and {file} cannot be read: " in refusal(folder, file, **LORA)
    save_file({"some.thing": torch.zeros(4, 64)}, file)
    assert "some.thing in it belongs to no known format of a LoRA" in refusal(folder, file, **LORA)
    state = load_file(folder / "lora" / LORA_FILE)
    for record in ("no JSON", "[]", '{"unet.lora_alpha": "8"}', "[" * 100_000):
        save_file(state, file, {"lora_adapter_metadata": record})
        assert "cannot be read: " in refusal(folder, file, **LORA)
    half = next(name for name in state if "lora_B" in name)
    save_file({**state, half: state[half][:, :2].contiguous()}, file)
    assert "which has a lora_B of (" in refusal(folder, file, **LORA)
    state.pop(half)
    save_file(state, file)
    assert "which has only one half of the adapter on " in refusal(folder, file, **LORA)


def test_damaged_and_foreign_control_files_are_refused(folder: Path, tmp_path: Path) -> None:
    file, whole = tmp_path / CONTROL_FILE, (folder / "control" / CONTROL_FILE).read_bytes()
    for damaged in (whole[:-1], whole[:50], b""):
        file.write_bytes(damaged)
        assert f"and {file} cannot be read: " in refusal(folder, file, **CONTROL)
    file.write_bytes(whole)
    state = load_file(file)
    with safe_open(file, "pt") as opened:
        record = json.loads(opened.metadata()["control"])

    def says(changed: dict[str, Any] | str, tensors: Mapping[str, torch.Tensor | None] | None = None) -> str:
        """The refusal of that file with another record and other tensors, or without some."""
        kept = {name: tensor for name, tensor in {**state, **(tensors or {})}.items() if tensor is not None}
        said = changed if isinstance(changed, str) else json.dumps({**record, **changed})
        save_file(kept, file, {"control": said})
        return refusal(folder, file, **CONTROL)

    for said in ("no JSON", "[]", "{}", "[" * 100_000):
        assert "cannot be read: " in says(said)
    assert "cannot be read: its conditioning is 'depth'" in says({"conditioning": "depth"})
    assert "cannot be read: its control is no record of a LoRA" in says({"lora": {"lora_alpha": "8"}})
    assert "that this trainer does not support" in says({"lora": {**record["lora"], "use_rslora": True}})
    assert "does not fit tiny-i: skips.3.bias is absent in it and (" in says({}, {"skips.3.bias": None})
    assert "skips.40.weight is (8, 8, 1, 1) in it and absent there" in says(
        {}, {"skips.40.weight": torch.zeros(8, 8, 1, 1)}
    )
    assert "hint.0.weight is (16, 4, 3, 3) in it and (16, 3, 3, 3)" in says(
        {}, {"hint.0.weight": torch.zeros(16, 4, 3, 3)}
    )
    half = next(name for name in state if "lora_B" in name)
    assert "which has only one half of the adapter on " in says({}, {half: None})
    assert "which has a lora_B of (" in says({}, {half: state[half][:, :2].contiguous()})
    assert "which has no adapters" in says({}, {name: None for name in state if name.startswith("encoder.")})
    bare = half.removeprefix("encoder.")
    assert f"{bare} is {tuple(state[half].shape)} in it and absent there" in says({}, {bare: state[half].clone()})
    up = {f"encoder.up_blocks.0.attentions.0.to_q.lora_{part}.weight": torch.zeros(4, 4) for part in "AB"}
    assert "does not fit tiny-i: up_blocks.0.attentions.0.to_q is (4, 4) in it and absent there" in says({}, up)


@pytest.mark.parametrize("flavour", ["tiny-i", "i-medium-400m", "i-large-900m", "i-xlarge-4.3b"])
def test_the_shapes_of_a_control_are_known_from_those_of_its_base(flavour: str) -> None:
    """Which is how another width is seen before a model is loaded; against a control that was made."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(design_of(FLAVOURS[flavour]).unet)
        control = Control(unet, "canny")
    base = {name: tuple(param.shape) for name, param in unet.state_dict().items()}
    made = {name: tuple(param.shape) for name, param in control.named_parameters() if not name.startswith("encoder.")}
    assert new_shapes(base) == made


def test_a_parent_that_changed_after_the_request_is_caught(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "parent.safetensors"
    file.write_bytes((folder / "lora" / LORA_FILE).read_bytes())
    parent = find_parent(new_run(folder, file, **LORA), 1, FOLDERS[1])
    assert parent is not None
    then = parent.pinned
    assert then.checked("the training starts from") == file
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ArtifactError, match=r"parent\.safetensors, which the training starts from, changed"):
        then.checked("the training starts from")


def test_a_number_is_a_published_version(folder: Path) -> None:
    with pytest.raises(ConfigError, match="There is no version '3'"):
        find_parent(new_run(folder, "3", **LORA), 1, FOLDERS[1])
    bundle = Artifact("lora_bundle", "0" * 16, folder / "workspace" / "lora_bundle" / ("0" * 16))
    (bundle.path / "stage1").mkdir(parents=True)
    (bundle.path / "stage1" / LORA_FILE).write_bytes((folder / "lora" / LORA_FILE).read_bytes())
    write_sealed(bundle.path / MANIFEST, sealed_manifest())
    (folder / "workspace" / "versions").mkdir()
    version = {"number": 3, "bundle": bundle.fingerprint, "image_index": "0" * 16, "data": "", "lineage": {}}
    write_sealed(folder / "workspace" / "versions" / "0003.json", version)
    found = find_parent(new_run(folder, "3", **LORA), 1, FOLDERS[1])
    assert found is not None and found.file == bundle.path / "stage1" / LORA_FILE


@pytest.mark.slow
def test_the_command_line_trains_on_from_an_artifact_and_refuses_the_other_stages(
    server: str, small_run: SmallRun
) -> None:
    def trained(stage: int, *keys: str) -> "subprocess.CompletedProcess[str]":
        settings = ("max_train_steps=1", *keys)
        return small_run.call_here(
            f"train-stage{stage}", str(small_run.config), *(f"--set=stage{stage}.{key}" for key in settings)
        )

    first = trained(1)
    assert first.returncode == 0, first.stderr
    (parent,) = (small_run.workspace / "stage1_lora").iterdir()
    longer = small_run.call_here("train-stage1", str(small_run.config), "--set=stage1.max_train_steps=2")
    said = " ".join(longer.stderr.split())
    assert "stage 1 starts at step 0 of 2" in said
    assert f'set in [stage1]: init_lora = "{parent}" and max_train_steps = 1' in said
    shutil.rmtree(next(path for path in (small_run.workspace / "stage1_lora").iterdir() if path != parent))
    second = trained(1, f"init_lora={parent}")
    assert second.returncode == 0, second.stderr
    (child,) = set((small_run.workspace / "stage1_lora").iterdir()) - {parent}
    assert json.loads((child / "manifest.json").read_text())["inputs"]["parent"] == sha256_file(parent / LORA_FILE)
    assert "init_lora" not in (child / "manifest.json").read_text()
    made = sorted(small_run.workspace.glob("*/*"))
    third = trained(2, f"init_lora={parent}")
    assert third.returncode == 2
    assert f"stage2.init_lora is '{parent}', which does not fit tiny-ii" in third.stderr
    assert "Traceback" not in third.stderr
    assert sorted(small_run.workspace.glob("*/*")) == made

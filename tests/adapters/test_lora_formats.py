"""LoRA files of other programs: every number of theirs is the start of a training, or the file is refused with a remedy.

Each format is written as its program writes it, by diffusers and peft themselves where they still do."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import IFPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from deepfloyd_core.adapters.files import LORA_FILE
from deepfloyd_core.adapters.lora import lora_state, trainable
from deepfloyd_core.adapters.lora_file import weights_file
from deepfloyd_core.adapters.lora_formats import our_names
from deepfloyd_core.adapters.method import METHODS
from deepfloyd_core.adapters.mixed import AskedLora, MixedLora, misfit, mixed_loras, parse_lora
from deepfloyd_core.adapters.mixing import load_loras
from deepfloyd_core.adapters.start_from import find_parent
from deepfloyd_core.config.flavours import FLAVOURS
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.models.unet import load_scheduler, load_unet, stock_pipeline
from deepfloyd_core.preflight.check import check_run
from deepfloyd_core.preflight.load import load_run
from deepfloyd_core.store.pinned import pinned

FOLDER = Path(FLAVOURS["tiny-i"].repo)
RANK = 4
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"]
Tensors = dict[str, torch.Tensor]


def adapted(alpha: float = RANK) -> UNet2DConditionModel:
    """A UNet as the DreamBooth script has it, with adapters that do something."""
    unet = load_unet(FOLDER, torch.float32)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=TARGETS))
    generator = torch.Generator().manual_seed(3)
    for name, param in unet.named_parameters():
        if "lora_" in name:
            param.data = 0.05 * torch.randn(param.shape, generator=generator)
    return unet


@pytest.fixture(scope="module")
def matrices() -> Tensors:
    """A and B of each layer, by LAYER.lora_A.weight."""
    return {name: tensor.clone() for name, tensor in get_peft_model_state_dict(adapted()).items()}


@pytest.fixture(scope="module")
def trainers() -> dict[float, UNet2DConditionModel]:
    """UNets as a training of each alpha has them."""
    made = {}
    for alpha in (2.0, float(RANK)):
        keys = {"model_flavour": "tiny-i", "mixed_precision": "no", "lora_rank": RANK, "lora_alpha": alpha}
        made[alpha] = load_unet(FOLDER, torch.float32)
        METHODS[LORA_FILE].prepare(made[alpha], StageConfig.model_validate(keys), 7)
    return made


@pytest.fixture(scope="module")
def effects(matrices: Tensors) -> dict[float, torch.Tensor]:
    """What a UNet gives into whose weights alpha / rank * B A was added, by alpha; 0: the base."""
    unet, found = load_unet(FOLDER, torch.float32), dict[float, torch.Tensor]()
    weights = dict(unet.named_parameters())
    for before, alpha in ((0.0, 0.0), (0.0, 2.0), (2.0, float(RANK))):
        for layer in {key.partition(".lora_")[0] for key in matrices}:
            low, up = matrices[f"{layer}.lora_A.weight"], matrices[f"{layer}.lora_B.weight"]
            weights[f"{layer}.weight"].data += (alpha - before) / RANK * up @ low
        found[alpha] = output(unet)
    assert all((found[alpha] - found[0.0]).abs().max() > 1e-3 for alpha in (2.0, float(RANK)))
    return found


def script(matrices: Tensors, out: Path) -> None:
    """As train_dreambooth_lora.py and SimpleTuner save: two formats in one file where projections are added."""
    state = convert_state_dict_to_diffusers(dict(matrices))
    IFPipeline.save_lora_weights(out, unet_lora_layers=state)


def old_script(matrices: Tensors, out: Path) -> None:
    """The same of versions that renamed every layer."""
    renamed = {old(name): tensor for name, tensor in matrices.items()}
    save_file({f"unet.{name}": tensor for name, tensor in renamed.items()}, out / "pytorch_lora_weights.safetensors")


def old(name: str) -> str:
    return name.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")


def processors(prefix: str) -> Callable[[Tensors, Path], None]:
    """As diffusers below 0.22 kept LoRAs: in the attention processors."""

    def write(matrices: Tensors, out: Path) -> None:
        state = {}
        for name, tensor in matrices.items():
            layer, _, half = name.partition(".lora_")
            block, own = layer.removesuffix(".0").rsplit(".", 1)
            state[f"{prefix}{block}.processor.{own}_lora.{'down' if half[0] == 'A' else 'up'}.weight"] = tensor
        save_file(state, out / "pytorch_lora_weights.safetensors")

    return write


def layers_of(matrices: Tensors) -> list[str]:
    return sorted({name.partition(".lora_")[0] for name in matrices})


def kohya(matrices: Tensors, out: Path, alphas: Callable[[int], float] = lambda number: 2.0) -> None:
    """Layers with underscores, halves called down and up, an alpha for each in the dtype that it was saved in."""
    state: Tensors = {}
    for number, layer in enumerate(layers_of(matrices)):
        flat = f"lora_unet_{layer.replace('.', '_')}"
        state[f"{flat}.lora_down.weight"] = matrices[f"{layer}.lora_A.weight"]
        state[f"{flat}.lora_up.weight"] = matrices[f"{layer}.lora_B.weight"]
        state[f"{flat}.alpha"] = torch.tensor(
            alphas(number), dtype=(torch.bfloat16, torch.float16, torch.float32)[number % 3]
        )
    save_file(state, out / "pytorch_lora_weights.safetensors")


def bare(matrices: Tensors, out: Path) -> None:
    """`unet.save_lora_adapter`: without the prefix that pipelines want."""
    adapted(2.0).save_lora_adapter(out)


def peft(matrices: Tensors, out: Path) -> None:
    """peft's own `save_pretrained`, the alpha in a file of its own."""
    model = get_peft_model(load_unet(FOLDER, torch.float32), LoraConfig(r=RANK, lora_alpha=2, target_modules=TARGETS))
    for name, param in model.named_parameters():
        if "lora_" in name:
            key = name.removeprefix("base_model.model.").replace(".default", "")
            param.data = matrices[key].clone()
    model.save_pretrained(out)


FORMATS: dict[str, tuple[Callable[[Tensors, Path], None], float, str]] = {
    "script": (script, RANK, "diffusers' training scripts"), "old script": (old_script, RANK, "diffusers' training scripts"),
    "processors": (processors("unet."), RANK, "diffusers' attention processors"),
    "bare processors": (processors(""), RANK, "diffusers' attention processors"),
    "kohya": (kohya, 2.0, "kohya"), "peft": (peft, 2.0, "peft"),
    "bare": (bare, 2.0, "without the name of the pipeline's part"),
}  # fmt: skip


def new_run(folder: Path, parent: Path, **keys: Any) -> Run:
    """A run of Stage I that goes on from a file."""
    table = {"model_flavour": "tiny-i", "mixed_precision": "no", "lora_rank": RANK, "init_lora": str(parent), **keys}
    config = {"workspace": str(folder / "workspace"), "data_backend_config": str(folder / "data.json"), "stage1": table}
    (folder / "pictures").mkdir(exist_ok=True)
    entry = {"id": "a", "type": "local", "instance_data_dir": str(folder / "pictures"), "caption_strategy": "filename"}
    (folder / "data.json").write_text(json.dumps([entry]))
    (folder / "run.json").write_text(json.dumps(config))
    return load_run(folder / "run.json")


def refusal(folder: Path, parent: Path, **keys: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        find_parent(new_run(folder, parent, **keys), 1, FOLDER)
    return str(caught.value)


def output(unet: UNet2DConditionModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn((1, 3, 32, 32), generator=generator)
    text = torch.randn((1, 77, unet.config.encoder_hid_dim), generator=generator)
    with torch.inference_mode():
        return torch.as_tensor(unet.eval()(x, torch.tensor([500]), text)[0])


@pytest.mark.parametrize("name", FORMATS)
def test_every_tensor_arrives_to_the_bit_and_the_first_step_sees_the_whole_effect(
    tmp_path: Path,
    matrices: Tensors,
    trainers: dict[float, UNet2DConditionModel],
    effects: dict[float, torch.Tensor],
    name: str,
) -> None:
    write, alpha, known_as = FORMATS[name]
    out = tmp_path / "parent"
    out.mkdir()
    write(matrices, out)
    run = new_run(tmp_path, out, lora_alpha=alpha)
    parent = find_parent(run, 1, FOLDER)
    assert parent is not None
    assert known_as in parent.note and f"all its {len(matrices)} tensors are read" in parent.note

    unet = trainers[alpha]
    for param in trainable(unet).values():
        param.data.fill_(7.0)
    METHODS[LORA_FILE].start(unet, parent.file)
    arrived = lora_state(unet)
    assert arrived.keys() == matrices.keys() and len(arrived) == 120
    assert all(torch.equal(arrived[key], tensor) for key, tensor in matrices.items())

    torch.testing.assert_close(output(unet), effects[alpha], atol=1e-5, rtol=1e-5)


def test_a_run_says_what_it_goes_on_from(tmp_path: Path, matrices: Tensors, caplog: pytest.LogCaptureFixture) -> None:
    script(matrices, tmp_path)
    new_run(tmp_path, tmp_path)
    caplog.set_level("INFO")
    check_run(tmp_path / "run.json", (), 1)
    (said,) = (line for line in caplog.messages if "in the format of diffusers' training scripts" in line)
    assert said.startswith(f"stage1.init_lora is '{tmp_path}'") and "all its 120 tensors are read" in said


def test_diffusers_own_file_needs_no_note(tmp_path: Path) -> None:
    state = get_peft_model_state_dict(adapted())
    IFPipeline.save_lora_weights(tmp_path / "parent", unet_lora_layers=state)
    parent = find_parent(new_run(tmp_path, tmp_path / "parent"), 1, FOLDER)
    assert parent is not None and parent.note == ""


def test_the_settings_of_another_alpha_are_refused_with_the_files(tmp_path: Path, matrices: Tensors) -> None:
    kohya(matrices, tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    assert "a LoRA with lora_alpha 2; this run has 4. Set them alike." in refusal(tmp_path, file)
    kohya(matrices, tmp_path, lambda number: 1.0 + number % 2)
    assert "Multiply each layer's up by its alpha / rank, and remove the alphas" in refusal(
        tmp_path, file, lora_alpha=2.0
    )


def test_the_remedy_for_alphas_that_differ_is_exact_enough(
    tmp_path: Path, matrices: Tensors, trainers: dict[float, UNet2DConditionModel]
) -> None:
    """As the message says it: the file is taken, and its effect is alpha / rank * B A of each layer's own alpha."""
    alphas = {layer: 1.0 + number % 2 for number, layer in enumerate(layers_of(matrices))}
    merged = load_unet(FOLDER, torch.float32)
    weights = dict(merged.named_parameters())
    for layer, alpha in alphas.items():
        low, up = matrices[f"{layer}.lora_A.weight"], matrices[f"{layer}.lora_B.weight"]
        weights[f"{layer}.weight"].data += alpha / RANK * up @ low
    kohya(matrices, tmp_path, lambda number: 1.0 + number % 2)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    state = load_file(file)
    for name in [name for name in state if name.endswith(".alpha")]:
        state[name.replace(".alpha", ".lora_up.weight")] *= float(state.pop(name)) / RANK
    save_file(state, file)
    parent = find_parent(new_run(tmp_path, file), 1, FOLDER)
    assert parent is not None
    unet = trainers[float(RANK)]
    METHODS[LORA_FILE].start(unet, parent.file)
    torch.testing.assert_close(output(unet), output(merged), atol=1e-5, rtol=1e-5)


def test_what_has_no_exact_form_here_is_refused_by_name(tmp_path: Path, matrices: Tensors) -> None:
    old_script(matrices, tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    whole, one = load_file(file), torch.zeros(4, 4)
    refused = {
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora.down.weight": "adapters on a text encoder",
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": "adapters on a text encoder",
        "lycoris_unet_mid_block_attentions_0_to_q.lokr_w1": "which is LoKr",
        "lora_unet_mid_block_attentions_0_to_q.hada_w1_a": "which is LoHa",
        "lora_unet_mid_block_attentions_0_to_q.dora_scale": "which is DoRA as kohya writes it",
        "something.else": "something.else in it belongs to no known format of a LoRA",
        "unet.mid_block.attentions.0.to_q.lora_A.weight": "to_q.lora_A.weight twice, under two names",
        "lora_unet_no_such_block_to_q.lora_down.weight": "one half of the adapter on no_such_block_to_q",
    }
    for name, says in refused.items():
        save_file({**whole, name: one}, file)
        assert says in refusal(tmp_path, file), name
    save_file({"unet.mid_block.attentions.0.to_q.lora.down.weight": one}, file)
    assert "which has only one half of the adapter on mid_block.attentions.0.to_q" in refusal(tmp_path, file)
    kohya(matrices, tmp_path)
    state = load_file(file)
    some = next(name for name in state if name.endswith(".alpha"))
    save_file({name: tensor for name, tensor in state.items() if name != some}, file)
    assert "or for some only" in refusal(tmp_path, file, lora_alpha=2.0)
    save_file({**state, some: torch.zeros(2)}, file)
    assert f"cannot be read: {some} is no number" in refusal(tmp_path, file, lora_alpha=2.0)


def test_pefts_settings_are_asked_for_and_read(tmp_path: Path, matrices: Tensors) -> None:
    peft(matrices, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    for changed, says in (({"use_rslora": True}, "use_rslora"), ({"lora_alpha": 8}, "lora_alpha 8; this run has 2")):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, **changed}))
        assert says in refusal(tmp_path, tmp_path, lora_alpha=2.0)
    (tmp_path / "adapter_config.json").unlink()
    assert "whose alpha is in adapter_config.json. Put that file beside it." in refusal(
        tmp_path, tmp_path, lora_alpha=2.0
    )


def test_a_pickle_is_refused_with_a_command_that_makes_a_file_of_it(
    tmp_path: Path, matrices: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_script(matrices, tmp_path)
    safe, pickle = tmp_path / "pytorch_lora_weights.safetensors", tmp_path / "pytorch_lora_weights.bin"
    torch.save(load_file(safe), pickle)
    safe.unlink()
    for parent in (tmp_path, pickle):
        message = refusal(tmp_path, parent)
        assert "never a pickle" in message or "has none of" in message
    code, _, files = message.partition('python -c "')[2].partition('" ')
    assert files.split() == [str(pickle), str(safe)]
    monkeypatch.setattr(sys, "argv", ["-c", *files.split()])
    exec(code, {})
    assert find_parent(new_run(tmp_path, tmp_path), 1, FOLDER) is not None


def mixed(file: Path, weight: float) -> MixedLora:
    return MixedLora(stage=1, name=file.name, weight=weight, file=pinned(file), settings=None, learned_variance=False)


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_drawn_with_at_a_weight(
    tmp_path: Path, matrices: Tensors, effects: dict[float, torch.Tensor], name: str
) -> None:
    write, alpha, _ = FORMATS[name]
    write(matrices, tmp_path)
    file = weights_file(tmp_path, "")
    assert misfit(file, FOLDER, "tiny-i") == ""
    assert "which does not fit tiny-ii" in misfit(file, Path(FLAVOURS["tiny-ii"].repo), "tiny-ii")
    pipeline = SimpleNamespace(unet=load_unet(FOLDER, torch.float32))
    load_loras(pipeline, [mixed(file, 1.0)])
    torch.testing.assert_close(output(pipeline.unet), effects[alpha], atol=1e-5, rtol=1e-5)
    load_loras(half := SimpleNamespace(unet=load_unet(FOLDER, torch.float32)), [mixed(file, 2.0 / alpha)])
    torch.testing.assert_close(output(half.unet), effects[2.0], atol=1e-5, rtol=1e-5)


def test_loras_together_are_the_sum_of_their_effects_on_the_weights(tmp_path: Path, matrices: Tensors) -> None:
    """Files of other ranks, layers, alphas and programs, against one UNet with all of it added to its weights."""
    merged = load_unet(FOLDER, torch.float32)
    weights = dict(merged.named_parameters())
    generator, files = torch.Generator().manual_seed(5), []
    some = layers_of(matrices)[::3]
    other = {
        f"{layer}.lora_{half}.weight": 0.05 * torch.randn(shape, generator=generator)
        for layer in some
        for half, shape in (
            ("A", (2, weights[f"{layer}.weight"].shape[1])),
            ("B", (weights[f"{layer}.weight"].shape[0], 2)),
        )
    }
    for name, write, state, weight in (("one", old_script, matrices, 0.7), ("two", other_alphas, other, -0.5)):
        (tmp_path / name).mkdir()
        write(state, tmp_path / name)
        files.append(mixed(weights_file(tmp_path / name, ""), weight))
    for layer in layers_of(matrices):
        low, up = matrices[f"{layer}.lora_A.weight"], matrices[f"{layer}.lora_B.weight"]
        weights[f"{layer}.weight"].data += 0.7 * up @ low
        if layer in some:
            alpha = 1.0 + some.index(layer) % 2
            low, up = other[f"{layer}.lora_A.weight"], other[f"{layer}.lora_B.weight"]
            weights[f"{layer}.weight"].data += -0.5 * alpha / 2 * up @ low
    load_loras(pipeline := SimpleNamespace(unet=load_unet(FOLDER, torch.float32)), files)
    torch.testing.assert_close(output(pipeline.unet), output(merged), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("keys", [{"use_dora": True}, {"lora_alpha": 1.0}])
def test_a_file_of_ours_is_drawn_with_as_the_stock_pipeline_loads_it(tmp_path: Path, keys: dict[str, Any]) -> None:
    config = StageConfig.model_validate({"model_flavour": "tiny-i", "mixed_precision": "no", "lora_rank": RANK, **keys})
    unet, method = load_unet(FOLDER, torch.float32), METHODS[LORA_FILE]
    method.prepare(unet, config, 7)
    with torch.no_grad():
        for param in trainable(unet).values():
            param.add_(0.01)
    method.save(unet, 1, FOLDER, tmp_path)
    stock = stock_pipeline(FOLDER, 1, load_unet(FOLDER, torch.float32), load_scheduler(FOLDER))
    stock.load_lora_weights(tmp_path)
    load_loras(ours := SimpleNamespace(unet=load_unet(FOLDER, torch.float32)), [mixed(tmp_path / LORA_FILE, 1.0)])
    assert torch.equal(output(ours.unet), output(stock.unet))


def test_a_dora_is_drawn_with_alone_and_whole(tmp_path: Path, matrices: Tensors) -> None:
    keys = {"model_flavour": "tiny-i", "mixed_precision": "no", "lora_rank": RANK, "use_dora": True}
    unet, method = load_unet(FOLDER, torch.float32), METHODS[LORA_FILE]
    method.prepare(unet, StageConfig.model_validate(keys), 7)
    (tmp_path / "dora").mkdir()
    method.save(unet, 1, FOLDER, tmp_path / "dora")
    script(matrices, tmp_path)
    run = new_run(tmp_path, tmp_path)
    dora, plain = str(tmp_path / "dora"), str(tmp_path / LORA_FILE)
    assert len(mixed_loras(run, [AskedLora(dora, 1.0)], {1: FOLDER})) == 1
    for asked in ([AskedLora(dora, 0.5)], [AskedLora(dora, 1.0), AskedLora(plain, 0.5)]):
        with pytest.raises(ConfigError, match="is a DoRA, which is drawn with alone"):
            mixed_loras(run, asked, {1: FOLDER})


def test_what_decides_a_loras_effect_is_in_its_identity(tmp_path: Path, matrices: Tensors) -> None:
    peft(matrices, tmp_path)
    run, file = new_run(tmp_path, tmp_path), tmp_path / "adapter_config.json"

    def found(weight: float = 1.0) -> list[Any]:
        (lora,) = mixed_loras(run, [AskedLora(str(tmp_path), weight)], {1: FOLDER})
        return lora.identity

    before = found()
    assert found() == before != found(0.5)
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 200}))
    assert found() != before


def other_alphas(matrices: Tensors, out: Path) -> None:
    kohya(matrices, out, lambda number: 1.0 + number % 2)


@pytest.mark.parametrize(
    ("text", "source", "weight"),
    [
        ("version:3@0.7", "version:3", 0.7), ("version:latest", "version:latest", 1.0),
        ("a.safetensors@-1", "a.safetensors", -1.0), ("a@b.safetensors", "a@b.safetensors", 1.0), ("a@b@1e-1", "a@b", 0.1),
    ],
)  # fmt: skip
def test_a_lora_is_named_with_its_weight(text: str, source: str, weight: float) -> None:
    assert parse_lora(text) == AskedLora(source, weight)


@pytest.mark.parametrize("text", ["@0.5", "a@0", "a@nan", "a@inf"])
def test_a_weight_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="give SOURCE@WEIGHT with a weight other than 0"):
        parse_lora(text)


def test_what_cannot_be_drawn_with_is_told_before_a_model_is_loaded(tmp_path: Path, matrices: Tensors) -> None:
    run = new_run(tmp_path, tmp_path)
    (tmp_path / "stray").mkdir()
    script(matrices, tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    (found,) = mixed_loras(run, [AskedLora(str(file), 0.5)], {1: FOLDER})
    assert (found.stage, found.told) == (1, "pytorch_lora_weights.safetensors@0.5")
    save_file(
        {**load_file(file), "unet.mid_block.attentions.0.to_q.hada_w1_a": torch.zeros(4, 4)},
        tmp_path / "loha.safetensors",
    )
    save_file(
        {name: tensor[:, :2].contiguous() for name, tensor in load_file(file).items()}, tmp_path / "other.safetensors"
    )
    (tmp_path / "text.safetensors").write_text("no tensors")
    (tmp_path / "broken" / "scheduler").mkdir(parents=True)
    (tmp_path / "broken" / "scheduler" / "scheduler_config.json").write_text("{")
    save_file(load_file(file), tmp_path / "broken" / "x.safetensors")
    named = {f"unet.{name}": tensor for name, tensor in matrices.items()}
    save_file(named, tmp_path / "rank.safetensors", {"lora_adapter_metadata": json.dumps({"unet.r": 7})})
    for source, says in (
        ("version:3", "There is no version '3'"),
        (str(tmp_path / "none"), "there is no such file or folder"),
        (str(tmp_path / "stray"), "has none of"),
        (str(tmp_path / "loha.safetensors"), "does not fit what draws here. Stage I: which is LoHa"),
        (str(tmp_path / "other.safetensors"), "which does not fit tiny-i: "),
        (str(tmp_path / "text.safetensors"), "text.safetensors cannot be read"),
        (str(tmp_path / "broken" / "x.safetensors"), "scheduler_config.json cannot be read"),
        (str(tmp_path / "rank.safetensors"), "whose lora_adapter_metadata has rank 7, and its layers [4]"),
        ("version:" + "9" * 500, "names no version"),
    ):
        with pytest.raises(ConfigError) as caught:
            mixed_loras(run, [AskedLora(source, 1.0), AskedLora(str(file), 1.0)], {1: FOLDER})
        assert says in str(caught.value), source


def test_a_flat_name_that_two_layers_share_is_no_layer() -> None:
    names = our_names(["lora_unet_a_b_c.lora_down.weight", "lora_unet_d.lora_up.weight"], ["a.b_c", "a_b.c", "d"])
    assert names.tensors["lora_unet_a_b_c.lora_down.weight"] == "a_b_c.lora_A.weight"
    assert names.tensors["lora_unet_d.lora_up.weight"] == "d.lora_B.weight"

"""Run files as SimpleTuner's users have them: which load, which are refused with what reason, what is said."""

import contextlib
import json
import math
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepfloyd_core.config.run import Run, RunConfig
from deepfloyd_core.config.shell_text import read_assignments
from deepfloyd_core.config.simpletuner import answer_of
from deepfloyd_core.config.simpletuner_options import ALIASES, DATA_DEFAULTS, IGNORED, REFUSED, SWITCHES, WORKS
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.errors import ConfigError
from deepfloyd_core.preflight.load import load_run

ours = settings(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))


class Files:
    """A data file with one set of pictures, and run files beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "data.json"
        (folder / "pictures").mkdir()
        self.entry()

    def entry(self, **keys: Any) -> None:
        entry = {"id": "set", "type": "local", "instance_data_dir": str(self.folder / "pictures"), **keys}
        self.data.write_text(json.dumps([entry]))

    def json(self, *overrides: str, **keys: Any) -> Run:
        path = self.folder / "config.json"
        base = {"model_family": "deepfloyd", "model_flavour": "tiny-i", "output_dir": "out",
                "data_backend_config": str(self.data)}  # fmt: skip
        path.write_text(json.dumps({**base, **keys}))
        return load_run(path, overrides)

    def env(self, text: str, name: str = "config.env") -> Run:
        (self.folder / name).write_text(text.replace("@data@", str(self.data)))
        return load_run(self.folder / name)

    def refusal(self, **keys: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            self.json(**keys)
        return str(caught.value)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


# ---- whole files ------------------------------------------------------------------------------------------------------

CONFIGURED = {
    "--resume_from_checkpoint": "latest", "--aspect_bucket_rounding": 2, "--seed": 7, "--minimum_image_size": 0,
    "--lora_type": "standard", "--lora_rank": "32", "--max_train_steps": "1200", "--num_train_epochs": 0,
    "--checkpoint_step_interval": 150, "--checkpoints_total_limit": "3", "--hub_model_id": "dog", "--push_to_hub": "false",
    "--push_checkpoints_to_hub": "true", "--tracker_project_name": "dogs", "--tracker_run_name": "1", "--report_to": "none",
    "--model_type": "lora", "--train_batch_size": "2", "--gradient_checkpointing": "true",
    "--caption_dropout_probability": "0.05", "--validation_seed": 1, "--validation_step_interval": "300",
    "--validation_resolution": "64x64", "--validation_guidance": "6.5", "--validation_guidance_rescale": "0.0",
    "--validation_num_inference_steps": "20", "--validation_prompt": "my dog", "--mixed_precision": "bf16",
    "--optimizer": "adamw_bf16", "--learning_rate": "2e-4", "--lr_scheduler": "polynomial", "--lr_warmup_steps": "10",
    "--validation_torch_compile": "false", "--disable_benchmark": "False",
}  # fmt: skip


def test_what_a_configuring_script_wrote_as_text_is_read_as_numbers(files: Files) -> None:
    config = files.json(**CONFIGURED).config
    stage = config.stage(1)
    assert (stage.lora_rank, stage.max_train_steps, stage.num_train_epochs) == (32, 1200, None)
    assert (stage.learning_rate, stage.caption_dropout_probability, stage.validation_guidance) == (2e-4, 0.05, 6.5)
    assert (stage.checkpoint_step_interval, stage.validation_step_interval) == (150, 300)
    assert (stage.gradient_checkpointing, config.validation_resolution) == (True, "64x64")
    assert config.workspace == "out"


def test_keys_that_are_off_or_harmless_are_said_in_few_lines(files: Files) -> None:
    run = files.json(
        disable_bucket_pruning=True, validation_prompt_library=False, validation_disable=False, evaluation_type="none",
        validation_guidance_rescale="0.0", grad_clip_method="norm", base_model_default_dtype="bf16",
        text_encoder_1_precision="no_change",
        allow_dataset_oversubscription=True, deepfloyd_validation_pipeline_mode="auto", attention_mechanism="diffusers",
        vae_batch_size=4, flow_schedule_shift=3, lora_type="standard", eval_steps_interval=None, ema_update_interval=25,
    )  # fmt: skip
    assert len(run.notes) <= 8, run.notes
    for key in ("disable_bucket_pruning", "grad_clip_method", "vae_batch_size", "ema_update_interval"):
        assert any(key in note and "ignored; " in note for note in run.notes), key
    assert run.config.stage(1).attention_mechanism == "sdpa"
    assert run.config.text_encoder_quantization == "none"


def test_the_place_of_results_is_the_workspace_and_said(files: Files) -> None:
    run = files.json()
    assert run.workspace == Path("out")
    assert [note for note in run.notes if "workspace is not set, so it is output_dir, out" in note]
    assert files.json(workspace="w").workspace == Path("w")


@pytest.mark.parametrize("family", ["flux", "sdxl", "wan", "deepfloyd2"])
def test_a_file_for_another_family_of_models_gets_one_line(files: Files, family: str) -> None:
    says = files.refusal(
        model_family=family, lora_type="lycoris", nonsense=3, prediction_type="flow_matching", seed="x"
    )
    assert says.splitlines() == [
        f"{files.folder}/config.json: model_family is '{family}'; this pipeline trains deepfloyd only."
    ]


def test_every_refused_option_is_a_line_with_its_reason(files: Files) -> None:
    says = files.refusal(lora_type="lycoris", lora_format="comfyui", lr_scale="true")
    assert "lora_type is 'lycoris', but adapters are LoRA or DoRA, not LyCORIS. Remove the key." in says
    assert "lora_format is 'comfyui', but a LoRA is written in diffusers' format" in says
    assert says.startswith("3 faults to correct:\n- ") and len(says.splitlines()) == 4


def test_two_names_of_a_key_may_stand_together_if_one_is_unset(files: Files) -> None:
    assert files.json(adam_beta1=0.8, optimizer_beta1=None).config.stage(1).adam_beta1 == 0.8
    assert files.json(optimizer_beta1="", adam_beta1=0.8, validation_steps=3, validation_step_interval=3).config
    assert "are one key, adam_beta1" in files.refusal(adam_beta1=0.8, optimizer_beta1=0.7)


def test_an_option_that_is_none_names_the_closest(files: Files) -> None:
    assert files.refusal(checkpoint_step_intervall=5).endswith("Did you mean checkpoint_step_interval?")
    assert files.refusal(checkpointing_step=5).endswith("Did you mean checkpointing_steps?")


def test_weights_of_the_hub_name_the_flavour(files: Files) -> None:
    run = files.json(
        model_flavour=None, pretrained_model_name_or_path="DeepFloyd/IF-I-XL-v1.0", model_type="deepfloyd-lora"
    )
    assert run.config.stage(1).model_flavour == "i-xlarge-4.3b"


def test_pictures_take_from_the_run_file_what_they_do_not_say(files: Files) -> None:
    keys = {"resolution": "64", "resolution_type": "pixel_area", "minimum_image_size": 0, "instance_prompt": "sks"}
    (dataset,) = files.json(**keys, caption_strategy="instance_prompt").datasets
    assert (dataset.resolution, dataset.resolution_type, dataset.caption_strategy) == (
        64,
        "pixel_area",
        "instanceprompt",
    )
    files.entry(resolution=96, resolution_type="pixel", caption_strategy="filename")
    (dataset,) = files.json(**{**keys, "resolution": 512}).datasets
    assert (dataset.resolution, dataset.resolution_type, dataset.caption_strategy) == (96, "pixel", "filename")


def test_a_key_that_another_leaves_without_effect_is_dropped_and_said(files: Files) -> None:
    run = files.json(model_type="full", lora_rank=64, noise_offset=0.02, scheduled_sampling_max_step_offset=10,
                     timestep_bias_strategy="later", input_perturbation_steps=100)  # fmt: skip
    for key in ("lora_rank", "noise_offset", "scheduled_sampling_max_step_offset", "timestep_bias_strategy",
                "input_perturbation_steps"):  # fmt: skip
        assert any(f"{key} is ignored; it has no effect while" in note for note in run.notes), key
    stage = run.config.stage(1)
    assert (stage.model_type, stage.timestep_bias_strategy, stage.scheduled_sampling_max_step_offset) == (
        "full",
        "none",
        0,
    )


def test_switches_are_our_keys(files: Files) -> None:
    stage = files.json(layer_freeze_strategy="bitfit", validation_disable="true", validation_steps=50).config.stage(1)
    assert (stage.use_bitfit, stage.validation_step_interval) == (True, 0)
    stage = files.json(
        optimizer_config="weight_decay=0.0,eps=1e-7", optimizer_beta2=0.99, max_grad_norm=0
    ).config.stage(1)
    assert (stage.adam_weight_decay, stage.adam_epsilon, stage.adam_beta2, stage.max_grad_norm) == (0, 1e-7, 0.99, 0)


def test_an_error_names_the_key_as_the_file_has_it(files: Files) -> None:
    says = files.refusal(checkpointing_steps="often")
    assert "checkpoint_step_interval (in the file checkpointing_steps) is 'often'" in says


def test_an_error_blames_no_switch_that_is_off_or_overruled(files: Files) -> None:
    says = files.refusal(optimizer="bogus", adam_bfloat16=False)
    assert "optimizer is 'bogus'" in says and "adam_bfloat16" not in says
    says = files.refusal(optimizer="bogus", adam_bfloat16=True)
    assert "optimizer is 'bogus'" in says and "(in the file adam_bfloat16)" not in says
    says = files.refusal(validation_step_interval="often", validation_disable=False)
    assert "validation_step_interval is 'often'" in says and "in the file" not in says
    says = files.refusal(**{"--adam_bfloat16": "true", "mixed_precision": "no"})
    assert "optimizer (in the file --adam_bfloat16) is 'adamw_bf16'" in says


def test_a_place_of_results_in_a_stages_table_is_no_workspace(files: Files) -> None:
    run = files.folder / "run.toml"
    head = f'workspace = "w"\ndata_backend_config = "{files.data}"\n[stage1]\nmodel_flavour = "tiny-i"\n'
    run.write_text(head + 'output_dir = "x"')
    checked = load_run(run)
    assert checked.workspace == Path("w")
    assert not [note for note in checked.notes if "workspace is not set" in note]
    assert [note for note in checked.notes if "output_dir is ignored; artifacts lie in the workspace" in note]


def test_a_checkpoint_to_resume_from_is_refused_unless_it_is_the_latest(files: Files) -> None:
    for harmless_value in ("latest", "", None, False, "none"):
        assert files.json(resume_from_checkpoint=harmless_value).config
    says = files.refusal(resume_from_checkpoint="checkpoint-1000")
    assert "resume_from_checkpoint is 'checkpoint-1000'" in says and "init_lora starts from trained weights" in says


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"seed": -1}, "seed is -1, a random one; runs here are reproducible, so the default is used"),
        ({"validation_guidance": "0.5"}, "validation_guidance is 0.5, read as 1, which is off here"),
        (
            {"validation_noise_scheduler": "euler-a"},
            "euler-a, which has no dynamic thresholding, so the default is used",
        ),
        ({"use_8bit_adam": True, "optimizer": "adafactor"}, "use_8bit_adam is ignored; optimizer is 'adafactor'"),
        ({"grad_clip_method": "value", "max_grad_norm": 0.01}, "grad_clip_method is 'value', but max_grad_norm = 0.01"),
        ({"grad_clip_method": "value"}, "grad_clip_method is ignored; gradients are scaled down"),
        ({"grad_clip_method": "norm", "max_grad_norm": 0.01}, "grad_clip_method is ignored; gradients are scaled down"),
        (
            {"pure_bf16": True, "gradient_precision": "fp32"},
            "gradient_precision, pure_bf16 are ignored; mixed_precision",
        ),
        ({"disable_segmented_timestep_sampling": False}, "is ignored; each sample's timestep is drawn by itself"),
    ],
)
def test_a_value_that_becomes_another_is_noted(files: Files, keys: dict[str, Any], says: str) -> None:
    assert [note for note in files.json(**keys).notes if says in note], files.json(**keys).notes


def test_all_linear_layers_are_no_two_names(files: Files) -> None:
    says = files.refusal(peft_lora_target_modules="all-linear")
    assert "'all-linear', which names no layer here. Name those" in says
    stage = files.json(peft_lora_target_modules="to_q,to_out.0").config.stage(1)
    assert stage.lora_target_modules == ("to_q", "to_out.0")


def test_text_is_no_number_in_our_own_form(files: Files) -> None:
    run = files.folder / "run.toml"
    run.write_text(f'workspace = "w"\ndata_backend_config = "{files.data}"\nmodel_flavour = "tiny-i"\nlora_rank = "16"')
    with pytest.raises(ConfigError, match="lora_rank is '16'"):
        load_run(run)
    assert "'maybe'" in files.refusal(use_ema="maybe")
    assert "'sixteen'" in files.refusal(lora_rank="sixteen")
    assert "lora_rank is 16.5" in files.refusal(lora_rank="16.5")


# ---- config.env -------------------------------------------------------------------------------------------------------

SCRIPT = """
# Configure these values.
export MODEL_TYPE='deepfloyd-lora'   # a comment
export MODEL_NAME="DeepFloyd/IF-I-M-v1.0"
export BASE_DIR="/data sets"
export OUTPUT_DIR="${BASE_DIR}/models"
export DATALOADER_CONFIG="@data@"
MAX_NUM_STEPS=3000
export NUM_EPOCHS=0
export LR_WARMUP_STEPS=$((MAX_NUM_STEPS / 10))
export LR_SCHEDULE="polynomial"
export LEARNING_RATE=4e-5 #@param {type:"number"}
export RESOLUTION=64
export RESOLUTION_TYPE="pixel"
export VALIDATION_RESOLUTION=$RESOLUTION
export CHECKPOINTING_STEPS=250
export TRAINING_SEED=42
export USE_XFORMERS=false
export USE_GRADIENT_CHECKPOINTING=true
export MIN_SNR_GAMMA=5
export FLUX=false
export DEBUG_EXTRA_ARGS="--report_to=none"
export TRAINER_EXTRA_ARGS=""
export TRAINER_EXTRA_ARGS="${TRAINER_EXTRA_ARGS} --offset_noise --noise_offset=0.02"
TRAINER_EXTRA_ARGS+=" --lora_rank 8"
export TRAINING_NUM_PROCESSES=1
export TRAINING_DYNAMO_BACKEND='no'
export TOKENIZERS_PARALLELISM=false
"""


def test_the_older_script_of_variables_is_a_run_file(files: Files) -> None:
    run = files.env(SCRIPT)
    stage = run.config.stage(1)
    assert (stage.model_flavour, run.config.workspace, run.config.seed) == ("i-medium-400m", "/data sets/models", 42)
    assert (stage.max_train_steps, stage.lr_warmup_steps, stage.learning_rate) == (3000, 300, 4e-5)
    assert (stage.offset_noise, stage.noise_offset, stage.lora_rank, stage.snr_gamma) == (True, 0.02, 8, 5.0)
    assert (stage.gradient_checkpointing, stage.checkpoint_step_interval) == (True, 250)
    assert run.config.validation_resolution == "64"
    assert [note for note in run.notes if "BASE_DIR is ignored; variables that set no option" in note]


def test_processes_share_the_step_that_the_file_asks_for_and_a_note_says_so(files: Files) -> None:
    """SimpleTuner's have a batch each, so its file alone would train on fewer pictures a step than there."""
    run = files.env(f"{SCRIPT}\nexport TRAINING_NUM_PROCESSES=4\nexport TRAIN_BATCH_SIZE=8")
    assert (run.config.num_processes, run.config.stage(1).samples_per_step) == (4, 8)
    (note,) = [note for note in run.notes if "num_processes" in note]
    assert "SimpleTuner gives each a batch of its own" in note and "multiply gradient_accumulation_steps" in note


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("export FLUX=true", "model_family is 'flux'"),
        ("export OUTPUT_DIR=$DISK/x", "line 30: $DISK is not set in the file"),
        ("rm -rf /", "line 30: this is no NAME=value"),
        ("export A='x", "line 30: No closing quotation"),
        ("export LR_WARMUP_STEPS=$((MAX_NUM_STEPS / 0))", "divides by 0"),
        ("export TRAINER_EXTRA_ARGS='--x=1 y'", "'y' belongs to no --option"),
        (
            "export TRAINING_NUM_MACHINES=2",
            "num_machines (in the file TRAINING_NUM_MACHINES) is '2', but a training",
        ),
        ("export LEARNING_RATE=" + 400 * "1", "learning_rate is 111"),
        ("export MAX_NUM_STEPS=many", "max_train_steps (in the file MAX_NUM_STEPS) is 'many'"),
        ("export TRAINER_EXTRA_ARGS='--lorarank=1'", "lorarank is not a known key. Did you mean lora_rank?"),
    ],
)
def test_a_script_that_cannot_be_read_names_the_line(files: Files, line: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        files.env(SCRIPT + "\n" + line)
    assert says in str(caught.value)


BASH = shutil.which("bash")
READ = ("a", "b c", "#", " #", "'a $5 bill'", '"a  b"', '"$B"', "$A", "${B}", "$((N / 3))", "$((N - 9))", "~", "*", "=",
        "!", " ", '"\\$ \\a"', "\\ ", "a:b", "]", '"$((M*2))"')  # fmt: skip
REFUSED_BY_SOME = ("'", '"', "${B:-x}", "$(echo x)", "`echo x`", "\\", "$", "$5", "$$", "$((M/2", "$((08+1))", "~/x", ":~/y",
                   "{1,2}", ";", "&", "|", "<", "(", "$'x'", " A=5")  # fmt: skip
PIECE = st.one_of(st.sampled_from(READ), st.sampled_from(READ), st.sampled_from((*READ, *REFUSED_BY_SOME)))
STARTS = ("X=", "export X=", "X+=", "export A=3 Y=$A", "A=4 Y=$A", "export Y=")
LINE = st.tuples(st.sampled_from(STARTS), st.lists(PIECE, max_size=3)).map(lambda pair: pair[0] + "".join(pair[1]))
TURNS = st.sampled_from(
    [
        "else",
        "else",
        "elif [ $A != 4 ]; then",
        'elif [[ "$A" = "$X" ]]\nthen',
        "else X=9",
        "X=6",
        "echo '",
        "echo hi $A",
    ]
)
IF = st.sampled_from(['if [[ "$A" == "1" ]]; then', "if [ $A != $B ]; then", "if [[ $A == 3* ]]; then",
                      "if [[ $B = $A ]]; then", 'if [[ "$HOME" == "/root" ]]\nthen', "if [[ ~ != $X ]]; then # c",
                      "if [[ $X == 4 ]]; then"])  # fmt: skip
BLOCK = st.tuples(IF, LINE, TURNS, LINE, TURNS, LINE, st.sampled_from(["fi", "fi", "fi # end", "fi; X=8", "fi#"])).map(
    "\n".join
)


@pytest.mark.skipif(BASH is None, reason="compares with bash")
def test_a_script_is_read_as_bash_reads_it_or_refused(tmp_path: Path) -> None:
    """Of random scripts in one process of bash: what is not refused leaves the same variables behind."""
    scripts: list[str] = []

    @settings(ours, max_examples=400)
    @given(st.lists(st.one_of(LINE, BLOCK), min_size=1, max_size=3))
    def collect(lines: list[str]) -> None:
        text = "\n".join(["A=1", 'B="b  b"', "N=-10", "M=7", "X=x", *lines])
        with contextlib.suppress(ValueError):
            read_assignments(text)
            scripts.append(text)

    collect()
    assert len(scripts) > 40
    scripts.extend(["A=1\n" + SCRIPT, "A=1\n" + SCRIPT + BRANCHES])
    names = [
        "A",
        "B",
        "N",
        "M",
        "X",
        "Y",
        "LR_WARMUP_STEPS",
        "LORA_RANK",
        "TRAINER_EXTRA_ARGS",
        "USE_BITFIT",
        "OUTPUT_DIR",
    ]
    ask = "; ".join(f'printf "%s\\0" "${name}"' for name in names)
    for number, text in enumerate(scripts):
        (tmp_path / f"{number}.env").write_text(text)
    here = {"HOME": str(Path.home()), "PATH": os.environ["PATH"]}
    loop = f"for n in $(seq 0 {len(scripts) - 1}); do (. ./$n.env; {ask}); done"
    done = subprocess.run([str(BASH), "-c", loop], cwd=tmp_path, capture_output=True, check=True, env=here)
    assert done.stderr == b""
    values = done.stdout.decode().split("\0")[:-1]
    for number, text in enumerate(scripts):
        variables = read_assignments(text)
        assert [variables.get(name, "") for name in names] == values[number * len(names) :][: len(names)], text


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("OUTPUT_DIR=${OUT:-output}", "line 2: a shell would run what begins with '${'"),
        ('OUTPUT_DIR="out/$(date +%F)"', "line 2: a shell would run what begins with '$('"),
        ("OUTPUT_DIR=`pwd`", "line 2: a shell would run what begins with '`'"),
        ('if [[ "$A" == "1" ]]; then\nelse LORA_RANK=9\nfi', "line 3: else must be alone on its line here"),
        ('if [[ "$A" == "1" ]]; then\nfi; LORA_ALPHA=3', "line 3: fi must be alone on its line here"),
        ('if [[ "$A" == "1" ]]; then', "line 2: the if has no fi"),
        ("LORA_RANK=9\0", "line 2: a zero byte"),
        ('if [[ "$USER" == "1" ]]; then\nfi', "line 2: $USER is not set in the file"),
        ("TRAINING_SEED=42\nSEED=7", "TRAINING_SEED and SEED are one option, seed. Keep one of them."),
        ("MODEL_FAMILY=deepfloyd\nFLUX=true", "MODEL_FAMILY and FLUX are one option, model_family"),
        ('TRAINER_EXTRA_ARGS="--lora_rank \'b"', "TRAINER_EXTRA_ARGS: ' cannot be in a value"),
        ("OUTPUT_DIR=a;LORA_RANK=3", "line 2: a shell would run what begins with ';'"),
    ],
)
def test_what_only_a_shell_can_do_is_refused_with_its_line(files: Files, line: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        files.env("A=1\n" + line)
    assert says in str(caught.value)


def test_what_a_shell_leaves_as_it_is_stays(files: Files) -> None:
    run = files.env(SCRIPT + "OUTPUT_DIR=out#1\nVALIDATION_PROMPT='a $5 bill'\nSEED=42\n")
    assert (run.config.workspace, run.config.validation_prompt) == ("out#1", "a $5 bill")


def test_a_script_without_a_model_points_to_the_file_beside_it(files: Files) -> None:
    (files.folder / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"MODEL_TYPE is missing.* from .*config.json: give that file"):
        files.env("export TRAINING_NUM_PROCESSES=1")


BRANCHES = """
if [[ "$MODEL_TYPE" == "full" ]]; then
    # a comment
    export USE_BITFIT=true
elif [[ "$MODEL_TYPE" == "deepfloyd-lora" ]]; then
    export USE_BITFIT=false
    if [ $TRAINING_SEED != 42 ]; then
        rm -rf /
    else
        export LORA_RANK=24
    fi
elif [[ "$MODEL_TYPE" == "deepfloyd-full" ]]; then
    export USE_BITFIT=true
fi
#export LR_WARMUP_STEPS=$((MAX_NUM_STEPS / 10))
"""


def test_the_branches_of_a_script_count_as_its_variables_say(files: Files) -> None:
    text = SCRIPT.replace(' --lora_rank 8"', '"') + BRANCHES
    stage = files.env(text).config.stage(1)
    assert (stage.use_bitfit, stage.lora_rank) == (False, 24)
    with pytest.raises(ConfigError, match="this is no NAME=value"):
        files.env(text.replace("TRAINING_SEED=42", "TRAINING_SEED=7"))
    for line, says in (("fi", "fi without an if"), ("if test -f x; then", "write a condition as if")):
        with pytest.raises(ConfigError, match=says):
            files.env(text + line)


def test_the_home_folder_of_a_script_is_the_users(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(files.folder))
    assert files.env(SCRIPT.replace("/data sets", "$HOME/sets")).workspace == files.folder / "sets/models"


def test_a_stage_without_a_model_lists_the_models_of_that_stage(files: Files) -> None:
    with pytest.raises(
        ConfigError, match=r"model_flavour is missing: .* Stage II .* one of ii-medium-450m, ii-large-1.2b"
    ):
        files.env("MODEL_TYPE=deepfloyd-stage2-lora\nMODEL_NAME=/models/mine\nOUTPUT_DIR=o\nDATALOADER_CONFIG=@data@")


@pytest.mark.parametrize("stage", [1, 2])
def test_older_names_of_the_model_choose_the_stage(files: Files, stage: int) -> None:
    kind, name = [("deepfloyd-full", "IF-I-L-v1.0"), ("deepfloyd-stage2-lora", "IF-II-M-v1.0")][stage - 1]
    text = f"MODEL_TYPE={kind}\nMODEL_NAME=DeepFloyd/{name}\nOUTPUT_DIR=o\nDATALOADER_CONFIG=@data@"
    assert files.env(text, "config.env.example").config.stages == (stage,)


# ---- overrides --------------------------------------------------------------------------------------------------------


def test_an_override_without_a_value_removes_the_key(files: Files) -> None:
    run = files.json("lora_type=", "--lora_rank=".lstrip("-"), lora_type="lycoris", lora_rank=64)
    assert run.config.stage(1).lora_rank == 16
    assert (
        files.json("checkpointing_steps=", checkpoint_step_interval=5).config.stage(1).checkpoint_step_interval == 500
    )
    with pytest.raises(ConfigError, match=r"removes a key that .* does not set. Did you mean lora_rank\?"):
        files.json("lora_ranks=", lora_rank=64)
    assert (
        files.json('validation_negative_prompt=""', validation_negative_prompt="x").config.validation_negative_prompt
        == ""
    )


def test_stage_iii_is_read_where_it_is_on(files: Files) -> None:
    asked = {
        "deepfloyd_validation_stage3_mode": "sd-x4-upscaler", "deepfloyd_validation_stage3_guidance": "7.5",
        "deepfloyd_validation_stage3_noise_level": 20, "deepfloyd_validation_stage3_model": None,
    }  # fmt: skip
    run = files.json(**asked)
    stage3 = run.config.stage3
    assert stage3 is not None and stage3.model == "stabilityai/stable-diffusion-x4-upscaler"
    assert (stage3.validation_guidance, stage3.validation_noise_level) == (7.5, 20)
    told = [note for note in run.notes if "stage3" in note]
    assert len(told) == 1 and "is read as [stage3]; `generate --stages 1-3` draws it" in told[0]
    changed = files.json("stage3.validation_noise_level=50", **asked).config.stage3
    assert changed is not None and (changed.validation_guidance, changed.validation_noise_level) == (7.5, 50)
    off = files.json(**asked | {"deepfloyd_validation_stage3_mode": "none"})
    assert off.config.stage3 is None and any("stage3_guidance" in note and "ignored" in note for note in off.notes)


# ---- the table --------------------------------------------------------------------------------------------------------


def test_each_option_has_one_answer() -> None:
    tables = [WORKS, DATA_DEFAULTS, set(ALIASES), set(SWITCHES), set(IGNORED), set(REFUSED)]
    assert len(set().union(*tables)) == sum(map(len, tables)) > 550
    known = {*RunConfig.model_fields, *StageConfig.model_fields}
    assert WORKS - known == {"model_family", "optimizer_config"}
    assert set(ALIASES.values()) <= known
    assert not known & {*IGNORED, *REFUSED, *SWITCHES, *ALIASES}
    assert (answer_of("vae_batch_size"), answer_of("lr_scale"), answer_of("zzz")) == ("ignored", "refused", None)


OFF: st.SearchStrategy[Any] = st.sampled_from(
    [None, False, "", "false", "False", 0, "0", "0.0", "none", "None", [], {}]
)
SIGNS = st.characters(codec="utf-8", exclude_characters="\0")  # a zero byte is refused wherever it stands
ANYTHING = st.one_of(OFF, st.integers(), st.text(SIGNS, max_size=5), st.floats(allow_nan=False, allow_infinity=False),
                     st.booleans(), st.lists(st.integers(), max_size=2),
                     st.dictionaries(st.text(SIGNS, max_size=2), st.booleans(), max_size=2))  # fmt: skip


def harmless() -> st.SearchStrategy[tuple[str, Any]]:
    """An option with a value that asks for nothing: any of those that are ignored, off of those that are refused."""
    off = {name: st.one_of(OFF, st.sampled_from([*refusal.off, None])) for name, refusal in REFUSED.items()}
    switched = dict.fromkeys(SWITCHES, OFF)
    ignored = dict.fromkeys(IGNORED, ANYTHING)
    fields = RunConfig.model_fields | StageConfig.model_fields
    unset = {name: st.sampled_from([None, "", fields[ALIASES.get(name, name)].default])
             for name in (WORKS | set(ALIASES)) & (fields.keys() | set(ALIASES))}  # fmt: skip
    table = off | switched | ignored | unset
    for needed in ("model_flavour", "data_backend_config", "output_dir"):
        table.pop(needed, None)
    return st.sampled_from(sorted(table)).flatmap(lambda name: st.tuples(st.just(name), table[name]))


@settings(ours, max_examples=150)
@given(st.lists(harmless(), min_size=1, max_size=25, unique_by=lambda pair: ALIASES.get(pair[0], pair[0])))
def test_options_that_are_off_or_harmless_never_stop_a_run(files: Files, options: list[tuple[str, Any]]) -> None:
    assert files.json(**json.loads(json.dumps(dict(options)))).config.stages == (1,)


@ours
@given(st.sampled_from(sorted(REFUSED)), st.sampled_from(["x", 3, True, "true", "7.5", [1], {"a": 1}]))
def test_a_refused_option_gives_its_reason_or_asks_for_nothing(files: Files, name: str, value: Any) -> None:
    with_all = {"use_ema": True, "optimizer": "prodigy", "scheduled_sampling_max_step_offset": 9}
    assert REFUSED[name].reason in files.refusal(**with_all, **{name: value})


@ours
@given(st.floats(1e-9, 1e-2), st.integers(1, 1000), st.booleans())
def test_text_and_numbers_are_the_same_run(files: Files, rate: float, steps: int, flag: bool) -> None:
    keys = {"learning_rate": rate, "max_train_steps": steps, "gradient_checkpointing": flag}
    assert files.json(**keys).config == files.json(**{key: str(value) for key, value in keys.items()}).config
    assert math.isclose(files.json(**keys).config.stage(1).learning_rate, rate)

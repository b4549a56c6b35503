"""The settings of one stage: training and sampling, with SimpleTuner's key names and units.

A setting that would have no effect is refused like one that contradicts another, or noted where it is common in files that
others wrote: a run should do what its file says.
"""

from importlib.util import find_spec
from shutil import which
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from deepfloyd_core.config.base import NameOrPath, PathOrNumber, Spec
from deepfloyd_core.config.flavours import FLAVOURS, Flavour
from deepfloyd_core.config.stage_faults import stage_fault, stage_notes
from deepfloyd_core.types import Conditioning

BasePrecision = Literal["no_change", "int8", "nf4"]
Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "sine"]
_COMPILERS = ("g++", "clang++", "c++")  # the first two are what inductor looks for, on Linux and macOS
ATTENTION_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")


class StageConfig(Spec):
    """Training and sampling of one stage."""

    model_flavour: str = Field(description="Which UNet: one of the flavours in the README.")
    pretrained_model_name_or_path: NameOrPath | None = Field(
        None, description="Hub id or directory of the weights, in place of the flavour's own."
    )
    model_type: Literal["lora", "full"] = Field(
        "lora", description="What is trained: adapters, or (`full`) every weight of the UNet."
    )
    init_lora: PathOrNumber | int | None = Field(
        None,
        description="What training starts from: a folder or .safetensors file of weights that were trained before with the "
        "same settings, or the number of a published version. Unset: the base model.",
    )
    lora_rank: int = Field(16, ge=1, le=256, description="Rank of each adapter; file size grows linearly.")
    lora_alpha: float | None = Field(
        None, gt=0, description="Scale numerator; the scale is alpha / rank. Unset: the rank."
    )
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Dropout before each adapter.")
    lora_target_modules: tuple[str, ...] = Field(
        ATTENTION_TARGETS, strict=False, min_length=1, description="Names of the layers that get an adapter."
    )
    lora_init_type: Literal["default", "gaussian"] = Field(
        "default",
        description="How adapters start: Kaiming-uniform, or normal with deviation 1 / rank; the product is 0.",
    )
    use_dora: bool = Field(
        False,
        description="DoRA (Liu et al. 2024): the lengths of a weight's rows are trained apart from their directions.",
    )
    use_bitfit: bool = Field(
        False,
        description="Train the UNet's own biases and nothing else, without adapters (BitFit, Ben Zaken et al. 2022).",
    )
    controlnet: bool = Field(
        False,
        description="Train a ControlNet-LoRA (Zhang et al. 2023): a Stage I that follows a picture, the conditioning.",
    )
    controlnet_conditioning: Conditioning = Field(
        "canny",
        description="The conditioning, made of each training picture: `canny` edges, `grayscale`, or `low_res`, its "
        "colours without detail; or `paired`, pictures of their own: see `conditioning_data` of the picture sets.",
    )
    learning_rate: float = Field(4e-5, gt=0, le=1, description="Peak learning rate.")
    lr_end: float | None = Field(
        None,
        ge=0,
        description="Learning rate at the last step, for the decaying schedules; unset: a tenth of `learning_rate`.",
    )
    lr_scheduler: Schedule | None = Field(
        None,
        description="Shape of the learning rate over the run; unset: cosine, or with `adamw_schedulefree` constant.",
    )
    lr_num_cycles: int = Field(
        1, ge=1, le=10_000, description="Times that `cosine_with_restarts` falls from the peak to the end."
    )
    lr_power: float = Field(2.0, gt=0, le=100, description="Power of `polynomial`; 1 is a straight line.")
    lr_warmup_steps: int = Field(
        0, ge=0, description="Optimizer steps of linear warm-up, also of `cosine` and the others."
    )
    max_train_steps: int | None = Field(
        None, ge=1, description="Optimizer steps of the run; unset: 1000, or those of `num_train_epochs`."
    )
    num_train_epochs: int | None = Field(
        None,
        ge=1,
        description="How often the run goes through its data, in place of `max_train_steps`: an epoch has as many "
        "batches as the data sets have together. The steps are counted once the crops are made.",
    )
    train_batch_size: int = Field(4, ge=1, le=4096, description="Pictures in one forward pass.")
    gradient_accumulation_steps: int = Field(1, ge=1, le=1024, description="Forward passes for one optimizer step.")
    gradient_checkpointing: bool = Field(
        False,
        description="Recompute activations in the backward pass, of attentions too: less memory, the same result.",
    )
    attention_mechanism: Literal["sdpa", "xformers", "math"] = Field(
        "sdpa", description="Attention while training: torch's fused one, xFormers' (NVIDIA GPUs), or plain products."
    )
    dynamo_backend: Literal["no", "inductor", "aot_eager"] = Field(
        "no",
        description="torch.compile of the UNet in training steps, anew for each size of batch: `inductor` writes kernels "
        "and needs a C++ compiler, on a GPU triton; `aot_eager` only traces, for tests and debugging.",
    )
    dataloader_num_workers: int = Field(
        1, ge=0, le=16, description="Threads that prepare the next batches, one each, during a step; changes no result."
    )
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are scaled down to this L2 norm; 0: they are not.")
    mixed_precision: Literal["no", "bf16"] = Field(
        "bf16", description="dtype that the UNet computes in, and of its frozen weights."
    )
    base_model_precision: BasePrecision = Field(
        "no_change",
        description="The UNet's frozen weights in 8 or 4 bits, of linear layers and convolutions: a quarter or an eighth of "
        "fp32's memory, less exact.",
    )
    optimizer: Literal["adamw", "adamw_bf16", "adamw_8bit", "adafactor", "prodigy", "adamw_schedulefree"] = Field(
        "adamw",
        description="`adamw`: fp32 states. `adamw_bf16`: weights and states in bf16, rounded stochastically. `adamw_8bit`: "
        "8-bit states. `adafactor`: hardly any states. `prodigy`: finds its step size; set `learning_rate` = 1. "
        "`adamw_schedulefree`: averages instead of decaying; its `lr_scheduler` is constant.",
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment; Adafactor has none.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Decay of the second moment; Adafactor has its own.")
    adam_epsilon: float = Field(
        1e-8, gt=0, description="Keeps a division by the second moment finite; not in Adafactor."
    )
    adam_weight_decay: float = Field(1e-2, ge=0, description="Decoupled weight decay, of every optimizer.")
    loss_type: Literal["l2", "huber", "smooth_l1"] = Field(
        "l2", description="Error in epsilon: squared, or pseudo-Huber (`smooth_l1`: the same, divided by its width)."
    )
    huber_c: float = Field(
        0.1, gt=0, le=1, description="Width of the pseudo-Huber loss: beyond it errors count linearly."
    )
    huber_schedule: Literal["constant", "snr", "exponential"] = Field(
        "snr", description="That width over the timesteps: constant, or falling from 1 at the clean end to `huber_c`."
    )
    snr_gamma: float | None = Field(None, gt=0, description="Min-SNR gamma (Hang et al. 2023); unset: no weights.")
    use_soft_min_snr: bool = Field(
        False, description="Weigh samples by a min-SNR without its kink (Crowson et al. 2024)."
    )
    soft_min_snr_sigma_data: float = Field(
        0.5, gt=0, le=1000, description="The data's standard deviation in that weight; its gamma is sigma_data^-2."
    )
    offset_noise: bool = Field(False, description="Shift a sample's noise by one drawn number for each colour.")
    noise_offset: float = Field(0.1, gt=0, le=1, description="Standard deviation of that shift.")
    noise_offset_probability: float = Field(0.25, gt=0, le=1, description="Share of the samples that are shifted.")
    input_perturbation: float = Field(
        0.0, ge=0, le=1, description="Further noise in what the UNet is fed but not in the target (Ning et al. 2023)."
    )
    input_perturbation_steps: int = Field(
        0, ge=0, description="Optimizer steps over which that noise falls to none; 0: it stays."
    )
    scheduled_sampling_max_step_offset: int = Field(
        0,
        ge=0,
        le=999,
        description="Train on the model's own errors: x_t is made of what the UNet takes the picture for, up to this many "
        "timesteps earlier on the way from noise. Needs `scheduled_sampling_probability`.",
    )
    scheduled_sampling_probability: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the samples that this is done with; 1: all. Of the others x_t is as ever.",
    )
    timestep_bias_strategy: Literal["none", "earlier", "later", "range"] = Field(
        "none",
        description="Timesteps drawn more or less often: the first ones (little noise), the last ones, or a range.",
    )
    timestep_bias_multiplier: float = Field(1.0, gt=0, le=1000, description="How many times as often as the others.")
    timestep_bias_portion: float = Field(
        0.25, ge=0.001, lt=1, description="Share of the timesteps that are `earlier` or `later`."
    )
    timestep_bias_begin: int = Field(0, ge=0, le=999, description="First timestep of `range`.")
    timestep_bias_end: int = Field(1000, ge=1, le=1000, description="Timestep after the last one of `range`.")
    noise_level_begin: int = Field(
        0, ge=0, le=999, description="Lowest noise level of Stage II's low-res input that is drawn in training."
    )
    noise_level_end: int = Field(1000, ge=1, le=1000, description="Noise level after the highest one that is drawn.")
    low_res_blur: float = Field(
        0.0, ge=0, le=4, description="Blur of Stage II's low-res input in training: largest deviation (low-res px)."
    )
    low_res_noise: float = Field(
        0.0, ge=0, le=64, description="Grain of that picture itself: largest standard deviation (levels of 255)."
    )
    low_res_jpeg_quality: int | None = Field(
        None, ge=1, le=100, description="Pass it through JPEG, of a quality from this one to 100; unset: no JPEG."
    )
    low_res_degraded_share: float = Field(1.0, gt=0, le=1, description="Share of the samples that have any of these.")
    low_res_stage1_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of Stage II's samples whose low-res picture in training is Stage I's remake of the true one. "
        "Stage I is then trained first, and samples each crop once.",
    )
    low_res_stage1_strength: float = Field(
        0.3,
        gt=0,
        le=1,
        description="How far the true low-res picture is noised before Stage I samples it again: this share of "
        "`stage1.validation_num_inference_steps`; 1 leaves nothing of it.",
    )
    stage2_patch: Literal[64, 128] | None = Field(
        None, description="Train on a window of each Stage II crop, px a side: less memory and time; unset: all of it."
    )
    train_variance: bool = Field(
        False, description="Train the variance half as well (L_hybrid, Nichol and Dhariwal 2021), and sample with it."
    )
    caption_dropout_probability: float = Field(
        0.1, ge=0, le=1, description="Share of captions replaced by the empty one."
    )
    random_flip: bool = Field(False, description="Mirror half of the samples left to right.")
    use_ema: bool = Field(False, description="Keep a moving average of what is trained; it is what is saved.")
    ema_decay: float = Field(
        0.995, ge=0, lt=1, description="Decay of that average per step; lower in the first steps, (1 + n) / (10 + n)."
    )
    checkpoint_step_interval: int = Field(
        500, ge=1, description="Optimizer steps between checkpoints; changes no result."
    )
    checkpointing_minutes: float | None = Field(
        None,
        gt=0,
        description="Minutes after which there is a checkpoint as well, if there was none; changes no result.",
    )
    checkpoints_total_limit: int = Field(2, ge=1, description="Checkpoints kept while training; changes no result.")
    validation_step_interval: int = Field(
        0, ge=0, description="Optimizer steps between validations: held-out loss and pictures, also of step 0; 0: none."
    )
    validation_num_inference_steps: int = Field(50, ge=1, le=1000, description="DDPM steps of each sample.")
    validation_guidance: float = Field(7.0, ge=1, description="Classifier-free guidance scale; 1 switches it off.")
    validation_noise_level: int = Field(250, ge=0, le=999, description="Noise on Stage II's low-res input (0 to 999).")
    validation_noise_levels: tuple[Annotated[int, Field(ge=0, le=999)], ...] = Field(
        (),
        strict=False,
        description="Further levels (0 to 999) at which Stage II is measured on the held-out pictures.",
    )
    validation_back_projection: bool = Field(
        False,
        description="Add to Stage II's picture, in every sampling step, what it lacks of its low-res picture "
        "(Irani and Peleg 1991; Wang et al. 2022). False: the stock pipeline as it is.",
    )

    @property
    def steps(self) -> int:
        """Optimizer steps of the run; with `num_train_epochs` they are not known before `epochs.with_steps`."""
        return self.max_train_steps or 1000

    @property
    def final_learning_rate(self) -> float:
        """Learning rate at the end of a decaying schedule."""
        return self.learning_rate / 10 if self.lr_end is None else self.lr_end

    @property
    def schedule(self) -> Schedule:
        """Shape of the learning rate over the run."""
        return self.lr_scheduler or ("constant" if self.optimizer == "adamw_schedulefree" else "cosine")

    @property
    def measured_noise_levels(self) -> tuple[int, ...]:
        """The levels at which Stage II is measured, each once, the one that it samples at first."""
        return tuple(dict.fromkeys((self.validation_noise_level, *self.validation_noise_levels)))

    @property
    def paired(self) -> bool:
        """Whether a ControlNet follows pictures of their own."""
        return self.controlnet and self.controlnet_conditioning == "paired"

    @property
    def degrades_low_res(self) -> bool:
        """Whether Stage II's low-res pictures are spoilt in training."""
        return bool(self.low_res_blur or self.low_res_noise or self.low_res_jpeg_quality)

    @property
    def flavour(self) -> Flavour:
        """The table's entry."""
        return FLAVOURS[self.model_flavour]

    @property
    def model(self) -> str:
        """Hub id or directory of the weights."""
        return self.pretrained_model_name_or_path or self.flavour.repo

    @property
    def notes(self) -> list[str]:
        """What a user should know of these settings, each starting with its key."""
        return stage_notes(self)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if fault := stage_fault(self):
            raise ValueError(fault)
        return self


def device_fault(config: StageConfig, device: str) -> str:
    """Why a stage cannot be trained on a device, given by torch's name of its type, `rocm` or `auto`; empty when it can."""
    if (
        config.optimizer == "adamw_8bit" and device == "mps"
    ):  # bitsandbytes 0.50 has kernels for cuda (rocm), xpu and cpu
        return "optimizer is 'adamw_8bit', and bitsandbytes has no 8-bit states on mps. Use adamw or adamw_bf16"
    if config.attention_mechanism == "xformers":
        if device not in ("cuda", "auto"):
            return f"attention_mechanism is 'xformers', which needs an NVIDIA GPU, and the device is {device}. Use sdpa"
        if find_spec("xformers") is None:
            return (
                "attention_mechanism is 'xformers', and xformers cannot be imported. pip install xformers, or use sdpa"
            )
    return _inductor_fault(device) if config.dynamo_backend == "inductor" else ""


def _inductor_fault(device: str) -> str:
    """What inductor lacks for a device, as far as it can be told without torch; the job compiles a line with it."""
    said = "dynamo_backend is 'inductor'"
    if device == "mps":
        return f"{said}, whose kernels for mps are a prototype in torch. Set it to no"
    if not any(which(name) for name in _COMPILERS):
        install = "Debian: apt-get install g++"
        return f"{said}, and none of {', '.join(_COMPILERS)} is in PATH. Install one ({install}), or set it to no"
    if device in ("cuda", "rocm") and find_spec("triton") is None:
        return f"{said}, which writes triton's kernels for a GPU, and triton cannot be imported. Set it to no"
    return ""

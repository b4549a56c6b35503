"""The settings of one stage: training and sampling, with SimpleTuner's key names and units.

A setting that would have no effect is refused like one that contradicts another, or noted where it is common in files that
others wrote: a run should do what its file says.
"""

from importlib.util import find_spec
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from deepfloyd_core.extras import missing_extra
from deepfloyd_core.flavours import FLAVOURS, Flavour
from deepfloyd_core.spec import Spec, closest
from deepfloyd_core.types import Conditioning

ATTENTION_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")

# The package that an optimizer comes from where that is not torch, and the extra that installs it.
_LIBRARIES = {
    "adamw_8bit": ("bitsandbytes", "bitsandbytes"),
    "prodigy": ("prodigyopt", "optimizers"),
    "adamw_schedulefree": ("schedulefree", "optimizers"),
}
_ADAPTERS = (
    "lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_init_type", "use_dora",
)  # fmt: skip
# Parts of a UNet that a ControlNet has no copy of.
_NOT_ON_THE_WAY_DOWN = ("up_blocks", "conv_norm_out", "conv_out", "encoder_hid_proj", "add_embedding")
# A key, and the values of another under which alone it has an effect.
_BELONGS: tuple[tuple[str, str, tuple[object, ...]], ...] = (
    *((key, "model_type", ("lora",)) for key in (*_ADAPTERS, "use_bitfit")),
    *((key, "use_bitfit", (False,)) for key in _ADAPTERS),
    ("controlnet", "model_type", ("lora",)),
    ("controlnet", "use_bitfit", (False,)),
    ("controlnet_conditioning", "controlnet", (True,)),
    ("lr_num_cycles", "lr_scheduler", ("cosine_with_restarts",)),
    ("lr_power", "lr_scheduler", ("polynomial",)),
    ("huber_c", "loss_type", ("huber", "smooth_l1")),
    ("huber_schedule", "loss_type", ("huber", "smooth_l1")),
    ("soft_min_snr_sigma_data", "use_soft_min_snr", (True,)),
    ("noise_offset", "offset_noise", (True,)),
    ("noise_offset_probability", "offset_noise", (True,)),
    ("timestep_bias_multiplier", "timestep_bias_strategy", ("earlier", "later", "range")),
    ("timestep_bias_portion", "timestep_bias_strategy", ("earlier", "later")),
    ("timestep_bias_begin", "timestep_bias_strategy", ("range",)),
    ("timestep_bias_end", "timestep_bias_strategy", ("range",)),
)
# Keys that Stage I has no use for; `validation_noise_level` alone may stand at the top level for both.
_STAGE2_KEYS = (
    "noise_level_begin", "noise_level_end", "low_res_blur", "low_res_noise", "low_res_jpeg_quality",
    "low_res_degraded_share", "low_res_stage1_share", "low_res_stage1_strength", "stage2_patch",
    "validation_noise_levels", "validation_back_projection",
)  # fmt: skip


class StageConfig(Spec):
    """Training and sampling of one stage."""

    model_flavour: str = Field(description="Which UNet: one of the flavours in the README.")
    pretrained_model_name_or_path: str | None = Field(
        None, description="Hub id or directory of the weights, in place of the flavour's own."
    )
    model_type: Literal["lora", "full"] = Field(
        "lora", description="What is trained: adapters, or (`full`) every weight of the UNet."
    )
    init_lora: str | int | None = Field(
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
    lr_end: float = Field(4e-6, ge=0, description="Learning rate at the last step, for the decaying schedules.")
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "sine"
    ] = Field("cosine", description="Shape of the learning rate over the run.")
    lr_num_cycles: int = Field(
        1, ge=1, le=10_000, description="Times that `cosine_with_restarts` falls from the peak to the end."
    )
    lr_power: float = Field(2.0, gt=0, le=100, description="Power of `polynomial`; 1 is a straight line.")
    lr_warmup_steps: int = Field(
        0, ge=0, description="Optimizer steps of linear warm-up, also of `cosine` and the others."
    )
    max_train_steps: int = Field(1000, ge=1, description="Optimizer steps of the run.")
    train_batch_size: int = Field(4, ge=1, le=4096, description="Pictures in one forward pass.")
    gradient_accumulation_steps: int = Field(1, ge=1, le=1024, description="Forward passes for one optimizer step.")
    gradient_checkpointing: bool = Field(
        False,
        description="Recompute activations in the backward pass, of attentions too: less memory, the same result.",
    )
    attention_mechanism: Literal["sdpa", "xformers", "math"] = Field(
        "sdpa", description="Attention while training: torch's fused one, xFormers' (NVIDIA GPUs), or plain products."
    )
    dataloader_num_workers: int = Field(
        1, ge=0, le=16, description="Threads that prepare the next batches, one each, during a step; changes no result."
    )
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this L2 norm.")
    mixed_precision: Literal["no", "bf16"] = Field(
        "bf16", description="dtype that the UNet computes in, and of its frozen weights."
    )
    optimizer: Literal["adamw", "adamw_bf16", "adamw_8bit", "adafactor", "prodigy", "adamw_schedulefree"] = Field(
        "adamw",
        description="`adamw`: fp32 states. `adamw_bf16`: weights and states in bf16, rounded stochastically. `adamw_8bit`: "
        "8-bit states. `adafactor`: hardly any states. `prodigy`: finds its step size; set `learning_rate` = 1. "
        "`adamw_schedulefree`: averages instead of decaying; set `lr_scheduler` = constant.",
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
    checkpointing_steps: int = Field(500, ge=1, description="Optimizer steps between checkpoints; changes no result.")
    checkpoints_total_limit: int = Field(2, ge=1, description="Checkpoints kept while training; changes no result.")
    validation_steps: int = Field(
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
        found = []
        if self.model_type == "full" and not self.model_fields_set & {"learning_rate"} and self.optimizer != "prodigy":
            found.append(
                f"learning_rate is not set; {self.learning_rate:g} is meant for a LoRA. Every weight of a UNet wants less, "
                "for example 1e-6 with lr_end = 1e-7"
            )
        if self.optimizer == "prodigy" and self.learning_rate != 1.0:
            found.append(
                f"learning_rate is {self.learning_rate:g}; prodigy finds the step size itself and multiplies it by this. "
                "It is meant to be 1.0"
            )
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            found.append("lr_warmup_steps is ignored; lr_scheduler is constant. constant_with_warmup has a warm-up")
        if "lr_end" in self.model_fields_set and self.lr_scheduler.startswith("constant"):
            found.append(f"lr_end is ignored; lr_scheduler is {self.lr_scheduler}")
        if "ema_decay" in self.model_fields_set and not self.use_ema:
            found.append("ema_decay is ignored without use_ema")
        begin, end = self.noise_level_begin, self.noise_level_end
        outside = [level for level in self.measured_noise_levels if not begin <= level < end]
        if outside and self.flavour.stage == 2:
            key = "validation_noise_level" + ("" if self.validation_noise_level in outside else "s")
            found.append(f"{key} is {outside[0]}; training draws {begin} to {end - 1} alone")
        if self.optimizer == "adafactor":
            unused = sorted(self.model_fields_set & {"adam_beta1", "adam_beta2", "adam_epsilon"})
            found += [f"{key} is ignored; adafactor has no such setting" for key in unused]
        return found

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for find in (
            self._flavour_fault, self._rate_fault, self._optimizer_fault, self._objective_fault, self._idle_fault,
            self._stage2_fault, self._control_fault,
        ):  # fmt: skip
            if fault := find():
                raise ValueError(fault)
        return self

    def _flavour_fault(self) -> str:
        if self.model_flavour in FLAVOURS:
            return ""
        near = closest(self.model_flavour, list(FLAVOURS)).replace("keys", "flavours")
        return f"model_flavour is {self.model_flavour!r}, which is not known. {near.rstrip('.')}"

    def _rate_fault(self) -> str:
        if self.lr_end > self.learning_rate:
            return f"lr_end is {self.lr_end}, above learning_rate {self.learning_rate}; it must not be"
        if self.lr_warmup_steps >= self.max_train_steps:
            return (
                f"lr_warmup_steps is {self.lr_warmup_steps}; it must be below max_train_steps ({self.max_train_steps})"
            )
        return ""

    def _optimizer_fault(self) -> str:
        said = f"optimizer is {self.optimizer!r}"
        package, extra = _LIBRARIES.get(self.optimizer, ("", ""))
        if package and (missing := missing_extra([package], extra)):
            return f"{said}, and {missing}"
        if self.optimizer == "adamw_bf16" and self.mixed_precision != "bf16":
            return f"{said}, which keeps the weights in bf16, and mixed_precision is 'no'. Set it to bf16, or use adamw"
        if self.optimizer != "adamw_schedulefree":
            return ""
        if not self.lr_scheduler.startswith("constant"):
            return (
                f"{said}, which takes the place of a schedule, and lr_scheduler is {self.lr_scheduler!r}. "
                "Use constant or constant_with_warmup"
            )
        if self.use_ema:
            return f"{said}, which averages what is trained itself. Remove use_ema"
        if self.adam_beta1 == 0:
            return f"{said}, which divides by adam_beta1, and that is 0. Use for example 0.9"
        return ""

    def _objective_fault(self) -> str:
        if self.use_soft_min_snr and self.snr_gamma is not None:
            return "snr_gamma and use_soft_min_snr are two weights of the same loss. Remove one of them"
        if self.input_perturbation_steps and not self.input_perturbation:
            return "input_perturbation_steps is set, and input_perturbation is 0. Set it, for example to 0.1"
        if self.timestep_bias_strategy == "none":
            return ""
        said = f"timestep_bias_strategy is {self.timestep_bias_strategy!r}, and timestep_bias_"
        if self.timestep_bias_multiplier == 1:
            return f"{said}multiplier is 1, so that none is drawn more often than the others. Use for example 2.0"
        if self.timestep_bias_strategy != "range":
            return ""
        first, end = self.timestep_bias_begin, self.timestep_bias_end
        if first >= end:
            return f"{said}begin ({first}) is not below timestep_bias_end ({end}). Set a range within 0 to 1000"
        if (first, end) == (0, 1000):
            return f"{said}begin and timestep_bias_end take in every timestep. Set a smaller range"
        return ""

    def _idle_fault(self) -> str:
        """A key that was changed and would have no effect, with the one that would give it one."""
        for key, other, wanted in _BELONGS:
            value, found = getattr(self, key), getattr(self, other)
            if value != type(self).model_fields[key].default and found not in wanted:
                needed = " or ".join(str(option) for option in wanted)
                return (
                    f"{key} is {value}, without effect while {other} is {found}. Remove it, or set {other} = {needed}"
                )
        return ""

    def _control_fault(self) -> str:
        if not self.controlnet:
            return ""
        if self.flavour.stage == 2:
            return f"controlnet is True, and {self.model_flavour} is a Stage II model. Put it into [stage1]"
        if self.init_lora is not None:
            return (
                "controlnet is True, and init_lora is set; a ControlNet-LoRA starts from the base. Remove one of them"
            )
        beyond = [name for name in self.lora_target_modules if name.split(".")[0] in _NOT_ON_THE_WAY_DOWN]
        if beyond:
            return (
                f"lora_target_modules has {beyond[0]!r}; controlnet adapts a copy of the UNet's way down, which lacks "
                "it. Remove it"
            )
        if self.controlnet_conditioning == "canny" and (missing := missing_extra(["skimage"], "controlnet")):
            return f"controlnet_conditioning is 'canny', and {missing}"
        return ""

    def _stage2_fault(self) -> str:
        """A key of Stage II that Stage I was given, or that contradicts another."""
        if self.flavour.stage == 2:
            return self._low_res_fault()
        for key in _STAGE2_KEYS:
            value = getattr(self, key)
            if value != type(self).model_fields[key].default:
                shown = list(value) if isinstance(value, tuple) else value
                return f"{key} is {shown}, and {self.model_flavour} is a Stage I model. Put it into [stage2]"
        return ""

    def _low_res_fault(self) -> str:
        if self.noise_level_begin >= self.noise_level_end:
            return (
                f"noise_level_begin ({self.noise_level_begin}) is not below noise_level_end ({self.noise_level_end}). "
                "Set a range within 0 to 1000"
            )
        if self.low_res_degraded_share != 1 and not self.degrades_low_res:
            return (
                f"low_res_degraded_share is {self.low_res_degraded_share}, without effect while there is no low_res_blur, "
                "low_res_noise or low_res_jpeg_quality. Remove it, or set one of them"
            )
        default = type(self).model_fields["low_res_stage1_strength"].default
        if self.low_res_stage1_strength != default and not self.low_res_stage1_share:
            return (
                f"low_res_stage1_strength is {self.low_res_stage1_strength}, without effect while low_res_stage1_share is "
                "0. Remove it, or set low_res_stage1_share, for example to 0.5"
            )
        return ""


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
    return ""

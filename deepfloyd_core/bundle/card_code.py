"""The Python code of a model card: it runs as it is in the bundle's folder, with stock diffusers, and makes one picture.

Base models are named by their hub id, or by the flavour's name when this package has or writes the weights. A folder of the
machine that trained is not named, because cards are published: the code takes the model from beside the bundle.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from deepfloyd_core.adapters.files import BITFIT_FILE, CONTROL_FILE, UNET_FOLDER
from deepfloyd_core.config.base import is_there
from deepfloyd_core.config.flavours import RANDOM
from deepfloyd_core.config.run import Run
from deepfloyd_core.config.stage import StageConfig
from deepfloyd_core.config.stage_sampling import SCHEDULER_KINDS
from deepfloyd_core.config.stages import STAGES, UPSCALE, Stage
from deepfloyd_core.types import Conditioning

HERE = "# Run this in the folder of this file."
# What a ControlNet follows, by its conditioning.
_PICTURES: dict[Conditioning, str] = {
    "canny": "white edges one pixel wide on black (scikit-image's feature.canny, sigma 1)",
    "grayscale": "its brightness in all three channels, as Pillow's convert('L')",
    "low_res": "four times smaller (bicubic, antialiased) and bilinearly as large as before",
    "paired": "like those of conditioning_data",
}
_DTYPES = {"no": "torch.float32", "bf16": "torch.bfloat16"}


def card_code(run: Run, products: Mapping[Stage, str], prompt: str) -> list[str]:
    """The lines of the code. products: of each stage the trained product, as `product_name`."""
    stages = run.config.stages
    lines = [HERE, *_imports(run, products), ""]
    lines += [
        'parts = {"safety_checker": None, "feature_extractor": None, "watermarker": None, "requires_safety_checker": False,',
        '         "use_safetensors": True}',
    ]
    for stage in stages:
        lines += _loaded(stage, run.config.stage(stage), products[stage], text=stage == stages[0])
    lines += [
        "if torch.cuda.is_available():",
        *(f"    stage{stage}.enable_model_cpu_offload()" for stage in stages),
        "",
    ]
    negative = _quoted(run.config.validation_negative_prompt)
    lines += [
        f"prompt, seed = {_quoted(prompt)}, {run.config.validation_seed}",
        f"embeds, negative = stage{stages[0]}.encode_prompt(prompt, negative_prompt={negative}, clean_caption=True)",
        'text = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}',
    ]
    for stage in stages:
        lines += CALLS[stage](run, stage, products[stage])
    lines += [f"picture = {VARIABLES[stages[-1]]}.images[0]"]
    return [*lines, 'picture.save("../picture.png")  # `deepfloyd verify` knows the files of this folder']


def _imports(run: Run, products: Mapping[Stage, str]) -> list[str]:
    schedulers = [SCHEDULER_KINDS[run.config.stage(stage).validation_noise_scheduler].name for stage in products]
    pipelines = [STAGES[stage].pipeline for stage in products]
    names = list(dict.fromkeys(["DDPMScheduler", *schedulers, *pipelines]))
    names += ["UNet2DConditionModel"] if UNET_FOLDER in products.values() else []
    lines = ["import torch", f"from diffusers import {', '.join(names)}"]
    lines += ["from safetensors.torch import load_file"] if BITFIT_FILE in products.values() else []
    bases = " ".join(_base(stage, run.config.stage(stage), False) for stage in products)
    ours = [name for name in ("FLAVOURS", "resolve") if f"{name}[" in bases or f"{name}(" in bases]
    if any(run.config.stage(stage).validation_back_projection for stage in run.config.upscalers):
        ours.append("back_projecting")
    lines += [f"from deepfloyd_core.api import {', '.join(ours)}"] if ours else []
    return [*lines, *_control_code()] if CONTROL_FILE in products.values() else lines


def _control_code() -> list[str]:
    """The function that loads a ControlNet: the source of a module that is not imported here, as it takes torch."""
    source = (Path(__file__).parent / "card_control.py").read_text()
    lines = source[source.index("import copy") :].rstrip().splitlines()
    return [line.split("  # noqa")[0].split("  # fmt:")[0] for line in lines if line != "import torch"]


def _loaded(stage: Stage, settings: StageConfig, product: str, text: bool) -> list[str]:
    """A stage's pipeline with its trained weights; the first pipeline encodes the prompt for all."""
    dtype = f"dtype={_DTYPES[settings.mixed_precision]}"
    more = "" if text else ", text_encoder=None, tokenizer=None"
    before: list[str] = []
    after = [f'stage{stage}.load_lora_weights("stage{stage}")']
    if product == BITFIT_FILE:
        after = [
            f'biases = load_file("stage{stage}/{product}")',
            f"assert not stage{stage}.unet.load_state_dict(biases, strict=False).unexpected_keys",
        ]
    elif product == CONTROL_FILE:
        after = [f'load_control(stage{stage}.unet, "stage{stage}/{product}")']
    elif product == UNET_FOLDER:
        before = [
            f'unet = UNet2DConditionModel.from_pretrained("stage{stage}", subfolder="unet", {dtype}, use_safetensors=True)'
        ]
        more, after = f"{more}, unet=unet", []
    return [
        f"base = {_base(stage, settings, text)}",
        *before,
        f"stage{stage} = {STAGES[stage].pipeline}.from_pretrained(base, {dtype}{more}, **parts)",
        *after,
        *_order(stage, settings),
        f'stage{stage}.scheduler = DDPMScheduler.from_pretrained("stage{stage}/scheduler")',
        *_other_scheduler(stage, settings),
        "",
    ]


def _order(stage: Stage, settings: StageConfig) -> list[str]:
    """The line by which convolutions round as those of `generate`; peft's DoRA of a convolution does not take that order."""
    if settings.use_dora and any("conv" in name for name in settings.lora_target_modules):
        return []
    return [
        f"stage{stage}.unet.to(memory_format=torch.channels_last)  # as deepfloyd generate draws: on a CPU in fp32 every bit"
    ]


def _other_scheduler(stage: Stage, settings: StageConfig) -> list[str]:
    """The line that takes another scheduler than DDPM."""
    kind = SCHEDULER_KINDS[settings.validation_noise_scheduler]
    if not kind.changes:
        return []
    changes = f'{{**stage{stage}.scheduler.config, "_use_default_values": [], **{dict(kind.changes)}}}'
    return [f"stage{stage}.scheduler = {kind.name}.from_config({changes})"]


def _base(stage: Stage, settings: StageConfig, text: bool) -> str:
    """The expression that names a stage's base model. text: with its text encoder."""
    if settings.model.startswith(RANDOM):
        return f"str(resolve({_quoted(settings.model)}, {stage}, text={text}))"
    if settings.model == settings.flavour.repo and Path(settings.model).is_absolute():
        return f'FLAVOURS["{settings.flavour.name}"].repo'
    return _quoted(_beside(settings) if is_private(settings) else settings.model)


def is_private(settings: StageConfig) -> bool:
    """Whether a stage's base model is a folder of this machine that others do not have."""
    folder = Path(settings.model)
    if settings.model.startswith(RANDOM) or settings.model == settings.flavour.repo:
        return False
    return folder.is_absolute() or is_there(folder)


def _beside(settings: StageConfig) -> str:
    """Where the code looks for such a base model, from the bundle's folder."""
    return f"../{settings.flavour.name}"


def private_bases(run: Run) -> list[str]:
    """What a card says of base models that it cannot name."""
    return [
        f"The base model of {STAGES[stage].title} is not published with these weights: a `{settings.flavour.name}` with "
        f"weights of its own. Put its folder beside this one, as `{_beside(settings)}`, or write its place in the code."
        for stage in run.config.stages
        if is_private(settings := run.config.stage(stage))
    ]


def _text_call(run: Run, stage: Stage, product: str) -> list[str]:
    """The call of the stage that makes pictures from text."""
    settings, (width, height) = run.config.stage(stage), run.config.sample_sizes_px[0]
    lines, more = [], ""
    if product == CONTROL_FILE:
        more = ', cross_attention_kwargs={"control_image": conditioning}'
        said = _PICTURES[settings.controlnet_conditioning]
        lines = [f"conditioning = torch.zeros(1, 3, {height}, {width})  # in [0, 1]: {said}"]
    more += _output(run, stage)
    return [
        *lines,
        f"{VARIABLES[stage]} = stage{stage}(**text, width={width}, height={height}, {_sampling(settings)},",
        f"               generator=torch.Generator().manual_seed(seed){more})",
    ]


def _upscaler_call(run: Run, stage: Stage, product: str) -> list[str]:
    """The call of an upscaler, of the pictures of the stage before it if the run has that."""
    source = STAGES[stage].upscales
    assert source is not None
    settings, width, height = run.config.stage(stage), STAGES[source].size_px, STAGES[source].size_px
    lines = [f"low_res = torch.zeros(1, 3, {height}, {width})  # the picture to enlarge, in [-1, 1]"]
    if source in run.config.stages:
        factor = STAGES[source].scale // STAGES[run.config.first_stage].scale
        width, height = (factor * edge for edge in run.config.sample_sizes_px[0])
        lines = [f"low_res = {VARIABLES[source]}.images"]
    if settings.validation_back_projection:
        projecting = f"back_projecting(stage{stage}.scheduler, low_res.float().cpu())"
        lines.append(f"stage{stage}.scheduler = {projecting}  # before each call")
    return [
        *lines,
        f"{VARIABLES[stage]} = stage{stage}(**text, image=low_res, width={UPSCALE * width}, height={UPSCALE * height}, "
        f"noise_level={settings.validation_noise_level},",
        f"               {_sampling(settings)}, generator=torch.Generator().manual_seed(seed){_output(run, stage)})",
    ]


def _output(run: Run, stage: Stage) -> str:
    """The argument for a tensor as output, for a stage whose pictures another one upscales; else empty."""
    return ', output_type="pt"' if any(STAGES[other].upscales == stage for other in run.config.stages) else ""


# The code that calls each stage, and the variable with its output.
CALLS: dict[Stage, Callable[[Run, Stage, str], list[str]]] = {1: _text_call, 2: _upscaler_call}
VARIABLES: dict[Stage, str] = {1: "small", 2: "large"}


def _sampling(settings: StageConfig) -> str:
    return f"num_inference_steps={settings.validation_num_inference_steps}, guidance_scale={settings.validation_guidance:g}"


def _quoted(text: str) -> str:
    """A Python literal that ends no code block of markdown."""
    return repr(text).replace("`", "\\x60")

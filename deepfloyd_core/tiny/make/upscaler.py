"""Stage III of the tiny cascade: the classes of `stabilityai/stable-diffusion-x4-upscaler`, with 0.9 M parameters.

    python -m deepfloyd_core.tiny.make.upscaler vae --work build/tiny
    python -m deepfloyd_core.tiny.make.upscaler unet --work build/tiny
    python -m deepfloyd_core.tiny.make.upscaler export --work build/tiny

A VAE that halves twice and a UNet on its latents, which lie pixel by pixel on those of the low-res picture beside them. Both
are trained on windows of drawn pictures. The text encoder is as initialised: the low-res picture says what to paint.
"""

import string
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionUpscalePipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from deepfloyd_core.models.random_stage3 import NOISE
from deepfloyd_core.tiny.make.models import WORDS
from deepfloyd_core.tiny.make.objective import CAPTIONS, DROPPED, Phase, draw_batch
from deepfloyd_core.tiny.make.pretrain import Run, load_average, run_step, train

VAE_STATE, UNET_STATE = "stage3_vae.safetensors", "stage3_unet.safetensors"
SCALING = 0.08333  # of latents to variance 1: the pipeline takes no other
DRAWN_PX = 512  # windows of 256 px are cut from pictures of this edge; low-res pictures have a quarter of both
MOSTNOISE = 350  # the pipeline's `max_noise_level`
TEXT_WIDTH, ROWS = 32, 77
LATENTNOISE = 0.03
VAE_PHASES = (Phase(64, 12, 1500, 2e-3), Phase(256, 2, 200, 6e-4))
UNET_PHASES = (
    Phase(128, 12, 2000, 1.5e-3, noise_power=2.0, strange=0.7),
    Phase(256, 4, 300, 6e-4, noise_power=2.0, strange=0.7),
    Phase(128, 12, 1200, 1e-3, noise_power=2.0, strange=0.7, rolled=0.5),
    Phase(256, 4, 200, 4e-4, noise_power=2.0, strange=0.7, rolled=0.5),
)
# A group norm divides by the spread of its group, so a small network forgets how bright and how coloured a plain picture
# is. Two channels that hold +STEADY and -STEADY outweigh the others: then the norm is nearly a constant factor.
COLOURS, HIGH, LOW, STEADY = slice(0, 3), 3, 4, 6.0
_LIFT = 4.0  # SiLU is nearly linear there


def vae(seed: int = 3) -> torch.nn.Module:
    """Pictures (B, 3, 4H, 4W) in [-1, 1] <-> latents (B, 4, H, W): at first the mean colours of 4x4 pixels."""
    torch.manual_seed(seed)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 32), layers_per_block=1, latent_channels=4, norm_num_groups=1,
        mid_block_add_attention=False, sample_size=256, scaling_factor=SCALING,
    )  # fmt: skip
    _pass_colours(model)
    for half, wanted in ((model.encoder, 4), (model.decoder, 3)):
        _read_colours(half, torch.eye(wanted, 3))
    with torch.no_grad():
        model.quant_conv.weight[:4, :4, 0, 0] = torch.eye(4)
        model.quant_conv.bias.zero_()
        model.post_quant_conv.weight[:, :, 0, 0] = torch.eye(4)
        model.post_quant_conv.bias.zero_()
        pictures, _ = draw_batch(np.random.default_rng(seed), 16, 64, strange=0.8, any_ground=True)
        colours = F.avg_pool2d(pictures, 4)
        _fit(model.encoder, model.encode(pictures).latent_dist.mean, colours)
        latents = model.encode(pictures).latent_dist.mean
        _fit(model.decoder, F.avg_pool2d(model.decode(latents).sample, 4), colours)
    return cast(torch.nn.Module, model)


def unet(seed: int = 4) -> torch.nn.Module:
    """(B, 7, H, W) = concat(latents, noised low-res), t, rows, noise level -> the latents without noise (B, 4, H, W): at
    first the colours of the low-res picture.
    """
    torch.manual_seed(seed)
    model = UNet2DConditionModel(
        sample_size=128, in_channels=7, out_channels=4, block_out_channels=(16, 32, 32, 48), layers_per_block=1,
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
        up_block_types=(*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"), only_cross_attention=(True, True, True, False),
        norm_num_groups=1, attention_head_dim=2, cross_attention_dim=TEXT_WIDTH, num_class_embeds=1000,
        use_linear_projection=True,
    )  # fmt: skip
    _pass_colours(model, first=4)
    _read_colours(model, 2 * torch.eye(4, 3))
    last = model.up_blocks[-1].resnets[-1].conv_shortcut
    with torch.no_grad():  # takes them from the skip connection, which is the second half of its channels
        last.weight[COLOURS] = 0
        last.weight[COLOURS, 16:19, 0, 0] = torch.eye(3)
    return cast(torch.nn.Module, model)


@torch.no_grad()
def _pass_colours(model: torch.nn.Module, first: int = 0) -> None:
    """Let a network's first channels carry the colours of its input, which start at a channel of it, past every block."""
    for name, conv in model.named_modules():
        kind = name.split(".")[-1]
        if kind == "conv2":  # of a residual branch
            conv.weight.zero_()
            conv.bias.zero_()
        if kind not in ("conv_in", "conv_shortcut", "conv1", "conv"):
            continue
        conv.weight[[HIGH, LOW]] = 0
        conv.bias[HIGH], conv.bias[LOW] = STEADY, -STEADY
        if kind == "conv1":
            continue
        start = first if name == "conv_in" else 0
        conv.weight[COLOURS] = 0
        conv.bias[COLOURS] = 0
        size = conv.weight.shape[-1]
        places = [(size // 2, size // 2)] if conv.stride == (1, 1) else [(y, x) for y in (0, 1) for x in (0, 1)]
        for y, x in places:
            conv.weight[COLOURS, start : start + 3, y, x] = torch.eye(3) / len(places)
    for norm in (part for part in model.modules() if isinstance(part, torch.nn.GroupNorm)):
        norm.weight.mul_(STEADY * (2 / norm.num_channels) ** 0.5)


@torch.no_grad()
def _read_colours(half: Any, matrix: torch.Tensor) -> None:
    """Let the output of a network be a matrix (outputs, 3) of the colours that it carries."""
    half.conv_norm_out.bias[COLOURS] = _LIFT
    rows = slice(0, len(matrix))
    half.conv_out.weight[rows, COLOURS] = 0
    half.conv_out.weight[rows, COLOURS, 1, 1] = matrix
    half.conv_out.weight[rows, 3:] *= 0.1
    half.conv_out.bias[rows] = -matrix.sum(1) * F.silu(torch.tensor(_LIFT))


def _fit(half: Any, made: torch.Tensor, wanted: torch.Tensor) -> None:
    """Scale and shift the first outputs of a network, so that what it made becomes what is wanted, (B, 3, H, W) each."""
    for channel in range(3):
        x, y = made[:, channel].flatten(), wanted[:, channel].flatten()
        slope = torch.cov(torch.stack([x, y]))[0, 1] / x.var()
        half.conv_out.weight[channel] *= slope
        half.conv_out.bias[channel] = half.conv_out.bias[channel] * slope + y.mean() - slope * x.mean()


def text_encoder(vocabulary: int, seed: int = 5) -> torch.nn.Module:
    """A CLIP text encoder of two layers, 32 wide."""
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=TEXT_WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=ROWS, hidden_act="gelu", projection_dim=TEXT_WIDTH,
        bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1,
    )  # fmt: skip
    return cast(torch.nn.Module, CLIPTextModel(config))


def tokenizer() -> CLIPTokenizer:
    """CLIP's byte pairs, merged for the words of the tiny cascade."""
    trained = Tokenizer(BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + 400, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    trained.train_from_iterator([" ".join(WORDS), " ".join(string.printable.strip())], trainer)
    pairs = [tuple(pair) for pair in _merges(trained)]
    pieces = [*alphabet, *(f"{one}</w>" for one in alphabet), *("".join(pair) for pair in pairs)]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    vocabulary |= {"<|startoftext|>": len(vocabulary), "<|endoftext|>": len(vocabulary) + 1}
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=ROWS)


def _merges(trained: Tokenizer) -> list[list[str]]:
    import json

    found: list[list[str]] = json.loads(trained.to_str())["model"]["merges"]
    return found


def windows(
    rng: np.random.Generator, count: int, side_px: int, strange: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Windows (count, 3, side, side) of drawn pictures in [-1, 1], the same of their downscales, numbers of captions."""
    each = 4 if side_px == 128 else 2
    pictures, numbers = draw_batch(rng, count // each, DRAWN_PX, strange, any_ground=True)
    small = F.interpolate(pictures, (DRAWN_PX // 4,) * 2, mode="bicubic", antialias=True).clamp(-1, 1)
    large, low = [], []
    for index in range(count):
        top, left = (4 * int(edge) for edge in rng.integers(0, (DRAWN_PX - side_px) // 4 + 1, 2))
        picture, quarter = pictures[index // each], small[index // each]
        large.append(picture[:, top : top + side_px, left : left + side_px])
        low.append(quarter[:, top // 4 : (top + side_px) // 4, left // 4 : (left + side_px) // 4])
    return torch.stack(large), torch.stack(low), numbers.repeat_interleave(each)


def train_vae(work: Path) -> None:
    """The squared error of pictures whose latents have a little noise, as those of a sampler have."""
    run = Run.start(work / VAE_STATE, vae=vae())

    def loss_of(phase: Phase, rng: np.random.Generator) -> torch.Tensor:
        model: Any = run.modules["vae"]
        pixels, _ = draw_batch(rng, phase.batch, phase.side_px, strange=0.8, any_ground=True)
        latents = model.encode(pixels).latent_dist.mean
        made = model.decode(latents + LATENTNOISE * torch.randn_like(latents)).sample
        loss: torch.Tensor = (made - pixels).square().mean()
        return loss

    train(run, VAE_PHASES, loss_of)


@torch.no_grad()
def finished_vae(work: Path) -> torch.nn.Module:
    """The trained VAE, its latents scaled so that SCALING gives them variance 1."""
    model: Any = load_average(work / VAE_STATE, "vae", vae())
    pixels, _, _ = windows(np.random.default_rng(0), 32, 256, strange=0.8)
    scale = 1 / (SCALING * model.encode(pixels).latent_dist.mean.std())
    channels = model.config.latent_channels
    model.quant_conv.weight[:channels] *= scale
    model.quant_conv.bias[:channels] *= scale
    model.quant_conv.bias[channels:] += 2 * scale.log()
    model.post_quant_conv.weight /= scale
    return cast(torch.nn.Module, model)


def train_unet(work: Path) -> None:
    """The squared error of the latents."""
    coder: Any = finished_vae(work)
    tokens = tokenizer()
    encoder = text_encoder(len(tokens)).eval()
    read = tokens(CAPTIONS, padding="max_length", max_length=ROWS, truncation=True, return_tensors="pt")
    with torch.no_grad():
        rows = encoder(read.input_ids)[0]
    run = Run.start(work / UNET_STATE, unet=unet())
    bars = DDPMScheduler(**NOISE).alphas_cumprod

    def loss_of(phase: Phase, rng: np.random.Generator) -> torch.Tensor:
        pixels, low, numbers = windows(rng, phase.batch, phase.side_px, phase.strange)
        numbers[torch.from_numpy(rng.random(phase.batch) < 0.1)] = DROPPED
        with torch.no_grad():
            latents = coder.encode(pixels).latent_dist.mean * SCALING
        return latent_loss(run.modules["unet"], latents, low, rows[numbers], bars, phase)

    train(run, UNET_PHASES, loss_of)


def latent_loss(
    model: torch.nn.Module, x_0: torch.Tensor, low: torch.Tensor, rows: torch.Tensor, bars: torch.Tensor, phase: Phase
) -> torch.Tensor:
    """Mean squared error of the latents x_0 (B, 4, H, W) that the model gives. A share `phase.rolled` starts from its own
    guess at an earlier timestep, as in `objective.epsilon_loss`.
    """
    labels = (MOSTNOISE * torch.rand(len(x_0)) ** phase.noise_power).long()
    noised_low = _noised(low, bars[labels])
    t, start = torch.randint(0, 1000, (len(x_0),)), x_0

    def guess(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = model(torch.cat([x_t, noised_low], dim=1), t, rows, class_labels=labels).sample
        return made

    if phase.rolled:
        earlier = (t + torch.randint(50, 351, t.shape)).clamp(max=999)
        with torch.no_grad():
            rolled = guess(_noised(x_0, bars[earlier]), earlier)
        start = torch.where((torch.rand(len(x_0)) < phase.rolled).view(-1, 1, 1, 1), rolled, x_0)
    loss: torch.Tensor = (guess(_noised(start, bars[t]), t) - x_0).square().mean()
    return loss


def _noised(x_0: torch.Tensor, bars: torch.Tensor) -> torch.Tensor:
    """q(x_t | x_0), Ho et al. 2020 eq. 4. bars: (B,), 1 = clean."""
    bars = bars.view(-1, 1, 1, 1)
    return bars.sqrt() * x_0 + (1 - bars).sqrt() * torch.randn_like(x_0)


def export(work: Path, out: Path) -> None:
    """Write the stock pipeline as `out/iii`, its weights in fp16."""
    tokens = tokenizer()
    model = load_average(work / UNET_STATE, "unet", unet())
    pipe = StableDiffusionUpscalePipeline(
        vae=finished_vae(work).half(), text_encoder=text_encoder(len(tokens)).half(), tokenizer=tokens,
        unet=model.half(), low_res_scheduler=DDPMScheduler(**NOISE),
        scheduler=DDIMScheduler(
            **NOISE, prediction_type="sample", clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
    )  # fmt: skip
    pipe.save_pretrained(out / "iii")
    for path in (out / "iii").rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes 0600


def main() -> None:
    """Run one step."""
    run_step({"vae": train_vae, "unet": train_unet}, export)


if __name__ == "__main__":
    main()

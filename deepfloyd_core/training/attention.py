"""How a UNet's attention is computed in training; the pictures of the trained model do not depend on it."""

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnAddedKVProcessor, AttnAddedKVProcessor2_0


def set_attention(unet: UNet2DConditionModel, mechanism: str) -> None:
    """`sdpa`: torch's scaled_dot_product_attention. `math`: plain products and a softmax. `xformers`: its kernels."""
    if mechanism == "xformers":
        unet.enable_xformers_memory_efficient_attention()
    else:
        unet.set_attn_processor(AttnAddedKVProcessor2_0() if mechanism == "sdpa" else AttnAddedKVProcessor())

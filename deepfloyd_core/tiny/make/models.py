"""The parts of the tiny cascade: IF's classes and block types, with 1.4 M parameters a stage instead of 0.4 to 4.3 G.

Stage I has IF-I's four levels (attention on the inner three), Stage II has IF-II's traits: five levels, attention on the
inner two, `only_cross_attention` (so no to_k/to_v), the noise level as `class_embed_type="timestep"`, scaled residuals.
The outermost levels are 16 wide, because they set the price: 0.5 s for 8 pictures of 64 px and 0.75 s for 2 of 256 px,
forward and backward on two cores.
"""

import io
import string
from pathlib import Path
from typing import Any, cast

import sentencepiece
import torch
from diffusers import DDPMScheduler, IFPipeline, IFSuperResolutionPipeline, UNet2DConditionModel
from sentencepiece import sentencepiece_model_pb2
from transformers import T5Config, T5EncoderModel, T5Tokenizer

TOKENS = 77  # rows of text every IF UNet sees
TEXT_WIDTH = 64
# Two, so that a group has 8 to 32 channels (IF-I-M: 6 to 24). A group norm forgets the mean of its group, and with 1 or 2
# channels a group that mean is the picture's brightness and tint: colours then drift however long one trains.
NORM_GROUPS = 2
VOCABULARY = 640  # rows of the T5 table: the pieces and T5's 100 extra ids, rounded up

# Everyday words get a piece of their own, so that a new concept ("a purple star") meets rows of its own and not the rows
# of letters. Only the words of the 12 captions are ever trained; the others keep their initial rows, which are as large.
WORD_LIST = """
a an the of on in at with and or photo picture image drawing painting sketch icon style light dark plain pale bright
small large big little round flat soft ground background white black grey gray red green blue yellow purple orange
pink brown violet magenta cyan gold silver turquoise circle square triangle star heart diamond cross moon sun cloud
flower tree leaf house cat dog bird fish horse car boat hat cup ball box ring arrow hexagon pentagon rectangle oval
spiral one two three four five new old shape colour color object toy sign logo
"""
WORDS = WORD_LIST.split()


def train_tokenizer(out: Path) -> None:
    """Write a unigram tokenizer (pad 0, eos 1, unk 2, no bos) that knows WORDS and every printable ASCII character.

    The trainer only proposes pieces that occur inside several words, so whole words are added to its model afterwards;
    log-probability -4 a word beats any way of spelling it.
    """
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([word for word in WORDS for _ in range(9)] + [" ".join(string.printable.strip())] * 2),
        model_writer=trained,
        vocab_size=420,
        hard_vocab_limit=False,  # fewer pieces if the list does not yield so many
        model_type="unigram",
        normalization_rule_name="identity",  # the NFKC table alone would weigh 240 KB; captions are cleaned before
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    model = sentencepiece_model_pb2.ModelProto.FromString(trained.getvalue())
    known = {piece.piece for piece in model.pieces}
    for word in dict.fromkeys(WORDS):
        if f"\u2581{word}" not in known:
            model.pieces.add(piece=f"\u2581{word}", score=-4.0)
    out.mkdir(parents=True, exist_ok=True)
    (out / "spiece.model").write_bytes(model.SerializeToString())
    T5Tokenizer.from_pretrained(out).save_pretrained(out)


def text_encoder(seed: int = 0) -> torch.nn.Module:
    """A T5 v1.1 encoder (gated gelu) of two layers, 64 wide; its table is 640 x 64."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=TEXT_WIDTH,
        d_kv=16,
        num_heads=4,
        d_ff=128,
        num_layers=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
        tie_word_embeddings=False,
    )
    return cast(torch.nn.Module, T5EncoderModel(config))


def embed(tokenizer: T5Tokenizer, encoder: torch.nn.Module, captions: list[str]) -> torch.Tensor:
    """Hidden states (B, 77, 64) of captions, as diffusers computes them: lower case, padded to 77, the T5 masked, the
    UNet not.
    """
    tokens = tokenizer(
        [caption.lower().strip() for caption in captions],
        padding="max_length",
        max_length=TOKENS,
        truncation=True,
        return_tensors="pt",
    )
    rows: torch.Tensor = encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
    return rows


def stage1_unet(seed: int = 1) -> torch.nn.Module:
    """IF-I in miniature: (B, 3, 64, 64), t, rows -> (B, 6, 64, 64). Any side that 8 divides works."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=64,
        in_channels=3,
        out_channels=6,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D",) + ("SimpleCrossAttnDownBlock2D",) * 3,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",),
        act_fn="gelu",
        norm_num_groups=NORM_GROUPS,
        attention_head_dim=32,
        cross_attention_dim=64,
        cross_attention_norm="group_norm",
        encoder_hid_dim=TEXT_WIDTH,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        resnet_time_scale_shift="scale_shift",
    )
    return cast(torch.nn.Module, unet)


def stage2_unet(seed: int = 2) -> torch.nn.Module:
    """IF-II in miniature: (B, 6, 256, 256) = concat(x_t, noised low-res), t, rows, s -> (B, 6, 256, 256)."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=256,
        in_channels=6,
        out_channels=6,
        block_out_channels=(16, 16, 32, 64, 64),
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D",) * 3 + ("SimpleCrossAttnDownBlock2D",) * 2,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D",) * 2 + ("ResnetUpsampleBlock2D",) * 3,
        act_fn="gelu",
        norm_num_groups=NORM_GROUPS,
        attention_head_dim=32,
        cross_attention_dim=64,
        cross_attention_norm="group_norm",
        only_cross_attention=True,
        encoder_hid_dim=TEXT_WIDTH,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        class_embed_type="timestep",
        time_embedding_dim=64,
        time_embedding_act_fn="gelu",
        resnet_time_scale_shift="scale_shift",
        resnet_skip_time_act=True,
        resnet_out_scale_factor=1 / 0.7071,
        mid_block_scale_factor=1 / 0.7071,
    )
    return cast(torch.nn.Module, unet)


def sampling_scheduler(sample_max_value: float) -> Any:
    """IF's schedule. Variance is fixed: only epsilon is trained, the other three output channels stay as initialised."""
    return DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="epsilon",
        variance_type="fixed_small",
        thresholding=True,
        dynamic_thresholding_ratio=0.95,
        sample_max_value=sample_max_value,
    )


def noising_scheduler() -> Any:
    """The scheduler that adds noise to Stage II's low-res input; the same cosine schedule."""
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2")


def pipeline(stage: str, unet: torch.nn.Module, encoder: torch.nn.Module, tokenizer: T5Tokenizer) -> Any:
    """The stock pipeline of stage "i" or "ii", without safety checker and watermark."""
    parts: dict[str, Any] = {"unet": unet, "text_encoder": encoder, "tokenizer": tokenizer, "watermarker": None}
    parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    kind: Any = IFPipeline if stage == "i" else IFSuperResolutionPipeline
    if stage == "ii":
        parts["image_noising_scheduler"] = noising_scheduler()
    return kind(scheduler=sampling_scheduler(1.5 if stage == "i" else 1.0), **parts)

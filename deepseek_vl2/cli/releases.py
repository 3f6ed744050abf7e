"""What is known of the released checkpoints without asking the hub."""

from __future__ import annotations

from typing import Any, NamedTuple

MODEL_TYPE = "deepseek_vl_v2"  # of config.json
# Of the releases: parameters; bytes of the weights in 8 bits and in int4, what is not packed in 16; and bytes of cache
# a token in 16 bits.
RELEASES = {
    "deepseek-ai/deepseek-vl2-tiny": (3_370_501_440, 4_142_743_936, 2_918_075_520, 61_440),
    "deepseek-ai/deepseek-vl2-small": (16_148_349_504, 17_086_744_832, 9_932_194_944, 31_104),
    "deepseek-ai/deepseek-vl2": (27_480_134_248, 28_744_616_912, 16_419_847_376, 34_560),
}
# What training adapters needs: their numbers, of rank 16 with those of experts; and bytes of the weights in nf4.
ADAPTERS = {
    "deepseek-ai/deepseek-vl2-tiny": (63_091_712, 2_878_041_540),
    "deepseek-ai/deepseek-vl2-small": (235_311_104, 9_697_992_192),
    "deepseek-ai/deepseek-vl2": (346_601_472, 16_016_249_216),
}
# Of all three: tokens of images of usual sizes, width x height.
IMAGE_TOKENS = {"640x480": 1023, "1024x768": 1415, "1920x1080": 1807, "1080x1920": 1835}


class Architecture(NamedTuple):
    """A release's parts; the fields are those of ``deepseek-vl2 info --json``."""

    vision: int
    projector: int
    language: int
    activated: int
    attention: str
    layers: int
    experts: int
    experts_per_token: int = 6
    max_position_embeddings: int = 4096


ARCHITECTURES = {
    "deepseek-ai/deepseek-vl2-tiny": Architecture(
        428_225_600, 7_541_760, 2_934_734_080, 994_656_368, "multi-head", 12, 64
    ),
    "deepseek-ai/deepseek-vl2-small": Architecture(
        428_225_600, 13_639_680, 15_706_484_224, 2_878_061_936, "latent", 27, 64
    ),
    "deepseek-ai/deepseek-vl2": Architecture(428_225_600, 18_360_320, 27_033_548_328, 4_555_476_376, "latent", 30, 72),
}


def stored_bytes(name: str) -> int:
    """Return the bytes of a release's weights as they are stored, in bfloat16."""
    return 2 * RELEASES[name][0]


def release_sizes(name: str) -> Any:
    """Return the `deepseek_vl2.utils.memory.Sizes` of a release."""
    from deepseek_vl2.utils.memory import BYTES, Sizes

    parameters, eight_bits, int4, cache = RELEASES[name]
    weights = {kind: parameters * size for kind, size in BYTES.items()}
    return Sizes({**weights, "int8": eight_bits, "int4": int4, "fp8": eight_bits}, cache)


def release_training(name: str) -> dict[str, int]:
    """Return the bytes of each way to fine-tune a release."""
    from deepseek_vl2.training.memory import AdapterMemory

    numbers, nf4 = ADAPTERS[name]
    return AdapterMemory({**release_sizes(name).weights, "nf4": nf4}, numbers).methods(RELEASES[name][0])


def release_facts(name: str, context: int) -> dict[str, Any]:
    """Return a release's facts as ``info`` gathers them, from this table alone.

    Args:
        name: its id on the hub.
        context: tokens of prompt and answer, for the memory needed.
    """
    found, sizes = ARCHITECTURES[name], release_sizes(name)
    return {
        "name": name,
        "parameters": {
            "vision": found.vision,
            "projector": found.projector,
            "language": found.language,
            "total": RELEASES[name][0],
            "activated": found.activated,
        },
        "attention": found.attention,
        "layers": found.layers,
        "experts": found.experts,
        "experts_per_token": found.experts_per_token,
        "max_position_embeddings": found.max_position_embeddings,
        "image_tokens": dict(IMAGE_TOKENS),
        "cache_bytes_per_token": sizes.cache,
        "weights_bytes": sizes.weights,
        "needed_bytes": {kind: sizes.needed(kind, context) for kind in sizes.weights},
        "training_bytes": release_training(name),
    }

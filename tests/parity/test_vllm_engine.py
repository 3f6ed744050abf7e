"""vLLM with the plugin against `generate`, where vLLM is installed; its CPU build is enough.

Without a GPU: ``VLLM_MLA_DISABLE=1 VLLM_CPU_KVCACHE_SPACE=1 pytest tests/parity/test_vllm_engine.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support import noise_image
from vllm_support import vllm_checkpoint

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor

vllm = pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

NEW = 6
IMAGES = [noise_image(1, 300, 200), noise_image(2, 200, 300), noise_image(3, 384, 384)]
QUESTIONS: list[tuple[str, list[Image.Image]]] = [
    ("<image>\nWhat is this?", IMAGES[:1]),
    ("<image>\n<image>\n<image>\nWhich one?", IMAGES),
    ("Write  two  words.", []),
    ("<image>\nWhat is this?", IMAGES[:1]),
]


class Engines:
    """vLLM and our model over the same directory, both in float32."""

    def __init__(self, folder: Path) -> None:
        self.llm: Any = vllm.LLM(
            model=str(folder),
            dtype="float32",
            max_model_len=2048,
            max_num_seqs=4,
            enforce_eager=True,
            skip_mm_profiling=True,
            limit_mm_per_prompt={"image": 3},
            enable_prefix_caching=True,
            enable_chunked_prefill=True,
            max_num_batched_tokens=256,  # an image of one tile takes 421 tokens: it is read in two pieces
        )
        self.processor = DeepseekVLV2Processor.from_pretrained(folder)
        self.model = DeepseekVLV2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def ours(self, **prompt: Any) -> tuple[list[int], list[int]]:
        """Return the ids of a prompt and its greedy tokens."""
        batch = self.processor(**prompt)
        output = self.model.generate(**batch, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        ids = batch["input_ids"][0].tolist()
        return ids, output[0, len(ids) :].tolist()


@pytest.fixture(scope="module", params=["tiny", "small", "base"])
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """Start both engines over a made checkpoint."""
    from deepseek_vl2.integrations.vllm import register

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # a function goes to the model, see `apply_model`
        register()
        folder = tmp_path_factory.mktemp("vllm") / request.param
        made = Engines(vllm_checkpoint().write_checkpoint(request.param, folder))
        yield made
        made.llm.llm_engine.engine_core.shutdown()


def sampling() -> Any:
    return vllm.SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)


def wrapped(question: str) -> str:
    return f"<|User|>: {question}\n\n<|Assistant|>:"


def test_a_batch_gets_the_ids_and_tokens_that_each_prompt_gets_alone(engines: Engines) -> None:
    prompts: list[dict[str, Any]] = [
        {"prompt": wrapped(question), **({"multi_modal_data": {"image": images}} if images else {})}
        for question, images in QUESTIONS
    ]
    answers = engines.llm.generate(prompts, sampling(), use_tqdm=False)
    for (question, images), answer in zip(QUESTIONS, answers, strict=True):
        ids, tokens = engines.ours(prompt=wrapped(question), images=images)
        assert list(answer.prompt_token_ids) == ids
        assert list(answer.outputs[0].token_ids) == tokens


def test_conversations_are_encoded_by_the_processor(engines: Engines) -> None:
    image = {"type": "image_pil", "image_pil": IMAGES[1]}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": ":) Noise."},
        {"role": "user", "content": "Sure?"},
    ]
    answer = engines.llm.chat(messages, sampling(), use_tqdm=False)[0]
    turns = [
        messages[0],
        {"role": "user", "content": "<image>\nWhat is this?", "images": [IMAGES[1]]},
        *messages[2:],
    ]
    ids, tokens = engines.ours(conversations=turns)
    assert list(answer.prompt_token_ids) == ids
    assert list(answer.outputs[0].token_ids) == tokens


def test_embeddings_are_ours(engines: Engines) -> None:
    from deepseek_vl2.integrations.vllm.inputs import encode_images

    encoded = encode_images(engines.processor, IMAGES[:2], cropping=True)

    def embed(model: Any) -> list[torch.Tensor]:
        values = encoded.values.repeat(len(encoded.grids), 1, 1)
        with torch.inference_mode():
            return model.embed_multimodal(
                tiles=encoded.tiles_VSSC, images_spatial_crop=torch.tensor(encoded.grids), values=values
            )

    theirs = torch.cat(engines.llm.apply_model(embed)[0])
    pixels = engines.processor(prompt="<image><image>", images=IMAGES[:2])["images"][0]
    with torch.no_grad():
        ours = engines.model.arrange_views(engines.model.encode_tiles(pixels), encoded.grids)
    torch.testing.assert_close(theirs.cpu(), ours, rtol=1e-5, atol=1e-5)


def test_a_tag_without_an_image_is_refused(engines: Engines) -> None:
    prompt = {"prompt": wrapped("<image>\n<image>\nTwo?"), "multi_modal_data": {"image": IMAGES[:1]}}
    with pytest.raises(ValueError, match="2 <image> tags but 1 images"):
        engines.llm.generate([prompt], sampling(), use_tqdm=False)
    unknown = {"prompt": wrapped("<image>\nOne?"), "multi_modal_data": {"image": IMAGES[:1]}}
    with pytest.raises(ValueError, match="Unknown mm_processor_kwargs: zoom"):
        engines.llm.generate([{**unknown, "mm_processor_kwargs": {"zoom": 2}}], sampling(), use_tqdm=False)


def test_what_is_cached_of_a_prompt_belongs_to_its_images(engines: Engines) -> None:
    """An image's tokens are all of one id: what tells prompts apart is what they show, and whether it was cut."""
    asked = [
        (IMAGES[2:], "<image>\nWhere?", 0),
        (IMAGES[2:], "<image>\nWhere?", 256),
        (IMAGES[2:], "<image>\nWhy is it so?", 256),
        (IMAGES[1:2], "<image>\nWhere?", None),
        ([IMAGES[2], IMAGES[0]], "<image>\n<image>\nWhere?", 256),
        (IMAGES[::-1], "<image>\n<image>\n<image>\nWhere?", 0),
    ]
    for images, question, cached in asked:
        request = {"prompt": wrapped(question), "multi_modal_data": {"image": images}}
        (answer,) = engines.llm.generate([request], sampling(), use_tqdm=False)
        ids, tokens = engines.ours(prompt=wrapped(question), images=images)
        assert list(answer.prompt_token_ids) == ids
        assert list(answer.outputs[0].token_ids) == tokens
        if cached is not None:
            assert bool(answer.num_cached_tokens) == bool(cached) and answer.num_cached_tokens >= cached


def test_more_images_than_allowed_are_refused(engines: Engines) -> None:
    request = {"prompt": wrapped("<image>" * 4), "multi_modal_data": {"image": [*IMAGES, IMAGES[0]]}}
    with pytest.raises(Exception, match=r"At most 3 image\(s\) may be provided in one prompt"):  # vLLM's own class
        engines.llm.generate([request], sampling(), use_tqdm=False)


def test_tiling_can_be_turned_off(engines: Engines) -> None:
    wide = noise_image(4, 800, 380)
    prompt = {"prompt": wrapped("<image>\nOne?"), "multi_modal_data": {"image": wide}}
    lengths = [
        len(engines.llm.generate([{**prompt, **options}], sampling(), use_tqdm=False)[0].prompt_token_ids)
        for options in ({}, {"mm_processor_kwargs": {"cropping": False}}, {})
    ]
    tiled, whole = (
        engines.processor(prompt=wrapped("<image>\nOne?"), images=[wide], cropping=cropping)["input_ids"].shape[1]
        for cropping in (True, False)
    )
    assert lengths == [tiled, whole, tiled] and tiled > whole

"""Running a prompt through the model in small steps, between which others decode."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

import torch

from deepseek_vl2.models import DeepseekVLV2ForCausalLM
from deepseek_vl2.models.image_merge import real_grids
from deepseek_vl2.models.processing_deepseek_vl_v2 import VLChatProcessorOutput

from .slots import SlotCache

# A step yields the work it did, in tokens, and how many tokens of the prompt are cached by then. What is returned at
# the end are the logits [1, vocabulary] of the first new token.
Steps = Generator[tuple[int, int], None, torch.Tensor]


class Prompt:
    """A processed prompt; several answers to it share the embeddings.

    Args:
        inputs: what the processor returned for one conversation.
    """

    def __init__(self, inputs: VLChatProcessorOutput) -> None:
        self.ids: list[int] = inputs["input_ids"].tolist()
        self.shows_images = bool(inputs["images_seq_mask"].any())
        self.inputs: VLChatProcessorOutput | None = inputs
        self.embeds: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def is_short(self, tokens: int) -> bool:
        """Whether the prompt is text of no more than that many tokens."""
        return len(self.ids) <= tokens and not self.shows_images

    def keep(self, embeds: torch.Tensor) -> None:
        """Keep the embeddings, [1, T, H], and let go of the tiles, which are many times larger."""
        self.embeds, self.inputs = embeds, None


def embed_in_steps(model: DeepseekVLV2ForCausalLM, prompt: Prompt, tiles_a_step: int) -> Steps:
    """Embed a prompt, [1, T, H], encoding its images a few tiles at a time."""
    if prompt.embeds is not None:
        return prompt.embeds
    inputs = prompt.inputs
    assert inputs is not None
    ids_1T = inputs["input_ids"][None].to(model.device)
    embeds = model.get_input_embeddings()(ids_1T)
    grids = real_grids(inputs["images_spatial_crop"][None])[0]
    if grids:
        tiles, views = inputs.to(model.device)["images"], []
        for start in range(0, len(tiles), tiles_a_step):
            views.append(model.encode_tiles(tiles[start : start + tiles_a_step]))
            yield views[-1].shape[0] * views[-1].shape[1], 0
        sequences = model.arrange_views(torch.cat(views), grids).to(embeds)
        embeds = embeds.masked_scatter(inputs["images_seq_mask"][None].to(embeds.device).unsqueeze(-1), sequences)
    prompt.keep(embeds)
    return embeds


def prefill_in_steps(
    model: DeepseekVLV2ForCausalLM,
    cache: SlotCache,
    prompt: Prompt,
    row: Callable[[], int],
    chunk: int,
    tiles_a_step: int,
) -> Steps:
    """Fill a row of the cache with a prompt, ``chunk`` tokens at a time.

    Where the chunks end depends on the prompt alone, and so do the numbers that come out.

    Args:
        model: the model.
        cache: the cache.
        prompt: the prompt.
        row: says which row is the prompt's; it may move between two steps.
        chunk: tokens a step.
        tiles_a_step: image tiles a step.
    """
    embeds = yield from embed_in_steps(model, prompt, tiles_a_step)
    length, start = embeds.shape[1], 0
    while True:
        end = min(start + chunk, length)
        cache.show_chunk(row(), row() + 1, start, end)
        outputs = model.language(
            inputs_embeds=embeds[:, start:end],
            position_ids=torch.arange(start, end, device=embeds.device)[None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        if end == length:
            return outputs.logits[:, -1]
        yield end - start, end
        start = end


def prefill_together(
    model: DeepseekVLV2ForCausalLM, cache: SlotCache, prompts: Sequence[Prompt], first_row: int
) -> torch.Tensor:
    """Fill neighbouring rows of the cache with short prompts, in one forward pass.

    Prompts are padded behind their end, where nothing looks back at the padding, and the answer overwrites it.

    Returns:
        The logits of each answer's first token, [B, vocabulary], in float32.
    """
    longest = max(map(len, prompts))
    ids_BT = torch.tensor([[*prompt.ids, *[0] * (longest - len(prompt))] for prompt in prompts]).to(model.device)
    last_B = torch.tensor([len(prompt) - 1 for prompt in prompts]).to(model.device)
    rows_B = torch.arange(len(prompts), device=model.device)
    cache.show_chunk(first_row, first_row + len(prompts), 0, longest)
    outputs = model.get_decoder()(
        input_ids=ids_BT,
        position_ids=torch.arange(longest, device=model.device).expand(len(prompts), -1),
        past_key_values=cache,
        use_cache=True,
    )
    return model.get_output_embeddings()(outputs.last_hidden_state[rows_B, last_B]).float()

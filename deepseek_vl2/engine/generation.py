"""transformers' ``generate`` on the engine: a call's rows become requests, and its settings their parameters.

What the engine does not do (beams, assisted decoding, returned scores, processors of one's own) is left to
transformers' own loop, which gives the same answers; the log says so once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from ..models.cache import CACHE_NAME
from ..models.generation import SampleCall
from .engine import Engine
from .generate_support import PROCESSORS, say_once, unsupported_reason
from .holder import engine_of
from .request import Answer, Delta, Event, Prompt, PromptImages, Request
from .sampling_params import SamplingParams


def sampling_params(call: SampleCall, rows: int) -> list[SamplingParams]:
    """Return the parameters of each row; their seeds come from PyTorch's generator, so that it makes calls repeat."""
    values: dict[str, Any] = {"temperature": 1.0 if call.generation_config.do_sample else 0.0}
    for processor in call.logits_processor:
        name, attribute = PROCESSORS[type(processor)]
        value = getattr(processor, attribute)
        if name == "min_tokens":
            value = max(value - (call.input_ids.shape[1] if attribute == "min_length" else 0), values.get(name, 0))
        if name != "temperature" or call.generation_config.do_sample:
            values[name] = value
    eos = {int(i) for c in call.stopping_criteria if type(c) is EosTokenCriteria for i in c.eos_token_id}
    most = int(call.stopping_criteria.max_length) - call.input_ids.shape[1]
    seeds = torch.randint(2**62, (rows,)).tolist() if call.generation_config.do_sample else [0] * rows
    return [
        SamplingParams(max_tokens=most, seed=seed, ignore_eos=True, stop_token_ids=frozenset(eos), **values)
        for seed in seeds
    ]


class CallPrompts:
    """The prompts of a call's rows, without their padding."""

    def __init__(self, call: SampleCall) -> None:
        kwargs = call.model_kwargs
        self.model, self.ids = call.model, call.input_ids
        self.embeds: torch.Tensor | None = kwargs.get("inputs_embeds")
        self.cache: Any = kwargs[CACHE_NAME]
        self.begun: Callable[[], torch.Tensor] | None = getattr(self.cache, "begun", None)
        prompt = self.ids if self.embeds is None else self.embeds
        self.rows = prompt.shape[0]
        mask: torch.Tensor | None = kwargs.get("attention_mask")
        if mask is not None and mask.shape[:2] != prompt.shape[:2]:
            raise ValueError(f"attention_mask {list(mask.shape)} does not fit a prompt of {list(prompt.shape[:2])}.")
        self.mask = None if mask is None or bool(mask.all()) else mask.bool().cpu()
        self.images: torch.Tensor | None = kwargs.get("images") if self.embeds is None else None
        self.seq_mask: torch.Tensor | None = kwargs.get("images_seq_mask")
        self.grids: list[list[Any]] = []
        if self.embeds is None and hasattr(self.model, "image_grids"):
            self.grids = self.model.image_grids(
                self.ids,
                self.images,
                self.seq_mask,
                kwargs.get("images_spatial_crop"),
                ids_checked=bool(kwargs.get("image_tokens_checked")),
            )

    def all(self) -> list[Prompt]:
        """Return the prompts."""
        ids = self.ids.tolist() if self.ids.shape[1] else [[] for _ in range(self.rows)]
        held = self._stored()
        seq_mask = self.seq_mask.bool().cpu() if self.seq_mask is not None and any(self.grids) else None
        counts = [sum(grid.views for grid in row) for row in self.grids]
        prompts = []
        for row in range(self.rows):
            real = None if self.mask is None else self.mask[row]
            row_ids = ids[row] if real is None or not ids[row] else self.ids[row].cpu()[real].tolist()
            embeds = None if self.embeds is None else self.embeds[row]
            if embeds is not None and real is not None:
                embeds = embeds[real.to(embeds.device)]
            images = None
            if seq_mask is not None and self.grids[row] and self.images is not None:
                marked = seq_mask[row] if real is None else seq_mask[row][real]
                first = sum(counts[:row])
                images = PromptImages(
                    self.model, self.grids[row], marked, self._tiles(row), encoded=self._views(first, counts[row])
                )
            prompts.append(Prompt(row_ids, images, embeds, stored=None if held is None else held[row]))
        return prompts

    def _tiles(self, row: int) -> Callable[[torch.device], torch.Tensor]:
        assert self.images is not None
        tiles = self.images[row]
        return lambda device: tiles.to(device)

    def _views(self, first: int, count: int) -> Callable[[], torch.Tensor] | None:
        begun = self.begun
        return None if begun is None else lambda: begun()[first : first + count]

    def _stored(self) -> list[list[tuple[torch.Tensor, torch.Tensor]]] | None:
        """Return the keys and values that the given cache holds for each row, without its padding."""
        length = int(self.cache.get_seq_length())
        if length == 0:
            return None
        rows = []
        for row in range(self.rows):
            real = slice(None) if self.mask is None else self.mask[row, :length].nonzero()[:, 0]
            index = real if isinstance(real, slice) else real.to(self.cache.layers[0].keys.device)
            rows.append([(layer.keys[row][:, index], layer.values[row][:, index]) for layer in self.cache.layers])
        return rows


class CallOutput:
    """The tokens of a call's rows as they come, in step, as transformers' loop would hand them on."""

    def __init__(self, call: SampleCall, rows: int, requests: Callable[[], Sequence[Request]], engine: Engine) -> None:
        self.call = call
        self.engine = engine
        self.requests = requests
        pad = call.generation_config._pad_token_tensor
        self.pad = 0 if pad is None else int(pad)
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.ended = [False] * rows
        self.steps = 0  # handed on
        self.error: Exception | None = None
        self.queue: deque[tuple[int, Event]] = deque()
        known = (MaxLengthCriteria, EosTokenCriteria)
        self.criteria = [c for c in call.stopping_criteria if type(c) not in known]

    def sink(self, row: int) -> Callable[[Event], None]:
        """Return what the engine calls for a row."""
        return lambda event: self.queue.append((row, event))

    def done(self) -> bool:
        """Take what has come, hand whole steps on, and return whether nothing more will come."""
        while self.queue:
            row, event = self.queue.popleft()
            if not isinstance(event, Delta):
                self.error = event.error
            elif not self.ended[row]:
                self.tokens[row].extend(token.token_id for token in event.tokens)
                self.ended[row] = event.finish_reason is not None
        if self.error is not None:
            raise self.error
        if self.call.streamer is not None or self.criteria:
            self._hand_on()
        return all(self.ended)

    def _line(self, step: int) -> list[int]:
        return [tokens[step] if step < len(tokens) else self.pad for tokens in self.tokens]

    def _hand_on(self) -> None:
        """Show the streamer and the criteria the steps that all rows have made."""
        while True:
            made = min((len(t) for t, e in zip(self.tokens, self.ended, strict=True) if not e), default=None)
            most = max(map(len, self.tokens)) if made is None else made
            if self.steps >= most:
                return
            if self.call.streamer is not None:
                self.call.streamer.put(torch.tensor(self._line(self.steps)))
            self.steps += 1
            if self.criteria:
                self._ask_criteria()

    def _ask_criteria(self) -> None:
        ids = self.ids(self.steps)
        stop = torch.stack([c(ids, None).to("cpu").expand(len(self.tokens)) for c in self.criteria]).any(0).tolist()
        for row, ends in enumerate(stop):
            if ends and (not self.ended[row] or len(self.tokens[row]) > self.steps):
                self.tokens[row] = self.tokens[row][: self.steps]
                self.ended[row] = True
                self.engine.cancel(self.requests()[row])

    def ids(self, steps: int | None = None) -> torch.Tensor:
        """Return the prompt's ids and the tokens of that many steps, or all, [B, T + new]."""
        steps = max(map(len, self.tokens), default=0) if steps is None else steps
        new = torch.tensor([[*t[:steps], *[self.pad] * (steps - len(t))] for t in self.tokens])
        given = self.call.input_ids
        return torch.cat((given, new.to(given).view(len(self.tokens), steps)), dim=1)


def export_cache(call: SampleCall, engine: Engine, output: CallOutput) -> Callable[[Answer], None]:
    """Return what appends an answer's new keys and values to the caller's cache."""
    held: Any = call.model_kwargs[CACHE_NAME]
    past = int(held.get_seq_length())

    def export(answer: Answer) -> None:
        assert answer.extent is not None
        new = len(output.tokens[0] if answer.request.cancelled else answer.tokens)
        end = len(answer.prompt) + new - 1
        for layer in range(len(engine.kv_cache.pools)):
            keys, values = engine.kv_cache.read(answer.extent, layer, past, end)
            held.update(keys[None], values[None], layer)

    return export


def generate(call: SampleCall) -> torch.Tensor | None:
    """Generate on the engine; returns ids as transformers' ``_sample`` does, or ``None``: the call is not for it."""
    reason = unsupported_reason(call)
    if reason is not None:
        say_once(reason)
        return None
    most = int(call.stopping_criteria.max_length) - call.input_ids.shape[1]
    if most <= 0:
        return call.input_ids
    chunk = call.generation_config.prefill_chunk_size
    if chunk is not None and chunk < 1:
        raise ValueError(f"prefill_chunk_size must be at least 1, got {chunk}.")
    engine = engine_of(call.model)
    prompts = CallPrompts(call).all()
    requests: list[Request] = []
    output = CallOutput(call, len(prompts), lambda: requests, engine)
    private = getattr(call.model_kwargs[CACHE_NAME], "is_private", False)
    on_end = None if private else export_cache(call, engine, output)
    for row, (prompt, params) in enumerate(zip(prompts, sampling_params(call, len(prompts)), strict=True)):
        requests.append(Request(prompt, params, output.sink(row), prefill_chunk=chunk, on_end=on_end))
    engine.submit(requests)
    try:
        engine.run_until(output.done)
    finally:
        for request, ended in zip(requests, output.ended, strict=True):
            if not ended:
                engine.cancel(request)
    if not private:
        engine.run_until(lambda: not any(engine.holds(request) for request in requests))
    if call.streamer is not None:
        call.streamer.end()
    return output.ids()

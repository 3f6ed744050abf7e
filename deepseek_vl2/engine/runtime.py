"""Generation with the kernels: sessions of static buffers, their CUDA graphs, and the loop around them.

A session holds the KV cache and the captured graph of one decoding step for one batch size and capacity. Rows of a
batch lie in it without their padding, so each attends to its own tokens alone. The token of a step is fetched while
the device runs the next step: the host never makes it wait.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from ..models.cache import CACHE_NAME, GrowingLayer
from ..models.generation import SampleCall
from ..ops.triton.common import power_of_two
from . import cuda_graphs, prefill
from .decode import MAX_ROWS, DecodeBuffers, DecoderWeights, decode_step, new_buffers
from .fingerprint import ModuleFingerprint, addresses_of
from .weights import read_weights, rotary_tables, unsupported_model, unsupported_settings

logger = logging.getLogger(__name__)

MIN_CAPACITY = 1024
# Capacity for this many new tokens is taken at first; a longer answer moves to twice the capacity.
FIRST_CAPACITY = 1024
MAX_SESSIONS = 4
MAX_IDLE_BYTES = 1 << 30
RING = 8


class DecodeState:
    """Buffers for one batch size and capacity, and the captured graph of a step over them.

    With ``pdl`` kernels use programmatic dependent launch, where the device has it.
    """

    def __init__(
        self, weights: DecoderWeights, rows: int, cos: torch.Tensor, sin: torch.Tensor, pdl: bool = True
    ) -> None:
        self.weights = weights
        with torch.inference_mode(False), torch.no_grad():  # later calls outside of inference mode write them too
            self.buffers = new_buffers(weights, rows, cos, sin, pdl)
        self.prefill_graphs = cuda_graphs.GraphCache(prefill.MAX_GRAPHS)
        self.graph: torch.cuda.CUDAGraph | None = None
        if weights.head.device.type == "cuda":
            self._capture(weights.head.device)

    def _capture(self, device: torch.device) -> None:
        """Compile the kernels by running a step, then capture one."""
        with torch.cuda.device(device), torch.no_grad():
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                decode_step(self.weights, self.buffers)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on using the device meanwhile.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                decode_step(self.weights, self.buffers)
            self.graph = graph

    @property
    def cache_bytes(self) -> int:
        """Memory of the cache."""
        return sum(part.numel() * part.element_size() for layer in self.buffers.caches for part in layer)

    def step(self) -> None:
        """Read one token of each row."""
        if self.graph is None:
            decode_step(self.weights, self.buffers)
        else:
            self.graph.replay()


def tokens_first(mask_BT: torch.Tensor) -> torch.Tensor:
    """Return, for each row, the indexes of its real tokens in order and then those of its padding, [B, T]."""
    return (~mask_BT.bool()).to(torch.uint8).argsort(dim=1, stable=True)


def fill_caches(
    weights: DecoderWeights,
    buffers: DecodeBuffers,
    cache: DynamicCache,
    mask_BT: torch.Tensor | None,
    release: bool = False,
) -> None:
    """Copy a prompt's cache in, each row's real tokens from 0 on, and set the positions behind them.

    Args:
        weights: of the model.
        buffers: of the session.
        cache: of the prompt: rotated keys and latents, or keys and values.
        mask_BT: true where a token is not padding; ``None``: there is no padding, and nothing has to be reordered.
        release: free the prompt's cache, layer by layer.
    """
    length = int(cache.get_seq_length()) if mask_BT is None else mask_BT.shape[1]
    order = None if mask_BT is None else tokens_first(mask_BT)[:, None, :, None]
    for index, (layer, static) in enumerate(zip(weights.layers, buffers.caches, strict=True)):
        keys, values = cache.layers[index].keys, cache.layers[index].values
        if order is not None:
            keys, values = (part.take_along_dim(order, dim=2) for part in (keys, values))
        if layer.attention.kv_b is not None:
            rank = values.shape[-1]
            pool = buffers.by_row(static[0])
            pool[:, :length, :rank] = values[:, 0]
            pool[:, :length, rank:] = keys[:, 0]
        else:
            for pool, part in zip(static, (keys, values), strict=True):
                buffers.by_row(pool)[:, :length] = part.transpose(1, 2)
        if release:
            cache.layers[index] = GrowingLayer()
    if mask_BT is None:
        buffers.positions.fill_(length)
    else:
        buffers.positions.copy_(mask_BT.sum(dim=1))


def append_new_tokens(
    weights: DecoderWeights, buffers: DecodeBuffers, cache: DynamicCache, start_B: torch.Tensor, new: int
) -> None:
    """Append ``new`` tokens of each row, from ``start_B`` on, to the caller's cache."""
    if new <= 0:
        return
    index = (start_B.long()[:, None] + torch.arange(new, device=start_B.device))[:, None, :, None]
    for number, (layer, static) in enumerate(zip(weights.layers, buffers.caches, strict=True)):
        if layer.attention.kv_b is not None:
            rank = layer.attention.kv_b.shape[2]
            held = buffers.by_row(static[0])[:, None].take_along_dim(index, dim=2)
            cache.update(held[..., rank:], held[..., :rank], number)
        else:
            parts = (buffers.by_row(pool).transpose(1, 2).take_along_dim(index, dim=2) for pool in static)
            cache.update(*parts, number)


class Engine:
    """The sessions of one model."""

    def __init__(self, language: Any) -> None:
        self.weights = read_weights(language)
        self.addresses = addresses_of(language.parameters())
        self.fingerprint = ModuleFingerprint(language)
        self.capture = cuda_graphs.capture_for(self.weights.head.device)
        self.unsupported_prompts: str | None = None
        self.experts_checked = False
        self.embeds_early = False
        self.sessions: OrderedDict[tuple[int, int], DecodeState] = OrderedDict()
        self.lock = threading.Lock()

    def session(self, language: Any, rows: int, tokens: int) -> DecodeState:
        """Return a session with capacity for that many tokens a row; it is made where there is none."""
        key = (rows, power_of_two(tokens, MIN_CAPACITY))
        if key not in self.sessions:
            self._evict()
            self.sessions[key] = DecodeState(self.weights, rows, *rotary_tables(language, key[1]))
        self.sessions.move_to_end(key)
        return self.sessions[key]

    def _evict(self) -> None:
        """Evict least recently used sessions until idle KV memory is below the limit."""
        while self.sessions and (
            len(self.sessions) >= MAX_SESSIONS or sum(s.cache_bytes for s in self.sessions.values()) > MAX_IDLE_BYTES
        ):
            self.sessions.popitem(last=False)

    def grow(self, language: Any, session: DecodeState) -> DecodeState:
        """Return a session with twice the capacity that goes on where the given one stands."""
        old = session.buffers
        new = self.session(language, old.rows, 2 * old.capacity)
        for old_layer, new_layer in zip(old.caches, new.buffers.caches, strict=True):
            for source, target in zip(old_layer, new_layer, strict=True):
                new.buffers.by_row(target)[:, : old.capacity] = old.by_row(source)
        new.buffers.tokens.copy_(old.tokens)
        new.buffers.positions.copy_(old.positions)
        return new


ENGINES: WeakKeyDictionary[Any, Engine] = WeakKeyDictionary()
BROKEN: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def is_unchanged(language: Any) -> bool:
    """Whether a model has an engine, and is in all its parts what it was when they were last looked through."""
    engine = ENGINES.get(language)
    return engine is not None and engine.fingerprint.matches()


def engine_of(language: Any, unchanged: bool = False) -> Engine:
    """Return the model's engine; a new one when its weights have moved. ``unchanged``: see `is_unchanged`."""
    engine = ENGINES.get(language)
    if engine is not None and unchanged:
        return engine
    if engine is not None and engine.addresses == addresses_of(language.parameters()):
        engine.fingerprint = ModuleFingerprint(language)
        return engine
    ENGINES.pop(language, None)
    ENGINES[language] = Engine(language)
    return ENGINES[language]


def release(language: Any) -> None:
    """Free the caches and graphs kept for a model."""
    ENGINES.pop(language, None)
    BROKEN.pop(language, None)


# ---------------------------------------------------------------- what the kernels take on


def unsupported_device(weight: torch.Tensor) -> str | None:
    """Return why the kernels do not run where this weight lies."""
    if weight.device.type != "cuda" or torch.version.hip is not None:
        return f"the model is on {weight.device}, not on an NVIDIA GPU"
    if weight.dtype not in (torch.bfloat16, torch.float16):
        return f"the model is in {weight.dtype}"
    if torch.cuda.get_device_capability(weight.device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None


def unsupported_call(call: SampleCall) -> str | None:
    """Return why a call of ``generate`` is not for the kernels: it asks for more than tokens, or is not usual."""
    config, kwargs = call.generation_config, call.model_kwargs
    wanted = ("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate")
    for name in wanted:
        if getattr(config, name, None):
            return f"{name} was asked for"
    if call.synced_gpus or getattr(config, "is_assistant", False):
        return "the call is part of distributed or assisted generation"
    if not kwargs.get("use_cache", True) or torch.is_grad_enabled():
        return "there is no cache, or gradients are on"
    if call.input_ids.shape[0] > MAX_ROWS:
        return f"more than {MAX_ROWS} rows"
    if getattr(call.stopping_criteria, "max_length", None) is None:
        return "there is no maximum length"
    cache: Any = kwargs.get(CACHE_NAME)
    if type(cache) is not DynamicCache or any(type(x) not in (DynamicLayer, GrowingLayer) for x in cache.layers):
        return f"the cache is a {type(cache).__name__} of a kind of its own"
    return unsupported_positions(kwargs)


def unsupported_positions(kwargs: dict[str, Any]) -> str | None:
    """Return why positions are not those of the tokens counted without padding."""
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None and mask.dim() != 2:
        return "the attention mask is not [rows, tokens]"
    if positions is None:
        return None
    if positions.dim() != 2:
        return "the positions are not [rows, tokens]"
    length = positions.shape[1]
    if mask is None:
        counted = torch.arange(length, device=positions.device)
        whole = kwargs[CACHE_NAME].get_seq_length() == 0 and bool((positions == counted).all())
        return None if whole else "positions were given"
    usual = (mask.long().cumsum(-1) - 1)[:, -length:]
    real = mask.bool()[:, -length:]
    same = usual.shape == real.shape == positions.shape and bool(((positions == usual) | ~real).all())
    return None if same else "positions were given"


def unsupported_reason(language: Any, unchanged: bool = False) -> str | None:
    """Return why a model is not run by the kernels, in a few words; ``None`` when it is.

    Its modules are not looked through again where they are ``unchanged``; see `is_unchanged`.
    """
    weight = getattr(getattr(language, "lm_head", None), "weight", None)
    if not isinstance(weight, torch.Tensor):
        return "the output head is not a plain linear layer"
    reason = unsupported_device(weight) or BROKEN.get(language) or unsupported_settings(language)
    return reason if reason is not None or unchanged else unsupported_model(language)


# ---------------------------------------------------------------- generation


class TokenFetcher:
    """Fetches tokens to the host one step late: the lines of the answer, and which rows have ended."""

    def __init__(self, call: SampleCall, device: torch.device, rows: int) -> None:
        self.streamer = call.streamer
        self.eos = {int(i) for c in call.stopping_criteria if type(c) is EosTokenCriteria for i in c.eos_token_id}
        pad = call.generation_config._pad_token_tensor
        self.pad = 0 if pad is None else int(pad)
        self.lines: list[list[int]] = []
        self.ended = [False] * rows
        self.device, on_gpu = device, device.type == "cuda"
        self.ring = torch.empty(RING, rows, dtype=torch.long, pin_memory=on_gpu)
        self.events = [torch.cuda.Event() for _ in range(RING)] if on_gpu else []
        self.sent = 0

    def send(self, tokens_B: torch.Tensor) -> None:
        """Start to fetch the tokens of a step."""
        slot = self.sent % RING
        self.ring[slot].copy_(tokens_B, non_blocking=True)
        if self.events:
            self.events[slot].record(torch.cuda.current_stream(self.device))
        self.sent += 1

    def receive(self) -> bool:
        """Wait for the tokens of the next step, hand them on, and return whether all rows have ended."""
        slot = len(self.lines) % RING
        if self.events:
            self.events[slot].synchronize()
        line = self.ring[slot].tolist()
        line = [self.pad if ended else token for token, ended in zip(line, self.ended, strict=True)]
        self.lines.append(line)
        if self.streamer is not None:
            self.streamer.put(torch.tensor(line))
        self.ended = [ended or token in self.eos for token, ended in zip(line, self.ended, strict=True)]
        return all(self.ended)

    def end(self, rows_B: torch.Tensor) -> bool:
        """Note rows that other criteria end, and return whether all have ended."""
        self.ended = [ended or stop for ended, stop in zip(self.ended, rows_B.tolist(), strict=True)]
        return all(self.ended)


def pick(scores_BV: torch.Tensor, do_sample: bool) -> torch.Tensor:
    """Return the likeliest ids, [B], or ids drawn as ``torch.multinomial`` draws them, without its wait."""
    if not do_sample:
        return scores_BV.argmax(dim=-1)
    chances = scores_BV.softmax(dim=-1)
    return (chances / torch.empty_like(chances).exponential_(1)).argmax(dim=-1)


def begin_embeddings(call: SampleCall, language: Any) -> torch.Tensor | None:
    """Let the device begin with a prompt's images while the host still checks whether all is as in the call before.

    Returns:
        The prompt's embeddings, or ``None`` where the model's last call had no captured prefill, or this one cannot.
    """
    engine = ENGINES.get(language)
    if engine is None or not engine.embeds_early or call.model_kwargs.get("images") is None:
        return None
    if prefill.unsupported_prompt(call, language) is not None:
        return None
    return prefill.embeddings(call, language)


def captured_prefill(
    call: SampleCall, language: Any, engine: Engine, session: DecodeState, embeds: torch.Tensor | None = None
) -> int | None:
    """Fill the session by a captured prefill; returns the prompt's length, or ``None`` where it cannot use one.

    The logits of its last token are then the session's. ``embeds`` are those of `begin_embeddings`.
    """
    reason = engine.unsupported_prompts or (None if embeds is not None else prefill.unsupported_prompt(call, language))
    engine.embeds_early = False
    if reason is None and not engine.experts_checked:
        engine.experts_checked = True
        reason = engine.unsupported_prompts = prefill.unsupported_experts(language)
    if reason is not None:
        logger.debug("Prefill without a captured graph: %s.", reason)
        return None
    embeds, buffers = prefill.embeddings(call, language) if embeds is None else embeds, session.buffers
    length = embeds.shape[1]
    tokens = prefill.padded_length(length, buffers.capacity)
    prompt = session.prefill_graphs.get(
        (tokens, cuda_graphs.modes()), lambda: prefill.new_graph(language, buffers, tokens)
    )
    given: prefill.PrefillInputs = prompt.buffers
    given.embeds[:, :length] = embeds
    given.embeds[:, length:] = 0
    given.last.fill_(length - 1)
    engine.unsupported_prompts = prompt(engine.capture)
    engine.embeds_early = engine.unsupported_prompts is None
    buffers.positions.fill_(length)
    return length


def generate(
    call: SampleCall, language: Any, engine: Engine, session: DecodeState, embeds: torch.Tensor | None = None
) -> torch.Tensor:
    """Run the prompt, then decode by the session; returns ids as transformers' ``_sample`` does."""
    length = captured_prefill(call, language, engine, session, embeds)
    start, private = session.buffers.positions, True
    if length is None:
        length, private = eager_prefill(call, engine, session)
        start = session.buffers.positions.clone()
    session, lines = decode(call, language, engine, session, session.buffers.logits, length)
    if not private:
        append_new_tokens(engine.weights, session.buffers, call.model_kwargs[CACHE_NAME], start, len(lines) - 1)
    if call.streamer is not None:
        call.streamer.end()
    new = torch.tensor(lines, dtype=call.input_ids.dtype).T.to(call.input_ids.device)
    return torch.cat((call.input_ids, new), dim=1)


def eager_prefill(call: SampleCall, engine: Engine, session: DecodeState) -> tuple[int, bool]:
    """Fill the session with a prompt by the model's own forward pass, and its logits with those of the last token.

    Returns:
        The tokens that the cache now holds, and whether nobody but this call looks at it.
    """
    device = session.buffers.tokens.device
    mask = call.model_kwargs.get("attention_mask")
    # Asked while the device has nothing else to finish.
    padding = None if mask is None or bool(mask.all()) else mask.to(device)
    outputs = call.model._prefill(call.input_ids, call.generation_config, call.model_kwargs)
    cache = outputs[CACHE_NAME]
    length = int(cache.get_seq_length())
    if mask is not None and mask.shape[1] != length:
        raise ValueError(f"The attention mask covers {mask.shape[1]} tokens, but the prompt has {length}.")
    session.buffers.logits.copy_(outputs.logits[:, -1])
    del outputs
    private = getattr(cache, "is_private", False)
    fill_caches(engine.weights, session.buffers, cache, padding, release=private)
    return length, private


def decode(
    call: SampleCall, language: Any, engine: Engine, session: DecodeState, logits_BV: torch.Tensor, length: int
) -> tuple[DecodeState, list[list[int]]]:
    """Pick, fetch and read tokens until all rows have ended; returns the session it ended in and the tokens.

    Args:
        call: what ``generate`` was asked for.
        language: the language model.
        engine: its engine.
        session: filled with the prompt.
        logits_BV: of the prompt's last token.
        length: tokens in the cache's longest row.
    """
    ids, device = call.input_ids, logits_BV.device
    limit = int(call.stopping_criteria.max_length) - ids.shape[1]
    others = [c for c in call.stopping_criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]
    do_sample = bool(call.generation_config.do_sample)
    processors = call.logits_processor
    if processors or others:
        ids = torch.cat((ids.to(device), ids.new_zeros(ids.shape[0], max(limit, 0), device=device)), dim=1)
    answers = TokenFetcher(call, device, ids.shape[0])
    for step in range(limit):
        end = call.input_ids.shape[1] + step
        tokens = session.buffers.tokens
        if processors or do_sample or step == 0:
            scores = processors(ids[:, :end], logits_BV) if processors else logits_BV
            tokens.copy_(pick(scores, do_sample))
        answers.send(tokens)
        if processors or others:
            ids[:, end] = tokens
        if others:
            stop = answers.receive()
            ids[:, end] = torch.tensor(answers.lines[-1], device=device)
            rows = [criteria(ids[:, : end + 1], logits_BV) for criteria in others]
            if answers.end(torch.stack([r.to(device).expand(ids.shape[0]) for r in rows]).any(0)) or stop:
                break
        if step + 1 < limit:
            if length + step >= session.buffers.capacity:
                session = engine.grow(language, session)
            session.step()
            logits_BV = session.buffers.logits
        if not others and answers.receive():
            break
    return session, answers.lines


def sample(call: SampleCall) -> torch.Tensor | None:
    """Generate by the kernels, or return ``None``: the call, the model, the device or another thread forbids it."""
    language = getattr(call.model, "language", call.model)
    reason = unsupported_call(call)
    embeds = begin_embeddings(call, language) if reason is None else None
    unchanged = reason is None and is_unchanged(language)
    reason = reason or unsupported_reason(language, unchanged)
    if reason is not None:
        if (engine := ENGINES.get(language)) is not None:
            engine.embeds_early = False
        logger.debug("Decoding without the kernels: %s.", reason)
        return None
    engine = engine_of(language, unchanged)
    if not engine.lock.acquire(blocking=False):
        return None  # another thread decodes with this model's sessions
    try:
        session = open_session(call, language, engine)
        return None if session is None else generate(call, language, engine, session, embeds)
    finally:
        engine.lock.release()


def open_session(call: SampleCall, language: Any, engine: Engine) -> DecodeState | None:
    """Return a session for a call; ``None``, once for all, where kernels cannot be compiled or captured."""
    kwargs = call.model_kwargs
    embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
    lengths = [call.input_ids.shape[1]] + [part.shape[1] for part in (embeds, mask) if part is not None]
    limit = max(int(call.stopping_criteria.max_length) - call.input_ids.shape[1], 0)
    try:
        return engine.session(language, call.input_ids.shape[0], max(lengths) + min(limit, FIRST_CAPACITY))
    except torch.cuda.OutOfMemoryError:
        logger.warning("Decoding without the kernels: no memory for a static cache.")
        return None
    # Whatever a compiler, its tools or a driver may raise: the plain path still works, and the reason is shown.
    except Exception as error:
        BROKEN[language] = f"the kernels failed to start: {type(error).__name__}: {error}"
        logger.warning("Decoding without the kernels from now on: %s", BROKEN[language])
        return None

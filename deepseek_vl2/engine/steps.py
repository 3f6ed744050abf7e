"""What an engine does in a step: it reads some of the waiting prompts, and writes one more token of every answer."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any
from weakref import ref

import torch

from ..models.cache import Segment
from .detokenizer import TokenLogprobs
from .embedding import Embedder
from .fetch import Fetch, Pending
from .image_cache import ImageCache
from .kv_cache import SCRATCH, KVCache, layer_shapes
from .launching import Launching
from .placement import Placement, place
from .request import Answer
from .rows import Rows, upload
from .runner import Part, Runner
from .sampler import Sampled, SamplingBatch, read_logprobs
from .scheduler import EngineOptions, Scheduler
from .status import EngineStats

logger = logging.getLogger(__name__)


def end_ids(language: Any) -> frozenset[int]:
    """Return the ids of the tokens that end an answer."""
    eos = language.config.get_text_config().eos_token_id
    ids = eos if isinstance(eos, (list, tuple)) else [eos]
    return frozenset(int(i) for i in ids if i is not None)


class EngineSteps:
    """The half of an engine that works: on a model, a KV cache and a queue of requests, by one thread at a time.

    Args:
        language: the language model, in evaluation mode; not kept alive.
        options: the bounds.
    """

    def __init__(self, language: Any, options: EngineOptions | None = None) -> None:
        self.language = ref(language)
        self.options = options or EngineOptions()
        self.stats = EngineStats()
        self.eos_ids = end_ids(language)
        self.vocabulary = int(language.config.vocab_size)
        self.kv_cache = KVCache(layer_shapes(language), SCRATCH + (self.options.kv_cache_tokens or 0))
        self.placement: Placement = place(language, self.kv_cache, self.options.max_batch)
        self.runner: Runner = self.placement.runner
        self.scheduler = Scheduler(self.kv_cache, self.options, self.runner.max_batch)
        self.images = ImageCache(self.options.image_cache_bytes)
        self.embedder = Embedder(
            language.get_input_embeddings(), self.images if self.images.max_bytes else None, self.options.tiles_a_pass
        )
        self.device = self.placement.device
        self.rows = Rows(self.scheduler.max_batch, self.device, self.placement.devices)
        # A GPU works on a step while the host looks at the one before; a CPU would only do a step too many.
        self._late = self.device.type == "cuda"
        self.launching = Launching()
        self._batch: SamplingBatch | None = None
        self._pending: list[Pending] = []
        self._sent = 0
        self._new: list[Answer] = []  # submitted since the last step

    @property
    def waiting(self) -> int:
        """Requests that have no room yet."""
        return len(self.scheduler.waiting) + len(self._new)

    @torch.inference_mode()
    def step(self) -> None:
        """Read some of the waiting prompts, and write one more token of every answer.

        On a GPU all of that is launched before the host waits for what the step before chose.
        """
        with self.launching if self._late else nullcontext():
            self._drop_cancelled()
            self.scheduler.admit()
            self._note_growth()
            before = self._sent
            self._prefill()
            if not self._late:
                self._receive()
            self._decode()
            self._receive(keep=self._sent - before if self._late else 0)
            self._drop_ended()  # who drives may do no further step

    def _tell_waiting(self) -> None:
        """Tell the threads that wait for answers that some have ended."""
        raise NotImplementedError

    @torch.inference_mode()
    def _drop_cancelled(self) -> None:
        everyone = (*self.scheduler.waiting, *self.scheduler.prefilling, *self.scheduler.running)
        for answer in [answer for answer in everyone if answer.request.cancelled]:
            self.stats.cancelled += not answer.finished
            answer.finished = True
            self._end(answer)

    def _end(self, answer: Answer) -> None:
        """Let go of an answer that has ended."""
        if answer.request.on_end is not None and not answer.failed:
            answer.request.on_end(answer)
        self.scheduler.drop(answer)

    def _fail(self, answer: Answer, error: Exception) -> None:
        if not answer.finished:
            self.stats.failed += 1
            answer.fail(error)
        self._end(answer)

    def _note_growth(self) -> None:
        if self.scheduler.grew:
            self.scheduler.grew = False
            self.runner.pool_changed()

    # ---------------------------------------------------------------- prompts

    def _prefill(self) -> None:
        """Read a pass of prompts; the answers whose prompts are read get their first tokens."""
        planned = self.scheduler.next_pass()
        if not planned:
            return
        try:
            self._prefill_pass(planned)
        except Exception as error:  # of one of these prompts; each is tried alone, and the others go on
            if len(planned) == 1:
                logger.exception("A prompt failed.")
                self._fail(planned[0][0], error)
                return
            for one in planned:
                try:
                    self._prefill_pass([one])
                except Exception as alone:
                    logger.exception("A prompt failed.")
                    self._fail(one[0], alone)

    def _prefill_pass(self, planned: list[tuple[Answer, int]]) -> None:
        self._restore_stored([answer for answer, _ in planned])
        self.embedder.prepare([answer for answer, _ in planned if answer.embeds_TH is None])
        planned = [(answer, min(tokens, answer.length - answer.cached)) for answer, tokens in planned]
        alone = self.scheduler.busy == len(planned) and not self.waiting
        logits_NV = self.runner.prefill([self._part(answer, tokens) for answer, tokens in planned], alone)
        self.stats.prompt_tokens += sum(tokens for _, tokens in planned)
        whole = [index for index, (answer, tokens) in enumerate(planned) if self.scheduler.read(answer, tokens)]
        if not whole:
            return
        answers = [planned[index][0] for index in whole]
        if len(whole) < len(planned):
            logits_NV = logits_NV[upload([whole], logits_NV.device)[0]]
        batch = SamplingBatch([answer.sampler for answer in answers], self.vocabulary, logits_NV.device)
        positions = upload([[answer.cached for answer in answers]], logits_NV.device)[0]
        self._receive_for(batch, answers)
        sampled = batch.sample(logits_NV, positions)
        self.rows.join(answers, sampled.tokens_B)
        self._batch = None
        self._send(answers, sampled, batch)

    def _part(self, answer: Answer, tokens: int) -> Part:
        assert answer.extent is not None
        segment = Segment(answer.extent.start, answer.cached, tokens)
        if answer.embeds_TH is not None:
            return Part(segment, embeds_TH=answer.embeds_TH[segment.past : segment.end])
        return Part(segment, ids=[*answer.prompt.ids, *answer.tokens][segment.past : segment.end])

    def _restore_stored(self, answers: Iterable[Answer]) -> None:
        """Write the keys and values that callers brought."""
        for answer in answers:
            stored = answer.prompt.stored
            if stored is not None and answer.cached == 0 and answer.extent is not None:
                for layer, (keys, values) in enumerate(stored):
                    self.kv_cache.write(answer.extent, layer, keys, values)
                answer.cached = min(stored[0][0].shape[1], answer.length - 1)

    # ---------------------------------------------------------------- answers

    def _decode(self) -> None:
        """Write one more token of every answer."""
        self._drop_ended()
        self.scheduler.make_room()
        self._note_growth()
        running = [answer for answer in self.scheduler.running if not answer.request.cancelled]
        answers = [answer for answer in running if answer.sampler.chosen < answer.params.max_tokens]
        if not answers:
            return
        self.stats.steps += 1
        try:
            self._decode_rows(answers)
        except Exception as error:
            if len(answers) == 1:
                logger.exception("An answer failed.")
                self._fail(answers[0], error)
                return
            logger.exception("A step of %d answers failed; each of them is tried alone.", len(answers))
            self._receive()
            for answer in answers:
                self._decode_alone(answer)
            self._rejoin([answer for answer in answers if not answer.finished])

    def _rejoin(self, answers: list[Answer]) -> None:
        """Lay rows out anew from what the host knows, after a step that stopped half-way."""
        for answer in answers:
            answer.cached, answer.sampler.chosen = answer.length - 1, len(answer.tokens)
        self.rows.join(answers, upload([[answer.tokens[-1] for answer in answers]], self.device)[0])
        self._batch = None

    def _decode_alone(self, answer: Answer) -> None:
        try:
            if not answer.finished and not answer.request.cancelled:
                self._rejoin([answer])
                self._decode_rows([answer])
                self._receive()
        except Exception as error:  # of this answer; the others go on
            logger.exception("An answer failed.")
            self._fail(answer, error)

    def _decode_rows(self, answers: list[Answer]) -> None:
        count = len(answers)
        if self.rows.arrange(answers) or self._batch is None:
            self._batch = SamplingBatch([a.sampler for a in answers], self.vocabulary, self.device)
        logits_BV, likeliest = self.runner.decode(self.rows, count)
        for answer in answers:
            answer.cached += 1
        self._receive_for(self._batch, answers)
        sampled = self._batch.sample(logits_BV, self.rows.positions[:count], likeliest)
        if likeliest is None or sampled.tokens_B is not likeliest:
            self.rows.tokens[:count] = sampled.tokens_B
        self._send(answers, sampled, self._batch)

    def _drop_ended(self) -> None:
        for answer in [answer for answer in self.scheduler.running if answer.finished]:
            self._end(answer)

    # ---------------------------------------------------------------- tokens to the host

    def _send(self, answers: list[Answer], sampled: Sampled, batch: SamplingBatch) -> None:
        """Start to fetch the tokens of a step."""
        self._sent += 1
        logprobs = None if sampled.logprobs is None else Fetch(sampled.logprobs)
        self._pending.append(Pending(answers, sampled, batch.logged, Fetch(sampled.tokens_B), logprobs))

    def _receive_for(self, batch: SamplingBatch, answers: list[Answer]) -> None:
        """Receive what grammars must know before they say what may come next."""
        if batch.constrained:
            self._receive()

    def _receive(self, keep: int = 0) -> None:
        """Wait for tokens, and hand them on: all but those that were sent last, ``keep`` times."""
        while len(self._pending) > keep:
            self._accept(self._pending.pop(0))

    def _accept(self, pending: Pending) -> None:
        with self.launching.paused():
            tokens = pending.tokens.wait()
            logged = [] if pending.logprobs is None else pending.logprobs.wait()
        lines: dict[int, Any] = dict(zip(pending.logged, logged, strict=True)) if logged else {}
        ended = False
        for index, answer in enumerate(pending.answers):
            if answer.finished or answer.request.cancelled:
                continue
            if index in pending.sampled.failures:
                error = pending.sampled.failures[index]
                logger.warning("An answer failed: %s", error)
                self._fail(answer, error)
                continue
            self.stats.generated_tokens += 1
            try:
                logprobs = None
                if index in lines:
                    logprobs = TokenLogprobs(*read_logprobs(lines[index], answer.params.logprobs or 0))
                answer.accept(int(tokens[index]), logprobs)
            except Exception as error:  # of this answer; the others go on
                logger.warning("An answer failed: %s", error)
                self._fail(answer, error)
            if answer.finished and not answer.failed:
                self.stats.finished += 1
                ended = True
        if ended:
            self._tell_waiting()

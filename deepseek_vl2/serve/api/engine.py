"""Continuous batching: answers join and leave while others are being written.

One thread owns the model. In turns it carries waiting prompts a step further, each into a row of its own of the cache,
and runs one token of all answers under way through the model together.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import dataclass

import torch

from deepseek_vl2.models import DeepseekVLV2ForCausalLM

from .prefill import prefill_in_steps, prefill_together
from .sampling import TokenLogprobs, sample
from .sequence import Job, Sequence
from .slots import SlotCache
from .token_bytes import TokenBytes

logger = logging.getLogger(__name__)


def end_ids(model: DeepseekVLV2ForCausalLM) -> list[int]:
    """Return the ids of the tokens that end an answer."""
    eos = model.config.language_config.eos_token_id
    ids = eos if isinstance(eos, (list, tuple)) else [eos]
    return [int(i) for i in ids if i is not None]


class QueueFull(Exception):
    """More requests wait than may."""


class EngineStopped(Exception):
    """The engine takes no requests: it was stopped, or its thread has died."""


@dataclass
class EngineOptions:
    """Bounds of an engine.

    Attributes:
        slots: answers written at the same time.
        max_length: tokens of a prompt and its answer together.
        queue_size: requests that may wait for a slot.
        prefill_chunk: tokens of prompts, about, that run between two steps of the answers under way.
        tiles_a_step: image tiles that are encoded at once.
    """

    slots: int = 16
    max_length: int = 4096
    queue_size: int = 64
    prefill_chunk: int = 512
    tiles_a_step: int = 4

    def __post_init__(self) -> None:
        for name in ("slots", "max_length", "prefill_chunk", "tiles_a_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.queue_size < 0:
            raise ValueError(f"queue_size must not be negative, got {self.queue_size}.")


@dataclass
class EngineStats:
    """Counts since the engine was made."""

    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0


class Engine:
    """Writes the answers to many requests at once.

    A request gets what it would get alone: it sees its own row of the cache only, its choices depend on its own options
    and random numbers, and running together changes its logits by no more than the rounding of matrix products.

    Args:
        model: the model, in evaluation mode.
        token_bytes: the tokenizer's table.
        options: the bounds.
    """

    def __init__(self, model: DeepseekVLV2ForCausalLM, token_bytes: TokenBytes, options: EngineOptions) -> None:
        self.model = model
        self.token_bytes = token_bytes
        self.options = options
        self.stats = EngineStats()
        self.cache = SlotCache(model.language, options.slots, options.max_length)
        self.eos_ids = frozenset(end_ids(model))
        # Flash attention takes a mask of keys; the others one that is ready to use.
        self.mask_of_keys = "flash" in model.language.config._attn_implementation
        self.decoding: list[Sequence] = []  # rows 0, 1, ... of the cache, in this order
        self.prefilling: Sequence | None = None  # the row behind them
        self.joining: list[Sequence] = []  # or the rows behind them, while short prompts run
        self._waiting: deque[Job] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ---------------------------------------------------------------- asked from other threads

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop after the step at work; what is not finished fails with `EngineStopped`."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def healthy(self) -> bool:
        """Whether the engine works."""
        return self._thread.is_alive() and not self._stopping

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiting)

    @property
    def busy_slots(self) -> int:
        """Slots in use."""
        return len(self.decoding) + len(self.joining) + (self.prefilling is not None)

    @property
    def cached_tokens(self) -> int:
        """Tokens held for the answers under way."""
        return sum(sequence.cached for sequence in list(self.decoding))

    def submit(self, jobs: list[Job]) -> None:
        """Queue jobs, all of them or none.

        Raises:
            QueueFull: they do not fit into the queue.
            EngineStopped: the engine does not work.
            ValueError: a prompt with its answer is longer than a slot.
        """
        for job in jobs:
            if len(job.prompt) + job.max_tokens > self.options.max_length:
                raise ValueError(
                    f"{len(job.prompt)} prompt tokens and max_tokens={job.max_tokens} exceed {self.options.max_length}."
                )
        with self._wake:
            if not self.healthy:
                raise EngineStopped("The engine does not run.") from self._error
            free = self.options.slots - self.busy_slots
            if len(self._waiting) + len(jobs) > self.options.queue_size + free:
                raise QueueFull(f"{len(self._waiting)} requests are waiting.")
            self._waiting.extend(jobs)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Forget a job; its slot is free at the next step. Nothing more is delivered from then on."""
        with self._wake:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
                self.stats.cancelled += 1
            self._wake.notify()

    # ---------------------------------------------------------------- the engine's thread

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._wait_for_work():
                    self._drop_cancelled()
                    self._prefill()
                    self._decode()
        except BaseException as error:
            self._error = error
            logger.exception("The engine has died.")
        finally:
            self._fail_everything()

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not self._stopping and not self._waiting and not self.busy_slots:
                self._wake.wait()
            return not self._stopping

    def _fail_everything(self) -> None:
        with self._wake:
            self._stopping = True
            jobs = list(self._waiting)
            self._waiting.clear()
        error = EngineStopped("The engine was stopped.")
        sequences = [*self.decoding, *self.joining, *([self.prefilling] if self.prefilling else [])]
        self.decoding, self.joining, self.prefilling = [], [], None
        for sequence in sequences:
            sequence.fail(error)
        for job in jobs:
            Sequence(job, -1, self.token_bytes, self.eos_ids).fail(error)

    def _drop_cancelled(self) -> None:
        for sequence in [s for s in self.decoding if s.job.cancelled]:
            self.stats.cancelled += 1
            self._leave(sequence)
        if self.prefilling is not None and self.prefilling.job.cancelled:
            self.stats.cancelled += 1
            self.prefilling = None

    def _leave(self, sequence: Sequence) -> None:
        """Take a row out, and keep the others together: the last row takes its place."""
        last = self.decoding.pop()
        if last is not sequence:
            self.cache.move(last.row, sequence.row, last.cached)
            last.row = sequence.row
            self.decoding[last.row] = last
        if self.prefilling is not None:
            behind = len(self.decoding)
            self.cache.move(self.prefilling.row, behind, self.prefilling.cached)
            self.prefilling.row = behind

    # ---------------------------------------------------------------- prompts

    def _short_prompts(self) -> list[Sequence]:
        """Take the next prompts out of the queue that are short enough to run in one pass; none while another runs."""
        group: list[Sequence] = []
        if self.prefilling is not None:
            return group
        longest = 0
        with self._wake:
            while self._waiting and len(self.decoding) + len(group) < self.options.slots:
                prompt = self._waiting[0].prompt
                longest = max(longest, len(prompt))
                if not prompt.is_short(self.options.prefill_chunk // (len(group) + 1)):
                    break
                if group and longest * (len(group) + 1) > self.options.prefill_chunk:
                    break
                row = len(self.decoding) + len(group)
                group.append(Sequence(self._waiting.popleft(), row, self.token_bytes, self.eos_ids))
            self.joining = list(group)
        return group

    def _prefill_group(self, group: list[Sequence]) -> None:
        """Run short prompts together; when that fails, each of them alone."""
        try:
            logits_BV = prefill_together(self.model, self.cache, [s.job.prompt for s in group], group[0].row)
            tokens, logprobs = sample(logits_BV, [sequence.sampler for sequence in group])
        except Exception as error:
            if len(group) == 1:  # of this request; the others go on
                logger.exception("A prompt failed.")
                self._fail(group[0], error)
                return
            for sequence in group:
                sequence.row = len(self.decoding)
                self._prefill_group([sequence])
            return
        for sequence in group:
            self._join(sequence)
        self._take_tokens(group, tokens, logprobs)

    def _join(self, sequence: Sequence) -> None:
        """Let a sequence whose prompt is cached decode with the others."""
        sequence.cached = len(sequence.job.prompt)
        self.stats.prompt_tokens += sequence.cached
        self.decoding.append(sequence)
        self.joining = [other for other in self.joining if other is not sequence]

    def _next_prompt(self) -> Sequence | None:
        """Return the prompt at work, or the next one if there is a slot for it."""
        if self.prefilling is None and len(self.decoding) < self.options.slots:
            with self._wake:
                if not self._waiting:
                    return None
                sequence = Sequence(self._waiting.popleft(), len(self.decoding), self.token_bytes, self.eos_ids)
                self.prefilling = sequence
            options = self.options
            sequence.steps = prefill_in_steps(
                self.model,
                self.cache,
                sequence.job.prompt,
                lambda: sequence.row,
                options.prefill_chunk,
                options.tiles_a_step,
            )
        return self.prefilling

    def _prefill(self) -> None:
        """Carry prompts on, until about ``prefill_chunk`` tokens of work are done."""
        budget = self.options.prefill_chunk
        while budget > 0 and not self._stopping:
            group = self._short_prompts()
            if group:
                self._prefill_group(group)
                budget -= len(group) * max(len(sequence.job.prompt) for sequence in group)
                continue
            sequence = self._next_prompt()
            if sequence is None:
                return
            try:
                budget -= self._prefill_step(sequence)
            except Exception as error:  # of this request; the others go on
                logger.exception("A prompt failed.")
                self.prefilling = None
                self._fail(sequence, error)
                budget -= self.options.prefill_chunk

    def _prefill_step(self, sequence: Sequence) -> int:
        """Run one step of a prompt; after the last one it joins the others. Returns the work done, in tokens."""
        if sequence.job.cancelled:
            self._drop_cancelled()
            return 0
        assert sequence.steps is not None
        try:
            work, sequence.cached = next(sequence.steps)
            return work
        except StopIteration as end:
            logits_1V: torch.Tensor = end.value
        tokens, logprobs = sample(logits_1V, [sequence.sampler])
        sequence.steps = None
        self.prefilling = None
        self._join(sequence)
        self._take_tokens([sequence], tokens, logprobs)
        return min(sequence.cached, self.options.prefill_chunk)

    # ---------------------------------------------------------------- answers

    def _decode(self) -> None:
        """Write one more token of every answer."""
        self._drop_cancelled()  # who left while its prompt ran has no token to go on from
        rows = list(self.decoding)
        if not rows:
            return
        self.stats.steps += 1
        try:
            self._decode_rows(rows)
        except Exception:
            if len(rows) > 1:
                logger.exception("A step of %d answers failed; each of them is tried alone.", len(rows))
            for sequence in rows:
                self._decode_alone(sequence)

    def _decode_alone(self, sequence: Sequence) -> None:
        try:
            self._decode_rows([sequence])
        except Exception as error:  # of this answer; the others go on
            logger.exception("An answer failed.")
            self._fail(sequence, error)
            self._leave(sequence)

    def _decode_rows(self, rows: list[Sequence]) -> None:
        """Run the last tokens of neighbouring rows through the model, and choose the next ones."""
        tokens, logprobs = sample(self._forward(rows), [sequence.sampler for sequence in rows])
        for sequence in rows:
            sequence.cached += 1
        self._take_tokens(rows, tokens, logprobs)

    def _forward(self, rows: list[Sequence]) -> torch.Tensor:
        longest = max(sequence.cached for sequence in rows) + 1
        state = torch.tensor([[s.last_token for s in rows], [s.cached for s in rows]]).to(self.model.device)
        ids_B, positions_B = state
        self.cache.show_rows(rows[0].row, rows[-1].row + 1, positions_B, longest)
        keys_BS = torch.arange(longest, device=positions_B.device) <= positions_B[:, None]
        outputs = self.model.language(
            input_ids=ids_B[:, None],
            attention_mask=keys_BS if self.mask_of_keys else keys_BS[:, None, None, :],
            position_ids=positions_B[:, None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return outputs.logits[:, -1]

    def _take_tokens(
        self, rows: list[Sequence], tokens: list[int | Exception], logprobs: list[TokenLogprobs | None]
    ) -> None:
        """Give each row its token, and let those leave that are done."""
        for sequence, token, found in zip(rows, tokens, logprobs, strict=True):
            if sequence.job.cancelled:
                continue  # dropped before the next step
            try:
                if isinstance(token, Exception):
                    raise token
                self.stats.generated_tokens += 1
                sequence.accept(token, found)
            except Exception as error:  # of this answer; the others go on
                logger.warning("An answer failed: %s", error)
                self._fail(sequence, error)
        for sequence in rows:
            if sequence.finished:
                self.stats.finished += not sequence.failed
                self._leave(sequence)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        self.stats.failed += 1
        self.joining = [other for other in self.joining if other is not sequence]
        sequence.fail(error)

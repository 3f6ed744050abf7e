"""The language model on NVIDIA GPUs: kernels over static buffers, captured as CUDA graphs.

A decoding step is captured for a few batch sizes, the buckets; rows of a bucket beyond those at work are padding. A
short piece of a prompt, such as a question about a picture whose cache is held, runs as such a step too, its tokens as
rows. A few whole prompts of about one length replay a captured prefill; what else comes is packed and launched.

A model spread over several GPUs is a chain of stages, one for each run of layers on a device: each has its own graph,
and the hidden states are copied in between.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch

from ..models.cache import Segment
from . import cuda_graphs, prefill
from .captured_prefill import PromptGraphs
from .decode import decode_stage
from .decode_buffers import DecodeBuffers, new_buffers
from .decoder_weights import DecoderWeights
from .kv_cache import Extent, KVCache
from .rows import Rows, launching_on, new_rows, upload
from .runner import Part
from .weights import rotary_tables

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)
# Experts of more rows run as in a prefill, by products that know bfloat16 alone.
MOST_HALF_ROWS = 64
# Up to this many tokens of prompts run as rows of a decoding step.
SHORT = 64


@dataclass(frozen=True)
class Stage:
    """A run of layers on one device: the first, the one behind the last, and the device."""

    first: int
    last: int
    device: torch.device


def stages_of(weights: DecoderWeights) -> list[Stage]:
    """Return a model's stages; the output head must lie on the last one's device."""
    stages: list[Stage] = []
    for index, layer in enumerate(weights.layers):
        device = layer.input_norm.device
        if stages and stages[-1].device == device:
            stages[-1] = Stage(stages[-1].first, index + 1, device)
        else:
            stages.append(Stage(index, index + 1, device))
    return stages


def launched_lengths(most: int) -> list[list[int]]:
    """Return the lengths of prompts of some passes, up to a number of tokens: their kernels are found and loaded."""
    picture = 1408  # about what a picture and a question take
    counts = range(2, most // picture + 1)
    return [[picture - index for index in range(count)] for count in counts]


class CapturedStep:
    """A decoding step of one batch size, a graph for each stage.

    Args:
        buffers: of each stage.
        runs: what each stage does.
        capture: what captures graphs on each stage's device; ``None``: they are run as they are.
    """

    def __init__(
        self, buffers: list[DecodeBuffers], runs: list[Callable[[], None]], capture: dict[torch.device, Any]
    ) -> None:
        self.buffers = buffers
        self.replays = []
        for part, run in zip(buffers, runs, strict=True):
            captures = capture.get(part.hidden.device)
            # A step advances its rows: what is run before the capture must be nobody's.
            self.replays.append(run if captures is None else captures(run, before=on_padding(part, run)))

    def __call__(self) -> None:
        """Run the stages, one behind the other."""
        for index, replay in enumerate(self.replays):
            part = self.buffers[index]
            if index:
                part.hidden.copy_(self.buffers[index - 1].hidden)
            with launching_on(part.hidden.device):
                replay()


def on_padding(buffers: DecodeBuffers, run: Callable[[], None]) -> Callable[[], None]:
    """Return what runs a step over rows of which none is at work: they write to the pool's scratch tokens alone."""

    def run_on_padding() -> None:
        real, buffers.rows = buffers.rows, new_rows(buffers.count, buffers.hidden.device)
        try:
            run()
        finally:
            buffers.rows = real

    return run_on_padding


class TritonRunner:
    """Runs a language model by kernels. See `runner.Runner`.

    Args:
        language: the language model; not kept alive, but its weights are.
        weights: those, as the kernels take them.
        kv_cache: the pool.
        max_batch: most rows of a decoding step.
    """

    def __init__(self, language: Any, weights: DecoderWeights, kv_cache: KVCache, max_batch: int) -> None:
        self.language = ref(language)
        self.weights = weights
        self.kv_cache = kv_cache
        most = max_batch if weights.embedding.dtype == torch.bfloat16 else min(max_batch, MOST_HALF_ROWS)
        self.max_batch = min(most, BUCKETS[-1])
        self.stages = stages_of(weights)
        devices = {stage.device for stage in self.stages}
        self.capture = {device: cuda_graphs.capture_for(device) for device in devices}
        self.positions = int(language.config.max_position_embeddings)
        self.tables: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        self._make_tables(language)
        self.steps: dict[tuple[Any, ...], CapturedStep] = {}
        self.prompts = self._new_prompts(())
        self.short: Rows | None = None

    @property
    def device(self) -> torch.device:
        """Where logits are."""
        return self.stages[-1].device

    def _make_tables(self, language: Any) -> None:
        cos, sin = rotary_tables(language, self.positions)
        devices = {stage.device for stage in self.stages}
        self.tables = {device: (cos.to(device), sin.to(device)) for device in devices}

    def _make_positions(self, most: int) -> None:
        """See that the rotary tables reach that far; a model may run beyond its max_position_embeddings."""
        if most > self.positions:
            language = self.language()
            assert language is not None
            self.positions = 2 ** (most - 1).bit_length()
            self._make_tables(language)
            self.pool_changed()

    def warm_up(self) -> None:
        """Compile the kernels of a step of one row: where that fails, the model must run otherwise."""
        with torch.inference_mode():
            self._new_step(Rows(1, self.device, [stage.device for stage in self.stages]), 1)

    def capture_all(self, rows: Rows, scratch: Extent | None) -> None:
        """See `Runner.capture_all`."""
        for each, most in ((rows, self.max_batch), (self._short_rows(), min(SHORT, self.max_batch))):
            for bucket in BUCKETS:
                if bucket <= most:
                    self._step(each, bucket)
        if self.prompts.capture is not None:
            self.prompts.capture_lengths()
        if scratch is not None and self.device.type == "cuda":
            for passes in launched_lengths(scratch.capacity):
                starts = [scratch.start + sum(passes[:i]) for i in range(len(passes))]
                parts = [Part(Segment(s, 0, n), ids=[0] * n) for s, n in zip(starts, passes, strict=True)]
                self._prefill_packed(parts)

    def pool_changed(self) -> None:
        """See `Runner.pool_changed`."""
        self.steps.clear()
        self.prompts = self._new_prompts(self.prompts.met)

    def _new_prompts(self, met: Collection[Hashable]) -> PromptGraphs:
        # A graph is of one device: prompts of a model on several are launched.
        capture = self.capture[self.device] if len(self.stages) == 1 else None
        return PromptGraphs(self.language, self.weights, self.kv_cache, self.tables[self.device], capture, met)

    # ---------------------------------------------------------------- decoding

    def _step(self, rows: Rows, count: int) -> CapturedStep:
        """Return the captured step of the smallest bucket that holds that many rows."""
        bucket = next(size for size in BUCKETS if size >= count)
        key = (id(rows), bucket, cuda_graphs.modes())
        if key not in self.steps:
            self.steps[key] = self._new_step(rows, bucket)
        return self.steps[key]

    def _new_step(self, rows: Rows, bucket: int) -> CapturedStep:
        buffers = [
            new_buffers(self.weights, rows.on(stage.device).first(bucket), *self.tables[stage.device])
            for stage in self.stages
        ]
        runs = [self._stage_run(stage, part) for stage, part in zip(self.stages, buffers, strict=True)]
        return CapturedStep(buffers, runs, self.capture)

    def _stage_run(self, stage: Stage, buffers: DecodeBuffers) -> Callable[[], None]:
        weights, kv_cache = self.weights, self.kv_cache
        return lambda: decode_stage(weights, buffers, kv_cache.pools, stage.first, stage.last)

    def decode(self, rows: Rows, count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Runner.decode`."""
        self._make_positions(max(answer.cached for answer in rows.answers) + 1)
        return self._run_step(rows, count)

    def _run_step(self, rows: Rows, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        step = self._step(rows, count)
        if len(self.stages) > 1:
            rows.on(self.stages[0].device).tokens.copy_(rows.tokens)
        step()
        return step.buffers[-1].logits[:count], rows.tokens[:count]

    # ---------------------------------------------------------------- prompts

    def prefill(self, parts: Sequence[Part], alone: bool = True) -> torch.Tensor:
        """See `Runner.prefill`."""
        self._make_positions(max(part.segment.end for part in parts))
        tokens = sum(part.segment.new for part in parts)
        if tokens <= min(SHORT, self.max_batch) and all(part.embeds_TH is None for part in parts):
            return self._prefill_as_rows(parts, tokens)
        groups = self.prompts.groups(parts, alone)
        if not groups:
            return self._prefill_packed(parts)
        members = [[parts[i] for i in group] for group in groups]
        together = torch.cat([self.prompts.run(group, [self._embeds([p]) for p in group]) for group in members])
        order = [i for group in groups for i in group]
        if order == sorted(order):
            return together
        places = sorted(range(len(order)), key=order.__getitem__)
        return together[upload([places], together.device)[0]]

    def _short_rows(self) -> Rows:
        """Return the rows that short pieces of prompts take."""
        if self.short is None:
            self.short = Rows(SHORT, self.device, [stage.device for stage in self.stages])
        return self.short

    def _prefill_as_rows(self, parts: Sequence[Part], tokens: int) -> torch.Tensor:
        """Run a few tokens as rows of a decoding step, each of which sees those before it."""
        short = self._short_rows()
        positions = [p for part in parts for p in range(part.segment.past, part.segment.end)]
        starts = [part.segment.start for part in parts for _ in range(part.segment.new)]
        short.set([token for part in parts for token in part.ids], positions, starts)
        logits_NV, _ = self._run_step(short, tokens)
        ends, last = [], -1
        for part in parts:
            last += part.segment.new
            ends.append(last)
        return logits_NV[upload([ends], logits_NV.device)[0]]

    def _embeds(self, parts: Sequence[Part]) -> torch.Tensor:
        device = self.weights.embedding.device
        given = []
        for part in parts:
            if part.embeds_TH is None:
                ids = upload([list(part.ids)], device)[0]
                given.append(self.weights.embedding.index_select(0, ids))
            else:
                given.append(part.embeds_TH.to(device=device, dtype=self.weights.embedding.dtype))
        return given[0] if len(given) == 1 else torch.cat(given)

    def _prefill_packed(self, parts: Sequence[Part]) -> torch.Tensor:
        language = self.language()
        assert language is not None
        segments = [part.segment for part in parts]
        return prefill.run_packed(language, self.kv_cache.pools, self.tables, self._embeds(parts), segments)

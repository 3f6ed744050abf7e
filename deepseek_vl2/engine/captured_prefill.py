"""Whole prompts of about one length as one captured pass, which costs the host next to nothing.

They are padded on the right to one multiple of `STEP` tokens: causal attention hides padding there from every token,
its keys go to the pool's scratch tokens, and it has no experts. What fits no group is packed and launched (`prefill`).

Shape suffixes: B prompts of a pass, L their padded length, N = B * L tokens, H hidden size, P rotated part of a head,
V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch

from ..models.cache import Segment
from . import cuda_graphs
from .cuda_graphs import Capture, CapturedGraph, GraphCache
from .decoder_weights import DecoderWeights
from .kv_cache import KVCache
from .prefill import PackedTokens, Pools, first_norm, prefill_layer, run_linear
from .row_layout import STEP, padded_length
from .rows import upload
from .runner import Part

logger = logging.getLogger(__name__)

# Numbers of prompts and lengths are captured apart, and more than eight prompts seldom come in the same number again.
MOST_PROMPTS = 8
# Of a pass: the device takes longer for more than the host for launching them, and the host is a pass ahead.
MOST_CAPTURED = 4608
# Tokens that a group may take for one of its prompts' own, each rounded up alone: beyond this the device would lose in
# padding what the host gains.
MOST_WASTE = 1.15
# Replayed one behind the other. Each reads all experts' weights: of more, the device loses what the host gains.
FEW_GROUPS = 3
MAX_GRAPHS = 32
# Tokens of prompts that a server captures before it is asked: of a picture and a question, of several small ones.
MOST_ALONE = 2048

Tables = tuple[torch.Tensor, torch.Tensor]


@dataclass
class PrefillInputs:
    """What a captured prefill reads and writes.

    Fields:
        embeds_NH: the prompts' embeddings, L tokens each; what stands behind a prompt's own does not matter.
        extents_2B: index in the pool of each prompt's first token, and how many tokens it has, int64.
        cos_LP: cosines of the positions, and ``sin_LP``.
        logits_BV: written: of each prompt's last token, float32.
    """

    embeds_NH: torch.Tensor
    extents_2B: torch.Tensor
    cos_LP: torch.Tensor
    sin_LP: torch.Tensor
    logits_BV: torch.Tensor


def group_prompts(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Return which prompts run together, by their indices: those of about one length, the longest first.

    Args:
        lengths: tokens of each.
        most: longest that one is padded to.
    """
    groups: list[list[int]] = []
    padded = [padded_length(tokens, most) for tokens in lengths]
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups:
            group = [*groups[-1], index]
            taken = len(group) * padded[group[0]]
            if len(group) <= MOST_PROMPTS and taken <= MOST_WASTE * sum(padded[i] for i in group):
                groups[-1] = group
                continue
        groups.append([index])
    return groups


def static_inputs(weights: DecoderWeights, tables: Tables, embeds_NH: torch.Tensor, prompts: int) -> PrefillInputs:
    """Return the buffers of a captured prefill of prompts of one length, whose embeddings are written to that one."""
    head, length = weights.head, len(embeds_NH) // prompts
    return PrefillInputs(
        embeds_NH=embeds_NH,
        extents_2B=torch.zeros(2, prompts, dtype=torch.long, device=head.device),
        cos_LP=tables[0][:length],
        sin_LP=tables[1][:length],
        logits_BV=torch.zeros(prompts, head.shape[0], device=head.device),
    )


def place_prompts(given: PrefillInputs) -> tuple[PackedTokens, torch.Tensor]:
    """Return where the tokens of a captured prefill stand, and which are padding, [N, 1]; all on the device."""
    starts, counts = given.extents_2B
    prompts, length = len(starts), len(given.cos_LP)
    positions = torch.arange(length, device=starts.device)
    padding = positions >= counts[:, None]
    slots = (starts[:, None] + positions).masked_fill(padding, 0)
    last = counts - 1 + length * torch.arange(prompts, device=starts.device)
    cos, sin = (table.repeat(prompts, 1) for table in (given.cos_LP, given.sin_LP))
    return PackedTokens([Segment(0, 0, length)] * prompts, slots.flatten(), cos, sin, last, length), padding.view(-1, 1)


def run_captured(language: Any, pools: Pools, given: PrefillInputs) -> None:
    """Run padded prompts over static buffers: keys go to the pool, and each one's last token's logits are written."""
    layers = language.model.layers
    tokens, padding = place_prompts(given)
    assert tokens.last is not None
    # Zeros, not what is left of earlier prompts: attention multiplies padding's values by 0, and 0 times NaN is NaN.
    given.embeds_NH.masked_fill_(padding, 0)
    hidden, normed = first_norm(layers[0].input_layernorm, given.embeds_NH)
    norms = [layer.input_layernorm for layer in layers[1:]] + [language.model.norm]
    for layer, pool, following in zip(layers, pools, norms, strict=True):
        prefill_layer(layer, hidden, normed, tokens, pool, following)
    given.logits_BV.copy_(run_linear(language.lm_head, normed.index_select(0, tokens.last)))


class PromptGraphs:
    """Captured prefills of a model on one device, as long as the KV cache's pool is the same.

    Args:
        language: the language model.
        weights: its weights.
        kv_cache: the pool.
        tables: cosines and sines of all positions.
        capture: what captures; ``None``: nothing is replayed.
        met: the kinds of prompts that were met with an earlier pool: they are captured when they come again.
    """

    def __init__(
        self,
        language: ref[Any],
        weights: DecoderWeights,
        kv_cache: KVCache,
        tables: Tables,
        capture: Capture | None,
        met: Collection[Hashable] = (),
    ) -> None:
        self.language, self.weights, self.kv_cache, self.tables = language, weights, kv_cache, tables
        self.capture = capture
        self.earlier = frozenset(met)
        self.graphs = GraphCache(MAX_GRAPHS)
        # All graphs read the same rows: only one of them runs at a time.
        table = weights.embedding
        with torch.inference_mode(False):
            self.embeds_NH = torch.zeros(0, table.shape[1], dtype=table.dtype, device=table.device)

    @property
    def met(self) -> frozenset[Hashable]:
        """The kinds of prompts that were met, with this pool or an earlier one."""
        return self.earlier.union(key for key, graph in self.graphs.held.items() if graph.used)

    def groups(self, parts: Sequence[Part], alone: bool = True) -> list[list[int]]:
        """Return the groups of parts, by their indices, that make up a pass and are replayed; none: it is launched.

        A pass with a group of a kind that was not met before is launched. One that was is captured, which takes longer
        than launching: not while others wait.

        Args:
            parts: of the pass.
            alone: whether nobody else waits.
        """
        segments = [part.segment for part in parts]
        many = sum(segment.new for segment in segments) > MOST_CAPTURED
        if self.capture is None or many or any(segment.past for segment in segments):
            return []
        groups = group_prompts([segment.new for segment in segments], len(self.tables[0]))
        if len(groups) > FEW_GROUPS:
            return []
        graphs = [self._graph([parts[i] for i in group]) for group in groups]
        ready = all(graph.replay is not None or (graph.used and alone) for graph in graphs)
        for graph in graphs:
            graph.used = True
        return groups if ready else []

    def _graph(self, parts: Sequence[Part]) -> CapturedGraph:
        """Return the graph of that many prompts of the longest one's length."""
        return self._graph_of(len(parts), padded_length(max(part.segment.new for part in parts), len(self.tables[0])))

    def _graph_of(self, prompts: int, length: int) -> CapturedGraph:
        key = (prompts, length, cuda_graphs.modes())
        return self.graphs.get(key, lambda: self._new_graph(prompts, length, key in self.earlier))

    def _new_graph(self, prompts: int, length: int, met: bool) -> CapturedGraph:
        language, pools, rows = self.language, self.kv_cache.pools, prompts * length
        with torch.inference_mode(False), torch.no_grad():  # later calls outside of inference mode write them too
            if len(self.embeds_NH) < rows:
                self.embeds_NH = self.embeds_NH.new_zeros(rows, self.embeds_NH.shape[1])
            given = static_inputs(self.weights, self.tables, self.embeds_NH[:rows], prompts)
        graph = CapturedGraph(given, lambda: run_captured(language(), pools, given))
        graph.used = met
        return graph

    def capture_lengths(self) -> None:
        """Capture prefills of one prompt, of all lengths up to `MOST_ALONE`: nobody then waits for one of them.

        What they share with prompts of other kinds is compiled and planned then, too.
        """
        # The longest first: it makes the buffers that all share.
        for length in range(min(MOST_ALONE, len(self.tables[0])) // STEP * STEP, 0, -STEP):
            graph = self._graph_of(1, length)
            extents = upload([[0], [1]], self.embeds_NH.device)
            graph.buffers.extents_2B.copy_(extents)  # one token, which goes to the pool's scratch tokens
            graph.used = True
            self._replay(graph)

    def run(self, parts: Sequence[Part], embeds: Sequence[torch.Tensor]) -> torch.Tensor:
        """Replay the graph of a group; returns each prompt's last logits, [B, V], float32."""
        graph = self._graph(parts)
        given: PrefillInputs = graph.buffers
        for row_LH, part in zip(given.embeds_NH.unflatten(0, (len(parts), -1)), embeds, strict=True):
            row_LH[: len(part)].copy_(part)
        segments = [part.segment for part in parts]
        extents = upload([[s.start for s in segments], [s.new for s in segments]], given.extents_2B.device)
        given.extents_2B.copy_(extents)
        self._replay(graph)
        # A copy, before the graph is replayed for others.
        return given.logits_BV.clone()

    def _replay(self, graph: CapturedGraph) -> None:
        reason = graph(self.capture)
        if reason is not None:
            logger.warning("Prompts are launched, not replayed: %s", reason)
            self.capture = None

"""Steps of the kernels and of the plain paths side by side, and what float32 says where they choose different tokens.

Part of `gpu.py`. With random weights thousands of logits lie near the largest one, and rounding alone sends tokens to
other experts; so a choice that differs proves nothing. The figures that tell a wrong kernel from rounding are the
distances from float32: a sound kernel stands no farther from it than the plain paths do.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.masking_utils import create_causal_mask

from deepseek_vl2.engine import runtime
from deepseek_vl2.models.cache import new_cache
from deepseek_vl2.models.modeling_deepseek import positions_from_mask
from deepseek_vl2.models.moe import DeepseekV2MoE, MoEGate

BF16_STEP = 2.0**-8  # distance of neighbouring bfloat16 numbers, relative to their size
MOST_CASES = 12
PROMPT = 40


def near_ties(logits: torch.Tensor) -> torch.Tensor:
    """Return where the best two of [..., vocabulary] lie within two steps of bfloat16: each may be off by one."""
    top = logits.topk(2, dim=-1).values
    return top[..., 0] - top[..., 1] <= 2 * BF16_STEP * top[..., 0].abs()


def compare(logits: torch.Tensor, plain: torch.Tensor) -> list[Any]:
    """Return tokens, those that differ, of these near ties and others, and the errors; both [steps, rows, V]."""
    other, near = logits.argmax(-1) != plain.argmax(-1), near_ties(plain)
    errors = ((logits - plain).norm(dim=-1) / plain.norm(dim=-1)).flatten().tolist()
    differ, close = int(other.sum()), int((other & near).sum())
    return [other.numel(), differ, close, differ - close, f"{statistics.median(errors):.1e}", f"{max(errors):.1e}"]


@dataclass
class Trace:
    """What some paths said at each step.

    Fields:
        logits: of each path, [steps, rows, V], float32.
        exact: of float32, likewise.
        experts: of the kernels and of "plain": whether each expert was chosen, [steps, layers, rows, E].
        margins: of the plain path: the lead of the last expert chosen over the first one left out, in units of the
            gate's logits, [steps, layers, rows].
        moe_layers: numbers of the layers with experts.
    """

    logits: dict[str, torch.Tensor]
    exact: torch.Tensor
    experts: dict[str, torch.Tensor]
    margins: torch.Tensor
    moe_layers: list[int] = field(default_factory=list)

    def cases(self, path: str) -> list[list[Any]]:
        """Return the steps and rows where a path chose another token than "plain", the least near ones first."""
        plain, logits = self.logits["plain"], self.logits[path]
        found = (logits.argmax(-1) != plain.argmax(-1)).nonzero().tolist()
        near = near_ties(plain)

        def lead(case: list[int]) -> float:
            both = [int(part[case[0], case[1]].argmax()) for part in (plain, logits)]
            return float(plain[case[0], case[1], both[0]] - plain[case[0], case[1], both[1]])

        rows = []
        for step, row in sorted(found, key=lead, reverse=True)[:MOST_CASES]:
            both = [int(part[step, row].argmax()) for part in (plain, logits)]
            shown = [
                " / ".join(f"{float(part[step, row, token]):.3f}" for token in both)
                for part in (plain, self.logits["kernels"], self.logits["plain, eager"], self.exact)
            ]
            tie = "yes" if bool(near[step, row]) else "**no**"
            rows.append([step, row, tie, *shown, *self.other_experts(step, row)])
        return rows

    def other_experts(self, step: int, row: int) -> list[Any]:
        """Return the first layer where kernels and plain chose other experts, the gate's lead there, and how many."""
        differ = (self.experts["kernels"][step, :, row] != self.experts["plain"][step, :, row]).any(-1)
        if not bool(differ.any()):
            return ["-", "-", 0]
        first = int(differ.nonzero()[0])
        return [self.moe_layers[first], f"{float(self.margins[step, first, row]):.1e}", int(differ.sum())]


@contextmanager
def watched_gates(language: Any, seen: list[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """Note of every call of a gate which experts it chose, [tokens, E], and its margins, [tokens]."""

    def note(gate: Any, inputs: Any, output: Any) -> None:
        logits = gate.logits(inputs[0].reshape(-1, inputs[0].shape[-1]))
        choice = logits
        if gate.topk_method == "noaux_tc":
            choice = gate.scores_of(logits) + gate.e_score_correction_bias
        best = choice.topk(gate.top_k + 1, dim=-1).values
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, output[0], True)
        seen.append((chosen, best[:, -2] - best[:, -1]))

    hooks = [module.register_forward_hook(note) for module in language.modules() if isinstance(module, MoEGate)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def exact_logits(language: Any, ids: torch.Tensor, mask: torch.Tensor, last: int) -> torch.Tensor:
    """Return the logits of the ``last`` tokens in float32, [last, rows, V]; one layer's float32 copy at a time."""
    model = language.model
    hidden = model.embed_tokens(ids).float()
    rotation = model.rotary_emb(positions_from_mask(mask, ids.shape[1]), torch.float32)
    causal = create_causal_mask(
        config=language.config, inputs_embeds=hidden, attention_mask=mask, past_key_values=None, position_ids=None
    )
    for layer in model.layers:
        wide = copy.deepcopy(layer).float()
        if isinstance(wide.mlp, DeepseekV2MoE):
            config: Any = copy.copy(wide.mlp.experts.config)
            config._experts_implementation = "eager"
            wide.mlp.experts.config = config
        hidden, _ = wide(hidden, rotation, attention_mask=causal)
        del wide
    hidden = copy.deepcopy(model.norm).float()(hidden[:, -last:])
    head = language.lm_head.weight
    parts = [torch.nn.functional.linear(hidden, part.float()) for part in head.split(8192)]
    return torch.cat(parts, dim=-1).transpose(0, 1)


@torch.no_grad()
def record_steps(language: Any, rows: int, steps: int) -> Trace:
    """Decode from a short random prompt with padding on the left; every path reads the plain path's tokens."""
    device, vocabulary = language.lm_head.weight.device, language.lm_head.weight.shape[0]
    generator = torch.Generator(device).manual_seed(rows)
    ids = torch.randint(3, vocabulary, (rows, PROMPT), generator=generator, device=device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    for row in range(rows):
        mask[row, : row % 7] = False
    cache, eager_cache = new_cache(language.config), new_cache(language.config)
    engine = runtime.engine_of(language)
    session = engine.session(language, rows, 1024)
    usual = language.config._attn_implementation

    def plain(tokens: torch.Tensor, held: Any, attention: str = usual) -> torch.Tensor:
        language.config._attn_implementation = attention
        try:
            return language(tokens, attention_mask=mask, past_key_values=held, logits_to_keep=1).logits[:, -1]
        finally:
            language.config._attn_implementation = usual

    logits = plain(ids, cache)
    plain(ids, eager_cache)
    runtime.fill_caches(engine.weights, session.buffers, cache, mask)
    said: dict[str, list[torch.Tensor]] = {"kernels": [], "plain": [], "plain, eager": []}
    chosen: dict[str, list[torch.Tensor]] = {"kernels": [], "plain": []}
    margins = []
    for _ in range(steps):
        token = logits.argmax(-1)
        session.buffers.tokens.copy_(token)
        session.step()
        ids = torch.cat((ids, token[:, None]), dim=1)
        mask = torch.cat((mask, mask.new_ones(rows, 1)), dim=1)
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        with watched_gates(language, seen):
            logits = plain(token[:, None], cache)
        eager = plain(token[:, None], eager_cache, "eager")
        for name, value in (("kernels", session.buffers.logits), ("plain", logits), ("plain, eager", eager)):
            said[name].append(value.clone())
        chosen["kernels"].append(experts_of(session))
        chosen["plain"].append(torch.stack([experts for experts, _ in seen]))
        margins.append(torch.stack([margin for _, margin in seen]))
    return Trace(
        {name: torch.stack(values) for name, values in said.items()},
        exact_logits(language, ids, mask, steps),
        {name: torch.stack(values) for name, values in chosen.items()},
        torch.stack(margins),
        [number for number, layer in enumerate(engine.weights.layers) if layer.routing is not None],
    )


def experts_of(session: Any) -> torch.Tensor:
    """Return which experts the last step of a session read for each row, [layers, rows, E]."""
    found = []
    for layer in session.weights.layers:
        if layer.routing is not None:
            name = f"ids {id(layer)}"
            ids = session.buffers.take(name, session.buffers.rows, layer.routing.top_k, dtype=torch.int32).long()
            found.append(ids.new_zeros(len(ids), layer.routing.num_experts, dtype=torch.bool).scatter_(1, ids, True))
    return torch.stack(found)

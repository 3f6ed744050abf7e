"""Deliberate faults: one changed line each, and the tests that must fail of it.

A fault is one that somebody could write: a wrong bound, a forgotten case, two things in the wrong order. `plant.py`
plants each in a copy of the checkout and runs its tests. A line that has changed since stands here too: the fast suite
looks whether each is still to be found.
"""

from __future__ import annotations

from dataclasses import dataclass

ENGINE = "deepseek_vl2/engine/"
MODELS = "deepseek_vl2/models/"
TRITON = "deepseek_vl2/ops/triton/"
API = "deepseek_vl2/serve/api/"


@dataclass(frozen=True)
class Fault:
    """A fault.

    Fields:
        name: what goes wrong.
        file: where, from the top of the checkout.
        before: what stands there, once.
        after: what the fault makes of it.
        tests: files of the fast suite, one of whose tests must fail.
    """

    name: str
    file: str
    before: str
    after: str
    tests: str


FAULTS = [
    # ------------------------------------------------------------------ models
    Fault(
        "noaux_tc chooses experts by their scores alone",
        MODELS + "router.py",
        "choice_NE = choice_NE + self.e_score_correction_bias",
        "choice_NE = choice_NE + 0 * self.e_score_correction_bias",
        "tests/parity/test_gate.py",
    ),
    Fault(
        "the correction bias enters the experts' weights",
        MODELS + "router.py",
        "return ids_NK, self.weigh(scores_NE, ids_NK), loss",
        "return ids_NK, self.weigh(scores_NE + getattr(self, 'e_score_correction_bias', 0), ids_NK), loss",
        "tests/parity/test_gate.py",
    ),
    Fault(
        "groups are ranked by their best expert where the best two count",
        MODELS + "router.py",
        "best_two_NG2 = choice_NE.unflatten(1, (self.n_group, -1)).topk(2, dim=-1).values",
        "best_two_NG2 = choice_NE.unflatten(1, (self.n_group, -1)).topk(1, dim=-1).values",
        "tests/parity/test_gate.py",
    ),
    Fault(
        "expert weights are not scaled",
        MODELS + "router.py",
        "return weights_NK if self.routed_scaling_factor == 1 else weights_NK * self.routed_scaling_factor",
        "return weights_NK",
        "tests/parity/test_gate.py",
    ),
    Fault(
        "padding counts in the balance loss",
        MODELS + "router.py",
        "chosen_NE = chosen_NE * token_mask_BT.reshape(-1, 1)",
        "chosen_NE = chosen_NE * torch.ones_like(token_mask_BT).reshape(-1, 1)",
        "tests/invariance/test_training_forward.py::test_padding_on_either_side_changes_nothing",
    ),
    Fault(
        "the softmax scale forgets yarn",
        MODELS + "rope.py",
        'return yarn_mscale(rope["factor"], rope["mscale_all_dim"]) ** 2',
        'return yarn_mscale(rope["factor"], rope["mscale_all_dim"])',
        "tests/parity/test_rope.py tests/parity/test_language.py",
    ),
    Fault(
        "linear rope scaling is ignored",
        MODELS + "rope.py",
        'positions_BT1 = positions_BT1 / self.rope["factor"]',
        'positions_BT1 = positions_BT1 / max(1.0, min(1.0, self.rope["factor"]))',
        "tests/parity/test_rope.py",
    ),
    Fault(
        "latent attention rotates neighbours as if they stood half a head apart",
        MODELS + "attention.py",
        "return apply_rotary(split_interleaved_pairs(rope), *rotation), self.kv_a_layernorm(latent)",
        "return apply_rotary(rope, *rotation), self.kv_a_layernorm(latent)",
        "tests/parity/test_language.py",
    ),
    Fault(
        "absorbed attention forgets the rotated part",
        MODELS + "attention.py",
        "scores = add_mask(((rope_scores + latent_scores) * self.scaling).unflatten(1, shape), attention_mask)",
        "scores = add_mask((latent_scores * self.scaling).unflatten(1, shape), attention_mask)",
        "tests/parity/test_language.py",
    ),
    Fault(
        "a chunk of a prompt does not see what is cached of it",
        MODELS + "cache.py",
        "return torch.ones(new, held, dtype=torch.bool, device=device).tril(held - new)[None, None]",
        "return torch.ones(new, held, dtype=torch.bool, device=device).tril(0)[None, None]",
        "tests/invariance/test_engine.py::test_chunks_do_not_matter",
    ),
    Fault(
        "the RMS norm multiplies by its weight before it rounds",
        MODELS + "norm.py",
        "return self.weight * wide.to(x.dtype)",
        "return (self.weight.float() * wide).to(x.dtype)",
        "tests/unit/test_norm.py",
    ),
    Fault(
        "rows of experts come back in the wrong order",
        MODELS + "moe.py",
        "weighted_NKH = sorted_outputs[restored].view(tokens, top_k, -1) * weights_NK.unsqueeze(-1)",
        "weighted_NKH = sorted_outputs.view(tokens, top_k, -1) * weights_NK.unsqueeze(-1)",
        "tests/unit/test_expert_forms.py",
    ),
    Fault(
        "a traced grouped product begins each expert's rows at the top",
        MODELS + "experts_autograd.py",
        "            yield expert, slice(start, end)\n        start = end",
        "            yield expert, slice(start, end)\n        start = 0",
        "tests/unit/test_expert_forms.py",
    ),
    Fault(
        "the projector lays a neighbourhood's rows and columns out the other way round",
        MODELS + "projector.py",
        "merged = cells.permute(0, 5, 2, 4, 1, 3)",
        "merged = cells.permute(0, 5, 4, 2, 1, 3)",
        "tests/parity/test_vision.py",
    ),
    Fault(
        "tiles are stitched column by column",
        MODELS + "image_merge.py",
        "tiles = views_NVLH[:, 1:].unflatten(2, (side, side)).unflatten(1, (grid.down, grid.across))",
        "tiles = views_NVLH[:, 1:].unflatten(2, (side, side)).unflatten(1, (grid.across, grid.down)).transpose(1, 2)",
        "tests/invariance/test_images.py",
    ),
    Fault(
        "images given without their mask are left out in silence",
        MODELS + "image_merge.py",
        '    if tokens:\n        found = f"The prompt has {tokens} image tokens"',
        '    if tokens:\n        return\n        found = f"The prompt has {tokens} image tokens"',
        "tests/unit/test_partial_images.py",
    ),
    # ------------------------------------------------------------------ processor
    Fault(
        "among equal resolutions the last one wins",
        MODELS + "tiling.py",
        "        if rank > best_rank:",
        "        if rank >= best_rank:",
        "tests/unit/test_tiling.py",
    ),
    Fault(
        "an image's rows of tokens have no newline in the local view",
        MODELS + "tiling.py",
        "return (grid.down * side) * (grid.across * side + 1)",
        "return (grid.down * side) * (grid.across * side)",
        "tests/unit/test_tiling.py",
    ),
    Fault(
        "an image is not centred on its field",
        MODELS + "views.py",
        "left, top = round((field[0] - width) * 0.5), round((field[1] - height) * 0.5)",
        "left, top = 0, 0",
        "tests/golden/test_golden_processor.py tests/unit/test_processor.py",
    ),
    Fault(
        "image tokens take a loss",
        MODELS + "prompt_encoding.py",
        "self.labels += [ignore_id] * len(ids)",
        "self.labels += ids",
        "tests/golden/test_golden_processor.py tests/unit/test_processor.py",
    ),
    Fault(
        "no token ends an answer of the assistant",
        MODELS + "prompt_encoding.py",
        'ids = self.encode_text(turn.text) + [self.tokenizer.eos_token_id] * (turn.role == "assistant")',
        "ids = self.encode_text(turn.text)",
        "tests/unit/test_turns.py tests/golden/test_golden_processor.py",
    ),
    Fault(
        "a batch is padded on the right where it was to be the left",
        MODELS + "batch.py",
        "start = out.shape[1] - len(row) if left else 0",
        "start = 0",
        "tests/unit/test_batch_fields.py tests/golden/test_golden_processor.py tests/unit/test_processor.py",
    ),
    Fault(
        "the attention mask marks the padding",
        MODELS + "batch.py",
        "attention_mask = positions >= length - lengths_column if left else positions < lengths_column",
        "attention_mask = positions < length - lengths_column if left else positions < lengths_column",
        "tests/unit/test_batch_fields.py tests/golden/test_golden_processor.py tests/unit/test_processor.py",
    ),
    # ------------------------------------------------------------------ engine
    Fault(
        "a prompt is reused to its last token, of which no logits are left",
        ENGINE + "scheduler.py",
        "tokens = min(tokens, answer.length - 1)",
        "tokens = min(tokens, answer.length)",
        "tests/unit/test_scheduler.py",
    ),
    Fault(
        "a prompt in chunks counts as read after its first",
        ENGINE + "scheduler.py",
        "        if answer.cached < answer.length:\n            return False",
        "        if answer.cached < 1:\n            return False",
        "tests/unit/test_scheduler.py",
    ),
    Fault(
        "long prompts are not cut while answers are being written",
        ENGINE + "scheduler.py",
        "chunk = self.options.prefill_chunk if self.running else budget",
        "chunk = budget",
        "tests/unit/test_scheduler.py",
    ),
    Fault(
        "a prompt fills what is left of a pass, and is read in two",
        ENGINE + "scheduler.py",
        "if tokens <= 0 or tokens < rest <= bound:",
        "if tokens <= 0:",
        "tests/unit/test_scheduler.py",
    ),
    Fault(
        "an answer that moves to a larger extent leaves its cache behind",
        ENGINE + "scheduler.py",
        "            self.kv_cache.copy(extent, larger, answer.cached)\n",
        "",
        "tests/unit/test_scheduler.py",
    ),
    Fault(
        "an answer that moved keeps its old extent for ever",
        ENGINE + "scheduler.py",
        "            self.kv_cache.free(Extent(extent.start, extent.capacity))\n",
        "",
        "tests/unit/test_scheduler.py",
    ),
    Fault(
        "a preempted answer goes on from where its cache was",
        ENGINE + "scheduler.py",
        "answer.cached, answer.embeds_TH = 0, None",
        "answer.embeds_TH = None",
        "tests/unit/test_scheduler.py",
    ),
    Fault(
        "free extents side by side are not joined",
        ENGINE + "kv_cache.py",
        "if last_start + last_size == start:",
        "if last_start + last_size == start - 1:",
        "tests/unit/test_scheduler.py",
    ),
    Fault(
        "prefixes with different pictures count as the same",
        ENGINE + "prefix_cache.py",
        'digest.update(first.to_bytes(8, "little") + key)',
        'digest.update(first.to_bytes(8, "little"))',
        "tests/unit/test_engine_caches.py",
    ),
    Fault(
        "a block's hash forgets what comes before it",
        ENGINE + "prefix_cache.py",
        "digest = blake2b(previous, digest_size=16)",
        "digest = blake2b(b'', digest_size=16)",
        "tests/unit/test_engine_caches.py",
    ),
    Fault(
        "the image cache outgrows its bound",
        ENGINE + "image_cache.py",
        "self.bytes += size",
        "self.bytes += 0 * size",
        "tests/unit/test_engine_caches.py",
    ),
    Fault(
        "an image that is cut into other tiles counts as the same",
        ENGINE + "request.py",
        "return self.keys[index] + bytes((grid.across, grid.down))",
        "return self.keys[index]",
        "tests/unit/test_engine_caches.py",
    ),
    Fault(
        "rows that join stand at the place of another",
        ENGINE + "rows.py",
        "places.update((id(answer), held + k) for k, answer in enumerate(joining))",
        "places.update((id(answer), held) for k, answer in enumerate(joining))",
        "tests/invariance/test_engine.py::test_batch_is_single",
    ),
    Fault(
        "an answer goes on behind its end",
        ENGINE + "request.py",
        "stopped = token in self.end_ids or (detokenizer is not None and detokenizer.stopped)",
        "stopped = detokenizer is not None and detokenizer.stopped",
        "tests/invariance/test_engine.py::test_least_lengths_stay_on_the_engine",
    ),
    Fault(
        "a cancelled request is still told of tokens",
        ENGINE + "steps.py",
        "            if answer.finished or answer.request.cancelled:\n                continue",
        "            if answer.finished:\n                continue",
        "tests/invariance/test_engine.py::test_nothing_is_delivered_behind_a_cancellation",
    ),
    Fault(
        "the first prompt of a pass is blamed for whatever fails in it",
        ENGINE + "steps.py",
        "            if len(planned) == 1:\n",
        "            if planned:\n",
        "tests/invariance/test_engine.py::test_a_prompt_that_fails_leaves_no_trace",
    ),
    # ------------------------------------------------------------------ sampler and detokenizer
    Fault(
        "top-p leaves the token out that crosses the bound",
        ENGINE + "sampler.py",
        "within_BK = (cumulated_BK - sorted_BK) < top_p_B[:, None] * mass_B1",
        "within_BK = cumulated_BK < top_p_B[:, None] * mass_B1",
        "tests/unit/test_sampler.py",
    ),
    Fault(
        "top-k keeps one more",
        ENGINE + "sampler.py",
        "last_B = torch.where(top_k_B > 0, top_k_B.clamp(max=sorted_BK.shape[1]), sorted_BK.shape[1]) - 1",
        "last_B = (torch.where(top_k_B > 0, top_k_B, sorted_BK.shape[1])).clamp(max=sorted_BK.shape[1] - 1)",
        "tests/unit/test_sampler.py",
    ),
    Fault(
        "a row's random numbers do not depend on its position",
        ENGINE + "noise.py",
        "return mix((mix((low + SPREAD * high) & MASK32) + positions_B.long() * SPREAD) & MASK32)",
        "return mix((mix((low + SPREAD * high) & MASK32) + 0 * positions_B.long()) & MASK32)",
        "tests/unit/test_sampler.py",
    ),
    Fault(
        "the repetition penalty favours negative logits",
        ENGINE + "sampler.py",
        "weakened = torch.where(logits_NV > 0, larger_NV, logits_NV * self.repetition)",
        "weakened = larger_NV",
        "tests/unit/test_sampler.py",
    ),
    Fault(
        "log probabilities are those of the ruled logits",
        ENGINE + "sampler.py",
        "        ruled_BV, failures = self._apply_rules(logits_BV)\n",
        "        ruled_BV, failures = self._apply_rules(logits_BV)\n        logits_BV = ruled_BV\n",
        "tests/unit/test_sampler.py",
    ),
    Fault(
        "answers may end before their least length",
        ENGINE + "sampler.py",
        "logits_BV[rows, tokens] = -torch.inf\n",
        "logits_BV[rows, tokens] = allowed\n",
        "tests/unit/test_sampler.py",
    ),
    Fault(
        "what may begin a stop sequence is shown",
        ENGINE + "detokenizer.py",
        "held = max((self._overlap(stop) for stop in self.stop), default=0)",
        "held = 0",
        "tests/unit/test_detokenizer.py",
    ),
    # ------------------------------------------------------------------ ops
    Fault(
        "the GEMV's second weight is written over the first",
        TRITON + "decode_gemv.py",
        "shift = tl.where(in_third, N1 + N2, tl.where(in_second, N1, 0))",
        "shift = tl.where(in_third, N1 + N2, 0)",
        "tests/invariance/test_product_kernels.py::test_one_row_linear",
    ),
    Fault(
        "of equal logits the last one wins",
        TRITON + "decode_gemv.py",
        "better = (new > value) | ((new == value) & (new_id < winner))",
        "better = (new > value) | ((new == value) & (new_id > winner))",
        "tests/invariance/test_product_kernels.py::test_of_many_parts_the_first_of_the_best_is_chosen",
    ),
    Fault(
        "values are rotated as keys are",
        TRITON + "decode_mha.py",
        "    if head < N + M:\n        turned",
        "    if head < N + 2 * M:\n        turned",
        "tests/invariance/test_attention_kernels.py::test_multihead_attention",
    ),
    Fault(
        "the layer norm of the tower forgets its bias",
        TRITON + "norm.py",
        "normed = (sums[part] - mean) * inverse * weight + bias",
        "normed = (sums[part] - mean) * inverse * weight",
        "tests/invariance/test_tower_kernels.py::test_add_layer_norm",
    ),
    Fault(
        "the last program of a row leaves its counter as it is",
        TRITON + "router.py",
        "        tl.store(counters_ptr + row, 0)\n",
        "        tl.store(counters_ptr + row, 1)\n",
        "tests/invariance/test_router_kernels.py::test_route_of_one_row",
    ),
    Fault(
        "parts of a sequence are added as if their largest scores were the same",
        TRITON + "decode_mla.py",
        "power = tl.exp2(lse - new_highest)",
        "power = tl.where(w < live, 1.0, 0.0)",
        "tests/invariance/test_attention_kernels.py::test_latent_attention",
    ),
    Fault(
        "all columns of a packed row have the scale of its first group",
        TRITON + "packed_words.py",
        "place = scale_ptr + (row // ROW_BLOCK) * COUNT + word // (GROUP // PER)",
        "place = scale_ptr + (row // ROW_BLOCK) * COUNT + 0 * word",
        "tests/invariance/test_quant_kernels.py::test_experts_of_one_row",
    ),
    Fault(
        "a packed expert's ups are its gates",
        TRITON + "packed_gemv.py",
        "up_ptr = gate_ptr + I * (H // PER)",
        "up_ptr = gate_ptr + 0 * I * (H // PER)",
        "tests/invariance/test_quant_kernels.py::test_experts_of_one_row",
    ),
    Fault(
        "scaled bytes wrap around",
        TRITON + "image_resize.py",
        "byte = tl.minimum(tl.maximum(total >> BITS, 0), 255)",
        "byte = tl.maximum(total >> BITS, 0) & 255",
        "tests/invariance/test_scaling.py::test_bytes_are_pillows",
    ),
    Fault(
        "rows advance once before a capture",
        ENGINE + "triton_runner.py",
        "captures(run, before=on_padding(part, run))",
        "captures(run)",
        "tests/invariance/test_engine_kernels.py::test_what_runs_before_a_capture_is_nobodys_step",
    ),
    Fault(
        "a NaN in a row is quantized as if it were nothing",
        "deepseek_vl2/ops/cpu/quant_rows.c",
        "float scale = largest < 1e-36f ? 0 : largest / 127;",
        "float scale = usual ? largest / 127 : 0;",
        "tests/unit/test_quant_rows.py::test_what_is_not_finite_shows_and_what_is_tiny_vanishes",
    ),
    # ------------------------------------------------------------------ quantization
    Fault(
        "the experts stay as they were",
        MODELS + "quantizer.py",
        "        if isinstance(module, DeepseekV2Experts):",
        "        if isinstance(module, type(None)):",
        "tests/unit/test_quantization.py::test_loading_packs_all_that_it_says_and_computes_with_it",
    ),
    # ------------------------------------------------------------------ training
    Fault(
        "a sample's first token is learnt from the one packed before it",
        "deepseek_vl2/training/collator.py",
        '        encoded["target_ids"][0] = self.processor.ignore_id\n',
        "",
        "tests/unit/test_collator.py",
    ),
    Fault(
        "an image is cut in two",
        "deepseek_vl2/training/collator.py",
        "        if start + tokens > max_length:\n            keep = min(keep, start)\n            break",
        "        if start > max_length:\n            keep = min(keep, start)\n            break",
        "tests/unit/test_collator.py",
    ),
    Fault(
        "rows are packed beyond their length",
        "deepseek_vl2/training/collator.py",
        "row = next((row for row, left in enumerate(room) if left >= lengths[index]), len(rows))",
        "row = next((row for row, left in enumerate(room) if left > 0), len(rows))",
        "tests/unit/test_collator.py",
    ),
    Fault(
        "the routing bias moves towards the busy experts",
        "deepseek_vl2/training/routing.py",
        "direction_ME = torch.sign(load_ME.mean(dim=1, keepdim=True) - load_ME)",
        "direction_ME = torch.sign(load_ME - load_ME.mean(dim=1, keepdim=True))",
        "tests/unit/test_routing.py",
    ),
    Fault(
        "an adapter is merged without its scale",
        "deepseek_vl2/training/packed_lora.py",
        "delta = second[expert].float() @ first[expert].float() * self.scaling[name]",
        "delta = second[expert].float() @ first[expert].float()",
        "tests/unit/test_packed_lora.py",
    ),
    # ------------------------------------------------------------------ serve and cli
    Fault(
        "a server without a key answers under any name",
        API + "guard.py",
        "        if is_local_name(host) or host in self.allowed_hosts:\n",
        "        if host or is_local_name(host):\n",
        "tests/apps/test_server_connections.py::test_a_page_that_points_its_name_here_gets_nothing",
    ),
    Fault(
        "one address may hold all connections",
        API + "connections.py",
        "self.open.total() >= self.limits.most or self.open[address] >= self.limits.per_address",
        "self.open.total() >= self.limits.most",
        "tests/apps/test_server_connections.py::test_an_address_may_have_only_so_many_connections",
    ),
    Fault(
        "a body without a length may be of any size",
        API + "body.py",
        "                if len(body) > max_bytes:\n                    raise too_large\n",
        "",
        "tests/apps/test_server_bad_requests.py::test_an_endless_body",
    ),
    Fault(
        "images of a request may have too many pixels together",
        API + "images.py",
        "        if pixels > limits.max_pixels:\n            raise image_error(",
        "        if pixels < 0:\n            raise image_error(",
        "tests/apps/test_server_bad_requests.py::test_messages_say_what_is_wrong",
    ),
    Fault(
        "a grammar's length is not looked at",
        API + "grammar_rules.py",
        "    if len(text) > MAX_GRAMMAR_CHARACTERS:\n",
        "    if len(text) < 0:\n",
        "tests/apps/test_server_grammar.py::test_patterns_that_are_refused",
    ),
    Fault(
        "a killed run's half line counts as an answer",
        "deepseek_vl2/cli/batch_files.py",
        'return record if isinstance(record.get("key"), str) and ("answer" in record or "error" in record) else None',
        "return record",
        "tests/apps/test_cli_batch.py::test_what_others_wrote_is_never_replaced",
    ),
    Fault(
        "answers to another file of questions are taken over",
        "deepseek_vl2/cli/batch_files.py",
        "if there == job.key:",
        "if there:",
        "tests/apps/test_cli_batch.py::test_answers_to_another_input_are_not_mixed",
    ),
    Fault(
        "boxes beyond the picture stay there",
        "deepseek_vl2/utils/grounding.py",
        "x1, y1, x2, y2 = (min(max(value, 0), COORDINATE_MAX) for value in values)",
        "x1, y1, x2, y2 = values",
        "tests/unit/test_grounding.py tests/unit/test_grounding_problems.py",
    ),
    Fault(
        "the lines of a worker that died are lost",
        "deepseek_vl2/integrations/ray/dispatch.py",
        "                self.again.append(job)\n",
        "                self.deaths[job.line] += 0\n",
        "tests/unit/test_ray_dispatch.py",
    ),
    Fault(
        "a line that kills its worker is asked among others for ever",
        "deepseek_vl2/integrations/ray/dispatch.py",
        "            elif self.deaths[job.line] >= ALONE_AFTER:\n",
        "            elif self.deaths[job.line] < 0:\n",
        "tests/unit/test_ray_dispatch.py",
    ),
    Fault(
        "a worker that cannot be reached is left at work",
        "deepseek_vl2/integrations/ray/dispatch.py",
        "        self._kill(worker)\n        self.deaths_in_a_row += 1\n",
        "        self.deaths_in_a_row += 1\n",
        "tests/unit/test_ray_dispatch.py",
    ),
    Fault(
        "the second question about a picture goes to another replica",
        "deepseek_vl2/integrations/ray/affinity.py",
        "        first = next(pictures(messages), None) or next((m for m in messages if not is_system(m)), None)\n",
        "        first = next((m for m in messages if not is_system(m)), None)\n",
        "tests/unit/test_ray_serving.py",
    ),
]

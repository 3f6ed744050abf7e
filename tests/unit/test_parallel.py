"""What several processes need of the model, and what is refused with a sentence."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from support import KINDS, mini_inputs, mini_model
from torch.distributed.utils import _apply_to_tensors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import set_checkpoint_early_stop
from transformers.distributed import DistributedConfig

from deepseek_vl2.models import DeepseekVLV2ForCausalLM
from deepseek_vl2.models.modeling_deepseek import DeepseekV2DecoderLayer
from deepseek_vl2.models.parallel import EXPERT_PLAN, HEAD_PLAN, TENSOR_PLAN, check_heads


def training_batch() -> dict[str, Any]:
    inputs = mini_inputs([(1, 1), 20], [26], seed=3)
    labels = inputs["input_ids"].masked_fill(inputs["images_seq_mask"] | ~inputs["attention_mask"], -100)
    # As the Trainer calls it: the labels of the whole step are counted, more than this micro-batch's.
    return {**inputs, "labels": labels, "num_items_in_batch": torch.tensor(3 * int((labels != -100).sum()))}


# ---------------------------------------------------------------- plans


@pytest.mark.parametrize("kind", KINDS)
def test_plans_split_all_matrices_of_attention_and_mlps(kind: str) -> None:
    model = mini_model(kind)
    prefix = "language.model."
    plan = {name.removeprefix(prefix): style for name, style in model._tp_plan.items()}
    assert {"language.lm_head": HEAD_PLAN["lm_head"]}.items() <= model._tp_plan.items()
    names = {
        re.sub(r"\.\d+\.", ".*.", name.removeprefix(prefix).removesuffix(".weight"))
        for name, _ in model.named_parameters()
        if name.startswith(f"{prefix}layers.") and not re.search(r"norm|\.gate\.|q_a_proj", name)
    }
    assert names | {"layers.*.mlp.experts"} == plan.keys() - {"language.lm_head", "embed_tokens"}
    assert all(TENSOR_PLAN[name] == plan[name] for name in names)
    assert {f"{prefix}{name}": style for name, style in EXPERT_PLAN.items()} == model._ep_plan


def test_stages_of_a_pipeline_are_refused(tmp_path: Any) -> None:
    mini_model("tiny").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"pp_size=2 is not supported: device_map='auto'"):
        DeepseekVLV2ForCausalLM.from_pretrained(tmp_path, distributed_config=DistributedConfig(pp_size=2))


@pytest.mark.parametrize(
    "options",
    [
        {"distributed_config": DistributedConfig(tp_size=3)},
        {"distributed_config": {"tp_size": 3}},
        {"tp_plan": "auto"},
    ],
)
def test_heads_that_cannot_be_shared_out_are_told_before_anything_is_read(
    options: dict[str, Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    mini_model("tiny").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^4 attention heads cannot be split over 3 processes: tp_size may be 1, 2"):
        DeepseekVLV2ForCausalLM.from_pretrained(tmp_path, **options)


def test_heads_that_stay_whole_may_have_any_number() -> None:
    check_heads(10, {"distributed_config": DistributedConfig(tp_size=4, tp_plan={"layers.*.mlp.down_proj": "rowwise"})})
    check_heads(10, {"distributed_config": DistributedConfig(tp_size=5)})
    check_heads(10, {})


def test_data_parallel_is_refused() -> None:
    """PyTorch asks every module for a copy of itself, once for each GPU."""
    for part in (mini_model("tiny"), mini_model("tiny").language):
        with pytest.raises(RuntimeError, match=r"one process uses one GPU.*accelerate launch.*CUDA_VISIBLE_DEVICES=0"):
            part._replicate_for_data_parallel()


# ---------------------------------------------------------------- gradient checkpointing


@contextmanager
def cast_once(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[list[str]]:
    """Cast what layers are given in their first run alone, as FSDP 2 does before torch 2.14; names what it changed."""
    changed, hooks = list[str](), []

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tensor.dtype != dtype:
            changed.append(f"{list(tensor.shape)} {tensor.dtype}")
            return tensor.to(dtype)
        return tensor

    def hook(module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        return _apply_to_tensors(cast, args), _apply_to_tensors(cast, kwargs)

    for module in model.modules():
        if isinstance(module, DeepseekV2DecoderLayer):
            hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield changed
    finally:
        for handle in hooks:
            handle.remove()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_layers_are_given_nothing_that_mixed_precision_would_cast(kind: str, attention: str) -> None:
    """Sharded, weights are bfloat16 when they are used, embeddings too."""
    model = mini_model(kind, attn=attention, aux_loss_alpha=0.1).to(torch.bfloat16).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with cast_once(model, torch.bfloat16) as changed, torch.autocast("cpu", torch.bfloat16):
        model(**training_batch()).loss.backward()
    assert not changed


class Operations(TorchDispatchMode):
    """Writes down what is computed: each operation with the dtypes of its results."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        results = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        if not any(word in str(func) for word in ("detach", "alias")):  # how autograd keeps tensors
            self.log.append(" ".join([str(func), *(f"{t.dtype}{list(t.shape)}" for t in results)]))
        return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
def test_layers_compute_alike_when_they_are_run_again(kind: str, precision: str) -> None:
    """The same operations in the same dtypes: no path depends on what differs between the two runs."""
    model = mini_model(kind, aux_loss_alpha=0.1).to(torch.bfloat16 if precision == "bf16" else torch.float32).train()
    first, again = list[list[str]](), list[list[str]]()

    def logs() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        first.append([])
        again.append([])
        return Operations(first[-1]), Operations(again[-1])

    context: Callable[[], Any] = logs
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": context})
    with set_checkpoint_early_stop(False):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            loss = model(**training_batch()).loss
        loss.backward()
    assert len(first) == model.config.language_config.num_hidden_layers
    assert all(len(log) > 20 for log in first)
    assert first == again


def test_the_reentrant_form_is_taken_as_the_other(caplog: pytest.LogCaptureFixture) -> None:
    """It runs layers without gradients first, by kernels that are none of training's."""
    plain, checkpointed = (mini_model("base", aux_loss_alpha=0.1).train() for _ in range(2))
    checkpointed.gradient_checkpointing_enable({"use_reentrant": True})
    function = checkpointed.language.model.layers[0]._gradient_checkpointing_func
    assert function.keywords["use_reentrant"] is False
    for model in (plain, checkpointed):
        model(**training_batch()).loss.backward()
    for (name, want), got in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        if want.grad is not None:
            assert torch.equal(got.grad, want.grad), name  # type: ignore[arg-type]

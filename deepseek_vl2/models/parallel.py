"""Several processes that share one model: transformers' plans, and the parts of its machinery that say no here.

A plan names modules and parameters, relative to the stack of layers, and how each is split. There is one for all three
architectures; a model keeps what it has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging

try:  # torch may come without its distributed part
    from transformers.distributed import DistributedConfig
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, MoeExpertsParallel
except ImportError:
    ALL_PARALLEL_STYLES, MoeExpertsParallel, DistributedConfig = {}, object, dict

logger = logging.get_logger(__name__)

ATTENTION, MLP = "layers.*.self_attn", "layers.*.mlp"
EXPERTS, SHARED = f"{MLP}.experts", f"{MLP}.shared_experts"

# Every process has its share of the attention's heads and of each MLP's inner width, experts' included. The gate, the
# norms, the latents' first projections, the vision tower and the projector are whole in each.
TENSOR_PLAN = {
    **{f"{ATTENTION}.{name}": "colwise" for name in ("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj")},
    f"{ATTENTION}.kv_a_proj_with_mqa": "mla_kv_a_proj",
    f"{ATTENTION}.o_proj": "rowwise",
    f"{EXPERTS}.gate_up_proj": "packed_colwise",
    f"{EXPERTS}.down_proj": "rowwise",
    EXPERTS: "moe_tp_experts",
    **{f"{part}.{name}": "colwise" for part in (MLP, SHARED) for name in ("gate_proj", "up_proj")},
    **{f"{part}.down_proj": "rowwise" for part in (MLP, SHARED)},
}
HEAD_PLAN = {"lm_head": "colwise_gather_output"}

LOCAL_EXPERTS = "deepseek_vl2_local_experts"
# transformers 5.19 and later bring tokens to the experts' processes; before, each runs its own on all tokens.
HAS_DISPATCH = "ep_dispatch_experts" in ALL_PARALLEL_STYLES
# Every process has some experts whole, and all of the rest.
EXPERT_PLAN = {
    f"{EXPERTS}.gate_up_proj": "grouped_gemm",
    f"{EXPERTS}.down_proj": "grouped_gemm",
    EXPERTS: "ep_dispatch_experts" if HAS_DISPATCH else LOCAL_EXPERTS,
}


class LocalExperts(MoeExpertsParallel):  # type: ignore[misc]
    """Run a process's own experts on all tokens and add up what the processes have: for transformers before 5.19.

    Its own way there lies in the router, whose results it expects in another order than the gate's.
    """

    def transform_inputs_pre_forward(
        self, module: Any, args: Any, kwargs: Any, mesh: Any, **options: Any
    ) -> tuple[Any, Any]:
        """Count ids from the process's first expert; those of others become the number of its experts, weight 0."""
        (hidden, ids, weights), kwargs = super().transform_inputs_pre_forward(module, args, kwargs, mesh)
        local = ids - mesh.get_local_rank() * module.num_experts
        elsewhere = (local < 0) | (local >= module.num_experts)
        return (hidden, local.masked_fill(elsewhere, module.num_experts), weights.masked_fill(elsewhere, 0.0)), kwargs


if ALL_PARALLEL_STYLES and not HAS_DISPATCH:
    ALL_PARALLEL_STYLES.register(LOCAL_EXPERTS, LocalExperts())


def holds_some_experts(experts: Any) -> bool:
    """Whether other processes hold the rest of a layer's experts: ids up to their number then stand for those."""
    return bool(experts.num_experts != experts.config.n_routed_experts)


def check_heads(heads: int, options: Mapping[str, Any]) -> None:
    """Refuse to split attention heads over processes that cannot have as many each; it fails at the first prompt.

    Args:
        heads: of the language model's attention.
        options: arguments of ``from_pretrained``.

    Raises:
        ValueError: they do not divide.
    """
    wanted, plan = options.get("distributed_config"), options.get("tp_plan")
    if isinstance(wanted, dict):
        wanted = DistributedConfig.from_dict(wanted)
    elif wanted is None and plan is not None:
        wanted = DistributedConfig(tp_plan=plan, tp_size=options.get("tp_size"))
    size = getattr(wanted, "tp_size", None) or 1
    whole = getattr(wanted, "enable_expert_parallel", False) or getattr(wanted, "tp_plan", None) not in (None, "auto")
    if whole or heads % size == 0:
        return
    sizes = ", ".join(str(number) for number in range(1, heads + 1) if heads % number == 0)
    raise ValueError(
        f"{heads} attention heads cannot be split over {size} processes: tp_size may be {sizes}. device_map='auto' "
        "takes any number of GPUs, in one process."
    )


def is_split_head(head: nn.Module) -> bool:
    """Whether each process has some rows of the output head: called, it returns all logits, but its weight is no use.

    Where FSDP has sharded it, its forward pass finds the whole weight.
    """
    return "forward" in vars(head) and hasattr(head.weight, "device_mesh")


def present(plan: Mapping[str, str], model: nn.Module) -> dict[str, str]:
    """Return those lines of a plan that name a module or a parameter of the model."""
    names = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    patterns = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names}
    return {name: style for name, style in plan.items() if name in patterns}


# FSDP casts what a layer is given to the dtype of its products, in the first run. Before torch 2.14 it did not do so
# when gradient checkpointing runs the layer again. What is not computed in that dtype travels as integers, which it
# leaves alone.


def as_bits(number: torch.Tensor) -> torch.Tensor:
    """Return a float32 scalar as the integer of the same bits."""
    return number.float().view(torch.int32)


def from_bits(bits: torch.Tensor) -> torch.Tensor:
    """Return the float32 scalar that `as_bits` was given."""
    return bits.view(torch.float32)


class ParallelMixin:
    """What transformers and PyTorch offer for models of any kind in several processes or threads, as far as it goes."""

    _tp_plan: Any
    _ep_plan: Any

    def init_parallel_plans(self) -> None:
        """Keep of each plan what this model has, since transformers warns of every other line; refuse DeepSpeed's."""
        if is_deepspeed_zero3_enabled():
            raise ValueError("DeepSpeed ZeRO-3 is not supported: FSDP 2 shards the same (docs/training.md, Sharded).")
        super().init_parallel_plans()  # type: ignore[misc]
        self._tp_plan, self._ep_plan = present(self._tp_plan, self), present(self._ep_plan, self)  # type: ignore[arg-type]

    @classmethod
    def prepare_distribute_model(cls, distributed_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Refuse stages of a pipeline before anything is split."""
        config = distributed_config
        size = config.get("pp_size") if isinstance(config, dict) else getattr(config, "pp_size", None)
        if (size or 1) > 1:
            raise ValueError(
                f"pp_size={size} is not supported: device_map='auto' puts the layers on several GPUs of one process, "
                "and tp_size splits each layer over several processes."
            )
        return super().prepare_distribute_model(distributed_config, *args, **kwargs)  # type: ignore[misc]

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise RuntimeError(
            "torch.nn.DataParallel is not supported: one process uses one GPU. transformers' Trainer wraps a model in "
            "it where a process sees several GPUs; start one process for each (accelerate launch --num_processes 2 "
            "..., or torchrun), or show it one alone: CUDA_VISIBLE_DEVICES=0."
        )

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, **kwargs: Any
    ) -> None:
        """Set the layers up; always so that they run alike both times, with gradients on.

        The reentrant form runs them without gradients first: by other kernels than those that are differentiated.
        """
        function = gradient_checkpointing_func
        if isinstance(function, partial) and function.keywords.get("use_reentrant"):
            logger.warning_once("use_reentrant=True is taken as False: layers must run alike both times.")  # type: ignore[attr-defined]
            function = partial(function.func, *function.args, **{**function.keywords, "use_reentrant": False})
        super()._set_gradient_checkpointing(enable, function, **kwargs)  # type: ignore[misc]

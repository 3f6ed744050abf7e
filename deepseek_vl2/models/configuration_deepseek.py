"""Configuration of the language model (DeepSeek-V2 family, with multi-head or latent attention)."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from .config_fields import (
    ANY_NUMBER,
    COUNT,
    EXPERTS,
    FROM_ZERO,
    LAYERS,
    OPTIONAL_COUNT,
    OPTIONAL_FROM_ZERO,
    POSITIVE,
    SHARE,
    FieldError,
    check_fields,
    check_mapping,
)

FIELDS = {
    "vocab_size": COUNT,
    "hidden_size": COUNT,
    "intermediate_size": COUNT,
    "moe_intermediate_size": COUNT,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": COUNT,
    "num_key_value_heads": COUNT,
    "n_shared_experts": OPTIONAL_FROM_ZERO,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": OPTIONAL_FROM_ZERO,
    "q_lora_rank": OPTIONAL_COUNT,
    "n_group": OPTIONAL_FROM_ZERO,
    "topk_group": OPTIONAL_FROM_ZERO,
    "first_k_dense_replace": FROM_ZERO,
    "max_position_embeddings": COUNT,
    "rms_norm_eps": POSITIVE,
    "rope_theta": POSITIVE,
    "routed_scaling_factor": ANY_NUMBER,
    "aux_loss_alpha": ANY_NUMBER,
    "attention_dropout": SHARE,
}
SCORING_FUNCTIONS = ("softmax", "sigmoid")
TOPK_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")
ROPE_TYPES = ("default", "linear", "dynamic", "yarn")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise a ``ValueError`` that names the field, the value and what would be accepted."""
    if value not in choices:
        raise ValueError(f"Unknown {name} {value!r}: expected one of {', '.join(map(repr, choices))}.")


def as_number(name: str, value: Any) -> float:
    """Return a number, also one that a config file holds as text; raise `FieldError` for what is none."""
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise FieldError(f"{name} must be a number, got {value!r}.") from error


def normalize_rope_parameters(
    rope_theta: float,
    rope_scaling: dict[str, Any] | None,
    rope_parameters: dict[str, Any] | None,
) -> dict[str, Any]:
    """Merge the old (``rope_theta`` + ``rope_scaling``) and the new (``rope_parameters``) description into one dict.

    Returns a dict with ``rope_type``, ``rope_theta`` and, for the scaled kinds, ``factor`` and their own keys.
    Raises ``ValueError`` for an unknown kind or a missing or non-positive factor.
    """
    scaling, parameters = check_mapping("rope_scaling", rope_scaling), check_mapping("rope_parameters", rope_parameters)
    merged = {**scaling, **parameters}
    old_name = merged.pop("type", None)
    merged.setdefault("rope_type", old_name or "default")
    merged["rope_theta"] = as_number("rope_theta", merged.get("rope_theta") or rope_theta)
    check_choice("rope type", merged["rope_type"], ROPE_TYPES)
    if merged["rope_type"] != "default":
        factor = merged.get("factor")
        if not isinstance(factor, (int, float)) or factor <= 0:
            raise ValueError(f"A {merged['rope_type']!r} rope needs a positive `factor`, got {factor!r}.")
    if merged["rope_type"] == "yarn":
        # Left out, transformers would fill in max_position_embeddings; the original's default is this.
        merged.setdefault("original_max_position_embeddings", 4096)
    return merged


class DeepseekV2Config(PretrainedConfig):
    """Sizes and choices of the language model.

    The defaults are those of the original package, because released ``config.json`` files list only what differs
    from them. Every choice is checked here, so that a model is never built from a misspelt one.

    Args:
        vocab_size: rows of the embedding and of the output head.
        hidden_size: width of the residual stream.
        intermediate_size: inner width of the dense layers' MLP.
        moe_intermediate_size: inner width of one expert.
        num_hidden_layers: decoder layers.
        num_attention_heads: attention heads.
        num_key_value_heads: key/value heads of plain attention (``None``: as many as attention heads).
        n_shared_experts: experts applied to every token (``None``: none).
        n_routed_experts: experts to choose from (``None``: a dense model).
        ep_size: kept for old configs; only 1 is accepted.
        routed_scaling_factor: multiplies the weights of the chosen experts.
        kv_lora_rank: width of the cached latent.
        q_lora_rank: width of the query's latent (``None``: a full query projection).
        qk_rope_head_dim: rotated dimensions of a head (latent attention).
        v_head_dim: value dimensions of a head (latent attention).
        qk_nope_head_dim: unrotated dimensions of a head (latent attention).
        topk_method: ``greedy``, ``group_limited_greedy`` or ``noaux_tc``.
        n_group: groups of experts (``None``: one).
        topk_group: groups kept for each token (``None``: one).
        num_experts_per_tok: experts chosen for each token.
        moe_layer_freq: every n-th layer is a mixture of experts.
        first_k_dense_replace: this many layers at the bottom stay dense.
        norm_topk_prob: normalise the chosen experts' weights to a sum of one.
        scoring_func: ``softmax`` or ``sigmoid``.
        aux_loss_alpha: weight of the load-balance loss while training.
        seq_aux: compute that loss for each sample instead of over the batch.
        hidden_act: activation of the MLPs.
        max_position_embeddings: positions the model was trained for.
        initializer_range: standard deviation of new weights.
        rms_norm_eps: epsilon of the RMS norms.
        use_cache: return a key/value cache by default.
        pad_token_id, bos_token_id, eos_token_id: ids used by ``generate``.
        pretraining_tp: kept for old configs; it never changed the result.
        tie_word_embeddings: share the embedding with the output head.
        rope_theta: base of the rotary frequencies.
        rope_scaling: old-style description, such as ``{"type": "yarn", "factor": 40}``.
        rope_parameters: new-style description, such as ``{"rope_type": "yarn", "rope_theta": 1e4, "factor": 40}``.
        attention_bias: bias in the attention projections.
        attention_dropout: dropout of the attention weights while training.
        use_mla: multi-head latent attention; plain multi-head attention otherwise.

    Raises:
        ValueError: an unknown choice, or sizes that do not fit each other.

    Source: ``configuration_deepseek.py`` of the original package.
    """

    model_type = "deepseek_v2"
    base_config_key = "language_config"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {"num_experts": "n_routed_experts"}  # the name that transformers' own quantizers ask for

    def __init__(
        self,
        vocab_size: int = 102400,
        hidden_size: int = 4096,
        intermediate_size: int = 11008,
        moe_intermediate_size: int = 1407,
        num_hidden_layers: int = 30,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = 32,
        n_shared_experts: int | None = None,
        n_routed_experts: int | None = None,
        ep_size: int = 1,
        routed_scaling_factor: float = 1.0,
        kv_lora_rank: int | None = 512,
        q_lora_rank: int | None = 1536,
        qk_rope_head_dim: int = 64,
        v_head_dim: int = 128,
        qk_nope_head_dim: int = 128,
        topk_method: str = "greedy",
        n_group: int | None = None,
        topk_group: int | None = None,
        num_experts_per_tok: int | None = None,
        moe_layer_freq: int = 1,
        first_k_dense_replace: int = 0,
        norm_topk_prob: bool = False,
        scoring_func: str = "softmax",
        aux_loss_alpha: float = 0.001,
        seq_aux: bool = True,
        hidden_act: str = "silu",
        max_position_embeddings: int = 2048,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = 100000,
        eos_token_id: int | list[int] | None = 100001,
        pretraining_tp: int = 1,
        tie_word_embeddings: bool = False,
        rope_theta: float = 10000.0,
        rope_scaling: dict[str, Any] | None = None,
        rope_parameters: dict[str, Any] | None = None,
        attention_bias: bool = False,
        attention_dropout: float = 0.0,
        use_mla: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.moe_intermediate_size = moe_intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.n_shared_experts = n_shared_experts
        self.n_routed_experts = n_routed_experts
        self.ep_size = ep_size
        self.routed_scaling_factor = routed_scaling_factor
        self.kv_lora_rank = kv_lora_rank
        self.q_lora_rank = q_lora_rank
        self.qk_rope_head_dim = qk_rope_head_dim
        self.v_head_dim = v_head_dim
        self.qk_nope_head_dim = qk_nope_head_dim
        # The original's default is the misspelt "gready", for which it has no branch.
        self.topk_method = "greedy" if topk_method == "gready" else topk_method
        self.n_group = n_group
        self.topk_group = topk_group
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_layer_freq = moe_layer_freq
        self.first_k_dense_replace = first_k_dense_replace
        self.norm_topk_prob = norm_topk_prob
        self.scoring_func = scoring_func
        self.aux_loss_alpha = aux_loss_alpha
        self.seq_aux = seq_aux
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = as_number("rms_norm_eps", rms_norm_eps)
        self.use_cache = use_cache
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pretraining_tp = pretraining_tp
        self.tie_word_embeddings = tie_word_embeddings
        self.rope_parameters = normalize_rope_parameters(rope_theta, rope_scaling, rope_parameters)
        self.attention_bias = attention_bias
        self.attention_dropout = attention_dropout
        self.use_mla = use_mla
        self._check()
        super().__init__(**kwargs)

    @property
    def rope_theta(self) -> float:
        """Base of the rotary frequencies."""
        return float(self.rope_parameters["rope_theta"])

    @property
    def rotary_dim(self) -> int:
        """Rotated dimensions of a head: the rope part under latent attention, else the whole head."""
        return self.qk_rope_head_dim if self.use_mla else self.hidden_size // self.num_attention_heads

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether decoder layer ``layer_idx`` (from 0) is a mixture of experts."""
        return (
            self.n_routed_experts is not None
            and layer_idx >= self.first_k_dense_replace
            and layer_idx % self.moe_layer_freq == 0
        )

    def _check(self) -> None:
        check_fields(self, FIELDS)
        check_choice("hidden_act", self.hidden_act, tuple(ACT2FN))
        check_choice("scoring_func", self.scoring_func, SCORING_FUNCTIONS)
        check_choice("topk_method", self.topk_method, TOPK_METHODS)
        if self.ep_size != 1:
            raise ValueError(f"ep_size={self.ep_size} is not supported: every process holds all experts (ep_size=1).")
        if self.use_mla:
            self._check_latent_attention()
        else:
            self._check_plain_attention()
        if self.n_routed_experts is not None:
            self._check_experts(self.n_routed_experts)

    def _check_latent_attention(self) -> None:
        for name in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or value <= 0:
                raise ValueError(f"use_mla=True needs a positive {name}, got {value!r}.")

    def _check_plain_attention(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}."
            )

    def _check_experts(self, n_routed_experts: int) -> None:
        top_k, groups, kept = self.num_experts_per_tok, self.n_group or 1, self.topk_group or 1
        if self.moe_layer_freq < 1:
            raise ValueError(f"moe_layer_freq must be at least 1, got {self.moe_layer_freq}.")
        if top_k is None or not 1 <= top_k <= n_routed_experts:
            raise ValueError(f"num_experts_per_tok must be within 1..{n_routed_experts}, got {top_k!r}.")
        if n_routed_experts % groups:
            raise ValueError(f"n_routed_experts {n_routed_experts} is not a multiple of n_group {groups}.")
        if kept > groups:
            raise ValueError(f"topk_group {kept} exceeds n_group {groups}.")
        group_size = n_routed_experts // groups
        if self.topk_method != "greedy" and top_k > kept * group_size:
            raise ValueError(f"{kept} groups of {group_size} experts cannot yield num_experts_per_tok {top_k}.")
        if self.topk_method == "noaux_tc" and group_size < 2:
            raise ValueError("noaux_tc ranks groups by their two best experts: each group needs at least two.")

"""Calibrated packing of a checkpoint: its layers run one after another over samples, and are packed for what they get.

One decoder layer is in memory at a time, beside the tower, the embedding and the samples' hidden states. Each layer is
measured behind layers that are packed already, so that it can make up for their errors too.

Shape suffixes: as in `moe`; L rows of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .calibrated_packing import product_error, quantize_for_inputs
from .moe import DeepseekV2Experts
from .quantization import PackedWeight, WeightFormat, dequantize, quantize

MODEL_INPUTS = ("input_ids", "attention_mask", "images", "images_seq_mask", "images_spatial_crop")
# An expert's inputs are few, or none: it leans on those of all tokens as if so many more had come to it.
TOKENS_OF_ALL = 16
LAYERS = "language.model.layers."


@dataclass(frozen=True)
class ProductError:
    """How wrong a packed matrix makes its products with the samples, norm over norm.

    Fields:
        name: of its layer; of experts, and of their part.
        plain: packed without the samples.
        calibrated: packed for them.
    """

    name: str
    plain: float
    calibrated: float


@dataclass
class Calibration:
    """Samples to pack int4 weights for, and what that gave.

    Fields:
        samples: the processor's batches of one prompt each.
        done: called after each decoder layer with its number, from 1, and how many there are.
        errors: of every matrix that was packed for the samples, in the model's order.
    """

    samples: Sequence[Mapping[str, Any]]
    done: Callable[[int, int], None] | None = None
    errors: list[ProductError] = field(default_factory=list)


class Moments:
    """Sums of outer products of what a layer's matrices multiply, by the names that `plan_formats` gives them."""

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.sums: dict[str, torch.Tensor] = {}

    @contextmanager
    def taken(self, model: nn.Module, formats: Mapping[str, WeightFormat]) -> Iterator[None]:
        """Collect them from what runs inside."""
        with ExitStack() as stack:
            owners = {name.rpartition(".")[0] for name in formats}
            for name, module in model.named_modules():
                if isinstance(module, nn.Linear) and name in formats:
                    stack.callback(module.register_forward_pre_hook(self._of_linear(name)).remove)
                elif isinstance(module, DeepseekV2Experts) and name in owners:
                    stack.callback(module.register_forward_pre_hook(self._of_experts(name)).remove)
            yield

    def _of_linear(self, name: str) -> Callable[..., None]:
        def take(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = inputs[0].flatten(0, -2).float()
            self._add(name, None, rows.T @ rows)

        return take

    def _of_experts(self, name: str) -> Callable[..., None]:
        def take(module: DeepseekV2Experts, inputs: tuple[torch.Tensor, ...]) -> None:
            hidden_NH, ids_NK, weights_NK = inputs
            of_all = _outer(hidden_NH, weights_NK.float().square().mean(dim=-1).sqrt())
            for expert in range(module.num_experts):
                tokens, places = (ids_NK == expert).nonzero(as_tuple=True)
                # An error counts as much as the expert's output does for the token.
                shares = weights_NK[tokens, places].float()
                rows_LH = hidden_NH[tokens]
                own = _outer(rows_LH, shares) + of_all * (TOKENS_OF_ALL / len(hidden_NH) / self.samples)
                self._add(f"{name}.gate_up_proj", (module.num_experts, expert), own)
                gate, up = F.linear(rows_LH.to(module.gate_up_proj.dtype), module.gate_up_proj[expert]).chunk(2, -1)
                self._add(f"{name}.down_proj", (module.num_experts, expert), _outer(module.act_fn(gate) * up, shares))

        return take

    def _add(self, name: str, place: tuple[int, int] | None, outer: torch.Tensor) -> None:
        count, index = place or (1, 0)
        if name not in self.sums:
            self.sums[name] = outer.new_zeros(count, *outer.shape)
        self.sums[name][index] += outer


def _outer(rows: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    weighted = rows.float() * shares[:, None]
    return weighted.T @ weighted


class CalibratedPacking:
    """Packs a checkpoint's int4 matrices for samples.

    Args:
        model: the model on the meta device; its modules are filled and emptied.
        state: the checkpoint's tensors in the model's names, which read themselves at ``value[...]``.
        formats: what `plan_formats` gives.
        scale_dtype: dtype of the scales, and the one that the layers run in.
        device: where they run.
    """

    def __init__(
        self,
        model: Any,
        state: Mapping[str, Any],
        formats: Mapping[str, WeightFormat],
        scale_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.model, self.state, self.formats = model, state, formats
        self.dtype, self.device = scale_dtype, device
        self.packed: dict[str, PackedWeight] = {}
        self.errors: list[ProductError] = []

    @torch.no_grad()
    def run(self, calibration: Calibration) -> dict[str, PackedWeight]:
        """Return the packed matrices, on the host, by their names.

        Raises:
            ValueError: there is no sample.
        """
        if not calibration.samples:
            raise ValueError("Calibration needs a sample at least.")
        decoder = self.model.language.model
        layers = decoder.layers
        self._fill([name for name in self.state if not name.startswith(LAYERS)])
        self.model.eval()
        hidden = [self._embed(sample) for sample in calibration.samples]
        norm, decoder.norm = decoder.norm, nn.Identity()
        for index, layer in enumerate(layers):
            prefix = f"{LAYERS}{index}."
            decoder.layers = layers  # where names find it
            self._fill([name for name in self.state if name.startswith(prefix)])
            decoder.layers = nn.ModuleList([layer])
            hidden = self._pack_layer(prefix, decoder, hidden)
            layer.to("meta")
            if calibration.done is not None:
                calibration.done(index + 1, len(layers))
        decoder.layers, decoder.norm = layers, norm
        self._pack_head(hidden)
        calibration.errors = self.errors
        return self.packed

    def _fill(self, names: Sequence[str]) -> None:
        """Read tensors of the checkpoint into the model's own places."""
        for name in names:
            parent, _, child = name.rpartition(".")
            try:
                module = self.model.get_submodule(parent)
            except AttributeError:
                continue  # tensors that releases carry and that never run
            tensor = self.state[name][...].to(self.device)
            if child in module._buffers:
                module._buffers[child] = tensor
            elif child in module._parameters:
                module._parameters[child] = nn.Parameter(tensor.to(self.dtype), requires_grad=False)

    def _embed(self, sample: Mapping[str, Any]) -> torch.Tensor:
        inputs = {name: sample[name].to(self.device) for name in MODEL_INPUTS if sample.get(name) is not None}
        embeds: torch.Tensor = self.model.prepare_inputs_embeds(**inputs)
        return embeds.to("cpu", self.dtype)

    def _run(self, decoder: Any, hidden: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        for embeds in hidden:
            yield decoder(inputs_embeds=embeds.to(self.device), use_cache=False).last_hidden_state.cpu()

    def _pack_layer(self, prefix: str, decoder: Any, hidden: list[torch.Tensor]) -> list[torch.Tensor]:
        """Pack a layer's matrices and return what it gives with them."""
        inside = {name: fmt for name, fmt in self.formats.items() if name.startswith(prefix)}
        # In the decoder's own names, where the layer is the only one.
        renamed = {f"layers.0.{name.removeprefix(prefix)}": fmt for name, fmt in inside.items()}
        moments = Moments(len(hidden))
        with moments.taken(decoder, renamed):
            for _ in self._run(decoder, hidden):
                pass
        for name, short in zip(inside, renamed, strict=True):
            self._pack(name, decoder, short, moments)
        return list(self._run(decoder, hidden))

    def _pack_head(self, hidden: list[torch.Tensor]) -> None:
        language = self.model.language
        name = "language.lm_head"
        if name not in self.formats:
            return
        moments = Moments(len(hidden))
        with moments.taken(language, {"lm_head": self.formats[name]}):
            for states in hidden:
                language.lm_head(language.model.norm(states.to(self.device)))
        self._pack(name, language, "lm_head", moments)

    def _pack(self, name: str, owner: nn.Module, short: str, moments: Moments) -> None:
        """Pack one matrix for its moments, and put what it stands for in its place."""
        fmt = self.formats[name]
        parameter = owner.get_parameter(short if is_of_experts(owner, short) else f"{short}.weight")
        weight = parameter.data if parameter.dim() == 3 else parameter.data[None]
        if fmt.kind == "int4":
            sums = moments.sums[short]
            plain = quantize(weight, fmt, self.dtype)
            packed = quantize_for_inputs(weight, sums, fmt, self.dtype)
            errors = (product_error(weight, given, fmt, sums) for given in (plain, packed))
            self.errors.append(ProductError(name, *errors))
        else:
            packed = quantize(weight, fmt, self.dtype)
        is_one = parameter.dim() == 2
        parameter.data = dequantize(packed, fmt, self.dtype).view_as(parameter)
        self.packed[name] = PackedWeight(*((part[0] if is_one else part).cpu() for part in packed))


def is_of_experts(owner: nn.Module, name: str) -> bool:
    """Whether a name that `plan_formats` gives is one of fused experts and their part."""
    return isinstance(owner.get_submodule(name.rpartition(".")[0]), DeepseekV2Experts)

"""Modules whose weights wait on the host or the disk and visit a device when they run, as accelerate leaves them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def execution_device(module: nn.Module, weight: torch.Tensor) -> torch.device:
    """Return where a module computes: where its weight is, or where an offloaded one visits."""
    if weight.device.type != "meta":
        return weight.device
    return torch.device(getattr(getattr(module, "_hf_hook", None), "execution_device", None) or "cpu")


@contextmanager
def visiting(module: nn.Module) -> Iterator[None]:
    """Have a module's own parameters, not its children's, where they are used outside its forward pass."""
    hook: Any = getattr(module, "_hf_hook", None)
    if hook is None or not any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def without_overlaps(model: nn.Module, device_map: Mapping[str, Any]) -> dict[str, Any]:
    """Return a device map in which no entry holds another, as accelerate needs them.

    ``{"": "cpu", "language.model.layers.2": "disk"}`` reads as it says then: all but that layer on the CPU.

    Args:
        model: with any weights or none.
        device_map: places by names of modules or parameters; the longest name counts.

    Raises:
        ValueError: some weights shall be nowhere ("meta") and others somewhere.
    """
    places = {str(place) for place in device_map.values()}
    if "meta" in places and len(places) > 1:
        raise ValueError('A device_map with "meta" beside other places would leave weights without values.')
    modules = dict(model.named_modules())
    children: dict[str, list[str]] = {}
    for name in (*modules, *model.state_dict()):
        if name:
            children.setdefault(name.rpartition(".")[0], []).append(name)

    def entries(name: str, place: Any) -> Iterator[tuple[str, Any]]:
        inner = [key for key in device_map if key != name and (not name or key.startswith(f"{name}."))]
        if not inner or name not in children:
            # accelerate brings back modules, not single parameters: those, a few vectors, stay on the host.
            yield name, "cpu" if place == "disk" and name not in modules else place
            return
        for child in children[name]:
            if child in device_map:
                continue  # has an entry of its own
            yield from entries(child, place)

    return dict(entry for name, place in device_map.items() for entry in entries(name, place))

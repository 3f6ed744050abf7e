"""A watched module's changes are noticed, whatever part of it they touch, and nothing else is."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from deepseek_vl2.engine.fingerprint import ModuleFingerprint


class Small(nn.Module):
    """Two layers, a buffer and a setting."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.Linear(4, 4, bias=False))
        self.register_buffer("scale", torch.ones(4))
        self.backend = "one"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x) * self.scale


class Other(nn.Linear):
    """A linear layer of another class."""


def double_of(module: Any) -> None:
    module.layers[0].weight.data = module.layers[0].weight.data.clone()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a weight": lambda m: setattr(m.layers[0], "weight", nn.Parameter(m.layers[0].weight.detach())),
    "a weight's memory": double_of,
    "a bias that was none": lambda m: setattr(m.layers[2], "bias", nn.Parameter(torch.zeros(4))),
    "a buffer": lambda m: setattr(m, "scale", torch.ones(4)),
    "a submodule": lambda m: m.layers.__setitem__(1, nn.Dropout(0.1)),
    "another submodule": lambda m: m.layers.append(nn.Identity()),
    "a class": lambda m: setattr(m.layers[0], "__class__", Other),
    "a setting": lambda m: setattr(m, "backend", "two"),
    "a setting deep down": lambda m: setattr(m.layers[1], "p", 0.5),
    "a new attribute": lambda m: setattr(m.layers[1], "forward", lambda x: x),
    "a hook": lambda m: m.layers[2].register_forward_hook(lambda *args: None),
    "a hook before": lambda m: m.layers[2].register_forward_pre_hook(lambda *args: None),
    "training": lambda m: m.layers[1].eval(),
    "the dtype": lambda m: m.double(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed(name: str) -> None:
    module = Small()
    fingerprint = ModuleFingerprint(module)
    assert fingerprint.matches()
    CHANGES[name](module)
    assert not fingerprint.matches()
    assert ModuleFingerprint(module).matches()


def test_use_is_no_change() -> None:
    module = Small()
    fingerprint = ModuleFingerprint(module)
    module(torch.ones(2, 4)).sum().backward()
    with torch.no_grad():
        module.layers[0].weight += 1
    assert fingerprint.matches()


def test_a_hook_that_goes_again_leaves_nothing() -> None:
    module = Small()
    fingerprint = ModuleFingerprint(module)
    hook = module.layers[0].register_forward_hook(lambda *args: None)
    hook.remove()
    assert fingerprint.matches()


def test_the_module_is_not_kept_alive() -> None:
    module = Small()
    fingerprint, held = ModuleFingerprint(module), weakref.ref(module)
    del module
    gc.collect()
    assert held() is None and fingerprint.full

"""Whether a module is still what it was when all of it was looked at: quick enough to be asked before every call."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from operator import is_
from typing import Any

import torch

# Of what a module holds, beside its attributes: the dictionaries in which parts and hooks come and go.
HOLDINGS = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")


class ModuleFingerprint:
    """Remembers every attribute, weight, submodule and hook of a module and of all modules below it.

    Nothing is called that belongs to a module, and nearly all of the work is done in C: looking through some 500
    modules takes a few tenths of a millisecond, where walking over them takes several. The module itself is not kept
    alive, only what it holds.

    Another object in the place of one counts as a change, even where the two are equal. What is changed within an
    attribute, such as a list or a config, does not, and neither do numbers written into a weight.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        states: list[dict[str, Any]] = [vars(part) for part in module.modules()]
        parts = [*states, *(state[name] for state in states for name in HOLDINGS)]
        self.full = [part for part in parts if part]
        self.empty = [part for part in parts if not part]
        self.lengths = [len(part) for part in self.full]
        self.values = list(values_of(self.full))
        self.children = [state["_modules"] for state in states if state["_modules"]]
        self.types = list(map(type, values_of(self.children)))
        self.tensors = [*module.parameters(), *module.buffers()]
        self.addresses = addresses_of(self.tensors)

    def matches(self) -> bool:
        """Whether nothing has changed."""
        return (
            not any(self.empty)
            and list(map(len, self.full)) == self.lengths
            and all(map(is_, values_of(self.full), self.values))
            and all(map(is_, map(type, values_of(self.children)), self.types))
            and addresses_of(self.tensors) == self.addresses
        )


def values_of(parts: Iterable[dict[str, Any]]) -> Iterable[Any]:
    """Return the values of dictionaries, one after the other."""
    return chain.from_iterable(map(dict.values, parts))


def addresses_of(tensors: Iterable[torch.Tensor]) -> list[int]:
    """Return where tensors lie: captured graphs hold these addresses."""
    return list(map(torch.Tensor.data_ptr, tensors))

"""Whether the engine launches work for a GPU: meanwhile, other threads leave the interpreter to it.

Python runs one thread at a time, and each operation that PyTorch launches lets another one in. A pass of some hundred
launches, beside threads that decode pictures, would wait for its turn some hundred times while the GPU has nothing to
do.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

# A graph that is captured, or a kernel compiled, takes longer: nobody waits for those.
LONGEST_SECONDS = 0.05


class Launching:
    """A context of the thread that launches; others `wait` where they are about to work for a while."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._over.set()

    def __enter__(self) -> None:
        self._over.clear()

    def __exit__(self, *exception: object) -> None:
        self._over.set()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Let others work while the thread that launches waits for the device."""
        active = self.active
        self._over.set()
        try:
            yield
        finally:
            if active:
                self._over.clear()

    @property
    def active(self) -> bool:
        """Whether something is launched."""
        return not self._over.is_set()

    def wait(self) -> None:
        """Wait while something is launched, for a moment at most."""
        self._over.wait(LONGEST_SECONDS)

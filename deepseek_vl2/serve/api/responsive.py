"""How the process of a server is set, so that no thread keeps the others waiting, the event loop above all."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator

from PIL import Image

# How long a thread may keep the interpreter that another waits for. By default ten times that, which is as long as
# several decoding steps.
SWITCH_SECONDS = 0.0005
# Pillow's pixels lie in blocks, by default of 16 MiB. Those glibc may take from memory that was used before, and Pillow
# has it zeroed while it holds the interpreter's lock: 200 ms for a picture of 50 megapixels. What is larger than 32 MiB
# comes from the kernel, which gives zeros page by page when a pixel is first written, without the lock.
BLOCK_BYTES = 64 << 20


@contextlib.contextmanager
def responsive() -> Iterator[None]:
    """Keep waits short while the block runs.

    What was imported and loaded before stays: a collection that looked at all of it would stop every thread for a third
    of a second.
    """
    seconds, block_bytes = sys.getswitchinterval(), Image.core.get_block_size()
    sys.setswitchinterval(SWITCH_SECONDS)
    Image.core.set_block_size(BLOCK_BYTES)
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        Image.core.set_block_size(block_bytes)
        sys.setswitchinterval(seconds)

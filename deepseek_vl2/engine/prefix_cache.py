"""Which prompts begin like one whose keys and values are still held."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from .kv_cache import Extent

BLOCK = 32


def block_hashes(
    ids: Sequence[int], images: Sequence[tuple[int, int, bytes]] = (), known: Sequence[bytes] = ()
) -> list[bytes]:
    """Return a hash for each whole block of a prompt, which stands for all that comes before it too.

    Args:
        ids: the prompt's ids.
        images: of each image, the index of its first token, of the one behind its last, and a key of its content.
        known: the hashes of its first blocks, where they were made before.
    """
    hashes = list(known)
    previous, begin = hashes[-1] if hashes else b"", len(hashes) * BLOCK
    words = array("q", ids[begin:])
    numbers = memoryview(words.tobytes())
    for start in range(begin, len(ids) - BLOCK + 1, BLOCK):
        digest = blake2b(previous, digest_size=16)
        offset = (start - begin) * words.itemsize
        digest.update(numbers[offset : offset + BLOCK * words.itemsize])
        for first, last, key in images:
            if first < start + BLOCK and last > start:
                digest.update(first.to_bytes(8, "little") + key)
        previous = digest.digest()
        hashes.append(previous)
    return hashes


@dataclass(eq=False)
class Prefix:
    """A sequence's cached tokens.

    Fields:
        extent: where they lie.
        hashes: of their blocks.
        idle: nobody writes to the extent any more: it may be evicted.
    """

    extent: Extent
    hashes: list[bytes]
    idle: bool = False


class PrefixCache:
    """Cached prefixes by the hashes of their blocks; those used longest ago go first.

    Fields:
        hits: prompts that began like a held one.
        tokens_saved: tokens that were not computed again.
    """

    def __init__(self) -> None:
        self._by_hash: dict[bytes, Prefix] = {}
        self._idle: OrderedDict[int, Prefix] = OrderedDict()
        self.hits = 0
        self.tokens_saved = 0

    @property
    def idle_tokens(self) -> int:
        """Tokens held for prompts to come."""
        return sum(prefix.extent.capacity for prefix in self._idle.values())

    def match(self, hashes: Sequence[bytes]) -> tuple[Prefix, int] | None:
        """Return the prefix that shares most blocks, and how many tokens those are."""
        for index in range(len(hashes) - 1, -1, -1):
            prefix = self._by_hash.get(hashes[index])
            if prefix is not None:
                if prefix.idle:
                    self._idle.move_to_end(id(prefix))
                return prefix, (index + 1) * BLOCK
        return None

    def add(self, prefix: Prefix) -> None:
        """Hold a prefix, whose tokens are all written or will be before what is asked of them next."""
        for block in prefix.hashes:
            self._by_hash.setdefault(block, prefix)

    def retire(self, prefix: Prefix) -> bool:
        """Let an idle prefix be evicted from now on; returns whether it is of use to anyone."""
        if not any(self._by_hash.get(block) is prefix for block in prefix.hashes):
            return False
        prefix.idle = True
        self._idle[id(prefix)] = prefix
        return True

    def forget(self, prefix: Prefix) -> None:
        """Drop a prefix."""
        self._idle.pop(id(prefix), None)
        for block in prefix.hashes:
            if self._by_hash.get(block) is prefix:
                del self._by_hash[block]

    def hold(self, prefix: Prefix) -> None:
        """Keep an idle prefix from being evicted until `let_go`."""
        self._idle.pop(id(prefix), None)

    def let_go(self, prefix: Prefix) -> None:
        """Let an idle prefix be evicted again."""
        self._idle[id(prefix)] = prefix

    def evict(self) -> Prefix | None:
        """Drop the prefix used longest ago and return it; ``None``: there is no idle one."""
        if not self._idle:
            return None
        prefix = next(iter(self._idle.values()))
        self.forget(prefix)
        return prefix

"""What the engine keeps of prompts and images seen: what counts as the same, and how much of it is held."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from deepseek_vl2.engine.image_cache import ImageCache
from deepseek_vl2.engine.kv_cache import Extent
from deepseek_vl2.engine.prefix_cache import BLOCK, Prefix, PrefixCache, block_hashes
from deepseek_vl2.engine.request import Prompt, PromptImages
from deepseek_vl2.models.tiling import TileGrid, count_image_tokens

IDS = list(range(4 * BLOCK))
ONE_TILE = TileGrid(1, 1)


def blocks_alike(a: list[bytes], b: list[bytes]) -> list[bool]:
    return [x == y for x, y in zip(a, b, strict=True)]


# ---------------------------------------------------------------- prefixes


def test_only_whole_blocks_have_a_hash() -> None:
    assert len(block_hashes(IDS)) == 4 and len(block_hashes(IDS[:-1])) == 3 and block_hashes(IDS[: BLOCK - 1]) == []
    assert block_hashes(IDS)[:3] == block_hashes(IDS[:-1])


def test_a_block_stands_for_all_that_comes_before_it() -> None:
    other = [7777, *IDS[1:]]
    assert blocks_alike(block_hashes(IDS), block_hashes(other)) == [False] * 4
    later = [*IDS[:BLOCK], 7777, *IDS[BLOCK + 1 :]]
    assert blocks_alike(block_hashes(IDS), block_hashes(later)) == [True, False, False, False]


def test_blocks_behind_different_pictures_differ() -> None:
    """The ids of image tokens are the same whatever the picture."""
    span = (BLOCK + 3, 2 * BLOCK + 5)
    red, blue = (block_hashes(IDS, [(*span, key)]) for key in (b"red", b"blue"))
    assert blocks_alike(red, blue) == [True, False, False, False]
    assert blocks_alike(red, block_hashes(IDS, [(span[0] + 1, span[1], b"red")])) == [True, False, False, False]
    assert blocks_alike(red, block_hashes(IDS)) == [True, False, False, False]
    both = [block_hashes(IDS, [(0, 9, a), (9, 18, b)]) for a, b in ((b"red", b"blue"), (b"blue", b"red"))]
    assert blocks_alike(*both) == [False] * 4


def test_hashes_go_on_from_those_that_are_known() -> None:
    images = [(3, 2 * BLOCK + 5, b"red")]
    for known in range(5):
        assert block_hashes(IDS, images, block_hashes(IDS, images)[:known]) == block_hashes(IDS, images)


def test_a_prompt_with_its_answer_is_hashed_as_one_that_holds_both() -> None:
    ids, answer = [5] * (2 * BLOCK - 3), [6] * (BLOCK + 4)
    assert prompt(ids, b"red").hashes_with(answer) == prompt([*ids, *answer], b"red").hashes()
    assert prompt(ids, b"red").hashes_with(answer) != prompt(ids, b"blue").hashes_with(answer)


def prompt(ids: list[int], key: bytes, grid: TileGrid = ONE_TILE) -> Prompt:
    """Return a prompt that begins with a picture of tiles of 2 x 2 tokens."""
    count = count_image_tokens(grid, 2)
    mask = torch.arange(len(ids)) < count
    images = PromptImages(SimpleNamespace(image_token_side=2), [grid], mask, lambda device: torch.empty(0), [key])
    return Prompt(ids, images, shared=True)


def test_a_prompt_is_known_by_its_pictures_and_their_tiling() -> None:
    ids = [5] * (2 * BLOCK)
    assert prompt(ids, b"red").hashes() == prompt(ids, b"red").hashes() != prompt(ids, b"blue").hashes()
    across, down = (prompt(ids, b"red", grid) for grid in (TileGrid(2, 1), TileGrid(1, 2)))
    assert across.hashes() != down.hashes()
    assert {each.images.key(0) for each in (across, down, prompt(ids, b"red"))} == {  # type: ignore[union-attr]
        b"red\x02\x01",
        b"red\x01\x02",
        b"red\x01\x01",
    }
    alone = prompt(ids, b"red")
    alone.shared = False
    assert alone.hashes() == []


def held(*hashes: bytes) -> Prefix:
    return Prefix(Extent(0, BLOCK * len(hashes)), list(hashes))


def test_the_longest_beginning_is_found() -> None:
    cache, short, long = PrefixCache(), held(b"1"), held(b"1", b"2", b"3")
    cache.add(short)
    cache.add(long)
    assert cache.match([b"0"]) is None and cache.match([]) is None
    assert cache.match([b"1", b"x"]) == (short, BLOCK)
    assert cache.match([b"1", b"2", b"x"]) == (long, 2 * BLOCK)


def test_idle_prefixes_go_in_the_order_of_their_last_use() -> None:
    cache, first, second, busy = PrefixCache(), held(b"1"), held(b"2", b"3"), held(b"4")
    for prefix in (first, second, busy):
        cache.add(prefix)
    assert cache.retire(first) and cache.retire(second) and cache.idle_tokens == 3 * BLOCK
    cache.match([b"1"])
    assert cache.evict() is second and cache.match([b"2", b"3"]) is None
    cache.hold(first)
    assert cache.evict() is None  # somebody copies from it
    cache.let_go(first)
    assert cache.evict() is first and cache.evict() is None and cache.match([b"4"]) == (busy, BLOCK)
    assert not cache.retire(held(b"4"))  # another one stands for all its blocks


# ---------------------------------------------------------------- images


def test_images_are_held_up_to_their_bytes_and_those_used_longest_ago_go() -> None:
    cache, parts = ImageCache(100), {key: torch.full((2, 5), ord(key), dtype=torch.float32) for key in "abc"}
    for key in "ab":
        cache.put(key.encode(), parts[key])
    assert (len(cache), cache.bytes) == (2, 80) and cache.get(b"a") is not None
    cache.put(b"c", parts["c"])
    assert (len(cache), cache.bytes) == (2, 80) and cache.get(b"b") is None
    assert all(torch.equal(cache.get(key.encode()), parts[key]) for key in "ac")  # type: ignore[arg-type]
    assert (cache.hits, cache.misses) == (3, 1)
    cache.put(b"d", torch.zeros(3, 5, dtype=torch.float64))  # of 120 bytes: larger than all that may be held
    cache.put(b"c", parts["c"])
    cache.put(None, parts["b"])
    assert (len(cache), cache.bytes) == (2, 80) and cache.get(None) is None


def test_what_is_held_does_not_keep_a_pass_alive() -> None:
    cache, whole = ImageCache(1000), torch.ones(100, 5)
    cache.put(b"a", whole[:2])
    whole.zero_()
    found = cache.get(b"a")
    assert found is not None and bool((found == 1).all()) and found.untyped_storage().nbytes() == 40

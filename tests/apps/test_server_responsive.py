"""What would keep the event loop waiting is cut into pieces, left to other processes, or not done."""

from __future__ import annotations

import asyncio
import gc
import inspect
import io
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest
from fastapi.routing import APIRoute
from PIL import Image, features
from server_support import chat_body, make_server, post

from deepseek_vl2.engine import request
from deepseek_vl2.engine.request import Delta
from deepseek_vl2.models.image_loading import load_image
from deepseek_vl2.serve.api.decode_process import MOST_PIXELS_HERE, Decoders
from deepseek_vl2.serve.api.errors import ApiError
from deepseek_vl2.serve.api.images import decode_images, payload_of
from deepseek_vl2.serve.api.replies import StreamedReply
from deepseek_vl2.serve.api.responsive import BLOCK_BYTES, SWITCH_SECONDS
from deepseek_vl2.serve.api.settings import ImageLimits
from deepseek_vl2.utils.demo import demo_checkpoint
from deepseek_vl2.utils.io import load_pretrained_model

SIZE = (1301, 803)  # more than MOST_PIXELS_HERE, and no whole number of bands


@pytest.fixture(scope="module")
def decoders() -> Iterator[Decoders]:
    """Return processes that decode."""
    decoders = Decoders(processes=1)
    yield decoders
    decoders.stop()


def noise(mode: str) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE[1] // 8 + 1, SIZE[0] // 8 + 1, len(mode)), dtype=np.uint8)
    return Image.fromarray(pixels).resize(SIZE)


def file_of(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read(decoders: Decoders, *files: bytes) -> list[Image.Image]:
    return decode_images([(f"messages.{i}", file) for i, file in enumerate(files)], ImageLimits(), decoders)


def test_collections_look_at_nothing_that_was_loaded() -> None:
    _, processor, model = load_pretrained_model(demo_checkpoint(), device="cpu")
    gc.unfreeze()  # conftest.py has frozen much
    before = gc.get_freeze_count(), sys.getswitchinterval(), Image.core.get_block_size()
    with make_server(model, processor) as server:
        assert post(server, chat_body())[0] == 200
        assert len(gc.get_objects()) < gc.get_freeze_count() / 10
        assert sys.getswitchinterval() == pytest.approx(SWITCH_SECONDS)
        assert Image.core.get_block_size() == BLOCK_BYTES
    assert (gc.get_freeze_count(), sys.getswitchinterval(), Image.core.get_block_size()) == before


def test_a_request_changes_threads_to_be_prepared_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain functions would be called in threads of FastAPI's; the engine's has more to do than to hash prompts."""
    hashed_in: list[str] = []
    hash_blocks = request.block_hashes

    def noted(ids: Any, images: Any = (), known: Any = ()) -> list[bytes]:
        if not known:
            hashed_in.append(threading.current_thread().name)
        return hash_blocks(ids, images, known)

    monkeypatch.setattr(request, "block_hashes", noted)
    _, processor, model = load_pretrained_model(demo_checkpoint(), device="cpu")
    with make_server(model, processor, api_keys=("key",)) as server:
        routes = [route for route in server.server.app.routes if isinstance(route, APIRoute)]
        calls = [each.call for route in routes for each in (route.dependant, *route.dependant.dependencies)]
        assert len(calls) > len(routes) and all(map(inspect.iscoroutinefunction, calls))
        assert post(server, chat_body("One block of tokens " * 8))[0] == 401
        assert post(server, chat_body("One block of tokens " * 8), Authorization="Bearer key")[0] == 200
    assert hashed_in and "engine" not in hashed_in


def test_events_of_one_moment_are_one_write() -> None:
    class Spoken(StreamedReply):
        def opening(self) -> list[bytes]:
            return [b"opening "]

        def pieces(self, found: tuple[int, Delta]) -> list[bytes]:
            return [found[1].text.encode(), b" "]

        def closing(self) -> list[bytes]:
            return [b"usage ", b"end"]

    async def later() -> AsyncIterator[tuple[int, Delta]]:
        yield 0, Delta("second", [], 2)

    async def written(first: tuple[int, Delta] | None) -> list[bytes]:
        reply = Spoken()
        reply.answers = later()  # type: ignore[assignment]
        return [events async for events in reply.stream(first)]

    assert asyncio.run(written((0, Delta("first", [], 1)))) == [b"opening first ", b"second ", b"usage end"]
    assert asyncio.run(written(None)) == [b"opening ", b"second ", b"usage end"]


KINDS = ["WEBP", *(["AVIF"] if features.check("avif") else [])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_decoders_that_hold_the_lock_work_elsewhere(decoders: Decoders, kind: str, mode: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = file_of(noise(mode), kind, exif=exif)
    (found,) = read(decoders, file)
    expected = load_image(file)
    assert decoders.running == 1
    assert found.size == expected.size == SIZE[::-1]
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_an_orientation_of_xmp_counts_there_too(decoders: Decoders, kind: str) -> None:
    xmp = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    )
    file = file_of(noise("RGB"), kind, xmp=xmp.encode())
    assert read(decoders, file)[0].tobytes() == load_image(file).tobytes()
    assert load_image(file).size == SIZE[::-1]


def test_small_and_other_images_are_decoded_here() -> None:
    decoders = Decoders()
    small = noise("RGB").resize((1000, MOST_PIXELS_HERE // 1000))
    read(decoders, file_of(small, "WEBP"), file_of(noise("RGB"), "PNG"), file_of(noise("RGB"), "JPEG"))
    assert decoders.running == 0


def test_damaged_files_and_dead_decoders(decoders: Decoders, monkeypatch: pytest.MonkeyPatch) -> None:
    file = file_of(noise("RGB"), "WEBP")
    with pytest.raises(ApiError, match="The image is damaged"):
        read(decoders, file[: len(file) // 2])
    assert decoders.running == 1  # it says what is wrong, and goes on
    decoders.stop()
    assert decoders.running == 0
    assert read(decoders, file)[0].size == SIZE
    impatient = Decoders(processes=1, seconds=0.001)  # less than it takes to start
    with pytest.raises(ApiError, match=r"took more than 0\.001 seconds"):
        read(impatient, file)
    assert impatient.running == 0


def test_a_picture_is_laid_over_white_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepseek_vl2.models import image_modes

    laid: list[int] = []
    compose = Image.Image.alpha_composite

    def noted(self: Image.Image, image: Image.Image, *args: Any) -> None:
        laid.append(image.width * image.height)
        compose(self, image, *args)

    monkeypatch.setattr(Image.Image, "alpha_composite", noted)
    image = noise("RGBA")
    whole = Image.new("RGBA", SIZE, "white")
    compose(whole, image)
    for pixels in (image_modes.BLOCK_PIXELS, 5000, 999):  # rows at a time, and parts of a row
        laid.clear()
        monkeypatch.setattr(image_modes, "BLOCK_PIXELS", pixels)
        assert load_image(image).tobytes() == whole.convert("RGB").tobytes()
        assert max(laid) <= pixels and sum(laid) == SIZE[0] * SIZE[1]


def test_where_the_base64_of_a_url_is() -> None:
    url = "data:image/png;base64,QUJD"
    assert payload_of(url) == (22, 26)
    assert payload_of(url + "=\n = " * 300_000) == (22, 26)
    assert payload_of("data:;base64,") == (13, 13)
    for wrong in ("data:image/png;base64", "data:image/png,QUJD", "data:" + "x" * 2000 + ";base64,QUJD", ""):
        assert payload_of(wrong) is None

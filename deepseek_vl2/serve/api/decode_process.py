"""Large images whose decoders hold the interpreter's lock are decoded in processes of their own.

Pillow decodes JPEG, PNG and most others while other threads run. Not so WebP: one of 50 megapixels kept all threads
waiting for a second, the event loop included.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from typing import Any

from PIL import Image

from .decode_worker import bands_of, header_of

WORKER = "deepseek_vl2.serve.api.decode_worker"
FORMATS = frozenset(("WEBP", "AVIF", "HEIF"))
# Up to here they are decoded where they are, which takes up to some 20 ms.
MOST_PIXELS_HERE = 1_000_000
PROCESSES = 2
SECONDS = 30.0  # for one image


class DecodeProcess:
    """A process that decodes one image at a time; it is started when it is needed first, and again when it died.

    Args:
        seconds: after which an image is given up.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.process: subprocess.Popen[bytes] | None = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self.process is None or self.process.poll() is not None:
            self.stop()
            path = os.pathsep.join(entry for entry in sys.path if entry)
            self.process = subprocess.Popen(
                [sys.executable, "-m", WORKER],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path},
            )  # fmt: skip
        return self.process

    def decode(self, data: bytes, kind: str) -> Image.Image:
        """Return a file's image, decoded and upright; ``kind``: its format.

        Raises:
            ValueError: it is damaged, or takes too long.
        """
        process = self._running()
        timer = threading.Timer(self.seconds, process.kill)
        timer.daemon = True
        timer.start()
        try:
            found = self._exchange(process, data, kind)
        except (OSError, EOFError) as error:
            self.stop()
            raise ValueError(f"its decoder failed, or took more than {self.seconds:g} seconds") from error
        except BaseException:
            self.stop()  # what is left in the pipe is of no use
            raise
        finally:
            timer.cancel()
        if isinstance(found, str):
            raise ValueError(found)
        return found

    @staticmethod
    def _exchange(process: subprocess.Popen[bytes], data: bytes, kind: str) -> Image.Image | str:
        """Return a file's image, or what is wrong with it."""
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(header_of(data, kind))
        process.stdin.write(data)
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise EOFError
        told: dict[str, Any] = json.loads(line)
        if "problem" in told:
            return str(told["problem"])
        width, height = told["size"]
        image = Image.new(told["mode"], (width, height))
        row_bytes = len(Image.new(told["mode"], (width, 1)).tobytes())
        for top, bottom in bands_of((width, height)):
            rows = Image.new(told["mode"], (width, bottom - top))
            pixels = process.stdout.read(row_bytes * (bottom - top))
            if len(pixels) < row_bytes * (bottom - top):
                raise EOFError
            rows.frombytes(pixels)
            image.paste(rows, (0, top))
        return image

    def stop(self) -> None:
        """End the process."""
        process, self.process = self.process, None
        if process is None:
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # what was never sent
                pipe.close()
        process.wait()


class Decoders:
    """A few processes that decode; more images than that wait for one.

    Args:
        processes: how many.
        seconds: after which an image is given up.
    """

    def __init__(self, processes: int = PROCESSES, seconds: float = SECONDS) -> None:
        self._all = [DecodeProcess(seconds) for _ in range(processes)]
        self._idle: queue.LifoQueue[DecodeProcess] = queue.LifoQueue()
        for process in reversed(self._all):
            self._idle.put(process)

    @property
    def running(self) -> int:
        """How many processes there are; they are started when they are needed."""
        return sum(each.process is not None and each.process.poll() is None for each in self._all)

    @staticmethod
    def wanted(image: Image.Image) -> bool:
        """Whether an image, opened and not decoded, is to be decoded in a process."""
        return image.format in FORMATS and image.width * image.height > MOST_PIXELS_HERE

    def decode(self, data: bytes, kind: str) -> Image.Image:
        """Return a file's image; arguments and errors as `DecodeProcess.decode`."""
        process = self._idle.get()
        try:
            return process.decode(data, kind)
        finally:
            self._idle.put(process)

    def stop(self) -> None:
        """End the processes, whatever they are doing."""
        for process in self._all:
            process.stop()

"""Products of one row, and experts and attention of a few, in bfloat16 on x86 CPUs: what a decoded token is made of.

PyTorch and oneDNN multiply by such weights at half to two thirds of the speed at which memory gives them; `decode.c` at
that speed, with few calls a layer. It is compiled at the first use by the C compiler of the system, as Triton does with
its launchers, which takes less than a second, and stays in the user's cache folder. Without a compiler all runs as
before.

Each function stands beside the plain form that defines it, in `deepseek_vl2.models`: `F.linear`, `DeepseekV2RMSNorm`,
`DeepseekV2MLP`, `one_token_experts_forward` and `one_query_attention_forward`. All round where these round, and sum in
another order.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .. import SWITCH, turned_off

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("decode.c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-Wno-psabi", "-std=gnu11")
# Names under which the library comes that runs PyTorch's threads; ours shall be the same ones.
THREAD_LIBRARIES = ("libgomp", "libiomp5")
COMPILING_TAKES_AT_MOST_S = 60

POINTER, INTEGER, THREADS, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
ARGUMENTS: dict[str, list[type]] = {
    "linear": [POINTER] * 4 + [INTEGER] * 2 + [THREADS],
    "logits": [POINTER] * 3 + [INTEGER] * 2 + [THREADS],
    "queries_keys_values": [POINTER] * 7 + [INTEGER] * 4 + [THREADS],
    "rms_norm": [POINTER] * 3 + [INTEGER] * 2 + [REAL],
    "mlp": [POINTER] * 5 + [INTEGER] * 2 + [THREADS],
    "experts": [POINTER] * 6 + [INTEGER] * 5 + [THREADS],
    "attend": [POINTER] * 6 + [INTEGER] * 8 + [REAL, THREADS],
    "attend_latents": [POINTER] * 7 + [INTEGER] * 6 + [REAL, THREADS],
}

# Most rows of norms and experts, as in the C file.
MOST_ROWS = 64
OK, NO_MEMORY = 0, 1


class Unavailable(RuntimeError):
    """Says why the library cannot be had here."""


def _lines_of(path: str) -> list[str]:
    return Path(path).read_text(errors="surrogateescape").splitlines()


def _cpu_flags() -> str:
    """Return what names the instructions of this CPU: a library compiled for another one must not be taken."""
    for line in _lines_of("/proc/cpuinfo"):
        if line.startswith("flags"):
            return line
    return ""


def _compilers() -> list[str]:
    """Return the C compilers there are, best first. clang needs an OpenMP library of its own, which PyTorch has not."""
    names = [name for name in (os.environ.get("CC"), "gcc", "cc") if name]
    return list(dict.fromkeys(found for name in names if (found := shutil.which(name))))


def thread_library() -> str:
    """Return the path of the OpenMP library that PyTorch has loaded."""
    loaded = {line.split(None, 5)[-1] for line in _lines_of("/proc/self/maps") if "/" in line}
    paths = [path for path in sorted(loaded) if Path(path).name.startswith(THREAD_LIBRARIES)]
    # PyTorch's own before one that another package brought.
    paths.sort(key=lambda path: Path(torch.__file__).parent not in Path(path).parents)
    if not paths:
        raise Unavailable("PyTorch has loaded no OpenMP library that is known")
    return paths[0]


def cache_folder() -> Path:
    """Return where the compiled library is kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "deepseek_vl2"


def _own_folder() -> Path:
    """Return the cache folder; where others may write to it, or we may not, one for this process alone.

    What lies in it is loaded into the process.
    """
    try:
        folder = cache_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if os.access(folder, os.W_OK) and status.st_uid == os.getuid() and not status.st_mode & 0o022:
            return folder
    except (OSError, RuntimeError):  # the latter where the user has no home
        pass
    folder = Path(tempfile.mkdtemp(prefix="deepseek_vl2-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILING_TAKES_AT_MOST_S)
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"{Path(command[0]).name} failed: {error.stderr.strip()[-500:]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{Path(command[0]).name} failed: {error}") from error


def _build(path: Path, compiler: str, source: Path) -> None:
    """Compile into ``path``, at once: another process may do the same."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        parts = Path(folder) / "rows.o", Path(folder) / "rows.so"
        _run([compiler, *FLAGS, "-c", str(source), "-o", str(parts[0])])
        # Linked without OpenMP: its functions are those of the library that PyTorch has loaded.
        _run([compiler, "-shared", str(parts[0]), "-lm", "-o", str(parts[1])])
        parts[1].replace(path)


def build(compiler: str, source: Path = SOURCE) -> Path:
    """Return the library's path, compiled if it was not yet.

    Raises:
        Unavailable: compiling failed.
    """
    known = "\n".join((source.read_text(), compiler, *FLAGS, _cpu_flags()))
    path = _own_folder() / f"{source.stem}-{hashlib.sha256(known.encode()).hexdigest()[:24]}.so"
    if not path.exists():
        _build(path, compiler, source)
    return path


def load(source: Path = SOURCE, functions: Mapping[str, list[type]] = ARGUMENTS) -> ctypes.CDLL:
    """Return the library of a C file, of the first compiler that gives one which can be loaded.

    Raises:
        Unavailable: the system or the CPU is another one, or no compiler gives one.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64" or not {"avx2", "fma"} <= set(_cpu_flags().split()):
        raise Unavailable("it is for x86 CPUs with AVX2 under Linux")
    failures = []
    for compiler in _compilers():
        try:
            ctypes.CDLL(thread_library(), mode=ctypes.RTLD_GLOBAL)
            library = ctypes.CDLL(str(build(compiler, source)), mode=os.RTLD_NOW)
        except (OSError, Unavailable) as error:
            failures.append(str(error))
            continue
        for name, arguments in functions.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, ctypes.c_int
        return library
    raise Unavailable("; ".join(failures) or "there is no C compiler")


def is_plain(*tensors: torch.Tensor) -> bool:
    """Whether tensors are of bfloat16, on the CPU, laid out row by row and of no other kind than PyTorch's own."""
    for tensor in tensors:
        kind = type(tensor)
        if kind is not torch.Tensor and kind is not torch.nn.Parameter:
            return False
        if tensor.dtype is not torch.bfloat16 or not tensor.is_cpu or tensor.layout is not torch.strided:
            return False
        if not tensor.is_contiguous():
            return False
    return True


# Of fewer numbers of a weight one thread is done before another has woken, or while it spins for the next call.
NUMBERS_A_THREAD = 1 << 17


def threads_for(numbers: int) -> int:
    """Return how many threads share the work on that many numbers of weights or of a cache."""
    return max(1, min(torch.get_num_threads(), numbers // NUMBERS_A_THREAD))


def spans_of(starts: Sequence[int], lengths: Sequence[int], tokens: int) -> tuple[list[ctypes.Array[Any]], int]:
    """Return arrays of the starts and lengths of sequences within so many tokens, and the sum of the lengths.

    Raises:
        IndexError: a sequence has no token, or one outside.
    """
    for start, length in zip(starts, lengths, strict=True):
        if start < 0 or length < 1 or start + length > tokens:
            raise IndexError(f"{length} tokens from {start} on do not lie within {tokens}.")
    return [(INTEGER * len(numbers))(*numbers) for numbers in (starts, lengths)], sum(lengths)


class RowKernels:
    """The compiled functions. Each returns ``None`` where tensors are not plain ones (see `is_plain`)."""

    def __init__(self) -> None:
        self._library = load()

    def _call(self, name: str, *arguments: object) -> bool:
        status = getattr(self._library, name)(*arguments)
        if status == NO_MEMORY:
            raise MemoryError(f"There is no memory for {name} of few rows.")
        return bool(status == OK)

    def linear(
        self, x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Return ``F.linear`` of a single row, [..., I] to [..., O]."""
        rows, width = weight_OI.shape
        if not is_plain(x, weight_OI) or x.numel() != width or x.shape[-1] != width:
            return None
        if bias_O is not None and not (is_plain(bias_O) and bias_O.shape == (rows,)):
            return None
        out = x.new_empty(*x.shape[:-1], rows)
        bias = None if bias_O is None else bias_O.data_ptr()
        pointers = (x.data_ptr(), weight_OI.data_ptr(), bias, out.data_ptr())
        self._call("linear", *pointers, rows, width, threads_for(rows * width))
        return out

    def logits(self, x_1H: torch.Tensor, weight_EH: torch.Tensor) -> torch.Tensor | None:
        """Return the products of a single row with a matrix in float32, [1, E]."""
        rows, width = weight_EH.shape
        if not is_plain(x_1H, weight_EH) or x_1H.shape != (1, width):
            return None
        out = x_1H.new_empty(1, rows, dtype=torch.float32)
        pointers = (x_1H.data_ptr(), weight_EH.data_ptr(), out.data_ptr())
        self._call("logits", *pointers, rows, width, threads_for(rows * width))
        return out

    def queries_keys_values(
        self,
        x_11H: torch.Tensor,
        query_OH: torch.Tensor,
        key_OH: torch.Tensor,
        value_OH: torch.Tensor,
        cos_11D: torch.Tensor,
        sin_11D: torch.Tensor,
    ) -> tuple[torch.Tensor, ...] | None:
        """Return rotated queries, [1, N, 1, D], rotated keys and values, [1, M, 1, D], of a single row."""
        size, (queries, width), keys = cos_11D.shape[-1], query_OH.shape, len(key_OH)
        tensors = (x_11H, query_OH, key_OH, value_OH, cos_11D, sin_11D)
        if not is_plain(*tensors) or x_11H.shape != (1, 1, width) or not cos_11D.numel() == sin_11D.numel() == size:
            return None
        if (
            key_OH.shape != (keys, width)
            or value_OH.shape != (keys, width)
            or size % 2
            or queries % size
            or keys % size
        ):
            return None
        out = x_11H.new_empty(1, (queries + 2 * keys) // size, 1, size)
        pointers = [tensor.data_ptr() for tensor in (*tensors, out)]
        numbers = (queries, keys, width, size, threads_for((queries + 2 * keys) * width))
        self._call("queries_keys_values", *pointers, *numbers)
        return out.split([queries // size, keys // size, keys // size], dim=1)

    def rms_norm(self, x: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor | None:
        """Return the RMS norm of a few rows, [..., H] in and out."""
        width = len(weight_H)
        if not is_plain(x, weight_H) or x.shape[-1] != width or not 0 < x.numel() <= MOST_ROWS * width:
            return None
        out = torch.empty_like(x)
        pointers = (x.data_ptr(), weight_H.data_ptr(), out.data_ptr())
        self._call("rms_norm", *pointers, x.numel() // width, width, eps)
        return out

    def mlp(
        self, x: torch.Tensor, gate_IH: torch.Tensor, up_IH: torch.Tensor, down_HI: torch.Tensor
    ) -> torch.Tensor | None:
        """Return a SwiGLU MLP of a single row, [..., H] in and out."""
        inner, hidden = gate_IH.shape
        if not is_plain(x, gate_IH, up_IH, down_HI) or x.numel() != hidden or x.shape[-1] != hidden:
            return None
        if up_IH.shape != (inner, hidden) or down_HI.shape != (hidden, inner):
            return None
        out = torch.empty_like(x)
        pointers = [tensor.data_ptr() for tensor in (x, gate_IH, up_IH, down_HI, out)]
        self._call("mlp", *pointers, inner, hidden, threads_for(3 * inner * hidden))
        return out

    def experts(
        self,
        x_NH: torch.Tensor,
        gate_up_E2IH: torch.Tensor,
        down_EHI: torch.Tensor,
        ids_NK: torch.Tensor,
        weights_NK: torch.Tensor,
    ) -> torch.Tensor | None:
        """Return the weighted sum of the chosen experts of a few rows, [N, H] in and out; weights are float32."""
        (count, hidden, inner), rows = down_EHI.shape, len(x_NH)
        if not is_plain(x_NH, gate_up_E2IH, down_EHI) or x_NH.shape != (rows, hidden) or not 0 < rows <= MOST_ROWS:
            return None
        if gate_up_E2IH.shape != (count, 2 * inner, hidden) or weights_NK.shape != ids_NK.shape or len(ids_NK) != rows:
            return None
        if weights_NK.dtype is not torch.float32 or ids_NK.dtype is not torch.int64 or not ids_NK.numel():
            return None
        ids, weights, out = ids_NK.contiguous(), weights_NK.contiguous(), torch.empty_like(x_NH)
        pointers = [tensor.data_ptr() for tensor in (x_NH, gate_up_E2IH, down_EHI, ids, weights, out)]
        threads = threads_for(3 * ids.numel() * inner * hidden)
        return out if self._call("experts", *pointers, rows, ids.shape[1], count, inner, hidden, threads) else None

    def attend(
        self, query_1N1D: torch.Tensor, key_1MSD: torch.Tensor, value_1MSD: torch.Tensor, scaling: float
    ) -> torch.Tensor | None:
        """Return what one query attends to, [1, 1, N, D]; tokens and heads of the cache may lie any way apart."""
        if len(query_1N1D) != 1 or query_1N1D.shape[2] != 1 or len(key_1MSD) != 1 or len(value_1MSD) != 1:
            return None
        keys_SMD, values_SMD = key_1MSD[0].transpose(0, 1), value_1MSD[0].transpose(0, 1)
        return self.attend_rows(query_1N1D, keys_SMD, values_SMD, [0], [len(keys_SMD)], scaling)

    def attend_rows(
        self,
        query_1NTD: torch.Tensor,
        keys_SMD: torch.Tensor,
        values_SMD: torch.Tensor,
        starts: Sequence[int],
        lengths: Sequence[int],
        scaling: float,
    ) -> torch.Tensor | None:
        """Return what single queries of T sequences attend to, [1, T, N, D].

        Args:
            query_1NTD: a query of each sequence.
            keys_SMD: all sequences' keys; tokens and heads may lie any way apart.
            values_SMD: likewise.
            starts: the first token of each sequence, and
            lengths: how many it has.
            scaling: of the scores.
        """
        heads, rows, size = query_1NTD.shape[1:]
        kv_heads = keys_SMD.shape[1]
        if keys_SMD.shape[1:] != (kv_heads, size) or values_SMD.shape != keys_SMD.shape or heads % kv_heads:
            return None
        query_1TND = query_1NTD.transpose(1, 2).contiguous()
        if not is_plain(query_1TND, keys_SMD[:1, 0], values_SMD[:1, 0]):
            return None
        spans, total = spans_of(starts, lengths, len(keys_SMD))
        out = torch.empty_like(query_1TND)
        pointers = [tensor.data_ptr() for tensor in (query_1TND, keys_SMD, values_SMD)]
        steps = (keys_SMD.stride(1), values_SMD.stride(1), keys_SMD.stride(0), values_SMD.stride(0))
        numbers = (rows, heads, kv_heads, size, *steps, scaling, threads_for(heads * total * size))
        self._call("attend", *pointers, *spans, out.data_ptr(), *numbers)
        return out

    def attend_latents(
        self,
        query_1NTR: torch.Tensor,
        rotated_1NTP: torch.Tensor,
        latents_SR: torch.Tensor,
        keys_SP: torch.Tensor,
        starts: Sequence[int],
        lengths: Sequence[int],
        scaling: float,
    ) -> torch.Tensor | None:
        """Return the latents that single queries of T sequences attend to, [1, T, N, R]; see `attend_rows`."""
        heads, rows, rank = query_1NTR.shape[1:]
        rope = rotated_1NTP.shape[-1]
        if latents_SR.shape[1] != rank or keys_SP.shape != (len(latents_SR), rope) or rope % 2 or rank % 2:
            return None
        query, rotated = (part.transpose(1, 2).contiguous() for part in (query_1NTR, rotated_1NTP))
        if not is_plain(query, rotated, latents_SR[:1], keys_SP[:1]):
            return None
        spans, total = spans_of(starts, lengths, len(latents_SR))
        out = torch.empty_like(query)
        pointers = [tensor.data_ptr() for tensor in (query, rotated, latents_SR, keys_SP)]
        numbers = (rows, heads, rank, rope, latents_SR.stride(0), keys_SP.stride(0), scaling)
        self._call("attend_latents", *pointers, *spans, out.data_ptr(), *numbers, threads_for(heads * total * rank))
        return out


_reason: list[str] = []


@cache
def row_kernels() -> RowKernels | None:
    """Return the compiled functions, or ``None`` where they cannot be had; `unsupported_reason` then says why."""
    try:
        return RowKernels()
    except Unavailable as error:
        _reason[:] = [str(error)]
        logger.debug("Rows are multiplied by PyTorch: %s", error)
        return None


def unsupported_reason() -> str | None:
    """Return why there are no compiled functions here, in a few words; ``None`` where there are."""
    if turned_off():
        return f"{SWITCH} turns it off"
    return None if row_kernels() is not None else _reason[0]

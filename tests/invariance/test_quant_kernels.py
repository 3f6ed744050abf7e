"""Kernels over packed weights against the plain forms: on a GPU, or on a CPU through Triton's interpreter.

Outputs are poisoned before: what a kernel does not write stays NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from deepseek_vl2.models.quantization import PackedWeight, WeightFormat, dequantize, quantize
from deepseek_vl2.ops.triton import packed_gemv, packed_words, unpack_pairs
from deepseek_vl2.ops.triton.decode_align import PACKED_TILE, align_plain
from deepseek_vl2.ops.triton.decode_experts import ExpertWeights, down_plain, gate_up_plain
from deepseek_vl2.ops.triton.decode_experts_gemm import down_gemm, gate_up_gemm
from deepseek_vl2.ops.triton.decode_experts_gemv import down_gemv, gate_up_gemv
from deepseek_vl2.ops.triton.decode_gemm import linear_gemm
from deepseek_vl2.ops.triton.decode_gemv import linear_gemv
from deepseek_vl2.ops.triton.packed_grouped_gemm import grouped_down, grouped_gate_up
from deepseek_vl2.ops.triton.prefill_experts import permute_tokens, permuted_experts
from deepseek_vl2.ops.triton.weights import QuantWeight, fragment_order

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FORMATS = {
    "int4-16": WeightFormat("int4", 16),
    "int4-32": WeightFormat("int4", 32),
    "int4-64": WeightFormat("int4", 64),
    "int4-128": WeightFormat("int4", 128),
    "int8": WeightFormat("int8"),
    "int8-64": WeightFormat("int8", 64),
    "fp8": WeightFormat("fp8"),
    "fp8-block": WeightFormat("fp8", block=True),
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2}
SEEDS = iter(range(10_000))


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(next(SEEDS))
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, float("nan"), device=DEVICE, dtype=dtype)


def check(out: torch.Tensor, plain: torch.Tensor) -> None:
    assert out.shape == plain.shape
    assert torch.isfinite(out).all(), "a result was not written, or not finite"
    error = (out.double() - plain.double()).norm() / plain.double().norm()
    assert error < TOLERANCE[out.dtype], f"relative error {error:.2e}"


def packed(fmt: WeightFormat, *shape: int) -> tuple[QuantWeight, torch.Tensor]:
    """Return a packed matrix of random weights, and the matrix that it stands for."""
    found: PackedWeight = quantize(draw(*shape, scale=shape[-1] ** -0.5), fmt)
    return QuantWeight(*found, fmt.group_size, fmt.block), dequantize(found, fmt)


def rms(x: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return norm.float() * wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("sizes", "width", "normed"), [((20,), 128, False), ((9, 3, 6), 640, True)])
def test_one_row(name: str, sizes: tuple[int, ...], width: int, normed: bool) -> None:
    pairs = [packed(FORMATS[name], size, width) for size in sizes]
    x, residual = draw(width), draw(sum(sizes))
    norm = 1 + 0.1 * draw(width) if normed else None
    out = poisoned(sum(sizes))
    linear_gemv(x, [weight for weight, _ in pairs], out, norm, 1e-6, residual)
    given = x if norm is None else rms(x, norm)
    check(out, residual + torch.cat([F.linear(given, exact) for _, exact in pairs]))


@pytest.mark.parametrize("name", ["int4-64", "fp8-block"])
def test_one_row_in_bfloat16_with_a_residual_in_place(name: str) -> None:
    weight, exact = packed(FORMATS[name], 96, 256)
    x, residual = draw(256, dtype=torch.bfloat16), draw(96, dtype=torch.bfloat16)
    expected = residual.float() + F.linear(x.float(), exact)
    linear_gemv(x, [weight], residual, residual_N=residual)
    check(residual, expected)


def test_all_numbers_of_fp8_and_int4_are_read_exactly() -> None:
    """Bytes and nibbles become floats by their bits: none may be off, subnormal ones included."""
    numbers = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn)
    numbers = numbers[~numbers.float().isnan()].repeat(2)[:256].view(256, 1).repeat(1, 16).contiguous()
    one = torch.ones(256, 1, device=DEVICE)
    out = poisoned(256)
    linear_gemv(F.one_hot(torch.tensor(3), 16).float().to(DEVICE), [QuantWeight(numbers, one)], out)
    assert torch.equal(out, numbers[:, 0].float())
    words = torch.arange(16, dtype=torch.int64, device=DEVICE)
    words = sum(((words + place) % 16) << (4 * place) for place in range(8))
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)[:, None].repeat(1, 2).contiguous()
    for column in range(16):
        out = poisoned(16)
        x = F.one_hot(torch.tensor(column), 16).float().to(DEVICE)
        linear_gemv(x, [QuantWeight(words, torch.ones(16, 1, device=DEVICE), 16)], out)
        assert out.tolist() == [(row + column % 8) % 16 - 8 for row in range(16)]


@pytest.mark.parametrize("name", ["int4-32", "int8", "fp8"])
@pytest.mark.parametrize("scale", [1e-8, 1e4])
def test_activations_of_any_usual_size(name: str, scale: float) -> None:
    """Numbers are multiplied as very small floats: no product may vanish, and no scaled activation overflow."""
    weight, exact = packed(FORMATS[name], 12, 256)
    x, out = draw(256, scale=scale), poisoned(12)
    linear_gemv(x, [weight], out)
    check(out, F.linear(x, exact))


@pytest.mark.parametrize(
    ("name", "program", "places"),
    [("int4-32", packed_words.DOT_INT4, 8), ("int8", packed_words.DOT_INT8, 4), ("fp8", packed_words.DOT_FP8, 4)],
)
def test_the_assembly_cuts_out_each_number(name: str, program: Any, places: int) -> None:
    """What a GPU runs in place of the plain form, read line by line here; its scales are those of `split_row`."""
    weight, exact = packed(FORMATS[name], 6, 8 * places)
    words = packed_gemv.words_and_scales([weight])[0].cpu().numpy().view(np.uint32)
    if name == "fp8":
        numbers = weight.packed.float().cpu().numpy()
    else:
        numbers = (exact / weight.scale.repeat_interleave(weight.group_size or 8 * places, dim=1)).round().cpu().numpy()
    powers = {8: (100, 96, 92, 88, 84, 80, 84, 80), 4: (100, 92, 84, 84)}[places] if name != "fp8" else (71,) * 4
    extra = {"int4-32": 8, "int8": 128, "fp8": 0}[name]
    for place in range(places):
        planes = np.zeros(places, np.float32)
        planes[place] = np.float32(2.0) ** powers[place]
        start = np.float32(-extra * 2.0**-49)
        values = {"$1": words, f"${places + 2}": np.full(words.shape, start)}
        values |= {f"${k + 2}": plane for k, plane in enumerate(planes)}
        got = run_assembly(program.value, values, "$0")
        assert np.array_equal(got * np.float32(2.0**49), numbers[:, place::places])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "programs", "count"),
    [
        ("nibbles", (unpack_pairs.INT4_BF16, unpack_pairs.INT4_FP16), 1),
        ("nibbles", (unpack_pairs.INT4_WORD_BF16, unpack_pairs.INT4_WORD_FP16), 4),
        ("int8", (unpack_pairs.INT8_BF16, unpack_pairs.INT8_FP16), 2),
        ("int8", (unpack_pairs.INT8_WORD_BF16, unpack_pairs.INT8_WORD_FP16), 4),
        ("fp8", (unpack_pairs.FP8_BF16, unpack_pairs.FP8_FP16), 2),
        ("fp8", (unpack_pairs.FP8_WORD_BF16, unpack_pairs.FP8_WORD_FP16), 4),
    ],
)
def test_the_assembly_makes_exact_pairs(name: str, programs: tuple[Any, Any], count: int, dtype: torch.dtype) -> None:
    """Every byte at each place, beside every other: what tensor cores get in place of the plain form."""
    program = programs[dtype == torch.float16].value
    some = np.arange(1 << 16, dtype=np.uint32)
    first, second = some & 255, some >> 8
    given = np.stack([first, second, 255 - second, first ^ second])[:count]
    words = np.sum([part << np.uint32(8 * k) for k, part in enumerate(given)], axis=0, dtype=np.uint32)
    places = torch.from_numpy(given.astype(np.uint8))
    if name == "nibbles":
        expected = torch.stack([places & 15, places >> 4], dim=1).flatten(0, 1).float() - 8
    else:
        expected = places.view(torch.int8 if name == "int8" else torch.float8_e4m3fn).float()
    pairs = len(expected) // 2
    operand = "$2" if count == 1 else f"${pairs}"
    results = ["a"] if count == 1 else [f"${pair}" for pair in range(pairs)]
    found = torch.cat([halves_of(run_assembly(program, {operand: words}, result), dtype) for result in results])
    valid = ~expected.isnan()
    assert torch.equal(found[valid], expected[valid].double())


def halves_of(words: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return the two floats in each word, low half first, [2, words], in float64."""
    bits = torch.from_numpy(np.atleast_1d(np.asarray(words, np.uint32)).view(np.int32))
    return torch.stack([((bits >> shift) & 0xFFFF).to(torch.uint16).view(dtype) for shift in (0, 16)]).double()


def multiply_add_pairs(a: Any, b: Any, c: Any, dtype: torch.dtype) -> np.ndarray:
    """Return a multiply-add of pairs of 16-bit floats, rounded once."""
    out = (halves_of(a, dtype) * halves_of(b, dtype) + halves_of(c, dtype)).to(dtype).view(torch.uint16).to(torch.int32)
    return (out[0] | out[1] << 16).numpy().view(np.uint32)


def permute_bytes(a: Any, b: Any, selector: int) -> Any:
    """Return a word of four bytes of two words, each chosen by four bits."""
    held = np.uint64(a) | np.asarray(b, np.uint64) << np.uint64(32)
    parts = [(held >> np.uint64(8 * (selector >> 4 * k & 7)) & np.uint64(255)) << np.uint64(8 * k) for k in range(4)]
    return sum(parts).astype(np.uint32)


def run_assembly(program: str, values: dict[str, Any], result: str) -> np.ndarray:
    """Return what the few instructions of such a piece of assembly make of operands: a register's or an operand's."""
    values = dict(values)

    def value(name: str) -> Any:
        return values[name] if name in values else np.uint32(int(name))

    for line in program.strip("{} ").split(";"):
        if not line.strip() or ".reg" in line:
            continue
        operation, rest = line.strip().split(" ", 1)
        if rest.startswith("{"):  # of a pair to two operands: ``result`` is the pair
            continue
        target, *given = (part.strip() for part in rest.split(","))
        a = value(given[0])
        if operation.startswith(("mov", "cvt")):
            out = a
        elif operation == "fma.rn.f32":
            wide = a.view(np.float32).astype(np.float64) * value(given[1]) + value(given[2])
            out = wide.astype(np.float32)
        elif operation.startswith("fma.rn"):
            dtype = torch.float16 if operation.endswith(".f16x2") else torch.bfloat16
            out = multiply_add_pairs(a, value(given[1]), value(given[2]), dtype)
        elif operation == "lop3.b32":
            assert given[3] == "234"
            out = a & value(given[1]) | value(given[2])
        elif operation == "prmt.b32":
            out = permute_bytes(a, value(given[1]), int(given[2]))
        elif operation == "shr.s32":
            out = (a.view(np.int32) >> int(given[1])).view(np.uint32)
        else:
            does = {"and.b32": np.bitwise_and, "xor.b32": np.bitwise_xor, "shl.b32": np.left_shift}
            out = (does | {"shr.u32": np.right_shift, "mul.lo.u32": np.multiply})[operation](a, value(given[1]))
        values[target] = out
    return np.asarray(values[result])


def test_the_largest_output_of_each_program_is_noted() -> None:
    weight, exact = packed(FORMATS["int8"], 37, 64)
    x, out = draw(64), poisoned(37)
    best = (poisoned(10), torch.full((10,), -1, device=DEVICE, dtype=torch.int32))
    linear_gemv(x, [weight], out, partials=best, BLOCK_N=4)
    check(out, F.linear(x, exact))
    parts = F.pad(out, (0, 3), value=float("-inf")).view(10, 4)
    assert torch.equal(best[0], parts.amax(dim=1))
    assert torch.equal(best[1].long(), parts.argmax(dim=1) + torch.arange(10, device=DEVICE) * 4)


def layer(
    routed: WeightFormat | None, shared: WeightFormat | None, sizes: tuple[int, int, int, int]
) -> tuple[ExpertWeights, ExpertWeights]:
    """Return a layer's packed experts, and the same unpacked; formats of a kind may differ."""
    experts, hidden, inner, shared_inner = sizes
    pairs: list[tuple[QuantWeight, torch.Tensor] | tuple[None, None]] = [(None, None)] * 5
    if routed is not None:
        pairs[:2] = packed(routed, experts, 2 * inner, hidden), packed(routed, experts, hidden, inner)
    if shared is not None:
        pairs[2:] = [packed(shared, *shape) for shape in ((shared_inner, hidden),) * 2 + ((hidden, shared_inner),)]
    return ExpertWeights(*(weight for weight, _ in pairs)), ExpertWeights(*(exact for _, exact in pairs))


LAYERS = [
    *((name, name) for name in ("int4-16", "int4-64", "int8-64", "fp8", "fp8-block")),
    ("int4-64", None),
    (None, "int4-64"),
    ("fp8", "fp8-block"),
    ("int4-32", "int8"),
]


def one_row_sizes(routed: str | None, shared: str | None) -> tuple[int, int, int]:
    """Return widths of the hidden state and of routed and shared experts: the least that blocks and groups divide.

    The interpreter computes a row of a matrix at a time. A hidden state of 40 is no whole number of words to be read at
    once, and a matrix with that many rows no whole number of a program's rows.
    """
    names = {routed, shared}
    if "fp8-block" in names:
        return 40, 128, 128
    if names & {"int4-64", "int8-64"}:
        return 64, 64, 128 if routed is None else 64
    return (32, 32, 64) if "int4-16" in names or "int4-32" in names else (40, 24, 36)


@pytest.mark.parametrize(("routed", "shared"), LAYERS)
def test_experts_of_one_row(routed: str | None, shared: str | None) -> None:
    width, inner, shared_inner = one_row_sizes(routed, shared)
    weights, exact = layer(FORMATS.get(routed or ""), FORMATS.get(shared or ""), (5, width, inner, shared_inner))
    ids = topk_weights = None
    if routed:
        ids = torch.tensor([3, 0], device=DEVICE, dtype=torch.int32)
        topk_weights = torch.tensor([0.5, 1.5], device=DEVICE)
    x, norm, residual = draw(width), 1 + 0.1 * draw(width), draw(width)
    middle = poisoned((2 * inner if routed else 0) + (shared_inner if shared else 0))
    gate_up_gemv(x, norm, 1e-6, weights, middle, ids)
    parts = gate_up_plain(rms(x, norm)[None], exact, None if ids is None else ids[None])
    check(middle, torch.cat([part.flatten() for part in parts if part is not None]))
    out = poisoned(width)
    down_gemv(middle, weights, residual, out, ids, topk_weights)
    routed_out, shared_out = down_plain(parts[0], parts[1], exact, None if ids is None else ids[None])
    total = residual.clone()
    if routed_out is not None and topk_weights is not None:
        total += (routed_out[0] * topk_weights[:, None]).sum(dim=0)
    check(out, total if shared_out is None else total + shared_out[0])


@pytest.mark.parametrize(("routed", "shared"), LAYERS)
def test_experts_of_a_few_rows(routed: str | None, shared: str | None) -> None:
    rows, sizes = 5, (4, 128, 128, 256)
    weights, exact = layer(FORMATS.get(routed or ""), FORMATS.get(shared or ""), sizes)
    x = draw(rows, 128)
    ids = poisoned_routed = poisoned_shared = routed_out = shared_out = None
    if routed:
        ids = torch.tensor([[3, 0], [1, 3], [0, 2], [3, 1], [2, 0]], device=DEVICE, dtype=torch.int32)
        poisoned_routed, routed_out = poisoned(rows, 2, 128), poisoned(rows, 2, 128)
    if shared:
        poisoned_shared, shared_out = poisoned(rows, 256), poisoned(rows, 128)
    tokens = None if ids is None else align_plain(ids, 4, PACKED_TILE)
    gate_up_gemm(x, weights, poisoned_routed, poisoned_shared, tokens)
    parts = gate_up_plain(x, exact, ids)
    for got, want in zip((poisoned_routed, poisoned_shared), parts, strict=True):
        assert (got is None) == (want is None)
        if got is not None and want is not None:
            check(got, want)
    down_gemm(poisoned_routed, poisoned_shared, weights, routed_out, shared_out, tokens)
    for got, want in zip((routed_out, shared_out), down_plain(*parts, exact, ids), strict=True):
        if got is not None and want is not None:
            check(got, want)


@pytest.mark.parametrize(("routed", "shared"), [("int4-32", "int4-32"), ("int4-32", "int8")])
def test_experts_of_several_tiles(routed: str, shared: str) -> None:
    """Of shared experts a program has two, the last of a single row; one routed expert has all rows."""
    rows, live = 2 * PACKED_TILE + 1, 2 * PACKED_TILE
    weights, exact = layer(FORMATS[routed], FORMATS[shared], (3, 64, 32, 32))
    x, ids = draw(rows, 64), torch.tensor([[2, 0], [1, 2]], device=DEVICE, dtype=torch.int32).repeat(rows, 1)[:rows]
    ids[live:] = -1
    inner, out = (poisoned(rows, 2, 32), poisoned(rows, 32)), (poisoned(rows, 2, 64), poisoned(rows, 64))
    tokens = align_plain(ids, 3, PACKED_TILE)
    gate_up_gemm(x, weights, *inner, tokens)
    down_gemm(*inner, weights, *out, tokens)
    plain = down_plain(*gate_up_plain(x, exact, ids.clamp_min(0)), exact, ids.clamp_min(0))
    assert plain[0] is not None and plain[1] is not None and out[0][live:].isnan().all()
    check(out[0][:live], plain[0][:live])
    check(out[1], plain[1])


@pytest.mark.parametrize(
    ("name", "hidden", "inner"),
    [*((name, 128, 128) for name in FORMATS), *((name, 192, 96) for name in ("int4-16", "int4-32", "int8", "fp8"))],
)
def test_experts_of_a_prompt(name: str, hidden: int, inner: int) -> None:
    """Widths of whole fragments, whose columns change places on the way, and others."""
    weights, exact = layer(FORMATS[name], None, (5, hidden, inner, 0))
    assert weights.gate_up is not None and weights.down is not None
    x, ids = draw(37, hidden), torch.rand(37, 5, device=DEVICE).argsort(dim=1)[:, :3].int()
    outputs, row_map = permuted_experts(x, weights.gate_up, weights.down, ids)
    routed, _ = down_plain(*gate_up_plain(x, exact, ids), exact, ids)
    assert routed is not None
    check(outputs[row_map.long()], routed.flatten(0, 1))


@pytest.mark.parametrize("name", ["int4-32", "int8"])
def test_an_experts_last_rows_take_half_a_tile(name: str) -> None:
    weights, exact = layer(FORMATS[name], None, (4, 64, 64, 0))
    assert isinstance(weights.gate_up, QuantWeight) and isinstance(weights.down, QuantWeight)
    counts = torch.tensor([134, 0, 64, 65])  # a whole tile and a half, none, a half, a whole one
    ids = torch.arange(4).repeat_interleave(counts)[:, None].to(DEVICE, torch.int32)
    x, ends = draw(len(ids), 64), counts.cumsum(0).to(DEVICE, torch.int32)
    rows = permute_tokens(x, torch.arange(len(ids), dtype=torch.int32, device=DEVICE), fragments=True)
    inner = grouped_gate_up(rows, weights.gate_up, ends, BLOCK_P=128)
    out = grouped_down(inner, weights.down, ends, BLOCK_P=128)
    routed, _ = down_plain(*gate_up_plain(x, exact, ids), exact, ids)
    assert routed is not None
    check(out, routed[:, 0])


def test_the_order_of_fragments_is_that_of_the_kernels() -> None:
    order = fragment_order(128)
    assert sorted(order) == list(range(128))
    x = torch.arange(128.0, device=DEVICE).repeat(2, 1)
    found = permute_tokens(x, torch.tensor([1, 0], dtype=torch.int32, device=DEVICE), fragments=True)
    assert found.tolist() == [[float(column) for column in order]] * 2


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("rows", "outputs", "width"), [(5, (40, 7), 640), (70, (16,), 256)])
def test_a_few_rows(name: str, rows: int, outputs: tuple[int, ...], width: int) -> None:
    pairs = [packed(FORMATS[name], size, width) for size in outputs]
    x, residual = draw(rows, width), draw(rows, sum(outputs))
    out = poisoned(rows, sum(outputs))
    linear_gemm(x, [weight for weight, _ in pairs], out, residual)
    check(out, residual + torch.cat([F.linear(x, exact) for _, exact in pairs], dim=1))


def test_weights_of_several_formats_stand_side_by_side() -> None:
    pairs = [packed(FORMATS["int8"], 8, 64), packed(FORMATS["int4-32"], 24, 64)]
    plain = draw(5, 64)
    weights, exact = [*(w for w, _ in pairs), plain], torch.cat([*(e for _, e in pairs), plain])
    x, norm, residual = draw(3, 64), 1 + 0.1 * draw(64), draw(3, 37)
    out = poisoned(3, 37)
    linear_gemm(x, weights, out, residual)
    check(out, residual + F.linear(x, exact))
    out = poisoned(37)
    linear_gemv(x[0], weights, out, norm, 1e-6, residual[0])
    check(out, residual[0] + F.linear(rms(x[0], norm), exact))


def test_what_the_kernels_do_not_read_is_refused() -> None:
    weight, _ = packed(FORMATS["int4-32"], 8, 64)
    with pytest.raises(ValueError, match="one to 3"):
        linear_gemv(draw(64), [weight] * 4, poisoned(32))
    with pytest.raises(ValueError, match="powers of two"):
        linear_gemv(draw(64), [QuantWeight(weight.packed, weight.scale, 24)], poisoned(8))
    with pytest.raises(ValueError, match="contiguous"):
        linear_gemv(draw(64), [QuantWeight(weight.packed[:, ::2], weight.scale, 32)], poisoned(8))
    with pytest.raises(ValueError, match="int32, int8"):
        linear_gemm(draw(2, 64), [QuantWeight(weight.packed.long(), weight.scale, 32)], poisoned(2, 8))
    with pytest.raises(ValueError, match="routed or shared"):
        ExpertWeights().downs()
    mixed = ExpertWeights(shared_gate=weight, shared_up=packed(FORMATS["int8"], 8, 64)[0])
    with pytest.raises(ValueError, match="one format"):
        mixed.check()
    odd = ExpertWeights(packed(FORMATS["fp8-block"], 2, 128, 128)[0], packed(FORMATS["fp8"], 2, 128, 64)[0])
    with pytest.raises(ValueError, match="do not divide"):
        odd.check()

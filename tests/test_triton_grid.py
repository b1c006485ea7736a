"""The fused kernels against the grid, bit for bit (C2): on a GPU where there is one, else in Triton's interpreter.

The oracles are `grid` and `layouts` on the CPU, which have tests of their own against other people's arithmetic.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import BF16, DTYPES, FP16, FP32, GROUPINGS, Q4_0, bits, dtypes, finite_positive, specs, weights
from torch import Tensor

from lockstep import TensorSpec, grid
from lockstep.kernels import triton_grid
from lockstep.layouts import marlin, words
from lockstep.scheme import FORMATS, RULES

pytest.importorskip("triton")
import triton
import triton.language as tl

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the interpreter's NumPy
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Every spec but for the served dtype, which quantizing does not look at.
ARITHMETIC = [
    TensorSpec(**grouping, scale_rule=rule, scale_dtype=dtype)
    for rule in ("amax/7", "amax/7.5")
    for grouping in GROUPINGS
    for dtype in DTYPES
] + [
    TensorSpec(**Q4_0),
    TensorSpec("int8", group_size=32, scale_dtype=FP16),
    TensorSpec("int8", group_size=64),
    TensorSpec("int8", "channel", scale_dtype=FP32),
    TensorSpec("int8", scale_rule="amax/127.5"),
    TensorSpec("fp8_e4m3", "channel", scale_dtype=FP32),
]
SHARED = [  # by more than a row
    TensorSpec("fp8_e4m3", "tensor", scale_dtype=FP32),
    TensorSpec("fp8_e4m3", "block", scale_dtype=FP32),
    TensorSpec("fp8_e4m3", "block", scale_rule="pow2/448", scale_dtype=FP32),
]
GROUPED, CHANNEL = TensorSpec(group_size=32), TensorSpec(strategy="channel")
ONE_OF_A_KIND = [GROUPED, CHANNEL, TensorSpec(**Q4_0), TensorSpec(group_size=64, scale_rule="amax/7.5")]

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_arithmetic = pytest.mark.parametrize("spec", ARITHMETIC, ids=str)
every_kind = pytest.mark.parametrize("spec", ONE_OF_A_KIND, ids=str)


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    """Equal dtypes, shapes and bit patterns, but that every NaN is as good as another."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    found, expected = found.cpu(), expected.cpu()
    same = bits(found) == bits(expected)
    if found.is_floating_point():
        same |= found.isnan() & expected.isnan()
    if not same.all():
        where = ~same
        message = f"{int(where.sum())} of {same.numel()} differ, {found[where][:3].tolist()} for "
        raise AssertionError(f"{message}{expected[where][:3].tolist()} at {where.nonzero()[:3].tolist()}")


def assert_fake_quantizes_as_the_grid(w: Tensor, spec: TensorSpec) -> None:
    assert_same_bits(triton_grid.fake_quantize(w.to(DEVICE), spec), grid.fake_quantize(w, spec))


def assert_quantizes_as_the_grid(w: Tensor, spec: TensorSpec) -> None:
    """Codes and scales, as tensors and as words."""
    codes, scale, *_ = grid.quantize(w, spec)
    on_device = w.to(DEVICE)
    found = triton_grid.quantize(on_device, spec)
    assert_same_bits(found.codes, codes)
    assert_same_bits(found.scale, scale)
    if w.shape[-1] % 8 == 0 and spec.code_dtype == torch.int8:
        packed, packed_scale = triton_grid.pack_quantized(on_device, spec)
        assert_same_bits(packed, words.pack(codes, spec.bits))
        assert_same_bits(packed_scale, scale)


def assert_packs_for_marlin_as_the_layouts(w: Tensor, spec: TensorSpec) -> None:
    codes, scale, *_ = grid.quantize(w, spec)
    packed, packed_scale = triton_grid.pack_marlin(w.to(DEVICE), spec)
    assert_same_bits(packed, marlin.pack_weight(codes, spec.bits))
    assert_same_bits(packed_scale, marlin.pack_scales(scale))


def assert_unpacks_as_the_grid(quantized: grid.Quantized, spec: TensorSpec) -> None:
    """``code * scale`` and the bare codes, from words."""
    codes, scale, *_ = quantized
    packed = words.pack(codes, spec.bits).to(DEVICE)
    assert_same_bits(triton_grid.dequantize_packed(packed, scale.to(DEVICE), spec), grid.dequantize(quantized, spec))
    assert_same_bits(triton_grid.dequantize_packed(packed, None, spec), codes.to(spec.served_dtype))


# Hard weights --------------------------------------------------------------------------------------------------------


def smallest_subnormal(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def extremes(spec: TensorSpec, dtype: torch.dtype) -> Tensor:
    """Largest elements of groups: ordinary, with a short scale, denormal, huge, and beyond an fp16 scale."""
    divisor = abs(RULES[spec.scale_rule].divisor)
    smallest = max(smallest_subnormal(dtype), smallest_subnormal(spec.scale_dtype))
    largest = torch.finfo(dtype).max
    normal = max(torch.finfo(dtype).smallest_normal, torch.finfo(spec.scale_dtype).smallest_normal)
    extremes = [
        *(1.37, 0.0123),
        *(divisor * short / 64 for short in (8, 11, 15)),  # the quotients of such a scale are exact half-integers
        *(divisor * smallest * count for count in (0.2, 1, 5, 77)),
        *(divisor * normal * share for share in (0.99, 1.01)),
        *(largest, -0.7 * largest, min(1.5 * divisor * 65504, largest)),
    ]
    return torch.tensor(extremes, dtype=torch.float64).clamp(-largest, largest).to(dtype)


def near_ties(extreme: Tensor, size: int, spec: TensorSpec) -> Tensor:
    """Groups ``[n, size]`` of an extreme, of the numbers nearest to ``(k + 1/2) * scale``, and of those beside them."""
    turns = 1 if size >= 64 else 3  # a group of 32 has no place for all
    extreme = extreme.repeat_interleave(turns)
    w = torch.zeros(len(extreme), size, dtype=extreme.dtype)
    w[:, 0] = extreme
    scale = grid.quantize(w, spec).scale.double()
    low, high = spec.code_range
    place = torch.arange(size - 1)
    limit = extreme[:, None].abs()
    ties = ((place % (high - low) + low + 0.5) * scale).to(w.dtype).clamp(-limit, limit)
    turn = torch.arange(len(extreme))[:, None] % turns
    beside = (bits(ties) + ((place // (high - low) + turn) % 3 - 1).to(bits(ties).dtype)).view(w.dtype)
    w[:, 1:] = torch.where(ties == 0, ties, beside).clamp(-limit, limit)
    return w


def hard_weights(spec: TensorSpec, dtype: torch.dtype) -> Tensor:
    """Weights ``[N, K]`` without a NaN, of two groups a row, where a shortcut would show."""
    size = spec.group_size or 96
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(4, size, generator=generator).to(dtype)
    patterns = torch.randint(-(2**31), 2**31, (4, size), generator=generator, dtype=torch.int64).to(torch.int32)
    patterns = patterns.view(FP32).to(dtype) if dtype == FP32 else patterns.to(torch.int16).view(dtype)
    patterns = torch.where(patterns.isfinite(), patterns, 1)
    zeros = torch.zeros(3, size, dtype=dtype)
    zeros[1] = -0.0
    zeros[2, ::2] = -0.0
    both_signs = normal.clone()  # the rule max/-8 takes the sign of the first
    both_signs[:, [5, 17]] = torch.tensor([[8.0, -8.0], [-8.0, 8.0]] * 2).to(dtype)
    infinite = normal.clone()
    infinite[0, 9], infinite[1, 9], infinite[2, 3], infinite[2, 4] = torch.inf, -torch.inf, -torch.inf, torch.inf
    ties = near_ties(extremes(spec, dtype), size, spec)
    groups = torch.cat([ties, normal, patterns, zeros, both_signs, infinite])
    groups = groups[torch.randperm(len(groups), generator=generator)]
    return groups if spec.group_size is None else groups[: len(groups) // 2 * 2].view(-1, 2 * size)


@every_arithmetic
@every_dtype
def test_hard_weights_quantize_to_the_same_bits(spec, dtype):
    """One code that differs from the exporter's, and the model that serves is not the one that trained."""
    w = hard_weights(spec, dtype)
    assert_quantizes_as_the_grid(w, spec)
    if spec.code_dtype == torch.int8:
        assert_packs_for_marlin_as_the_layouts(w.repeat(5, 1)[:64], spec)


@every_arithmetic
@every_dtype
def test_hard_weights_are_served_as_the_same_bits(spec, dtype):
    w = hard_weights(spec, dtype)
    for served_dtype in DTYPES:
        served = replace(spec, served_dtype=served_dtype)
        assert_fake_quantizes_as_the_grid(w, served)
        if spec.code_dtype == torch.int8:
            assert_unpacks_as_the_grid(grid.quantize(w, served), served)


@pytest.mark.parametrize("spec", SHARED, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (2, 130, 200), (0, 40), (3, 0, 40)], ids=str)
@every_dtype
def test_scales_of_blocks_and_tensors_are_the_grids(spec, dtype, shape):
    """Blocks that the matrix does not fill, tiny and zero ones, and the extreme of a layer that is served with it."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    w[..., 128:, :] *= 1e-12
    w[..., 128:] *= 1e-30
    w[..., 1:2] = -0.0 if spec.strategy == "block" else torch.finfo(dtype).smallest_normal / 4
    w = w.to(dtype)
    assert_quantizes_as_the_grid(w, spec)
    assert_fake_quantizes_as_the_grid(w, spec)
    if spec.strategy == "tensor":
        amax = 1.7 * grid.largest(w)
        found, expected = triton_grid.quantize(w.to(DEVICE), spec, None, amax.to(DEVICE)), grid.quantize(w, spec, amax)
        assert_same_bits(found.codes, expected.codes)
        assert_same_bits(found.scale, expected.scale)


@pytest.mark.parametrize("spec", SHARED, ids=str)
def test_a_scale_that_fp32_rounds_to_zero_has_zeros_for_codes(spec):
    """Without a sign, as the grid's."""
    w = torch.full((2, 128), -1e-45)
    assert_quantizes_as_the_grid(w, spec)
    w[0, 0] = 3e-43  # a scale of 0 for none, but a denormal of few bits
    assert_quantizes_as_the_grid(w, spec)


@pytest.mark.parametrize(
    "spec", [spec for spec in ARITHMETIC if spec.scale_dtype != FP32 and spec.format == "int4"], ids=str
)
@every_dtype
def test_hard_weights_hold_ties_and_denormal_scales(spec, dtype):
    """Or the tests above would prove less than they say."""
    w = hard_weights(spec, dtype)
    scale = grid.quantize(w, spec).scale
    groups = w.double().unflatten(-1, (scale.shape[-1], -1))
    quotients = groups / torch.where(scale == 0, 1, scale).double()[..., None]
    ties = (2 * quotients).frac().eq(0) & quotients.frac().ne(0) & (quotients.abs() < 7)
    assert ties.sum() > 50
    assert (scale == 0).sum() >= 3
    assert (scale.float().abs() == torch.finfo(spec.scale_dtype).max).any()  # of an infinite group at least
    if smallest_subnormal(dtype) <= smallest_subnormal(spec.scale_dtype):
        assert ((scale != 0) & (scale.abs() < torch.finfo(spec.scale_dtype).smallest_normal)).any()


@every_kind
@every_dtype
def test_nan_spoils_its_group_alone(spec, dtype):
    """It must reach the loss, and not become a plausible number."""
    w = hard_weights(spec, dtype)
    w[1, 5], w[2, -1] = torch.nan, -torch.nan
    w[3, :7] = torch.nan
    served = triton_grid.fake_quantize(w.to(DEVICE), spec).cpu()
    assert served.isnan().unflatten(-1, (spec.num_groups(w.shape[-1]), -1)).all(-1).sum() == 3
    assert_same_bits(served, grid.fake_quantize(w, spec))


@settings(max_examples=60)
@given(weights(rows=(1, 5)), specs)
def test_weights_of_every_magnitude_and_stride_are_the_grids(w, spec):
    assert_fake_quantizes_as_the_grid(w, spec)
    assert_quantizes_as_the_grid(w, spec)
    assert_unpacks_as_the_grid(grid.quantize(w, spec), spec)


@settings(max_examples=60)
@given(dtypes, specs, st.integers(0, 2**32))
def test_weights_of_random_bits_are_the_grids(dtype, spec, seed):
    """Every finite number of the dtype is as likely, so most groups span its whole range."""
    generator = torch.Generator().manual_seed(seed)
    pattern = torch.randint(-(2**31), 2**31, (3, 256), generator=generator, dtype=torch.int64).to(torch.int32)
    w = pattern.view(FP32) if dtype == FP32 else pattern.to(torch.int16).view(dtype)
    w = torch.where(w.isfinite(), w, 0)
    # Half of the groups: one binade, so that the codes are of every value.
    w[:, 128:] = torch.where(w[:, 128:] == 0, 0, torch.frexp(w[:, 128:].float())[0]).to(dtype)
    assert_fake_quantizes_as_the_grid(w, spec)
    assert_quantizes_as_the_grid(w, spec)


# Learned scales ------------------------------------------------------------------------------------------------------

LEARNED = [spec for spec in ARITHMETIC if spec.code_dtype == torch.int8 and spec.scale_rule != "max/-8"]


def learned_scale(w: Tensor, spec: TensorSpec) -> Tensor:
    """fp32 scales beside the rule's own: some cut weights off, some are far too large or small, 0, or negative."""
    scale = grid.quantize(w, spec).scale.float()
    factor = torch.tensor([1.0, 0.61, 1.3, -0.9, 0.0, 1e-3, 30.0]).repeat(scale.numel() // 7 + 1)[: scale.numel()]
    limit = torch.finfo(spec.scale_dtype).max
    return (scale * factor.view_as(scale)).clamp(-limit, limit)


@pytest.mark.parametrize("spec", LEARNED, ids=str)
@every_dtype
def test_scales_that_are_given_yield_the_grids_bits(spec, dtype):
    """Negative ones too: training goes through them, and the export refuses them."""
    w = hard_weights(spec, dtype)
    scale = learned_scale(w, spec)
    assert (scale < 0).any()
    found = triton_grid.quantize(w.to(DEVICE), spec, scale=scale.to(DEVICE))
    expected = grid.quantize(w, spec, scale=scale)
    assert_same_bits(found.codes, expected.codes)
    assert_same_bits(found.scale, expected.scale)
    served = triton_grid.fake_quantize(w.to(DEVICE), spec, scale=scale.to(DEVICE))
    assert torch.equal(served.cpu(), grid.fake_quantize(w, spec, scale=scale))  # but for the sign of a zero


@pytest.mark.parametrize("spec", LEARNED, ids=str)
@every_dtype
def test_gradients_of_learned_scales_are_the_grids(spec, dtype):
    """Those of weights bit for bit: one that is cut off and one that is not is another model. Sums have an order."""
    w = hard_weights(spec, dtype)
    w = torch.where(w.isfinite() & (w.abs() < 1e4), w, 1)
    scale = learned_scale(w, spec)
    grad = torch.randn(w.shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    of_weight, of_scale = grid.learned_gradients(grad, w, scale, spec)
    found = triton_grid.learned_gradients(grad.to(DEVICE), w.to(DEVICE), scale.to(DEVICE), spec)
    assert_same_bits(found[0], of_weight)
    assert (of_weight == 0).any()
    assert (of_weight != 0).any()
    assert torch.allclose(found[1].cpu(), of_scale, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [((65, 128), TensorSpec(group_size=64)), ((1, 96), GROUPED), ((5, 37), CHANNEL), ((2, 5000), CHANNEL)],
    ids=str,
)
def test_gradients_of_shapes_that_do_not_fill_a_program_are_the_grids(shape, spec):
    """Also of a weight and a gradient that are transposed views."""
    generator = torch.Generator().manual_seed(8)
    w, grad = (torch.randn(shape[::-1], generator=generator).T for _ in range(2))
    scale = grid.quantize(w, spec).scale.float() * 0.7
    found = triton_grid.learned_gradients(grad.to(DEVICE), w.to(DEVICE), scale.to(DEVICE), spec)
    expected = grid.learned_gradients(grad, w, scale, spec)
    assert_same_bits(found[0], expected[0])
    assert torch.allclose(found[1].cpu(), expected[1], rtol=1e-4, atol=1e-5)


def test_scales_are_given_to_groups_and_channels_alone():
    with pytest.raises(ValueError, match="scales are given for groups and channels"):
        triton_grid.fake_quantize(torch.ones(4, 4).to(DEVICE), SHARED[0], scale=torch.ones(1, 1).to(DEVICE))


# Shapes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((1, 96), GROUPED),
        ((5, 352), GROUPED),
        ((1, 352), TensorSpec(**Q4_0)),
        ((5, 192), TensorSpec(group_size=64)),
        ((65, 128), TensorSpec(group_size=64)),  # more groups than a program holds, and no whole number of programs
        ((3, 5, 96), GROUPED),
        ((2, 1, 3, 64), GROUPED),
        ((1, 37), CHANNEL),
        ((5, 37), CHANNEL),
        ((5, 1), CHANNEL),
        ((5, 352), CHANNEL),
        ((2, 3, 96), CHANNEL),
        ((2, 4096), CHANNEL),  # as much as a program reads at a time
        ((2, 5000), CHANNEL),
        ((2, 8200), CHANNEL),
        ((2, 5000), TensorSpec(strategy="channel", scale_rule="amax/7.5")),
    ],
    ids=str,
)
@pytest.mark.parametrize("where", ["first", "last"])
def test_shapes_that_do_not_fill_a_program_are_the_grids(shape, spec, where):
    """Also with the extreme of each row at its end, where a kernel that stops early would miss it."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    w[..., 0 if where == "first" else -1] = 9
    w = w.to(BF16)
    assert_fake_quantizes_as_the_grid(w, spec)
    assert_quantizes_as_the_grid(w, spec)
    if shape[-1] % 8 == 0:
        assert_unpacks_as_the_grid(grid.quantize(w, spec), spec)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((64, 96), GROUPED),  # K fills no tile of the kernel
        ((128, 352), GROUPED),
        ((64, 64), TensorSpec(group_size=64)),
        ((64, 32), GROUPED),
        ((64, 128), TensorSpec()),
        ((64, 32), TensorSpec(**Q4_0)),
        ((64, 16), CHANNEL),
        ((64, 144), CHANNEL),
        ((3, 64, 128), GROUPED),
        ((2, 2, 64, 64), GROUPED),
        ((2, 64, 48), CHANNEL),
        ((2, 64, 128), TensorSpec()),
    ],
    ids=str,
)
def test_marlin_words_of_every_tiling_are_the_layouts(shape, spec):
    """Edges of the tiles, stacked experts, and rows of exactly one group, whose scales have another order."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(BF16)
    assert_packs_for_marlin_as_the_layouts(w, spec)
    assert_packs_for_marlin_as_the_layouts(w.mT.contiguous().mT, spec)


def test_marlin_words_of_a_row_longer_than_a_program():
    w = torch.randn(64, 4112, generator=torch.Generator().manual_seed(3)).to(BF16)
    w[:, -1] = 9
    assert_packs_for_marlin_as_the_layouts(w, CHANNEL)


@pytest.mark.parametrize("spec", [GROUPED, CHANNEL], ids=str)
@pytest.mark.parametrize("shape", [(0, 96), (0, 64, 96), (3, 0, 96)], ids=str)
def test_no_weights_give_no_words(shape, spec):
    """A rank of a sharded model, or a layer of no experts, may hold none."""
    w = torch.zeros(shape, dtype=BF16)
    assert_fake_quantizes_as_the_grid(w, spec)
    assert_quantizes_as_the_grid(w, spec)
    assert_unpacks_as_the_grid(grid.quantize(w, spec), spec)
    if shape[-2] == 64:
        assert_packs_for_marlin_as_the_layouts(w, spec)


@every_kind
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "offset"])
def test_memory_layout_does_not_matter(spec, layout):
    """Fused and transposed checkpoints train through views."""
    base = torch.randn(8, 128, generator=torch.Generator().manual_seed(4)).to(BF16)
    w = {
        "transposed": base.T.contiguous().T,
        "strided": base.repeat_interleave(2, dim=1)[:, ::2],
        "expanded": base[:1].expand(8, 128),
        "offset": torch.cat([base.flatten(), base[0]])[1 : 1 + base.numel()].view(8, 128),
    }[layout]
    assert_fake_quantizes_as_the_grid(w, spec)
    assert_quantizes_as_the_grid(w, spec)


@every_kind
@pytest.mark.parametrize("code_dtype", [torch.int8, *DTYPES], ids=str)
def test_codes_come_in_the_dtype_of_the_gemm(spec, code_dtype):
    """Channel-wise layers multiply with the codes themselves."""
    w = hard_weights(spec, BF16)
    codes, scale, *_ = grid.quantize(w, spec)
    found = triton_grid.quantize(w.to(DEVICE), spec, code_dtype)
    assert_same_bits(found.codes + 0, codes.to(code_dtype))  # a code of -0 multiplies as 0 does
    assert_same_bits(found.scale, scale)


# Words to weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_dtype", [BF16, FP16], ids=str)
@every_dtype
def test_each_code_times_scales_of_every_size_is_the_grids(scale_dtype, dtype, monkeypatch):
    """Denormals and overflows included; negative scales are those of max/-8."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(triton_grid, "UNPACK_BLOCK", 2**15)  # the interpreter takes as long for few as for many
    scale = finite_positive(scale_dtype)[::3]
    scale = torch.cat([scale, -scale, scale[:1] * 0])[:, None]
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(2).expand(len(scale), 32).contiguous()
    spec = TensorSpec(group_size=32, scale_dtype=scale_dtype, served_dtype=dtype)
    assert_unpacks_as_the_grid(grid.Quantized(codes, scale), spec)


@pytest.mark.parametrize("spec", [GROUPED, CHANNEL], ids=str)
def test_words_and_scales_may_be_views(spec):
    """One expert's columns, or a scale that was stored transposed."""
    w = torch.randn(6, 192, generator=torch.Generator().manual_seed(5)).to(BF16)
    codes, scale, *_ = quantized = grid.quantize(w, spec)
    packed = words.pack(codes, 4).to(DEVICE)
    expected = grid.dequantize(quantized, spec)
    apart = packed.repeat_interleave(2, dim=1)[:, ::2]
    transposed = scale.to(DEVICE).T.contiguous().T
    assert_same_bits(triton_grid.dequantize_packed(apart, scale.to(DEVICE), spec), expected)
    assert_same_bits(triton_grid.dequantize_packed(packed, transposed, spec), expected)


# The reciprocal instead of the division ------------------------------------------------------------------------------


@triton.jit
def _codes_kernel(w, scale, out, n, rule: tl.constexpr, block: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    value, divisor = tl.load(w + at, mask=at < n, other=0.0), tl.load(scale + at, mask=at < n, other=0.0)
    tl.store(out + at, triton_grid._codes(value, divisor, rule), mask=at < n)


def codes_of(w: Tensor, scale: Tensor, master: torch.dtype, scale_dtype: torch.dtype, format: str = "int4") -> Tensor:
    """The kernels' code of each of `w` (fp32, flat) with the scale beside it."""
    rule = triton_grid._rule(TensorSpec(format, scale_dtype=scale_dtype), master)
    assert rule.by_reciprocal
    out = torch.empty_like(w, device=DEVICE)
    block = 2**18 if DEVICE.type == "cpu" else 1024
    programs = (triton.cdiv(w.numel(), block),)
    _codes_kernel[programs](w.to(DEVICE), scale.to(DEVICE), out, w.numel(), rule, block, enable_fp_fusion=False)
    return out.cpu()


def assert_codes_are_exact(
    w: Tensor, scale: Tensor, master: torch.dtype, scale_dtype: torch.dtype, format: str = "int4"
) -> None:
    """The codes are RNE(w / scale), for each w ``[n, 1]`` and each scale ``[m]`` or a shape that broadcasts.

    float64 is exact enough: a quotient of numbers of 11 bits that is half an integer is a number of float64, and any
    other is 2**-13 or more away from one, where float64 rounds by 2**-49.
    """
    w, scale = (each.flatten() for each in torch.broadcast_tensors(w.double(), scale.double()))
    assert torch.equal(w, w.to(master).double())
    assert torch.equal(scale, scale.to(scale_dtype).double())
    largest = FORMATS[format].largest
    expected = (w / scale).round().clamp(-largest, largest)
    found = codes_of(w.float(), scale.float(), master, scale_dtype, format).double()
    wrong = found != expected
    assert not wrong.any(), f"{int(wrong.sum())} wrong, such as {w[wrong][0].item()!r} / {scale[wrong][0].item()!r}"


def significands(dtype: torch.dtype) -> Tensor:
    """Every significand of a dtype, in [1, 2)."""
    steps = int(1 / torch.finfo(dtype).eps)
    return 1 + torch.arange(steps, dtype=torch.float64) / steps


@pytest.mark.parametrize(
    ("master", "scale_dtype", "exponents"),
    [
        # A scale is a seventh of a weight or less, so it does not reach the last two binades of its dtype.
        (BF16, BF16, (-126, -125, -64, 0, 63, 125)),
        (BF16, FP16, (-14, 0, 15)),
        (FP16, BF16, (-12, 0, 12)),
        (FP16, FP16, (0,)),
    ],
    ids=str,
)
def test_reciprocal_gives_the_codes_of_the_division_for_every_pair_of_significands(master, scale_dtype, exponents):
    """The shortcut that makes the kernel as fast as memory must never move a code: all quotients from 1/8 to 16."""
    for exponent in exponents:
        scale = significands(scale_dtype) * 2.0**exponent
        for ratio in range(-2, 4):
            w = significands(master)[:, None] * 2.0 ** (exponent + ratio)
            if w.min() < torch.finfo(master).smallest_normal or w.max() > torch.finfo(master).max:
                continue  # denormals are tested below
            sign = 1 - 2 * (torch.arange(len(scale)) % 2)
            assert_codes_are_exact(w * sign, scale, master, scale_dtype)


@pytest.mark.parametrize(("master", "scale_dtype"), [(BF16, BF16), (FP16, BF16), (BF16, FP16)], ids=str)
def test_reciprocal_gives_the_codes_of_8_bits_for_every_pair_of_significands(master, scale_dtype):
    """Products are less exact the larger they are: all quotients from 4 to 256."""
    scale = significands(scale_dtype) / 64
    for ratio in range(3, 9):
        w = significands(master)[:, None] * 2.0 ** (ratio - 7)
        sign = 1 - 2 * (torch.arange(len(scale)) % 2)
        assert_codes_are_exact(w * sign, scale, master, scale_dtype, "int8")


@pytest.mark.parametrize("scale_dtype", [BF16, FP16], ids=str)
def test_reciprocal_gives_the_codes_of_the_division_for_denormal_scales(scale_dtype):
    """The reciprocal of a bf16 denormal is infinite; a group that small is rare, and NaN if it goes wrong."""
    smallest = smallest_subnormal(scale_dtype)
    denormals = torch.arange(1, int(1 / torch.finfo(scale_dtype).eps) + 2) * smallest  # and two that are normal
    if scale_dtype == FP16:
        denormals = denormals[::3]
    w = finite_positive(scale_dtype).double()
    w = w[w <= 16 * denormals[-1]]
    assert_codes_are_exact(-w[:, None], denormals.double(), scale_dtype, scale_dtype)


@every_arithmetic
@every_dtype
def test_division_is_skipped_only_where_that_is_proved(spec, dtype):
    """The proof needs quotients of two numbers of 11 bits, rounded to an integer with ties to even."""
    short = spec.scale_rule in ("amax/7", "amax/127") and dtype != FP32 and spec.scale_dtype != FP32
    assert triton_grid._rule(spec, dtype).by_reciprocal is short


# What is refused -----------------------------------------------------------------------------------------------------

FUNCTIONS = [
    triton_grid.fake_quantize,
    triton_grid.quantize,
    triton_grid.pack_quantized,
    triton_grid.pack_marlin,
]
every_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)


@every_function
@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn], ids=str)
def test_weights_of_another_dtype_are_refused_by_name(function, dtype):
    message = rf"weights are bfloat16, float16, float32; found {dtype} of shape \(64, 128\)"
    with pytest.raises(TypeError, match=message):
        function(torch.zeros(64, 128, dtype=dtype, device=DEVICE), TensorSpec())


@every_function
def test_rows_that_do_not_divide_are_refused_with_their_shape(function):
    message = r"shape \(64, 96\): 96 input features do not divide into groups of 128: group_size 32 would fit"
    with pytest.raises(ValueError, match=message):
        function(torch.zeros(64, 96, device=DEVICE), TensorSpec())


def test_rows_that_do_not_fill_a_word_are_refused():
    """A word of fewer codes would shift every row after it."""
    with pytest.raises(ValueError, match=r"shape \(64, 37\): words hold 8 codes, 37 inputs do not fill them"):
        triton_grid.pack_quantized(torch.zeros(64, 37, device=DEVICE), CHANNEL)


@pytest.mark.parametrize("shape", [(96, 128), (64, 24), (3, 32, 128)], ids=str)
def test_layers_that_do_not_fill_marlins_tiles_are_refused(shape):
    message = rf"N={shape[-2]}, K={shape[-1]}: Marlin tiles need N % 64 == 0 and K % 16 == 0"
    with pytest.raises(ValueError, match=message):
        triton_grid.pack_marlin(torch.zeros(shape, device=DEVICE), CHANNEL)


def test_kernels_say_where_they_run():
    assert triton_grid.unavailable(DEVICE) is None
    assert triton_grid.unavailable(torch.device("meta")) == "they run on CUDA, the weight is on meta"


def test_words_of_floating_codes_are_refused():
    with pytest.raises(ValueError, match="words hold integers, found fp8_e4m3 channel"):
        triton_grid.pack_quantized(torch.zeros(64, 128, device=DEVICE), ARITHMETIC[-1])

"""The engines' own kernels: how they are found and refused, what is passed to them, and on a GPU what they compute.

The plumbing is tested on the CPU with operators of the engines' schemas (vLLM 0.22.1, sgl-kernel 0.3.21) that emulate
the kernels from what they are given. The tests under "On a GPU" run the real ones, where a package is installed.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import _scoped_library

from lockstep import Scheme, TensorSpec, activations, grid, kernels
from lockstep.kernels import engines, reference, sgl, vllm
from lockstep.kernels.engines import Engine, EngineUnavailable
from lockstep.layouts import marlin as layout
from lockstep.layouts import words
from lockstep.scheme import ActivationSpec

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def spec_of(group_size: int | None = 128, dtype: torch.dtype = BF16) -> TensorSpec:
    strategy = "group" if group_size else "channel"
    return TensorSpec(strategy=strategy, group_size=group_size, scale_dtype=dtype, served_dtype=dtype)


GROUPED, CHANNEL = spec_of(128), spec_of(None)
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
GROUPINGS = pytest.mark.parametrize("group_size", [128, 64, 32, None], ids=["g128", "g64", "g32", "channel"])


def randn(*shape: int, dtype: torch.dtype = FP32, seed: int = 0, device: torch.device = CPU) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def reference_linear(x: Tensor, quantized: grid.Quantized, spec: TensorSpec, bias: Tensor | None = None) -> Tensor:
    return reference.linear(x, quantized, Scheme(spec), bias)


# Operators with the engines' schemas ---------------------------------------------------------------------------------

REPACK = "(Tensor b_q_weight, Tensor perm, SymInt size_k, SymInt size_n, int num_bits, bool is_a_8bit) -> Tensor"
GEMM = (
    "(Tensor a, Tensor? c_or_none, Tensor b_q_weight, Tensor? b_bias_or_none, Tensor b_scales, Tensor? a_scales, "
    "Tensor? global_scale, Tensor? b_zeros_or_none, Tensor? g_idx_or_none, Tensor? perm_or_none, Tensor workspace, "
    "int b_type_id, SymInt size_m, SymInt size_n, SymInt size_k, bool is_k_full, bool use_atomic_add, "
    "bool use_fp32_reduce, bool is_zp_float) -> Tensor"
)
MOE_GEMM = (
    "(Tensor! a, Tensor? c_or_none, Tensor! b_q_weight, Tensor? b_bias_or_none, Tensor! b_scales, Tensor? a_scales, "
    "Tensor? global_scale, Tensor? b_zeros_or_none, Tensor? g_idx_or_none, Tensor? perm_or_none, Tensor! workspace, "
    "Tensor sorted_token_ids, Tensor! expert_ids, Tensor! num_tokens_past_padded, Tensor! topk_weights, "
    "int moe_block_size, int top_k, bool mul_topk_weights, int b_type_id, int size_m, int size_n, int size_k, "
    "bool is_full_k, bool use_atomic_add, bool use_fp32_reduce, bool is_zp_float, int thread_k, int thread_n, "
    "int blocks_per_sm) -> Tensor"
)
PREPACK = "(Tensor B, ScalarType a_type, int b_type, ScalarType? group_scales_type) -> Tensor"
MM = (
    "(Tensor A, Tensor B, int b_type, ScalarType? out_type, Tensor? group_scales, Tensor? group_zeros, "
    "int? group_size, Tensor? channel_scales, Tensor? token_scales, str? schedule) -> Tensor"
)
SGL_REPACK = "(Tensor! b_q_weight, Tensor! perm, int size_k, int size_n, int num_bits) -> Tensor"
SGL_GEMM = (
    "(Tensor! a, Tensor? c_or_none, Tensor! b_q_weight, Tensor! b_scales, Tensor? global_scale_or_none, "
    "Tensor? b_zeros_or_none, Tensor? g_idx_or_none, Tensor? perm_or_none, Tensor! workspace, int b_q_type_id, "
    "int size_m, int size_n, int size_k, bool is_k_full, bool use_atomic_add, bool use_fp32_reduce, "
    "bool is_zp_float) -> Tensor"
)


CUTLASS_MM = "(Tensor! out, Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, Tensor? bias) -> ()"
INT8_TOKEN = "(Tensor! result, Tensor input, Tensor! scale, Tensor!? azp) -> ()"
INT8_STATIC = "(Tensor! result, Tensor input, Tensor scale, Tensor? azp) -> ()"
FP8_TOKEN = "(Tensor! result, Tensor input, Tensor! scale, Tensor? scale_ub) -> ()"
FP8_STATIC = "(Tensor! result, Tensor input, Tensor scale, int[]? group_shape=None) -> ()"
FP8_GROUP = (
    "(Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps, float fp8_min, float fp8_max, "
    "bool scale_ue8m0, bool dummy_is_scale_transposed, bool dummy_is_tma_aligned) -> ()"
)


def multiply(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """Marlin's product from its own words and scales, in the order that it has by the number of groups."""
    return scaled(x, *unpacked(packed, scales, None, UINT4B8), UINT4B8)


def unpacked(packed: Tensor, scales: Tensor, zeros: Tensor | None, type_id: int) -> tuple[Tensor, Tensor]:
    """Codes ``[N, K]`` and scales ``[N, G]`` in fp32, as the kernel decodes them."""
    assert packed.is_contiguous()
    assert scales.is_contiguous()
    bits = 8 if type_id in (UINT8B128, E4M3) else 4
    fields = layout.unpack_weight(packed, bits).int() + (1 << (bits - 1))
    if type_id == E4M3:
        codes = fields.to(torch.uint8).view(torch.float8_e4m3fn).float()
    elif type_id == E2M1:
        codes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])[fields & 7] * (1 - 2 * (fields >> 3))
    else:
        codes = (fields - {UINT4B8: 8, UINT8B128: 128, UINT4: 0}[type_id]).float()
    if scales.dtype.itemsize == 1:
        in_order = scales.view(torch.uint8).unflatten(-1, (-1, 4))[..., [0, 2, 1, 3]].flatten(-2)
        raw = layout.unpack_scales(in_order)
        if scales.dtype == torch.float8_e8m0fnu:
            return codes, raw.view(torch.float8_e8m0fnu).float()
        return codes, (raw.to(torch.int16) << 8 >> 1 & 0x7FFF).view(FP16).float()  # exponents of five bits, no sign
    scale = layout.unpack_scales(scales).float()
    if zeros is not None:
        codes = codes - unpacked_zero_points(zeros, len(codes)).repeat_interleave(codes.shape[1] // len(zeros), 1)
    return codes, scale


def unpacked_zero_points(packed: Tensor, n: int) -> Tensor:
    """Zero points ``[N, G]`` in [0, 15], index by index: word 8 t + r holds column 64 t + r + 8 i, evens first."""
    zero_point = torch.empty(n, len(packed), dtype=torch.int32)
    for word in range(n // 8):
        for field, i in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            zero_point[64 * (word // 8) + word % 8 + 8 * i] = packed[:, word] >> (4 * field) & 0xF
    return zero_point


def scaled(x: Tensor, codes: Tensor, scale: Tensor, type_id: int) -> Tensor:
    """The kernel's product: 4-bit codes of one group are scaled after its rounding, 8-bit ones before."""
    assert x.is_contiguous()
    if scale.shape[1] > 1:
        return F.linear(x, (codes * scale.repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)).to(x.dtype))
    if type_id == UINT8B128:
        return (F.linear(x.float(), codes) * scale.T).to(x.dtype)
    return F.linear(x, codes.to(x.dtype)) * scale.T.to(x.dtype)


def repack(b_q_weight, perm, size_k, size_n, num_bits, is_a_8bit=False) -> Tensor:
    assert b_q_weight.is_contiguous()
    assert b_q_weight.shape == (size_k * num_bits // 32, size_n)
    assert perm.dtype == torch.int32
    assert not perm.numel()
    assert not is_a_8bit
    return layout.pack_weight(words.unpack(b_q_weight.T, num_bits), num_bits)


def check_flags(type_ids, type_id, workspace, size, fp32_reduce, atomic_add, k_full, zp_float) -> None:
    assert type_id in type_ids
    assert workspace.dtype == torch.int32
    assert workspace.shape == (size,)
    assert not workspace.any()
    assert fp32_reduce
    assert k_full
    assert not atomic_add
    assert not zp_float


# exponent 0, mantissa 4, signed 0, bias 8, finite values only 0, NaN as in IEEE 754 (1): 8, 8, 1, 32, 1 and 8 bits.
UINT4B8 = 0 | 4 << 8 | 0 << 16 | 8 << 17 | 0 << 49 | 1 << 50
# As `vllm.scalar_type` prints them.
UINT8B128, UINT4, E2M1, E4M3 = 1125899923621888, 1125899906843648, 562949953487106, 2814749767172868


def gemm(
    a, c, b_q_weight, bias, b_scales, a_scales, global_scale, zeros, g_idx, perm, workspace, type_id, m, n, k, *flags
):
    k_full, atomic_add, fp32_reduce, zp_float = flags
    types = (UINT4B8, UINT8B128, UINT4, E2M1, E4M3)
    check_flags(types, type_id, workspace, 3, fp32_reduce, atomic_add, k_full, zp_float)
    assert (c, a_scales, g_idx, perm) == (None,) * 4
    assert (zeros is not None) == (type_id == UINT4)
    assert (global_scale is not None) == (b_scales.dtype == torch.float8_e4m3fn)
    assert b_scales.dtype == (a.dtype if type_id not in (E2M1, E4M3) else b_scales.dtype)
    assert a.shape == (m, k)
    assert m
    codes, scale = unpacked(b_q_weight, b_scales, zeros, type_id)
    if global_scale is None:
        y = scaled(a, codes, scale, type_id)
    else:
        assert global_scale.dtype == FP32
        weight = codes * scale.repeat_interleave(16, dim=1)
        undone = global_scale * 2.0 ** (-126 if a.dtype == BF16 else -14)  # to which the kernel widens codes
        y = (F.linear(a.float(), weight) * undone).to(a.dtype)
    assert y.shape == (m, n)
    if bias is None:
        return y
    bias = layout.unpack_scales(bias.unsqueeze(0)).squeeze(-1)
    if len(b_scales) > 1 or type_id == UINT8B128:
        return y + bias
    unscaled = scaled(a, codes, torch.ones_like(scale), type_id)
    return torch.addcmul(bias.double(), unscaled.double(), scale.squeeze(-1).double()).to(a.dtype)


def sgl_gemm(a, c, b_q_weight, b_scales, global_scale, zeros, g_idx, perm, workspace, type_id, m, n, k, *flags):
    k_full, atomic_add, fp32_reduce, zp_float = flags
    check_flags((UINT4B8,), type_id, workspace, 3, fp32_reduce, atomic_add, k_full, zp_float)
    assert (c, global_scale, zeros, g_idx, perm) == (None,) * 5
    assert a.shape == (m, k)
    assert m
    return multiply(a, b_q_weight, b_scales)


def moe_gemm(a, c, b_q_weight, bias, b_scales, a_scales, global_scale, zeros, g_idx, perm, workspace, slots, *rest):
    owners, padded, topk_weights, block, top_k, weigh, type_id, m, n, _ = rest[:10]
    k_full, atomic_add, fp32_reduce, zp_float = rest[10:14]
    check_flags((UINT4B8,), type_id, workspace, 12, fp32_reduce, atomic_add, k_full, zp_float)
    assert (c, bias, a_scales, global_scale, zeros, g_idx, perm) == (None,) * 7
    assert (top_k, weigh) == (1, False)
    assert {slots.dtype, owners.dtype, padded.dtype} == {torch.int32}
    assert topk_weights.dtype == FP32
    assert padded.item() == len(slots) == block * len(owners)
    assert rest[14:] == (-1, -1, -1)
    y = torch.full((m, n), torch.nan, dtype=a.dtype)
    for own, rows in zip(owners.tolist(), slots.long().view(-1, block), strict=True):
        rows = rows[: int((rows < m).sum())]  # the kernel reads up to the first that is none
        assert (rows < m).all()
        assert len(rows)
        y[rows] = multiply(a[rows], b_q_weight[own], b_scales[own])
    return y


def prepack(b, a_type, b_type, group_scales_type) -> Tensor:
    assert b.stride(0) == 1
    assert b_type in (UINT4B8, UINT8B128)
    assert a_type == group_scales_type
    return b


def mm(a, b, b_type, out_type, group_scales, group_zeros, group_size, *rest) -> Tensor:
    assert (out_type, group_zeros, *rest) == (None,) * 5
    assert group_scales.is_contiguous()
    scale = group_scales.T.repeat_interleave(group_size, dim=1)
    return F.linear(a, words.unpack(b.T, {UINT4B8: 4, UINT8B128: 8}[b_type]).to(a.dtype) * scale)


def quantize_int8_tokens(result, input, scale, azp) -> None:
    assert azp is None
    check_rows(result, input, scale, torch.int8, (*input.shape[:1], 1))
    amax = input.float().abs().amax(1, keepdim=True)
    scale.copy_(amax / 127)
    result.copy_((input.float() * (torch.full_like(amax, 127) / amax)).nan_to_num().round())


def quantize_int8_static(result, input, scale, azp) -> None:
    assert azp is None
    check_rows(result, input, scale, torch.int8, (1,))
    result.copy_((input.float() / scale).round().clamp(-128, 127))


def quantize_fp8_tokens(result, input, scale, scale_ub) -> None:
    assert scale_ub is None
    check_rows(result, input, scale, torch.float8_e4m3fn, (*input.shape[:1], 1))
    scale.copy_((input.float().abs().amax(1, keepdim=True) / 448).clamp(min=1 / (448 * 512)))
    result.copy_((input.float() / scale).clamp(-448, 448))


def quantize_fp8_static(result, input, scale, group_shape) -> None:
    assert tuple(group_shape) == (-1, -1)
    check_rows(result, input, scale, torch.float8_e4m3fn, (1,))
    result.copy_((input.float() * (torch.ones_like(scale) / scale)).clamp(-448, 448))


def quantize_fp8_groups(input, q, s, group_size, eps, low, high, ue8m0, transposed, aligned) -> None:
    check_rows(q, input, s, torch.float8_e4m3fn, (len(input), input.shape[1] // 128))
    assert (group_size, eps, low, high) == (128, 1e-10, -448, 448)
    assert s.stride() == (1, len(input))
    groups = input.float().unflatten(1, (-1, 128))
    scale = groups.abs().amax(-1).clamp(min=eps) / 448
    s.copy_(scale.clamp(min=1e-10).log2().ceil().exp2() if ue8m0 else scale)
    q.copy_((groups / s.unsqueeze(-1)).clamp(low, high).flatten(1))


def check_rows(result, input, scale, dtype, scale_shape) -> None:
    assert input.is_contiguous()
    assert result.is_contiguous()
    assert (result.dtype, scale.dtype) == (dtype, FP32)
    assert result.shape == input.shape
    assert scale.shape == scale_shape


def scaled_mm(out, a, b, a_scales, b_scales, bias) -> None:
    """Sums in float64; the epilogue of INT8 as on a GPU, that of FP8 in one rounding."""
    (m, k), n = a.shape, b.shape[1]
    assert a.is_contiguous()
    assert b.stride() == (1, k)
    assert a.dtype == b.dtype
    assert {a_scales.dtype, b_scales.dtype} == {FP32}
    x, w = a.double(), b.double()
    if a_scales.numel() not in (1, m):
        assert bias is None
        assert m % 4 == 0
        assert a_scales.shape == (m, k // 128)
        assert a_scales.stride(0) == 1
        assert b_scales.shape == (-(-k // 128), -(-n // 128))
        assert b_scales.T.is_contiguous()
        spread = b_scales.double().repeat_interleave(128, 0)[:k].repeat_interleave(128, 1)[:, :n]
        out.copy_((x * a_scales.double().repeat_interleave(128, 1)) @ (w * spread))
        return
    assert a_scales.is_contiguous()
    assert b_scales.is_contiguous()
    assert b_scales.numel() in (1, n)
    partly = (x @ w).float() * b_scales.reshape(1, -1)
    out.copy_((partly.double() * a_scales.reshape(-1, 1).double() + (0 if bias is None else bias.double())).float())


OPERATORS: dict[str, tuple[str, Callable]] = {
    "_C::cutlass_scaled_mm": (CUTLASS_MM, scaled_mm),
    "_C::dynamic_scaled_int8_quant": (INT8_TOKEN, quantize_int8_tokens),
    "_C::static_scaled_int8_quant": (INT8_STATIC, quantize_int8_static),
    "_C::dynamic_per_token_scaled_fp8_quant": (FP8_TOKEN, quantize_fp8_tokens),
    "_C::static_scaled_fp8_quant": (FP8_STATIC, quantize_fp8_static),
    "_C::per_token_group_fp8_quant": (FP8_GROUP, quantize_fp8_groups),
    "_C::gptq_marlin_repack": (REPACK, repack),
    "_C::marlin_gemm": (GEMM, gemm),
    "_C::machete_prepack_B": (PREPACK, prepack),
    "_C::machete_mm": (MM, mm),
    "_moe_C::moe_wna16_marlin_gemm": (MOE_GEMM, moe_gemm),
    "sgl_kernel::gptq_marlin_repack": (SGL_REPACK, repack),
    "sgl_kernel::gptq_marlin_gemm": (SGL_GEMM, sgl_gemm),
}

Register = Callable[..., None]


@pytest.fixture
def register(monkeypatch) -> Iterator[Register]:
    """Registers emulated operators for one test, on a machine that seems to have a Hopper GPU."""
    if any(map(engines._registered, OPERATORS)):
        pytest.skip("an engine's own operators are loaded in this process")
    monkeypatch.setattr(engines, "capability", lambda device: (9, 0))
    monkeypatch.setattr(engines, "multiprocessors", lambda device: 3)
    forget()
    with ExitStack() as stack:

        def run(name: str, schema: str | None = None, keys: tuple[str, ...] = ("CPU", "CUDA")) -> None:
            namespace, operator = name.split("::")
            library = stack.enter_context(_scoped_library(namespace, "FRAGMENT"))
            library.define(operator + (schema or OPERATORS[name][0]))
            for key in keys:
                library.impl(operator, OPERATORS[name][1], key)

        yield run
    forget()


@pytest.fixture
def operators(register) -> None:
    """All of them."""
    for name in OPERATORS:
        register(name)


def forget() -> None:
    """What a process remembers of the operators that it found."""
    for cache in (engines.resolve, engines._load):
        cache.cache_clear()


# What is passed, on the CPU ------------------------------------------------------------------------------------------

LINEARS = {"vllm-marlin": vllm.marlin, "sgl-marlin": sgl.marlin, "vllm-machete": vllm.machete}
REASONS = {
    "vllm-marlin": vllm.marlin_unavailable,
    "sgl-marlin": sgl.marlin_unavailable,
    "vllm-machete": vllm.machete_unavailable,
    "experts": vllm.expert_linear_unavailable,
}


@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape", [(256,), (5, 256), (2, 3, 256), (0, 256), (2, 0, 256)], ids=str)
@DTYPES
@GROUPINGS
@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.usefixtures("operators")
def test_kernel_is_given_what_it_needs_to_compute_the_reference(name, group_size, dtype, shape, has_bias):
    spec = spec_of(group_size, dtype)
    if name == "vllm-machete" and group_size not in vllm.MACHETE_GROUP_SIZES:
        assert REASONS[name](spec, CUDA)
        return
    assert REASONS[name](spec, CUDA) is None
    quantized, x = grid.quantize(randn(128, 256), spec), randn(*shape, dtype=dtype, seed=1)
    bias = randn(128, dtype=dtype, seed=2) if has_bias else None
    y = LINEARS[name](x, quantized, spec, bias)
    assert y.dtype == dtype
    if has_bias and name != "vllm-marlin":  # which multiplies with a single scale and adds the bias in one rounding
        assert torch.equal(y, reference_linear(x, quantized, spec) + bias)
    else:
        assert torch.equal(y, reference_linear(x, quantized, spec, bias))


def weight_only(name: str, dtype: torch.dtype, **fields) -> TensorSpec:
    spec = Scheme.preset(name, served_dtype=dtype, **fields).weights
    return replace(spec, scale_dtype=dtype) if spec.format in ("int4", "int8") else spec


CHANNELS = {"strategy": "channel"}
# What Marlin computes beside symmetric INT4.
WEIGHT_ONLY = pytest.mark.parametrize(
    "spec",
    [
        *(weight_only(name, dtype) for name in ("W8A16", "W4A16_ASYM", "NVFP4A16") for dtype in (BF16, FP16)),
        *(weight_only(name, BF16, group_size=32) for name in ("W8A16", "W4A16_ASYM")),
        *(weight_only(name, dtype, **CHANNELS) for name in ("W8A16", "W4A16_ASYM") for dtype in (BF16, FP16)),
        *(weight_only(name, BF16) for name in ("MXFP4A16", "MXFP8A16")),
    ],
    ids=lambda spec: f"{spec} {'' if spec.symmetric else 'zero points'}",
)


@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
@WEIGHT_ONLY
@pytest.mark.usefixtures("operators")
def test_marlin_is_given_codes_scales_and_zero_points_of_every_format(spec, has_bias):
    assert vllm.marlin_unavailable(spec, CUDA) is None
    weight = randn(128, 256) * torch.logspace(-3, 0, 256)  # scales of many magnitudes
    weight[0], weight[1, :32] = 0, 0
    quantized, x = grid.quantize(weight, spec), randn(2, 3, 256, dtype=spec.served_dtype, seed=1)
    bias = randn(128, dtype=spec.served_dtype, seed=2) if has_bias else None
    y = vllm.marlin(x, quantized, spec, bias)
    assert y.isfinite().all()
    assert torch.equal(y, reference_linear(x, quantized, spec, bias))


@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
@DTYPES
@pytest.mark.usefixtures("operators")
def test_machete_computes_int8_groups(dtype, has_bias):
    """What vLLM takes for them on Hopper."""
    spec = weight_only("W8A16", dtype)
    assert vllm.machete_unavailable(spec, CUDA) is None
    quantized, x = grid.quantize(randn(128, 256), spec), randn(3, 256, dtype=dtype, seed=1)
    bias = randn(128, dtype=dtype, seed=2) if has_bias else None
    assert torch.equal(vllm.machete(x, quantized, spec, bias), reference_linear(x, quantized, spec, bias))


@DTYPES
@pytest.mark.usefixtures("operators")
def test_nvfp4_scales_below_a_larger_range_are_raised_and_the_sums_lowered(dtype):
    """With the range of the layers that it is fused with even the largest scale of a layer is small."""
    spec = weight_only("NVFP4A16", dtype)
    quantized = grid.quantize(randn(128, 256) * 1e-3, spec, torch.full((1, 1), 8.0))
    assert 2**-6 < quantized.scale.float().max() < 1
    x = randn(5, 256, dtype=dtype, seed=1)
    assert torch.equal(vllm.marlin(x, quantized, spec), reference_linear(x, quantized, spec))


@pytest.mark.parametrize("shape", [(64, 1), (192, 3), (2, 128, 4)], ids=str)
def test_zero_points_are_where_the_kernel_reads_them(shape):
    zero_point = torch.randint(-8, 8, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    packed = layout.pack_zero_points(zero_point)
    assert packed.shape == (*shape[:-2], shape[-1], shape[-2] // 8)
    for words_of_one, one in zip(packed.view(-1, *packed.shape[-2:]), zero_point.view(-1, *shape[-2:]), strict=True):
        assert torch.equal(unpacked_zero_points(words_of_one, shape[-2]), one.int() + 8)
    with pytest.raises(ValueError, match="N=96"):
        layout.pack_zero_points(zero_point.new_zeros(96, 2))


@pytest.mark.parametrize(("n", "k"), [(64, 128), (128, 64), (192, 384)])
@pytest.mark.usefixtures("operators")
def test_shapes_that_marlin_takes(n, k):
    spec = spec_of(32)
    quantized, x = grid.quantize(randn(n, k), spec), randn(7, k, dtype=BF16)
    for linear in (vllm.marlin, sgl.marlin):
        assert torch.equal(linear(x, quantized, spec), reference_linear(x, quantized, spec))


@pytest.mark.usefixtures("operators")
def test_marlin_scales_a_single_group_after_the_gemm_and_machete_refuses_it():
    """To Marlin a row of one group is channel-wise; Machete knows no other order than the grouped one."""
    quantized, x = grid.quantize(randn(128, 128), GROUPED), randn(3, 128, dtype=BF16)
    assert torch.equal(vllm.marlin(x, quantized, GROUPED), F.linear(x, quantized.codes.to(BF16)) * quantized.scale.T)
    with pytest.raises(ValueError, match=r"N=128, K=128: Machete needs .* several groups in a row"):
        vllm.machete(x, quantized, GROUPED)


@pytest.mark.parametrize(
    ("name", "n", "k", "message"),
    [
        ("vllm-marlin", 64, 64, "N=64, K=64: Marlin needs N % 64 == 0 and K % 128"),
        ("sgl-marlin", 96, 256, "N=96, K=256: Marlin needs"),
        ("vllm-machete", 64, 256, "N=64, K=256: Machete needs N % 128 == 0"),
    ],
)
@pytest.mark.usefixtures("operators")
def test_shapes_that_a_kernel_cannot_take_are_an_error_with_their_sizes(name, n, k, message):
    spec = spec_of(64)
    with pytest.raises(ValueError, match=message):
        LINEARS[name](randn(2, k, dtype=BF16), grid.quantize(randn(n, k), spec), spec)


@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.usefixtures("operators")
def test_input_or_bias_of_another_dtype_is_an_error_that_says_what_to_do(name):
    """The kernel would read its bits as numbers of the served dtype, or refuse it in words of its own."""
    quantized = grid.quantize(randn(128, 256), GROUPED)
    with pytest.raises(ValueError, match=r"input is float32 and int4 g128 .* served in bfloat16: run the model in .*"):
        LINEARS[name](randn(2, 256), quantized, GROUPED)
    with pytest.raises(ValueError, match=r"bias is float16 .* torch\.autocast .* served_dtype=torch\.float16"):
        LINEARS[name](randn(2, 256, dtype=BF16), quantized, GROUPED, randn(128, dtype=FP16))


# Quantized inputs, on the CPU -----------------------------------------------------------------------------------------

FP8_TOKEN_SPEC = ActivationSpec("fp8_e4m3", "token")
SCHEMES = {
    "W8A8": Scheme.preset("W8A8"),
    "W8A8 static": Scheme.preset("W8A8", {"strategy": "tensor", "dynamic": False}),
    "W8A8 fp16": Scheme.preset("W8A8", served_dtype=FP16),
    "FP8": Scheme.preset("FP8"),
    "FP8 tensor x token": replace(Scheme.preset("FP8"), activations=FP8_TOKEN_SPEC),
    "FP8_DYNAMIC": Scheme.preset("FP8_DYNAMIC"),
    "FP8_DYNAMIC fp16": Scheme.preset("FP8_DYNAMIC", served_dtype=FP16),
    "FP8 static": replace(Scheme.preset("FP8_DYNAMIC"), activations=Scheme.preset("FP8").activations),
    "FP8_BLOCK": Scheme.preset("FP8_BLOCK"),
    "FP8_BLOCK pow2": Scheme.preset("FP8_BLOCK", {"power_of_two": True}, scale_rule="pow2/448"),
}
QUANTIZED_INPUTS = pytest.mark.parametrize("name", SCHEMES)


def measured(x: Tensor, scheme: Scheme) -> Tensor | None:
    """The stored scale of static inputs: some of `x` is clipped."""
    assert scheme.activations is not None
    if not scheme.activations.stores_scale:
        return None
    return activations.static_scale(x.float().abs().amax() * 0.8, scheme.activations)


@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape", [(256,), (5, 256), (2, 3, 256)], ids=str)
@QUANTIZED_INPUTS
@pytest.mark.usefixtures("operators")
def test_cutlass_is_given_what_it_needs_to_compute_the_reference(name, shape, has_bias):
    scheme = SCHEMES[name]
    dtype = scheme.weights.served_dtype
    kernel = kernels.find("linear", "vllm-cutlass", scheme, CUDA)
    quantized, x = grid.quantize(randn(144, 256), scheme.weights), randn(*shape, dtype=dtype, seed=1)
    stored = measured(randn(8, 256), scheme)
    bias = randn(144, dtype=dtype, seed=2) if has_bias else None
    y = kernel.run(x, quantized, scheme, bias, stored)
    expected = reference.linear(x, quantized, scheme, bias, stored)
    assert (y.dtype, y.shape) == (dtype, expected.shape)
    if name.startswith("W8A8"):
        assert torch.equal(y, expected)
    else:  # the order of fp32 additions is the backend's
        torch.testing.assert_close(y, expected, rtol=2**-7, atol=2**-7)
        assert shares(y, expected) > 0.95


@QUANTIZED_INPUTS
@pytest.mark.usefixtures("operators")
def test_no_rows_of_quantized_inputs(name):
    scheme = SCHEMES[name]
    quantized, bias = grid.quantize(randn(144, 256), scheme.weights), randn(144, dtype=scheme.weights.served_dtype)
    y = vllm.cutlass(randn(2, 0, 256).to(bias.dtype), quantized, scheme, bias, torch.ones(1))
    assert (y.shape, y.dtype) == ((2, 0, 144), bias.dtype)


@QUANTIZED_INPUTS
@pytest.mark.usefixtures("operators")
def test_inputs_are_quantized_as_in_training(name):
    """Every code and scale, also of rows of zeros and of rows with one large number."""
    scheme = SCHEMES[name]
    assert scheme.activations is not None
    x = randn(8, 384, dtype=BF16) * torch.tensor([0, 1, 1e-8, 1e4, 1, 1, 1, 1]).unsqueeze(1).to(BF16)
    x[4, 7] = 300
    stored = measured(x, scheme)
    found = vllm.quantize_inputs(x, scheme.activations, stored)
    expected = activations.quantize(x, scheme.activations, stored)
    assert torch.equal(found.scale, expected.scale)
    assert torch.equal(found.codes.float(), expected.codes.float())


@pytest.mark.usefixtures("operators")
def test_cutlass_refuses_shapes_dtypes_and_inputs_without_their_scale():
    scheme = SCHEMES["FP8 static"]
    quantized = grid.quantize(randn(128, 256), scheme.weights)
    x, stored = randn(2, 256, dtype=BF16), torch.ones(1)
    with pytest.raises(ValueError, match="need a measured input_scale: run lockstep calibrate"):
        vllm.cutlass(x, quantized, scheme)
    with pytest.raises(ValueError, match="input is float32"):
        vllm.cutlass(x.float(), quantized, scheme, None, stored)
    for n, k in ((120, 256), (128, 248)):
        small = grid.quantize(randn(n, k), scheme.weights)
        with pytest.raises(ValueError, match=f"N={n}, K={k}: cutlass_scaled_mm takes multiples of 16"):
            vllm.cutlass(x[:, :k], small, scheme, None, stored)


SGLANG = Scheme.preset("W8A8", {"engine": "sglang"})


@pytest.mark.parametrize(
    ("scheme", "capability", "reason"),
    [
        (Scheme(), (9, 0), "quantized inputs, the scheme leaves them as they are"),
        (SGLANG, (9, 0), "the scheme trains the arithmetic of sglang"),
        (Scheme.preset("W4A8"), (9, 0), "INT8 rows and FP8 tensors, rows and blocks, not int4 g128"),
        (Scheme.preset("W4AFP8"), (9, 0), "INT8 rows and FP8 tensors, rows and blocks, not int4 g128"),
        (Scheme.preset("NVFP4"), (10, 0), "INT8 rows and FP8 tensors, rows and blocks, not fp4_e2m1"),
        (Scheme.preset("MXFP8"), (10, 0), "INT8 rows and FP8 tensors, rows and blocks, not fp8_e4m3 g32"),
        (SCHEMES["W8A8"], (10, 0), "8.0 to 9.0 (vLLM has no INT8 GEMM for newer ones), cuda has 10.0"),
        (SCHEMES["FP8_DYNAMIC"], (8, 0), "8.9 or newer, cuda has 8.0"),
        (SCHEMES["FP8_BLOCK"], (8, 9), "9.0 or newer, cuda has 8.9"),
        (Scheme.preset("FP8_DYNAMIC", served_dtype=FP32), (9, 0), "the scheme is served in float32"),
        (SCHEMES["W8A8"], None, "no device cuda"),
    ],
)
@pytest.mark.usefixtures("operators")
def test_schemes_and_gpus_that_cutlass_does_not_compute(monkeypatch, scheme, capability, reason):
    monkeypatch.setattr(engines, "capability", lambda device: capability)
    assert reason in vllm.cutlass_unavailable(scheme, CUDA)
    with pytest.raises(kernels.KernelUnavailable, match="linear kernel 'vllm-cutlass' cannot compute"):
        kernels.find("linear", "vllm-cutlass", scheme, CUDA)


@pytest.mark.parametrize(
    ("name", "schema", "message"),
    [
        ("cutlass_scaled_mm", CUTLASS_MM.replace("Tensor? bias", "Tensor? bias, bool swap"), "needs swap"),
        ("dynamic_scaled_int8_quant", INT8_TOKEN.replace("Tensor!? azp", "Tensor!? zero"), "no argument azp"),
    ],
)
def test_cutlass_with_other_arguments_is_refused(register, name, schema, message):
    for other in ("cutlass_scaled_mm", "dynamic_scaled_int8_quant"):
        register(f"_C::{other}", schema if other == name else None)
    reason = vllm.cutlass_unavailable(SCHEMES["W8A8"], CUDA)
    assert reason.startswith(f"_C::{name} of ")
    assert message in reason


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (Scheme.preset("FP8_DYNAMIC").weights, "rounds the fp32 scales of FP8 weights to 16 bits"),
        (
            Scheme.preset("MXFP4A16", served_dtype=FP16).weights,
            "MX formats in bfloat16, the scheme is served in float16",
        ),
        (Scheme.preset("NVFP4A16", served_dtype=FP32).weights, "the scheme is served in float32"),
        (Scheme.preset("W8A16", scale_dtype=FP32).weights, "the scheme stores them in float32"),
    ],
)
@pytest.mark.usefixtures("operators")
def test_formats_that_marlin_does_not_compute(spec, reason):
    assert reason in vllm.marlin_unavailable(spec, CUDA)


@pytest.mark.usefixtures("operators")
def test_weight_only_kernels_refuse_quantized_inputs_and_other_formats_by_name():
    for name, scheme, reason in (
        ("vllm-marlin", SCHEMES["W8A8"], "multiplies with inputs as they are, the scheme quantizes them to int8"),
        ("vllm-machete", Scheme.preset("W4A16_ASYM"), "the scheme trains Marlin's"),
        ("vllm-machete", Scheme.preset("NVFP4A16"), "INT4 and INT8 weights, not fp4_e2m1"),
        ("vllm-machete", Scheme.preset("W4AFP8"), "multiplies with inputs as they are"),
        ("sgl-marlin", Scheme.preset("W4A16_ASYM"), "symmetric INT4 weights"),
    ):
        with pytest.raises(kernels.KernelUnavailable, match=reason):
            kernels.find("linear", name, scheme, CUDA)
    assert "stacked experts" in vllm.expert_linear_unavailable(Scheme.preset("W8A16").weights, CUDA)


# Experts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [1, 4, 7])
@pytest.mark.parametrize("rows", [1, 13, 300])
@pytest.mark.parametrize("group_size", [64, None], ids=["g64", "channel"])
@pytest.mark.usefixtures("operators")
def test_each_row_goes_through_its_own_expert(group_size, rows, experts):
    spec = spec_of(group_size)
    quantized, x = grid.quantize(randn(experts, 128, 256), spec), randn(rows, 256, dtype=BF16, seed=1)
    expert_of_row = torch.randint(experts, (rows,), generator=torch.Generator().manual_seed(2))
    assert vllm.expert_linear_unavailable(spec, CUDA) is None
    y = vllm.expert_linear(x, quantized, expert_of_row, spec)
    assert torch.equal(y, by_expert(reference_linear, x, quantized, expert_of_row, spec))


def by_expert(
    linear: Callable, x: Tensor, quantized: grid.Quantized, expert_of_row: Tensor, spec: TensorSpec
) -> Tensor:
    y = x.new_empty(len(x), quantized.codes.shape[1])
    for expert in expert_of_row.unique().tolist():
        rows = expert_of_row == expert
        y[rows] = linear(x[rows], grid.Quantized(*(tensor[expert] for tensor in quantized[:2])), spec)
    return y


def qwen3_moe_experts(device: torch.device, group_size: int | None, **sizes: int) -> tuple[Any, dict[str, Tensor]]:
    """The experts of a prepared Qwen3-MoE's layer, and what it streams of them for Marlin: words and scales by name."""
    pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    from models import tiny_moe

    import lockstep

    scheme = Scheme(spec_of(group_size))
    model = tiny_moe("qwen3_moe", num_hidden_layers=1, **sizes).to(device)
    lockstep.prepare(model, scheme, targets="re:.*experts$")
    stored = {
        name.rpartition(".experts.")[2]: tensor
        for name, tensor in lockstep.export.stream(model, format="marlin")
        if ".experts." in name
    }
    assert [*stored] == [f"{which}_weight_{what}" for which in ("w13", "w2") for what in ("packed", "scale")]
    return model.model.layers[0].mlp.experts, stored


def streamed(stored: dict[str, Tensor], which: str, spec: TensorSpec) -> grid.Quantized:
    """Codes and scales of all experts from streamed words, which the engine's own repacking gives back bit for bit."""
    packed, scales = stored[f"{which}_weight_packed"], stored[f"{which}_weight_scale"]
    quantized = grid.Quantized(layout.unpack_weight(packed, 4), layout.unpack_scales(scales))
    for codes, scale, words_of_one, scales_of_one in zip(*quantized[:2], packed, scales, strict=True):
        assert torch.equal(vllm._marlin_words(codes, spec), words_of_one)
        assert torch.equal(vllm._marlin_scales(grid.Quantized(codes, scale), spec)[0], scales_of_one)
    return quantized


def in_the_engine(module: Any, stored: dict[str, Tensor], x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The whole layer in the order of vLLM's MarlinExperts, its two GEMMs by vLLM's kernel on the streamed words."""
    spec, pairs = module.scheme.weights, index.flatten()
    rows = x.repeat_interleave(index.shape[1], 0)
    gate, up = vllm.expert_linear(rows, streamed(stored, "w13", spec), pairs, spec).chunk(2, -1)
    y = vllm.expert_linear((F.silu(gate) * up).contiguous(), streamed(stored, "w2", spec), pairs, spec)
    weighed = y * weights.flatten().to(y.dtype).unsqueeze(-1)
    return weighed.view(*index.shape, -1).float().sum(1).to(x.dtype)


def reads_streamed_experts_back(device: torch.device, group_size: int | None) -> None:
    sizes = {"hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 8}
    module, stored = qwen3_moe_experts(device, group_size, **sizes)
    for which, master in (("w13", module.gate_up_proj), ("w2", module.down_proj)):
        experts, n, k = master.shape
        quantized = streamed(stored, which, module.scheme.weights)
        x = torch.eye(k, dtype=BF16, device=device).repeat(experts, 1)
        expert_of_row = torch.arange(experts, device=device).repeat_interleave(k)
        y = vllm.expert_linear(x, quantized, expert_of_row, module.scheme.weights).view(experts, k, n).mT
        assert torch.equal(y, grid.fake_quantize(master.detach(), module.scheme.weights))


# Of a layer's outputs at least so many are equal. On an H200, vLLM 0.22.1 gave 98.3 % of the larger one's with groups
# of 32 and 512 tokens: of 6,144 values that reach an output through the second GEMM, some six are rounded otherwise.
EXPERT_LAYERS = {
    "256-128": ({"hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 8}, 2, 0.999),
    "Qwen3-30B-A3B": ({"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 16}, 8, 0.975),
}


def layer_agrees(device: torch.device, group_size: int | None, tokens: int, shape: str, least: float | None) -> None:
    from lockstep.qat.experts import by_expert as in_order

    sizes, top_k, stated = EXPERT_LAYERS[shape]
    module, stored = qwen3_moe_experts(device, group_size, **sizes)
    generator = torch.Generator().manual_seed(tokens)
    scores = torch.rand(tokens, sizes["num_experts"], generator=generator)
    weights, index = (one.to(device) for one in scores.topk(top_k))
    x = randn(tokens, sizes["hidden_size"], dtype=BF16, seed=1, device=device)
    with torch.no_grad():
        y = in_the_engine(module, stored, x, index, weights)
        reference_layer = in_order(module, x, index, weights, linear=lambda expert, rows: expert(rows))
        least = stated if least is None else least
        assert shares(y, reference_layer) >= least
        assert shares(y, module(x, index, weights)) >= least  # in whichever implementation trains here


@pytest.mark.parametrize("group_size", [32, 64, None], ids=["g32", "g64", "channel"])
@pytest.mark.usefixtures("operators")
def test_streamed_experts_are_what_the_engine_repacks(group_size):
    reads_streamed_experts_back(CPU, group_size)


@pytest.mark.parametrize("group_size", [32, None], ids=["g32", "channel"])
@pytest.mark.usefixtures("operators")
def test_a_layer_of_streamed_experts_is_computed_as_it_trains(group_size):
    layer_agrees(CPU, group_size, 33, "256-128", least=1.0)


@pytest.mark.usefixtures("operators")
def test_no_rows_and_rows_of_no_expert():
    quantized = grid.quantize(randn(2, 128, 256), GROUPED)
    nothing = torch.empty(0, dtype=torch.int64)
    assert vllm.expert_linear(randn(0, 256, dtype=BF16), quantized, nothing, GROUPED).shape == (0, 128)
    with pytest.raises(ValueError, match="there are 2 experts, the rows name 1 to 2"):
        vllm.expert_linear(randn(2, 256, dtype=BF16), quantized, torch.tensor([1, 2]), GROUPED)


def test_blocks_of_experts_are_those_of_the_engine():
    """The example of vLLM's ``moe_align_block_size``: each expert's rows in order, filled up with the index of none."""
    chosen = torch.tensor([2, 3, 4, 1, 2, 4, 1, 3, 4, 1, 2, 3]) - 1
    slots, owners = vllm.blocks_of_experts(chosen, 4, 4)
    assert slots.tolist() == [3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12, 2, 5, 8, 12]
    assert owners.tolist() == [0, 1, 2, 3]
    slots, owners = vllm.blocks_of_experts(torch.tensor([2, 0, 2, 2]), 3, 2)
    assert slots.tolist() == [1, 4, 0, 2, 3, 4]
    assert owners.tolist() == [0, 2, 2]


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "spec", "device", "reason"),
    [
        (REASONS, GROUPED, "cpu", "runs on CUDA devices, the model is on cpu"),
        (REASONS, spec_of(128, FP32), "cuda", "in bfloat16 and float16, the scheme is served in float32"),
        (REASONS, replace(GROUPED, scale_dtype=FP16), "cuda", "bfloat16: the scheme stores them in float16"),
        (["vllm-machete"], CHANNEL, "cuda", "scales before the GEMM"),
        (["vllm-machete"], spec_of(32), "cuda", "groups of 64 and 128, not of 32"),
    ],
)
@pytest.mark.usefixtures("operators")
def test_specs_and_devices_that_a_kernel_does_not_compute(names, spec, device, reason):
    assert all(reason in REASONS[name](spec, torch.device(device)) for name in names)


@pytest.mark.parametrize(
    ("found", "refused"),
    [((7, 5), REASONS), ((8, 9), ["vllm-machete"]), ((10, 0), ["vllm-machete"]), (None, REASONS)],
)
@pytest.mark.usefixtures("operators")
def test_gpus_that_a_kernel_does_not_run_on(monkeypatch, found, refused):
    monkeypatch.setattr(engines, "capability", lambda device: found)
    message = "no device cuda" if found is None else "needs a GPU of compute capability"
    for name, unavailable in REASONS.items():
        reason = unavailable(GROUPED, CUDA)
        assert (message in reason) if name in refused else reason is None


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (GEMM.replace("Tensor workspace", "Tensor locks"), "has no argument workspace and needs locks, which Lockstep"),
        (GEMM.replace("bool is_zp_float", "bool is_zp_float, bool new"), "needs new, which Lockstep does not pass"),
    ],
)
def test_operator_with_other_arguments_is_refused_with_its_schema(register, schema, message):
    """Arguments that changed their meaning or order between versions must not be filled by position."""
    register("_C::gptq_marlin_repack")
    register("_C::marlin_gemm", schema)
    reason = vllm.marlin_unavailable(GROUPED, CUDA)
    assert reason.startswith("_C::marlin_gemm of ")
    assert message in reason
    assert "its schema is _C::marlin_gemm(Tensor a, " in reason
    quantized = grid.quantize(randn(128, 256), GROUPED)
    with pytest.raises(EngineUnavailable, match=message):
        vllm.marlin(randn(2, 256, dtype=BF16), quantized, GROUPED)


def test_argument_that_has_a_default_is_none_of_our_business(register):
    register("_C::gptq_marlin_repack")
    register("_C::marlin_gemm", GEMM.replace("bool is_zp_float", "bool is_zp_float, bool new=False"))
    assert vllm.marlin_unavailable(GROUPED, CUDA) is None


def test_operator_that_was_declared_but_not_compiled_is_refused(register):
    """As Machete is in builds without Hopper."""
    register("_C::machete_prepack_B")
    register("_C::machete_mm", keys=("CPU",))
    assert "was built without its CUDA kernel" in vllm.machete_unavailable(GROUPED, CUDA)


# How libraries are found ---------------------------------------------------------------------------------------------


@pytest.fixture
def planted(register, tmp_path, monkeypatch) -> Callable[..., Path]:
    """Puts an engine of version 9.8.7 on the path that fails when it is imported; returns its folder."""

    def plant(package: str, *libraries: str, namespace_package: bool = False) -> Path:
        folder = tmp_path / package
        for library in libraries:
            (folder / library).parent.mkdir(parents=True, exist_ok=True)
            (folder / library).write_bytes(b"no library at all")
        folder.mkdir(exist_ok=True)
        if not namespace_package:
            (folder / "__init__.py").write_text("raise AssertionError('the engine was imported')")
        information = tmp_path / f"{package}-9.8.7.dist-info" / "METADATA"
        information.parent.mkdir()
        information.write_text(f"Metadata-Version: 2.1\nName: {package.replace('_', '-')}\nVersion: 9.8.7\n")
        monkeypatch.syspath_prepend(tmp_path)
        return folder

    return plant


@pytest.mark.parametrize(
    ("name", "install"), [("vllm-marlin", "pip install vllm"), ("sgl-marlin", "pip install sgl-kernel==0.3.21")]
)
@pytest.mark.usefixtures("register")
def test_engine_that_is_not_installed(monkeypatch, name, install):
    monkeypatch.setattr(engines, "find_spec", lambda package: None)
    assert REASONS[name](GROUPED, CUDA).endswith(f"is not installed: {install}")
    assert vllm.MARLIN_GEMM.origin() is None


@pytest.mark.parametrize(
    ("package", "name", "patterns"),
    [("vllm", "vllm-marlin", "_C*.so or _moe_C*.so"), ("sgl_kernel", "sgl-marlin", "common_ops*.so or common_ops*.so")],
)
def test_package_without_libraries(planted, package, name, patterns):
    """A source checkout on the path, for one."""
    folder = planted(package)
    reason = REASONS[name](GROUPED, CUDA)
    assert f"{package} 9.8.7 at {folder} has no compiled library" in reason
    assert patterns in reason


@pytest.mark.parametrize(
    ("package", "name", "library"),
    [
        ("vllm", "vllm-marlin", "_C.abi3.so"),
        ("vllm", "vllm-machete", "_C_stable_libtorch.abi3.so"),
        ("vllm", "experts", "_C.abi3.so"),
        ("sgl_kernel", "sgl-marlin", "common_ops.abi3.so"),
    ],
)
def test_library_that_does_not_load_is_a_reason_with_both_versions(planted, package, name, library):
    """A wheel that was built for another torch, in the most cases."""
    folder = planted(package, library)
    reason = REASONS[name](GROUPED, CUDA)
    assert reason.startswith(f"{package} 9.8.7 at {folder} does not load into torch {torch.__version__}")
    assert f"{folder / library}: " in reason
    assert "\n" not in reason


def test_libraries_without_the_operator(planted):
    """An operator moves between libraries and goes away; then what was looked at is named."""
    folder = planted("vllm", "_C.abi3.so", "_moe_C.abi3.so")
    some_library = Path(torch.__file__).parent / "lib" / "libtorch_global_deps.so"
    for name in ("_C.abi3.so", "_moe_C.abi3.so"):
        shutil.copy(some_library, folder / name)
    reason = vllm.marlin_unavailable(GROUPED, CUDA)
    assert f"{folder} has no operator _C::gptq_marlin_repack in _C.abi3.so, _moe_C.abi3.so" in reason


@pytest.mark.parametrize("namespace_package", [False, True])
def test_operators_are_looked_for_until_they_are_there(planted, register, monkeypatch, namespace_package):
    """Here one of two lies in the second library, as in a version that moved it; each library is loaded once."""
    folder = planted(
        "planted", "_C.abi3.so", "_C_stable.abi3.so", "_moe_C.abi3.so", namespace_package=namespace_package
    )
    engine = Engine("planted", ("planted",), "pip install planted", lambda: ("_moe_C*.so", "_C*.so"))
    first, second = (replace(one, engine=engine) for one in (vllm.MARLIN_GEMM, vllm.GPTQ_MARLIN_REPACK))
    loaded = []

    def load(path: str) -> None:
        loaded.append(Path(path).name)
        if loaded[-1] == "_C.abi3.so":
            register("_C::marlin_gemm")
        if loaded[-1] == "_C_stable.abi3.so":
            register("_C::gptq_marlin_repack")

    monkeypatch.setattr(torch.ops, "load_library", load)
    assert first.origin() == second.origin() == f"planted 9.8.7 at {folder}"
    assert not loaded  # to say where it is, nothing is loaded
    assert engines.unresolved(first) is None
    assert loaded == ["_C.abi3.so"]
    assert engines.unresolved(first, second) is None
    assert loaded == ["_C.abi3.so", "_moe_C.abi3.so", "_C_stable.abi3.so"]


@pytest.mark.usefixtures("operators")
def test_operators_of_an_engine_that_is_imported_are_used_as_they_are(planted, monkeypatch):
    folder = planted("vllm", "_C.abi3.so")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail("loaded a second time"))
    assert vllm.marlin_unavailable(GROUPED, CUDA) is None
    assert vllm.MARLIN_GEMM.origin() == f"vllm 9.8.7 at {folder}"


def test_version_without_metadata_beside_the_folder_is_unknown(planted, tmp_path, monkeypatch):
    """Another copy's version, from elsewhere on the path, would be a wrong one in a report."""
    folder = planted("vllm", "_C.abi3.so")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "vllm-9.8.7.dist-info", tmp_path / "elsewhere")
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    assert metadata.version("vllm") == "9.8.7"
    assert vllm.MARLIN_GEMM.origin() == f"vllm (unknown version) at {folder}"


@pytest.mark.usefixtures("register")
def test_stand_in_for_an_engine_is_no_engine(monkeypatch):
    """A module that somebody put into sys.modules, as tests do, has no folder."""
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    assert vllm.marlin_unavailable(GROUPED, CUDA) == "vllm is not installed: pip install vllm"


@pytest.mark.parametrize(("found", "library"), [((9, 0), "sm90"), ((8, 9), "sm100"), ((10, 0), "sm100")])
def test_sglang_has_one_library_for_hopper_and_one_for_the_rest(monkeypatch, found, library):
    """Loading both would register each operator twice, which ends the process."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: found)
    assert sgl.SGL.libraries() == (f"{library}/common_ops*.so", "common_ops*.so")


# On a GPU: the real kernels ------------------------------------------------------------------------------------------


def on_gpu(package: str) -> pytest.MarkDecorator:
    missing = not torch.cuda.is_available() or find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"needs a CUDA device and {package}'s compiled libraries")


def usable(name: str, spec: TensorSpec) -> None:
    if reason := REASONS[name](spec, CUDA):
        pytest.skip(reason)


def shares(y: Tensor, expected: Tensor) -> float:
    assert y.dtype == expected.dtype
    assert y.shape == expected.shape
    assert y.isfinite().all()
    return (y == expected).double().mean().item()


# Sums of 4096 products in another order: 99.85 % and more were equal in bf16, 99.1 % in fp16 (FORMATS 10b, one H200).
LEAST_EQUAL = {BF16: 0.98, FP16: 0.97}

GPU_KERNELS = pytest.mark.parametrize(
    "name",
    [
        pytest.param("vllm-marlin", marks=on_gpu("vllm")),
        pytest.param("vllm-machete", marks=on_gpu("vllm")),
        pytest.param("sgl-marlin", marks=on_gpu("sgl_kernel")),
    ],
)


@on_gpu("vllm")
def test_gpu_installed_vllm_is_usable():
    """The other tests here skip with its reason where a kernel is refused; this one does not."""
    assert vllm.marlin_unavailable(GROUPED, CUDA) is None
    assert vllm.expert_linear_unavailable(GROUPED, CUDA) is None
    assert vllm.cutlass_unavailable(SCHEMES["FP8_DYNAMIC"], CUDA) is None
    assert vllm.MARLIN_GEMM.origin().startswith("vllm ")


@GPU_KERNELS
@DTYPES
@GROUPINGS
@pytest.mark.parametrize("shape", [(4096, 4096), (128, 256), (64, 384), (384, 192)], ids=str)
def test_gpu_identity_reads_the_weights_back_exactly(name, group_size, dtype, shape):
    """One product in each sum: RN(code * scale) comes out, every bit, grouped and channel-wise."""
    spec = spec_of(group_size, dtype)
    usable(name, spec)
    if (name == "vllm-machete" and shape[0] % 128) or (group_size and shape[1] % group_size):
        pytest.skip("not a shape of this kernel or grouping")
    n, k = shape
    quantized = grid.quantize(randn(n, k, device=CUDA) * 0.02, spec)
    identity = torch.eye(k, dtype=dtype, device=CUDA)
    assert torch.equal(LINEARS[name](identity, quantized, spec).T, grid.dequantize(quantized, spec))


@GPU_KERNELS
@DTYPES
@GROUPINGS
@pytest.mark.parametrize("rows", [1, 16, 512])
def test_gpu_outputs_differ_from_the_reference_in_the_order_of_fp32_additions_alone(name, rows, group_size, dtype):
    spec = spec_of(group_size, dtype)
    usable(name, spec)
    quantized = grid.quantize(randn(4096, 4096, device=CUDA) * 0.02, spec)
    x = randn(rows, 4096, dtype=dtype, seed=1, device=CUDA)
    y = LINEARS[name](x, quantized, spec)
    assert shares(y, reference_linear(x, quantized, spec)) >= LEAST_EQUAL[dtype]


@GPU_KERNELS
@DTYPES
@GROUPINGS
def test_gpu_bias_is_added_in_the_order_of_the_reference(name, group_size, dtype):
    """After the rounding; vLLM's Marlin multiplies with a single scale and adds the bias in one rounding."""
    spec = spec_of(group_size, dtype)
    usable(name, spec)
    quantized = grid.quantize(randn(512, 1024, device=CUDA) * 0.02, spec)
    x = randn(2, 8, 1024, dtype=dtype, seed=1, device=CUDA)
    bias = randn(512, dtype=dtype, seed=2, device=CUDA)
    y = LINEARS[name](x, quantized, spec, bias)
    apart = LINEARS[name](x, quantized, spec) + bias
    if name == "vllm-marlin" and group_size is None:
        assert shares(y, reference_linear(x, quantized, spec, bias)) >= LEAST_EQUAL[dtype]
        assert shares(y, apart) < 0.9
    else:
        assert torch.equal(y, apart)


@GPU_KERNELS
def test_gpu_kernel_computes_the_same_twice(name):
    """No atomic additions."""
    usable(name, GROUPED)
    quantized = grid.quantize(randn(512, 4096, device=CUDA), GROUPED)
    x = randn(16, 4096, dtype=BF16, seed=1, device=CUDA)
    run = partial(LINEARS[name], x, quantized, GROUPED)
    assert torch.equal(run(), run())


@GPU_KERNELS
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_gpu_kernel_runs_where_its_tensors_are(name):
    usable(name, GROUPED)
    y = []
    for device in ("cuda:0", "cuda:1"):
        quantized = grid.quantize(randn(512, 1024, device=torch.device(device)), GROUPED)
        y.append(LINEARS[name](randn(4, 1024, dtype=BF16, seed=1, device=torch.device(device)), quantized, GROUPED))
    assert torch.equal(y[0].cpu(), y[1].cpu())


@on_gpu("vllm")
def test_gpu_vllm_repacks_as_we_do():
    codes = grid.quantize(randn(192, 384, device=CUDA), GROUPED).codes
    assert torch.equal(vllm._marlin_words(codes, GROUPED).cpu(), layout.pack_weight(codes.cpu()))
    eight = Scheme.preset("W8A16").weights
    codes = grid.quantize(randn(192, 384, device=CUDA), eight).codes
    assert torch.equal(vllm._marlin_words(codes, eight).cpu(), layout.pack_weight(codes.cpu(), 8))


@on_gpu("vllm")
@WEIGHT_ONLY
@pytest.mark.parametrize("shape", [(4096, 4096), (128, 256), (64, 384), (384, 192)], ids=str)
def test_gpu_identity_reads_weights_of_every_format_back_exactly(spec, shape):
    usable("vllm-marlin", spec)
    n, k = shape
    if spec.group_size and k % spec.group_size:
        pytest.skip("not a shape of this grouping")
    quantized = grid.quantize(randn(n, k, device=CUDA) * 0.02, spec)
    identity = torch.eye(k, dtype=spec.served_dtype, device=CUDA)
    assert torch.equal(vllm.marlin(identity, quantized, spec).T, grid.dequantize(quantized, spec))


@on_gpu("vllm")
@DTYPES
def test_gpu_machete_reads_int8_groups_back_exactly_and_computes_the_reference(dtype):
    spec = weight_only("W8A16", dtype)
    usable("vllm-machete", spec)
    quantized = grid.quantize(randn(1024, 4096, device=CUDA) * 0.02, spec)
    identity = torch.eye(4096, dtype=dtype, device=CUDA)
    assert torch.equal(vllm.machete(identity, quantized, spec).T, grid.dequantize(quantized, spec))
    x = randn(16, 4096, dtype=dtype, seed=1, device=CUDA)
    y = vllm.machete(x, quantized, spec)
    assert shares(y, reference_linear(x, quantized, spec)) >= LEAST_EQUAL[dtype]


@on_gpu("vllm")
@WEIGHT_ONLY
@pytest.mark.parametrize("rows", [1, 16, 512])
def test_gpu_outputs_of_every_format_are_those_of_the_reference(spec, rows):
    usable("vllm-marlin", spec)
    quantized = grid.quantize(randn(1024, 4096, device=CUDA) * 0.02, spec)
    x = randn(rows, 4096, dtype=spec.served_dtype, seed=1, device=CUDA)
    bias = randn(1024, dtype=spec.served_dtype, seed=2, device=CUDA)
    y = vllm.marlin(x, quantized, spec)
    assert shares(y, reference_linear(x, quantized, spec)) >= LEAST_EQUAL[spec.served_dtype]
    with_bias = vllm.marlin(x, quantized, spec, bias)
    if spec.format == "int4" and spec.group_size is None:
        # One rounding as a rule; with zero points and few rows the compiler has not joined product and sum.
        joined = shares(with_bias, reference_linear(x, quantized, spec, bias)) >= LEAST_EQUAL[spec.served_dtype]
        assert joined or (not spec.symmetric and torch.equal(with_bias, y + bias))
    else:
        assert torch.equal(with_bias, y + bias)


# Sums of int8 are exact. What the FP8 GEMM adds in which order is not said; blocks are scaled in one more order.
LEAST_EQUAL_INPUTS = {"int8": 0.999, "fp8_e4m3": 0.995, "block": 0.9}


@on_gpu("vllm")
@QUANTIZED_INPUTS
@pytest.mark.parametrize("k", [4096, 11008])
def test_gpu_inputs_are_quantized_as_in_training(name, k):
    scheme = SCHEMES[name]
    if reason := vllm.cutlass_unavailable(scheme, CUDA):
        pytest.skip(reason)
    x = randn(512, k, dtype=scheme.weights.served_dtype, device=CUDA) * torch.logspace(-3, 2, 512, device=CUDA)[:, None]
    x = x.to(scheme.weights.served_dtype)
    x[3] = 0
    stored = measured(x, scheme)
    found = vllm.quantize_inputs(x, scheme.activations, stored)
    expected = activations.quantize(x, scheme.activations, stored)
    assert torch.equal(found.scale, expected.scale)
    assert torch.equal(found.codes.float(), expected.codes.float())


@on_gpu("vllm")
@QUANTIZED_INPUTS
@pytest.mark.parametrize(
    ("rows", "n", "k"), [*((rows, 4096, 4096) for rows in (1, 16, 64, 512, 4096)), (300, 1536, 8192)]
)
def test_gpu_outputs_of_quantized_inputs_are_those_of_the_reference(name, rows, n, k):
    scheme = SCHEMES[name]
    if reason := vllm.cutlass_unavailable(scheme, CUDA):
        pytest.skip(reason)
    dtype = scheme.weights.served_dtype
    quantized = grid.quantize(randn(n, k, device=CUDA) * 0.02, scheme.weights)
    x = randn(rows, k, dtype=dtype, seed=1, device=CUDA)
    bias = randn(n, dtype=dtype, seed=2, device=CUDA)
    least = LEAST_EQUAL_INPUTS["block" if scheme.weights.strategy == "block" else scheme.weights.format]
    stored = measured(x, scheme)
    for added in (None, bias):
        y = vllm.cutlass(x, quantized, scheme, added, stored)
        assert shares(y, reference.linear(x, quantized, scheme, added, stored)) >= least


W4AFP8 = Scheme.preset("W4AFP8")


@pytest.mark.parametrize(
    ("scheme", "capability", "reason"),
    [
        (Scheme.preset("W4A8"), (9, 0), "INT4 groups of 128 with FP8 inputs by token, not int4 g128"),
        (Scheme.preset("FP8_DYNAMIC"), (9, 0), "INT4 groups of 128 with FP8 inputs by token, not fp8_e4m3"),
        (Scheme.preset("W4AFP8", activations={"engine": "sglang"}), (9, 0), "INT4 groups of 128"),
        (Scheme.preset("W4AFP8", scale_dtype=FP16, served_dtype=FP16), (9, 0), "its scales and outputs are bfloat16"),
        (W4AFP8, (8, 9), "9.0, cuda has 8.9"),
        (W4AFP8, (10, 0), "9.0, cuda has 10.0"),
    ],
)
def test_schemes_and_gpus_that_w4a8_does_not_compute(monkeypatch, scheme, capability, reason):
    monkeypatch.setattr(engines, "capability", lambda device: capability)
    assert reason in vllm.w4a8_unavailable(scheme, CUDA)


@on_gpu("vllm")
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 256, 256), (16, 4096, 4096), (512, 4096, 4096), (300, 1536, 8192)])
def test_gpu_outputs_of_w4afp8_are_those_of_the_reference(rows, n, k):
    if reason := vllm.w4a8_unavailable(W4AFP8, CUDA):
        pytest.skip(reason)
    quantized = grid.quantize(randn(n, k, device=CUDA) * 0.02, W4AFP8.weights)
    x, bias = randn(rows, k, dtype=BF16, seed=1, device=CUDA), randn(n, dtype=BF16, seed=2, device=CUDA)
    for added in (None, bias):
        y = vllm.w4a8(x, quantized, W4AFP8, added)
        assert shares(y, reference.linear(x, quantized, W4AFP8, added)) >= LEAST_EQUAL_INPUTS["fp8_e4m3"]


@on_gpu("vllm")
@DTYPES
@GROUPINGS
@pytest.mark.parametrize("experts", [1, 8])
def test_gpu_experts_read_their_weights_back_exactly(experts, group_size, dtype):
    spec = spec_of(group_size, dtype)
    quantized = grid.quantize(randn(experts, 256, 512, device=CUDA) * 0.02, spec)
    x = torch.eye(512, dtype=dtype, device=CUDA).repeat(experts, 1)
    expert_of_row = torch.arange(experts, device=CUDA).repeat_interleave(512)
    mixed = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(CUDA)
    y = torch.empty(len(x), 256, dtype=dtype, device=CUDA)
    y[mixed] = vllm.expert_linear(x[mixed], quantized, expert_of_row[mixed], spec)
    assert torch.equal(y.view(experts, 512, 256).mT, grid.dequantize(quantized, spec))


@on_gpu("vllm")
@DTYPES
@GROUPINGS
@pytest.mark.parametrize("rows", [1, 16, 512])
def test_gpu_expert_outputs_are_those_of_the_reference(rows, group_size, dtype):
    spec = spec_of(group_size, dtype)
    quantized = grid.quantize(randn(4, 1024, 2048, device=CUDA) * 0.02, spec)
    x = randn(rows, 2048, dtype=dtype, seed=1, device=CUDA)
    expert_of_row = torch.randint(4, (rows,), generator=torch.Generator().manual_seed(2)).to(CUDA)
    y = vllm.expert_linear(x, quantized, expert_of_row, spec)
    assert shares(y, by_expert(reference_linear, x, quantized, expert_of_row, spec)) >= LEAST_EQUAL[dtype]


@on_gpu("vllm")
@pytest.mark.parametrize("group_size", [32, 64, None], ids=["g32", "g64", "channel"])
def test_gpu_streamed_experts_are_read_back_exactly(group_size):
    """What is streamed into a live engine, through the engine's kernel: every bit of w13 and w2 that trained."""
    usable("experts", spec_of(group_size))
    reads_streamed_experts_back(CUDA, group_size)


@on_gpu("vllm")
@pytest.mark.parametrize("shape", EXPERT_LAYERS)
@pytest.mark.parametrize("group_size", [32, None], ids=["g32", "channel"])
@pytest.mark.parametrize("tokens", [1, 16, 512])
def test_gpu_a_layer_of_experts_is_computed_as_it_trains(tokens, group_size, shape):
    usable("experts", spec_of(group_size))
    layer_agrees(CUDA, group_size, tokens, shape, least=None)

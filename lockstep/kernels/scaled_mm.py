"""GEMMs on 8-bit and 4-bit codes, in the serving kernels' order of operations (plain torch).

=====================  =================================================================================================
weights x inputs       ``y``, each step in fp32 but where said, RN to the output's dtype
=====================  =================================================================================================
int8, one scale a row  vLLM ``RN(s_x * (s_w * acc) + bias)``, SGLang ``RN(acc * (s_w * s_x) + bias)`` (on GPUs
                       before Hopper, on Hopper as vLLM): acc in int32
fp8, the same          the GPU's fp8 GEMM with fast accumulation, scales and bias in its epilogue (``torch._scaled_mm``)
fp8 blocks x groups    ``acc += (dot * s_x) * s_w`` for each 128 inputs, then RN, then the bias
int4 groups x int8     ``acc += dot * s_w`` for each group, then ``RN(acc * s_x)``, then the bias
int4 groups x fp8      `fp8_from_int4`, the fp8 GEMM, then the bias
MX, NVFP4              ``RN(dot of (code * scale) * 1 / (g_x * g_w))``, then the bias: the products are exact
=====================  =================================================================================================

Where torch has the GEMM (int8: ``torch._int_mm``, fp8: ``torch._scaled_mm``; CPU and CUDA) it runs; elsewhere the same
sums are emulated: in float64 for int8, which is exact, and in fp32 for fp8, whose order of additions is the backend's.

Source: vLLM ``csrc/quantization/w8a8/cutlass`` (``c3x`` epilogues), ``w8a8_block_fp8_matmul``; SGLang
``int8_scaled_mm``.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep import grid
from lockstep.activations import FP8_TOKEN_FLOOR
from lockstep.grid import Quantized
from lockstep.scheme import Scheme


def linear(
    x: Quantized, weight: Quantized, scheme: Scheme, bias: Tensor | None = None, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """``x @ W.T + bias`` on codes: `x` ``[..., K]``, `weight` ``[N, K]``, result ``[..., N]`` in `dtype`.

    Raises:
        ValueError: sizes that the device's GEMM does not take.
    """
    spec, lead = scheme.weights, x.codes.shape[:-1]
    scale = x.scale if x.scale.numel() == 1 else x.scale.reshape(-1, x.scale.shape[-1])
    rows = Quantized(x.codes.reshape(-1, x.codes.shape[-1]), scale.view(-1, scale.shape[-1]), None, x.global_scale)
    with without_autocast(x.codes.device):
        if not rows.codes.numel() or not weight.codes.numel():
            y = rows.codes.new_zeros((len(rows.codes), len(weight.codes)), dtype=dtype)
        elif weight.scale.dtype in (torch.float8_e4m3fn, torch.float8_e8m0fnu):
            y = _microscaled(rows, weight, bias, dtype)
        elif spec.bits == 4 and rows.codes.is_floating_point():
            y = fp8(rows, fp8_from_int4(weight), None, dtype)
            y = y if bias is None else y + bias
        elif spec.strategy == "block" or spec.bits == 4:
            y = _grouped(rows, weight, spec.strategy == "block", bias, dtype)
        elif spec.format == "int8":
            y = _int8(rows, weight, scheme.engine, bias, dtype)
        else:
            y = fp8(rows, weight, bias, dtype)
    return y.view(*lead, len(weight.codes))


def without_autocast(device: torch.device) -> torch.autocast:
    """A context for sums in fp32: autocast would round their operands, and the sums, to 16 bits."""
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)


def has_native(format: str, device: torch.device) -> bool:
    """Whether torch has the GEMM of `format` on `device`; else it is emulated."""
    if device.type == "cuda":
        return format == "int8" or torch.cuda.get_device_capability(device) >= (8, 9)
    return device.type == "cpu" and (format == "int8" or _cpu_scales_rows())


@cache
def _cpu_scales_rows() -> bool:
    """Whether this torch's fp8 GEMM on the CPU takes a scale for each row: 2.11's does not."""
    codes, scale = torch.zeros(16, 16, dtype=torch.float8_e4m3fn), torch.ones(16, 1)
    try:
        torch._scaled_mm(codes, codes.T, scale, scale.T, out_dtype=torch.bfloat16)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def sums(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` of int8 codes ``[M, K]`` and ``[N, K]``, int32, exact."""
    if not has_native("int8", x.device) or x.shape[1] == 1:  # torch 2.13's on the CPU is wrong for one input
        return emulated_sums(x, weight)
    if x.device.type == "cpu":
        return torch._int_mm(x, weight.T)
    if x.shape[1] % 8 or weight.shape[0] % 8:
        raise ValueError(f"an int8 GEMM on CUDA takes multiples of 8, found K={x.shape[1]}, N={weight.shape[0]}.")
    padding = max(0, 32 - len(x))  # it takes more than 16 rows
    return torch._int_mm(F.pad(x, (0, 0, 0, padding)), weight.T)[: len(x)]


def emulated_sums(x: Tensor, weight: Tensor) -> Tensor:
    """`sums` where torch has no int8 GEMM: in float64, which holds every sum exactly."""
    return (x.double() @ weight.double().T).to(torch.int32)


def int8_epilogue(
    acc: Tensor, x_scale: Tensor, w_scale: Tensor, engine: str, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The fp32 epilogue of an int8 GEMM: `acc` int32 ``[M, N]``, scales ``[M, 1]`` or ``[1, 1]`` and ``[N, 1]``."""
    if engine == "sglang":
        left, right = acc.float(), x_scale * w_scale.T
    else:
        left, right = acc.float() * w_scale.T, x_scale
    if bias is None:
        return (left * right).to(dtype)
    # The kernels multiply and add in one instruction: exact product in float64, one rounding to fp32.
    return (left.double() * right.double() + bias.double()).float().to(dtype)


def fp8(x: Quantized, weight: Quantized, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The fp8 GEMM of codes ``[M, K]`` and ``[N, K]``, each with one scale or one for each row."""
    if dtype.itemsize > 2 or not has_native("fp8_e4m3", x.codes.device):
        return emulated_fp8(x, weight, bias, dtype)
    (n, k), (m, _) = weight.codes.shape, x.codes.shape
    if x.codes.device.type == "cuda" and (k % 16 or n % 16):
        raise ValueError(f"an fp8 GEMM on CUDA takes multiples of 16, found K={k}, N={n}.")
    # Both scales by row, or both by tensor.
    by_row = x.scale.numel() > 1 or weight.scale.numel() > 1
    x_scale = x.scale.expand(m, 1).contiguous() if by_row else x.scale.reshape(())
    w_scale = weight.scale.expand(n, 1).contiguous().T if by_row else weight.scale.reshape(())
    return torch._scaled_mm(
        *(x.codes.contiguous(), weight.codes.contiguous().T, x_scale, w_scale),
        bias=bias, out_dtype=dtype, use_fast_accum=True,
    )  # fmt: skip


def emulated_fp8(x: Quantized, weight: Quantized, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The fp8 GEMM where torch has none: products exact, sums in fp32, one rounding."""
    acc = x.codes.float() @ weight.codes.float().T
    y = (acc * weight.scale.T) * x.scale
    return (y if bias is None else y + bias.float()).to(dtype)


def fp8_from_int4(weight: Quantized) -> Quantized:
    """INT4 groups as the e4m3 codes and row scales ``[N, 1]`` that vLLM's W4AFP8 kernel multiplies on Hopper.

    It rounds each product of a code and its group's e4m3 scale to e4m3: ``sign(q) * RN(|q| * f)``, with `split_scales`.

    Source: CUTLASS ``mixed_dtype_utils.hpp`` (``pack_scale_fp8``).
    """
    group, row = split_scales(weight.scale)
    codes = weight.codes.unflatten(-1, (group.shape[-1], -1)).float()
    return Quantized(grid.round_to(codes * group.float().unsqueeze(-1), "fp8_e4m3").flatten(-2), row)


def split_scales(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Group scales ``[N, G]`` as e4m3 ones ``f`` ``[N, G]`` below fp32 ones by row ``[N, 1]``, as vLLM's W4AFP8 loads.

    With ``c = max(max|s| / 448, 1 / (448 * 512))``: ``f = RN(RN(s / c) / 8)``, so that 8 times one is still e4m3, and
    the row's is ``8 * c``.

    Source: vLLM ``convert_bf16_scales_to_fp8``.
    """
    scale = scale.float()
    largest = scale.new_full((), 448.0)
    row = (scale.abs().amax(-1, keepdim=True) / largest).clamp(min=FP8_TOKEN_FLOOR)
    return grid.round_to(grid.round_to(scale / row, "fp8_e4m3").float() / 8, "fp8_e4m3"), 8 * row


def _int8(x: Quantized, weight: Quantized, engine: str, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return int8_epilogue(sums(x.codes, weight.codes), x.scale, weight.scale, engine, bias, dtype)


def _grouped(x: Quantized, weight: Quantized, blocks: bool, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Sums of one group of inputs at a time, each scaled before it is added."""
    (n, k), groups = weight.codes.shape, weight.scale.shape[-1]
    size = 128 if blocks else k // groups
    w_scale = weight.scale.repeat_interleave(128, 0)[:n] if blocks else weight.scale
    acc = torch.zeros(len(x.codes), n, dtype=torch.float32, device=x.codes.device)
    for group in range(groups):
        part = slice(group * size, (group + 1) * size)
        dot = x.codes[:, part].float() @ weight.codes[:, part].float().T
        if blocks:
            dot = dot * x.scale[:, group, None]
        acc = acc + dot * w_scale[:, group].float()
    y = (acc if blocks else acc * x.scale).to(dtype)
    return y if bias is None else y + bias


def _microscaled(x: Quantized, weight: Quantized, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Codes times their groups' scales are exact in bf16 and in fp32; their GEMM needs no more than one."""
    scaled = [
        (one.codes.float().unflatten(-1, (one.scale.shape[-1], -1)) * one.scale.float().unsqueeze(-1)).flatten(-2)
        for one in (x, weight)
    ]
    if x.codes.device.type == "cuda":
        acc = torch.mm(scaled[0].bfloat16(), scaled[1].bfloat16().T, out_dtype=torch.float32)
    else:
        acc = scaled[0] @ scaled[1].T
    if x.global_scale is not None:
        assert weight.global_scale is not None
        acc = acc * (x.global_scale.reciprocal() * weight.global_scale.reciprocal()).reshape(1, 1)
    y = acc.to(dtype)
    return y if bias is None else y + bias

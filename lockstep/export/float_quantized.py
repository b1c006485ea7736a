"""``float-quantized`` of compressed-tensors: FP8 weights for inputs in FP8, as vLLM, SGLang and transformers load it.

For a layer ``m`` with N outputs and K inputs:

==================  ==================  ======================================================
``m.weight``        float8_e4m3fn       [N, K], the codes
``m.weight_scale``  fp32                [1], [N, 1], or [ceil(N/128), ceil(K/128)] of blocks
``m.input_scale``   fp32 [1]            static ranges only
==================  ==================  ======================================================
"""

from __future__ import annotations

from lockstep.export import unpacked
from lockstep.export.compressed_tensors import METHOD, config, groups
from lockstep.export.unpacked import read, write
from lockstep.scheme import BLOCK, Scheme, TensorSpec

__all__ = ["METHOD", "config", "groups", "problem", "read", "refusal", "tensors", "write"]


def refusal(scheme: Scheme) -> str | None:
    """Why the format cannot store `scheme`, or None."""
    if scheme.weights.format != "fp8_e4m3" or scheme.weights.strategy == "group":
        return "it stores fp8 weights by tensor, channel or block"
    return None


def problem(n: int, k: int, scheme: Scheme) -> str | None:
    """Why no engine's kernel takes a layer of N outputs and K inputs, or None.

    The scaled GEMM of CUTLASS and cuBLAS takes multiples of 16. Blocks: the engines' kernels take whole ones along K,
    and N a multiple of 64 (DeepGEMM; Triton's takes any).
    """
    if scheme.weights.strategy == "block" and (k % BLOCK or n % 64):
        return f"N={n}, K={k}: the engines' block kernels need N % 64 == 0 and K % {BLOCK} == 0"
    return unpacked.multiples(n, k, 16, "the engines' FP8 kernels")


def tensors(spec: TensorSpec) -> tuple[str, ...]:
    """Names of a layer's tensors; the first belongs to quantized layers alone."""
    return ("weight_scale", "weight")

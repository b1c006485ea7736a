"""``int-quantized`` of compressed-tensors: INT8 weights for inputs in INT8, as vLLM, SGLang and transformers load it.

For a layer ``m`` with N outputs and K inputs:

==================  =============  ==============================================================
``m.weight``        int8 [N, K]    the codes
``m.weight_scale``  fp32 [N, 1]    or in the scheme's scale dtype: engines hold it in fp32
``m.input_scale``   fp32 [1]       static ranges only
==================  =============  ==============================================================
"""

from __future__ import annotations

from lockstep.export import unpacked
from lockstep.export.compressed_tensors import METHOD, config, groups
from lockstep.export.unpacked import read, write
from lockstep.scheme import Scheme, TensorSpec

__all__ = ["METHOD", "config", "groups", "problem", "read", "refusal", "tensors", "write"]


def refusal(scheme: Scheme) -> str | None:
    """Why the format cannot store `scheme`, or None."""
    if scheme.weights.format != "int8" or scheme.activations is None:
        return "it stores int8 weights for int8 inputs"
    return None


def problem(n: int, k: int, scheme: Scheme) -> str | None:
    """Why no engine's kernel takes a layer of N outputs and K inputs, or None.

    vLLM's CUTLASS kernel takes multiples of 16; others it multiplies in Triton, in another order of the scales.
    """
    return unpacked.multiples(n, k, 16, "the engines' INT8 kernels")


def tensors(spec: TensorSpec) -> tuple[str, ...]:
    """Names of a layer's tensors; the first belongs to quantized layers alone."""
    return ("weight_scale", "weight")

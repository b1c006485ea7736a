"""HQQ (Badri and Shaji, 2023, https://mobiusml.github.io/hqq_blog) through the hqq library: no calibration data.

Zero points are real numbers, which minimize a sparse norm of the weight's error. No INT4 kernel that engines have takes
them, so the result is dequantized weights.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lockstep.ptq.rounded import Batches, Rounded
from lockstep.scheme import Scheme, TensorSpec


def hqq(model: Any, layers: list[str], scheme: Scheme, batches: Batches) -> dict[str, Rounded]:
    """Round `layers` of the working copy `model` to HQQ's asymmetric grid and back, without scales to store."""
    weights = {name: model.get_submodule(name).weight.detach() for name in layers}
    return {name: Rounded(weight, _dequantized(weight, scheme.weights), None) for name, weight in weights.items()}


def _dequantized(weight: Tensor, spec: TensorSpec) -> Tensor:
    from hqq.core.quantize import Quantizer

    group = spec.group_size or weight.shape[-1]
    codes, meta = Quantizer.quantize(
        weight, nbits=spec.bits, group_size=group, axis=1, bitpack=False, device=str(weight.device)
    )
    # Scales and zero points are fp16 in an HQQLinear.
    scale, zero = (meta[key].half().float() for key in ("scale", "zero"))
    return ((codes.float().view(-1, group) - zero) * scale).view_as(weight).to(spec.served_dtype)

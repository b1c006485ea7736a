"""PyTorch's own INT4 CPU kernel, ``torch.ops.aten._weight_int4pack_mm_for_cpu``.

It multiplies ``code * scale`` in fp32 and never rounds the product to 16 bits, so it computes what a W4A16 serving
kernel computes only where that rounding changes nothing: weights served in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lockstep.grid import Quantized
from lockstep.scheme import TensorSpec


def unavailable(spec: TensorSpec, device: torch.device) -> str | None:
    """Why the operator cannot compute `spec` on `device`, or None if it can."""
    if device.type != "cpu":
        return f"it runs on the CPU, the model is on {device}"
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return f"torch {torch.__version__} does not have aten::_weight_int4pack_mm_for_cpu"
    if spec.strategy != "group":
        return "it scales before the GEMM, channel-wise serving kernels scale after it"
    if spec.served_dtype != torch.float32:
        return f"it does not round code * scale to {spec.served_dtype}, the serving kernel does"
    return None


def linear(x: Tensor, quantized: Quantized, spec: TensorSpec, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias`` for fp32 `x` ``[..., K]``; codes and scales are packed for the operator at each call."""
    codes, scale, *_ = quantized
    if spec.scale_follows_gemm(x.shape[-1]) or codes.shape[0] % 16 or not x.numel():
        raise ValueError(
            f"torch-int4 cannot run a weight of {list(codes.shape)} on an input of {list(x.shape)}: it needs several "
            "groups in a row (one is scaled after the GEMM), a multiple of 16 outputs, and a row of input."
        )
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32) + 8, 1)
    scales = scale.T.to(x.dtype)
    scales_and_zeros = torch.stack([scales, torch.zeros_like(scales)], dim=-1).contiguous()
    rows = x.reshape(-1, x.shape[-1])
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, spec.group_size, scales_and_zeros)
    y = y.reshape(*x.shape[:-1], -1)
    return y if bias is None else y + bias

"""Learned step sizes (LSQ, Esser et al., arXiv:1902.08153): a layer's weight scales as parameters.

`lockstep.prepare` with ``learned_scales=True`` gives each layer the parameter ``weight_scale`` (fp32, in the shape of
its scales), which starts where the scheme's rule would put the scales. What trains and is exported is the parameter,
rounded to the scheme's scale dtype; no rule looks at the weight any more. With ``q = clamp(RNE(w / s))``:

* the gradient of the weight is straight-through where ``w / s`` is within the code range, zero elsewhere;
* the gradient of a scale is the sum over its weights of ``grad * (q - w / s)`` within the range and ``grad * q``
  elsewhere, times ``1 / sqrt(weights of the scale * largest code)``, LSQ's balance of the two learning rates.

It needs the optimizer to be made after `prepare`, and a parameter group for the scales, without weight decay. Adam's
steps do not know how large a parameter is: give the group a rate of the weights' times the mean scale. With the
weights' own rate they can be destroyed within a few steps; an export refuses scales that became negative.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lockstep import activations, grid
from lockstep.kernels import reference
from lockstep.scheme import Scheme, TensorSpec

KEY = "weight_scale"
PTQ_REPORT = "ptq.json"  # which ``lockstep ptq`` writes beside its scales


def ptq_report(folder: Path) -> dict[str, Any] | None:
    """What ``lockstep ptq`` says of `folder`, None if it did not write it. ValueError if that cannot be read."""
    path = folder / PTQ_REPORT
    if not path.is_file():
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        _ = report["method"], report["servable"], report["rule"]["scale_rule"], dict(report["scales"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no report of lockstep ptq: {type(error).__name__}: {error}.") from None
    return report


def check_ptq(folder: Path, key: str, spec: TensorSpec, scale: Tensor | None) -> None:
    """ValueError if `scale` is not what ``lockstep ptq`` wrote in `folder` as `key`, for the rule of `spec`.

    None where the folder stores no such scale.

    Under "amax/7" the code -8, which llm-compressor uses, would become -7.
    """
    report = ptq_report(folder)
    noted = None if report is None else report["scales"].get(key)
    if report is None or noted is None:
        return
    if scale is None or digest(scale) != noted:
        found = "is not there" if scale is None else "is not what it was"
        raise ValueError(f"{folder}: {key}, which lockstep ptq wrote, {found}. Run it again.")
    if (rule := report["rule"]["scale_rule"]) != spec.scale_rule:
        raise ValueError(
            f"{key}: the scales in {folder} are for scale_rule {rule!r}, asked is {spec.scale_rule!r}. Give the "
            f"scheme that {PTQ_REPORT} there has."
        )


def digest(scale: Tensor) -> str:
    """SHA-256 of fp32 scales."""
    return hashlib.sha256(scale.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def initial_scale(weight: Tensor, spec: TensorSpec) -> Tensor:
    """The scales that the scheme's own rule gives `weight` ``[N, K]``, fp32 ``[R, G]``."""
    return grid.quantize(weight.detach(), spec).scale.float()


class LearnedScaleLinear(torch.autograd.Function):
    """``apply(x, weight, scale, bias, scheme, stored)``: the layer with the scales given, differentiable in them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, scheme: Scheme, stored: Tensor | None
    ) -> Tensor:
        ctx.scheme = scheme
        ctx.save_for_backward(x, weight, scale, stored)
        return reference.linear(x, grid.quantize(weight, scheme.weights, scale=scale), scheme, bias, stored)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x, weight, scale, stored = ctx.saved_tensors
        spec, inputs = ctx.scheme.weights, ctx.scheme.activations
        rows, x_rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        used, clipped = x_rows, None
        if inputs is not None:
            quantized = activations.quantize(x_rows, inputs, stored)
            used = activations.dequantize(quantized, x.dtype)
            clipped = None if inputs.dynamic else activations.clipped(quantized.codes, inputs)
        grad_x = grad_weight = grad_scale = grad_bias = None
        if ctx.needs_input_grad[0]:
            served = grid.dequantize(grid.quantize(weight, spec, scale=scale), spec)
            grad_x = rows.mm(served.to(grad.dtype))
            grad_x = (grad_x if clipped is None else grad_x.masked_fill(clipped, 0)).view(x.shape)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_weight, grad_scale = gradients(rows.T.mm(used), weight, scale, spec)
        if ctx.needs_input_grad[3]:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_scale, grad_bias, None, None


def gradients(grad: Tensor, weight: Tensor, scale: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """The gradients of the weight ``[N, K]`` and of its scales, from the one of the served weight `grad` ``[N, K]``."""
    low, high = spec.code_range
    per_group = (*scale.shape, -1)
    step = scale.to(spec.scale_dtype).float().unsqueeze(-1)
    position = weight.float().view(per_group) / step.masked_fill(step == 0, 1)
    code = grid.quantize(weight, spec, scale=scale).codes.float().view(per_group)
    inside = (position >= low) & (position <= high)
    grads = grad.float().view(per_group)
    balance = 1 / math.sqrt(position.shape[-1] * high)
    grad_scale = (grads * torch.where(inside, code - position, code)).sum(-1) * balance
    return (grads * inside).view_as(weight).to(weight.dtype), grad_scale.to(scale.dtype)

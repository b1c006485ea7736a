"""`QATLinear`: ``nn.Linear`` whose forward multiplies with the weights that will be served.

Forward: the serving kernel's order of operations on the quantized weight (kernels/reference.py).
Backward: straight-through (Bengio et al., arXiv:1308.3432): the gradient of the quantized weight is handed to the
master unchanged, and the input's gradient flows through the quantized weight, which is computed again instead of kept.
Saved between the two: what ``nn.Linear`` saves, references to the input and to the master.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lockstep.kernels import reference
from lockstep.scheme import Scheme, TensorSpec


class QATLinear(nn.Linear):
    """An ``nn.Linear`` that `lockstep.prepare` has switched to quantization-aware training.

    It is made by swapping ``module.__class__``, never by a constructor, so parameters, hooks and state-dict keys are
    the ``nn.Linear``'s own. `scheme` says what the weights become; `qualified_name` is for error messages.

    Input ``[..., in_features]``, output ``[..., out_features]`` in the input's dtype, or autocast's.

    Raises:
        ValueError: the forward would compute in a 16-bit dtype other than the one served.
    """

    scheme: Scheme
    qualified_name: str

    def forward(self, input: Tensor) -> Tensor:
        dtype, spec = compute_dtype(input), self.scheme.weights
        if dtype not in (spec.served_dtype, torch.float32, torch.float64):
            raise ValueError(
                f"{self.qualified_name}: the forward computes in {dtype}, the scheme is served in {spec.served_dtype}. "
                "Train in the served dtype or in float32, or set served_dtype."
            )
        bias = None if self.bias is None else self.bias.to(dtype)
        return _StraightThroughLinear.apply(input.to(dtype), self.weight, bias, spec)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scheme={self.scheme}"


def compute_dtype(input: Tensor) -> torch.dtype:
    """The dtype in which a linear layer computes on `input`: autocast's where it is on, else the input's."""
    device_type = input.device.type
    # Autocast does not know the meta device, and dynamo in torch 2.11 not torch.amp.is_autocast_available.
    autocast = device_type != "meta" and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if autocast else input.dtype


class _StraightThroughLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, spec: TensorSpec) -> Tensor:
        x_has_grad, weight_has_grad, *_ = ctx.needs_input_grad
        ctx.spec = spec
        ctx.save_for_backward(x if weight_has_grad else None, weight if x_has_grad else None)
        if spec.scale_follows_gemm(x.shape[-1]):
            return reference.gemm(x, *reference.quantize(weight, spec), bias)
        return reference.gemm(x, reference.fake_quantize(weight, spec), None, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (grad,) = grad_outputs
        x, weight = ctx.saved_tensors
        grad_rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ reference.fake_quantize(weight, ctx.spec).to(grad.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = grad_rows.T @ x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[2]:
            grad_bias = grad_rows.sum(0)
        return grad_x, grad_weight, grad_bias, None

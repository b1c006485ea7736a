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

from lockstep import grid, kernels
from lockstep.grid import Quantized
from lockstep.kernels import Quantizer, reference
from lockstep.qat.reuse import Kept
from lockstep.scheme import Scheme, TensorSpec


class QATLinear(nn.Linear):
    """An ``nn.Linear`` that `lockstep.prepare` has switched to quantization-aware training.

    It is made by swapping ``module.__class__``, never by a constructor, so parameters, hooks and state-dict keys are
    the ``nn.Linear``'s own. `scheme` says what the weights become; `qualified_name` is for error messages; `kept` holds
    the quantized weight between passes where `prepare` was told to reuse it, else None.

    Input ``[..., in_features]``, output ``[..., out_features]`` in the input's dtype, or autocast's.

    Raises:
        ValueError: the forward would compute in a 16-bit dtype other than the one served.
        KernelUnavailable: the kernels for the weight's device cannot run (see `kernels.training`).
    """

    scheme: Scheme
    qualified_name: str
    kept: Kept | None = None

    def forward(self, input: Tensor) -> Tensor:
        dtype, spec = compute_dtype(input), self.scheme.weights
        if dtype not in (spec.served_dtype, torch.float32, torch.float64):
            raise ValueError(
                f"{self.qualified_name}: the forward computes in {dtype}, the scheme is served in {spec.served_dtype}. "
                "Train in the served dtype or in float32, or set served_dtype."
            )
        bias = None if self.bias is None else self.bias.to(dtype)
        if self.kept is not None and self.training and torch.is_grad_enabled():
            return self._forward_reusing(input.to(dtype), bias)
        return _StraightThroughLinear.apply(input.to(dtype), self.weight, bias, spec, None)

    @torch.compiler.disable(reason="whether the kept weight is still the master's is looked up at each call")
    def _forward_reusing(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return _StraightThroughLinear.apply(x, self.weight, bias, self.scheme.weights, self.kept)

    def __setattr__(self, name: str, value: Any) -> None:
        # FSDP hands a layer its newly gathered weight this way: in the same memory, and with the same version.
        if name == "weight":
            self._drop()
        super().__setattr__(name, value)

    def _apply(self, *args: Any, **kwargs: Any) -> QATLinear:
        self._drop()
        return super()._apply(*args, **kwargs)

    def train(self, mode: bool = True) -> QATLinear:
        if not mode:
            self._drop()
        return super().train(mode)

    def _drop(self) -> None:
        if self.kept is not None:
            self.kept.drop()

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
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, spec: TensorSpec, kept: Kept | None
    ) -> Tensor:
        x_has_grad, weight_has_grad, *_ = ctx.needs_input_grad
        ctx.how = (spec, kernels.training(spec, weight.device), kept)
        ctx.save_for_backward(x if weight_has_grad else None, weight if x_has_grad else None)
        return reference.gemm(x, *_operand(weight, *ctx.how), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x, weight = ctx.saved_tensors
        grad_rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            # The quantized weight has no name here, so that its memory is free again for the gradient of the master.
            grad_x = grad_rows.mm(_served(weight, *ctx.how).to(grad.dtype)).view(*grad.shape[:-1], weight.shape[-1])
        if ctx.needs_input_grad[1]:
            grad_weight = grad_rows.T.mm(x.reshape(-1, x.shape[-1]))
        if ctx.needs_input_grad[2]:
            grad_bias = grad_rows.sum(0)
        return grad_x, grad_weight, grad_bias, None, None


def _operand(weight: Tensor, spec: TensorSpec, kernel: Quantizer, kept: Kept | None) -> tuple[Tensor, Tensor | None]:
    """What the serving GEMM multiplies with, and the scale that follows it if one does."""
    scale_follows = spec.scale_follows_gemm(weight.shape[-1])
    if kept is not None and kept.what == "codes":
        words, scale = kept.of(weight, lambda: kernel.pack_quantized(weight, spec))
        if scale_follows:
            return kernel.dequantize_packed(words, None, spec), scale
        return kernel.dequantize_packed(words, scale, spec), None
    if kept is not None:
        return kept.of(weight, lambda: _operand(weight, spec, kernel, None))
    if scale_follows:
        return kernel.quantize(weight, spec, spec.served_dtype)
    return kernel.fake_quantize(weight, spec), None


def _served(weight: Tensor, spec: TensorSpec, kernel: Quantizer, kept: Kept | None) -> Tensor:
    """The weight as it is served, through which the gradient flows."""
    if kept is None:
        return kernel.fake_quantize(weight, spec, again=True)
    operand, scale = _operand(weight, spec, kernel, kept)
    return operand if scale is None else grid.dequantize(Quantized(operand, scale), spec)

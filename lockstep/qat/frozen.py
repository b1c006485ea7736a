"""`FrozenLinear`: a linear layer that holds its weight as engines store it, and multiplies as they do.

It is the base of an adapter that trains alone: training holds the packed words and scales, and no master. Forward: the
serving kernel's order of operations (kernels/reference.py, kernels/scaled_mm.py), bit for bit what a `QATLinear` with
the same codes computes. Backward: the input's gradient flows through the dequantized weight; the weight itself has
none. Dequantized it exists for the time of a GEMM, in the forward and again in the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lockstep import activations, grid, kernels
from lockstep.grid import Quantized
from lockstep.kernels import reference
from lockstep.qat.linear import compute_dtype
from lockstep.scheme import Scheme, TensorSpec

Read = Callable[[Mapping[str, Tensor], TensorSpec], Quantized]


class FrozenLinear(nn.Module):
    """``x @ W.T + bias`` of a weight that is stored quantized and does not train.

    Its buffers, and so its state-dict keys, are the tensors of the stored format (for ``pack-quantized``
    ``weight_packed`` int32, ``weight_scale``, ``weight_shape``), the inputs' measured scale where the scheme has one,
    and ``bias``. ``.to(dtype)``, ``.half()`` and the like move them but leave their dtypes.

    Args:
        stored: the tensors of the format by name, the codes first.
        read: the format's function from these to codes and scales.
        scheme: what weights and inputs are quantized as.
        shape: N outputs and K inputs.
        bias: ``[N]`` or None.
        input_scale: fp32 ``[1]``, of schemes with a measured one.
        qualified_name: for error messages.
        format: name of the format, for whoever writes it again.

    Input ``[..., K]``, output ``[..., N]`` in the input's dtype, or autocast's.

    Raises:
        ValueError: the forward would compute in a 16-bit dtype other than the one served.
    """

    def __init__(
        self,
        stored: Mapping[str, Tensor],
        read: Read,
        scheme: Scheme,
        shape: tuple[int, int],
        bias: Tensor | None = None,
        input_scale: Tensor | None = None,
        qualified_name: str = "",
        format: str = "",
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.read, self.scheme, self.qualified_name, self.format = read, scheme, qualified_name, format
        self.stored_names = tuple(stored)
        for name, tensor in stored.items():
            self.register_buffer(name, tensor.detach())
        if scheme.activations is not None and scheme.activations.stores_scale:
            self.register_buffer(scheme.activations.scale_name, input_scale)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, input: Tensor) -> Tensor:
        """See `QATLinear`, whose output with the same codes this is."""
        dtype, served = compute_dtype(input), self.scheme.weights.served_dtype
        if dtype not in (served, torch.float32, torch.float64):
            raise ValueError(f"{self.qualified_name}: the forward computes in {dtype}, the base is served in {served}.")
        return _FrozenGemm.apply(input.to(dtype), self)

    def quantized(self) -> Quantized:
        """Codes and scales, from the stored words."""
        return self.read({name: self._buffers[name] for name in self.stored_names}, self.scheme.weights)  # type: ignore[misc]

    def stored_scale(self) -> Tensor | None:
        """The inputs' measured scale, fp32 ``[1]``, if the scheme has one."""
        inputs = self.scheme.activations
        return self._buffers[inputs.scale_name] if inputs is not None and inputs.stores_scale else None

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self._buffers[self.stored_names[0]].device  # type: ignore[union-attr]

    @property
    def qweight(self) -> Tensor | None:
        """The stored codes, under the name by which peft finds a quantized layer's device."""
        return self._buffers[self.stored_names[0]]

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenLinear:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            now = self._buffers[name]
            if now is not None and now.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(now.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, scheme={self.scheme}"


class _FrozenGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        scheme, stored = layer.scheme, layer._buffers["bias"]
        bias = None if stored is None else stored.to(x.dtype)
        ctx.layer, inputs = layer, scheme.activations
        if inputs is None:
            return reference.gemm(x, *_operand(layer), bias, scheme.weights)
        kernel = kernels.training(scheme, layer.device)
        quantized = kernel.quantize_activations(x, inputs, layer.stored_scale())
        ctx.save_for_backward(None if inputs.dynamic else quantized.codes)
        return kernel.scaled_linear(quantized, layer.quantized(), scheme, bias, x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None]:
        (grad,), layer = grad_outputs, ctx.layer
        inputs = layer.scheme.activations
        served = _served(layer).to(grad.dtype)
        grad_x = grad.reshape(-1, grad.shape[-1]).mm(served).view(*grad.shape[:-1], layer.in_features)
        if inputs is not None and not inputs.dynamic:
            (codes,) = ctx.saved_tensors
            grad_x = grad_x.masked_fill(activations.clipped(codes, inputs), 0)
        return grad_x, None


def _operand(layer: FrozenLinear) -> tuple[Tensor, Tensor | None]:
    """What the weight-only GEMM multiplies with, and the scale that follows it if one does."""
    spec = layer.scheme.weights
    packed = layer._buffers.get("weight_packed")
    if packed is None or spec.format not in ("int4", "int8") or not spec.symmetric:
        return reference.operand(layer.quantized(), spec)
    kernel, scale = kernels.training(layer.scheme, layer.device), layer._buffers["weight_scale"]
    if spec.scale_follows_gemm(layer.in_features):
        return kernel.dequantize_packed(packed, None, spec), scale
    return kernel.dequantize_packed(packed, scale, spec), None


def _served(layer: FrozenLinear) -> Tensor:
    """The weight as it is served, through which the gradient flows."""
    spec = layer.scheme.weights
    if spec.scale_follows_gemm(layer.in_features) or "weight_packed" not in layer._buffers:
        return grid.dequantize(layer.quantized(), spec)
    return _operand(layer)[0]

"""One registry of operators: what each serves, where it runs, and why it cannot run here.

Two kinds. ``quantize`` kernels are the training side: they make what the layers multiply with and what is exported.
``linear`` kernels are the true kernels of the serving side, which the alignment harness asks for by name. Asking for
one that cannot run is an error with its reason; nothing falls back to another kernel.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lockstep.grid import Quantized
from lockstep.kernels import reference, sgl, torch_int4, vllm
from lockstep.scheme import ActivationSpec, Scheme, TensorSpec

try:
    from lockstep.kernels import triton_checksum, triton_gemm, triton_grid
except Exception as error:  # a Triton that is missing, old or broken must not take the CPU along
    TRITON_PROBLEM = f"Triton does not load ({type(error).__name__}: {error})"
else:
    TRITON_PROBLEM = ""


class KernelUnavailable(RuntimeError):
    """A kernel was asked for that does not exist or cannot compute the scheme here; the message says why."""


class Quantizer(Protocol):
    """A ``quantize`` kernel: a module with these functions, each equal bit for bit to `kernels.reference`'s.

    `weight` is ``[..., N, K]`` in bf16, fp16 or fp32; errors are those of `grid.quantize`.
    """

    def fake_quantize(
        self,
        weight: Tensor,
        spec: TensorSpec,
        amax: Tensor | None = None,
        scale: Tensor | None = None,
        again: bool = False,
    ) -> Tensor:
        """`grid.fake_quantize`, opaque to ``torch.compile``.

        Pass ``again=True`` in the backward: to a compiler it is another operator, so it does not merge the call with
        the forward's and keep the result between the two.
        """

    def quantize(
        self,
        weight: Tensor,
        spec: TensorSpec,
        dtype: torch.dtype | None = None,
        amax: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Quantized:
        """`grid.quantize`, opaque to ``torch.compile``: scales, and codes in `dtype`, counted from the zero point."""

    def quantize_activations(self, x: Tensor, spec: ActivationSpec, stored: Tensor | None = None) -> Quantized:
        """`activations.quantize`, opaque to ``torch.compile``."""

    def dequantize_activations(self, quantized: Quantized, dtype: torch.dtype) -> Tensor:
        """`activations.dequantize`, opaque to ``torch.compile``."""

    def scaled_linear(
        self, x: Quantized, weight: Quantized, scheme: Scheme, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """`scaled_mm.linear`, opaque to ``torch.compile``."""

    def learned_gradients(self, grad: Tensor, weight: Tensor, scale: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
        """`grid.learned_gradients`, opaque to ``torch.compile``; equal but for the order of a scale's sum."""

    def fp8_input_gradient(self, grad: Tensor, weight: Tensor, spec: TensorSpec, amax: Tensor | None) -> Tensor:
        """``grad @ W`` on fp8 codes of both, for `grad` ``[M, N]``: the option of that name in `lockstep.prepare`."""

    def pack_quantized(self, weight: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
        """Words int32 ``[..., N, K * bits / 32]`` (`layouts.words`) and scales ``[..., N, G]`` of a symmetric grid."""

    def pack_marlin(self, weight: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
        """Words int32 ``[..., K/16, N * bits / 2]`` and scales ``[..., G, N]`` in the order of `layouts.marlin`."""

    def dequantize_packed(self, packed: Tensor, scale: Tensor | None, spec: TensorSpec) -> Tensor:
        """``RN(code * scale)`` of `pack_quantized`'s words and scales, or without `scale` the codes, as served."""

    def check_packed(
        self, weight: Tensor, words: Tensor, scale: Tensor, spec: TensorSpec, order: Literal["rows", "marlin"]
    ) -> Tensor | None:
        """Whether `words` and `scale`, in the `order` of `pack_quantized` or of `pack_marlin`, are those of `weight`.

        int32 ``[]`` on their device. 0: they are, and no value in them or in `weight` is NaN or infinite. Else they may
        not be: read them back. None if this kernel has no quicker way than that.
        """


@dataclass(frozen=True)
class Kernel:
    """One implementation of an operator.

    `unavailable` takes a scheme and a device and returns the reason why the kernel cannot compute it there, or None.
    `run` is the implementation: a `Quantizer`, or a function ``linear(x, weight, scheme, bias, stored)``. `origin`
    tells where it comes from: package, version and path, or None if the package is not there.
    """

    name: str
    operator: Literal["quantize", "linear"]
    serves: str
    unavailable: Callable[[Scheme, torch.device], str | None]
    run: Any
    origin: Callable[[], str | None] = lambda: "Lockstep"


def _no_device(scheme: Scheme, device: torch.device) -> str | None:
    # The cheap question first: a layer asks at each call, and its weight on a GPU has initialized CUDA.
    if device.type == "cuda" and not (torch.cuda.is_initialized() or torch.cuda.is_available()):
        return "this machine has no CUDA device"
    return None


def _triton_unavailable(scheme: Scheme, device: torch.device) -> str | None:
    if TRITON_PROBLEM:
        return f"{TRITON_PROBLEM}: pip install triton, or set LOCKSTEP_KERNEL=reference and train slower"
    return _no_device(scheme, device) or triton_grid.unavailable(device) or triton_grid.not_fused(scheme)


WeightOnly = Callable[[Tensor, Quantized, TensorSpec, Tensor | None], Tensor]


def _inputs_as_they_are(unavailable: Callable[[TensorSpec, torch.device], str | None]) -> Callable[..., str | None]:
    """For kernels that quantize weights alone."""

    def reason(scheme: Scheme, device: torch.device) -> str | None:
        if scheme.activations:
            return f"it multiplies with inputs as they are, the scheme quantizes them to {scheme.activations}"
        return unavailable(scheme.weights, device)

    return reason


def _int4_only(unavailable: Callable[[TensorSpec, torch.device], str | None]) -> Callable[..., str | None]:
    """For kernels of one kind: symmetric INT4 weights, inputs as they are."""

    def reason(scheme: Scheme, device: torch.device) -> str | None:
        if scheme.weights.format != "int4" or not scheme.weights.symmetric or scheme.activations:
            return "it multiplies symmetric INT4 weights with inputs as they are"
        return unavailable(scheme.weights, device)

    return reason


def _weight_only(run: WeightOnly) -> Callable[..., Tensor]:
    def linear(
        x: Tensor, weight: Quantized, scheme: Scheme, bias: Tensor | None = None, stored: Tensor | None = None
    ) -> Tensor:
        return run(x, weight, scheme.weights, bias)

    return linear


KERNELS = (
    Kernel("reference", "quantize", "every spec of grid.py, any device", _no_device, reference),
    Kernel(
        *("triton", "quantize", "integers and fp8, weights and inputs, in one pass, CUDA", _triton_unavailable),
        run=None if TRITON_PROBLEM else triton_grid,
    ),
    Kernel("reference", "linear", "every spec, in the serving kernel's order", _no_device, reference.linear),
    Kernel(
        *("triton", "linear", "packed INT4 words in the serving kernel's order, CUDA"),
        unavailable=lambda scheme, device: (
            _int4_only(lambda spec, device: None)(scheme, device) or _triton_unavailable(scheme, device)
        ),
        run=None if TRITON_PROBLEM else _weight_only(triton_gemm.linear),
    ),
    Kernel(
        "torch-int4",
        "linear",
        "fp32 groups, torch's own CPU kernel",
        _int4_only(torch_int4.unavailable),
        _weight_only(torch_int4.linear),
        lambda: f"torch {torch.__version__}",
    ),
    Kernel(
        *(
            "vllm-marlin",
            "linear",
            "4-bit and 8-bit weights, inputs in bf16 and fp16, vLLM's own Marlin",
            _inputs_as_they_are(vllm.marlin_unavailable),
        ),
        run=_weight_only(vllm.marlin),
        origin=vllm.MARLIN_GEMM.origin,
    ),
    Kernel(
        *(
            "vllm-cutlass",
            "linear",
            "INT8 and FP8 weights and inputs, vLLM's own quantizers and CUTLASS GEMM",
            vllm.cutlass_unavailable,
        ),
        run=vllm.cutlass,
        origin=vllm.CUTLASS_SCALED_MM.origin,
    ),
    Kernel(
        *("vllm-w4a8", "linear", "INT4 groups of 128 with FP8 inputs, vLLM's own, Hopper", vllm.w4a8_unavailable),
        run=vllm.w4a8,
        origin=vllm.CUTLASS_W4A8_MM.origin,
    ),
    Kernel(
        *(
            "vllm-machete",
            "linear",
            "INT4 and INT8 groups of 64 and 128, vLLM's own Machete, Hopper",
            _inputs_as_they_are(vllm.machete_unavailable),
        ),
        run=_weight_only(vllm.machete),
        origin=vllm.MACHETE_MM.origin,
    ),
    Kernel(
        *(
            "sgl-marlin",
            "linear",
            "groups and channels in bf16 and fp16, SGLang's own Marlin",
            _int4_only(sgl.marlin_unavailable),
        ),
        run=_weight_only(sgl.marlin),
        origin=sgl.GPTQ_MARLIN_GEMM.origin,
    ),
)


def find(operator: str, name: str, scheme: Scheme, device: torch.device) -> Kernel:
    """The kernel `name` of `operator`. Raises KernelUnavailable with the reason if it cannot compute `scheme` there."""
    for kernel in KERNELS:
        if kernel.name == name and kernel.operator == operator:
            if reason := kernel.unavailable(scheme, device):
                raise KernelUnavailable(f"{operator} kernel {name!r} cannot compute {scheme} here: {reason}.")
            return kernel
    names = ", ".join(kernel.name for kernel in KERNELS if kernel.operator == operator)
    raise KernelUnavailable(f"no {operator} kernel {name!r}: there are {names}.")


def add_sum_of_words(device: torch.device) -> Callable[[Tensor, Tensor], None] | None:
    """`triton_checksum.add_sum_of_words` where it runs on tensors on `device`, else None."""
    return None if TRITON_PROBLEM or device.type != "cuda" else triton_checksum.add_sum_of_words


def training(scheme: Scheme, device: torch.device) -> Quantizer:
    """The ``quantize`` kernel with which layers on `device` train and are exported.

    On CUDA Triton's, for the schemes that `triton_grid.not_fused` has no objection to; else the reference; or the one
    that the environment variable ``LOCKSTEP_KERNEL`` names.

    Raises:
        KernelUnavailable: it cannot run here.
    """
    asked = os.environ.get("LOCKSTEP_KERNEL")
    fused = device.type == "cuda" and (TRITON_PROBLEM or triton_grid.not_fused(scheme) is None)
    try:
        return find("quantize", asked or ("triton" if fused else "reference"), scheme, device).run
    except KernelUnavailable as error:
        raise KernelUnavailable(f"LOCKSTEP_KERNEL={asked}: {error}") from None if asked else error

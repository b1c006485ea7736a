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
from lockstep.scheme import TensorSpec

try:
    from lockstep.kernels import triton_gemm, triton_grid
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

    def fake_quantize(self, weight: Tensor, spec: TensorSpec, again: bool = False) -> Tensor:
        """`grid.fake_quantize`, opaque to ``torch.compile``.

        Pass ``again=True`` in the backward: to a compiler it is another operator, so it does not merge the call with
        the forward's and keep the result between the two.
        """

    def quantize(self, weight: Tensor, spec: TensorSpec, dtype: torch.dtype = torch.int8) -> Quantized:
        """`grid.quantize`, opaque to ``torch.compile``; the codes come in `dtype`."""

    def pack_quantized(self, weight: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
        """Words int32 ``[..., N, K/8]`` (`layouts.words`) and scales ``[..., N, G]``; K is a multiple of 8."""

    def pack_marlin(self, weight: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
        """Words int32 ``[..., K/16, 2N]`` and scales ``[..., G, N]`` in the order of `layouts.marlin`."""

    def dequantize_packed(self, packed: Tensor, scale: Tensor | None, spec: TensorSpec) -> Tensor:
        """``RN(code * scale)`` of `pack_quantized`'s words and scales, or without `scale` the codes, as served."""


@dataclass(frozen=True)
class Kernel:
    """One implementation of an operator.

    `unavailable` takes a spec and a device and returns the reason why the kernel cannot compute it there, or None.
    `run` is the implementation: a `Quantizer`, or a function ``linear(x, quantized, spec, bias)``. `origin` tells
    where it comes from: package, version and path, or None if the package is not there.
    """

    name: str
    operator: Literal["quantize", "linear"]
    serves: str
    unavailable: Callable[[TensorSpec, torch.device], str | None]
    run: Any
    origin: Callable[[], str | None] = lambda: "Lockstep"


def _no_device(spec: TensorSpec, device: torch.device) -> str | None:
    # The cheap question first: a layer asks at each call, and its weight on a GPU has initialized CUDA.
    if device.type == "cuda" and not (torch.cuda.is_initialized() or torch.cuda.is_available()):
        return "this machine has no CUDA device"
    return None


def _triton_unavailable(spec: TensorSpec, device: torch.device) -> str | None:
    if TRITON_PROBLEM:
        return f"{TRITON_PROBLEM}: pip install triton, or set LOCKSTEP_KERNEL=reference and train slower"
    return _no_device(spec, device) or triton_grid.unavailable(device)


KERNELS = (
    Kernel("reference", "quantize", "every spec of grid.py, any device", _no_device, reference),
    Kernel(
        *("triton", "quantize", "every spec of grid.py in one pass, CUDA", _triton_unavailable),
        run=None if TRITON_PROBLEM else triton_grid,
    ),
    Kernel("reference", "linear", "every spec, in the serving kernel's order", _no_device, reference.linear),
    Kernel(
        *("triton", "linear", "packed words in the serving kernel's order, CUDA", _triton_unavailable),
        run=None if TRITON_PROBLEM else triton_gemm.linear,
    ),
    Kernel(
        "torch-int4",
        "linear",
        "fp32 groups, torch's own CPU kernel",
        torch_int4.unavailable,
        torch_int4.linear,
        lambda: f"torch {torch.__version__}",
    ),
    Kernel(
        *("vllm-marlin", "linear", "groups and channels in bf16 and fp16, vLLM's own Marlin", vllm.marlin_unavailable),
        run=vllm.marlin,
        origin=vllm.MARLIN_GEMM.origin,
    ),
    Kernel(
        *("vllm-machete", "linear", "groups of 64 and 128, vLLM's own Machete, Hopper", vllm.machete_unavailable),
        run=vllm.machete,
        origin=vllm.MACHETE_MM.origin,
    ),
    Kernel(
        *("sgl-marlin", "linear", "groups and channels in bf16 and fp16, SGLang's own Marlin", sgl.marlin_unavailable),
        run=sgl.marlin,
        origin=sgl.GPTQ_MARLIN_GEMM.origin,
    ),
)


def find(operator: str, name: str, spec: TensorSpec, device: torch.device) -> Kernel:
    """The kernel `name` of `operator`. Raises KernelUnavailable with the reason if it cannot compute `spec` there."""
    for kernel in KERNELS:
        if kernel.name == name and kernel.operator == operator:
            if reason := kernel.unavailable(spec, device):
                raise KernelUnavailable(f"{operator} kernel {name!r} cannot compute {spec} here: {reason}.")
            return kernel
    names = ", ".join(kernel.name for kernel in KERNELS if kernel.operator == operator)
    raise KernelUnavailable(f"no {operator} kernel {name!r}: there are {names}.")


def training(spec: TensorSpec, device: torch.device) -> Quantizer:
    """The ``quantize`` kernel with which weights on `device` train and are exported.

    Triton's on CUDA and the reference elsewhere, or the one that the environment variable ``LOCKSTEP_KERNEL`` names.

    Raises:
        KernelUnavailable: it cannot run here.
    """
    asked = os.environ.get("LOCKSTEP_KERNEL")
    name = asked or ("triton" if device.type == "cuda" else "reference")
    try:
        return find("quantize", name, spec, device).run
    except KernelUnavailable as error:
        raise KernelUnavailable(f"LOCKSTEP_KERNEL={asked}: {error}") from None if asked else error

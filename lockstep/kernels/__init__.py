"""One registry of operators: what each serves, where it runs, and why it cannot run here.

Two kinds: ``fake_quantize`` (the training side) and ``linear`` (the true kernels that the alignment harness asks for by
name). Asking for one that cannot run is an error with its reason; nothing falls back to another kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lockstep.kernels import reference, torch_int4
from lockstep.scheme import TensorSpec


class KernelUnavailable(RuntimeError):
    """A kernel was asked for that does not exist or cannot compute the scheme here; the message says why."""


@dataclass(frozen=True)
class Kernel:
    """One implementation of an operator.

    `unavailable` takes a spec and a device and returns the reason why the kernel cannot compute it there, or None.
    `run` is the operator: ``fake_quantize(weight, spec)`` or ``linear(x, quantized, spec, bias)``.
    """

    name: str
    operator: Literal["fake_quantize", "linear"]
    serves: str
    unavailable: Callable[[TensorSpec, torch.device], str | None]
    run: Callable[..., Tensor]


def _anywhere(spec: TensorSpec, device: torch.device) -> str | None:
    return "this machine has no CUDA device" if device.type == "cuda" and not torch.cuda.is_available() else None


KERNELS = (
    Kernel("reference", "fake_quantize", "every spec of grid.py, any device", _anywhere, reference.fake_quantize),
    Kernel("reference", "linear", "every spec, in the serving kernel's order", _anywhere, reference.linear),
    Kernel("torch-int4", "linear", "fp32 groups, torch's own CPU kernel", torch_int4.unavailable, torch_int4.linear),
)


def find(operator: str, name: str, spec: TensorSpec, device: torch.device) -> Kernel:
    """The kernel `name` of `operator`. Raises KernelUnavailable with the reason if it cannot compute `spec` there."""
    named = {kernel.name: kernel for kernel in KERNELS if kernel.operator == operator}
    if name not in named:
        raise KernelUnavailable(f"no {operator} kernel {name!r}: there are {', '.join(named)}.")
    if reason := named[name].unavailable(spec, device):
        raise KernelUnavailable(f"{operator} kernel {name!r} cannot compute {spec} here: {reason}.")
    return named[name]

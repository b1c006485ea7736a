"""SGLang's own W4A16 kernel: Marlin from ``sgl_kernel``, in the order of `reference.linear`.

The distribution ``sgl-kernel`` (0.3) has it. Its successor ``sglang-kernel`` (0.4) does not: SGLang now compiles Marlin
when it runs. Partial sums are added in order here; SGLang's own layers add those of few outputs atomically, in whatever
order they come, so what they compute may differ from one run to the next.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lockstep.grid import Quantized
from lockstep.kernels import engines
from lockstep.kernels.engines import Engine, Operator
from lockstep.layouts import marlin as layout
from lockstep.scheme import TensorSpec


def _libraries() -> tuple[str, ...]:
    """``sgl_kernel`` has two builds of the same operators, and takes one by the current device, as is done here."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    return ("sm90/common_ops*.so" if hopper else "sm100/common_ops*.so", "common_ops*.so")


SGL = Engine(
    package="sgl_kernel",
    distributions=("sgl-kernel", "sglang-kernel"),
    install="pip install sgl-kernel==0.3.21",
    libraries=_libraries,
)
GPTQ_MARLIN_REPACK = Operator(
    SGL,
    "sgl_kernel::gptq_marlin_repack",
    given=("b_q_weight", "perm", "size_k", "size_n"),
    fixed={"num_bits": 4},
)
GPTQ_MARLIN_GEMM = Operator(
    SGL,
    "sgl_kernel::gptq_marlin_gemm",
    given=("a", "b_q_weight", "b_scales", "workspace", "size_m", "size_n", "size_k"),
    fixed={
        **dict.fromkeys(("c_or_none", "global_scale_or_none", "b_zeros_or_none", "g_idx_or_none", "perm_or_none")),
        "b_q_type_id": engines.UINT4B8,
        "is_k_full": True,
        "use_atomic_add": False,
        "use_fp32_reduce": True,
        "is_zp_float": False,
    },
)


def marlin_unavailable(spec: TensorSpec, device: torch.device) -> str | None:
    """Why Marlin cannot compute `spec` on `device`, or None if it can."""
    return (
        engines.wrong_device(device, lambda found: found >= (8, 0), "8.0 or newer")
        or engines.wrong_dtypes(spec)
        or engines.unresolved(GPTQ_MARLIN_REPACK, GPTQ_MARLIN_GEMM)
    )


def marlin(x: Tensor, quantized: Quantized, spec: TensorSpec, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias`` by Marlin: `x` ``[..., K]`` to ``[..., N]``, all in the served dtype.

    Raises:
        ValueError: Marlin's tiles do not take this N and K, or `x` or `bias` has another dtype.
        EngineUnavailable: SGLang's operators cannot be used here.
    """
    codes, scale, *_ = quantized
    n, k = codes.shape
    if problem := layout.problem(n, k, spec):
        raise ValueError(f"{problem}.")
    rows = engines.rows(x, spec, bias)
    if not len(rows):
        return x.new_empty(*x.shape[:-1], n)
    order = torch.empty(0, dtype=torch.int32, device=x.device)  # inputs in the model's own order
    y = GPTQ_MARLIN_GEMM(
        a=rows,
        b_q_weight=GPTQ_MARLIN_REPACK(
            b_q_weight=engines.gptq_words(codes).contiguous(), perm=order, size_k=k, size_n=n
        ),
        b_scales=layout.pack_scales(scale),
        workspace=engines.workspace(x.device),
        size_m=len(rows),
        size_n=n,
        size_k=k,
    )
    y = y.reshape(*x.shape[:-1], n)
    return y if bias is None else y + bias  # this Marlin takes none

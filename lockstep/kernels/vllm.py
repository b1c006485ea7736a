"""vLLM's own W4A16 kernels: Marlin, Machete on Hopper, and Marlin for stacked experts.

Weights are packed at each call, by vLLM's own repacking operators, so that what is measured is the engine's layout as
much as its arithmetic; an alignment is no server. The order of Marlin is that of `reference.linear`. Machete scales
the weights before the GEMM whatever their groups are, so it computes grouped weights alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lockstep.grid import Quantized
from lockstep.kernels import engines
from lockstep.kernels.engines import Engine, Operator
from lockstep.layouts import marlin as layout
from lockstep.scheme import TensorSpec

MACHETE_GROUP_SIZES = (64, 128)
EXPERT_BLOCKS = (8, 16, 32, 48, 64)  # rows of one expert that the kernel takes at a time

VLLM = Engine(
    package="vllm",
    distributions=("vllm",),
    install="pip install vllm",
    libraries=lambda: ("_C*.so", "_moe_C*.so"),  # the first is also the pattern of _C_stable_libtorch
)

GPTQ_MARLIN_REPACK = Operator(
    VLLM,
    "_C::gptq_marlin_repack",
    given=("b_q_weight", "perm", "size_k", "size_n"),
    fixed={"num_bits": 4, "is_a_8bit": False},
)
_MARLIN = {
    **dict.fromkeys(("c_or_none", "a_scales", "global_scale", "b_zeros_or_none", "g_idx_or_none", "perm_or_none")),
    "b_type_id": engines.UINT4B8,
    # vLLM's defaults: partial sums of blocks that share outputs are added in fp32, one after the other.
    "use_fp32_reduce": True,
    "use_atomic_add": False,
    "is_zp_float": False,
}
MARLIN_GEMM = Operator(
    VLLM,
    "_C::marlin_gemm",
    given=("a", "b_q_weight", "b_scales", "b_bias_or_none", "workspace", "size_m", "size_n", "size_k"),
    fixed={**_MARLIN, "is_k_full": True},
)
MOE_MARLIN_GEMM = Operator(
    VLLM,
    "_moe_C::moe_wna16_marlin_gemm",
    given=(
        *("a", "b_q_weight", "b_scales", "workspace", "sorted_token_ids", "expert_ids", "num_tokens_past_padded"),
        *("topk_weights", "moe_block_size", "size_m", "size_n", "size_k"),
    ),
    fixed={
        **_MARLIN,
        "is_full_k": True,
        "b_bias_or_none": None,
        "top_k": 1,
        "mul_topk_weights": False,
        **dict.fromkeys(("thread_k", "thread_n", "blocks_per_sm"), -1),  # the kernel chooses
    },
)
MACHETE_PREPACK = Operator(
    VLLM,
    "_C::machete_prepack_B",
    given=("B", "a_type", "group_scales_type"),
    fixed={"b_type": engines.UINT4B8},
)
MACHETE_MM = Operator(
    VLLM,
    "_C::machete_mm",
    given=("A", "B", "group_scales", "group_size"),
    fixed={
        "b_type": engines.UINT4B8,
        **dict.fromkeys(("out_type", "group_zeros", "channel_scales", "token_scales", "schedule")),
    },
)


# Marlin --------------------------------------------------------------------------------------------------------------


def marlin_unavailable(spec: TensorSpec, device: torch.device) -> str | None:
    """Why Marlin cannot compute `spec` on `device`, or None if it can."""
    return _not_marlin(spec, device) or engines.unresolved(GPTQ_MARLIN_REPACK, MARLIN_GEMM)


def marlin(x: Tensor, quantized: Quantized, spec: TensorSpec, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias`` by Marlin: `x` ``[..., K]`` to ``[..., N]``, all in the served dtype.

    Raises:
        ValueError: Marlin's tiles do not take this N and K, or `x` or `bias` has another dtype.
        EngineUnavailable: vLLM's operators cannot be used here.
    """
    codes, scale = quantized
    n, k = codes.shape
    if problem := layout.problem(n, k, spec):
        raise ValueError(f"{problem}.")
    rows = engines.rows(x, spec, bias)
    if not len(rows):
        return x.new_empty(*x.shape[:-1], n)
    y = MARLIN_GEMM(
        a=rows,
        b_q_weight=_marlin_words(codes),
        b_scales=layout.pack_scales(scale),
        # As vLLM's layers do: the kernel adds it after its last rounding, in the order of the scales of a single group.
        b_bias_or_none=None if bias is None else layout.pack_scales(bias.unsqueeze(-1)).squeeze(0),
        workspace=engines.workspace(x.device),
        size_m=len(rows),
        size_n=n,
        size_k=k,
    )
    return y.reshape(*x.shape[:-1], n)


def _not_marlin(spec: TensorSpec, device: torch.device) -> str | None:
    return engines.wrong_device(device, lambda found: found >= (8, 0), "8.0 or newer") or engines.wrong_dtypes(spec)


def _marlin_words(codes: Tensor) -> Tensor:
    n, k = codes.shape
    order = torch.empty(0, dtype=torch.int32, device=codes.device)  # inputs in the model's own order
    return GPTQ_MARLIN_REPACK(b_q_weight=engines.gptq_words(codes).contiguous(), perm=order, size_k=k, size_n=n)


# Marlin for stacked experts ------------------------------------------------------------------------------------------


def expert_linear_unavailable(spec: TensorSpec, device: torch.device) -> str | None:
    """Why Marlin cannot compute stacked experts of `spec` on `device`, or None if it can."""
    return _not_marlin(spec, device) or engines.unresolved(GPTQ_MARLIN_REPACK, MOE_MARLIN_GEMM)


def expert_linear(x: Tensor, quantized: Quantized, expert_of_row: Tensor, spec: TensorSpec) -> Tensor:
    """Each row of `x` through its own expert: ``x[m] @ W[expert_of_row[m]].T``, by Marlin's kernel for experts.

    Args:
        x: ``[M, K]`` in the served dtype.
        quantized: codes ``[E, N, K]`` and scales ``[E, N, G]``.
        expert_of_row: ``[M]``, integers in ``[0, E)``.
        spec: the scheme of the weights.

    Returns:
        ``[M, N]`` in the served dtype, without router weights.

    Raises:
        ValueError: Marlin's tiles do not take this N and K, `x` has another dtype, or there is no such expert.
        EngineUnavailable: vLLM's operators cannot be used here.
    """
    experts, n, k = quantized.codes.shape
    if problem := layout.problem(n, k, spec):
        raise ValueError(f"{problem}.")
    rows = engines.rows(x, spec)
    if not len(rows):
        return x.new_empty(0, n)
    block = next((size for size in EXPERT_BLOCKS if len(rows) / experts / size < 0.9), EXPERT_BLOCKS[-1])  # as vLLM
    slots, owners = blocks_of_experts(expert_of_row, experts, block)
    return MOE_MARLIN_GEMM(
        a=rows,
        b_q_weight=torch.stack([_marlin_words(codes) for codes in quantized.codes]),
        b_scales=torch.stack([layout.pack_scales(scale) for scale in quantized.scale]),
        workspace=engines.workspace(x.device, per_multiprocessor=4),
        sorted_token_ids=slots,
        expert_ids=owners,
        num_tokens_past_padded=torch.full((1,), len(slots), dtype=torch.int32, device=x.device),
        topk_weights=torch.ones(len(rows), 1, dtype=torch.float32, device=x.device),
        moe_block_size=block,
        size_m=len(rows),
        size_n=n,
        size_k=k,
    )


def blocks_of_experts(expert_of_row: Tensor, experts: int, block: int) -> tuple[Tensor, Tensor]:
    """Rows in blocks of one expert each, as ``moe_align_block_size`` gives them to the kernel.

    Args:
        expert_of_row: ``[M]``, integers in ``[0, experts)``.
        experts: how many there are.
        block: how many rows are in a block.

    Returns:
        The rows in the order of their experts, int32 ``[B * block]``: each expert's last block is filled up with M, the
        index of no row. And the expert of each block, int32 ``[B]``; one without rows has no block.

    Raises:
        ValueError: a row's expert is not in ``[0, experts)``.
    """
    count = len(expert_of_row)
    if count and not 0 <= int(expert_of_row.min()) <= int(expert_of_row.max()) < experts:
        found = f"{int(expert_of_row.min())} to {int(expert_of_row.max())}"
        raise ValueError(f"there are {experts} experts, the rows name {found}: number them from 0.")
    rows_of_expert = torch.bincount(expert_of_row, minlength=experts)
    blocks = (rows_of_expert + block - 1) // block
    order = expert_of_row.argsort(stable=True)
    # A row moves by the padding of the experts before its own.
    padding = (blocks * block - rows_of_expert).cumsum(0) - (blocks * block - rows_of_expert)
    position = torch.arange(count, device=order.device) + padding[expert_of_row[order]]
    slots = torch.full((int(blocks.sum()) * block,), count, dtype=torch.int32, device=order.device)
    slots[position] = order.to(torch.int32)
    owners = torch.arange(experts, dtype=torch.int32, device=order.device).repeat_interleave(blocks)
    return slots, owners


# Machete -------------------------------------------------------------------------------------------------------------


def machete_unavailable(spec: TensorSpec, device: torch.device) -> str | None:
    """Why Machete cannot compute `spec` on `device`, or None if it can."""
    wrong = engines.wrong_device(device, lambda found: found[0] == 9, "9.x (Hopper)") or engines.wrong_dtypes(spec)
    if wrong:
        return wrong
    if spec.strategy != "group":
        return "it scales before the GEMM, channel-wise weights are trained in Marlin's order, scaled after it"
    if spec.group_size not in MACHETE_GROUP_SIZES:
        return f"it takes groups of {' and '.join(map(str, MACHETE_GROUP_SIZES))}, not of {spec.group_size}"
    return engines.unresolved(MACHETE_PREPACK, MACHETE_MM)


def machete(x: Tensor, quantized: Quantized, spec: TensorSpec, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias`` by Machete: `x` ``[..., K]`` to ``[..., N]``, all in the served dtype.

    Raises:
        ValueError: Machete's tiles do not take this N and K, a row is one group, or `x` or `bias` has another dtype.
        EngineUnavailable: vLLM's operators cannot be used here.
    """
    codes, scale = quantized
    n, k = codes.shape
    if n % 128 or k % 64 or spec.scale_follows_gemm(k):
        raise ValueError(
            f"N={n}, K={k}: Machete needs N % 128 == 0, K % 64 == 0, and several groups in a row (it scales one before "
            "the GEMM, Lockstep trains it scaled after)."
        )
    rows = engines.rows(x, spec, bias)
    if not len(rows):
        return x.new_empty(*x.shape[:-1], n)
    dtype = spec.served_dtype
    packed = MACHETE_PREPACK(B=engines.gptq_words(codes), a_type=dtype, group_scales_type=dtype)
    y = MACHETE_MM(A=rows, B=packed, group_scales=scale.T.contiguous(), group_size=spec.group_size)
    y = y.reshape(*x.shape[:-1], n)
    return y if bias is None else y + bias  # as vLLM's layer does

"""vLLM's own kernels: Marlin (also for stacked experts), Machete on Hopper, and CUTLASS for quantized inputs.

Weights are packed at each call, by vLLM's own repacking operators, so that what is measured is the engine's layout as
much as its arithmetic; an alignment is no server. The order of Marlin is that of `reference.linear`. Machete scales
the weights before the GEMM whatever their groups are, so it computes grouped weights alone.

Which kernels vLLM runs depends on how it is started. Those here quantize inputs as with ``--enforce-eager`` or
``custom_ops=["+quant_fp8"]``: compiled, vLLM quantizes to FP8 by token and tensor in code that PyTorch generates, where
half of the scales differ in their last bit. FP8 blocks come here with ``VLLM_USE_DEEP_GEMM=0``: else DeepGEMM takes
them on Hopper, which quantizes the weights again.

Sources: vLLM 0.22.1, ``_custom_ops.py``, ``marlin_utils.py``, ``marlin_utils_fp4.py``, ``marlin_utils_fp8.py``,
``kernels/linear/scaled_mm/cutlass.py``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep.grid import Quantized
from lockstep.kernels import engines, scaled_mm
from lockstep.kernels.engines import Engine, Operator
from lockstep.layouts import marlin as layout
from lockstep.scheme import ActivationSpec, Scheme, TensorSpec, dtype_name

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
    given=("b_q_weight", "perm", "size_k", "size_n", "num_bits"),
    fixed={"is_a_8bit": False},
)
_MARLIN = {
    **dict.fromkeys(("c_or_none", "a_scales", "g_idx_or_none", "perm_or_none")),
    # vLLM's defaults: partial sums of blocks that share outputs are added in fp32, one after the other.
    "use_fp32_reduce": True,
    "use_atomic_add": False,
    "is_zp_float": False,
}
MARLIN_GEMM = Operator(
    VLLM,
    "_C::marlin_gemm",
    given=(
        *("a", "b_q_weight", "b_scales", "b_type_id", "b_zeros_or_none", "global_scale", "b_bias_or_none"),
        *("workspace", "size_m", "size_n", "size_k"),
    ),
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
        **dict.fromkeys(("global_scale", "b_zeros_or_none", "b_bias_or_none")),
        "b_type_id": engines.UINT4B8,
        "is_full_k": True,
        "top_k": 1,
        "mul_topk_weights": False,
        **dict.fromkeys(("thread_k", "thread_n", "blocks_per_sm"), -1),  # the kernel chooses
    },
)
MACHETE_PREPACK = Operator(
    VLLM,
    "_C::machete_prepack_B",
    given=("B", "a_type", "b_type", "group_scales_type"),
)
MACHETE_MM = Operator(
    VLLM,
    "_C::machete_mm",
    given=("A", "B", "b_type", "group_scales", "group_size"),
    fixed=dict.fromkeys(("out_type", "group_zeros", "channel_scales", "token_scales", "schedule")),
)
# The operators for quantized inputs write into tensors that they are given, and return nothing.
CUTLASS_SCALED_MM = Operator(VLLM, "_C::cutlass_scaled_mm", given=("out", "a", "b", "a_scales", "b_scales", "bias"))
ENCODE_INT4 = Operator(VLLM, "_C::cutlass_encode_and_reorder_int4b", given=("B",))
PACK_SCALE_FP8 = Operator(VLLM, "_C::cutlass_pack_scale_fp8", given=("scales",))
CUTLASS_W4A8_MM = Operator(
    VLLM,
    "_C::cutlass_w4a8_mm",
    given=("A", "B", "group_scales", "group_size", "channel_scales", "token_scales"),
    fixed={"out_type": None, "maybe_schedule": None},
)
# By (format, strategy) of the activations.
QUANTIZE_INPUTS = {
    ("int8", "token"): Operator(
        VLLM, "_C::dynamic_scaled_int8_quant", given=("result", "input", "scale"), fixed={"azp": None}
    ),
    ("int8", "tensor"): Operator(
        VLLM, "_C::static_scaled_int8_quant", given=("result", "input", "scale"), fixed={"azp": None}
    ),
    ("fp8_e4m3", "token"): Operator(
        VLLM,
        "_C::dynamic_per_token_scaled_fp8_quant",
        given=("result", "input", "scale"),
        fixed={"scale_ub": None},
    ),
    ("fp8_e4m3", "tensor"): Operator(
        VLLM, "_C::static_scaled_fp8_quant", given=("result", "input", "scale"), fixed={"group_shape": (-1, -1)}
    ),
    ("fp8_e4m3", "group"): Operator(
        VLLM,
        "_C::per_token_group_fp8_quant",
        given=("input", "output_q", "output_s", "scale_ue8m0"),
        fixed={
            "group_size": 128,
            "eps": 1e-10,
            "fp8_min": -448.0,
            "fp8_max": 448.0,
            "dummy_is_scale_transposed": True,  # the strides tell
            "dummy_is_tma_aligned": False,
        },
    ),
}


# Marlin --------------------------------------------------------------------------------------------------------------


# How Marlin names the codes of a scale rule; those of its other integers follow from format and symmetry.
_FLOATING = {"nv/6": engines.FLOAT4_E2M1F, "mx/2": engines.FLOAT4_E2M1F, "mx/8": engines.FLOAT8_E4M3FN}
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def marlin_unavailable(spec: TensorSpec, device: torch.device) -> str | None:
    """Why Marlin cannot compute `spec` on `device`, or None if it can."""
    return _not_marlin(spec, device) or engines.unresolved(GPTQ_MARLIN_REPACK, MARLIN_GEMM)


def marlin(x: Tensor, quantized: Quantized, spec: TensorSpec, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias`` by Marlin: `x` ``[..., K]`` to ``[..., N]``, all in the served dtype.

    Raises:
        ValueError: Marlin's tiles do not take this N and K, or `x` or `bias` has another dtype.
        EngineUnavailable: vLLM's operators cannot be used here.
    """
    codes, _, zero_point, _ = quantized
    n, k = codes.shape
    if problem := layout.problem(n, k, spec):
        raise ValueError(f"{problem}.")
    rows = engines.rows(x, spec, bias)
    if not len(rows):
        return x.new_empty(*x.shape[:-1], n)
    scales, global_scale = _marlin_scales(quantized, spec)
    y = MARLIN_GEMM(
        a=rows,
        b_q_weight=_marlin_words(codes, spec),
        b_scales=scales,
        b_type_id=_type_id(spec),
        b_zeros_or_none=None if zero_point is None else layout.pack_zero_points(zero_point),
        global_scale=global_scale,
        # As vLLM's layers do: the kernel adds it after its last rounding, in the order of the scales of a single group.
        b_bias_or_none=None if bias is None else layout.pack_scales(bias.unsqueeze(-1)).squeeze(0),
        workspace=engines.workspace(x.device),
        size_m=len(rows),
        size_n=n,
        size_k=k,
    )
    return y.reshape(*x.shape[:-1], n)


def _not_marlin(spec: TensorSpec, device: torch.device) -> str | None:
    wrong = engines.wrong_device(device, lambda found: found >= (8, 0), "8.0 or newer")
    if wrong or spec.format in ("int4", "int8"):
        return wrong or engines.wrong_dtypes(spec)
    if spec.scale_rule not in _FLOATING:
        return "it rounds the fp32 scales of FP8 weights to 16 bits, which no scheme here trains"
    if spec.scale_rule != "nv/6" and spec.served_dtype != torch.bfloat16:
        return f"it computes MX formats in bfloat16, the scheme is served in {dtype_name(spec.served_dtype)}"
    return engines.wrong_served_dtype(spec)


def _type_id(spec: TensorSpec) -> int:
    if spec.format == "int8":
        return engines.UINT8B128
    integers = engines.UINT4B8 if spec.symmetric else engines.UINT4
    return _FLOATING.get(spec.scale_rule, integers)


def _marlin_words(codes: Tensor, spec: TensorSpec) -> Tensor:
    n, k = codes.shape
    order = torch.empty(0, dtype=torch.int32, device=codes.device)  # inputs in the model's own order
    words = engines.gptq_words(_offset(codes, spec), spec.bits).contiguous()
    return GPTQ_MARLIN_REPACK(b_q_weight=words, perm=order, size_k=k, size_n=n, num_bits=spec.bits)


def _offset(codes: Tensor, spec: TensorSpec) -> Tensor:
    """`codes` as the integers int8 from which `words.pack` makes the fields that Marlin reads."""
    if spec.format == "fp8_e4m3":
        return codes.contiguous().view(torch.int8) ^ -128  # packing adds 128
    if spec.format == "fp4_e2m1":
        values = codes.float()
        magnitude = torch.bucketize(values.abs(), torch.tensor(_E2M1, device=codes.device)).to(torch.int8)
        return magnitude + 8 * values.signbit().to(torch.int8) - 8  # packing adds 8
    return codes


def _marlin_scales(quantized: Quantized, spec: TensorSpec) -> tuple[Tensor, Tensor | None]:
    """Scales ``[G, N]`` in Marlin's order and form, and NVFP4's second scale, fp32 ``[1]``."""
    _, scale, _, global_scale = quantized
    if spec.scale_rule not in _FLOATING:
        return layout.pack_scales(scale), None
    if global_scale is None:
        exponents = _pairs_swapped(layout.pack_scales(scale.view(torch.uint8)))
        return exponents.view(torch.float8_e8m0fnu), None
    return _nvfp4_scales(scale, global_scale, spec.served_dtype)


def _nvfp4_scales(scale: Tensor, global_scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales with five bits of exponent and no sign, as e4m3, and the factor of the sums that undoes their offset.

    The kernel's codes are too small by 2**126 in bf16 and by 2**14 in fp16, its scales too large by 2**7; in bf16 vLLM
    also makes the scales as large as they can be.
    """
    half = _pairs_swapped(layout.pack_scales(scale.to(torch.float16)))
    largest = half.float().amax()
    raised = torch.ones_like(largest)
    if dtype == torch.bfloat16:
        room = torch.frexp(largest.new_full((), 448) / largest).exponent - 1
        raised = torch.where(largest > 0, torch.ldexp(raised, room), raised)
    half = (half.float() * raised * 2.0**7).to(torch.float16)
    bits = half.masked_fill(half < 2, 0).view(torch.int16) << 1
    high_bytes = bits.contiguous().view(torch.uint8)[:, 1::2].contiguous()
    offset = 126 - 7 if dtype == torch.bfloat16 else 14 - 7
    return high_bytes.view(torch.float8_e4m3fn), (global_scale.reciprocal() * 2.0**offset / raised).reshape(1)


def _pairs_swapped(scales: Tensor) -> Tensor:
    """Columns 0, 2, 1, 3 of each four: 8-bit scales are widened two at a time."""
    return scales.unflatten(-1, (-1, 2, 2)).transpose(-2, -1).flatten(-3).contiguous()


# Marlin for stacked experts ------------------------------------------------------------------------------------------


def expert_linear_unavailable(spec: TensorSpec, device: torch.device) -> str | None:
    """Why Marlin cannot compute stacked experts of `spec` on `device`, or None if it can."""
    if spec.format != "int4" or not spec.symmetric:
        return "stacked experts have symmetric INT4 weights"
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
        b_q_weight=torch.stack([_marlin_words(codes, spec) for codes in quantized.codes]),
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
    if spec.format not in ("int4", "int8"):
        return f"it multiplies INT4 and INT8 weights, not {spec.format}"
    if not spec.symmetric:
        return (
            "it computes RN(code * scale + RN(-zero point * scale)), the scheme trains Marlin's (code - zero) * scale"
        )
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
    codes, scale, *_ = quantized
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
    packed = MACHETE_PREPACK(
        B=engines.gptq_words(codes, spec.bits), a_type=dtype, b_type=_type_id(spec), group_scales_type=dtype
    )
    y = MACHETE_MM(
        A=rows, B=packed, b_type=_type_id(spec), group_scales=scale.T.contiguous(), group_size=spec.group_size
    )
    y = y.reshape(*x.shape[:-1], n)
    return y if bias is None else y + bias  # as vLLM's layer does


# CUTLASS for quantized inputs ----------------------------------------------------------------------------------------


def cutlass_unavailable(scheme: Scheme, device: torch.device) -> str | None:
    """Why vLLM's CUTLASS kernels cannot compute `scheme` on `device`, or None if they can."""
    spec, inputs = scheme.weights, scheme.activations
    if inputs is None:
        return "it multiplies quantized inputs, the scheme leaves them as they are"
    if inputs.engine != "vllm":
        return f"vLLM quantizes the inputs, the scheme trains the arithmetic of {inputs.engine}"
    operator = QUANTIZE_INPUTS.get((inputs.format, inputs.strategy))
    if operator is None or spec.strategy not in ("channel", "tensor", "block"):
        return f"it multiplies INT8 rows and FP8 tensors, rows and blocks, not {scheme}"
    if spec.format == "int8":
        wrong = engines.wrong_device(
            device, lambda found: (8, 0) <= found < (10, 0), "8.0 to 9.0 (vLLM has no INT8 GEMM for newer ones)"
        )
    else:
        least = (9, 0) if spec.strategy == "block" else (8, 9)
        wrong = engines.wrong_device(device, lambda found: found >= least, f"{least[0]}.{least[1]} or newer")
    return wrong or engines.wrong_served_dtype(spec) or engines.unresolved(operator, CUTLASS_SCALED_MM)


def cutlass(
    x: Tensor, quantized: Quantized, scheme: Scheme, bias: Tensor | None = None, stored: Tensor | None = None
) -> Tensor:
    """``x @ W.T + bias`` by vLLM's input quantizer and ``cutlass_scaled_mm``: `x` ``[..., K]`` to ``[..., N]``.

    `x`, the bias and the result are in the served dtype; `stored` is the measured scale of static inputs, fp32 ``[1]``.

    Raises:
        ValueError: N or K is not a multiple of 16 (vLLM's layers run Triton then, or pad), `x` or `bias` has another
            dtype, or a measured scale is needed and not given.
        EngineUnavailable: vLLM's operators cannot be used here.
    """
    spec, inputs = scheme.weights, scheme.activations
    assert inputs is not None
    n, k = quantized.codes.shape
    if n % 16 or k % 16:
        raise ValueError(f"N={n}, K={k}: cutlass_scaled_mm takes multiples of 16.")
    rows = engines.rows(x, spec, bias)
    if not len(rows):
        return x.new_empty(*x.shape[:-1], n)
    blocks = spec.strategy == "block"
    # The GEMM of blocks takes rows in fours.
    padded = F.pad(rows, (0, 0, 0, -len(rows) % 4)) if blocks else rows
    codes, scale, *_ = quantize_inputs(padded, inputs, stored)
    y = rows.new_empty(len(codes), n)
    CUTLASS_SCALED_MM(
        out=y,
        a=codes,
        b=quantized.codes.contiguous().T,
        a_scales=scale,
        b_scales=quantized.scale.float().T if blocks else quantized.scale.float().contiguous(),
        bias=None if blocks else bias,
    )
    y = y[: len(rows)].reshape(*x.shape[:-1], n)
    return y + bias if blocks and bias is not None else y  # as vLLM's layer does


def w4a8_unavailable(scheme: Scheme, device: torch.device) -> str | None:
    """Why vLLM's W4AFP8 kernel cannot compute `scheme` on `device`, or None if it can."""
    spec, inputs = scheme.weights, scheme.activations
    kind = (spec.format, spec.group_size, inputs and (inputs.format, inputs.strategy, inputs.engine))
    if kind != ("int4", 128, ("fp8_e4m3", "token", "vllm")):
        return f"it multiplies INT4 groups of 128 with FP8 inputs by token, not {scheme}"
    if spec.served_dtype != torch.bfloat16 or spec.scale_dtype != torch.bfloat16:
        return f"its scales and outputs are bfloat16, not those of {spec}"
    operators = (QUANTIZE_INPUTS["fp8_e4m3", "token"], ENCODE_INT4, PACK_SCALE_FP8, CUTLASS_W4A8_MM)
    return engines.wrong_device(device, lambda found: found == (9, 0), "9.0") or engines.unresolved(*operators)


def w4a8(
    x: Tensor, quantized: Quantized, scheme: Scheme, bias: Tensor | None = None, stored: Tensor | None = None
) -> Tensor:
    """``x @ W.T + bias`` by vLLM's input quantizer and ``cutlass_w4a8_mm``: bf16 `x` ``[..., K]`` to ``[..., N]``.

    Raises:
        ValueError: N or K is not a multiple of 128, or `x` or `bias` has another dtype.
        EngineUnavailable: vLLM's operators cannot be used here.
    """
    inputs, (n, k) = scheme.activations, quantized.codes.shape
    assert inputs is not None
    if n % 128 or k % 128:
        raise ValueError(f"N={n}, K={k}: cutlass_w4a8_mm takes multiples of 128.")
    rows = engines.rows(x, scheme.weights, bias)
    if not len(rows):
        return x.new_empty(*x.shape[:-1], n)
    codes, scale, *_ = quantize_inputs(rows, inputs)
    group, row = scaled_mm.split_scales(quantized.scale)
    y = CUTLASS_W4A8_MM(
        A=codes,
        B=ENCODE_INT4(B=engines.gptq_words(quantized.codes) ^ -0x77777778),  # two's complement in place of an offset
        group_scales=PACK_SCALE_FP8(scales=group.T.contiguous()),
        group_size=128,
        channel_scales=row,
        token_scales=scale,
    )
    y = y.reshape(*x.shape[:-1], n)
    return y if bias is None else y + bias  # as vLLM's layer does


def quantize_inputs(rows: Tensor, spec: ActivationSpec, stored: Tensor | None = None) -> Quantized:
    """What vLLM's own kernel makes of contiguous `rows` ``[M, K]``: codes, and scales as `cutlass_scaled_mm` has them.

    Scales are fp32: ``[M, 1]`` by token, ``[M, K/128]`` by group with the rows contiguous, or `stored` itself.

    Raises:
        ValueError: K does not divide into groups, or a measured scale is needed and not given.
        EngineUnavailable: vLLM's operators cannot be used here.
    """
    if spec.stores_scale and stored is None:
        raise ValueError(f"{spec} inputs need a measured {spec.scale_name}: run lockstep calibrate.")
    operator = QUANTIZE_INPUTS[spec.format, spec.strategy]
    codes = torch.empty_like(rows, dtype=spec.code_dtype)
    if spec.strategy == "group":
        scale = rows.new_empty(spec.num_groups(rows.shape[1]), len(rows), dtype=torch.float32).T
        operator(input=rows, output_q=codes, output_s=scale, scale_ue8m0=spec.power_of_two)
    else:
        scale = rows.new_empty(len(rows), 1, dtype=torch.float32) if stored is None else stored
        operator(result=codes, input=rows, scale=scale)
    return Quantized(codes, scale)

"""The fused kernels of inputs and of the scaled GEMMs against the references, bit for bit (C2).

On a GPU where there is one, else in Triton's interpreter. The oracles are `activations`, `grid` and `scaled_mm`, which
have tests of their own against the engines' arithmetic; quantizers are compared with the CPU's, GEMMs, whose sums are
the backend's, with the same device's.
"""

from __future__ import annotations

from dataclasses import astuple, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import BF16, DTYPES, FP32, bits
from torch import Tensor, nn

import lockstep
from lockstep import Scheme, activations, grid, kernels
from lockstep.grid import Quantized
from lockstep.kernels import reference, scaled_mm
from lockstep.scheme import PRESETS, ActivationSpec

triton = pytest.importorskip("triton", reason="needs Triton")
tl = pytest.importorskip("triton.language")
triton_arithmetic, triton_grid, triton_activations, triton_scaled_mm = (
    pytest.importorskip(f"lockstep.kernels.{name}", exc_type=ImportError)
    for name in ("triton_arithmetic", "triton_grid", "triton_activations", "triton_scaled_mm")
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's NumPy, of overflow and 1 / 0
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

SPECS = [
    ActivationSpec(format, strategy, size, dynamic, power, engine)
    for format, strategy, size, dynamic, power in [
        ("int8", "token", None, True, False),
        ("int8", "tensor", None, False, False),
        ("fp8_e4m3", "token", None, True, False),
        ("fp8_e4m3", "tensor", None, False, False),
        ("fp8_e4m3", "group", 128, True, False),
        ("fp8_e4m3", "group", 128, True, True),
    ]
    for engine in ("vllm", "sglang")
    if (format, dynamic, engine) != ("int8", False, "sglang")  # SGLang ignores that scale
]
BY_TOKEN = ActivationSpec("fp8_e4m3", "token")

every_spec = pytest.mark.parametrize("spec", SPECS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both_engines = pytest.mark.parametrize("engine", ["vllm", "sglang"])


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    """Equal dtypes, shapes and bit patterns, but that every NaN is as good as another."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    found, expected = found.cpu(), expected.cpu()
    same = bits(found) == bits(expected)
    if found.is_floating_point():
        same |= found.float().isnan() & expected.float().isnan()
    assert same.all(), f"{int((~same).sum())} of {same.numel()} differ, at {(~same).nonzero()[:3].tolist()}"


def stored_for(spec: ActivationSpec, value: float = 0.0131) -> Tensor | None:
    return torch.tensor([value]) if spec.stores_scale else None


def assert_quantizes_as_the_reference(x: Tensor, spec: ActivationSpec, stored: Tensor | None = None) -> None:
    expected = activations.quantize(x, spec, stored)
    found = triton_grid.quantize_activations(x.to(DEVICE), spec, None if stored is None else stored.to(DEVICE))
    assert_same_bits(found.codes, expected.codes)
    assert_same_bits(found.scale, expected.scale)


def randn(*shape: int, dtype: torch.dtype = FP32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_bits(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """Every finite number of the dtype is as likely."""
    generator = torch.Generator().manual_seed(seed)
    pattern = torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64).to(torch.int32)
    x = pattern.view(FP32) if dtype == FP32 else pattern.to(torch.int16).view(dtype)
    return torch.where(x.isfinite(), x, 1)


def hard_inputs(dtype: torch.dtype, k: int = 256) -> Tensor:
    """Rows ``[n, k]``: of every size, zeros of both signs, denormals, the largest, ties of integers and of e4m3."""
    smallest, largest = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    zeros = torch.zeros(2, k)
    zeros[1, ::2] = -0.0
    sizes = randn(12, k, seed=1) * torch.tensor([2.0**e for e in (-30, -20, -12, -3, 0, 0, 0, 0, 2, 4, 9, 14)])[:, None]
    sizes[:, 3:9] = torch.tensor([0.0, -0.0] * 3)
    denormals = randn(4, k, seed=2).double() * torch.tensor([4.0, 1.0, 0.1, 0.01])[:, None].double() * smallest
    huge = randn(2, k, seed=3).clamp(-1, 1).double() * largest
    steps = torch.arange(k).float() - k // 2
    ties = torch.stack([steps / 2, (steps + 0.5).clamp(-127, 127), steps / 2**10, steps / 2**12, steps / 4])
    ties[:, 0] = torch.tensor([127.0, 127.0, 448.0, 1.75, 448.0 / 2**3])
    return torch.cat([zeros.double(), sizes.double(), denormals, huge, ties.double()]).to(dtype)


# Inputs --------------------------------------------------------------------------------------------------------------


@every_spec
@every_dtype
def test_hard_inputs_quantize_to_the_same_bits(spec, dtype):
    """A code that is not the engine's is a forward that is not the engine's."""
    x = hard_inputs(dtype)
    for value in (0.0131, 1.0, 2.0**-9) if spec.stores_scale else (1.0,):
        assert_quantizes_as_the_reference(x, spec, stored_for(spec, value))


@settings(max_examples=40)
@given(st.sampled_from(SPECS), st.sampled_from(DTYPES), st.integers(0, 2**32), st.integers(-40, 40))
def test_inputs_of_random_bits_are_the_references(spec, dtype, seed, exponent):
    x = random_bits(dtype, 5, 128, seed=seed)
    x[2:] = torch.frexp(x[2:].float())[0].to(dtype)  # one binade, so that the codes are of every value
    assert_quantizes_as_the_reference(x, spec, stored_for(spec, 1.37 * 2.0**exponent))


@every_spec
@pytest.mark.parametrize("shape", [(1, 128), (3, 5, 384), (0, 128), (2, 0, 128), (17, 256), (128,)], ids=str)
def test_inputs_of_every_shape_are_the_references(spec, shape):
    x = randn(*shape, dtype=BF16)
    if x.numel():
        x[..., -1] = 9  # where a kernel that stops early would miss it
    assert_quantizes_as_the_reference(x, spec, stored_for(spec))


@pytest.mark.parametrize("spec", [spec for spec in SPECS if not spec.group_size], ids=str)
@pytest.mark.parametrize("k", [1, 37, 130])
def test_rows_of_every_length_are_the_references(spec, k):
    assert_quantizes_as_the_reference(randn(5, k, dtype=BF16), spec, stored_for(spec))


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.strategy == "token"], ids=str)
def test_rows_longer_than_a_program_are_read_to_their_end(spec):
    x = randn(2, triton_activations.ROW + 100, dtype=BF16)
    x[0, -1], x[1, 0] = 9, -9
    assert_quantizes_as_the_reference(x, spec)


@every_spec
def test_a_changed_number_of_tokens_is_quantized_too(spec):
    """What is compiled for one number serves the others."""
    for tokens in (16, 1, 33):
        assert_quantizes_as_the_reference(randn(tokens, 128, dtype=BF16, seed=tokens), spec, stored_for(spec))


@pytest.mark.parametrize("spec", SPECS[::3], ids=str)
def test_inputs_may_be_views(spec):
    base = randn(128, 6, dtype=BF16)
    assert_quantizes_as_the_reference(base.T, spec, stored_for(spec))
    assert_quantizes_as_the_reference(randn(3, 256, dtype=BF16)[:, ::2], spec, stored_for(spec))
    assert_quantizes_as_the_reference(randn(1 + 3 * 128, dtype=BF16)[1:].view(3, 128), spec, stored_for(spec))


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.dynamic], ids=str)
def test_nan_and_infinity_spoil_their_own_scale(spec):
    """They must reach the loss, and not become a plausible number."""
    x = randn(3, 256, dtype=BF16)
    x[0, 7], x[2, 200] = torch.nan, torch.inf
    expected, found = activations.quantize(x, spec), triton_grid.quantize_activations(x.to(DEVICE), spec)
    assert_same_bits(found.scale, expected.scale)
    assert_same_bits(found.codes[1], expected.codes[1])


def test_a_scale_that_is_not_measured_is_an_error():
    spec = ActivationSpec("int8", "tensor", None, False)
    with pytest.raises(ValueError, match=r"int8 static tensor vllm inputs need a measured input_scale"):
        triton_grid.quantize_activations(torch.zeros(2, 128, device=DEVICE), spec)


@every_spec
@every_dtype
@pytest.mark.parametrize("shape", [(3, 128), (2, 3, 2176), (0, 128)], ids=str)
def test_codes_are_the_references_inputs_again(spec, dtype, shape):
    """What the gradient of the weight multiplies with."""
    quantized = activations.quantize(randn(*shape), spec, stored_for(spec))
    on_device = Quantized(quantized.codes.to(DEVICE), quantized.scale.to(DEVICE))
    found = triton_grid.dequantize_activations(on_device, dtype)
    assert_same_bits(found, activations.dequantize(quantized, dtype))


# Rounding and dividing -----------------------------------------------------------------------------------------------


@triton.jit
def _round_kernel(x, codes, back, block: tl.constexpr):
    at = tl.arange(0, block)
    code = triton_arithmetic._round(tl.load(x + at), tl.float8e4nv)
    tl.store(codes + at, code)
    tl.store(back + at, triton_arithmetic._widen(code))


def test_fp8_rounds_at_every_border_as_torch_does():
    """Each code, each number halfway between two, and the fp32 numbers beside these; and all that is beyond."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    positive = codes[codes >= 0].sort().values
    beyond = torch.tensor([464.0, 480, 1e9, 3e38, torch.inf])
    borders = torch.cat([positive, (positive[1:] + positive[:-1]) / 2, beyond])
    beside = [(bits(borders) + step).clamp(0, 0x7F800000).view(FP32) for step in (-1, 0, 1)]
    x = torch.cat([*beside, torch.tensor([1e-45, 1e-39, torch.nan])])
    x = torch.cat([x, -x])
    x = torch.cat([x, torch.zeros(2048 - len(x))]).to(DEVICE)
    codes, back = torch.empty_like(x, dtype=torch.float8_e4m3fn), torch.empty_like(x)
    _round_kernel[(1,)](x, codes, back, len(x), enable_fp_fusion=False)
    expected = grid.round_to(x.cpu(), "fp8_e4m3")
    assert_same_bits(codes, expected)
    assert_same_bits(back, expected.float())


@triton.jit
def _divide_kernel(x, y, out, block: tl.constexpr):
    at = tl.arange(0, block)
    divisor = tl.load(y + tl.program_id(0) + tl.arange(0, 1))
    here = tl.program_id(0) * block + at
    tl.store(out + here, triton_arithmetic._divide(tl.load(x + here), divisor))


@pytest.mark.parametrize("rows", [256 if torch.cuda.is_available() else 32])
def test_division_by_a_corrected_reciprocal_is_the_division(rows):
    """For any finite divisor: exact up to 1024, with the sign of a zero; beyond, and below 2**-32, near enough."""
    y = random_bits(FP32, rows, 1, seed=1).abs()
    y = torch.where(y == 0, 1, y)
    y[:8, 0] = torch.tensor([2.0**-149, 2.0**-126, 2.0**-40, 2.0**100, 2.0**127, 3.4e38, 1 - 2.0**-24, 2 - 2.0**-23])
    quotients = randn(rows, 4096, seed=2) * torch.logspace(-9, 9, 4096, base=2)
    x = (quotients.double() * y).float()
    x[:, :4] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf])
    x = torch.where(x.isfinite() | (torch.arange(4096) < 4), x, 0).contiguous()
    out = torch.empty_like(x, device=DEVICE)
    _divide_kernel[(rows,)](x.to(DEVICE), y.to(DEVICE), out, 4096, enable_fp_fusion=False)
    found, expected = out.cpu(), x / y
    exact = (expected.abs() >= 2.0**-32) & (expected.abs() <= 1024) | (x == 0)
    assert exact.float().mean() > 0.9
    assert_same_bits(torch.where(exact, found, 0), torch.where(exact, expected, 0))
    assert (found.abs()[expected.abs() > 1024] >= 1023).all()
    assert (found.abs()[expected.abs() < 2.0**-32] <= 2.0**-31).all()


# GEMMs ---------------------------------------------------------------------------------------------------------------


def quantized_pair(scheme: Scheme, m: int, n: int, k: int, coarse: bool = False) -> tuple[Quantized, Quantized]:
    """Codes and scales on the device; `coarse` ones have sums that no order of additions rounds."""
    x, w = randn(m, k, dtype=BF16, seed=1), randn(n, k, dtype=BF16, seed=2)
    inputs = activations.quantize(x, scheme.activations, stored_for(scheme.activations))  # type: ignore[arg-type]
    weight = grid.quantize(w, scheme.weights)
    if coarse:
        inputs, weight = (
            Quantized(one.codes.float().round().clamp(-3, 3).to(one.codes.dtype), one.scale.log2().round().exp2())
            for one in (inputs, weight)
        )
    return tuple(Quantized(one.codes.to(DEVICE), one.scale.to(DEVICE)) for one in (inputs, weight))  # type: ignore


@both_engines
@pytest.mark.parametrize("name", ["W8A8", "W4A8", "FP8", "FP8_DYNAMIC", "W4AFP8", "FP8_BLOCK"])
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("m", "n"), [(3, 48), (70, 16)])
def test_scaled_gemms_are_the_references(name, engine, has_bias, m, n):
    """All but the block-wise one add as the reference does, or exactly; that one is given sums that are exact."""
    scheme = Scheme.preset(name, activations={"engine": engine})
    x, weight = quantized_pair(scheme, m, n, 256, coarse=name == "FP8_BLOCK")
    bias = randn(n, dtype=BF16, seed=3).to(DEVICE) if has_bias else None
    found = triton_grid.scaled_linear(x, weight, scheme, bias, BF16)
    assert_same_bits(found, scaled_mm.linear(x, weight, scheme, bias, BF16))


@pytest.mark.parametrize("size", [32, 64, 128])
def test_groups_of_every_size_are_summed_in_order(size):
    """Each rounding of the fp32 sum is the reference's: the integers' own sums are exact."""
    scheme = Scheme.preset("W4A8", group_size=size)
    x, weight = quantized_pair(scheme, 5, 40, 512)
    assert_same_bits(
        triton_grid.scaled_linear(x, weight, scheme, None, FP32), scaled_mm.linear(x, weight, scheme, None, FP32)
    )


def test_sums_of_blocks_are_as_close_to_the_truth_as_the_references():
    """The tensor core keeps fewer bits of an fp8 sum than fp32 has."""
    scheme = Scheme.preset("FP8_BLOCK")
    x, weight = quantized_pair(scheme, 70, 200, 512)
    unrounded = grid.dequantize(weight, replace(scheme.weights, served_dtype=FP32)).double()
    exact = activations.dequantize(x, FP32).double() @ unrounded.T
    found = triton_grid.scaled_linear(x, weight, scheme, None, BF16)
    expected = scaled_mm.linear(x, weight, scheme, None, BF16)
    error, theirs = ((y.double() - exact).square().mean().sqrt() for y in (found, expected))
    assert error <= 1.05 * theirs


@pytest.mark.parametrize("name", ["W8A8", "W4A8", "FP8_BLOCK"])
@pytest.mark.parametrize("shape", [(128,), (0, 128), (2, 3, 128)], ids=str)
def test_leading_dimensions_are_rows(name, shape):
    scheme = Scheme.preset(name)
    x = triton_grid.quantize_activations(randn(*shape, dtype=BF16).to(DEVICE), scheme.activations)
    _, weight = quantized_pair(scheme, 1, 48, 128, coarse=name == "FP8_BLOCK")
    x = Quantized(x.codes, x.scale.log2().round().exp2()) if name == "FP8_BLOCK" else x
    y = triton_grid.scaled_linear(x, weight, scheme, None, BF16)
    assert y.shape == (*shape[:-1], 48)
    if name != "FP8_BLOCK" or DEVICE.type == "cpu":
        assert_same_bits(y, scaled_mm.linear(x, weight, scheme, None, BF16))


@pytest.mark.parametrize("size", [128])
@every_dtype
def test_int4_becomes_fp8_as_in_the_reference(size, dtype):
    """Also scales far below their row's, a row of zeros, and more groups than a program holds."""
    codes = torch.randint(-8, 8, (6, 40 * size), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    scale = randn(6, 40, seed=2).exp() * torch.tensor([1.0, 1e-3, 1e-7, 0, 1e2, 1])[:, None]
    scale[5] *= torch.logspace(0, -6, 40)
    weight = Quantized(codes, scale.to(dtype))
    found = triton_scaled_mm.fp8_from_int4(Quantized(weight.codes.to(DEVICE), weight.scale.to(DEVICE)))
    expected = scaled_mm.fp8_from_int4(weight)
    assert_same_bits(found.codes, expected.codes)
    assert_same_bits(found.scale, expected.scale)


@pytest.mark.parametrize("name", ["FP8", "FP8_DYNAMIC"])
@pytest.mark.parametrize(("m", "n", "k"), [(5, 48, 64), (1, 16, 80)])
def test_gradient_in_fp8_is_the_references(name, m, n, k):
    spec = Scheme.preset(name).weights
    weight, grad = randn(n, k, dtype=BF16).to(DEVICE), randn(m, n, dtype=BF16, seed=1).to(DEVICE)
    for amax in (None, 1.5 * grid.largest(weight)) if spec.per_tensor else (None,):
        found = triton_grid.fp8_input_gradient(grad, weight, spec, amax)
        assert_same_bits(found, reference.fp8_input_gradient(grad, weight, spec, amax))


@pytest.mark.parametrize("shape", [(1, 1), (37, 130), (128, 64)], ids=str)
def test_transposed_codes_are_the_codes(shape):
    codes = torch.arange(shape[0] * shape[1]).to(torch.int8).view(shape).to(DEVICE)
    assert torch.equal(triton_activations.transposed(codes), codes.T)


# The whole kernel ----------------------------------------------------------------------------------------------------


def test_it_says_which_schemes_it_computes():
    """The others train on the reference, and must not reach a kernel that lacks their rule."""
    fused = {name for name, scheme in PRESETS.items() if triton_grid.not_fused(scheme) is None}
    assert fused == {
        *("W4A16", "W8A16", "W8A8", "INT8", "W4A8", "W4AFP8"),
        *("FP8", "FP8_DYNAMIC", "FP8_BLOCK"),
    }
    assert "found range/15" in str(triton_grid.not_fused(PRESETS["W4A16_ASYM"]))


@pytest.mark.parametrize("name", ["W8A8", "W8A16", "FP8", "FP8_DYNAMIC", "W4A8", "W4AFP8"])
@pytest.mark.parametrize("in_fp8", [False, True], ids=["", "fp8-gradient"])
def test_layers_train_to_the_same_bits_as_on_the_reference(monkeypatch, name, in_fp8):
    """Forward and backward, through every function of the kernel that the scheme needs."""
    if in_fp8 and name not in ("FP8", "FP8_DYNAMIC"):
        return
    results = []
    for kernel in ("reference", "triton"):
        monkeypatch.setenv("LOCKSTEP_KERNEL", kernel)
        torch.manual_seed(0)
        model = nn.ModuleDict({"proj": nn.Linear(128, 32)}).to(DEVICE, BF16)
        lockstep.prepare(model, name, fp8_input_gradient=in_fp8)
        layer = model["proj"]
        if layer.scheme.activations is not None and layer.scheme.activations.stores_scale:
            layer.input_scale.fill_(0.01)
        x = randn(5, 128, dtype=BF16, seed=1).to(DEVICE).requires_grad_()
        y = layer(x)
        y.backward(randn(5, 32, dtype=BF16, seed=2).to(DEVICE))
        results.append((y.detach(), x.grad, layer.weight.grad))
    for found, expected in zip(*results, strict=True):
        assert_same_bits(found, expected)


def opcheck(name: str, *arguments: object) -> None:
    # Not test_schema: it computes with results, and torch with no fp8.
    tests = ("test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(torch.ops.lockstep, name), arguments, test_utils=tests)


@pytest.mark.parametrize("spec", [BY_TOKEN, SPECS[2], SPECS[-2]], ids=str)
def test_operators_of_inputs_tell_the_compiler_the_truth(spec):
    """A wrong shape, dtype or stride of the fake kernel fails only in a compiled model."""
    stored = stored_for(spec)
    stored = stored if stored is None else stored.to(DEVICE)
    for x in (randn(2, 3, 256, dtype=BF16).to(DEVICE), randn(256, 3, dtype=BF16).to(DEVICE).T):
        opcheck("triton_quantize_activations", x, stored, *astuple(spec))
        codes, scale, *_ = triton_grid.quantize_activations(x, spec, stored)
        opcheck("triton_dequantize_activations", codes, scale, None, BF16)


def test_operators_of_gemms_tell_the_compiler_the_truth():
    scheme = Scheme.preset("FP8_BLOCK")
    x, weight = quantized_pair(scheme, 3, 48, 256, coarse=True)
    tensors = (x.codes, x.scale, None, weight.codes, weight.scale, None, None)
    opcheck("triton_scaled_linear", *tensors, BF16, *astuple(scheme.weights), *astuple(scheme.activations))
    spec = Scheme.preset("FP8_DYNAMIC").weights
    grad, master = randn(4, 48, dtype=BF16).to(DEVICE), randn(48, 64, dtype=BF16).to(DEVICE)
    opcheck("triton_fp8_input_gradient", grad, master, None, *astuple(spec))


def test_the_registry_hands_out_one_module_with_the_whole_protocol():
    kernel = kernels.find("quantize", "triton", Scheme.preset("FP8"), DEVICE).run
    functions = [name for name in vars(kernels.Quantizer) if not name.startswith("_")]
    assert len(functions) >= 9
    assert all(callable(getattr(kernel, name)) for name in functions)

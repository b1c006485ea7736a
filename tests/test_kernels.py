"""The kernels: what the registry hands out, and that each computes the reference's arithmetic in the serving order."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import astuple

import pytest
import torch
import torch.nn.functional as F
from strategies import EVERY_SPEC, bits
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import lockstep
from lockstep import Scheme, TensorSpec, activations, grid, kernels
from lockstep.kernels import operators, reference, torch_int4
from lockstep.scheme import PRESETS

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HERE = CUDA if torch.cuda.is_available() else CPU
CHANNEL = TensorSpec(strategy="channel")


def served_in(dtype: torch.dtype, group_size: int = 32) -> TensorSpec:
    return TensorSpec(group_size=group_size, scale_dtype=dtype, served_dtype=dtype)


def randn(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


# The registry --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operator", "name", "spec", "device", "message"),
    [
        (
            "linear",
            "marlin2",
            TensorSpec(),
            "cpu",
            "no linear kernel 'marlin2': there are reference, triton, torch-int4",
        ),
        ("quantize", "torch-int4", TensorSpec(), "cpu", "no quantize kernel 'torch-int4': there are reference, triton"),
        ("fake_quantize", "reference", TensorSpec(), "cpu", "no fake_quantize kernel 'reference'"),
        ("linear", "torch-int4", served_in(BF16), "cpu", "does not round code .* to torch.bfloat16"),
        ("linear", "torch-int4", CHANNEL, "cpu", "int4 channel.*scales before the GEMM"),
        ("linear", "torch-int4", served_in(FP32), "cuda", "runs on the CPU, the model is on cuda"),
        ("quantize", "triton", TensorSpec(), "meta", "they run on CUDA, the weight is on meta"),
    ],
)
def test_kernel_that_cannot_run_is_an_error_with_its_reason(operator, name, spec, device, message):
    """No fallback: an alignment report must not name one kernel and measure another."""
    with pytest.raises(kernels.KernelUnavailable, match=message):
        kernels.find(operator, name, Scheme(spec), torch.device(device))


@pytest.mark.parametrize("operator", ["quantize", "linear"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_reference_is_always_there(operator, device):
    kernel = kernels.find(operator, "reference", Scheme(), torch.device(device))
    assert (kernel.name, kernel.operator) == ("reference", operator)


def test_names_are_unique_within_an_operator():
    """``--kernel NAME`` means one kernel."""
    names = [(kernel.operator, kernel.name) for kernel in kernels.KERNELS]
    assert len(set(names)) == len(names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_no_kernel_claims_to_run_on_a_device_that_is_not_there():
    """``lockstep kernels --device cuda`` says what can run here."""
    assert all(kernel.unavailable(Scheme(), CUDA) for kernel in kernels.KERNELS)
    with pytest.raises(kernels.KernelUnavailable, match="this machine has no CUDA device"):
        kernels.training(Scheme(), CUDA)


# Which kernel trains -------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu_without_triton(monkeypatch) -> None:
    """As far as the registry can see."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "TRITON_PROBLEM", "Triton does not load (planted)")


@pytest.fixture(autouse=True)
def no_override(monkeypatch) -> None:
    monkeypatch.delenv("LOCKSTEP_KERNEL", raising=False)


def test_the_cpu_trains_on_the_reference():
    """Also where Triton's interpreter could: it takes a thousand times as long."""
    assert kernels.training(Scheme(), CPU) is reference


@pytest.mark.skipif(bool(kernels.TRITON_PROBLEM), reason="needs Triton")
def test_a_gpu_trains_on_triton(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert kernels.training(Scheme(), CUDA) is kernels.triton_grid


def test_a_gpu_without_triton_is_an_error_that_says_what_to_install(gpu_without_triton):
    """Training in silence at a tenth of the speed would be found out by the bill."""
    with pytest.raises(
        kernels.KernelUnavailable, match=r"Triton does not load \(planted\): pip install triton, or set LOCKSTEP"
    ):
        kernels.training(Scheme(), CUDA)


def test_the_environment_overrides_the_kernel(gpu_without_triton, monkeypatch):
    monkeypatch.setenv("LOCKSTEP_KERNEL", "reference")
    assert kernels.training(Scheme(), CUDA) is reference


@pytest.mark.skipif(bool(kernels.TRITON_PROBLEM), reason="needs Triton")
def test_layers_train_on_the_kernel_that_the_environment_names(monkeypatch):
    """Also in the backward, and with the same bits."""
    model = nn.ModuleDict({"proj": nn.Linear(64, 8)})
    lockstep.prepare(model, lockstep.Scheme(served_in(BF16)))
    model.to(HERE)
    called = []
    monkeypatch.setattr(
        kernels.triton_grid,
        "fake_quantize",
        lambda weight, spec, *_, again=False: called.append(again) or grid.fake_quantize(weight, spec),
    )
    monkeypatch.setenv("LOCKSTEP_KERNEL", "triton")
    model["proj"](torch.ones(2, 64, device=HERE, requires_grad=True)).sum().backward()
    assert called == [False, True]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fast", "no quantize kernel 'fast': there are reference, triton"),
        ("torch-int4", "no quantize kernel 'torch-int4'"),
    ],
)
def test_an_unknown_override_is_an_error_and_not_the_default(monkeypatch, name, message):
    monkeypatch.setenv("LOCKSTEP_KERNEL", name)
    with pytest.raises(kernels.KernelUnavailable, match=message):
        kernels.training(Scheme(), CPU)


def test_an_override_that_cannot_run_is_an_error_and_not_the_default(monkeypatch):
    monkeypatch.setenv("LOCKSTEP_KERNEL", "triton")
    monkeypatch.setattr(kernels, "TRITON_PROBLEM", "Triton does not load (planted)")
    with pytest.raises(kernels.KernelUnavailable, match="Triton does not load"):
        kernels.training(Scheme(), CPU)
    layer = nn.ModuleDict({"proj": nn.Linear(64, 8)})
    lockstep.prepare(layer, lockstep.Scheme(served_in(BF16)))
    with pytest.raises(kernels.KernelUnavailable, match="Triton does not load"):
        layer["proj"](torch.zeros(1, 64))


def in_a_new_process(script: str, **environment: str) -> subprocess.CompletedProcess:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, env=inherited | environment, check=False)


ASK = """
import torch
from lockstep import Scheme, kernels
print(kernels.training(Scheme(), torch.device("cpu")).__name__)
"""


@pytest.mark.skipif(bool(kernels.TRITON_PROBLEM), reason="needs Triton")
def test_triton_on_a_cpu_outside_its_interpreter_is_an_error():
    result = in_a_new_process(ASK, LOCKSTEP_KERNEL="triton")
    message = "Triton runs on the CPU only in its interpreter: set TRITON_INTERPRET=1 before Lockstep is imported"
    assert result.returncode == 1
    refused = f"LOCKSTEP_KERNEL=triton: quantize kernel 'triton' cannot compute {Scheme()} here: {message}"
    assert f"KernelUnavailable: {refused}" in result.stderr
    result = in_a_new_process(ASK, LOCKSTEP_KERNEL="triton", TRITON_INTERPRET="1")
    assert result.stdout.split() == ["lockstep.kernels.triton_grid"], result.stderr


def test_without_triton_a_cpu_trains_and_every_command_works():
    """It is an extra, and has no wheels for Macs and Windows."""
    blocked = "import sys; sys.modules['triton'] = None\n"
    result = in_a_new_process(blocked + ASK)
    assert result.stdout.split() == ["lockstep.kernels.reference"], result.stderr
    result = in_a_new_process(blocked + ASK, LOCKSTEP_KERNEL="triton")
    assert "Triton does not load" in result.stderr
    assert "pip install triton" in result.stderr
    command = "from lockstep.cli import main; sys.exit(main(['kernels']))"
    result = in_a_new_process(blocked + command, COLUMNS="300")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("no: Triton does not load") == 2


# Every quantizer is the reference -------------------------------------------------------------------------------------

QUANTIZERS = [kernel for kernel in kernels.KERNELS if kernel.operator == "quantize" and kernel.run is not None]
every_quantizer = pytest.mark.parametrize("kernel", QUANTIZERS, ids=lambda kernel: kernel.name)


def same_bits(found: Tensor, expected: Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(bits(found.cpu()), bits(expected))


@every_quantizer
@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (TensorSpec(), (64, 256)),
        (TensorSpec(), (2, 64, 128)),
        (served_in(FP16), (64, 96)),
        (served_in(FP32, 64), (64, 128)),
        (TensorSpec(group_size=32, scale_rule="max/-8", scale_dtype=FP16), (2, 64, 64)),
        (CHANNEL, (64, 96)),
        (TensorSpec(strategy="channel", scale_rule="amax/7.5"), (64, 144)),
    ],
    ids=str,
)
def test_every_function_of_every_quantizer_equals_the_grid(kernel, spec, shape):
    """Training takes one, the exporter another: the bits that train are the bits that ship."""
    if reason := kernel.unavailable(Scheme(spec), HERE):
        pytest.skip(reason)
    weight = randn(*shape, dtype=BF16)
    here, run = weight.to(HERE), kernel.run
    codes, scale, *_ = grid.quantize(weight, spec)
    served = grid.fake_quantize(weight, spec)
    assert same_bits(run.fake_quantize(here, spec), served)
    assert same_bits(run.fake_quantize(here, spec, again=True), served)
    for dtype in (torch.int8, BF16):
        found = run.quantize(here, spec, dtype)
        assert same_bits(found.codes + 0, codes.to(dtype))
        assert same_bits(found.scale, scale)
    assert same_bits(run.quantize(here, spec).codes, codes)
    packed, packed_scale = run.pack_quantized(here, spec)
    assert same_bits(packed, reference.words.pack(codes, 4))
    assert same_bits(packed_scale, scale)
    assert same_bits(run.dequantize_packed(packed, packed_scale, spec), served)
    assert same_bits(run.dequantize_packed(packed, None, spec), codes.to(spec.served_dtype))
    packed, packed_scale = run.pack_marlin(here, spec)
    assert same_bits(packed, reference.marlin.pack_weight(codes))
    assert same_bits(packed_scale, reference.marlin.pack_scales(scale))


# The reference order -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("shape", [(256,), (5, 256), (2, 3, 256), (0, 256)], ids=str)
def test_grouped_linear_is_a_product_with_the_dequantized_weight(dtype, shape):
    spec = served_in(dtype, group_size=128)
    quantized, x = grid.quantize(randn(16, 256), spec), randn(*shape, dtype=dtype)
    assert torch.equal(reference.linear(x, quantized, Scheme(spec)), F.linear(x, grid.dequantize(quantized, spec)))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("grouping", [{"strategy": "channel"}, {"group_size": 128}], ids=["channel", "one-group"])
def test_single_scale_is_multiplied_after_the_gemm(grouping, dtype):
    """Marlin's channel-wise order, ``RN(RN(x @ code) * scale)``; a product with ``code * scale`` differs."""
    spec = TensorSpec(**grouping, scale_dtype=dtype, served_dtype=dtype)
    codes, scale, *_ = quantized = grid.quantize(randn(64, 128), spec)
    x = randn(32, 128, dtype=dtype)
    y = reference.linear(x, quantized, Scheme(spec))
    assert torch.equal(y, F.linear(x, codes.to(dtype)) * scale.T)
    dequantized = F.linear(x, grid.dequantize(quantized, spec))
    assert not torch.equal(y, dequantized)
    torch.testing.assert_close(y, dequantized, rtol=0.02, atol=0.05)


def test_bias_is_added_after_the_rounding():
    """A GEMM that adds the bias to its accumulator, as ``F.linear`` may, rounds once less than the kernel."""
    spec = served_in(BF16)
    quantized = grid.quantize(randn(64, 128), spec)
    x, bias = randn(32, 128, dtype=BF16), randn(64, dtype=BF16)
    assert torch.equal(
        reference.linear(x, quantized, Scheme(spec), bias), reference.linear(x, quantized, Scheme(spec)) + bias
    )


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_bias_after_a_single_scale_is_added_before_the_rounding(dtype):
    """Marlin multiplies by the scale and adds the bias in one instruction; float64 holds both exactly."""
    spec = TensorSpec(strategy="channel", scale_dtype=dtype, served_dtype=dtype)
    codes, scale, *_ = quantized = grid.quantize(randn(64, 128), spec)
    x, bias = randn(32, 128, dtype=dtype), randn(64, dtype=dtype)
    product = F.linear(x, codes.to(dtype))
    exact = product.double() * scale.T.double() + bias.double()
    y = reference.linear(x, quantized, Scheme(spec), bias)
    assert torch.equal(y, exact.to(dtype))
    assert not torch.equal(y, product * scale.T + bias)


# torch's INT4 operator ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k", "group_size"), [(16, 64, 32), (32, 256, 64), (64, 256, 128)])
def test_torch_int4_holds_the_reference_weights(n, k, group_size):
    """Through an identity there is one product in each sum, so what comes out are the weights, bit for bit."""
    spec = served_in(FP32, group_size)
    kernel = kernels.find("linear", "torch-int4", Scheme(spec), CPU)
    quantized = grid.quantize(randn(n, k), spec)
    assert torch.equal(kernel.run(torch.eye(k), quantized, Scheme(spec)).T, grid.dequantize(quantized, spec))


@pytest.mark.parametrize("shape", [(256,), (1, 256), (2, 3, 256)], ids=str)
def test_torch_int4_differs_from_the_reference_in_the_order_of_fp32_additions_alone(shape):
    """So the sums agree to a few units in the last place, and exactly where every order gives the same sum."""
    spec = served_in(FP32)
    quantized, bias = grid.quantize(randn(32, 256), spec), randn(32)
    x = randn(*shape)
    y, expected = torch_int4.linear(x, quantized, spec, bias), reference.linear(x, quantized, Scheme(spec), bias)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)

    # Small integers times bf16-valued weights of like magnitude: every partial sum is a number of fp32.
    exact = grid.Quantized(quantized.codes, quantized.scale.bfloat16().float())
    x = x.round()
    assert torch.equal(torch_int4.linear(x, exact, spec), reference.linear(x, exact, Scheme(spec)))


def test_torch_int4_is_refused_in_bf16_because_it_does_not_round_the_weight():
    """Two products in each sum show it: it adds ``code * scale`` unrounded, serving kernels round each one first."""
    spec = served_in(BF16)
    assert "does not round" in torch_int4.unavailable(spec, CPU)
    codes, scale, *_ = quantized = grid.quantize(randn(64, 64), spec)
    x = torch.eye(64, dtype=BF16)[::2] + torch.eye(64, dtype=BF16)[1::2]

    unrounded = codes.double() * scale.double().repeat_interleave(32, dim=-1)
    pairs = (unrounded[:, ::2] + unrounded[:, 1::2]).T.to(BF16)
    served = grid.dequantize(quantized, spec).double()
    assert torch.equal(torch_int4.linear(x, quantized, spec), pairs)
    assert torch.equal(reference.linear(x, quantized, Scheme(spec)), (served[:, ::2] + served[:, 1::2]).T.to(BF16))
    assert not torch.equal(torch_int4.linear(x, quantized, spec), reference.linear(x, quantized, Scheme(spec)))


# The operators for the compiler ------------------------------------------------------------------------------------


WEIGHT_OPERATORS = ["fake_quantize", "fake_quantize_again", "quantize"]
WEIGHT_OPERATORS += [f"triton_{name}" for name in WEIGHT_OPERATORS if not kernels.TRITON_PROBLEM]


@pytest.mark.parametrize("layout", ["contiguous", "experts", "strided", "transposed"])
@pytest.mark.parametrize("spec", [TensorSpec(), CHANNEL, TensorSpec(scale_rule="amax/7.5", group_size=64)], ids=str)
@pytest.mark.parametrize("operator", WEIGHT_OPERATORS)
def test_weight_operators_tell_the_compiler_the_truth(operator, spec, layout):
    """A wrong shape, dtype or stride of the fake kernel fails only in a compiled model, in code that nobody wrote."""
    weight = {
        "contiguous": randn(4, 256),
        "experts": randn(2, 3, 256),
        "strided": randn(4, 512)[:, ::2],
        "transposed": randn(256, 4).T,
    }[layout].to(HERE)
    dtypes = [()] if "fake" in operator else [(torch.int8,), (BF16,)]
    for dtype in dtypes:
        for scale in (None, grid.quantize(weight, spec).scale):  # in its own dtype: a result is never an input
            torch.library.opcheck(getattr(torch.ops.lockstep, operator), (weight, *dtype, None, scale, *astuple(spec)))


@pytest.mark.parametrize(
    "spec", [TensorSpec(), CHANNEL, TensorSpec(group_size=32, scale_rule="max/-8", scale_dtype=FP16)], ids=str
)
def test_every_field_of_a_spec_crosses_into_the_operators(spec):
    """A field that is left out would be the default's in compiled models alone."""
    assert operators.fields(spec) == astuple(spec)


@every_quantizer
@pytest.mark.parametrize("spec", [TensorSpec(), CHANNEL], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_the_operator_of_learned_gradients_tells_the_compiler_the_truth(kernel, spec, dtype):
    weight, grad = randn(4, 256, dtype=dtype).to(HERE), randn(4, 256, dtype=BF16).to(HERE)
    scale = grid.quantize(weight, spec).scale.float()
    name = f"{'triton_' if kernel.name == 'triton' else ''}learned_gradients"
    torch.library.opcheck(getattr(torch.ops.lockstep, name), (grad, weight, scale, *astuple(spec)))


@every_quantizer
@pytest.mark.parametrize("spec", [TensorSpec(), CHANNEL], ids=str)
def test_fake_weights_get_shapes_and_no_kernel(kernel, spec, monkeypatch):
    """FSDP and export trace with tensors that have no memory to read."""
    for name in ("_fake_quantize", "_quantize"):
        monkeypatch.setattr(kernel.run, name, lambda *_: pytest.fail("a kernel was launched"))
    groups = spec.num_groups(256)
    with FakeTensorMode():
        weight = torch.empty(2, 16, 256, dtype=BF16, device=HERE)
        assert operators.traced(weight)
        assert operators.traced(nn.Parameter(weight))
        served = kernel.run.fake_quantize(weight, spec)
        again = kernel.run.fake_quantize(weight, spec, again=True)
        codes, scale, *_ = kernel.run.quantize(weight, spec, FP16)
    assert (served.shape, served.dtype, served.device.type) == (weight.shape, spec.served_dtype, HERE.type)
    assert (again.shape, again.dtype) == (weight.shape, spec.served_dtype)
    assert (codes.shape, codes.dtype) == (weight.shape, FP16)
    assert (scale.shape, scale.dtype) == ((2, 16, groups), spec.scale_dtype)


def test_plain_weights_skip_the_dispatcher():
    """It takes as long as a small layer's kernel."""
    assert not operators.traced(torch.zeros(2))
    assert not operators.traced(nn.Parameter(torch.zeros(2)))


@pytest.mark.parametrize(
    ("has_scale", "has_bias", "sums"),
    [(True, False, BF16), (False, True, BF16), (True, True, BF16), (True, False, FP32)],
)
def test_epilogue_tells_the_compiler_the_truth(has_scale, has_bias, sums):
    scale = randn(16, 1, dtype=BF16) if has_scale else None
    bias = randn(16, dtype=BF16) if has_bias else None
    torch.library.opcheck(torch.ops.lockstep.epilogue, (randn(2, 3, 16, dtype=sums), scale, bias, BF16))


# The operators of quantized inputs -----------------------------------------------------------------------------------

QUANTIZED = [name for name, scheme in PRESETS.items() if scheme.activations and name != "INT8"]


def operands(name: str, engine: str = "vllm") -> tuple[Scheme, Tensor | None, grid.Quantized, grid.Quantized]:
    scheme = Scheme.preset(name, activations={"engine": engine})
    stored = torch.tensor([0.5]) if scheme.activations.stores_scale else None
    x = activations.quantize(randn(2, 3, 256), scheme.activations, stored)
    return scheme, stored, x, grid.quantize(randn(48, 256), scheme.weights)


@pytest.mark.parametrize("name", QUANTIZED)
def test_operators_of_quantized_inputs_tell_the_compiler_the_truth(name):
    scheme, stored, x, w = operands(name)
    checks = ("test_faketensor",)  # torch cannot compare 8-bit floats for test_schema
    inputs = operators.fields(scheme.activations)
    lockstep_ops = torch.ops.lockstep
    torch.library.opcheck(lockstep_ops.quantize_activations, (randn(2, 3, 256), stored, *inputs), test_utils=checks)
    torch.library.opcheck(lockstep_ops.dequantize_activations, (*x[:2], x.global_scale, BF16), test_utils=checks)
    tensors = (x.codes, x.scale, x.global_scale, w.codes, w.scale, w.global_scale, randn(48, dtype=BF16))
    fields = (*operators.fields(scheme.weights), *inputs)
    torch.library.opcheck(lockstep_ops.scaled_linear, (*tensors, BF16, *fields), test_utils=checks)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_operators_of_quantized_inputs_are_their_functions(name, engine, monkeypatch):
    """Called as a compiler calls them: no field of the two specs, and no scale, is lost on the way."""
    scheme, stored, x, w = operands(name, engine)
    direct = reference.scaled_linear(x, w, scheme, None, BF16)
    used = reference.dequantize_activations(x, FP32)
    monkeypatch.setattr(operators, "traced", lambda tensor: True)
    found = reference.quantize_activations(randn(2, 3, 256), scheme.activations, stored)
    assert same_bits(found.codes, x.codes)
    assert same_bits(found.scale.view_as(x.scale), x.scale)
    assert (found.global_scale is None) == (x.global_scale is None)
    assert torch.equal(reference.scaled_linear(found, w, scheme, None, BF16), direct)
    assert torch.equal(reference.dequantize_activations(found, FP32), used)


@pytest.mark.parametrize("spec", EVERY_SPEC, ids=str)
def test_weight_operators_hold_for_every_rule(spec, monkeypatch):
    """The fake kernels' shapes and dtypes: ragged blocks, tensor scales, zero points, e8m0."""
    checks = ("test_schema", "test_faketensor")
    weight, amax = randn(130, 256), torch.full((1, 1), 9.0)
    fields = operators.fields(spec)
    torch.library.opcheck(torch.ops.lockstep.fake_quantize, (weight, amax, None, *fields), test_utils=checks)
    torch.library.opcheck(
        torch.ops.lockstep.quantize, (weight, spec.code_dtype, amax, None, *fields), test_utils=checks
    )
    expected, served = grid.quantize(weight, spec, amax), grid.fake_quantize(weight, spec, amax)
    monkeypatch.setattr(operators, "traced", lambda tensor: True)
    found = reference.quantize(weight, spec, None, amax)
    assert same_bits(found.scale, expected.scale)
    if spec.symmetric:
        assert same_bits(found.codes, expected.codes)
    else:
        counted = expected.codes.unflatten(-1, (expected.scale.shape[-1], -1)) - expected.zero_point.unsqueeze(-1)
        assert torch.equal(found.codes, counted.flatten(-2))
    assert same_bits(reference.fake_quantize(weight, spec, amax, again=True), served)


# Weight-only kernels of the other formats ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_int8_channel_scales_the_fp32_sums_and_adds_the_bias_after(dtype, bias):
    """Marlin: ``RN(acc * s)``, one rounding less than with 4 bits, and then the bias."""
    spec = TensorSpec("int8", "channel", scale_dtype=dtype, served_dtype=dtype)
    quantized, x = grid.quantize(randn(48, 128), spec), (randn(8, 128) * 8).round().to(dtype)
    b = randn(48, dtype=dtype) if bias else None
    exact = (x.double() @ quantized.codes.double().T).float() * quantized.scale.float().T
    expected = exact.to(dtype) if b is None else exact.to(dtype) + b
    assert torch.equal(reference.linear(x, quantized, Scheme(spec), b), expected)
    assert not torch.equal(F.linear(x, grid.dequantize(quantized, spec)), exact.to(dtype))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_nvfp4_multiplies_its_second_scale_with_the_fp32_sums(bias):
    """Marlin: the weights it multiplies with are ``code * scale``, exact in bf16."""
    scheme = Scheme.preset("NVFP4A16")
    quantized, x = grid.quantize(randn(48, 128), scheme.weights), (randn(8, 128) * 4).round().to(BF16)
    b = randn(48, dtype=BF16) if bias else None
    groups = quantized.codes.double().unflatten(-1, (8, 16)) * quantized.scale.double().unsqueeze(-1)
    sums = (x.double() @ groups.flatten(-2).T).float()
    exact = (sums * quantized.global_scale.reciprocal()).to(BF16)
    assert torch.equal(reference.linear(x, quantized, scheme, b), exact if b is None else exact + b)
    assert not torch.equal(F.linear(x, grid.dequantize(quantized, scheme.weights)), exact)


@pytest.mark.parametrize("name", ["MXFP4A16", "MXFP8A16", "W8A16", "W4A16_ASYM"])
def test_other_weight_only_formats_are_a_product_with_the_dequantized_weight(name):
    scheme = Scheme.preset(name)
    quantized, x = grid.quantize(randn(48, 256), scheme.weights), randn(2, 3, 256, dtype=BF16)
    assert torch.equal(reference.linear(x, quantized, scheme), F.linear(x, grid.dequantize(quantized, scheme.weights)))


@pytest.mark.parametrize("name", ["torch-int4", "triton"])
@pytest.mark.parametrize("preset", ["W8A16", "W8A8", "FP8_DYNAMIC", "NVFP4A16", "W4A16_ASYM", "W4A8"])
def test_kernels_of_plain_int4_refuse_every_other_scheme(name, preset):
    with pytest.raises(kernels.KernelUnavailable, match="symmetric INT4 weights with inputs as they are"):
        kernels.find("linear", name, Scheme.preset(preset), CPU)

"""The kernels: what the registry hands out, and that each computes the reference's arithmetic in the serving order."""

from __future__ import annotations

from dataclasses import astuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep import TensorSpec, grid, kernels
from lockstep.kernels import reference, torch_int4

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CPU = torch.device("cpu")
CHANNEL = TensorSpec(strategy="channel")


def served_in(dtype: torch.dtype, group_size: int = 32) -> TensorSpec:
    return TensorSpec(group_size=group_size, scale_dtype=dtype, served_dtype=dtype)


def randn(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize(
    ("operator", "name", "spec", "device", "message"),
    [
        ("linear", "marlin2", TensorSpec(), "cpu", "no linear kernel 'marlin2': there are reference, torch-int4"),
        ("fake_quantize", "torch-int4", TensorSpec(), "cpu", "no fake_quantize kernel .* there are reference"),
        ("linear", "torch-int4", served_in(BF16), "cpu", "does not round code .* to torch.bfloat16"),
        ("linear", "torch-int4", CHANNEL, "cpu", "int4 channel.*scales before the GEMM"),
        ("linear", "torch-int4", served_in(FP32), "cuda", "runs on the CPU, the model is on cuda"),
    ],
)
def test_kernel_that_cannot_run_is_an_error_with_its_reason(operator, name, spec, device, message):
    """No fallback: an alignment report must not name one kernel and measure another."""
    with pytest.raises(kernels.KernelUnavailable, match=message):
        kernels.find(operator, name, spec, torch.device(device))


@pytest.mark.parametrize("operator", ["fake_quantize", "linear"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_reference_is_always_there(operator, device):
    kernel = kernels.find(operator, "reference", TensorSpec(), torch.device(device))
    assert (kernel.name, kernel.operator) == ("reference", operator)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_no_kernel_claims_to_run_on_a_device_that_is_not_there():
    """``lockstep kernels --device cuda`` says what can run here."""
    assert all(kernel.unavailable(TensorSpec(), torch.device("cuda")) for kernel in kernels.KERNELS)


@pytest.mark.parametrize("spec", [TensorSpec(), CHANNEL, served_in(FP16)], ids=str)
def test_fake_quantize_kernels_equal_the_grid(spec):
    weight = randn(16, 256)
    for kernel in kernels.KERNELS:
        if kernel.operator == "fake_quantize" and not kernel.unavailable(spec, CPU):
            assert torch.equal(kernel.run(weight, spec), grid.fake_quantize(weight, spec))


# The reference order -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("shape", [(256,), (5, 256), (2, 3, 256), (0, 256)], ids=str)
def test_grouped_linear_is_a_product_with_the_dequantized_weight(dtype, shape):
    spec = served_in(dtype, group_size=128)
    quantized, x = grid.quantize(randn(16, 256), spec), randn(*shape, dtype=dtype)
    assert torch.equal(reference.linear(x, quantized, spec), F.linear(x, grid.dequantize(quantized, spec)))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("grouping", [{"strategy": "channel"}, {"group_size": 128}], ids=["channel", "one-group"])
def test_single_scale_is_multiplied_after_the_gemm(grouping, dtype):
    """Marlin's channel-wise order, ``RN(RN(x @ code) * scale)``; a product with ``code * scale`` differs."""
    spec = TensorSpec(**grouping, scale_dtype=dtype, served_dtype=dtype)
    codes, scale = quantized = grid.quantize(randn(64, 128), spec)
    x = randn(32, 128, dtype=dtype)
    y = reference.linear(x, quantized, spec)
    assert torch.equal(y, F.linear(x, codes.to(dtype)) * scale.T)
    dequantized = F.linear(x, grid.dequantize(quantized, spec))
    assert not torch.equal(y, dequantized)
    torch.testing.assert_close(y, dequantized, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("spec", [served_in(BF16), CHANNEL], ids=str)
def test_bias_is_added_after_the_rounding(spec):
    """A GEMM that adds the bias to its accumulator, as ``F.linear`` may, rounds once less than the kernel."""
    quantized = grid.quantize(randn(64, 128), spec)
    x, bias = randn(32, 128, dtype=BF16), randn(64, dtype=BF16)
    assert torch.equal(reference.linear(x, quantized, spec, bias), reference.linear(x, quantized, spec) + bias)


# torch's INT4 operator ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k", "group_size"), [(16, 64, 32), (32, 256, 64), (64, 256, 128)])
def test_torch_int4_holds_the_reference_weights(n, k, group_size):
    """Through an identity there is one product in each sum, so what comes out are the weights, bit for bit."""
    spec = served_in(FP32, group_size)
    kernel = kernels.find("linear", "torch-int4", spec, CPU)
    quantized = grid.quantize(randn(n, k), spec)
    assert torch.equal(kernel.run(torch.eye(k), quantized, spec).T, grid.dequantize(quantized, spec))


@pytest.mark.parametrize("shape", [(256,), (1, 256), (2, 3, 256)], ids=str)
def test_torch_int4_differs_from_the_reference_in_the_order_of_fp32_additions_alone(shape):
    """So the sums agree to a few units in the last place, and exactly where every order gives the same sum."""
    spec = served_in(FP32)
    quantized, bias = grid.quantize(randn(32, 256), spec), randn(32)
    x = randn(*shape)
    y, expected = (linear(x, quantized, spec, bias) for linear in (torch_int4.linear, reference.linear))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)

    # Small integers times bf16-valued weights of like magnitude: every partial sum is a number of fp32.
    exact = grid.Quantized(quantized.codes, quantized.scale.bfloat16().float())
    x = x.round()
    assert torch.equal(torch_int4.linear(x, exact, spec), reference.linear(x, exact, spec))


def test_torch_int4_is_refused_in_bf16_because_it_does_not_round_the_weight():
    """Two products in each sum show it: it adds ``code * scale`` unrounded, serving kernels round each one first."""
    spec = served_in(BF16)
    assert "does not round" in torch_int4.unavailable(spec, CPU)
    codes, scale = quantized = grid.quantize(randn(64, 64), spec)
    x = torch.eye(64, dtype=BF16)[::2] + torch.eye(64, dtype=BF16)[1::2]

    unrounded = codes.double() * scale.double().repeat_interleave(32, dim=-1)
    pairs = (unrounded[:, ::2] + unrounded[:, 1::2]).T.to(BF16)
    served = grid.dequantize(quantized, spec).double()
    assert torch.equal(torch_int4.linear(x, quantized, spec), pairs)
    assert torch.equal(reference.linear(x, quantized, spec), (served[:, ::2] + served[:, 1::2]).T.to(BF16))
    assert not torch.equal(torch_int4.linear(x, quantized, spec), reference.linear(x, quantized, spec))


# The operators for the compiler ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "experts", "strided", "transposed"])
@pytest.mark.parametrize("spec", [TensorSpec(), CHANNEL, TensorSpec(scale_rule="amax/7.5", group_size=64)], ids=str)
@pytest.mark.parametrize("operator", ["fake_quantize", "quantize"])
def test_weight_operators_tell_the_compiler_the_truth(operator, spec, layout):
    """A wrong shape, dtype or stride of the fake kernel fails only in a compiled model, in code that nobody wrote."""
    weight = {
        "contiguous": randn(16, 256),
        "experts": randn(2, 16, 256),
        "strided": randn(16, 512)[:, ::2],
        "transposed": randn(256, 16).T,
    }[layout]
    torch.library.opcheck(getattr(torch.ops.lockstep, operator), (weight, *astuple(spec)))


@pytest.mark.parametrize(("has_scale", "has_bias"), [(True, False), (False, True), (True, True)])
def test_epilogue_tells_the_compiler_the_truth(has_scale, has_bias):
    scale = randn(16, 1, dtype=BF16) if has_scale else None
    bias = randn(16, dtype=BF16) if has_bias else None
    torch.library.opcheck(torch.ops.lockstep.epilogue, (randn(2, 3, 16, dtype=BF16), scale, bias))

"""Learned scales: gradients against autograd of the textbook expression, training, and what is served."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lockstep
from lockstep import grid
from lockstep.kernels import reference
from lockstep.qat.prepare import quantized_modules
from lockstep.scheme import Scheme

SCHEMES = {
    "W4A16": Scheme.preset("W4A16", group_size=32),
    "channel": Scheme.preset("W4A16", strategy="channel"),
    "W8A16": Scheme.preset("W8A16"),
    "W8A8": Scheme.preset("W8A8"),
}


def model(scheme: Scheme, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    built = nn.Sequential(nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 32, bias=False)).to(dtype)
    if scheme.weights.group_size == 128:
        built = nn.Sequential(nn.Linear(128, 64).to(dtype))
    lockstep.prepare(built, scheme, learned_scales=True)
    return built


@pytest.mark.parametrize("name", SCHEMES)
def test_starts_as_the_rule_would_and_adds_one_documented_key(name):
    learned, plain = model(SCHEMES[name]), model(SCHEMES[name])
    lockstep.unprepare(plain)
    lockstep.prepare(plain, SCHEMES[name])
    x = torch.randn(5, 128)
    assert torch.equal(learned(x), plain(x))
    added = learned.state_dict().keys() - plain.state_dict().keys()
    assert added == {f"{name}.weight_scale" for name, _ in quantized_modules(learned)}
    assert learned[0].weight_scale.dtype == torch.float32


def served(w, scale, spec):
    """The textbook: straight-through rounding inside the range, clamped outside, written so that autograd sees it."""
    low, high = spec.code_range
    groups = w.view(*scale.shape, -1)
    position = (groups / scale.unsqueeze(-1)).clamp(low, high)
    code = position + (position.round() - position).detach()
    return (code * scale.unsqueeze(-1)).view_as(w)


@pytest.mark.parametrize("name", SCHEMES)
def test_gradients_are_those_of_the_textbook_expression(name):
    scheme = Scheme.preset("W4A16", group_size=32, scale_dtype=torch.float32, served_dtype=torch.float32)
    if name != "W4A16":
        scheme = SCHEMES[name]
    built = model(scheme)
    layer = built[0]
    with torch.no_grad():
        layer.weight_scale.mul_(0.7)  # some weights are cut off now
        layer.weight_scale.copy_(layer.weight_scale.to(scheme.weights.scale_dtype).float())
    x = torch.randn(7, 128, requires_grad=True)
    upstream = torch.randn(7, 64)
    (layer(x) * upstream).sum().backward()

    w, scale = layer.weight.detach().clone().requires_grad_(), layer.weight_scale.detach().clone().requires_grad_()
    inputs = x.detach()
    if scheme.activations is not None:
        from lockstep import activations

        inputs = activations.dequantize(activations.quantize(inputs, scheme.activations), torch.float32)
    F.linear(inputs, served(w, scale, scheme.weights), layer.bias.detach()).mul(upstream).sum().backward()
    assert torch.allclose(layer.weight.grad, w.grad, rtol=1e-4, atol=1e-5)
    balance = 1 / math.sqrt(w.numel() / scale.numel() * scheme.weights.code_range[1])
    assert torch.allclose(layer.weight_scale.grad, scale.grad * balance, rtol=1e-3, atol=1e-4)
    assert (layer.weight.grad == 0).float().mean() > 0.01  # the planted cut is seen
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_served_follows_the_parameter_and_not_the_weight(name):
    scheme = SCHEMES[name]
    built = model(scheme, torch.bfloat16)
    layer = built[0]
    with torch.no_grad():
        layer.weight_scale.mul_(1.37)
    quantized = layer.quantize()
    assert torch.equal(quantized.scale, layer.weight_scale.detach().to(scheme.weights.scale_dtype))
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    assert torch.equal(layer(x), reference.linear(x, quantized, scheme, layer.bias))
    assert not torch.equal(quantized.codes, grid.quantize(layer.weight.detach(), scheme.weights).codes)


def test_scales_train_to_a_lower_error_than_the_rule():
    """A heavy tail: cutting it off serves the rest better, which the largest magnitude's rule cannot find."""
    torch.manual_seed(1)
    layer = nn.Sequential(nn.Linear(128, 64, bias=False))
    with torch.no_grad():
        layer[0].weight.copy_(torch.distributions.StudentT(3.0).sample((64, 128)))
    target = copy.deepcopy(layer[0].weight.detach())
    lockstep.prepare(layer, SCHEMES["channel"], learned_scales=True)
    layer[0].weight.requires_grad_(False)
    x = torch.randn(512, 128)
    wanted = F.linear(x, target)
    before = F.mse_loss(layer(x), wanted).item()
    optimizer = torch.optim.Adam([layer[0].weight_scale], lr=0.03)
    for _ in range(60):
        optimizer.zero_grad()
        F.mse_loss(layer(x), wanted).backward()
        optimizer.step()
    assert F.mse_loss(layer(x), wanted).item() < 0.9 * before


def test_refused_where_it_has_no_meaning():
    for scheme, said in (("FP8_DYNAMIC", "integer"), ("W4A16_ASYM", "positive scales"), ("MXFP4", "integer")):
        with pytest.raises(ValueError, match=said):
            lockstep.prepare(nn.Sequential(nn.Linear(128, 64)), scheme, learned_scales=True)
    with pytest.raises(ValueError, match="exclude each other"):
        lockstep.prepare(nn.Sequential(nn.Linear(128, 64)), "W4A16", learned_scales=True, reuse="weight")
    with torch.device("meta"):
        meta = nn.Sequential(nn.Linear(128, 64))
    with pytest.raises(ValueError, match="meta"):
        lockstep.prepare(meta, "W4A16", learned_scales=True)


def test_unprepare_takes_the_parameter_away():
    built = model(SCHEMES["W4A16"])
    lockstep.unprepare(built)
    assert not [name for name in built.state_dict() if "weight_scale" in name]
    assert all(type(layer) is nn.Linear for layer in built if isinstance(layer, nn.Linear))

"""The ways to train that are compared: Lockstep, its peers and a plain straight-through estimator.

Each path prepares a module tree in place, all ``nn.Linear`` but ``lm_head``: INT4 weights in groups of 128, or weights
and inputs in 8 bits. The peers run in the configuration that their documentation names for this, or the faster one
where there are two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from harness import require
from torch import Tensor, nn

import lockstep
from lockstep import grid

TORCHAO, MODELOPT = "0.18.0", "0.47.0"


@dataclass(frozen=True)
class Path:
    """`prepare` switches a module tree to the path; `config` says what was chosen, for the results."""

    name: str
    prepare: Callable[[nn.Module], object]
    config: str


class StraightThroughLinear(nn.Linear):
    """The eager way, ``w + (fake_quantize(w) - w)`` with the bracket detached: autograd keeps the sum."""

    def forward(self, input: Tensor) -> Tensor:
        """``x @ (w + noise).T``."""
        with torch.no_grad():
            noise = grid.fake_quantize(self.weight, lockstep.TensorSpec()) - self.weight
        return F.linear(input, self.weight + noise, self.bias)


def linears(model: nn.Module) -> Iterator[nn.Linear]:
    """The layers that every path quantizes."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith("lm_head"):
            yield module


def straight_through(model: nn.Module) -> None:
    """Switch to `StraightThroughLinear`."""
    for layer in linears(model):
        layer.__class__ = StraightThroughLinear


def prepared(model: nn.Module, reuse: Literal["codes", "weight"] | None = None) -> None:
    """Switch to Lockstep."""
    lockstep.prepare(model, "W4A16", reuse=reuse)


def torchao_intx(model: nn.Module) -> None:
    """Switch to torchao's general integer fake quantizer."""
    require("torchao", "torchao", TORCHAO)
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    weight = IntxFakeQuantizeConfig(torch.int4, group_size=128, is_symmetric=True)
    _torchao(model, QATConfig(weight_config=weight, step="prepare"))


def torchao_int4(model: nn.Module) -> None:
    """Switch to the fake quantizer that torchao derives from its INT4 serving configuration."""
    require("torchao", "torchao", TORCHAO)
    from torchao.quantization import Int4WeightOnlyConfig
    from torchao.quantization.qat import QATConfig

    _torchao(model, QATConfig(Int4WeightOnlyConfig(group_size=128), step="prepare"))


def _torchao(model: nn.Module, config: object) -> None:
    from torchao.quantization import quantize_

    chosen = set(linears(model))
    quantize_(model, config, filter_fn=lambda module, name: module in chosen)


def modelopt(model: nn.Module) -> None:
    """Switch to ModelOpt, with its CUDA extension built: without it, each step would run its slow eager arithmetic."""
    require("nvidia-modelopt", "modelopt", MODELOPT)
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.extensions import get_cuda_ext

    if next(model.parameters()).is_cuda:
        get_cuda_ext(raise_if_failed=True)
    mtq.quantize(model, mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG)


def eight_bit(model: nn.Module, scheme: str, fp8_input_gradient: bool = False) -> None:
    """Switch to Lockstep with quantized inputs."""
    lockstep.prepare(model, scheme, fp8_input_gradient=fp8_input_gradient)


def torchao_fp8(model: nn.Module) -> None:
    """Switch to the fake quantizer that torchao derives from its FP8 serving configuration, a scale a row and token."""
    require("torchao", "torchao", TORCHAO)
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow
    from torchao.quantization.qat import QATConfig

    _torchao(model, QATConfig(Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()), step="prepare"))


def torchao_int8(model: nn.Module) -> None:
    """Switch to torchao's general integer fake quantizer, 8 bits, a scale a channel; tokens have a zero point there."""
    require("torchao", "torchao", TORCHAO)
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    inputs = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weight = IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True)
    _torchao(model, QATConfig(activation_config=inputs, weight_config=weight, step="prepare"))


def modelopt_eight_bit(model: nn.Module, config: str) -> None:
    """Switch to ModelOpt with quantized inputs, their static ranges measured on one random batch."""
    require("nvidia-modelopt", "modelopt", MODELOPT)
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.extensions import get_cuda_ext, get_cuda_ext_fp8

    first = next(linears(model)).weight
    if first.is_cuda:
        get_cuda_ext(raise_if_failed=True)
        get_cuda_ext_fp8(raise_if_failed=True)
    batch = torch.randn(64, first.shape[1], device=first.device, dtype=first.dtype)
    mtq.quantize(model, getattr(mtq, config), forward_loop=lambda model: model(batch))


BF16 = Path("bf16", lambda model: None, "plain")
LOCKSTEP = Path("lockstep", prepared, "W4A16, groups of 128")
PATHS = {
    path.name: path
    for path in (
        BF16,
        Path("plain STE", straight_through, "grid.fake_quantize in eager torch, w + (fq - w).detach()"),
        LOCKSTEP,
        Path("torchao Intx", torchao_intx, "IntxFakeQuantizeConfig(int4, group_size=128, is_symmetric=True)"),
        Path("torchao Int4WeightOnly", torchao_int4, "Int4WeightOnlyConfig(group_size=128)"),
        Path("ModelOpt", modelopt, "INT4_BLOCKWISE_WEIGHT_ONLY_CFG, block 128, CUDA extension, static amax"),
    )
}
KEPT = [
    Path("lockstep, codes reused", lambda model: prepared(model, "codes"), "groups of 128, reuse='codes'"),
    Path("lockstep, weight reused", lambda model: prepared(model, "weight"), "groups of 128, reuse='weight'"),
]
EIGHT_BIT = {
    path.name: path
    for path in (
        BF16,
        Path("lockstep FP8", lambda model: eight_bit(model, "FP8_DYNAMIC"), "FP8_DYNAMIC"),
        Path(
            "lockstep FP8, fp8 input gradient",
            lambda model: eight_bit(model, "FP8_DYNAMIC", True),
            "FP8_DYNAMIC, fp8_input_gradient=True",
        ),
        Path("lockstep INT8", lambda model: eight_bit(model, "W8A8"), "W8A8"),
        Path("torchao FP8", torchao_fp8, "Float8DynamicActivationFloat8WeightConfig(PerRow())"),
        Path(
            "torchao INT8",
            torchao_int8,
            "IntxFakeQuantizeConfig int8, per_token inputs (asymmetric), per_channel weights",
        ),
        Path("ModelOpt FP8", lambda model: modelopt_eight_bit(model, "FP8_DEFAULT_CFG"), "FP8_DEFAULT_CFG"),
        Path("ModelOpt INT8", lambda model: modelopt_eight_bit(model, "INT8_DEFAULT_CFG"), "INT8_DEFAULT_CFG"),
    )
}

"""peft's LoRA layers around prepared layers and experts, which train on ``FQ(W + s * B @ A)``: mode ``merged``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lockstep.kernels.scaled_mm import without_autocast
from lockstep.qat import learned
from lockstep.qat.experts import QATExperts, qat_class
from lockstep.qat.linear import QATLinear
from lockstep.qat.lora_base import (
    AdaptedExperts,
    AdaptedLinear,
    ExpertsWithinPeft,
    WithinPeft,
    adapted_class,
    check_whole,
    disown,
    within_peft_class,
)
from lockstep.qat.lora_config import (
    PLAIN_INIT,
    BaseTunerLayer,
    PeftLinear,
    PeftParamWrapper,
    base_of,
    check_config,
    peft,
)
from lockstep.qat.prepare import WRAPPED


class MergedLora(PeftLinear):
    """peft's LoRA layer around a `QATLinear`, which multiplies with the quantized merged weight.

    Several active adapters are merged in their order, as peft merges them. Around a layer that `lockstep.unprepare` has
    given back its class it is peft's own layer.

    Raises:
        ValueError: what cannot be merged exactly: ``lora_dropout``, ``lora_bias``, DoRA and other variants, several
            adapters in one batch; a base that trains, reuses its weight or has learned scales.
    """

    replicated = False  # whether another layer has the same master

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: peft.LoraConfig, **kwargs: Any) -> None:
        if kwargs.get("parameter_name") is not None:
            raise ValueError(
                f"{kwargs.get('target_name')}: name a prepared linear layer in target_modules, not target_parameters."
            )
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self._adapt()

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: peft.LoraConfig, **kwargs: Any) -> None:
        """Add an adapter. ValueError for one that cannot be merged exactly."""
        name = getattr(base_of(self), "qualified_name", "") or kwargs.get("target_name", "")
        check_config(name, config)
        self.replicated = self.replicated or bool(config.layer_replication)
        with self._master():
            super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """See `QATLinear`."""
        self._adapt()
        if not isinstance(base_of(self), QATLinear):
            return super().forward(x, *args, **kwargs)
        if kwargs.get("adapter_names") is not None:
            raise ValueError("adapter_names: several adapters in one batch have no one merged weight.")
        if self.disable_adapters and self.merged:
            self.unmerge()
        return self.base_layer(x)

    def unmerged(self) -> list[str]:
        """Names of the adapters that the forward adds to the weight."""
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.lora_A]

    def factors(self, names: Sequence[str]) -> list[Tensor]:
        """A ``[r, K]`` and B ``[N, r]`` of each adapter in turn."""
        a, b = cast("dict[str, nn.Linear]", self.lora_A), cast("dict[str, nn.Linear]", self.lora_B)
        return [factor for name in names for factor in (a[name].weight, b[name].weight)]

    @torch.no_grad()
    def merged_weight(self, names: Sequence[str]) -> Tensor:
        """``W + s * B @ A`` of the adapters `names`, as peft's ``merge`` computes it, in a tensor of its own."""
        base = base_of(self)._parameters["weight"]
        check_whole(base_of(self).qualified_name, base, *self.factors(names))
        with without_autocast(base.device):
            merged = base.detach().clone()
            for name in names:
                merged += self.get_delta_weight(name)
        return merged

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """peft's merge, in the bits of the forward.

        `safe_merge` refuses NaN and infinity, and unlike in peft changes no bit: there it rounds ``s * B @ A`` to the
        base's dtype before it is added.
        """
        if self.replicated:
            raise ValueError(
                f"{base_of(self).qualified_name}: layer_replication: layers share this weight, and each would merge "
                "its adapter into it: export within lockstep.qat.lora.merged(model), which merges into none."
            )
        with self._master() as base, torch.no_grad(), without_autocast(base.weight.device):
            names = [name for name in adapter_names or self.active_adapters if name in self.lora_A]
            if safe_merge and not self.merged_weight(names).isfinite().all():
                raise ValueError(f"{names}: the merged weight is not finite: an adapter seems to be broken.")
            super().merge(False, adapter_names)

    def unmerge(self) -> None:
        """peft's: it subtracts what was added, which gives the base back but for rounding."""
        with self._master() as base, torch.no_grad(), without_autocast(base.weight.device):
            super().unmerge()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What peft puts in this layer's place: the `QATLinear`, with the merged weight."""
        if merge:
            self.merge(safe_merge, adapter_names)
        base = base_of(self)
        disown(base)
        return base

    def _adapt(self) -> None:
        base = base_of(self)
        if type(base) in (QATLinear, WithinPeft):
            _check_prepared(base)
            base.__class__ = AdaptedLinear
        if isinstance(base, AdaptedLinear) and base.adapter != (self,):
            base.adapter = (self,)

    @contextmanager
    def _master(self) -> Iterator[Any]:
        """The base with its own weight under that name, for what peft does with it."""
        base = base_of(self)
        was = type(base)
        if was is AdaptedLinear:
            base.__class__ = QATLinear
        try:
            yield base
        finally:
            base.__class__ = was


class ParamWrapper(PeftParamWrapper):  # peft knows it by this name
    """peft's layer for a parameter of experts (``target_parameters``), around a `QATExperts`.

    The experts see ``FQ(RN(W + RN(s * B @ A)))``, each expert's own A and B: the sum that peft's ``merge`` computes,
    while its own forward adds in one fused operation, which rounds otherwise.

    Raises:
        ValueError: see `MergedLora`.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: peft.LoraConfig, **kwargs: Any) -> None:
        if kwargs.get("parameter_name") is None:
            raise ValueError(
                f"{kwargs.get('target_name')}: name experts in target_parameters, such as mlp.experts.gate_up_proj."
            )
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self._adapt()

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: peft.LoraConfig, **kwargs: Any) -> None:
        """Add an adapter. ValueError for one that cannot be merged exactly."""
        check_config(f"{base_of(self).qualified_name}.{self.parameter_name}", config)
        if config.init_lora_weights not in PLAIN_INIT:
            raise ValueError(f"init_lora_weights={config.init_lora_weights!r}: experts have no such initialization.")
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """See `QATExperts`."""
        self._adapt()
        experts: Any = base_of(self)
        if not isinstance(experts, QATExperts):
            return super().forward(x, *args, **kwargs)
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("adapter_names: several adapters in one batch have no one merged weight.")
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = self.unmerged()
        if not names:
            return self.base_layer(x, *args, **kwargs)
        held: dict[str, Tensor] = vars(experts).get("held", {})
        vars(experts)["held"] = {**held, self.parameter_name: self.merged_weight(names)}
        try:
            return self.base_layer(x, *args, **kwargs)
        finally:
            vars(experts)["held"] = held

    unmerged: Any = MergedLora.unmerged
    factors: Any = MergedLora.factors

    def get_param(self) -> nn.Parameter:
        """The base's own parameter."""
        return base_of(self)._parameters[self.parameter_name]

    def merged_weight(self, names: Sequence[str]) -> Tensor:
        """The parameter with the adapters `names`, as peft's ``merge`` computes it; differentiable by A and B."""
        base = self.get_param()
        if base.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{self.parameter_name}: the base under an adapter is frozen: call requires_grad_(False).")
        check_whole(f"{base_of(self).qualified_name}.{self.parameter_name}", base, *self.factors(names), under="DDP")
        with without_autocast(base.device):
            merged: Tensor = base.detach()
            for name in names:
                merged = merged + self.get_delta_weight(name)
        return merged

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """peft's merge, in the bits of the forward."""
        with self._master(), torch.no_grad(), without_autocast(self.get_param().device):
            super().merge(safe_merge, adapter_names)

    def unmerge(self) -> None:
        """peft's: it subtracts what was added, which gives the base back but for rounding."""
        with self._master(), torch.no_grad(), without_autocast(self.get_param().device):
            super().unmerge()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What peft puts in this layer's place: the `QATExperts`, with the merged parameters."""
        experts = super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        disown(experts)
        return experts

    def _adapt(self) -> None:
        experts: Any = base_of(self)
        if issubclass(type(experts), ExpertsWithinPeft):
            disown(experts)
        ours = issubclass(type(experts), AdaptedExperts)
        if issubclass(type(experts), QATExperts) and not ours:
            experts.__class__, experts.adapters, ours = adapted_class(cast(Any, type(experts))), {}, True
        if ours and experts.adapters.get(self.parameter_name) is not self:
            experts.adapters = {**experts.adapters, self.parameter_name: self}

    @contextmanager
    def _master(self) -> Iterator[Any]:
        """The experts with their own parameters under their names, for what peft does with them."""
        experts = base_of(self)
        was = type(experts)
        if issubclass(was, AdaptedExperts):
            experts.__class__ = qat_class(experts.plain_class)
        try:
            yield experts
        finally:
            experts.__class__ = was


def refuse_within_peft(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Let a prepared `child` train within `parent` only if that is no layer of peft's own."""
    # Nothing else tells a prepared layer what is around it, and once peft has merged, nothing tells how the weight was
    # trained.
    kind: Any = type(child)
    if isinstance(parent, BaseTunerLayer):
        if isinstance(parent, MergedLora | ParamWrapper):
            return
        if kind is QATLinear:
            child.__class__ = WithinPeft  # type: ignore[union-attr]
        elif issubclass(kind, QATExperts) and not issubclass(kind, AdaptedExperts | ExpertsWithinPeft):
            child.__class__ = within_peft_class(kind)  # type: ignore[union-attr]
    elif issubclass(kind, WithinPeft | ExpertsWithinPeft) and name not in WRAPPED:
        disown(child)


def _check_prepared(base: QATLinear) -> None:
    if base.kept is not None:
        raise ValueError(
            f"{base.qualified_name}: reuse={base.kept.what!r} keeps the quantized weight while the base stays as it "
            "is, but here the adapter changes it: prepare without reuse."
        )
    if learned.KEY in base._parameters:
        raise ValueError(f"{base.qualified_name}: learned scales belong to one weight: prepare without learned_scales.")


def check_layer(name: str, layer: Any) -> None:
    """Refuse a layer that peft made around a `QATLinear` which cannot become a `MergedLora`."""
    if type(layer) not in (PeftLinear, MergedLora, PeftParamWrapper, ParamWrapper):
        raise TypeError(f"{name} is a {type(layer).__name__}: around prepared layers only LoRA trains as it is served.")
    dropout = [name for name, module in layer.lora_dropout.items() if not isinstance(module, nn.Identity)]
    if dropout:
        raise ValueError(f"{name}: adapter {dropout[0]!r} has lora_dropout: set it to 0.")
    if any(layer.lora_bias.values()) or layer.lora_variant:
        raise ValueError(f"{name}: lora_bias, DoRA and other variants have no exact merged weight: leave them out.")
    if isinstance(layer.get_base_layer(), QATLinear):
        _check_prepared(layer.get_base_layer())

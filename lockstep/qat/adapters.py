"""The LoRA layers that train on what is served, for `lockstep.qat.lora`; importing this file loads peft.

`MergedLora` and `ParamWrapper` belong around prepared layers and experts, which read their weight with the adapter
merged into it; `FrozenLora` belongs around `FrozenLinear`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lockstep import kernels
from lockstep.grid import Quantized
from lockstep.kernels.scaled_mm import without_autocast
from lockstep.qat import learned
from lockstep.qat.experts import DOWN, GATED, PLAIN, QATExperts, qat_class
from lockstep.qat.linear import QATLinear, compute_dtype
from lockstep.qat.prepare import WRAPPED, unwrapped
from lockstep.scheme import Scheme

try:
    import peft
    from peft.tuners.lora import Linear as PeftLinear
    from peft.tuners.lora import ParamWrapper as PeftParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
except ImportError as error:
    raise ImportError(f"LoRA needs peft ({error}): pip install peft.") from error

# Initializations that leave the base as it is; the others write what they take out of it into its weights.
_PLAIN_INIT = (True, False, "gaussian", "orthogonal")


def _base(layer: Any) -> Any:
    return layer.get_base_layer()


# Merged mode ---------------------------------------------------------------------------------------------------------


class AdaptedLinear(QATLinear):
    """The `QATLinear` within a `MergedLora`: its `weight` is the merged one while adapters are active.

    ``_parameters["weight"]`` is the base's own, which state dicts and optimizers see.
    """

    adapter: tuple[MergedLora, ...] = ()  # the one around it; in a tuple, which makes it no submodule
    _merged: Tensor | None = None

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """``W + s * B @ A`` in W's dtype, ``[out_features, in_features]``; W itself without active adapters.

        And W itself while it is a ``DTensor``, outside of FSDP2's forward: FSDP2 asks for its parameters by this name.
        """
        if self._merged is not None:
            return self._merged
        names, base = self.adapter[0].unmerged(), self._parameters["weight"]
        try:
            if not names or isinstance(base, DTensor):
                return base  # type: ignore[return-value]
            return self.adapter[0].merged_weight(names)
        except AttributeError as error:  # for which nn.Module would hand out the base's own weight
            raise RuntimeError(f"{self.qualified_name}: {error}") from error

    def quantize(self) -> Quantized:
        """See `QATLinear`. ValueError if the weight is sharded here."""
        _check_whole(self.qualified_name, self.weight)
        return super().quantize()

    def amax(self) -> Tensor | None:
        """See `QATLinear`. ValueError if the weight is sharded here."""
        if self.scheme.weights.per_tensor:
            _check_whole(self.qualified_name, self.weight)
        return super().amax()

    def __setattr__(self, name: str, value: Any) -> None:
        # As sharding hands it a weight; nn.Module would ask for the merged one first.
        if name == "weight":
            self._parameters[name] = value
        else:
            super().__setattr__(name, value)

    @torch.compiler.disable(reason="the merged weight must be rounded as peft's merge rounds it")
    def forward(self, input: Tensor) -> Tensor:
        """See `QATLinear`."""
        names, base = self.adapter[0].unmerged(), self._parameters["weight"]
        if not names:
            return super().forward(input)
        if base is not None and base.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{self.qualified_name}: the base under an adapter is frozen: call requires_grad_(False).")
        merged, version = self.weight, _version(base)
        where = (merged.data_ptr(), merged.shape, merged.dtype)

        # What the linear layer's own Function keeps of the merged weight is how to make it again.
        def pack(kept: Tensor) -> Tensor | None:
            return None if (kept.data_ptr(), kept.shape, kept.dtype) == where else kept

        def unpack(kept: Tensor | None) -> Tensor:
            if kept is not None:
                return kept
            if self._parameters["weight"] is base and _version(base) != version:
                raise RuntimeError(
                    f"{self.qualified_name}: the base was changed in place between the forward and its backward."
                )
            return self.adapter[0].merged_weight(names)

        self._merged = merged
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                y = super().forward(input)
        finally:
            self._merged = None
        if not torch.is_grad_enabled():
            return y
        quantizes = self.scheme.activations is not None and self.observer is None
        how = (self.scheme if quantizes else None, tuple(self.adapter[0].scaling[name] for name in names))
        stored = self.stored_scale() if quantizes else None
        return _LowRankGradient.apply(y, input.to(compute_dtype(input)), stored, how, *self.adapter[0].factors(names))


def _version(tensor: Tensor | None) -> int | None:
    return None if tensor is None or tensor.is_inference() else tensor._version


class _LowRankGradient(torch.autograd.Function):
    """`y` as it is; its gradient also goes to the factors A ``[r, K]`` and B ``[N, r]`` of ``y = x @ (s B A)^T``."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        stored: Tensor | None,
        how: tuple[Scheme | None, tuple[float, ...]],
        *factors: Tensor,
    ) -> Tensor:
        ctx.how = how
        ctx.save_for_backward(x, stored, *factors)
        return y.view_as(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, stored, *factors), (scheme, scalings) = grad_outputs, ctx.saved_tensors, ctx.how
        if scheme is not None:  # straight through the inputs' grid too: the weight met what was left of them
            kernel = kernels.training(scheme, x.device)
            x = kernel.dequantize_activations(kernel.quantize_activations(x, scheme.activations, stored), grad.dtype)
        grad_rows, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]).to(grad.dtype)
        grads: list[Tensor | None] = []
        for number, scaling in enumerate(scalings):
            a, b = factors[2 * number], factors[2 * number + 1]
            need_a, need_b = ctx.needs_input_grad[4 + 2 * number], ctx.needs_input_grad[5 + 2 * number]
            grad_a = (grad_rows.mm(b.to(grad.dtype)).T.mm(rows) * scaling).to(a.dtype) if need_a else None
            grad_b = (grad_rows.T.mm(rows.mm(a.to(grad.dtype).T)) * scaling).to(b.dtype) if need_b else None
            grads += [grad_a, grad_b]
        return grad, None, None, None, *grads


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
        name = getattr(_base(self), "qualified_name", "") or kwargs.get("target_name", "")
        _check_config(name, config)
        self.replicated = self.replicated or bool(config.layer_replication)
        with self._master():
            super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """See `QATLinear`."""
        self._adapt()
        if not isinstance(_base(self), QATLinear):
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
        base = _base(self)._parameters["weight"]
        _check_whole(_base(self).qualified_name, base, *self.factors(names))
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
                f"{_base(self).qualified_name}: layer_replication: layers share this weight, and each would merge its "
                "adapter into it: export within lockstep.qat.lora.merged(model), which merges into none."
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
        base = _base(self)
        disown(base)
        return base

    def _adapt(self) -> None:
        base = _base(self)
        if type(base) in (QATLinear, WithinPeft):
            _check_prepared(base)
            base.__class__ = AdaptedLinear
        if isinstance(base, AdaptedLinear) and base.adapter != (self,):
            base.adapter = (self,)

    @contextmanager
    def _master(self) -> Iterator[Any]:
        """The base with its own weight under that name, for what peft does with it."""
        base = _base(self)
        was = type(base)
        if was is AdaptedLinear:
            base.__class__ = QATLinear
        try:
            yield base
        finally:
            base.__class__ = was


class AdaptedExperts(QATExperts):
    """The `QATExperts` within `ParamWrapper`s: its adapted parameters read as the merged ones.

    ``_parameters`` holds the base's own. Between forward and backward the merged parameters of a layer are kept.
    """

    adapters: Mapping[str, ParamWrapper] = {}
    held: Mapping[str, Tensor] = {}  # in a forward
    memo: dict[tuple[int, str], Tensor] | None = None  # within `merged`, of one module at a time

    def read(self, name: str) -> Tensor:
        """The parameter `name` with its adapters, ``[E, N, K]`` or ``[E, K, N]``; it is not part of a graph here."""
        if name in self.held:
            return self.held[name]
        adapter, memo, key = self.adapters.get(name), self.memo, (id(self), name)
        names = adapter.unmerged() if adapter is not None else []
        if adapter is None or not names:
            return self._parameters[name]  # type: ignore[return-value]
        if memo is not None and key in memo:
            return memo[key]
        try:
            with torch.no_grad():
                weight = adapter.merged_weight(names)
        except AttributeError as error:  # for which nn.Module would hand out the base's own parameter
            raise RuntimeError(f"{self.qualified_name}.{name}: {error}") from error
        if memo is not None:
            if any(module != id(self) for module, _ in memo):
                memo.clear()
            memo[key] = weight
        return weight


@cache
def _adapted_class(experts: Any) -> type[QATExperts]:
    reads = {name: property(partial(_read, name=name)) for name in (GATED, PLAIN, DOWN)}
    return type(f"Adapted{experts.__name__}", (AdaptedExperts, experts), reads)


def _read(experts: AdaptedExperts, name: str) -> Tensor:
    if name not in experts._parameters:
        raise AttributeError(f"{type(experts).__name__} has no {name}")
    return experts.read(name)


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
        _check_config(f"{_base(self).qualified_name}.{self.parameter_name}", config)
        if config.init_lora_weights not in _PLAIN_INIT:
            raise ValueError(f"init_lora_weights={config.init_lora_weights!r}: experts have no such initialization.")
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """See `QATExperts`."""
        self._adapt()
        experts: Any = _base(self)
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
        return _base(self)._parameters[self.parameter_name]

    def merged_weight(self, names: Sequence[str]) -> Tensor:
        """The parameter with the adapters `names`, as peft's ``merge`` computes it; differentiable by A and B."""
        base = self.get_param()
        if base.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{self.parameter_name}: the base under an adapter is frozen: call requires_grad_(False).")
        _check_whole(f"{_base(self).qualified_name}.{self.parameter_name}", base, *self.factors(names), under="DDP")
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
        experts: Any = _base(self)
        if issubclass(type(experts), ExpertsWithinPeft):
            disown(experts)
        ours = issubclass(type(experts), AdaptedExperts)
        if issubclass(type(experts), QATExperts) and not ours:
            experts.__class__, experts.adapters, ours = _adapted_class(cast(Any, type(experts))), {}, True
        if ours and experts.adapters.get(self.parameter_name) is not self:
            experts.adapters = {**experts.adapters, self.parameter_name: self}

    @contextmanager
    def _master(self) -> Iterator[Any]:
        """The experts with their own parameters under their names, for what peft does with them."""
        experts = _base(self)
        was = type(experts)
        if issubclass(was, AdaptedExperts):
            experts.__class__ = qat_class(experts.plain_class)
        try:
            yield experts
        finally:
            experts.__class__ = was


class WithinPeft(QATLinear):
    """A `QATLinear` within a layer of peft's own, which adds its adapter to the quantized base: it does not train.

    `lockstep.qat.lora.adopt` makes an `AdaptedLinear` of it, and peft's ``unload`` a `QATLinear` again.
    """

    def forward(self, input: Tensor) -> Tensor:
        """See `QATLinear`. TypeError if gradients are on."""
        _check_no_training(self.qualified_name)
        return super().forward(input)


class ExpertsWithinPeft(QATExperts):
    """As `WithinPeft`, for `QATExperts`: peft's forward rounds the sum otherwise than its merge."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See `QATExperts`. TypeError if gradients are on."""
        _check_no_training(self.qualified_name)
        return super().forward(*args, **kwargs)


@cache
def _within_peft_class(experts: Any) -> type[QATExperts]:
    return type(f"WithinPeft{experts.__name__}", (ExpertsWithinPeft, experts), {})


def _check_no_training(name: str) -> None:
    if torch.is_grad_enabled():
        raise TypeError(
            f"{name} is within peft's own layer, which trains another sum than the FQ(W + s * B @ A) that merging "
            "gives: call lockstep.qat.lora.adopt(model) before training, or make the model with "
            "lockstep.qat.lora.get_peft_model (where another library makes it, pass it lora.register(config)). To "
            "evaluate it as it is, use torch.no_grad()."
        )


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
            child.__class__ = _within_peft_class(kind)  # type: ignore[union-attr]
    elif issubclass(kind, WithinPeft | ExpertsWithinPeft) and name not in WRAPPED:
        disown(child)


def disown(base: Any) -> None:
    """Give a base that no adapter is around any more its own class."""
    if issubclass(type(base), AdaptedLinear | WithinPeft):
        base.__class__ = QATLinear
        vars(base).pop("adapter", None)
    elif issubclass(type(base), AdaptedExperts | ExpertsWithinPeft):
        base.__class__ = qat_class(base.plain_class)
        vars(base).pop("adapters", None)


def _check_whole(name: str, *tensors: Tensor, under: str = "DDP or FSDP2") -> None:
    if any(isinstance(one, DTensor) or not one.numel() for one in tensors):
        raise ValueError(
            f"{name}: its weight or its adapter's is sharded over ranks here (ZeRO-3, tensor parallelism, FSDP2 "
            f"outside the forward), and W, A and B are merged whole: train with {under}, and export the saved "
            "adapter on a base that is not sharded."
        )


def _check_prepared(base: QATLinear) -> None:
    if base.kept is not None:
        raise ValueError(
            f"{base.qualified_name}: reuse={base.kept.what!r} keeps the quantized weight while the base stays as it "
            "is, but here the adapter changes it: prepare without reuse."
        )
    if learned.KEY in base._parameters:
        raise ValueError(f"{base.qualified_name}: learned scales belong to one weight: prepare without learned_scales.")


def _check_config(name: str, config: peft.LoraConfig) -> None:
    """Refuse what has no merged weight, or none that is exact."""
    if config.lora_dropout:
        raise ValueError(
            f"{name}: lora_dropout={config.lora_dropout} drops inputs of the adapter alone, and W + s * B @ A has no "
            "such inputs: set lora_dropout=0."
        )
    if config.lora_bias:
        raise ValueError(f"{name}: lora_bias=True: a merged adapter has no bias of its own: set it False.")
    if config.fan_in_fan_out:
        raise ValueError(f"{name}: fan_in_fan_out=True: it is an nn.Linear: set it False.")
    _check_variant(name, config)


def _check_variant(name: str, config: peft.LoraConfig) -> None:
    fields = ["use_dora", "use_qalora", "alora_invocation_tokens", "arrow_config", "use_bdlora", "velora_config"]
    fields += ["monteclora_config", "kasa_config"]
    variants = [field for field in fields if getattr(config, field, None)]
    if config.init_lora_weights == "mica":
        variants.append("init_lora_weights='mica'")
    if variants:
        raise ValueError(f"{name}: {variants[0]}: only plain LoRA and rsLoRA train here: leave it out.")


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


# Frozen grid ---------------------------------------------------------------------------------------------------------

NO_MERGE = (
    "{name}: merging would move the base off its grid: serve the base's folder and the adapter, or train in mode "
    "'merged'."
)


class FrozenLora(PeftLinear):
    """peft's LoRA layer around a `FrozenLinear`, in the order and the dtypes of vLLM's.

    With t the dtype that is computed in, and x the input as it came (not its codes)::

        u = RN_t(x @ RN_t(A)^T)          y = RN_t(base(x) + RN_t(u @ RN_t(s * RN_t(B))^T))

    sums in fp32. It differs from peft's in the place of s, which vLLM multiplies into B when it loads the adapter.

    Source: vLLM 0.32 ``lora/lora_weights.py`` (``optimize``), ``lora/layers/base_linear.py``
    (``_apply_lora_to_output``), ``lora/punica_wrapper/punica_cpu.py`` and ``lora/ops/torch_ops/lora_ops.py``: the
    buffer of ``x @ A^T`` is fp32 and rounded to the output's dtype before B; Triton's kernels round in the same places.

    Raises:
        ValueError: an adapter that vLLM does not serve (``lora_bias``, DoRA and other variants, initializations that
            change the base), several active ones, or a merge.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: peft.LoraConfig, **kwargs: Any) -> None:
        if kwargs.get("parameter_name") is not None:
            raise ValueError(f"{kwargs.get('target_name')}: name a frozen layer in target_modules.")
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features  # type: ignore[return-value]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # peft would give adapters the dtype of the codes.
        base = _base(self)
        for layers in (self.lora_A, self.lora_B):
            if not any(one.is_meta for one in layers[adapter_name].parameters()):
                layers[adapter_name].to(device or base.device, dtype=base.scheme.weights.served_dtype)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: peft.LoraConfig, **kwargs: Any) -> None:
        """Add an adapter. ValueError for one that vLLM does not serve on this base."""
        name = _base(self).qualified_name
        if config.lora_bias or config.fan_in_fan_out:
            raise ValueError(f"{name}: lora_bias and fan_in_fan_out are not served: set them False.")
        if config.init_lora_weights not in _PLAIN_INIT:
            raise ValueError(
                f"{name}: init_lora_weights={config.init_lora_weights!r} changes the base, which is frozen on its "
                f"grid: choose one of {', '.join(map(str, _PLAIN_INIT))}."
            )
        _check_variant(name, config)
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError("adapter_names: several adapters in one batch do not train here.")
        return self.add_branch(self.base_layer(x), x)

    def add_branch(self, y: Tensor, x: Tensor) -> Tensor:
        """`y` ``[..., N]``, what the base made of the input `x` ``[..., K]``, with what the active adapter adds."""
        names = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]
        if len(names) > 1:
            name = _base(self).qualified_name
            raise ValueError(f"{name}: engines serve one adapter a request, active are {', '.join(names)}.")
        for name in names:
            scaling, t = self.scaling[name], y.dtype
            a, b = (one.weight.to(t) for one in cast("list[nn.Linear]", [self.lora_A[name], self.lora_B[name]]))
            u = F.linear(self.lora_dropout[name](x.to(t)), a)
            y = y + F.linear(u, b if scaling == 1 else b * scaling)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """ValueError: the base would leave its grid."""
        raise ValueError(NO_MERGE.format(name=_base(self).qualified_name))


# Models without adapters ---------------------------------------------------------------------------------------------


@contextmanager
def base_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The model within peft's, its base layers and trained modules in the place of peft's wrappers around them."""
    undo = replace(model, plain)
    try:
        yield unwrapped(model)
    finally:
        restore(undo)


def plain(module: nn.Module) -> nn.Module:
    """What peft has put a layer of its own around: the base layer, or the module that trains; others themselves."""
    if isinstance(module, BaseTunerLayer):
        return module.get_base_layer()
    if isinstance(module, ModulesToSaveWrapper):
        active = [] if module.disable_adapters else module.active_adapters
        return module.modules_to_save[active[0]] if active else module.original_module
    if isinstance(module, TrainableTokensWrapper):
        return module.token_adapter.get_base_layer()
    return module


def check_ties(model: nn.Module) -> None:
    """ValueError if adapters train one of two layers that share a weight, and so cannot be merged into it."""
    ends: dict[int, list[tuple[str, nn.Module, Hashable]]] = {}
    for name, base, trains in _trained(unwrapped(model), ""):
        if (weight := base._parameters.get("weight")) is not None:
            ends.setdefault(id(weight), []).append((name, base, trains))
    for tied, group in ends.items():
        # Quantized layers compute merged weights of their own, of one master too.
        if len({trains for *_, trains in group}) > 1 and not all(isinstance(base, QATLinear) for _, base, _ in group):
            name = next(name for name, _, trains in group if trains != tied)
            other = next(other for other, *_ in group if other != name)
            raise ValueError(
                f"{name} is trained by itself, but its weight is tied to {other}: merged, both or neither would have "
                f"it. Leave {name} out of target_modules and modules_to_save, or before training give it a weight of "
                "its own, model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone()) for a head, and "
                "set model.config.tie_word_embeddings = False."
            )


def _trained(parent: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module, Hashable]]:
    """Names and modules of the model without adapters, and an identity of the weight that each multiplies with."""
    for leaf, child in parent._modules.items():
        name = f"{prefix}{leaf}"
        if isinstance(child, ModulesToSaveWrapper):
            trains = dict(plain(child).named_modules())
            for inner, one in child.original_module.named_modules():
                yield f"{name}.{inner}".rstrip("."), one, id(trains[inner]._parameters.get("weight"))
        elif isinstance(child, BaseTunerLayer | TrainableTokensWrapper):
            layer: Any = child.token_adapter if isinstance(child, TrainableTokensWrapper) else child
            base = layer.get_base_layer()
            active = not layer.disable_adapters and {*layer.active_adapters} & layer._get_available_adapters()
            # peft ties adapters of tokens too
            own = id(getattr(layer, "tied_adapter", None) or layer)
            yield name, base, own if active else id(base._parameters.get("weight"))
        elif child is not None:
            yield name, child, id(child._parameters.get("weight"))
            yield from _trained(child, f"{name}.")


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """If the block raises, give every module of `model` back its class, attributes and submodules, and every parameter
    its tensor; what was changed within tensors stays."""
    modules = [
        (one, type(one), {**vars(one)}, {**one._parameters}, {**one._buffers}, {**one._modules})
        for one in model.modules()
    ]
    parameters = [(one, one.data, one.requires_grad) for one in model.parameters()]
    try:
        yield
    except BaseException:
        for module, kind, attributes, *own in modules:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
            now: Any
            for now, then in zip((module._parameters, module._buffers, module._modules), own, strict=True):
                now.clear()
                now.update(then)
        for parameter, data, trains in parameters:
            parameter.data = data
            parameter.requires_grad_(trains)
        raise


def replace(model: nn.Module, stand_in: Callable[[nn.Module], nn.Module]) -> list[tuple[nn.Module, str, nn.Module]]:
    """Put `stand_in` of each module in its place, from above; where one is replaced, what is in it is left alone.

    Returns:
        What was there, for `restore`: parent, name, module.
    """
    undo = []
    pending = [unwrapped(model)]
    while pending:
        parent = pending.pop()
        for name, child in [*parent._modules.items()]:
            if child is None:
                continue
            new = stand_in(child)
            if new is child:
                pending.append(child)
            else:
                undo.append((parent, name, child))
                parent._modules[name] = new
    return undo


def restore(undo: Sequence[tuple[nn.Module, str, nn.Module]]) -> None:
    """Undo `replace`."""
    for parent, name, module in undo:
        parent._modules[name] = module

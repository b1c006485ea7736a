"""The prepared layers under an adapter, for `lockstep.qat.lora`; this file does not need peft.

Within `lockstep.qat.lora_merged` they are an `AdaptedLinear` or `AdaptedExperts`, which read their weight with the
adapter merged into it; within peft's own layers a `WithinPeft` or `ExpertsWithinPeft`, which refuse to train.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lockstep import kernels
from lockstep.grid import Quantized
from lockstep.qat.experts import DOWN, GATED, PLAIN, QATExperts, qat_class
from lockstep.qat.linear import QATLinear, compute_dtype
from lockstep.scheme import Scheme

if TYPE_CHECKING:
    from lockstep.qat.lora_merged import MergedLora, ParamWrapper


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
        check_whole(self.qualified_name, self.weight)
        return super().quantize()

    def amax(self) -> Tensor | None:
        """See `QATLinear`. ValueError if the weight is sharded here."""
        if self.scheme.weights.per_tensor:
            check_whole(self.qualified_name, self.weight)
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
def adapted_class(experts: Any) -> type[QATExperts]:
    """`AdaptedExperts` of the class `experts`, a subclass of `QATExperts`."""
    reads = {name: property(partial(_read, name=name)) for name in (GATED, PLAIN, DOWN)}
    return type(f"Adapted{experts.__name__}", (AdaptedExperts, experts), reads)


def _read(experts: AdaptedExperts, name: str) -> Tensor:
    if name not in experts._parameters:
        raise AttributeError(f"{type(experts).__name__} has no {name}")
    return experts.read(name)


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
def within_peft_class(experts: Any) -> type[QATExperts]:
    """`ExpertsWithinPeft` of the class `experts`, a subclass of `QATExperts`."""
    return type(f"WithinPeft{experts.__name__}", (ExpertsWithinPeft, experts), {})


def _check_no_training(name: str) -> None:
    if torch.is_grad_enabled():
        raise TypeError(
            f"{name} is within peft's own layer, which trains another sum than the FQ(W + s * B @ A) that merging "
            "gives: call lockstep.qat.lora.adopt(model) before training, or make the model with "
            "lockstep.qat.lora.get_peft_model (where another library makes it, pass it lora.register(config)). To "
            "evaluate it as it is, use torch.no_grad()."
        )


def disown(base: Any) -> None:
    """Give a base that no adapter is around any more its own class."""
    if issubclass(type(base), AdaptedLinear | WithinPeft):
        base.__class__ = QATLinear
        vars(base).pop("adapter", None)
    elif issubclass(type(base), AdaptedExperts | ExpertsWithinPeft):
        base.__class__ = qat_class(base.plain_class)
        vars(base).pop("adapters", None)


def check_whole(name: str, *tensors: Tensor, under: str = "DDP or FSDP2") -> None:
    """ValueError if one of `tensors` of the layer `name` is sharded; `under` is where it would not be."""
    if any(isinstance(one, DTensor) or not one.numel() for one in tensors):
        raise ValueError(
            f"{name}: its weight or its adapter's is sharded over ranks here (ZeRO-3, tensor parallelism, FSDP2 "
            f"outside the forward), and W, A and B are merged whole: train with {under}, and export the saved "
            "adapter on a base that is not sharded."
        )

"""`QATExperts`: mixture-of-experts modules whose forward multiplies with the weights that will be served.

transformers keeps the experts of a layer as 3-D parameters of one module, without an ``nn.Linear``, and computes them
in one of several implementations (eager, ``batched_mm``, ``grouped_mm``, DeepGEMM, ...) that all read the parameters
from the module they are called with. Here they are called with a stand-in that holds the quantized weights in their
place, so that what is served reaches the GEMM whichever implementation runs; its gradient is handed to the master
unchanged (straight-through).

Where the serving kernel does more than multiply with ``RN(code * scale)`` - scales that follow the GEMM, quantized
inputs - no implementation of transformers has its order, and the experts are computed one after another by the linear
forward that `QATLinear` has: `by_expert`.

Engines multiply an expert's output by its router weight in the served dtype (vLLM's and SGLang's fused experts), so
router weights are rounded to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lockstep import grid, kernels
from lockstep.grid import Quantized
from lockstep.qat.linear import check_dtype, compute_dtype, linear
from lockstep.scheme import Scheme

GATED, PLAIN, DOWN = "gate_up_proj", "up_proj", "down_proj"


class Layout(NamedTuple):
    """How a module keeps its experts, when they are whole.

    `first` is the parameter before the activation, ``gate_up_proj`` ``[E, 2I, H]`` or ``up_proj`` ``[E, I, H]``;
    ``down_proj`` is ``[E, H, I]``; E is `experts`, H `outer` and I `inner`. `transposed`: both parameters have their
    last two dimensions the other way around; `interleaved`: gate and up are the even and odd rows of `first`, not its
    halves.
    """

    first: str
    transposed: bool
    interleaved: bool
    experts: int
    outer: int
    inner: int

    def rows(self, weight: Tensor) -> Tensor:
        """A view of a parameter ``[..., N, K]`` or ``[..., K, N]`` as ``[..., N, K]``."""
        return weight.mT if self.transposed else weight

    def shape(self, parameter: str) -> tuple[int, int]:
        """N and K of a parameter."""
        if parameter == DOWN:
            return self.outer, self.inner
        return self.inner * (2 if self.first == GATED else 1), self.outer

    def parts(self) -> dict[str, slice]:
        """The projections by the names that engines know, and the rows of each in its parameter."""
        down = {DOWN: slice(0, self.outer)}
        if self.first == PLAIN:
            return {PLAIN: slice(0, self.inner)} | down
        if self.interleaved:
            return {"gate_proj": slice(0, 2 * self.inner, 2), PLAIN: slice(1, 2 * self.inner, 2)} | down
        return {"gate_proj": slice(0, self.inner), PLAIN: slice(self.inner, 2 * self.inner)} | down


def layout_of(module: nn.Module) -> Layout | None:
    """How `module` keeps its experts, or None if it is no module of experts in transformers' pattern."""
    if isinstance(module, QATExperts):  # whose parameters may be shards by now
        return module.layout
    shapes = {name: shape_of(module._parameters.get(name)) for name in (GATED, PLAIN, DOWN)}
    first = next((name for name in (GATED, PLAIN) if len(shapes[name]) == 3), None)
    if first is None or len(shapes[DOWN]) != 3:
        return None
    (_, a, b), (count, c, d) = shapes[first], shapes[DOWN]
    width = 2 if first == GATED else 1
    as_they_are, turned = (a, b) == (width * d, c), (b, a) == (width * c, d)
    if not as_they_are and not turned:
        return None
    # Without a gate both hold for every shape, with one never.
    transposed = turned and (not as_they_are or bool(getattr(module, "is_transposed", False)))
    outer, inner = (d, c) if transposed else (c, d)
    return Layout(first, transposed, not getattr(module, "is_concatenated", True), count, outer, inner)


def shape_of(parameter: Tensor | None) -> tuple[int, ...]:
    """The shape of a parameter when it is whole; ZeRO-3's are empty between their uses. Of None: no dimensions."""
    return () if parameter is None else tuple(getattr(parameter, "ds_shape", parameter.shape))


@dataclass(frozen=True)
class Expert:
    """One projection of one expert: what engines name, store and run as a linear layer. It has what `QATLinear` has.

    Called with inputs ``[M, in_features]`` it computes what the serving kernel does, ``[M, out_features]``.

    `module` holds it, `number` is the expert, `part` ``"gate_proj"``, ``"up_proj"`` or ``"down_proj"``.
    """

    module: QATExperts
    number: int
    part: str

    observer: ClassVar[None] = None
    learned_scale: ClassVar[None] = None

    @property
    def leaf(self) -> str:
        """Its name below the module's."""
        return f"{self.number}.{self.part}"

    @property
    def qualified_name(self) -> str:
        """Its name, for error messages."""
        return f"{self.module.qualified_name}.{self.leaf}"

    @property
    def scheme(self) -> Scheme:
        """What it trains as: all experts of a module alike."""
        return self.module.scheme

    @property
    def parameter(self) -> str:
        """Name of the parameter that it is a part of."""
        return self.module.layout.first if self.part != DOWN else DOWN

    @property
    def out_features(self) -> int:
        """N."""
        layout = self.module.layout
        return layout.outer if self.part == DOWN else layout.inner

    @property
    def in_features(self) -> int:
        """K."""
        layout = self.module.layout
        return layout.inner if self.part == DOWN else layout.outer

    @property
    def weight(self) -> Tensor:
        """The master ``[N, K]``, a view of the stacked one."""
        rows = self.module.layout.rows(getattr(self.module, self.parameter))
        return rows[self.number, self.module.layout.parts()[self.part]]

    @property
    def bias(self) -> Tensor | None:
        """``[N]``, a view of the stacked one."""
        stacked = getattr(self.module, f"{self.parameter}_bias", None)
        return None if stacked is None else stacked[self.number, self.module.layout.parts()[self.part]]

    def __call__(self, x: Tensor) -> Tensor:
        return self.run(x, self.weight, self.bias)

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The same with `weight` and `bias` as the caller has got them: cut all at once they have a cheap backward."""
        return linear(x, weight, None if bias is None else bias.to(x.dtype), self.scheme, self.amax())

    def quantize(self) -> Quantized:
        """The weight as it is served."""
        return grid.quantize(self.weight.detach(), self.scheme.weights, self.amax())

    def amax(self) -> Tensor | None:
        """The largest magnitude of the weights that share a scale with this one's, if the scheme has such a one.

        Engines run gate and up of an expert as one layer.
        """
        if not self.scheme.weights.per_tensor:
            return None
        return grid.largest(self.module.layout.rows(getattr(self.module, self.parameter))[self.number])

    def stored_scale(self) -> None:
        """None: schemes with measured input ranges are refused for experts."""
        return


class QATExperts(nn.Module):
    """A module of experts that `lockstep.prepare` has switched to quantization-aware training.

    Made by swapping ``module.__class__`` for a subclass of this and of the module's own (`qat_class`): parameters and
    state-dict keys stay, and reading ``module.gate_up_proj`` gives the master.

    Between forward and backward references to the masters are kept, and nothing else: what a GEMM saves of a quantized
    weight is computed again, of the experts that it used. Not so in a compiled graph, or under an activation
    checkpoint or another saved-tensor hook, which see the quantized weights and do with them as they do.

    Raises:
        ValueError: the forward would compute in a 16-bit dtype other than the one served, or the experts are sharded.
    """

    scheme: Scheme
    qualified_name: str
    layout: Layout
    plain_class: ClassVar[type[nn.Module]]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dtype = compute_dtype(hidden_states)
        check_dtype(self.qualified_name, dtype, self.scheme)
        served = self.scheme.weights.served_dtype
        args = tuple([_rounded(value, served) for value in args])
        kwargs = {name: _rounded(value, served) for name, value in kwargs.items()}
        masters = {name: _whole(self, name) for name in (self.layout.first, DOWN)}
        if in_kernels_order(self):
            return self._in_kernels_order(hidden_states, *args, *kwargs.values())
        quantized = {name: _quantized(master, self.layout, self.scheme, dtype) for name, master in masters.items()}
        with _computed_again(masters, quantized, self.layout, self.scheme):
            return self.plain_class.forward(_standing_in(self, quantized), hidden_states, *args, **kwargs)

    @torch.compiler.disable(reason="which experts have tokens is looked up at each call")
    def _in_kernels_order(self, hidden_states: Tensor, *routing: Any) -> Tensor:
        weights, biases = _cut(self), _cut(self, "_bias")

        def run(expert: Expert, x: Tensor) -> Tensor:
            bias = biases[expert.part][expert.number] if biases else None
            return expert.run(x, weights[expert.part][expert.number], bias)

        return by_expert(self, hidden_states, *routing, linear=run)

    def __reduce_ex__(self, protocol: Any) -> Any:  # the class has no name that a pickle could find
        _, _, *rest = tuple(super().__reduce_ex__(protocol))
        return (_new, (self.plain_class,), *rest)

    def extra_repr(self) -> str:
        return f"scheme={self.scheme}"


@cache
def qat_class(plain: Any) -> type[QATExperts]:
    """The `QATExperts` of a class of experts."""
    return type(f"QAT{plain.__name__}", (QATExperts, plain), {"plain_class": plain})


def experts(module: QATExperts) -> Iterator[Expert]:
    """The projections of each expert of `module`, expert by expert."""
    for number in range(module.layout.experts):
        for part in module.layout.parts():
            yield Expert(module, number, part)


def _cut(module: QATExperts, suffix: str = "") -> dict[str, tuple[Tensor, ...]]:
    """The weights of each projection by expert, or with the suffix ``"_bias"`` the biases, if there are any."""
    layout = module.layout
    stacked: dict[str, Any] = {name: getattr(module, name + suffix, None) for name in (layout.first, DOWN)}
    if any(one is None for one in stacked.values()):
        return {}
    rows = stacked if suffix else {name: layout.rows(one) for name, one in stacked.items()}
    parts = layout.parts()
    return {part: rows[DOWN if part == DOWN else layout.first][:, cut].unbind(0) for part, cut in parts.items()}


def by_expert(
    module: Any, hidden_states: Tensor, *routing: Tensor, linear: Callable[[Expert, Tensor], Tensor]
) -> Tensor:
    """The experts one after another, each projection by ``linear(expert, x)``, in the order of the engines.

    `hidden_states` is ``[..., H]``; `routing`, in any order, the experts of each token, integers ``[T, k]``, and their
    weights, ``[T, k]``: an expert's output, in the dtype computed in, times its weight, is rounded, and the sum over k
    rounded once. An index beyond the last expert is nobody's. Without `routing`, as Llama 4 has it, `hidden_states` are
    as many rows for each expert, one expert's after another's, which the router has weighed already.

    Raises:
        TypeError: this class of experts is called otherwise.
    """
    rows = hidden_states.reshape(-1, hidden_states.shape[-1]).to(compute_dtype(hidden_states))
    count = module.layout.experts
    if not routing and len(rows) % count == 0:
        index = torch.arange(count, device=rows.device).repeat_interleave(len(rows) // count).unsqueeze(1)
        routing = (index, torch.ones_like(index, dtype=rows.dtype))
    if len(routing) != 2 or not all(isinstance(one, Tensor) and one.ndim == 2 for one in routing):
        raise TypeError(
            f"{module.qualified_name}: {module.plain_class.__name__} is not called with the experts of each token and "
            f"their weights, so {module.scheme} cannot be computed in its kernel's order. Choose a group-wise "
            "weight-only scheme for it."
        )
    weights, index = sorted(routing, key=lambda one: not one.is_floating_point())
    outputs, places = [], []
    parts: dict[str, Expert] = {}
    for expert in experts(module):
        parts[expert.part] = expert
        token, rank = torch.where(index == expert.number)
        if expert.part != DOWN or not len(token):
            continue
        x = rows[token]
        if module.layout.first == GATED:
            gate, up = linear(parts["gate_proj"], x), linear(parts[PLAIN], x)
            joined = torch.stack((gate, up), -1).flatten(-2) if module.layout.interleaved else torch.cat((gate, up), -1)
            x = _apply_gate(module, joined)
        else:
            x = module.act_fn(linear(parts[PLAIN], x))
        y = linear(expert, x.to(rows.dtype))
        outputs.append(y * weights[token, rank].to(y.dtype).unsqueeze(-1))
        places.append(token * index.shape[1] + rank)
    if not outputs:
        return torch.zeros_like(hidden_states)
    slots = rows.new_zeros(index.numel(), rows.shape[1]).index_copy(0, torch.cat(places), torch.cat(outputs))
    summed = slots.unflatten(0, index.shape).sum(1)
    return summed.to(hidden_states.dtype).view(hidden_states.shape)


def in_kernels_order(module: QATExperts) -> bool:
    """Whether multiplying with dequantized weights is not what the serving kernel does: see `by_expert`."""
    widths = [module.layout.shape(name)[1] for name in (module.layout.first, DOWN)]
    return module.scheme.activations is not None or any(map(module.scheme.weights.scale_follows_gemm, widths))


def _new(plain: Any) -> nn.Module:
    return object.__new__(qat_class(plain))


def _apply_gate(module: Any, gate_up: Tensor) -> Tensor:
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return module.act_fn(gate) * up


def _rounded(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _whole(module: QATExperts, name: str) -> Tensor:
    # Not module._parameters[name]: with peft's target_parameters the attribute is the master plus the adapter.
    weight = getattr(module, name)
    if isinstance(weight, DTensor):
        raise ValueError(
            f"{module.qualified_name}.{name} is sharded in its forward (tensor or expert parallelism), which this "
            "version does not train quantized: shard it with FSDP2, which gathers it, or name it in ignore."
        )
    return weight


# The stand-in ---------------------------------------------------------------------------------------------------------


def _standing_in(module: QATExperts, quantized: dict[str, Tensor]) -> nn.Module:
    """A module of the plain class with all that `module` has, but for the quantized weights."""
    stand_in = object.__new__(module.plain_class)
    left = {name: parameter for name, parameter in module._parameters.items() if name not in quantized}
    vars(stand_in).update({**vars(module), "_parameters": left, **quantized})
    return stand_in


class _FakeQuantize(torch.autograd.Function):
    """``[E, N, K]`` as it is served, in `dtype`; the gradient goes to the master unchanged."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
        return _served(rows, scheme, dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return grad_outputs[0], None, None


def _served(rows: Tensor, scheme: Scheme, dtype: torch.dtype, again: bool = False) -> Tensor:
    kernel = kernels.training(scheme, rows.device)
    return kernel.fake_quantize(rows.contiguous(), scheme.weights, again=again).to(dtype)


def _quantized(master: Tensor, layout: Layout, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    return layout.rows(_FakeQuantize.apply(layout.rows(master), scheme, dtype))


def _computed_again(
    masters: dict[str, Tensor], quantized: dict[str, Tensor], layout: Layout, scheme: Scheme
) -> AbstractContextManager:
    """Let autograd save, of all that lies in the memory of `quantized`, only where it lies."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return nullcontext()
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return nullcontext()
    memory = {weight.untyped_storage().data_ptr(): name for name, weight in quantized.items()}
    versions = {name: master._version for name, master in masters.items()}
    dtypes = {name: weight.dtype for name, weight in quantized.items()}

    def pack(tensor: Tensor) -> Any:
        name = memory.get(tensor.untyped_storage().data_ptr())
        if name is None or not tensor.numel() or tensor.dtype != dtypes[name]:
            return tensor
        return name, tensor.shape, tensor.stride(), tensor.storage_offset()

    def unpack(saved: Any) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        name, shape, stride, offset = saved
        master = masters[name].detach()
        if master._version != versions[name]:
            raise RuntimeError(f"{name} was changed in place between the forward and its backward.")
        size = master[0].numel()
        last = offset + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
        first = offset // size
        again = _served(layout.rows(master[first : last // size + 1]), scheme, dtypes[name], again=True)
        return again.as_strided(shape, stride, offset - first * size)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

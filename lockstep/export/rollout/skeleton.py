"""An empty transformers model with a place for each tensor that an engine stores: packed words, scales, the rest.

In the place of a quantized layer it has a `PackedLinear`, which holds the stored tensors as they are and multiplies
with a true kernel (`lockstep.kernels`); in the place of quantized experts, `PackedExperts`.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lockstep import grid, kernels
from lockstep.export import formats, hub
from lockstep.export.checkpoint import Checkpoint, CheckpointError
from lockstep.export.served import quantized_keys, served_state, served_tensor
from lockstep.grid import Quantized
from lockstep.kernels import Kernel, reference
from lockstep.qat.experts import DOWN, Expert, QATExperts, by_expert, in_kernels_order, layout_of
from lockstep.qat.prepare import prepare
from lockstep.scheme import KVCacheSpec, Rule, Scheme, TensorSpec

# Of true kernels, to try in turn; None: `default_kernel`.
KernelNames = str | Sequence[str] | None


@dataclass
class Skeleton:
    """An empty model.

    Attributes:
        model: of transformers, in eval mode, its tensors uninitialized but for what is computed from the config.
        places: where each stored tensor goes, by the names of the checkpoint; some are parts of a parameter.
        layers: the quantized layers by the names of the checkpoint.
    """

    model: Any
    places: dict[str, Tensor]
    layers: dict[str, PackedLinear]

    @property
    def experts(self) -> list[PackedExperts]:
        """The modules of quantized experts."""
        return [module for module in self.model.modules() if isinstance(module, PackedExperts)]


@torch.inference_mode(False)  # tensors allocated in it could be written in it alone
@torch.no_grad()
def build(
    kind: type[Any],
    config: Any,
    schemes: Mapping[str, Scheme],
    *,
    served: torch.dtype,
    device: torch.device,
    format: str | Mapping[str, str] | None = None,
    kv_cache: KVCacheSpec | None = None,
    kernel: KernelNames = None,
    keep: bool | None = None,
    conversions: Any = None,
) -> Skeleton:
    """The empty model of class `kind` and `config`, which are left as they are.

    Args:
        kind: a ``PreTrainedModel``.
        config: its config.
        schemes: of the modules that are quantized, by their names in the model.
        served: the dtype of the rest.
        device: where it will run.
        format: of the quantized layers, or by their names in the checkpoint; None: each in the one of its own scheme.
        kv_cache: how keys and values are quantized, if they are.
        kernel: see `EmbeddedEngine.from_model`.
        keep: its `cache`.
        conversions: how transformers renamed the tensors of the model as it loaded it, if it did.

    Raises:
        KernelUnavailable: no kernel asked for computes a layer.
        ValueError: a scheme's module is not in the model, a buffer cannot be computed from the config, or the model
            takes no ``past_key_values``.
    """
    model = on_meta(kind, config, served)
    if conversions is not None:
        model._weight_conversions = conversions
    if schemes:
        by_scheme: dict[Scheme, list[str]] = {}
        for name, scheme in schemes.items():
            by_scheme.setdefault(scheme, []).append(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is overlooked was said when the trainer's model was prepared
            prepare(model, [Rule(names, scheme) for scheme, names in by_scheme.items()], ignore=())
    if kv_cache is not None:
        from lockstep.qat.kv_cache import prepare_kv_cache

        prepare_kv_cache(model, kv_cache)
    compute_buffers(model, device)
    state, keys = served_state(model), quantized_keys(model)
    plain = Scheme(TensorSpec(scale_dtype=served, served_dtype=served))
    skeleton = Skeleton(model, {}, {})
    replaced: dict[int, Tensor] = {}
    for key, tensor in state.items():
        if key in keys:
            continue
        own = served_tensor(model, key, tensor, plain)
        owner, _, leaf = key.rpartition(".")
        module = model.get_submodule(owner)
        old: Any = module._parameters.get(leaf, module._buffers.get(leaf))
        place = torch.empty(own.shape, dtype=own.dtype, device=device)
        replaced[id(old)] = nn.Parameter(place, requires_grad=False) if isinstance(old, nn.Parameter) else place
        for name, piece in hub.pieces(model, key, own.shape).items():
            skeleton.places[name] = place[piece.where] if piece.where else place
    _put(model, replaced)
    _pack(skeleton, keys, kernel, keep, device, format)
    if left := [name for name, one in (*model.named_parameters(), *model.named_buffers()) if one.is_meta]:
        raise ValueError(f"{left[0]} of {type(model).__name__} has no name in a checkpoint: it cannot be loaded.")
    return skeleton


def places_in_memory(model: nn.Module) -> dict[str, int]:
    """The address of each tensor of `model` that a checkpoint stores, by its name in the model."""
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and leaf not in module._non_persistent_buffers_set:
                found[f"{name}.{leaf}"] = tensor.data_ptr()
    return found


def bare_class(model: nn.Module) -> type[Any]:
    """The class of `model` without the one that fully_shard has put before it."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


def on_meta(kind: type[Any], config: Any, served: torch.dtype) -> Any:
    """A model of class `kind` on ``meta``, with a config of its own and the attention that `config` asks for.

    Raises:
        ValueError: it takes no ``past_key_values``: state-space models leave them aside unsaid, as any other keyword.
    """
    if "past_key_values" not in inspect.signature(kind.forward).parameters:
        raise ValueError(f"{kind.__name__} takes no past_key_values: the embedded engine cannot decode it.")
    config = copy.deepcopy(config)
    config.use_cache = True
    implementation = str(getattr(config, "_attn_implementation", None) or "sdpa").removeprefix("lockstep_")
    config._attn_implementation = implementation
    config.dtype = served
    before = torch.get_default_dtype()
    torch.set_default_dtype(served)
    try:
        with torch.device("meta"):
            model = kind(config)
    finally:
        torch.set_default_dtype(before)
    model.eval().requires_grad_(False)
    return model


def stored_schemes(model: Any, stored: Checkpoint) -> dict[str, Scheme]:
    """The schemes of the modules of `model`, which is empty, that `stored` holds quantized."""
    schemes, left = {}, {*stored.layers}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            names = [hub.layer_name(model, name)]
        elif layout := layout_of(module):
            names = [*hub.expert_names(model, name, layout)]
        else:
            continue
        found = {stored.scheme_of(one) for one in names if one in left}
        if not found:
            continue
        if len(found) > 1 or not left.issuperset(names):
            raise CheckpointError(
                f"{stored.directory}: {name} is stored in several ways, the embedded engine takes one."
            )
        schemes[name] = found.pop()
        left -= {*names}
    if left:
        raise CheckpointError(f"{stored.directory}: {sorted(left)[0]} is stored quantized, and not in the model.")
    return schemes


def compute_buffers(model: Any, device: torch.device) -> None:
    """Give the buffers that no checkpoint stores, rotary frequencies above all, the values that loading gives them.

    They keep the dtype that they are built in: fp32 for frequencies.

    Raises:
        ValueError: transformers does not compute one of them when it loads a model; the message names it.
    """
    for name, module in model.named_modules():
        own = [leaf for leaf in module._non_persistent_buffers_set if module._buffers.get(leaf) is not None]
        for leaf in own:
            like = module._buffers[leaf]
            module._buffers[leaf] = torch.full_like(like, _unset(like.dtype), device=device)
        if own:
            model._init_weights(module)
        for leaf in own:
            buffer = module._buffers[leaf]
            unset = buffer.isnan() if buffer.is_floating_point() else buffer == _unset(buffer.dtype)
            if buffer.dtype != torch.bool and bool(unset.any()):
                raise ValueError(
                    f"{name}.{leaf} is stored in no checkpoint, and {type(model).__name__}._init_weights does not "
                    "compute it: the embedded engine cannot run this model."
                )


def _unset(dtype: torch.dtype) -> Any:
    if dtype == torch.bool:
        return False
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min


def _put(model: nn.Module, replaced: Mapping[int, Tensor]) -> None:
    """Put the tensors in the places of those with these ids, wherever they are: tied ones stay tied."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for leaf, tensor in tensors.items():
                if id(tensor) in replaced:
                    tensors[leaf] = replaced[id(tensor)]  # type: ignore[assignment]


def _pack(
    skeleton: Skeleton,
    keys: Mapping[str, Mapping[str, Any]],
    names: KernelNames,
    keep: bool | None,
    device: torch.device,
    format: str | Mapping[str, str] | None,
) -> None:
    """Put `PackedLinear` and `PackedExperts` in the places of prepared modules."""
    layers = {name: layer for stored in keys.values() for name, layer in stored.items()}
    found = {scheme: find_kernel(names, scheme, device) for scheme in {layer.scheme for layer in layers.values()}}
    packed: dict[Any, PackedLinear] = {}
    for name, layer in layers.items():
        if layer not in packed:
            stored_as = format[name] if isinstance(format, Mapping) else format or formats.fitting(layer.scheme)[0]
            packed[layer] = PackedLinear(name, layer, stored_as, found[layer.scheme], keep, device)
        skeleton.layers[name] = packed[layer]
        skeleton.places |= {f"{name}.{suffix}": tensor for suffix, tensor in packed[layer].stored().items()}
    mixtures: dict[Any, dict[str, PackedLinear]] = {}
    for layer, one in packed.items():
        if isinstance(layer, Expert):
            mixtures.setdefault(layer.module, {})[layer.leaf] = one
    made = {module: PackedExperts(module, each) for module, each in mixtures.items()}
    for parent in list(skeleton.model.modules()):
        for leaf, child in list(parent._modules.items()):
            if child in packed:
                parent._modules[leaf] = packed[child]
            elif child in made:
                parent._modules[leaf] = made[child]


def default_kernel(scheme: Scheme, device: torch.device) -> str:
    """``"triton"``, which reads packed words, for symmetric INT4 weights on CUDA; else ``"reference"``."""
    spec = scheme.weights
    words = device.type == "cuda" and spec.format == "int4" and spec.symmetric and scheme.activations is None
    return "triton" if words else "reference"


def find_kernel(names: KernelNames, scheme: Scheme, device: torch.device) -> Kernel:
    """The first kernel of `names` that computes `scheme` on `device`. KernelUnavailable says why none does."""
    refusals = []
    for name in [default_kernel(scheme, device)] if names is None else [names] if isinstance(names, str) else names:
        try:
            return kernels.find("linear", name, scheme, device)
        except kernels.KernelUnavailable as refusal:
            refusals.append(str(refusal))
    raise kernels.KernelUnavailable(" ".join(refusals) or "no kernel is named.")


class PackedLinear(nn.Module):
    """A linear layer as an engine holds it: its stored tensors as buffers under their own names, and a true kernel.

    What a kernel would unpack at each call is unpacked once an update and kept (`decode`), where `keep` says so: the
    reference kernel's operand, which for grouped weight-only schemes is the dequantized weight. The words stay what is
    stored, and what `decode` starts from.
    """

    def __init__(
        self, name: str, layer: Any, format: str, kernel: Kernel, keep: bool | None, device: torch.device
    ) -> None:
        super().__init__()
        self.name, self.scheme, self.format, self.kernel = name, layer.scheme, formats.find(format), kernel
        self.out_features, self.in_features = layer.out_features, layer.in_features
        spec, inputs = self.scheme.weights, self.scheme.activations
        stored = _stored_like(format, spec, self.out_features, self.in_features)
        for suffix, (shape, dtype) in stored.items():
            self.register_buffer(suffix, torch.empty(shape, dtype=dtype, device=device))
        if inputs is not None and inputs.stores_scale:
            self.register_buffer(inputs.scale_name, torch.empty(1, dtype=torch.float32, device=device))
        self._suffixes = tuple(self._buffers)
        self.bias = layer.bias if isinstance(layer, nn.Linear) else None
        self.by_words = kernel.name == "triton" and format == "pack-quantized"
        # The reference GEMM of weights alone, whose operand can be kept in the dtype that it multiplies in.
        self.by_operand = kernel.name == "reference" and inputs is None
        self.keeps = not self.by_words and keep is not False
        self._decoded: Any = None

    def stored(self) -> dict[str, Tensor]:
        """The tensors that are stored, by the names that they have in a checkpoint after the layer's."""
        return {suffix: self._buffers[suffix] for suffix in self._suffixes}  # type: ignore[misc]

    def quantized(self) -> Quantized:
        """Codes and scales, unpacked from the words as they lie there now."""
        return self.format.read(self.stored(), self.scheme.weights)

    def operand(self) -> tuple[Tensor, Tensor | None]:
        """What the reference GEMM multiplies with, in the served dtype, and the scale that follows it if one does."""
        weight, scale = reference.operand(self.quantized(), self.scheme.weights)
        return weight.to(self.scheme.weights.served_dtype), scale

    def decode(self) -> None:
        """Unpack the words again, after they have changed."""
        self._decoded = self._unpacked() if self.keeps else None

    def _unpacked(self) -> Any:
        return self.operand() if self.by_operand else self.quantized()

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.bias)

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x @ W.T + bias`` for `x` ``[..., K]`` in the served dtype."""
        if self.by_words:
            from lockstep.kernels import triton_gemm

            words, scale = self._buffers["weight_packed"], self._buffers["weight_scale"]
            return triton_gemm.packed_linear(x, words, scale, self.scheme.weights, bias)  # type: ignore[arg-type]
        decoded = self._unpacked() if self._decoded is None else self._decoded
        if self.by_operand:
            weight, scale = decoded
            return reference.gemm(x, weight, scale, bias, self.scheme.weights)
        inputs = self.scheme.activations
        measured = self._buffers[inputs.scale_name] if inputs is not None and inputs.stores_scale else None
        return self.kernel.run(x, decoded, self.scheme, bias, measured)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, scheme={self.scheme}, kernel={self.kernel.name}"


@cache
def _stored_like(format: str, spec: TensorSpec, n: int, k: int) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of what `format` stores of a layer of N outputs and K inputs."""
    zeros = torch.zeros(n, k, dtype=spec.served_dtype)
    stored = formats.find(format).write(grid.quantize(zeros, spec), spec)
    return {suffix: (tensor.shape, tensor.dtype) for suffix, tensor in stored.items()}


class PackedExperts(nn.Module):
    """A module of experts as an engine holds it: a `PackedLinear` for each projection of each expert.

    With the reference kernel and a scheme whose GEMM multiplies with dequantized weights, those are stacked and given
    to transformers' own implementation, as the trainer does (`lockstep.qat.experts`). Else `by_expert`.
    """

    def __init__(self, module: QATExperts, each: Mapping[str, PackedLinear]) -> None:
        super().__init__()
        for parameter in (module.layout.first, DOWN):
            del module._parameters[parameter]
        self.module = module  # the rest of it: its activation function, its biases
        self.linears = nn.ModuleDict({leaf.replace(".", "_"): one for leaf, one in each.items()})
        self.each = dict(each)
        first = next(iter(each.values()))
        self.stacks = first.by_operand and not in_kernels_order(module)
        self.keeps = first.keeps
        self._stacked: dict[str, Tensor] | None = None
        if self.stacks:
            for one in each.values():
                one.keeps = False

    def decode(self) -> None:
        """Stack the dequantized weights again, after the words have changed."""
        self._stacked = self._stack() if self.stacks and self.keeps else None

    def _stack(self) -> dict[str, Tensor]:
        module, stacked = self.module, {}
        layout, spec = module.layout, module.scheme.weights
        device = next(iter(next(iter(self.each.values())).stored().values())).device
        for parameter in (layout.first, DOWN):
            shape = (layout.experts, *layout.shape(parameter))
            rows = torch.empty(shape, dtype=spec.served_dtype, device=device)
            for part, cut in layout.parts().items():
                if (part == DOWN) == (parameter == DOWN):
                    for number in range(layout.experts):
                        rows[number, cut] = self.each[f"{number}.{part}"].operand()[0]
            stacked[parameter] = layout.rows(rows)
        return stacked

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        served = self.module.scheme.weights.served_dtype
        args = tuple([_rounded(value, served) for value in args])
        kwargs = {name: _rounded(value, served) for name, value in kwargs.items()}
        if self.stacks:
            weights = self._stack() if self._stacked is None else self._stacked
            stand_in = object.__new__(self.module.plain_class)
            vars(stand_in).update({**vars(self.module), **weights})
            return self.module.plain_class.forward(stand_in, hidden_states, *args, **kwargs)
        return by_expert(self.module, hidden_states, *args, *kwargs.values(), linear=self._run)

    def _run(self, expert: Expert, x: Tensor) -> Tensor:
        return self.each[expert.leaf].multiply(x, expert.bias)

    def multiply(self, leaf: str, x: Tensor) -> Tensor:
        """``x @ W.T`` of the projection `leaf`, ``"3.gate_proj"``, with what the forward multiplies with."""
        if not self.stacks:
            return self.each[leaf].multiply(x)
        number, part = leaf.split(".")
        layout, weights = self.module.layout, self._stack() if self._stacked is None else self._stacked
        rows = layout.rows(weights[DOWN if part == DOWN else layout.first])
        return nn.functional.linear(x, rows[int(number), layout.parts()[part]])


def _rounded(value: Any, dtype: torch.dtype) -> Any:
    """Engines multiply with router weights in the served dtype."""
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

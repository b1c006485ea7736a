"""The stored tensors of one layer, each checked as it leaves (C3).

The words, unpacked and dequantized, must be bit for bit the weight that the training forward used. A check runs on the
tensor's device; whoever has launched several waits for all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from lockstep import grid, kernels
from lockstep.export import formats
from lockstep.export.arriving import arriving
from lockstep.export.checkpoint import bitwise_equal, same_bits
from lockstep.export.directory import ExportError
from lockstep.export.served import Layer
from lockstep.grid import Quantized
from lockstep.kernels import Quantizer
from lockstep.qat.experts import Expert
from lockstep.scheme import TensorSpec, dtype_name

# Words, scales and their order, where a kernel may have a check of its own (`Quantizer.check_packed`).
_CHECKED: dict[str, tuple[str, str, Literal["rows", "marlin"]]] = {
    "pack-quantized": ("weight_packed", "weight_scale", "rows"),
    "marlin": ("B", "s", "marlin"),
}
_READ_BACK: set[tuple[Any, ...]] = set()  # kinds of weights of which one was read back in this process


class Check(NamedTuple):
    """A check that is launched: a number or bool ``[]`` on its device, 0 if all is right; and who looks closer if not.

    That raises ExportError, or finds that all is right nevertheless.
    """

    found: Tensor
    look: Callable[[], None]


def settle(checks: Sequence[Check]) -> None:
    """Wait for `checks`. ExportError if something is wrong."""
    settling(checks)()


def settling(checks: Sequence[Check]) -> Callable[[], None]:
    """`settle`, of which the waiting is done when the result is called."""
    alike: dict[tuple[torch.device, torch.dtype], list[Check]] = {}
    for check in checks:
        alike.setdefault((check.found.device, check.found.dtype), []).append(check)
    found = [(some, arriving(torch.stack([check.found for check in some]))) for some in alike.values()]

    def wait() -> None:
        for some, read in found:
            for check, value in zip(some, read(), strict=True):
                if value:
                    check.look()

    return wait


def _settle_or_append(check: Check, later: list[Check] | None) -> None:
    if later is None:
        settle([check])
    else:
        later.append(check)


def checked_master(
    key: str, layers: Mapping[str, Layer], by_layer: Mapping[str, str], later: list[Check] | None
) -> Iterator[tuple[str, Tensor]]:
    """The stored tensors of the master `key`, with their names: of each layer of it, or of its experts as one."""
    first = next(iter(layers))
    if by_layer[first] == "marlin" and isinstance(layers[first], Expert):
        yield from _stacked(first, cast("list[Expert]", list(layers.values())), later).items()
        return
    for name, layer in layers.items():
        for suffix, stored in checked(name, layer, by_layer[name], later).items():
            yield f"{name}.{suffix}", stored


def checked(name: str, layer: Layer, format: str, later: list[Check] | None = None) -> dict[str, Tensor]:
    """The tensors of one layer, of which its weight was read back and found to be the one that it trained with.

    With `later` the check may have been launched only, and is appended to it, for `settle` or `settling`.
    """
    layout, scheme, spec = formats.find(format), layer.scheme, layer.scheme.weights
    weight = layer.weight.detach()
    kernel = kernels.training(scheme, weight.device)
    in_one_pass = format in formats.PACKED and spec.symmetric and layer.learned_scale is None
    quantized = None if in_one_pass else layer.quantize()
    try:
        if quantized is None:
            tensors = formats.PACKED[format](weight, spec, kernel)
        else:
            tensors = layout.write(quantized, spec)
    except ValueError as error:
        raise ExportError(f"{name} cannot be stored as {format}: {error}.") from error

    def read_back(stored: Mapping[str, Tensor]) -> None:
        check_finite(f"{name}.weight", weight)
        try:
            read = layout.read(stored, spec)
        except ValueError as error:
            raise ExportError(f"{name} cannot be stored as {format}: {error}.") from error
        check_finite(f"{name}.weight, as it is served", grid.dequantize(read, spec))
        if not (_is_trained(read, layer, kernel) and (quantized is None or same_bits(read, quantized))):
            raise ExportError(
                f"{name}: the packed words do not give back the weight that it trained with. Nothing is written."
            )

    _check(weight, tensors, spec, format, kernel if quantized is None else None, read_back, later)
    scale = layer.stored_scale()
    if scale is not None and scheme.activations is not None:
        tensors[scheme.activations.scale_name] = scale.detach()
    return tensors


def _stacked(name: str, experts: Sequence[Expert], later: list[Check] | None) -> dict[str, Tensor]:
    """All experts of one parameter as the fused kernel has them, read back: gate rows above up rows.

    `name` is one of theirs.
    """
    scheme, order = experts[0].scheme, ("gate_proj", "up_proj", "down_proj")
    numbers = range(1 + max(expert.number for expert in experts))
    of = {(expert.number, expert.part): expert.weight.detach() for expert in experts}
    parts = [part for part in order if (0, part) in of]
    weight = torch.stack([torch.cat([of[number, part] for part in parts]) for number in numbers])
    kernel, module, format = kernels.training(scheme, weight.device), name.rsplit(".", 2)[0], formats.find("marlin")
    words, scales = kernel.pack_marlin(weight, scheme.weights)

    def read_back(stored: Mapping[str, Tensor]) -> None:
        check_finite(module, weight)
        served = grid.dequantize(format.read(stored, scheme.weights), scheme.weights)
        check_finite(f"{module}, as it is served", served)
        if not bitwise_equal(served, kernel.fake_quantize(weight, scheme.weights)):
            raise ExportError(f"{module}: the packed words do not give back the weights that it trained with.")

    _check(weight, {"B": words, "s": scales}, scheme.weights, "marlin", kernel, read_back, later)
    which = "w2" if parts == ["down_proj"] else "w13"
    return {f"{module}.{which}_weight_packed": words, f"{module}.{which}_weight_scale": scales}


def _kind(weight: Tensor, spec: TensorSpec, format: str, kernel: Quantizer) -> tuple[Any, ...]:
    """What weights have in common that the same compiled kernels train, pack and check."""
    return kernel, spec, format, weight.dtype, weight.shape, weight.device


def _check(
    weight: Tensor,
    tensors: Mapping[str, Tensor],
    spec: TensorSpec,
    format: str,
    kernel: Quantizer | None,
    read_back: Callable[[Mapping[str, Tensor]], None],
    later: list[Check] | None,
) -> None:
    """Have the stored `tensors` of `weight` checked by the kernel that has packed them, or else by `read_back`.

    The kernel's check knows what the forward multiplies with from the grid's definition alone. So the first weight of a
    kind is read back in any case, and compared with what the forward's own kernel makes of it: should a compiler have
    broken that or the check, it has done so for all of the kind.
    """
    if kernel is None:
        read_back(tensors)
        return
    kind, found = _kind(weight, spec, format, kernel), None
    if format in _CHECKED and kind in _READ_BACK:
        words, scale, order = _CHECKED[format]
        found = kernel.check_packed(weight, tensors[words], tensors[scale], spec, order)
    if found is None:
        read_back(tensors)
        _READ_BACK.add(kind)
    else:
        _settle_or_append(Check(found, partial(read_back, dict(tensors))), later)


def _is_trained(read: Quantized, layer: Layer, kernel: Quantizer) -> bool:
    """Whether `read` is bit for bit what the layer's forward multiplies with."""
    spec, weight, given = layer.scheme.weights, layer.weight.detach(), (layer.amax(), layer.learned_scale)
    if layer.scheme.activations is None:
        return bitwise_equal(grid.dequantize(read, spec), kernel.fake_quantize(weight, spec, *given))
    codes, scale, *_ = kernel.quantize(weight, spec, None, *given)
    return same_bits(read, Quantized(codes, scale, read.zero_point, read.global_scale))


def check_finite(name: str, tensor: Tensor, later: list[Check] | None = None) -> None:
    """ExportError if a value of the tensor `name` is NaN or infinite. For `later` see `checked`."""
    if not tensor.is_floating_point() or not tensor.numel():
        return

    def look() -> None:
        if bad := int((~torch.isfinite(tensor)).sum()):
            raise ExportError(
                f"{name}: {bad} of {tensor.numel()} values are NaN or infinite in {dtype_name(tensor.dtype)}."
            )

    # The largest magnitude takes one pass over memory, `isfinite` of each value seven; of 8 bits torch has it not.
    if tensor.itemsize == 1:
        found = (~torch.isfinite(tensor)).any()
    else:
        largest = torch.linalg.vector_norm(tensor, torch.inf)
        found = largest - largest != 0
    _settle_or_append(Check(found, look), later)

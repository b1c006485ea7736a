"""Known inputs through a live layer: they read its weight back, and tell what a wrong one holds.

Rows of an identity matrix read the weight back: an output is one product, so of unquantized inputs it must be
``RN(q * s)`` to the bit, whatever the order of additions. A dense input is compared with the reference kernel, to
within what another order of additions changes. This finds what checksums of the tensors that were sent cannot: words in
another order, scales of another group, another layer's words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep import grid
from lockstep.export.rollout.engine import RolloutEngine, checksum
from lockstep.grid import Quantized
from lockstep.kernels import reference
from lockstep.scheme import Scheme, dtype_name

POSITIONS = 64  # inputs of a layer whose weights are read back, at least; and at least one in every group
TOKENS = 16  # rows of the dense input
# Of the norm of an output over these rows. Two results that are rounded to bf16 differ by 2**-9 of it, a kernel that
# rounds partial sums by twice that, a flipped activation code by less; a wrong scale or weight by 2**-3 and more.
TOLERANCE = 2.0**-6


class Trained(NamedTuple):
    """A linear layer as the trainer has it."""

    name: str
    scheme: Scheme | None  # None: served as it is
    weight: Quantized | Tensor  # codes and scales, or [N, K] in the served dtype
    master: Tensor
    input_scale: Tensor | None = None

    @property
    def precision(self) -> str:
        """As `LiveLayer` says it."""
        return dtype_name(self.master.dtype) if self.scheme is None else str(self.scheme)

    @property
    def exact(self) -> bool:
        """Whether a row of the identity reads the weight back: inputs are multiplied as they are."""
        return self.scheme is None or self.scheme.activations is None

    def served(self) -> Tensor:
        """``[N, K]`` in the served dtype."""
        if self.scheme is None:
            assert isinstance(self.weight, Tensor)
            return self.weight
        assert isinstance(self.weight, Quantized)
        return grid.dequantize(self.weight, self.scheme.weights)

    def run(self, x: Tensor, weight: Quantized | Tensor | None = None) -> Tensor:
        """What the reference kernel makes of `x` ``[M, K]``; with another `weight`, if one is given."""
        weight = self.weight if weight is None else weight
        if isinstance(weight, Tensor):
            return F.linear(x.to(weight.device), weight)
        assert self.scheme is not None
        return reference.linear(x.to(weight.codes.device), weight, self.scheme, None, self.input_scale)


class Evidence(NamedTuple):
    """What a live layer gave that it should not have given: for the identity, and for the dense input."""

    shape: tuple[int, int]  # of the weight
    positions: Tensor  # [P]
    hot: Tensor | None  # [P, N], of layers with inputs as they are
    dense: Tensor  # [M, N]
    mark: int | None  # fingerprint of `hot`
    found: str


def positions(k: int, groups: int) -> Tensor:
    """Sorted positions among `k` inputs, at least one in each group, the same for every layer of these sizes."""
    random, each = torch.Generator().manual_seed(0), -(-POSITIONS // groups)
    width = k // groups
    picked = torch.stack([torch.randperm(width, generator=random)[:each] + g * width for g in range(groups)])
    return picked.flatten().sort().values


def dense_input(k: int, dtype: torch.dtype) -> Tensor:
    """``[M, K]``, normal, the same for every layer of this size."""
    return torch.randn(TOKENS, k, generator=torch.Generator().manual_seed(k)).to(dtype)


def look(engine: RolloutEngine, layer: Trained) -> tuple[Evidence | None, int | None]:
    """Give the live `layer` known inputs.

    Returns:
        What it gave, or None if it computes what is trained; and the `fingerprint` of the trained weight, or None if
        the layer quantizes its inputs.
    """
    n, k = layer.master.shape
    groups = 1 if layer.scheme is None else layer.scheme.weights.num_groups(k)
    at, dtype = positions(k, groups if k % groups == 0 else 1), layer.master.dtype
    hot, found, mark = None, "", None
    if layer.exact:
        weight = layer.served()[:, at].T.cpu()
        hot = engine.probe(layer.name, F.one_hot(at, k).to(dtype)).detach().cpu()
        found, mark = _of_shape(hot, (len(at), n)) or _unequal(hot, weight, at), fingerprint(weight)
    x = dense_input(k, dtype)
    dense = engine.probe(layer.name, x).detach().cpu()
    found = found or _of_shape(dense, (TOKENS, n)) or _far(dense, layer.run(x).cpu())
    if not found:
        return None, mark
    return Evidence((n, k), at, hot, dense, None if hot is None else fingerprint(hot), found), mark


def _of_shape(y: Tensor, shape: tuple[int, int]) -> str:
    return "" if y.shape == shape else f"gives outputs {list(y.shape)} where {list(shape)} are right"


def _unequal(hot: Tensor, weight: Tensor, at: Tensor) -> str:
    bad = hot.float() != weight.float()  # NaN too
    if hot.dtype == weight.dtype and not bad.any():
        return ""
    if hot.dtype != weight.dtype:
        return f"gives outputs in {dtype_name(hot.dtype)} where {dtype_name(weight.dtype)} is served"
    where = bad.nonzero()[(hot.float() - weight.float()).abs()[bad].nan_to_num(torch.inf).argmax()].tolist()
    return (
        f"{int(bad.sum())} of {bad.numel()} weights read back differ, most at output {where[1]}, input "
        f"{int(at[where[0]])}: {hot[tuple(where)].item():g} where {weight[tuple(where)].item():g} is trained"
    )


def _far(y: Tensor, expected: Tensor) -> str:
    y, expected = y.float(), expected.float()
    error, norm = (y - expected).norm(dim=0), expected.norm(dim=0)
    bad = ~(error <= TOLERANCE * norm)  # NaN too
    if not bad.any():
        return ""
    worst = int((error / norm.clamp(min=torch.finfo(torch.float32).tiny)).nan_to_num(torch.inf).argmax())
    return (
        f"{int(bad.sum())} of {bad.numel()} outputs are off, most output {worst}, by {error[worst].item():.2g} of "
        f"{norm[worst].item():.2g} (norms over {len(y)} inputs; {TOLERANCE:.1%} is what rounding explains)"
    )


# What a wrong layer holds --------------------------------------------------------------------------------------------


def explain(evidence: Evidence, layer: Trained) -> str | None:
    """What the live `layer` holds in place of its own weight, as far as the layer by itself tells."""
    y = evidence.dense if evidence.hot is None else evidence.hot
    if y.shape[-1] != evidence.shape[0]:
        return None
    if not y.isfinite().all():
        return f"{int((~y.isfinite()).sum())} of {y.numel()} outputs are NaN or infinite: it holds no weights"
    if not y.any():
        return "it holds zeros: never synced"
    for what, weight in _candidates(layer):
        if _holds(evidence, layer, weight):
            return what
    if evidence.hot is None:
        return None
    return _permuted(evidence.hot, evidence.positions, layer) or _close(evidence.hot, evidence.positions, layer)


def explain_by(evidence: Evidence, other: Trained) -> str | None:
    """Whether the live layer of `evidence` holds the weight of another one, or some rows of it."""
    n, k = other.master.shape
    if k != evidence.shape[1]:
        return None
    if evidence.hot is None or not other.exact:
        if n != evidence.shape[0] or _far(evidence.dense, other.run(dense_input(k, other.master.dtype)).cpu()):
            return None
        return f"it holds the weight of {other.name}"
    weight = other.served()[:, evidence.positions].T.cpu()
    if weight.shape == evidence.hot.shape and torch.equal(weight.float(), evidence.hot.float()):
        return f"it holds the weight of {other.name}"
    runs = _runs(_where(evidence.hot.T, weight.T))
    return "; ".join(f"rows {a} to {b} hold rows {c} to {d} of {other.name}" for a, b, c, d in runs) or None


def _candidates(layer: Trained) -> Iterator[tuple[str, Quantized | Tensor]]:
    """Weights that known faults make of this one's."""
    n, k = layer.master.shape
    if n == k:
        transposed = layer.served().T.contiguous()
        yield "it holds its weight transposed", transposed
    if layer.scheme is None:
        return
    assert isinstance(layer.weight, Quantized)
    yield f"it runs the weight unquantized, in {dtype_name(layer.master.dtype)}", layer.master
    codes, scale, *_ = layer.weight
    rows, groups = scale.shape
    if scale.numel() == 1:
        return
    bits = scale.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[scale.itemsize])  # torch does not flip e8m0
    yield (
        "its scales lie transposed",
        layer.weight._replace(scale=bits.T.contiguous().view(rows, groups).view(scale.dtype)),
    )
    if groups > 1:
        yield "its scales are in reversed order of groups", layer.weight._replace(scale=bits.flip(-1).view(scale.dtype))
    if layer.scheme.weights.strategy != "group" or layer.weight.zero_point is not None:
        return
    own, row = k // groups, torch.arange(n, device=codes.device)[:, None]
    for size in sorted({16, 32, 64, 128, 256, k} - {own}):
        group = torch.arange(k, device=codes.device) // size
        # The kernel finds the next row's scales where it ends, or knows how many a row has.
        for at in (row * (k // size) + group, row * groups + group.clamp(max=groups - 1)):
            wrong = scale.float().flatten()[at % scale.numel()]
            yield f"it runs groups of {size} where {own} are trained", _scaled(codes, wrong, layer)


def _scaled(codes: Tensor, scale: Tensor, layer: Trained) -> Tensor:
    """``RN(code * scale)`` with a scale for each code."""
    second = layer.weight.global_scale if isinstance(layer.weight, Quantized) else None
    value = codes.float() * scale.float()
    if second is not None:
        value = value * second.to(value.device).reciprocal()
    return value.to(layer.master.dtype)


def _holds(evidence: Evidence, layer: Trained, weight: Quantized | Tensor) -> bool:
    """Whether what was found is what `layer` would give with that weight."""
    if evidence.hot is None:
        k = layer.master.shape[1]
        return not _far(evidence.dense, layer.run(dense_input(k, layer.master.dtype), weight).cpu())
    if isinstance(weight, Quantized):
        assert layer.scheme is not None
        weight = grid.dequantize(weight, layer.scheme.weights)
    return torch.equal(evidence.hot.float(), weight[:, evidence.positions].T.cpu().float())


def _permuted(hot: Tensor, at: Tensor, layer: Trained) -> str | None:
    """Rows, columns or scales of the weight in another order: which one stands first where another should."""
    weight = layer.served().cpu()
    outputs, inputs = _where(hot.T, weight[:, at]), _where(hot, weight.T)
    moved = [(here, there) for here, there in outputs.items() if here != there]
    if moved and len(outputs) > len(hot.T) // 2:
        return f"its outputs are permuted: output {moved[0][0]} holds the weight of output {moved[0][1]}"
    moved = [(int(at[here]), there) for here, there in inputs.items() if at[here] != there]
    if moved and len(inputs) > len(hot) // 2:
        return f"its inputs are permuted: input {moved[0][0]} meets the weight of input {moved[0][1]}"
    if layer.scheme is None or not isinstance(layer.weight, Quantized) or layer.weight.zero_point is not None:
        return None
    scale, codes = layer.weight.scale.float().cpu(), layer.weight.codes.cpu()
    if len(scale) != len(codes) or scale.shape[1] < 2:
        return None
    size = codes.shape[1] // scale.shape[1]
    for row, position in zip(hot, at.tolist(), strict=True):
        of_group = _scaled(codes[:, position, None].expand(-1, scale.shape[1]), scale, layer)
        fitting = (of_group == row[:, None]).all(0)
        if fitting.any() and not fitting[position // size]:
            other = int(fitting.nonzero()[0])
            return f"its scales are permuted: group {position // size} is multiplied by the scales of group {other}"
    return None


def _close(hot: Tensor, at: Tensor, layer: Trained) -> str | None:
    weight = layer.served()[:, at].T.cpu().float()
    relative = ((hot.float() - weight).norm() / weight.norm()).item()
    if relative < 2.0**-5:
        return f"its weight is near ({relative:.2%} off), as a scale or a product rounded otherwise makes it"
    return None


def _where(wanted: Tensor, rows: Tensor) -> dict[int, int]:
    """For each row of `wanted` that stands in `rows` exactly once, its index there. Rows of zeros are left out."""
    places: dict[bytes, int | None] = {}
    for place, row in enumerate(_as_bytes(rows)):
        places[row] = None if row in places else place
    zero = bytes(len(next(iter(places), b"")))
    found = ((number, places.get(row)) for number, row in enumerate(_as_bytes(wanted)) if row != zero)
    return {number: place for number, place in found if place is not None}


def _as_bytes(rows: Tensor) -> list[bytes]:
    rows = (rows.float() + 0.0).contiguous()  # which makes -0 a 0
    return [row.tobytes() for row in rows.numpy()]


def _runs(places: Mapping[int, int]) -> list[tuple[int, int, int, int]]:
    """Runs of two and more that are consecutive on both sides: first and last here, first and last there."""
    runs: list[list[int]] = []
    for here, there in sorted(places.items()):
        if runs and here == runs[-1][1] + 1 and there == runs[-1][3] + 1:
            runs[-1][1], runs[-1][3] = here, there
        else:
            runs.append([here, here, there, there])
    return [(a, b, c, d) for a, b, c, d in runs if b > a]


def fingerprint(engine_output: Tensor) -> int:
    """A checksum of outputs by which a layer's weight is known again in a later audit."""
    return checksum(engine_output.float() + 0.0)

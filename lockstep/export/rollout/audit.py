"""Whether an engine runs what is trained: its scope, layer by layer, and its weights, read back through its kernels.

Three say how each linear layer is quantized, and must agree: the trainer's modules, the checkpoint's config, and the
engine's live modules. And each live layer is given known inputs. Rows of an identity matrix read its weight back: an
output is one product, so of unquantized inputs it must be ``RN(q * s)`` to the bit, whatever the order of additions. A
dense input is compared with the reference kernel, to within what another order of additions changes. This finds what
checksums of the tensors that were sent cannot: words in another order, scales of another group, another layer's words.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lockstep import grid
from lockstep.export import compressed_tensors, formats
from lockstep.export.checkpoint import Checkpoint, CheckpointError
from lockstep.export.rollout.engine import LiveLayer, RolloutEngine, checksum
from lockstep.export.save import Entry
from lockstep.export.served import Layer
from lockstep.grid import Quantized
from lockstep.kernels import reference
from lockstep.qat.prepare import FUSED, run_as_one
from lockstep.scheme import Scheme, dtype_name

POSITIONS = 64  # inputs of a layer whose weights are read back, at least; and at least one in every group
TOKENS = 16  # rows of the dense input
# Of the norm of an output over these rows. Two results that are rounded to bf16 differ by 2**-9 of it, a kernel that
# rounds partial sums by twice that, a flipped activation code by less; a wrong scale or weight by 2**-3 and more.
TOLERANCE = 2.0**-6
EXPLAINED = 32  # layers that a report explains; what it looks at it keeps


class AuditError(RuntimeError):
    """The engine does not run what is trained. `problems` says for each layer or tensor what was found."""

    def __init__(self, message: str, problems: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.problems = dict(problems or {})


@dataclass(frozen=True)
class AuditReport:
    """What an audit found.

    `problems` says for each guilty layer or tensor, by the name that engines know, what was found; `checked` counts the
    layers or tensors that were compared; `skipped` are those that could not be, each with the reason.
    """

    problems: dict[str, str]
    checked: int
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    def assert_ok(self) -> None:
        """Raises AuditError, naming every guilty layer, if there are problems."""
        if self.problems:
            raise AuditError(str(self), self.problems)

    def __str__(self) -> str:
        skipped = f", {len(self.skipped)} could not be" if self.skipped else ""
        head = f"{self.checked} compared{skipped}, {len(self.problems)} not as they are trained"
        return "\n".join([head + (":" if self.problems else "."), *(f"  {k}: {v}" for k, v in self.problems.items())])


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

    def run(self, x: Tensor) -> Tensor:
        """What the reference kernel makes of `x` ``[M, K]``."""
        return self.run_with(self.weight, x)

    def run_with(self, weight: Quantized | Tensor, x: Tensor) -> Tensor:
        """The same with another weight in its place."""
        if isinstance(weight, Tensor):
            return F.linear(x.to(weight.device), weight)
        assert self.scheme is not None
        return reference.linear(x.to(weight.codes.device), weight, self.scheme, None, self.input_scale)


def trained_layers(entry: Entry, layers: Mapping[str, Layer], plain: bool) -> list[Trained]:
    """The linear layers of the module `entry`, within its `whole` block.

    `layers` are the quantized ones of it; with `plain`, or without any, what is stored of it is served as it is.
    """
    if layers and not plain:
        return [_trained(name, layer) for name, layer in layers.items()]
    weights = ((name, tensor) for name, tensor in entry.tensors() if name.endswith(".weight") and tensor.ndim == 2)
    return [Trained(name.removesuffix(".weight"), None, tensor, tensor) for name, tensor in weights]


def _trained(name: str, layer: Layer) -> Trained:
    served = layer.scheme.weights.served_dtype
    return Trained(name, layer.scheme, layer.quantize(), layer.weight.detach().to(served), layer.stored_scale())


# The scope -----------------------------------------------------------------------------------------------------------


def declared(config: Mapping[str, Any], names: Sequence[str], dtype: torch.dtype) -> dict[str, Scheme | None]:
    """The scheme that a ``quantization_config`` declares for each of the linear layers `names`; None: as it is.

    Raises:
        ValueError, KeyError, TypeError: it cannot be read.
    """
    from compressed_tensors.utils.match import match_targets

    _, groups = formats.declared(config, dtype)
    linear = nn.Linear(1, 1, device="meta")
    ignored = list(config.get("ignore") or config.get("modules_to_not_convert") or ())
    ignored += [pattern.replace("-:", "re:", 1) for pattern in config.get("dynamic") or () if pattern[:2] == "-:"]
    kept = [name for name in names if not match_targets(name, linear, ignored)]
    found = compressed_tensors.layers_of(groups, kept)
    return {name: found[name].scheme if name in found else None for name in names}


def stored(folder: str | Path, names: Sequence[str]) -> dict[str, Scheme | None]:
    """The scheme of each of the layers `names`, and of what else is quantized, in a checkpoint folder."""
    path = Path(folder)
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path / 'config.json'}: {error}") from error
    if not config.get("quantization_config"):
        return dict.fromkeys(names)
    checkpoint = Checkpoint(path)
    return dict.fromkeys(names) | {name: checkpoint.scheme_of(name) for name in checkpoint.layers}


def config_problems(
    trained: Mapping[str, Scheme | None], config: Mapping[str, Scheme | None], where: str
) -> dict[str, str]:
    """Where the trainer and a checkpoint's config say two things of a layer."""
    problems = {}
    for name in {**trained, **config}:
        ours, theirs = trained.get(name), config.get(name)
        if ours != theirs:
            problems[name] = f"trains as {ours or 'it is'}, {where} declares {theirs or 'it as it is'}"
    return problems


def scope_problems(trained: Mapping[str, tuple[str, int]], live: Mapping[str, LiveLayer]) -> dict[str, str]:
    """Where the engine's live modules are others than the trainer's, which are precisions and numbers of outputs."""
    problems: dict[str, list[str]] = {}
    for name, (precision, outputs) in trained.items():
        if name not in live:
            continue
        one = live[name]
        if one.precision != precision:
            found = f"trains as {precision}, the engine runs it as {one.precision} ({one.module}, {one.kernel})"
            problems.setdefault(name, []).append(found)
        if one.rows[1] - one.rows[0] != outputs:
            found = f"has {outputs} outputs, the engine gives it rows {one.rows[0]} to {one.rows[1]} of {one.module}"
            problems.setdefault(name, []).append(found)
    for name in live.keys() - trained.keys():
        problems[name] = [f"the engine runs it as {live[name].precision}, the trainer has no such linear layer"]
    order = {leaf: place for parts in FUSED for place, leaf in enumerate(parts)}
    for siblings in run_as_one(name for name in trained if name in live):
        together = [name for name in siblings if live[name].module == live[siblings[0]].module]
        together.sort(key=lambda name: order.get(name.rpartition(".")[2], 0))
        for first, second in pairwise(together):
            if live[first].rows[1] != live[second].rows[0]:
                found = (
                    f"is rows {live[second].rows[0]} to {live[second].rows[1]} of {live[second].module}, but {first} "
                    f"ends at {live[first].rows[1]}: rows of a fused module are swapped"
                )
                problems.setdefault(second, []).append(found)
    return {name: "; ".join(found) for name, found in problems.items()}


# Known inputs --------------------------------------------------------------------------------------------------------


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
    """Give the live `layer` known inputs: None if it computes what is trained; and the weight's `fingerprint`."""
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
    return (value if second is None else value * second.reciprocal()).to(layer.master.dtype)


def _holds(evidence: Evidence, layer: Trained, weight: Quantized | Tensor) -> bool:
    """Whether what was found is what `layer` would give with that weight."""
    if evidence.hot is None:
        k = layer.master.shape[1]
        return not _far(evidence.dense, layer.run_with(weight, dense_input(k, layer.master.dtype)).cpu())
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
        of_group = _scaled(codes[:, position, None].expand(-1, scale.shape[1]), scale, _on_cpu(layer))
        fitting = (of_group == row[:, None]).all(0)
        if fitting.any() and not fitting[position // size]:
            other = int(fitting.nonzero()[0])
            return f"its scales are permuted: group {position // size} is multiplied by the scales of group {other}"
    return None


def _on_cpu(layer: Trained) -> Trained:
    assert isinstance(layer.weight, Quantized)
    codes, scale, zero_point, second = layer.weight
    return layer._replace(
        weight=Quantized(codes.cpu(), scale.cpu(), zero_point, None if second is None else second.cpu())
    )


def _close(hot: Tensor, at: Tensor, layer: Trained) -> str | None:
    weight = layer.served()[:, at].T.cpu().float()
    relative = ((hot.float() - weight).norm() / weight.norm()).item()
    if relative < 2.0**-5:
        return f"its weight is near ({relative:.2%} off), as a scale or a product rounded otherwise makes it"
    return None


def _where(wanted: Tensor, rows: Tensor) -> dict[int, int]:
    """For each row of `wanted` that `rows` has too, its index there; not for zeros, nor for what is there twice."""
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
    """Neighbours that are neighbours there too: first and last here, first and last there. Not single ones."""
    runs: list[list[int]] = []
    for here, there in sorted(places.items()):
        if runs and here == runs[-1][1] + 1 and there == runs[-1][3] + 1:
            runs[-1][1], runs[-1][3] = here, there
        else:
            runs.append([here, here, there, there])
    return [(a, b, c, d) for a, b, c, d in runs if b > a]


def fingerprint(engine_output: Tensor) -> int:
    """What is remembered of a layer's weight to know it again in a later version."""
    return checksum(engine_output.float() + 0.0)


class Inspection:
    """An audit of `engine`: `look` at every trained layer, `explain` every one again if there are `suspects`.

    `scope` is the scheme of each linear layer of the trainer; `seen` are fingerprints of earlier audits, by version.
    """

    def __init__(
        self, engine: RolloutEngine, scope: Mapping[str, Scheme | None], seen: Mapping[int, Mapping[str, int]]
    ) -> None:
        self._engine, self._scope, self._seen = engine, scope, seen
        self._trained: dict[str, tuple[str, int]] = {}
        self._explained: dict[str, list[str]] = {}
        self._checked, self._skipped = 0, dict[str, str]()
        self.suspects: dict[str, Evidence] = {}
        self.moved: set[str] = set()  # suspects that the trainer has changed since they were sent
        self.fingerprints: dict[str, int] = {}
        try:
            self._live: Mapping[str, LiveLayer] | None = engine.live_layers()
        except NotImplementedError as error:
            self._live = None
            self._skipped["live modules"] = str(error) or f"{type(engine).__name__} does not show them"

    def look(self, layer: Trained) -> None:
        """Give the live layer known inputs."""
        if layer.name not in self._scope:  # an embedding
            return
        self._trained[layer.name] = (layer.precision, layer.master.shape[0])
        if self._live is not None and layer.name not in self._live:
            return
        try:
            evidence, mark = look(self._engine, layer)
        except NotImplementedError as error:
            self._skipped[layer.name] = str(error) or f"{type(self._engine).__name__} does not run single layers"
            return
        self._checked += 1
        if mark is not None:
            self.fingerprints[layer.name] = mark
        if evidence is not None:
            few = len(self.suspects) < EXPLAINED
            self.suspects[layer.name] = evidence if few else evidence._replace(hot=None, dense=torch.empty(0))

    def explain(self, layer: Trained) -> None:
        """Find what the suspects hold, as far as this layer tells."""
        for name, evidence in [*self.suspects.items()][:EXPLAINED]:
            what = explain(evidence, layer) if name == layer.name else explain_by(evidence, layer)
            if what is not None:
                self._explained.setdefault(name, []).append(what)

    def report(
        self, configs: Mapping[str, Mapping[str, Any]], checkpoint: str | Path | None, stored_tensors: Mapping[str, str]
    ) -> AuditReport:
        """What was found.

        Args:
            configs: each a ``quantization_config``, by the words to call it.
            checkpoint: a folder to compare, or None.
            stored_tensors: what lies wrong in the engine, by tensor.
        """
        found: list[Iterable[tuple[str, str]]] = []
        served = [layer.weights.served_dtype for layer in self._scope.values() if layer is not None]
        dtype = served[0] if served else torch.bfloat16
        for where, config in configs.items():
            of_config = declared(config, [*self._scope], dtype)
            found.append(config_problems(self._scope, of_config, where).items())
        if checkpoint is not None:
            found.append(config_problems(self._scope, stored(checkpoint, [*self._scope]), str(checkpoint)).items())
        if self._live is not None:
            found.append(self._missing(self._live).items())
            live = {
                name: layer for name, layer in self._live.items() if name in self._trained or name not in self._scope
            }
            found.append(scope_problems(self._trained, live).items())
        found.append((name, self._words(name, evidence)) for name, evidence in self.suspects.items())
        linear = {**self._scope, **(self._live or {})}
        found.append(
            (layer_of(tensor), f"{tensor.rpartition('.')[2]}: {what}") if layer_of(tensor) in linear else (tensor, what)
            for tensor, what in stored_tensors.items()
        )
        return AuditReport(merged(*found), self._checked, self._skipped)

    def _missing(self, live: Mapping[str, LiveLayer]) -> dict[str, str]:
        problems = {}
        for name, scheme in self._scope.items():
            if name in live and name not in self._trained:
                self._skipped[name] = "its weight is stored under another name, to which it is tied"
            elif name not in live and scheme is None:
                self._skipped[name] = "not quantized, and the engine names no such layer"
            elif name not in live:
                problems[name] = f"trains as {scheme}, the engine runs no such layer"
        return problems

    def _words(self, name: str, evidence: Evidence) -> str:
        if name in self.moved:
            return f"the trainer has changed it since the last sync: sync, then audit ({evidence.found})"
        mark = evidence.mark
        stale = [version for version, of in sorted(self._seen.items()) if mark is not None and of.get(name) == mark]
        if stale:
            return f"stale: it holds the weight of version {stale[-1]} ({evidence.found})"
        why = self._explained.get(name, [])
        return f"{'; '.join(dict.fromkeys(why))} ({evidence.found})" if why else evidence.found


# Checksums -----------------------------------------------------------------------------------------------------------


def compare_checksums(
    expected: Mapping[str, int],
    lying: Mapping[str, int],
    history: Mapping[int, Mapping[str, int]],
    version: int | None,
) -> dict[str, str]:
    """For each tensor that lies in the engine otherwise than expected, what lies there.

    Args:
        expected: checksums of the trainer's tensors.
        lying: those of the engine's.
        history: those of earlier syncs, by version.
        version: of the engine now.
    """
    owners: dict[int, list[str]] = {}
    for name, total in expected.items():
        owners.setdefault(total, []).append(name)
    problems = {}
    for name, total in expected.items():
        if name not in lying:
            problems[name] = "the engine has no such tensor"
        elif lying[name] != total:
            problems[name] = _lies(name, lying[name], owners, history, version)
    for name in lying.keys() - expected.keys():
        problems[name] = "the trainer has no such tensor"
    return problems


def _lies(
    name: str,
    total: int,
    owners: Mapping[int, Sequence[str]],
    history: Mapping[int, Mapping[str, int]],
    version: int | None,
) -> str:
    since = [number for number, sums in sorted(history.items()) if sums.get(name) == total]
    if since and since[-1] == version:
        return f"the engine holds it as of version {version}, the trainer has changed it since: sync"
    if since:
        return f"stale: the engine still holds that of version {since[-1]}"
    if len(others := owners.get(total, ())) == 1:
        return f"the engine holds {others[0]} in its place"
    for number, sums in sorted(history.items(), reverse=True):
        others = [other for other, of_other in sums.items() if of_other == total]
        if len(others) == 1:
            return f"the engine holds {others[0]} of version {number} in its place"
    return "the engine holds other bits"


def layer_of(tensor: str) -> str:
    """The name of the layer that a stored tensor is of."""
    return tensor.rpartition(".")[0]


def merged(*findings: Iterable[tuple[str, str]]) -> dict[str, str]:
    """All that was found of each name."""
    found: dict[str, list[str]] = {}
    for name, what in (item for one in findings for item in one):
        found.setdefault(name, []).append(what)
    return {name: "; ".join(dict.fromkeys(whats)) for name, whats in found.items()}

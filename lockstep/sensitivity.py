"""Which layers bear which scheme: the loss that each costs on its own, and the cheapest assignment for a byte budget.

Each unit (the layers that engines run as one, all experts of a module, or a layer alone) is quantized by itself with
each scheme, and the mean loss over real batches is compared with the unquantized model's. The assignment minimizes the
sum of these increases under the budget: it takes them to add up, as HAWQ and its successors do (Dong et al.,
arXiv:1905.03696), which holds while each is small. Check the result with `lockstep align`, and train it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lockstep.loading import as_served
from lockstep.qat.experts import DOWN, layout_of
from lockstep.qat.prepare import (
    as_text,
    prepare,
    quantized_experts,
    quantized_modules,
    run_as_one,
    show,
    unprepare,
    unwrapped,
)
from lockstep.scheme import Rule, Scheme

STEPS = 4096  # of the byte budget, in which the assignment counts


@dataclass(frozen=True)
class Cost:
    """What a scheme costs a unit: `increase` of the mean loss, and the `bytes` of its weights and scales."""

    unit: str
    layers: tuple[str, ...]
    scheme: str
    increase: float
    bytes: int


@dataclass(frozen=True)
class SensitivityReport:
    """A `Cost` for each unit and scheme, and the mean `loss` of the unquantized model. Printing it gives a table.

    The scheme ``"-"`` leaves a unit as it is: no increase, and the bytes of the served dtype.
    """

    loss: float
    costs: tuple[Cost, ...]

    def assign(self, budget: int) -> list[Rule]:
        """The recipe of least total increase whose weights take at most `budget` bytes, for `lockstep.prepare`.

        Exact but for the counting of bytes beyond the smallest assignment's in steps of a 4096th, rounded up.

        Raises:
            ValueError: no assignment fits; the message says what the smallest takes.
        """
        units: dict[str, list[Cost]] = {}
        for cost in self.costs:
            units.setdefault(cost.unit, []).append(cost)
        smallest = sum(min(cost.bytes for cost in choices) for choices in units.values())
        # Every unit takes its smallest at least; what is spread over the units is the rest.
        left = budget - smallest
        chosen = None if left < 0 else _cheapest(list(units.values()), left)
        if chosen is None:
            raise ValueError(f"no assignment takes {budget:,} bytes or less: the smallest takes {smallest:,}.")
        by_scheme: dict[str, list[str]] = {}
        for cost in chosen:
            by_scheme.setdefault(cost.scheme, []).extend(cost.layers)
        return [Rule(layers, None if scheme == "-" else scheme) for scheme, layers in by_scheme.items()]

    def save(self, path: str | Path) -> Path:
        """Write the report as ``.json``, or its plot as ``.png`` or ``.svg``. Returns the path."""
        path = Path(path)
        if path.suffix == ".json":
            content = {"loss": self.loss, "costs": [asdict(cost) for cost in self.costs]}
            path.write_text(json.dumps(content, indent=2) + "\n")
        elif path.suffix in (".png", ".svg"):
            self.plot().savefig(path, dpi=150, bbox_inches="tight")
        else:
            raise ValueError(f"{path}: a sensitivity report is saved as .json, .png or .svg.")
        return path

    def plot(self) -> Any:
        """A matplotlib figure: the increase of each unit under each scheme, a bar each, the costliest unit on top."""
        from matplotlib.figure import Figure

        schemes = list(dict.fromkeys(cost.scheme for cost in self.costs if cost.scheme != "-"))
        worst = {cost.unit: 0.0 for cost in self.costs}
        for cost in self.costs:
            worst[cost.unit] = max(worst[cost.unit], cost.increase)
        units = sorted(worst, key=worst.__getitem__)
        figure = Figure(figsize=(9, 1.5 + 0.22 * len(units) * max(1, len(schemes) / 2)))
        axes = figure.add_subplot()
        height = 0.8 / len(schemes)
        for number, scheme in enumerate(schemes):
            increase = {cost.unit: cost.increase for cost in self.costs if cost.scheme == scheme}
            places = [place + (number - (len(schemes) - 1) / 2) * height for place in range(len(units))]
            axes.barh(places, [increase.get(unit, 0.0) for unit in units], height, label=scheme)
        axes.set_yticks(range(len(units)), units, fontsize=7)
        axes.set_xlabel(f"increase of the mean loss (nats), unquantized {self.loss:.4f}")
        axes.axvline(0, color="black", linewidth=0.5)
        axes.legend()
        return figure

    def __rich__(self):  # type: ignore[no-untyped-def]
        from rich.table import Table

        table = Table("unit", "scheme", "increase of the loss", "bytes", title=f"unquantized loss {self.loss:.4f}")
        for cost in sorted(self.costs, key=lambda cost: -cost.increase):
            if cost.scheme != "-":
                table.add_row(cost.unit, cost.scheme, f"{cost.increase:+.6f}", f"{cost.bytes:,}")
        return table

    def __str__(self) -> str:
        return as_text(self)


Loss = Callable[[nn.Module, Any], Tensor]


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    schemes: str | Sequence[str] = ("W4A16", "W8A8"),
    targets: str | Sequence[str] = ("Linear",),
    ignore: str | Sequence[str] = ("lm_head",),
    loss: Loss | None = None,
) -> SensitivityReport:
    """Measure what each scheme costs each unit of `model` in mean loss over `batches`.

    The model runs in eval mode and in the precision that is served, once over all batches for each unit and scheme,
    and is left as it was.

    Args:
        model: a model that is not prepared.
        batches: kept as a list; with the default loss, mappings that hold ``labels``.
        schemes: preset names. Their input ranges must be dynamic: nothing is calibrated here.
        targets: which layers, as in `lockstep.prepare`.
        ignore: which not.
        loss: ``loss(model, batch)``, a scalar tensor; default ``model(**batch).loss``.

    Raises:
        ValueError: the model is prepared already, there is no batch, the loss is not finite, or `prepare` refuses a
            scheme for every layer.
    """
    model, batches, loss = unwrapped(model), list(batches), loss or _own_loss
    schemes = (schemes,) if isinstance(schemes, str) else tuple(schemes)
    if not schemes:
        raise ValueError("schemes is empty: name the presets to try.")
    if any(True for _ in (*quantized_modules(model), *quantized_experts(model))):
        raise ValueError(f"this {type(model).__name__} is prepared: call lockstep.unprepare(model) first.")
    if not batches:
        raise ValueError("no batches: sensitivity is measured on real ones.")
    for scheme in schemes:
        inputs = Scheme.of(scheme).activations
        if inputs is not None and inputs.stores_scale:
            raise ValueError(f"{scheme} has measured input ranges: calibrate a model, sensitivity takes dynamic ones.")
    for scheme in schemes:  # all of them, before hours are measured
        prepare(model, scheme, targets, ignore)
        names = [name for name, _ in (*quantized_modules(model), *quantized_experts(model))]
        unprepare(model)
    with as_served(model, Scheme.of(schemes[0]).weights.served_dtype):
        start = _mean(model, batches, loss)
        costs = [cost for unit in run_as_one(names) for cost in _costs(model, unit, schemes, batches, loss, start)]
    return SensitivityReport(start, tuple(costs))


def _costs(
    model: nn.Module, layers: Sequence[str], schemes: Sequence[str], batches: Sequence[Any], loss: Loss, start: float
) -> list[Cost]:
    unit = " + ".join((layers[0], *(layer.rpartition(".")[2] for layer in layers[1:])))
    shapes = [shape for layer in layers for shape in _shapes(model.get_submodule(layer))]
    served = Scheme.of(schemes[0]).weights.served_dtype
    costs = [Cost(unit, tuple(layers), "-", 0.0, sum(n * k * served.itemsize for n, k in shapes))]
    for scheme in schemes:
        with warnings.catch_warnings():  # of all the others, which are meant to stay
            warnings.filterwarnings("ignore", message=".* in modules that no rule names")
            prepare(model, scheme, layers, ())
        try:
            increase = _mean(model, batches, loss) - start
        finally:
            unprepare(model)
        spec = Scheme.of(scheme).weights
        packed = spec.format == "int4" or (spec.format == "int8" and Scheme.of(scheme).activations is None)
        size = sum(sum(spec.stored_bytes(n, k, packed)) for n, k in shapes)
        costs.append(Cost(unit, tuple(layers), scheme, increase, size))
    return costs


def _shapes(module: Any) -> list[tuple[int, int]]:
    """N and K of each weight that is stored: of a linear layer, or of each projection of each expert."""
    layout = layout_of(module)
    if layout is None:
        return [tuple(module.weight.shape)]
    n, k = layout.shape(layout.first)
    first = [(len(range(*cut.indices(n))), k) for part, cut in layout.parts().items() if part != DOWN]
    return layout.experts * [*first, layout.shape(DOWN)]


def _cheapest(units: Sequence[Sequence[Cost]], budget: int) -> list[Cost] | None:
    """One cost of each unit, of least total increase within `budget` bytes more than the units' smallest take.

    Dynamic programming over the bytes.
    """
    step = max(1, -(-budget // STEPS))
    size = budget // step + 1
    best = torch.zeros(size, dtype=torch.float64)
    picks = []
    least = [min(cost.bytes for cost in choices) for choices in units]
    for choices, base in zip(units, least, strict=True):
        totals = torch.full((len(choices), size), torch.inf, dtype=torch.float64)
        for row, cost in zip(totals, choices, strict=True):
            taken = -(-(cost.bytes - base) // step)
            if taken < size:
                row[taken:] = best[: size - taken] + cost.increase
        best, pick = totals.min(0)
        picks.append(pick)
    if not best[-1].isfinite():
        return None
    left, chosen = size - 1, []
    for choices, pick, base in zip(reversed(units), reversed(picks), reversed(least), strict=True):
        cost = choices[int(pick[left])]
        chosen.append(cost)
        left -= -(-(cost.bytes - base) // step)
    return chosen[::-1]


def _mean(model: nn.Module, batches: Sequence[Any], loss: Loss) -> float:
    mean = torch.stack([loss(model, batch).detach().double().cpu() for batch in batches]).mean().item()
    if not torch.isfinite(torch.tensor(mean)):
        raise ValueError(f"the mean loss is {mean}: sensitivity needs a finite one.")
    return mean


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    found = model(**batch).loss
    if found is None:
        raise ValueError("the model returned no loss: put labels into the batches, or pass loss=.")
    return found


def sensitivity_command(
    model: str,
    schemes: Sequence[str] = ("W4A16", "W8A8"),
    budget: str | None = None,
    recipe: str | None = None,
    targets: Sequence[str] = ("Linear",),
    ignore: Sequence[str] = ("lm_head",),
    text: str | None = None,
    max_tokens: int = 4096,
    device: str | None = None,
    json: str | None = None,
    plot: str | None = None,
) -> int:
    """Measure what each scheme costs each layer of a model, and choose schemes for a budget of bytes.

    Args:
        model: transformers folder.
        schemes: preset names to try on each unit of layers.
        budget: what the weights of these layers may take, in bytes or such as 300MB.
        recipe: write the recipe for the budget there as YAML, for QATCallback's scheme.
        targets: which layers, as in lockstep.prepare.
        ignore: which not.
        text: file to measure the loss on; default: a module of the Python standard library.
        max_tokens: how many tokens of it.
        device: a torch device; default: the GPU if there is one.
        json: write the report as JSON there.
        plot: write its plot there, as .png or .svg.
    """

    from lockstep.export.files import parse_bytes
    from lockstep.loading import load_model, token_batches

    if recipe and not budget:
        raise ValueError(f"--recipe {recipe} needs --budget: a recipe is chosen for a number of bytes.")
    limit = None if budget is None else parse_bytes(budget, "budget")
    trained, tokenizer = load_model(model, device)
    batches = [{**batch, "labels": batch["input_ids"]} for batch in token_batches(trained, tokenizer, text, max_tokens)]
    report = sensitivity(trained, batches, schemes, targets, ignore)
    show(report)
    for path in filter(None, (json, plot)):
        print(f"written: {report.save(path)}")
    if limit is not None:
        rules = report.assign(limit)
        for rule in rules:
            print(f"{rule.scheme or 'as it is'}: {', '.join(rule.targets)}")
        if recipe:
            Path(recipe).write_text(_yaml(rules))
            print(f"written: {recipe}")
    return 0


def _yaml(rules: Sequence[Rule]) -> str:
    """Rules as YAML; JSON strings are YAML's too."""
    lines = [f"- targets: {json.dumps(list(rule.targets))}\n  scheme: {json.dumps(rule.scheme)}\n" for rule in rules]
    return "".join(lines)

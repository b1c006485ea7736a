"""What `compare` found: a table to print, JSON to keep, a page to look at, and a gate for CI."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lockstep.qat.prepare import as_text
from lockstep.scheme import Scheme, dtype_name

# Share of bit-equal outputs that a serving kernel reaches against our forward, by (kind, dtype): a little under what
# was measured on an H200 (docs/alignment.md). Weights alone: vLLM's Marlin, 99.78 % and more. Quantized inputs: vLLM's
# cutlass_scaled_mm, int8 100 %, fp8 99.997 % and more, here with room for other shapes.
# What is not in the table (blocks, int4 and fp4 with quantized inputs, fp32) has no such kernel, one that adds in
# another order, or too few measurements: there the size of the difference decides alone, and 1e-3 is about 3 % of bf16
# outputs off by one.
REACHABLE_EQUAL = {
    ("grouped", torch.bfloat16): 0.997,
    ("grouped", torch.float16): 0.98,
    ("channel", torch.bfloat16): 0.999,
    ("channel", torch.float16): 0.998,
    ("microscaled", torch.bfloat16): 0.999,
    ("int8 inputs", torch.bfloat16): 0.999,
    ("int8 inputs", torch.float16): 0.999,
    ("fp8 inputs", torch.bfloat16): 0.995,
    ("fp8 inputs", torch.float16): 0.995,
}
# Two orders of fp32 additions rarely agree to the bit, so in fp32 the size of the difference decides alone.
MAX_DIFFERENCE = {torch.bfloat16: 1e-3, torch.float16: 1e-3, torch.float32: 1e-5}
MAX_MEAN_LOGPROB_DIFFERENCE = 0.03


class AlignmentError(AssertionError):
    """The checkpoint does not compute what was trained; the message names the layers and what is wrong with each."""


@dataclass
class LayerAlignment:
    """One quantized layer: is the stored weight the trained one, and do fake and true kernel agree on its inputs?

    Attributes:
        name: the module's name.
        shape: ``(out_features, in_features)``.
        scheme: what it trains as.
        weight_equal: the stored codes, scales and zero points are bit for bit those that train.
        problem: what is wrong with them or with the stored input scale, in words; empty if nothing is.
        outputs: how many outputs were compared; 0 if the layer saw no input in this batch.
        equal: share of them that are bit-equal.
        max_ulps: the largest difference, in units in the last place.
        difference: ``norm(true - fake) / norm(fake)``.
        fake_error: error norm of the training forward against float64 on the trained weights, relative.
        true_error: the same for the true kernel on the stored weights.
        classic_equal: the share of bit-equal outputs that the classic fake quant, ``F.linear`` of dequantized tensors,
            would have reached; None where that is what the layer computes.
    """

    name: str
    shape: tuple[int, int]
    scheme: Scheme
    weight_equal: bool = False
    problem: str = ""
    outputs: int = 0
    equal: float = 0.0
    max_ulps: int = 0
    difference: float = 0.0
    fake_error: float = 0.0
    true_error: float = 0.0
    classic_equal: float | None = None


@dataclass
class EndToEnd:
    """The model's outputs with its own forward ("fake") and with the stored tensors in the true kernel ("true").

    Logits are compared at every unmasked position; log-probabilities are those of the batch's own next tokens, or of
    the fake model's first choice where the batch has no ``input_ids``. Nats.
    """

    positions: int
    max_logit_difference: float
    kl: float
    k3: float
    top1_agreement: float
    mean_logprob_difference: float
    max_logprob_difference: float


@dataclass
class AlignmentReport:
    """The result of `lockstep.align.compare`. Print it, `save` it, or let CI call `assert_aligned`.

    Attributes:
        checkpoint: the folder.
        kernel: name of the true kernel, or names.
        layers: a row for each quantized layer.
        plain_problems: what is wrong with each unquantized tensor and entry of ``config.json`` that differs, by name.
        end_to_end: the model's outputs; None if some stored tensor cannot be used.
        environment: versions and device.
    """

    checkpoint: str
    kernel: str
    layers: list[LayerAlignment]
    plain_problems: dict[str, str] = field(default_factory=dict)
    end_to_end: EndToEnd | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """What the model trained with, each scheme once."""
        return tuple(dict.fromkeys(layer.scheme for layer in self.layers))

    def failures(
        self,
        min_equal: float | None = None,
        max_difference: float | None = None,
        max_mean_logprob_difference: float = MAX_MEAN_LOGPROB_DIFFERENCE,
    ) -> list[str]:
        """What keeps the checkpoint from being aligned, a line each; see `assert_aligned`."""
        found = []
        for layer in self.layers:
            if layer.problem or not layer.weight_equal:
                found.append(f"{layer.name}: {layer.problem}")
            elif layer.outputs:
                least = self.least_equal(layer) if min_equal is None else min_equal
                most = MAX_DIFFERENCE[layer.scheme.weights.served_dtype] if max_difference is None else max_difference
                if layer.equal < least or not layer.difference <= most:
                    found.append(
                        f"{layer.name}: {layer.equal:.3%} of the outputs are bit-equal (at least {least:.3%}), "
                        f"relative difference {layer.difference:.1e} (at most {most:.1e})"
                    )
        found += [f"{name}: {problem}" for name, problem in self.plain_problems.items()]
        if self.end_to_end is None:
            found.append("end to end: not computed, since some tensors cannot be used")
        elif not self.end_to_end.mean_logprob_difference <= max_mean_logprob_difference:
            found.append(
                f"end to end: mean |log-probability difference| {self.end_to_end.mean_logprob_difference:.2e} "
                f"(at most {max_mean_logprob_difference:.2e})"
            )
        return found

    def assert_aligned(
        self,
        min_equal: float | None = None,
        max_difference: float | None = None,
        max_mean_logprob_difference: float = MAX_MEAN_LOGPROB_DIFFERENCE,
    ) -> None:
        """Raise unless every stored weight is bitwise the trained one and the outputs agree within the thresholds.

        Args:
            min_equal: least share of bit-equal outputs of a layer; default: what serving kernels reach for the scheme.
            max_difference: largest relative difference of a layer's outputs; default: 1e-3, in fp32 1e-5.
            max_mean_logprob_difference: end to end, in nats.

        Raises:
            AlignmentError: names each layer and tensor that fails, and why.
        """
        if found := self.failures(min_equal, max_difference, max_mean_logprob_difference):
            raise AlignmentError(f"{self.checkpoint} is not aligned:\n" + "\n".join(f"- {line}" for line in found))

    @property
    def aligned(self) -> bool:
        """Whether `assert_aligned` passes with its default thresholds."""
        return not self.failures()

    def least_equal(self, layer: LayerAlignment) -> float:
        """The default least share of bit-equal outputs of a layer."""
        return REACHABLE_EQUAL.get((_kind(layer.scheme, layer.shape[1]), layer.scheme.weights.served_dtype), 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values, with the verdict and the failures."""
        return {
            "aligned": self.aligned,
            "failures": self.failures(),
            "checkpoint": self.checkpoint,
            "kernel": self.kernel,
            "schemes": {str(scheme): _names_of_dtypes(asdict(scheme)) for scheme in self.schemes},
            "end_to_end": asdict(self.end_to_end) if self.end_to_end else None,
            "layers": [asdict(layer) | {"scheme": str(layer.scheme)} for layer in self.layers],
            "plain_problems": self.plain_problems,
            "environment": dict(self.environment),
        }

    def save(self, path: str | Path) -> Path:
        """Write the report to `path`: ``.json``, or ``.html`` for one self-contained page with plots."""
        path = Path(path)
        if path.suffix == ".json":
            path.write_text(json.dumps(_finite(self.to_dict()), indent=2, allow_nan=False))
        elif path.suffix == ".html":
            from lockstep.align.html import page

            path.write_text(page(self))
        else:
            raise ValueError(f"{path}: a report is saved as .json or .html.")
        return path

    def __rich__(self):  # type: ignore[no-untyped-def]
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        failures = self.failures()
        verdict = Text("aligned", "bold green") if not failures else Text("NOT ALIGNED", "bold red")
        title = Text.assemble(verdict, f"  {describe_schemes(self)}, kernel {self.kernel}, {self.checkpoint}")
        classic = any(layer.classic_equal is not None for layer in self.layers)
        legend = "err.: relative to float64, of the trainer's and of the true kernel's outputs"
        legend += "; classic: bit-equal if dequantized tensors were multiplied" * classic
        table = Table(caption=legend, caption_justify="left")
        table.add_column("layer", overflow="fold", ratio=1)
        table.add_column("weight")
        for header in ("bit-equal", *(("classic",) * classic), "ulps", "err. fake", "err. true"):
            table.add_column(header, justify="right", no_wrap=True)
        for layer in _folded(self.layers):
            outputs = [f"{layer.equal:.3%}", str(layer.max_ulps), f"{layer.fake_error:.2e}", f"{layer.true_error:.2e}"]
            if classic:
                outputs.insert(1, "" if layer.classic_equal is None else f"{layer.classic_equal:.0%}")
            weight = "equal" if layer.weight_equal else Text("differs", "red")
            table.add_row(layer.name, weight, *(outputs if layer.outputs else ["no input", *[""] * (len(outputs) - 1)]))
        parts: list[Any] = [title, table]
        if self.end_to_end:
            parts.append(Text(describe(self.end_to_end)))
        return Group(*parts, *(Text(f"- {line}", "red") for line in failures))

    def __str__(self) -> str:
        return as_text(self)


def _folded(layers: Iterable[LayerAlignment]) -> list[LayerAlignment]:
    """The rows to print: the experts of a module in one for each projection, but for those with a problem."""
    rows: dict[str, list[LayerAlignment]] = {}
    for layer in layers:
        whole = layer.weight_equal and not layer.problem
        rows.setdefault(re.sub(r"(\.experts)\.\d+\.", r"\1.*.", layer.name) if whole else layer.name, []).append(layer)
    return [_together(name, alike) if len(alike) > 1 else alike[0] for name, alike in rows.items()]


def _together(name: str, layers: Sequence[LayerAlignment]) -> LayerAlignment:
    """One row of several: shares over all their outputs, the worst of the rest."""
    first, outputs = layers[0], sum(layer.outputs for layer in layers)

    def mean(value: str) -> float:
        return sum(getattr(layer, value) * layer.outputs for layer in layers) / max(1, outputs)

    return replace(
        first,
        name=f"{name}  x{len(layers)}",
        outputs=outputs,
        equal=mean("equal"),
        max_ulps=max(layer.max_ulps for layer in layers),
        difference=max(layer.difference for layer in layers),
        fake_error=max(layer.fake_error for layer in layers),
        true_error=max(layer.true_error for layer in layers),
        classic_equal=None if all(layer.classic_equal is None for layer in layers) else _classic_of(layers),
    )


def _classic_of(layers: Sequence[LayerAlignment]) -> float:
    known = [(layer.classic_equal, layer.outputs) for layer in layers if layer.classic_equal is not None]
    return sum(share * outputs for share, outputs in known) / sum(outputs for _, outputs in known)


def _kind(scheme: Scheme, k: int) -> str:
    """The row of `REACHABLE_EQUAL` for a layer of `k` inputs."""
    weights, inputs = scheme.weights, scheme.activations
    if inputs is None and weights.format in ("int4", "int8"):
        return "channel" if weights.scale_follows_gemm(k) else "grouped"
    if inputs is None:
        return "microscaled"
    if weights.strategy in ("channel", "tensor"):
        return f"{inputs.format.partition('_')[0]} inputs"
    return "not measured"


def _names_of_dtypes(value: Any) -> Any:
    """`value` with dtypes by name, since JSON has no word for them."""
    if isinstance(value, dict):
        return {key: _names_of_dtypes(entry) for key, entry in value.items()}
    return dtype_name(value) if isinstance(value, torch.dtype) else value


def _finite(value: Any) -> Any:
    """`value` with NaN and infinities as strings, since JSON has no word for them."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def describe_schemes(report: AlignmentReport) -> str:
    """The model's scheme, or each one with the number of its layers."""
    counts = Counter(str(layer.scheme) for layer in report.layers)
    return " + ".join(f"{count} x {scheme}" if len(counts) > 1 else scheme for scheme, count in counts.items())


def describe(end_to_end: EndToEnd) -> str:
    """One line on the end-to-end comparison."""
    return (
        f"end to end, {end_to_end.positions} positions: mean |log-prob difference| "
        f"{end_to_end.mean_logprob_difference:.2e} (max {end_to_end.max_logprob_difference:.2e}), "
        f"KL {end_to_end.kl:.2e}, k3 {end_to_end.k3:.2e}, top-1 agreement {end_to_end.top1_agreement:.2%}, "
        f"max |logit difference| {end_to_end.max_logit_difference:.2e}"
    )

"""Forward and backward of one transformer layer's linears: plain bf16, Lockstep and its peers, eager and compiled.

    python benchmarks/layer_step.py [--device cuda] [--tokens 512 2048] [--paths bf16 lockstep] [--modes eager]

Prints the time of a step against plain bf16 eager in the same run, and the memory beyond bf16's: at the peak (eager
against eager, compiled against compiled; CUDA only), and what autograd keeps between forward and backward (eager).
"""

from __future__ import annotations

import gc
from typing import Any

import torch
import torch.nn.functional as F
from harness import (
    MIB,
    Benchmark,
    Case,
    Skipped,
    add_extra_memory,
    add_ratios,
    allocated,
    arguments,
    bars,
    compile_for_real,
    first_line,
    graphs,
    interleave,
    number,
    own_code,
    parse,
    peak_mib,
    text,
)
from paths import BF16, PATHS, Path
from torch import Tensor, nn

COLUMNS = [
    ("path", text("path")),
    ("mode", text("mode")),
    ("tokens", number("tokens", 0)),
    ("ms", number("median_ms", 3)),
    ("p10", number("p10_ms", 3)),
    ("p90", number("p90_ms", 3)),
    ("time to bf16 eager", number("ratio", 3)),
    ("peak beyond bf16, MiB", number("extra_peak_mib", 0, sign=True)),
    ("kept for backward beyond bf16, MiB", number("extra_saved_mib", 1, sign=True)),
    ("graphs", text("graphs")),
]


class LayerLinears(nn.Module):
    """The seven linears of a Llama layer, wired as the layer wires them; norms, attention and residuals left out.

    Query, key and value share the input, gate and up share the output of the attention's projection, down takes
    ``silu(gate) * up``.
    """

    def __init__(self, hidden: int, intermediate: int, key_value: int, device: torch.device) -> None:
        super().__init__()
        shapes = {
            "q_proj": (hidden, hidden),
            "k_proj": (hidden, key_value),
            "v_proj": (hidden, key_value),
            "o_proj": (hidden, hidden),
            "gate_proj": (hidden, intermediate),
            "up_proj": (hidden, intermediate),
            "down_proj": (intermediate, hidden),
        }
        for name, (inputs, outputs) in shapes.items():
            self.add_module(name, nn.Linear(inputs, outputs, bias=False, device=device, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and the layer's output, from ``x [tokens, hidden]``."""
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        hidden = self.o_proj(query)
        return key, value, self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class Work:
    """The input and the gradients of the outputs, which are the same for every path."""

    def __init__(self, options: Any, tokens: int) -> None:
        hidden, key_value = options.hidden, options.hidden // 4
        self.sizes = (hidden, options.intermediate, key_value)
        self.device, self.tokens = options.device, tokens
        generator = torch.Generator(self.device).manual_seed(0)
        draw = {"device": self.device, "dtype": torch.bfloat16, "generator": generator}
        self.x = torch.randn(tokens, hidden, **draw).requires_grad_()
        self.grads = [torch.randn(tokens, width, **draw) for width in (key_value, key_value, hidden)]

    def layer(self, path: Path) -> LayerLinears:
        """The layer as `path` prepares it, its weights the same for every path."""
        torch.manual_seed(0)
        layer = LayerLinears(*self.sizes, self.device)
        path.prepare(layer)
        return layer

    def step(self, layer: nn.Module) -> None:
        """Forward and backward."""
        torch.autograd.backward(layer(self.x), self.grads)

    def forget(self, layer: nn.Module) -> None:
        """Set all gradients to None."""
        self.x.grad = None
        for parameter in layer.parameters():
            parameter.grad = None

    def case(self, layer: nn.Module, **row: Any) -> Case:
        """A case that steps `layer`."""
        return Case(row, step=lambda: self.step(layer), before=lambda: self.forget(layer))

    def saved_mib(self, layer: nn.Module) -> float:
        """What autograd keeps for the backward, each storage once and parameters not counted."""
        own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
        saved: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            outputs = layer(self.x)
        del outputs
        return sum(saved.values()) / MIB


def built(work: Work, path: Path, mode: str) -> Case:
    """The case of a path in a mode, warm, with its memory in the row. One that cannot be built says why in its row."""
    row = {"path": path.name, "mode": mode, "tokens": work.tokens, "config": path.config}
    try:
        floor = allocated(work.device)
        case = compiled(work, path, row) if mode == "compiled" else eager(work, path, row)
        case.row["peak_mib"] = peak_mib(case, work.device, floor)
        return case
    except Skipped as reason:
        return Case({**row, "status": "skipped", "reason": str(reason)}, step=lambda: None)
    except Exception as error:  # whatever a peer raises: the other rows are still wanted
        failed = Case(row, step=lambda: None)
        failed.fail(error)
        return failed


def eager(work: Work, path: Path, row: dict[str, Any]) -> Case:
    """A path as it is."""
    layer = work.layer(path)
    case = work.case(layer, **row, saved_mib=work.saved_mib(layer))
    case.step()
    return case


def compiled(work: Work, path: Path, row: dict[str, Any]) -> Case:
    """A path under ``torch.compile``, as one graph if it can be; the row counts graphs and breaks."""
    errors = []
    for fullgraph in (True, False):
        layer, before = own_code(work.layer(path)), graphs()
        case = work.case(torch.compile(layer, fullgraph=fullgraph, dynamic=False), **row, fullgraph=fullgraph)
        try:
            case.step()
        except Exception as error:
            errors.append(error)
            continue
        made = {name: count - before[name] for name, count in graphs().items()}
        if not made["graphs"]:
            raise RuntimeError("torch.compile made no graph: this would be eager mode under another name")
        if errors:
            case.row["note"] = f"not as one graph ({first_line(errors[0])}): {made['graph_breaks']} breaks"
        case.row |= made
        return case
    raise errors[-1]


def measure(work: Work, paths: list[Path], modes: list[str], rounds: int) -> list[dict[str, Any]]:
    """All rows for one number of tokens."""
    compile_for_real()
    work.step(warm := work.layer(BF16))  # what the first GEMMs allocate for good is nobody's in particular
    work.forget(warm)
    del warm
    cases = [built(work, path, mode) for mode in modes for path in paths]
    interleave([case for case in cases if "status" not in case.row], work.device, rounds)
    add_ratios(cases, next((case for case in cases if (case.row["path"], case.row["mode"]) == ("bf16", "eager")), None))
    rows = [case.row for case in cases]
    for key in ("peak_mib", "saved_mib"):
        add_extra_memory(rows, "bf16", key, same=("mode",))
    return rows


def main(name: str = "layer_step", doc: str = __doc__ or "", all_paths: dict[str, Path] = PATHS) -> None:
    """Measure every path at every size."""
    parser = arguments(doc, rounds=12)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--intermediate", type=int)
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--compiled-tokens", type=int, nargs="*", help="those of --tokens that are compiled too")
    parser.add_argument("--paths", nargs="+", choices=list(all_paths), default=list(all_paths))
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    options = parse(
        parser,
        hidden=(512, 4096),
        intermediate=(1408, 14336),
        tokens=([256, 1024], [512, 2048, 8192, 16384]),
        compiled_tokens=([256], [2048, 8192]),
    )
    paths = [all_paths[path] for path in dict.fromkeys(["bf16", *options.paths])]
    claim = "forward + backward of a Llama layer's linears, bf16, no optimizer; ratios to plain bf16 eager in this run"
    benchmark = Benchmark(name, claim, COLUMNS, options)
    for tokens in options.tokens:
        modes = ["eager", *(["compiled"] if "compiled" in options.modes and tokens in options.compiled_tokens else [])]
        benchmark.add(measure(Work(options, tokens), paths, modes, options.rounds))
        gc.collect()
        if options.device.type == "cuda":
            torch.cuda.empty_cache()
    benchmark.finish(
        lambda axes, rows: bars(
            axes, rows, lambda row: f"{row['path']}, {row['mode']}, {row['tokens']:,}", "ratio", "time / bf16 eager"
        )
    )


if __name__ == "__main__":
    main()

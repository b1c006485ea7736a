"""Training steps of a whole Llama of a billion parameters: tokens a second and peak memory.

    python benchmarks/whole_model.py [--device cuda] [--paths bf16 lockstep] [--modes eager]

A step is forward, backward and a fused AdamW step over random tokens, weights and states in bf16, attention by
``scaled_dot_product_attention``, no activation checkpointing; the head, tied to the embedding, stays in bf16. Compiled
means each decoder layer by itself, one graph for all of them: a recipe that every path can follow.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from harness import (
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
    parse,
    peak_mib,
    text,
)
from paths import PATHS, Path
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

COLUMNS = [
    ("path", text("path")),
    ("mode", text("mode")),
    ("ms a step", number("median_ms", 1)),
    ("p10", number("p10_ms", 1)),
    ("p90", number("p90_ms", 1)),
    ("tokens/s", number("tokens_per_second", 0)),
    ("time to bf16 eager", number("ratio", 3)),
    ("peak, MiB", number("peak_mib", 0)),
    ("beyond bf16, MiB", number("extra_peak_mib", 0, sign=True)),
    ("graphs", text("graphs")),
]


def config(options: Any) -> LlamaConfig:
    """Llama-3.2-1B's shapes, or what the options say."""
    return LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=max(1, options.hidden // 256),
        head_dim=64,
        vocab_size=options.vocabulary,
        max_position_embeddings=options.sequence,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )


class Training:
    """A model that a path has prepared, its optimizer, and a step."""

    def __init__(self, options: Any, path: Path, tokens: Tensor) -> None:
        torch.manual_seed(0)
        with options.device:
            self.model = LlamaForCausalLM(config(options)).to(torch.bfloat16).train()
        path.prepare(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.tokens = tokens

    def compile(self, fullgraph: bool) -> None:
        """Compile each decoder layer."""
        for layer in self.model.model.layers:
            layer.compile(fullgraph=fullgraph, dynamic=False)

    def step(self) -> None:
        """Forward, backward, optimizer."""
        self.model(input_ids=self.tokens, labels=self.tokens).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def built(options: Any, path: Path, mode: str, tokens: Tensor) -> Case:
    """The case of a path in a mode, warm, with its memory in the row. One that cannot be built says why in its row."""
    row: dict[str, Any] = {"path": path.name, "mode": mode, "config": path.config}
    try:
        floor = allocated(options.device)
        training = (compiled if mode == "compiled" else eager)(options, path, tokens, row)
        case = Case(row, training.step)
        case.row["parameters"] = sum(parameter.numel() for parameter in training.model.parameters())
        case.row["peak_mib"] = peak_mib(case, options.device, floor)
        return case
    except Skipped as reason:
        return Case({**row, "status": "skipped", "reason": str(reason)}, step=lambda: None)
    except Exception as error:  # whatever a peer raises: the other rows are still wanted
        failed = Case(row, step=lambda: None)
        failed.fail(error)
        return failed


def eager(options: Any, path: Path, tokens: Tensor, row: dict[str, Any]) -> Training:
    """A path as it is."""
    training = Training(options, path, tokens)
    training.step()
    return training


def compiled(options: Any, path: Path, tokens: Tensor, row: dict[str, Any]) -> Training:
    """A path whose decoder layers are compiled, as one graph if they can be; the row counts graphs and breaks."""
    errors = []
    for fullgraph in (True, False):
        before, training = graphs(), Training(options, path, tokens)
        training.compile(fullgraph)
        try:
            training.step()
        except Exception as error:
            errors.append(error)
            del training
            continue
        made = {name: count - before[name] for name, count in graphs().items()}
        if not made["graphs"]:
            raise RuntimeError("torch.compile made no graph: this would be eager mode under another name")
        if errors:
            row["note"] = f"not as one graph ({first_line(errors[0])}): {made['graph_breaks']} breaks"
        row |= {"fullgraph": fullgraph, **made}
        return training
    raise errors[-1]


def main() -> None:
    """Measure every path in every mode."""
    parser = arguments(__doc__, rounds=10, quick_rounds=3)
    for name in ("hidden", "intermediate", "layers", "vocabulary", "sequence", "batch"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--paths", nargs="+", choices=list(PATHS))
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    shown = ["bf16", "lockstep", "torchao Intx"]
    options = parse(
        parser,
        hidden=(256, 2048),
        intermediate=(512, 8192),
        layers=(2, 16),
        vocabulary=(1024, 128256),
        sequence=(128, 2048),
        batch=(2, 4),
        paths=(shown, shown),
    )
    claim = "training steps of a whole Llama with AdamW; ratios to plain bf16 eager in this run"
    benchmark = Benchmark("whole_model", claim, COLUMNS, options)
    compile_for_real()
    generator = torch.Generator(options.device).manual_seed(0)
    drawn = {"device": options.device, "generator": generator}
    tokens = torch.randint(options.vocabulary, (options.batch, options.sequence), **drawn)
    eager(options, PATHS["bf16"], tokens, {})  # what the first GEMMs allocate for good is nobody's in particular
    gc.collect()
    paths = [PATHS[name] for name in dict.fromkeys(["bf16", *options.paths])]
    cases = [built(options, path, mode, tokens) for mode in options.modes for path in paths]
    interleave([case for case in cases if "status" not in case.row], options.device, options.rounds, warmup=1)
    base = next((case for case in cases if (case.row["path"], case.row["mode"]) == ("bf16", "eager")), None)
    add_ratios(cases, base)
    rows = [case.row for case in cases]
    add_extra_memory(rows, "bf16", "peak_mib", same=("mode",))
    for row in rows:
        if row["status"] == "ok":
            row["tokens_per_second"] = 1e3 * tokens.numel() / row["median_ms"]
    benchmark.add(rows)
    benchmark.finish(
        lambda axes, rows: bars(
            axes, rows, lambda row: f"{row['path']}, {row['mode']}", "tokens_per_second", "tokens/s"
        )
    )


if __name__ == "__main__":
    main()

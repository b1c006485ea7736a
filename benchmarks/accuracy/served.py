"""Perplexity as trained against perplexity as served: the same blocks of held-out tokens, scored five ways.

    python benchmarks/accuracy/served.py EXPORTED... [--masters MASTERS...] [--text-from CORPUS|installed]

Each way changes one thing, so that the cause of a difference is seen in its row:

- ``trained``: the fake-quant model on its masters, fp32 under autocast. Needs ``--masters``.
- ``restored``: the same model on the stored words, their masters made of them; what is not quantized is now bf16.
- ``reference``: the residual stream is bf16 too, as engines have it; `EmbeddedEngine` on the reference kernel.
- ``transformers``: the folder through ``from_pretrained``, which has a GEMM or a fake quant of its own.
- ``vLLM``: the engine, on the CPU, with its own kernels (``make test-engine`` installs it).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from corpus import Corpus, corpus, installed_sources, split_by_package  # noqa: E402
from harness import ROOT, Benchmark, first_line, number, text  # noqa: E402

import lockstep  # noqa: E402
from lockstep import Rule, grid  # noqa: E402
from lockstep.align.metrics import token_logprobs  # noqa: E402
from lockstep.export import Checkpoint  # noqa: E402
from lockstep.export.checkpoint import same_bits  # noqa: E402
from lockstep.export.rollout.embedded import EmbeddedEngine  # noqa: E402
from lockstep.loading import LEARNED, as_served, load_scales, stored_scales  # noqa: E402
from lockstep.qat import quantized_modules  # noqa: E402
from lockstep.recipes.text import distinct, load_tokenizer, tokenize  # noqa: E402

PYTHON = ROOT / ".venv-engine" / "bin" / "python"
CLAIM = (
    "perplexity of the same held-out tokens as trained and as served. `digits`: so many agree with the first way, that "
    "is, the two differ by at most half a unit of the last of them. The other differences are to the way in `against`, "
    "in nats a token, with the standard error over the blocks"
)
COLUMNS = [
    ("folder", text("folder")),
    ("way", text("path")),
    ("perplexity", number("perplexity", 6)),
    ("against the first", number("difference", 6, sign=True)),
    ("standard error", number("difference_error", 6)),
    ("digits", text("digits")),
    ("against", text("against")),
    ("loss, 1e-5 nats", number("loss_1e5", 2, sign=True)),
    ("standard error", number("error_1e5", 2)),
    ("mean of each log-probability's, 1e-3 nats", number("each_1e3", 3)),
    ("identical", number("identical", 4)),
]
ENGINE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import serve  # sets what vLLM reads when it is imported
import vllm

request = json.load(open(sys.argv[2]))
llm = serve.load(request["folder"], len(request["blocks"][0]) + 1)
answer = serve.answer(llm, request["blocks"], 1)
found = {"logprobs": answer["prompt_logprobs"], "kernels": answer["kernel"], "version": vllm.__version__}
json.dump(found, open(sys.argv[2], "w"))
"""


def main() -> None:
    """Score every folder every way, and write the table."""
    options = _options()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    places = list(zip(options.folders, options.masters or ["-"] * len(options.folders), strict=True))
    if not PYTHON.exists():
        raise SystemExit(f"vLLM is not installed: there is no {PYTHON.relative_to(ROOT)}. Run: make test-engine")
    checked = [(check(Path(folder), masters, options.context), Path(folder), masters) for folder, masters in places]
    read = _installed if options.text_from == "installed" else partial(_of_corpus, Path(options.text_from))
    benchmark = Benchmark("served_perplexity", CLAIM, COLUMNS, _public(options))
    for context, folder, masters in checked:
        benchmark.add(measure(folder, masters, read(folder, context, options.blocks)))
    benchmark.finish(plot)


def check(folder: Path, masters: str, context: int | None) -> int:
    """The length of a block: `context`, by default the model's own, up to 1,024.

    Raises:
        SystemExit: `folder` is not exported, `masters` is no folder, or the model takes no context of that length.
    """
    try:
        longest = Checkpoint(folder).config["max_position_embeddings"]
    except ValueError as error:
        raise SystemExit(f"{folder} is not an exported folder: {error}") from None
    if not (folder / "tokenizer_config.json").exists():
        raise SystemExit(f"{folder} holds no tokenizer: export it with tokenizer=..., or copy the files of one there.")
    if masters != "-" and not Path(masters).is_dir():
        raise SystemExit(f"--masters {masters} is no folder: give that of the trained weights, or - for none.")
    if context is not None and not 2 <= context <= longest:
        raise SystemExit(f"--context {context}: {folder} takes from 2 to {longest} tokens.")
    return context or min(1024, longest)


# Text -----------------------------------------------------------------------------------------------------------------


def _of_corpus(place: Path, folder: Path, context: int, count: int) -> Tensor:
    """The study's test blocks. SystemExit if `folder` has another tokenizer than they were made with."""
    if not (place / "facts.json").exists():
        raise SystemExit(f"--text-from {place} is no corpus of the study: it has no facts.json. Or: installed")
    found = corpus(place, 0)
    if found.tokenizer.get_vocab() != load_tokenizer(str(folder)).get_vocab():
        raise SystemExit(f"{place} was made with another tokenizer than that of {folder}.")
    return _first(found, context, count)


def _installed(folder: Path, context: int, count: int) -> Tensor:
    """Blocks of the packages here that the study holds out by their names, in the tokens of `folder`."""
    texts = [source for _, source in split_by_package(distinct(installed_sources()))[0]["test"]]
    tokenizer = load_tokenizer(str(folder))
    return _first(Corpus({"test": tokenize(tokenizer, texts)}, tokenizer, {}), context, count)


def _first(found: Corpus, context: int, count: int) -> Tensor:
    blocks = found.blocks("test", context)[:count]
    if len(blocks) < count:
        raise SystemExit(f"the text has {len(blocks)} blocks of {context} tokens, --blocks {count} are more.")
    return blocks


# The ways -------------------------------------------------------------------------------------------------------------


def measure(folder: Path, masters: str, blocks: Tensor) -> Iterator[dict[str, Any]]:
    """A row for each way to compute `blocks` int64 ``[N, T]``; one that cannot says why."""
    ways: dict[str, tuple[str | None, Callable[[], tuple[Tensor, str]]]] = {
        "trained": (None, lambda: (scores(trained(folder, Path(masters)), blocks), "")),
        "restored": ("trained", lambda: (scores(restored(folder), blocks), "")),
        "reference": ("restored", lambda: (scores(_reference(folder), blocks), "")),
        "transformers": ("reference", lambda: (scores(_transformers(folder), blocks), "")),
        "vLLM": ("reference", lambda: engine(folder, blocks)),
    }
    if masters == "-":
        del ways["trained"]
    found: dict[str, Tensor] = {}
    for way, (against, score) in ways.items():
        row: dict[str, Any] = {"folder": folder.name, "path": way, "tokens": blocks[:, 1:].numel()}
        try:
            found[way], row["note"] = score()
        except (ValueError, RuntimeError, ImportError, OSError) as error:  # the other ways are still wanted
            yield row | {"status": "failed", "reason": first_line(error)}
            continue
        row |= {"status": "ok", "perplexity": perplexity(found[way])}
        if len(found) > 1:
            first = next(iter(found.values()))
            row |= {
                "difference": row["perplexity"] - perplexity(first),
                "difference_error": row["perplexity"] * difference_of_loss(found[way], first)[1],
                "digits": digits(row["perplexity"], perplexity(first)),
            }
        if against in found:
            row |= {"against": against, **differences(found[way], found[against])}
        yield row


@torch.no_grad()
def scores(model: Any, blocks: Tensor) -> Tensor:
    """Log-probabilities fp32 ``[N, T - 1]`` of all but each first token of `blocks`."""
    with as_served(model, torch.bfloat16):
        return torch.stack(
            [token_logprobs(model(input_ids=one[None], use_cache=False).logits[0, :-1], one[1:]) for one in blocks]
        )


def trained(folder: Path, masters: Path) -> Any:
    """The fake-quant model on its masters. ValueError if these are not the masters of `folder`."""
    learned = any(key.endswith(LEARNED) for key in stored_scales(masters))
    model = transformers.AutoModelForCausalLM.from_pretrained(masters, dtype=torch.float32)
    return _prepared(model, folder, masters, learned)


def restored(folder: Path) -> Any:
    """The fake-quant model on fp32 masters made of the stored words, which must be quantized to the same words.

    Code times scale is exact in fp32, and so is what most rules make of it; rounded to bf16 it would not be.
    """
    stored = Checkpoint(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = {name: stored.tensor(name) for name in stored.plain_tensors()}
    for name in stored.layers:
        exact = replace(stored.scheme_of(name).weights, served_dtype=torch.float32)
        state[f"{name}.weight"] = grid.dequantize(stored.layer(name), exact)
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", ()))
    if odd := [*(set(missing) - tied), *unexpected]:
        raise ValueError(f"{odd[0]} of {folder.name} has no place in the model, or is missing.")
    model.tie_weights()
    return _prepared(model, folder, folder, False)


def _prepared(model: Any, folder: Path, scales: Path, learned: bool) -> Any:
    stored = Checkpoint(folder)
    schemes = {name: stored.scheme_of(name) for name in stored.layers}
    rules = [Rule([name for name in schemes if schemes[name] == one], one) for one in dict.fromkeys(schemes.values())]
    lockstep.prepare(model, rules, learned_scales=learned)
    load_scales(model, scales)
    for name, layer in quantized_modules(model):
        if not same_bits(layer.quantize(), stored.layer(name)):
            raise ValueError(f"{name} of {scales.name} is not quantized to the words that {folder.name} stores")
    return model


def _reference(folder: Path) -> Any:
    return EmbeddedEngine.from_folder(folder, device="cpu", kernel="reference").model


def _transformers(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def engine(folder: Path, blocks: Tensor) -> tuple[Tensor, str]:
    """The same log-probabilities from vLLM, in a process of its own, and which kernels gave them."""
    with tempfile.TemporaryDirectory() as place:
        request = Path(place) / "request.json"
        request.write_text(json.dumps({"folder": str(folder), "blocks": blocks.tolist()}))
        # vLLM wants room for an answer too, though nobody reads it: a block may fill the model's whole context.
        environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}
        command = [str(PYTHON), "-c", ENGINE, str(ROOT / "tests" / "engine"), str(request)]
        process = subprocess.run(command, env=environment, capture_output=True, text=True)
        if process.returncode:
            raise RuntimeError(f"vLLM: {(process.stderr.strip().splitlines() or ['no reason given'])[-1]}")
        found = json.loads(request.read_text())
    kernels = ", ".join(f"{count} {name}" for name, count in found["kernels"].items())
    return torch.tensor(found["logprobs"]), f"vLLM {found['version']}: {kernels}"


# What is said of them -------------------------------------------------------------------------------------------------


def perplexity(logprobs: Tensor) -> float:
    """exp of the mean negative log-probability, in float64."""
    return math.exp(-logprobs.double().mean().item())


def digits(value: float, other: float) -> int:
    """The largest n for which the two differ by at most half a unit of the nth significant digit; at most 16."""
    if value == other:
        return 16
    exponent = math.floor(math.log10(abs(other)))
    return max(0, min(16, exponent + 1 + math.floor(-math.log10(2 * abs(value - other)))))


def difference_of_loss(logprobs: Tensor, others: Tensor) -> tuple[float, float]:
    """The mean difference in nats a token and its standard error, of log-probabilities ``[N, T - 1]`` of N blocks."""
    a_block = (others.double() - logprobs.double()).mean(-1)
    return a_block.mean().item(), a_block.std().item() / math.sqrt(len(a_block))


def differences(logprobs: Tensor, others: Tensor) -> dict[str, float]:
    """What is said of the log-probabilities ``[N, T - 1]`` of one way and of the way that it is held against."""
    loss, error = difference_of_loss(logprobs, others)
    each = (logprobs.double() - others.double()).abs()
    identical = (each == 0).double().mean().item()
    return {
        "loss_1e5": 1e5 * loss,
        "error_1e5": 1e5 * error,
        "each_1e3": 1e3 * each.mean().item(),
        "identical": identical,
    }


def plot(axes: Any, rows: list[dict[str, Any]]) -> None:
    """The loss of each way against that of the way before it, with two standard errors."""
    rows = [row for row in rows if "loss_1e5" in row]
    places = range(len(rows))
    values, errors = ([row[key] for row in rows] for key in ("loss_1e5", "error_1e5"))
    axes.errorbar(values, places, xerr=[2 * error for error in errors], fmt="o", color="#d9480f", capsize=3)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(places, [f"{row['folder']}: {row['path']} - {row['against']}" for row in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("difference of the loss (1e-5 nats a token), with two standard errors over the blocks")


# The rest -------------------------------------------------------------------------------------------------------------


def _public(options: argparse.Namespace) -> argparse.Namespace:
    """The options without this machine's paths: of folders their names."""
    folders, masters = ([Path(one).name for one in places] for places in (options.folders, options.masters))
    text_from = Path(options.text_from).name
    words = [*folders, *(["--masters", *masters] if masters else []), "--text-from", text_from]
    words += ["--blocks", str(options.blocks)]
    words += [] if options.context is None else ["--context", str(options.context)]
    said = {
        "folders": folders,
        "masters": masters,
        "text_from": text_from,
        "command": f"python benchmarks/accuracy/served.py {shlex.join(words)}",
        "device": torch.device("cpu"),
    }
    return argparse.Namespace(**vars(options) | said)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="EXPORTED", help="folders that lockstep exported")
    parser.add_argument("--masters", nargs="+", default=[], help="a folder of masters for each, or - for none")
    parser.add_argument("--text-from", default="installed", help="the study's corpus folder, or what is installed here")
    parser.add_argument("--blocks", type=int, default=32, help="how many, at least 2")
    parser.add_argument("--context", type=int, help="tokens in a block; default: the model's context, up to 1,024")
    parser.add_argument("--out", type=Path, help="folder for served_perplexity_cpu.json, .md and .png; without it none")
    options = parser.parse_args()
    if options.masters and len(options.masters) != len(options.folders):
        parser.error(f"{len(options.folders)} folders, {len(options.masters)} --masters: give one for each, or -.")
    if options.blocks < 2:
        parser.error(f"--blocks {options.blocks}: a standard error needs 2 or more.")
    return options


if __name__ == "__main__":
    main()

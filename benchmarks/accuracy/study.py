"""QAT, QAD and post-training quantization of one language model, measured on the same held-out text.

    python benchmarks/accuracy/study.py --size small              # 10 million parameters, two CPU cores
    python benchmarks/accuracy/study.py --size large --seconds 570  # 111 million parameters, every GPU there is

A run makes the corpus from the Python sources installed here, trains a model on them, trains it on for every row of
rows.py and every seed, and writes ``study.json``, its table and its page. With ``--seconds`` it begins no row
that would not end in time; run it again and it goes on where it stopped. Learning rates are chosen once for each way
of training, on INT4 with groups of 128, on packages that are not those of the test.
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import json
import logging
import math
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from harness import environment  # noqa: E402
from rows import FORMATS, Row  # noqa: E402
from table import table  # noqa: E402
from training import SIZES, Study, layers, sizes, unquantized_size  # noqa: E402

from lockstep import report  # noqa: E402
from lockstep.qat.prepare import quantized_modules  # noqa: E402

NOT_SHOWN = ("name", "seconds", "tokens", "lines")  # alike in all rows, or of use while it runs
SHARES = (0.5, 1.0)  # of the KL divergence in QAD's loss; all but the first are tried at the middle rate alone
CPU_WORKERS = 2


def main() -> int:
    """Run what is left of the study, on one worker for each GPU or on two for a CPU, and write the record."""
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    _quiet()
    deadline = time.time() + options.seconds
    if options.worker is not None:
        work(options, deadline)
        return 0
    if options.only_base:
        study = Study(options.out, size_of(options), options.device)
        cost = study.train_base(options.devices)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            write(options.out / "base.json", cost | {"devices": options.devices})
        return 0
    lock = (options.out / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise SystemExit(f"another run is at work in {options.out}: wait for it, or give another --out.") from None
    described_there = options.out / "size.json"
    if not described_there.exists():
        write(described_there, described(size_of(options)))
    elif json.loads(described_there.read_text()) != json.loads(json.dumps(described(size_of(options)))):
        raise SystemExit(f"{options.out} holds a study of another size: give another --out.")
    on_gpus = options.device == "cuda"
    devices = max(1, torch.cuda.device_count()) if on_gpus else 1
    arguments = [word for word in sys.argv[1:] if not word.startswith("--only")]
    Study(options.out, size_of(options), "cpu")  # makes the corpus once, before there are workers
    if not (options.out / "base.json").exists():
        _call([*arguments, "--only-base", "--devices", str(devices)])
    for claim in options.out.glob("rows/*.claimed"):  # of a run that was stopped
        claim.unlink()
    left = str(max(0.0, deadline - time.time()))
    numbers = range(devices if on_gpus else CPU_WORKERS)
    workers = [_start([*arguments, "--seconds", left, "--worker", str(number)]) for number in numbers]
    codes = [worker.wait() for worker in workers]
    record(options)
    return max(codes)


# Workers --------------------------------------------------------------------------------------------------------------


def work(options: argparse.Namespace, deadline: float) -> None:
    """Take one task after the other that nobody has taken, until none is left or none would end in time."""
    torch._dynamo.config.cache_size_limit = 64  # one compilation a scheme
    device = f"cuda:{options.worker}" if options.device == "cuda" else "cpu"
    if device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // CPU_WORKERS))
    study = Study(options.out, size_of(options), device)
    places = options.out / "rows"
    places.mkdir(exist_ok=True)
    for name, _, needs, run in sorted(tasks(options), key=lambda task: not _mine(task.format, options.worker)):
        done, claim = places / f"{name}.json", places / f"{name}.claimed"
        if done.exists() or (places / f"{name}.failed").exists() or not _claimed(claim):
            continue
        if done.exists():  # by now
            claim.unlink()
            continue
        if not _wait_for([places / f"{need}.json" for need in needs], deadline):
            claim.unlink()
            return
        if time.time() + _expected(places, name) > deadline:
            claim.unlink()
            continue
        started = time.time()
        try:
            found = run(study)
        except Exception as error:
            (places / f"{name}.failed").write_text(traceback.format_exc())
            print(f"[{options.worker}] {name} FAILED {type(error).__name__}: {str(error)[:300]}", flush=True)
        else:
            write(done, {"name": name, **found, "seconds": time.time() - started})
            told = found.get("perplexity", found.get("tune_perplexity"))
            print(f"[{options.worker}] {name}: {told:.4f} in {time.time() - started:.0f} s", flush=True)
        claim.unlink()
        gc.collect()
        if study.device.type == "cuda":
            torch.cuda.empty_cache()


class Task(NamedTuple):
    """One piece of work: what it is called, the format it trains (if any), what comes before it, what it does."""

    name: str
    format: str | None
    needs: list[str]
    run: Callable[[Study], dict[str, Any]]


def tasks(options: argparse.Namespace) -> list[Task]:
    """All there is to do, in order."""
    size = size_of(options)
    trials = {
        f"try {method} {rate:g} {share:g}": (method, rate, share)
        for method, share in (("bf16", 0.0), ("qat", 0.0), *(("qad", share) for share in SHARES))
        for rate in (size.rates[method] if share in (0.0, SHARES[0]) else size.rates[method][1:2])
        if options.tune and len(size.rates[method]) > 1
    }
    found = [Task("base", None, [], measure_base)]
    found += [Task(name, None, [], partial(attempt, trial=trial)) for name, trial in trials.items()]
    for row in size.rows(options.seeds):
        if row.format not in ("bf16", "NF4", *options.formats):
            continue
        plain = row.method == "bf16"
        for seed in range(row.seeds):
            needs = ["base", *trials] if plain else [f"bf16 same tokens {seed}"]
            run = partial(result, row=row, seed=seed)
            found.append(Task(f"{row.label} {seed}", None if plain else row.format, needs, run))
    return found


def _mine(format: str | None, worker: int) -> bool:
    """Whether the worker does it first: few formats are then compiled by more than one."""
    return format is None or (format == "INT4 g128") == (worker == 0)


def measure_base(study: Study) -> dict[str, Any]:
    """The model that all rows start from."""
    model = study.load(study.base)
    return {"label": "bf16, before", "format": "bf16", "method": "base", "seed": 0, **study.measure(model, writes=True)}


def attempt(study: Study, trial: tuple[Any, float, float]) -> dict[str, Any]:
    """One learning rate of one way to train, measured on the packages that are there to choose by."""
    method, rate, share = trial
    row = Row(method, "bf16" if method == "bf16" else "INT4 g128")
    model, cost = study.train(row, 1000, rate, share, None)
    return {"trial": trial, "tune_perplexity": study.perplexity_to_tune(model), **cost}


def chosen(study: Study, method: str) -> tuple[float, float]:
    """The learning rate and QAD's share of the KL divergence that did best, or the middle ones where none was tried."""
    rates = study.size.rates
    family = method if method in rates else "qat"
    trials = [json.loads(path.read_text()) for path in (study.folder / "rows").glob(f"try {family} *.json")]
    if not trials:
        return rates[family][len(rates[family]) // 2], SHARES[0]
    best = min(trials, key=lambda trial: trial["tune_perplexity"])["trial"]
    return best[1], best[2]


def result(study: Study, row: Row, seed: int) -> dict[str, Any]:
    """The record of one row and seed."""
    rate, share = chosen(study, row.method)
    saved = study.continued(seed) if row.method == "bf16" else None
    if row.method == "ptq":
        model, cost = study.rounded(row, seed)
    else:
        model, cost = study.train(row, seed, rate, share, saved)
    reference = study.load(study.continued(seed))
    found = study.measure(model, reference, writes=seed == 0)
    if row.method == "qad":
        cost["kl_share"] = share
    if row.method not in ("bf16", "frozen-grid", "qlora") and row.library != "hqq":
        found |= {**sizes(model), "layers": layers(model)}
        if seed == 0 and (row.method != "ptq" or (row.format == "INT4 g128" and row.library in ("gptq", "awq"))):
            found |= study.serve(model, row.label)
    elif row.method == "bf16":
        served = study.load(study.continued(seed), torch.bfloat16)
        found |= {**unquantized_size(model), "served_perplexity": study.perplexity(served)}
    return {
        "label": row.label,
        "scheme": scheme_of(model, row.format),
        "format": row.format,
        "method": row.library if row.method == "ptq" else row.method,
        "baseline": "bf16" if row.method == "bf16" else "rtn" if row.library == "rtn" else None,
        "seed": seed,
        **found,
        **cost,
    }


def scheme_of(model: Any, format: str) -> str:
    """The scheme that the layers have, such as a library's own scale rule; the format where there is none."""
    schemes = {str(layer.scheme) for _, layer in quantized_modules(model)}
    return ", ".join(sorted(schemes)) or format


# The record -----------------------------------------------------------------------------------------------------------


def record(options: argparse.Namespace) -> None:
    """``study.json`` of the rows that are done, its table ``study.md`` and its page ``study.html``."""
    found = [json.loads(path.read_text()) for path in sorted((options.out / "rows").glob("*.json"))]
    base = json.loads((options.out / "base.json").read_text())
    content = {
        "kind": "lockstep-study",
        "command": "python benchmarks/accuracy/study.py " + " ".join(_public(sys.argv[1:])),
        "environment": environment(torch.device(options.device)),
        "model": {
            **base,
            **described(size_of(options)),
            "corpus": json.loads((options.out / "corpus/facts.json").read_text()),
        },
        "trials": [one for one in found if "trial" in one],
        "rows": [{name: one[name] for name in one if name not in NOT_SHOWN} for one in found if "label" in one],
        "findings": at_an_edge(options, [one for one in found if "trial" in one]),
        "failed": sorted(path.stem for path in (options.out / "rows").glob("*.failed")),
    }
    write(options.out / "study.json", content)
    (options.out / "study.md").write_text(table(options.out / "study.json"))
    report.write([options.out / "study.json"], options.out / "study.html", "Which method when")
    print(f"{len(content['rows'])} rows, failed: {content['failed'] or 'none'}; written: {options.out / 'study.json'}")


def at_an_edge(options: argparse.Namespace, trials: list[dict[str, Any]]) -> list[str]:
    """A sentence for each way to train whose best learning rate is the lowest or the highest that was tried."""
    said = []
    for method, rates in size_of(options).rates.items():
        tried = [one for one in trials if one["trial"][0] == method]
        best = min(tried, key=lambda one: one["tune_perplexity"])["trial"][1] if tried else None
        if best in (min(rates), max(rates)) and len(rates) > 1:
            said.append(f"{method} did best at a learning rate of {best:g}, the end of what was tried.")
    return said


def write(path: Path, content: dict[str, Any]) -> None:
    """JSON, whole or not at all."""
    unfinished = path.with_suffix(".partial")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.replace(path)


# The rest -------------------------------------------------------------------------------------------------------------


def size_of(options: argparse.Namespace) -> Any:
    """The size, cut to `--share` of its steps and texts."""
    size = SIZES[options.size]
    cut = ("base_steps", "steps", "test_blocks", "prompts", "calibration", "max_bytes")
    return replace(size, **{name: math.ceil(getattr(size, name) * options.share) for name in cut})


def described(size: Any) -> dict[str, Any]:
    """The fields of a size that JSON holds."""
    return {name: value for name, value in vars(size).items() if name != "rows"}


def _expected(places: Path, name: str) -> float:
    """Seconds: what the same row took for another seed, or the longest that a row took so far."""
    took = {path.stem: json.loads(path.read_text())["seconds"] for path in places.glob("*.json")}
    alike = [seconds for other, seconds in took.items() if other.rpartition(" ")[0] == name.rpartition(" ")[0]]
    return max(alike or list(took.values()) or [0.0])


def _claimed(claim: Path) -> bool:
    try:
        claim.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _wait_for(paths: list[Path], deadline: float) -> bool:
    while not all(path.exists() for path in paths):
        if time.time() > deadline or any(path.with_suffix(".failed").exists() for path in paths):
            return False
        time.sleep(0.5)
    return True


def _start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(Path(__file__).resolve()), *arguments])


def _call(arguments: list[str]) -> None:
    if code := _start(arguments).wait():
        raise SystemExit(code)


def _public(arguments: list[str]) -> list[str]:
    """The command line without the folder, which is of this machine."""
    return [word for place, word in enumerate(arguments) if "--out" not in (word, *arguments[place - 1 : place])]


def _quiet() -> None:
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "torch._dynamo", "torch._inductor"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--seeds", type=int, default=3, help="of the trained rows")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing that would end later")
    parser.add_argument("--share", type=float, default=1.0, help="of the steps, for a trial of the script itself")
    parser.add_argument("--no-tune", dest="tune", action="store_false", help="take the middle learning rates")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name in ("--worker", "--devices"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--only-base", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

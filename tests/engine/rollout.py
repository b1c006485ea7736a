"""Live updates of vLLM on the CPU: a trainer and its engines in this process, and a trainer that is killed in its own.

Run by the engine's own Python (see `install.sh`), never by the package's:

    rollout.py OUTPUT_FOLDER            everything in one process; writes ``rollout.json``
    rollout.py OUTPUT_FOLDER rpc        the engine behind its RPC; writes ``rpc.json``

What is asserted of the results is in `test_rollout_engine.py`.
"""

from __future__ import annotations

import copy
import io
import json
import os
import queue
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import serve  # noqa: E402, F401  sets what vLLM reads when it is imported

# isort: split
import torch  # noqa: E402
from models import tiny_llama, tiny_moe  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import lockstep  # noqa: E402
from lockstep import Scheme, grid  # noqa: E402
from lockstep.align.metrics import token_logprobs  # noqa: E402
from lockstep.export import save_pretrained, stream  # noqa: E402
from lockstep.export.rollout import AuditError, RolloutSession, Sampling, checksum  # noqa: E402
from lockstep.export.rollout.vllm import WORKER, VLLMEngine  # noqa: E402
from lockstep.layouts import marlin as layout  # noqa: E402
from lockstep.qat import QATLinear  # noqa: E402

STEPS, LENGTH = 5, 128
PROMPTS = [list(range(2, 72)), [7 * n % 480 + 2 for n in range(1, 46)], [11 * n % 489 + 2 for n in range(1, 25)]]
G32 = Scheme.preset("W4A16", group_size=32)
# A vocabulary that does not fill vLLM's padding to 64 rows.
SIZES = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 500}

Result = dict[str, Any]
STARTED: list[Any] = []  # the end of one vLLM takes down the process groups of the others in the process


def build(seed: int = 0, tie: bool = False, bias: bool = True) -> Any:
    """An unprepared fp32 model with logits that lie apart, so that log-probabilities tell weights apart."""
    model = tiny_llama(torch.float32, seed, tie_word_embeddings=tie, attention_bias=bias, **SIZES)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    return model


def prepared(seed: int = 0, tie: bool = False, bias: bool = True) -> Any:
    model = build(seed, tie, bias)
    lockstep.prepare(model, G32, ignore=["lm_head"])
    return model


def start(folder: Path, **options: Any) -> Any:
    """vLLM with `folder` in it, with a prefix cache of small blocks."""
    import vllm

    defaults = {
        "model": str(folder),
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "seed": 0,
        "max_model_len": LENGTH,
        "generation_config": "vllm",
        "enable_prefix_caching": True,
        "block_size": 32,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 8 << 20,
        "use_tqdm_on_load": False,
        "distributed_executor_backend": "uni",
    }
    STARTED.append(vllm.LLM(**defaults | options))
    return STARTED[-1]


def fresh(model: Any, folder: Path, **options: Any) -> VLLMEngine:
    """An engine started from what `model` exports now."""
    return VLLMEngine(start(save_pretrained(model, folder, overwrite=True), **options))


def same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def gap(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Mean |log-probability difference|."""
    return (torch.cat(list(some)) - torch.cat(list(others))).abs().mean().item()


def message(call: Callable[[], object]) -> str:
    """The error that `call` ends in."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@torch.no_grad()
def trainer_logprobs(model: Any) -> list[Tensor]:
    """By the trainer's own forward: of fp32 masters under autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        rows = [torch.tensor(prompt) for prompt in PROMPTS]
        return [token_logprobs(model(input_ids=row[None]).logits[0, :-1].float(), row[1:]) for row in rows]


def step(model: Any, optimizer: torch.optim.Optimizer, number: int) -> None:
    rows = torch.randint(500, (4, 32), generator=torch.Generator().manual_seed(number))
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=rows, labels=rows).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def dequantized(model: Any) -> Any:
    """A plain copy of a prepared model that holds the weights it computes with."""
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for layer in plain.modules():
            if isinstance(layer, QATLinear):
                layer.weight.copy_(grid.dequantize(layer.quantize(), layer.scheme.weights))
    lockstep.unprepare(plain)
    return plain


def training(out: Path) -> Result:
    """Train, sync after each step, and compare with engines that start from what is exported then."""
    # Without biases, which the trainer adds as GPU kernels do: to the rounded output.
    model = prepared(bias=False)
    engine = fresh(prepared(1, bias=False), out / "other")
    session = RolloutSession(model, engine, bucket_size="20kB")
    trained = [p for name, p in model.named_parameters() if "embed" not in name and "layers.0.mlp" not in name]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    result: Result = {"start": engine.version, "syncs": [], "fresh": {}, "verified": []}
    for number in range(STEPS):
        step(model, optimizer, number)
        report = session.sync()
        seen = engine.logprobs(PROMPTS)
        result["syncs"].append(
            {
                "version": report.version,
                "engine": engine.version,
                "sent": report.sent,
                "skipped": report.skipped,
                "ours": gap(seen, trainer_logprobs(model)),
            }
        )
        result["verified"].append(str(session.verify()))
        if number in (0, STEPS - 1):
            result["fresh"][str(number)] = same(seen, fresh(model, out / f"step{number}").logprobs(PROMPTS))
    result["moved"] = gap(seen, fresh(prepared(1, bias=False), out / "other").logprobs(PROMPTS))
    result["audit"] = str(session.audit(out / f"step{STEPS - 1}"))
    nothing = session.sync()
    result["unchanged"] = [nothing.sent, nothing.skipped, same(seen, engine.logprobs(PROMPTS))]

    state = dequantized(model).to(torch.bfloat16).state_dict()
    weights = {name: engine.probe(name, torch.eye(k, dtype=torch.bfloat16)).T for name, k in inputs(engine).items()}
    result["read back"] = [name for name, weight in weights.items() if not torch.equal(weight, state[f"{name}.weight"])]
    build(bias=False).to(torch.bfloat16).save_pretrained(out / "plain")
    twin = VLLMEngine(start(out / "plain"))
    result["gap"] = {"fp32": gaps(model, session, twin)}
    narrow = model.to(torch.bfloat16)
    result["gap"]["bf16"] = gaps(narrow, session, twin)
    engine.abort_update()  # without one this does nothing
    result["after"] = engine.version
    return result


def gaps(model: Any, session: RolloutSession, twin: VLLMEngine) -> Result:
    """Of trainer and INT4 engine; of the two on one and the same plain weights (the floor); of the two engines.

    With fp32 masters the trainer's norms and its sums of residuals are wider than the engine's.
    """
    session.sync()
    assert session.engine is not None
    seen, plain = session.engine.logprobs(PROMPTS), dequantized(model)
    RolloutSession(plain, twin).sync()
    same_weights = twin.logprobs(PROMPTS)
    both = torch.cat(list(seen)) - torch.cat(same_weights)
    return {
        "trainer": gap(seen, trainer_logprobs(model)),
        "floor": gap(same_weights, trainer_logprobs(plain)),
        "engines": [both.abs().mean().item(), both.abs().max().item(), (both == 0).float().mean().item()],
    }


def inputs(engine: VLLMEngine) -> dict[str, int]:
    """The number of inputs of each live layer."""
    return {name: 256 if name.endswith("down_proj") else 128 for name in engine.live_layers()}


def plain_engine(out: Path) -> Result:
    """A bf16 engine takes the masters of a prepared model, or a model that never was prepared; ties are kept."""
    result: Result = {}
    for tie in (False, True):
        model = build(3, tie)
        build(4, tie).to(torch.bfloat16).save_pretrained(out / "plain")
        engine = VLLMEngine(start(out / "plain"))
        before = engine.logprobs(PROMPTS)
        session = RolloutSession(model, engine)
        session.sync()
        seen = engine.logprobs(PROMPTS)
        build(3, tie).to(torch.bfloat16).save_pretrained(out / "plain")
        same_as_fresh = same(seen, VLLMEngine(start(out / "plain")).logprobs(PROMPTS))
        result["tied" if tie else "untied"] = [engine.format, same_as_fresh, gap(before, seen), str(session.verify())]
    return result


def tied(out: Path) -> Result:
    """Tied embeddings, INT4 layers: the output layer must not go on with what it derived from the old ones."""
    engine = fresh(prepared(1, tie=True), out / "tied")
    model = prepared(2, tie=True)
    RolloutSession(model, engine).sync()
    seen = engine.logprobs(PROMPTS)
    return {"fresh": same(seen, fresh(model, out / "tied").logprobs(PROMPTS)), "layers": sorted(engine.live_layers())}


def experts(out: Path) -> Result:
    """Experts as they are on the CPU, bf16: sync and live layers."""
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "norm_topk_prob": True}
    tiny_moe("qwen3_moe", seed=1, **sizes).save_pretrained(out / "moe")
    engine, model = VLLMEngine(start(out / "moe")), tiny_moe("qwen3_moe", seed=2, **sizes)
    RolloutSession(model, engine).sync()
    model.save_pretrained(out / "moe")
    live, name = engine.live_layers(), "model.layers.1.mlp.experts.3.up_proj"
    seen = engine.logprobs(PROMPTS)
    return {
        "fresh": same(seen, VLLMEngine(start(out / "moe")).logprobs(PROMPTS)),
        "live": list(live[name]),
        "probe": message(lambda: engine.probe(name, torch.zeros(1, 128, dtype=torch.bfloat16))),
        "checksums": engine.checksums(),
        "half": half(engine, model),
    }


def half(engine: VLLMEngine, model: Any) -> str:
    """What ends an update that lacks one expert's projection."""
    tensors = {k: v for k, v in stream(model, "plain") if "layers.1.mlp.experts.3.up_proj" not in k}
    engine.begin_update(99)
    engine.load(tensors)
    found = message(engine.end_update)
    engine.abort_update()
    return found


def schemes(out: Path) -> Result:
    """Other schemes and formats: two syncs, live layers, audit, and the engine that starts from the same."""
    cases: dict[str, tuple[Scheme, str | None]] = {
        "W8A8": (Scheme.preset("W8A8"), None),
        "FP8_DYNAMIC": (Scheme.preset("FP8_DYNAMIC"), None),
        "W4A16_ASYM": (Scheme.preset("W4A16_ASYM", group_size=128), None),
        "W4A16 channel": (Scheme.preset("W4A16", strategy="channel"), None),
        "W4A16 gptq": (Scheme.preset("W4A16", group_size=128), "gptq"),
    }
    result = {}
    for name, (scheme, format) in cases.items():
        models = [build(seed) for seed in (1, 2, 3)]
        for model in models:
            lockstep.prepare(model, scheme, ignore=["lm_head"])
        first, *others = models
        folder = save_pretrained(first, out / name, format=format)
        engine = VLLMEngine(start(folder), format=format)
        for model in others:
            session = RolloutSession(model, engine)
            session.sync()
        save_pretrained(others[-1], folder, format=format, overwrite=True)
        fresh = VLLMEngine(start(folder), format=format).logprobs(PROMPTS)
        precision = engine.live_layers()["model.layers.1.self_attn.v_proj"].precision
        result[name] = [same(engine.logprobs(PROMPTS), fresh), precision == str(scheme), str(session.audit())]
    return result


class Faulty:
    """An engine that does something else with what it is sent, and says that it did not."""

    def __init__(self, engine: VLLMEngine, change: Callable[[dict[str, Tensor]], None]) -> None:
        self.engine, self.change = engine, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def load(self, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        changed = dict(tensors)
        self.change(changed)
        if changed:
            self.engine.load(changed)
        return {name: checksum(tensor) for name, tensor in tensors.items()}


def faults(out: Path) -> Result:
    """Planted faults, and what the audit and the checksums say of each."""
    llm, model = start(save_pretrained(prepared(1), out / "faults")), prepared(5)

    def drop(part: str) -> Callable[[dict[str, Tensor]], None]:
        return lambda tensors: [tensors.pop(name) for name in list(tensors) if part in name] and None

    def swap(tensors: dict[str, Tensor]) -> None:
        for suffix in ("weight_packed", "weight_scale"):
            k, v = (f"model.layers.1.self_attn.{one}_proj.{suffix}" for one in "kv")
            if k in tensors:
                tensors[k], tensors[v] = tensors[v], tensors[k]

    def rows(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.0.self_attn.o_proj.weight_packed"
        if name in tensors:
            tensors[name] = tensors[name].roll(1, 0)

    def groups(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.0.mlp.up_proj.weight_scale"
        if name in tensors:
            tensors[name] = tensors[name].roll(1, 1)

    planted: dict[str, tuple[str, Callable[[dict[str, Tensor]], None]]] = {
        "stale layer": ("model.layers.1.mlp.down_proj", drop("layers.1.mlp.down_proj")),
        "swapped layers": ("model.layers.1.self_attn.k_proj", swap),
        "swapped rows": ("model.layers.0.self_attn.o_proj", rows),
        "wrong groups": ("model.layers.0.mlp.up_proj", groups),
        "unsynced norm": ("model.layers.1.input_layernorm.weight", drop("layers.1.input_layernorm")),
        "unsynced embedding": ("model.embed_tokens.weight", drop("embed_tokens")),
    }
    result: Result = {}
    for fault, (guilty, change) in planted.items():
        session = RolloutSession(model, Faulty(VLLMEngine(llm), change))  # type: ignore[arg-type]
        try:
            session.sync()
            audit = "no error"
        except AuditError as error:
            audit = str(error)
        result[fault] = [guilty, audit, str(session.verify())]
        RolloutSession(prepared(1), VLLMEngine(llm)).sync()  # so that the next fault leaves stale weights again
    healthy = RolloutSession(model, VLLMEngine(llm))
    healthy.sync()
    result["none"] = ["", str(healthy.audit()), str(healthy.verify())]

    other = prepared(1)
    lockstep.unprepare(other)
    lockstep.prepare(other, G32, ignore=["lm_head", "re:.*layers.1.mlp.down_proj"])
    wide = VLLMEngine(start(save_pretrained(other, out / "wide")))
    guilty, session = "model.layers.1.mlp.down_proj", RolloutSession(model, wide)
    result["bf16 layer"] = [guilty, str(session.audit()), message(session.sync)]
    return result


def errors(out: Path) -> Result:
    """Updates that fail or stay half-done, and what heals them."""
    folder = save_pretrained(prepared(1), out / "errors")
    llm, model = start(folder), prepared(6)
    engine, tensors = VLLMEngine(llm), dict(stream(model))
    truth = fresh(model, out / "truth").logprobs(PROMPTS)
    old = engine.logprobs(PROMPTS)
    result: Result = {}

    def refused() -> list[str]:
        calls = (lambda: engine.logprobs(PROMPTS), lambda: engine.generate(PROMPTS, Sampling(max_tokens=1)))
        return [message(call) for call in calls]

    def update(change: Callable[[dict[str, Tensor]], object], size: int = 8) -> str:
        sent = dict(tensors)
        change(sent)

        def run() -> None:
            engine.begin_update((engine.version or 0) + 10)
            names = list(sent)
            for first in range(0, len(names), size):
                engine.load({name: sent[name] for name in names[first : first + size]})
            engine.end_update()

        return message(run)

    engine.begin_update(1)
    result["under way"] = refused()
    engine.abort_update()
    result["nothing came"] = [engine.version, same(old, engine.logprobs(PROMPTS))]

    cases: dict[str, Callable[[dict[str, Tensor]], object]] = {
        "shape": lambda t: t.update(
            {"model.layers.1.mlp.down_proj.weight_packed": torch.zeros(3, 3, dtype=torch.int32)}
        ),
        "unknown": lambda t: t.update({"model.layers.1.mlp.down_proj.nonsense": torch.zeros(3)}),
        "lacks a part": lambda t: [t.pop(k) for k in list(t) if "layers.0.self_attn.v_proj" in k],
        "lacks a scale": lambda t: t.pop("model.layers.0.mlp.up_proj.weight_scale"),
        "lacks a bias": lambda t: t.pop("model.layers.0.self_attn.q_proj.bias"),
    }
    for name, change in cases.items():
        said = update(change)
        engine.abort_update()
        answers = refused()
        partly = update(lambda t: [t.pop(k) for k in list(t) if "norm" in k])
        engine.abort_update()
        result[name] = [said, answers, partly, update(lambda t: None, 1), same(truth, engine.logprobs(PROMPTS))]
        RolloutSession(prepared(1), engine).sync()
    engine.begin_update(500)
    engine.load({name: tensors[name] for name in list(tensors)[:4]})
    result["twice"] = message(lambda: engine.load({name: tensors[name] for name in list(tensors)[:4]}))
    # Left as it is: the next update gives it up.
    result["left alone"] = [update(lambda t: None), same(truth, engine.logprobs(PROMPTS))]

    import vllm

    llm.enqueue([{"prompt_token_ids": PROMPTS[0]}], vllm.SamplingParams(max_tokens=4, detokenize=False), use_tqdm=False)
    result["in flight"] = message(lambda: engine.begin_update(900))
    llm.wait_for_completion(use_tqdm=False)
    result["then"] = [update(lambda t: None), same(truth, engine.logprobs(PROMPTS))]
    result["dummy"] = dummy(folder, model, truth)
    result["prefix cache"] = prefix_cache(model, llm)
    return result


def dummy(folder: Path, model: Any, truth: list[Tensor]) -> list[Any]:
    """An engine that was started without weights: unusable until the first sync."""
    engine = VLLMEngine(start(folder, load_format="dummy"))
    before = message(lambda: engine.logprobs(PROMPTS))
    RolloutSession(model, engine).sync()
    return [before, engine.version, same(truth, engine.logprobs(PROMPTS))]


def prefix_cache(model: Any, llm: Any) -> Result:
    """Greedy answers after a sync, with and without the reset of the cache; the prompts were cached before it."""
    sampling, engine = Sampling(max_tokens=4, temperature=0), VLLMEngine(llm)

    def answers() -> list[Tensor]:
        return [one.logprobs for one in engine.generate(PROMPTS, sampling)]

    RolloutSession(model, engine).sync()
    right = answers()
    RolloutSession(prepared(1), engine).sync()
    answers()
    RolloutSession(model, engine).sync()
    result = {"reset": same(right, answers())}
    RolloutSession(prepared(1), engine).sync()
    answers()
    llm.reset_prefix_cache, reset = lambda: True, llm.reset_prefix_cache
    RolloutSession(model, engine).sync()
    result["not reset"] = same(right, answers())
    llm.reset_prefix_cache = reset
    return result


def killed(out: Path) -> Result:
    """A trainer in another process that is killed while it sends; the engine lives here."""
    engine = fresh(prepared(1), out / "killed")
    truth = fresh(prepared(7), out / "truth").logprobs(PROMPTS)

    def receive(die_after: int) -> str:
        """Take an update from a trainer that kills itself after so many buckets; 0: that lives."""
        trainer = subprocess.Popen(
            [sys.executable, __file__, str(out), "trainer", str(die_after)], stdout=subprocess.PIPE
        )
        assert trainer.stdout is not None
        engine.begin_update((engine.version or 0) + 1)
        try:
            while size := struct.unpack("<q", trainer.stdout.read(8).rjust(8, b"\xff"))[0]:
                if size < 0:
                    raise EOFError("the trainer is gone")
                engine.load(torch.load(io.BytesIO(trainer.stdout.read(size))))
            engine.end_update()
        except EOFError:
            engine.abort_update()
        trainer.wait()
        return f"ended with {trainer.returncode}"

    result = {"killed": receive(2), "version": engine.version}
    result["refused"] = [message(lambda: engine.logprobs(PROMPTS))]
    result |= {"next": receive(0), "healed": same(truth, engine.logprobs(PROMPTS)), "after": engine.version}
    return result


def trainer(die_after: int) -> None:
    """Send buckets of a model to stdout, each after its size; a size of zero ends them."""
    model, bucket, sent = prepared(7), {}, 0
    pipe = os.fdopen(os.dup(1), "wb")
    for name, tensor in [*stream(model), ("", torch.zeros(0))]:
        if not name or len(bucket) >= 12:
            content = io.BytesIO()
            torch.save(bucket, content)
            pipe.write(struct.pack("<q", content.tell()) + content.getvalue())
            pipe.flush()
            bucket, sent = {}, sent + 1
            if sent == die_after:
                os.kill(os.getpid(), signal.SIGKILL)
        bucket[name] = tensor.clone()
    pipe.write(struct.pack("<q", 0))
    pipe.flush()


def sampling(out: Path) -> Result:
    """What the log-probabilities of sampled tokens mean."""
    model = prepared(8)
    folder = save_pretrained(model, out / "sampling")
    raw, processed = VLLMEngine(start(folder)), VLLMEngine(start(folder, logprobs_mode="processed_logprobs"))
    result: Result = {
        "raw": [message(lambda: raw.generate(PROMPTS, Sampling(max_tokens=1, temperature=0.7)))],
        "processed": [message(lambda: processed.generate(PROMPTS, Sampling(max_tokens=1, top_k=3)))],
    }
    cut = raw.generate(PROMPTS, Sampling(max_tokens=8, top_k=3, n=2, seed=1))
    again = raw.generate(PROMPTS, Sampling(max_tokens=8, top_k=3, n=2, seed=1))
    result["repeats"] = [one.tokens for one in cut] == [one.tokens for one in again]
    result["order"] = len({tuple(one.tokens) for one in cut})
    result["raw"].append(gap([one.logprobs for one in cut], scored(raw, cut, 2)))
    warm = processed.generate(PROMPTS, Sampling(max_tokens=8, temperature=0.5, n=2, seed=1))
    rows = [torch.tensor(PROMPTS[number // 2] + one.tokens) for number, one in enumerate(warm)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = [model(input_ids=row[None]).logits[0, -9:-1].float() for row in rows]
    at = [[token_logprobs(one / t, row[-8:]) for one, row in zip(logits, rows, strict=True)] for t in (0.5, 1.0)]
    result["processed"] += [gap([one.logprobs for one in warm], truth) for truth in at]
    [whole] = raw.generate(PROMPTS[:1], Sampling(max_tokens=8, seed=2))
    stop = whole.tokens[3]
    [stopped] = raw.generate(PROMPTS[:1], Sampling(max_tokens=8, seed=2, stop=(stop,)))
    end = whole.tokens.index(stop) + 1
    result["stop"] = [stopped.tokens == whole.tokens[:end], end, stopped.stopped, whole.stopped, len(stopped.logprobs)]
    return result


def scored(engine: VLLMEngine, answers: Sequence[Any], n: int) -> list[Tensor]:
    """The same answers' log-probabilities, asked for afterwards."""
    rows = [PROMPTS[number // n] + one.tokens for number, one in enumerate(answers)]
    return [one[-len(a.tokens) :] for one, a in zip(engine.logprobs(rows), answers, strict=True)]


class HandOver:
    """What stands between the two sides of vLLM's NCCL backend: here tensors go through a queue in this process."""

    tensors: queue.Queue[Tensor] = queue.Queue()

    def __init__(self, sends: bool) -> None:
        self.sends = sends

    def broadcast(self, tensor: Tensor, src: int, stream: Any) -> None:
        if self.sends:
            self.tensors.put(tensor.clone())
        else:
            tensor.copy_(self.tensors.get(timeout=60))

    def destroy(self) -> None: ...


def transfer(out: Path) -> Result:
    """vLLM's weight transfer by its NCCL backend, whose code runs on both sides; NCCL itself needs GPUs."""
    from vllm.config import WeightTransferConfig
    from vllm.distributed.weight_transfer import nccl_engine

    nccl_engine.open_trainer_endpoint = lambda *args, **kwargs: HandOver(sends=True)
    nccl_engine.worker_init_process_group = lambda *args, **kwargs: HandOver(sends=False)
    torch.cuda.current_stream = torch.accelerator.synchronize = lambda *args: None
    info = nccl_engine.NCCLTrainerInitInfo(
        master_address="127.0.0.1", master_port=1, world_size=2, rank=0, packed=False
    )
    folder, model = save_pretrained(prepared(1), out / "transfer"), prepared(9)
    result: Result = {"not configured": message(lambda: VLLMEngine(start(folder), transfer=info))}
    llm = start(folder, weight_transfer_config=WeightTransferConfig(backend="nccl"))
    engine = VLLMEngine(llm, transfer=info)
    session = RolloutSession(model, engine, bucket_size="20kB")
    report = session.sync()
    truth = fresh(model, out / "truth").logprobs(PROMPTS)
    result |= {"fresh": same(truth, engine.logprobs(PROMPTS)), "sent": report.sent, "verify": str(session.verify())}
    engine.begin_update(50)
    bad = {"model.layers.0.mlp.down_proj.weight_packed": torch.zeros(3, 3, dtype=torch.int32)}
    result["failed"] = message(lambda: engine.load(bad))
    engine.abort_update()
    result["refused"] = message(lambda: engine.logprobs(PROMPTS))
    engine.begin_update(51)
    engine.load(dict(stream(model)))
    engine.end_update()
    result["healed"] = same(truth, engine.logprobs(PROMPTS))
    return result


def marlin(out: Path) -> Result:
    """Kernel-format tensors against vLLM's own Python reference of the layout, in live modules that pose as Marlin's.

    No kernel runs: Marlin's needs a GPU. What is tested is which tensor goes where, fused in which order.
    """
    from vllm.model_executor.layers.quantization.utils import marlin_utils, marlin_utils_test
    from vllm.scalar_type import scalar_types

    llm = start(save_pretrained(prepared(1), out / "marlin"))
    result: Result = {"refused": message(lambda: VLLMEngine(llm, format="marlin"))}
    perm = marlin_utils_test.get_weight_perm(4)

    def reference(codes: Tensor, scale: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        n, k = codes.shape
        tensors = {
            "weight_packed": marlin_utils_test.marlin_weights((codes + 8).T.contiguous(), k, n, 4, perm),
            "weight_scale": marlin_utils.marlin_permute_scales(scale.T.contiguous(), k, n, 32),
        }
        return tensors if bias is None else tensors | {"bias": marlin_utils.marlin_permute_bias(bias)}

    class MarlinLinearKernel:
        """What is looked at of vLLM's kernel of that name."""

        w_q_name, w_s_name, w_zp_name = "weight_packed", "weight_scale", None
        config = SimpleNamespace(
            weight_type=scalar_types.uint4b8, group_size=32, zero_points=False, act_type=torch.bfloat16
        )

    fused = {
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.o_proj": ("self_attn.o_proj",),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down_proj": ("mlp.down_proj",),
    }

    def expected(model: Any) -> dict[str, Tensor]:
        found = {}
        for number in range(2):
            for module, names in fused.items():
                layers = [model.get_submodule(f"model.layers.{number}.{name}") for name in names]
                quantized = [layer.quantize() for layer in layers]
                biases = [layer.bias.detach().to(torch.bfloat16) for layer in layers if layer.bias is not None]
                bias = torch.cat(biases) if biases else None
                whole = reference(
                    torch.cat([q.codes for q in quantized]), torch.cat([q.scale for q in quantized]), bias
                )
                found |= {f"model.layers.{number}.{module}.{key}": value for key, value in whole.items()}
        return found

    [live] = llm.apply_model(lambda model: model)
    for name, tensor in expected(prepared(1)).items():
        module, _, leaf = name.rpartition(".")
        layer = live.get_submodule(module)
        layer.scheme.kernel = MarlinLinearKernel()
        setattr(layer, leaf, nn.Parameter(tensor.clone(), requires_grad=False))
    pointers = {name: parameter.data_ptr() for name, parameter in live.named_parameters()}
    engine, model = VLLMEngine(llm, format="marlin"), prepared(10)
    before = engine.checksums()
    result["read"] = before == {name: checksum(tensor) for name, tensor in stream(prepared(1), "marlin")}

    def send(leave_out: str = "") -> str:
        """A layer a bucket, the rest first."""
        sent = {k: v for k, v in stream(model, "marlin") if not leave_out or leave_out not in k}

        def run() -> None:
            engine.begin_update((engine.version or 0) + 1)
            engine.load({name: tensor for name, tensor in sent.items() if "layers." not in name})
            for number in range(2):
                engine.load({name: tensor for name, tensor in sent.items() if f"layers.{number}." in name})
            engine.end_update()

        said = message(run)
        engine.abort_update()
        return said

    engine.begin_update(1)
    result["nothing copied"] = [
        message(lambda: engine.load({k: v for k, v in stream(model, "marlin") if "k_proj" not in k}))
    ]
    engine.abort_update()
    result["nothing copied"] += [engine.version, engine.checksums() == before]
    result["lacks a part"] = [send("layers.1.self_attn.k_proj"), engine.version]
    result["unusable"] = message(lambda: engine.logprobs(PROMPTS))
    result["lacks a norm"] = [send("layers.0.input_layernorm"), engine.version]
    result["lacks a module"] = [send("layers.1.mlp"), engine.version]
    result["whole"] = [send(), engine.version]
    parameters = dict(live.named_parameters())
    result["wrong"] = [name for name, tensor in expected(model).items() if not torch.equal(parameters[name], tensor)]
    result["in place"] = pointers == {name: parameter.data_ptr() for name, parameter in parameters.items()}
    norm = "model.layers.0.input_layernorm.weight"
    result["plain"] = torch.equal(parameters[norm], dict(stream(model, "marlin"))[norm])
    result["checksums"] = engine.checksums() == {name: checksum(tensor) for name, tensor in stream(model, "marlin")}
    result["as pack-quantized"] = VLLMEngine(llm).checksums() == {n: checksum(t) for n, t in stream(model)}
    assert layout.TILE_N == 64
    return result


def rpc(out: Path) -> Result:
    """The engine in processes of its own."""
    folder, model = save_pretrained(prepared(1), out / "rpc"), prepared(11)
    llm = start(folder, worker_extension_cls=WORKER)
    engine = VLLMEngine(llm)
    session = RolloutSession(model, engine, bucket_size="20kB")
    result: Result = {"client": type(llm.llm_engine.engine_core).__name__, "sent": session.sync().sent}
    seen = engine.logprobs(PROMPTS)
    result["audit"] = [str(session.audit()), str(session.verify())]
    bad = Faulty(
        engine, lambda t: t.update({name: t[name][:3] for name in t if "layers.1.mlp.down_proj.weight_p" in name})
    )
    result["failed"] = message(RolloutSession(prepared(1), bad).sync)  # type: ignore[arg-type]
    result["refused"] = message(lambda: engine.logprobs(PROMPTS))
    session.sync()
    result["healed"] = same(seen, engine.logprobs(PROMPTS))
    result["live"] = list(engine.live_layers()["model.layers.0.self_attn.k_proj"])
    tensors = {f"{name}.weight_packed": torch.zeros(1, dtype=torch.int32) for name in ("a", "b")}
    result["vllm alone"] = message(
        lambda: llm.collective_rpc("reload_weights", kwargs={"weights_iterator": list(tensors.items())})
    )
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    result["fresh"] = same(seen, fresh(model, out / "rpc").logprobs(PROMPTS))
    return result


# The experts first: the first vLLM of a process decides whether there are groups for them.
SCENES = (experts, training, plain_engine, tied, schemes, faults, errors, killed, sampling, transfer, marlin)


def main() -> None:
    out, mode, *rest = [*sys.argv[1:], "all"] if len(sys.argv) == 2 else sys.argv[1:]
    if mode == "trainer":
        trainer(int(rest[0]))
        return
    if mode == "rpc":
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
        os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
        result = rpc(Path(out))
    else:
        result = {scene.__name__: scene(Path(out)) for scene in SCENES if not rest or scene.__name__ in rest}
    (Path(out) / f"{'rpc' if mode == 'rpc' else 'rollout'}.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

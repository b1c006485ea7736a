"""vLLM's adapter without vLLM: the state of updates, what crosses its RPC, what it says of live layers, and the words.

A stand-in has what is called of ``vllm.LLM``, by the same names and arguments; what it stands for is tested against the
real one in ``tests/engine/test_rollout_engine.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from models import grouped, prepared, tiny_llama
from torch import Tensor

from lockstep import Scheme
from lockstep.export import stream
from lockstep.export.config import quantization_config
from lockstep.export.rollout import EngineUnusable, Sampling, checksum
from lockstep.export.rollout.vllm import WORKER, VLLMEngine, logprobs_problem
from lockstep.export.rollout.vllm_layers import _cpu_codes
from lockstep.export.rollout.vllm_worker import WeightReceiver, from_wire, fuse_marlin, marlin_bias, to_wire
from lockstep.layouts import marlin

LIVE = {
    "module": "model.layers.0.mlp.down_proj",
    "rows": [0, 256],
    "kernel": "MarlinLinearKernel",
    "dtype": "bfloat16",
    "weights": ["int4", "group", 32, True],
    "inputs": None,
    "unknown": None,
    "stacked": False,
}


class Worker:
    """Stands in for `WeightReceiver` in its worker: as vLLM does, it writes over what it has as tensors come."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.live: dict[str, dict[str, Any]] = {"layer": LIVE}
        self.came = 0
        self.whole: list[bool] = []

    def lockstep_begin(self, whole: bool, format: str | None, transfer: bool) -> None:
        self.came = 0
        self.whole.append(whole)

    def lockstep_load(self, tensors: Any) -> dict[str, int]:
        named = tensors if isinstance(tensors, Mapping) else {name: from_wire(wire) for name, *wire in tensors}
        for name, tensor in named.items():
            if name == "bad":
                raise ValueError("bad is no tensor of ours")
            self.tensors[name] = tensor.clone()
            self.came += 1
        return {name: checksum(tensor) for name, tensor in named.items()}

    def lockstep_end(self, transfer: bool) -> None:
        if not self.came:
            raise RuntimeError("nothing came")

    def lockstep_abort(self, transfer: bool) -> bool:
        return not self.came

    def lockstep_live_layers(self) -> dict[str, dict[str, Any]]:
        return self.live

    def lockstep_probe(self, name: str, x: Any) -> Any:
        return list(to_wire(2 * (x if isinstance(x, Tensor) else from_wire(x))))

    def lockstep_checksums(self, format: str | None) -> dict[str, int]:
        return {name: checksum(tensor) for name, tensor in self.tensors.items()}


def plain(value: Any) -> bool:
    """Whether vLLM's RPC carries `value` as it is, without unpickling anything."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and plain(one) for key, one in value.items())
    if isinstance(value, list | tuple):
        return all(map(plain, value))
    return value is None or isinstance(value, bool | int | float | str | bytes)


class InprocClient:
    """vLLM's client of an engine in this process; the adapter goes by its name."""


class SyncMPClient:
    """And of one in its own."""


class LLM:
    """What the adapter calls of ``vllm.LLM``."""

    def __init__(self, in_process: bool = True, quantization: Any = "compressed-tensors", **changes: Any) -> None:
        self.worker, self.emptied, self.waiting, self.asked = Worker(), 0, 0, []
        self.extended = True
        config = {
            "model_config.quantization": quantization,
            "model_config.logprobs_mode": "raw_logprobs",
            "model_config.dtype": torch.bfloat16,
            "model_config.hf_config": SimpleNamespace(),
            "parallel_config.world_size": 1,
            "load_config.load_format": "auto",
            "lora_config": None,
            "weight_transfer_config": None,
        }
        root = SimpleNamespace()
        for path, value in (config | changes).items():
            *owners, leaf = path.split(".")
            owner = root
            for one in owners:
                if not hasattr(owner, one):
                    setattr(owner, one, SimpleNamespace())
                owner = getattr(owner, one)
            setattr(owner, leaf, value)
        self.llm_engine = SimpleNamespace(
            vllm_config=root,
            engine_core=InprocClient() if in_process else SyncMPClient(),
            get_num_unfinished_requests=lambda: self.waiting,
        )

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        if callable(method):
            assert isinstance(self.llm_engine.engine_core, InprocClient), "only in one process is nothing pickled"
            method = method.__name__
        else:
            if not self.extended:
                raise Exception(f"Call to collective_rpc method failed: no attribute {method!r}")
            assert plain(args), "vLLM passes plain data alone"
        assert hasattr(WeightReceiver, method)
        result = getattr(self.worker, method)(*args)
        assert isinstance(self.llm_engine.engine_core, InprocClient) or plain(result)
        return [result]

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        self.emptied += 1
        return not self.waiting

    def generate(self, prompts: list[dict[str, Any]], params: Any, *, use_tqdm: bool = True) -> list[Any]:
        self.asked.append(params)
        params = params if isinstance(params, list) else [params] * len(prompts)
        return [self.answer(prompt["prompt_token_ids"], one) for prompt, one in zip(prompts, params, strict=True)]

    @staticmethod
    def answer(tokens: list[int], params: Any) -> Any:
        def entry(token: int) -> dict[int, Any]:
            return {99: SimpleNamespace(logprob=-9.0), token: SimpleNamespace(logprob=-token / 4)}

        outputs = [
            SimpleNamespace(index=n, token_ids=[n, 3], logprobs=[entry(n), entry(3)], finish_reason="stop")
            for n in range(params.n)
        ]
        logprobs = [None, *(entry(token) for token in tokens[1:])]
        # vLLM promises no order of the answers.
        return SimpleNamespace(outputs=outputs[::-1], prompt_token_ids=tokens, prompt_logprobs=logprobs)


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    """A module with the one class that the adapter constructs, with the fields it sets."""

    @dataclass
    class SamplingParams:
        n: int = 1
        max_tokens: int | None = 16
        temperature: float = 1.0
        top_k: int = 0
        top_p: float = 1.0
        stop_token_ids: list[int] | None = None
        seed: int | None = None
        ignore_eos: bool = False
        logprobs: int | None = None
        prompt_logprobs: int | None = None
        detokenize: bool = True

    module = ModuleType("vllm")
    module.SamplingParams = SamplingParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)


def update(engine: VLLMEngine, version: int, **tensors: Tensor) -> None:
    engine.begin_update(version)
    engine.load(tensors)
    engine.end_update()


BOTH = pytest.mark.parametrize("in_process", [True, False], ids=["in process", "over the rpc"])


@BOTH
def test_every_tensor_of_a_stream_arrives_as_it_was_sent(in_process):
    llm = LLM(in_process)
    engine, sent = VLLMEngine(llm), dict(stream(prepared(tiny_llama(), grouped(32))))
    engine.begin_update(3)
    came = {}
    for name, tensor in sent.items():
        came |= engine.load({name: tensor})
    engine.end_update()
    assert came == engine.checksums() == {name: checksum(tensor) for name, tensor in sent.items()}
    assert all(torch.equal(llm.worker.tensors[name], tensor) for name, tensor in sent.items())
    assert (engine.version, llm.emptied, llm.worker.whole) == (3, 1, [False])


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.5, dtype=torch.bfloat16),
        torch.zeros(0, 4, dtype=torch.int32),
        torch.randn(3, 5)[:, ::2],
        torch.arange(6, dtype=torch.int64).view(2, 3).T,
        torch.tensor([-0.0, float("nan"), float("inf")], dtype=torch.float16),
        torch.randn(4).to(torch.float8_e4m3fn),
    ],
    ids=["scalar", "empty", "strided", "transposed", "special", "fp8"],
)
def test_a_tensor_crosses_as_plain_data(tensor):
    wire = to_wire(tensor)
    assert plain(wire)
    back = from_wire(list(wire))
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert checksum(back) == checksum(tensor)


@BOTH
def test_after_a_failed_update_only_a_whole_one_heals(in_process):
    llm = LLM(in_process)
    engine = VLLMEngine(llm)
    update(engine, 1, a=torch.ones(2))
    engine.begin_update(2)
    with pytest.raises(EngineUnusable, match="version 2 is on its way"):
        engine.logprobs([[1, 2]])
    with pytest.raises(ValueError, match="bad is no tensor"):
        engine.load({"a": torch.zeros(2), "bad": torch.ones(1)})
    assert engine.version is None
    engine.abort_update()
    assert engine.version is None
    for ask in (lambda: engine.logprobs([[1, 2]]), lambda: engine.generate([[1]], Sampling())):
        with pytest.raises(EngineUnusable, match="version 2 failed: bad is no tensor of ours"):
            ask()
    update(engine, 3, a=torch.zeros(2))
    assert engine.version == 3
    assert engine.logprobs([[1, 2]])[0].tolist() == [-0.5]
    assert llm.worker.whole == [False, False, True]


def test_an_update_that_brought_nothing_leaves_the_old_version():
    engine = VLLMEngine(LLM())
    update(engine, 1, a=torch.ones(2))
    engine.begin_update(2)
    engine.abort_update()
    assert engine.version == 1
    assert len(engine.logprobs([[1, 2]])) == 1
    engine.abort_update()  # there is none
    assert engine.version == 1


def test_an_update_left_alone_is_given_up_by_the_next():
    llm = LLM()
    engine = VLLMEngine(llm)
    engine.begin_update(1)
    engine.load({"a": torch.ones(2)})
    update(engine, 2, a=torch.zeros(2))
    assert (engine.version, llm.worker.whole) == (2, [False, True])


def test_an_update_that_cannot_end_leaves_no_version():
    llm = LLM()
    engine = VLLMEngine(llm)
    engine.begin_update(1)
    with pytest.raises(RuntimeError, match="nothing came"):
        engine.end_update()
    engine.abort_update()
    assert engine.version == 0
    engine.begin_update(1)
    engine.load({"a": torch.ones(2)})
    llm.waiting = 1  # somebody asked in between, and holds blocks of the cache
    with pytest.raises(RuntimeError, match="prefix cache cannot be emptied"):
        engine.end_update()
    with pytest.raises(EngineUnusable, match="prefix cache"):
        engine.generate([[1]], Sampling())


def test_requests_in_flight_keep_their_weights():
    llm = LLM()
    engine = VLLMEngine(llm)
    llm.waiting = 2
    with pytest.raises(RuntimeError, match="2 requests are in flight"):
        engine.begin_update(1)
    assert (engine.version, llm.worker.whole) == (0, [])


def test_without_an_update_nothing_is_loaded():
    engine = VLLMEngine(LLM())
    with pytest.raises(RuntimeError, match="no update is on its way"):
        engine.load({"a": torch.ones(1)})
    with pytest.raises(RuntimeError, match="no update is on its way"):
        engine.end_update()


def test_shapes_come_after_what_vllm_counts():
    llm = LLM()
    engine = VLLMEngine(llm)
    engine.begin_update(1)
    engine.load({f"{name}_proj.{what}": torch.ones(1) for name in "qk" for what in ("weight_shape", "weight_scale")})
    assert [*llm.worker.tensors] == [
        "q_proj.weight_scale",
        "k_proj.weight_scale",
        "q_proj.weight_shape",
        "k_proj.weight_shape",
    ]


@pytest.mark.parametrize(
    ("changes", "options", "reason"),
    [
        ({"parallel_config.world_size": 2}, {}, "runs on 2 workers"),
        ({"lora_config": object()}, {}, "enable_lora"),
        ({"model_config.logprobs_mode": "raw_logits"}, {}, "logprobs_mode='raw_logits'"),
        ({}, {"transfer": SimpleNamespace(backend="nccl")}, "WeightTransferConfig.backend='nccl'"),
        ({}, {"format": "plain"}, "quantization='compressed-tensors'"),
        ({"quantization": None}, {"format": "pack-quantized"}, "quantization=None"),
    ],
)
def test_an_engine_that_cannot_be_updated_is_refused(changes, options, reason):
    with pytest.raises(ValueError, match=reason):
        VLLMEngine(LLM(**changes), **options)


def test_a_worker_without_our_methods_is_refused_with_what_to_pass():
    llm = LLM(in_process=False)
    llm.extended = False
    with pytest.raises(ValueError, match=f"worker_extension_cls='{WORKER}'"):
        VLLMEngine(llm)
    module, _, name = WORKER.rpartition(".")
    assert getattr(sys.modules[module], name) is WeightReceiver


def test_an_engine_without_weights_has_no_version():
    engine = VLLMEngine(LLM(**{"load_config.load_format": "dummy"}))
    assert engine.version is None
    with pytest.raises(EngineUnusable, match="dummy"):
        engine.logprobs([[1, 2]])


def test_the_format_is_plain_where_the_engine_is_not_quantized():
    assert VLLMEngine(LLM(quantization=None)).format == "plain"
    assert VLLMEngine(LLM()).format is None


def test_kernel_format_goes_to_marlin_alone():
    llm = LLM()
    assert VLLMEngine(llm, format="marlin").format == "marlin"
    with pytest.raises(ValueError, match="cannot go by weight transfer"):
        VLLMEngine(LLM(weight_transfer_config=1), format="marlin", transfer=SimpleNamespace(backend="nccl"))
    for kernel in ("MacheteLinearKernel", "CPUWNA16LinearKernel"):
        llm.worker.live = {"one": LIVE, "two": LIVE | {"kernel": kernel}}
        with pytest.raises(ValueError, match=f"two runs in {kernel}: start vLLM with linear_backend='marlin'"):
            VLLMEngine(llm, format="marlin")
    llm.worker.live = {"one": LIVE, "two": LIVE | {"kernel": "UnquantizedLinearMethod", "weights": None}}
    VLLMEngine(llm, format="marlin")  # what is not quantized is copied as it is


SCHEMES = {
    "W4A16": Scheme.preset("W4A16", group_size=32, scale_rule="amax/7.5"),
    "W8A8": Scheme.preset("W8A8"),
    "FP8_DYNAMIC": Scheme.preset("FP8_DYNAMIC"),
}


@pytest.mark.parametrize("preset", SCHEMES)
def test_precision_is_that_of_the_live_objects_with_the_declared_rule(preset):
    scheme = SCHEMES[preset]
    entry = quantization_config(prepared(tiny_llama(), scheme))
    llm = LLM(**{"model_config.hf_config": SimpleNamespace(quantization_config=entry)})
    weights, inputs = scheme.weights, scheme.activations
    live = LIVE | {
        "weights": [weights.format, weights.strategy, weights.group_size, weights.symmetric],
        "inputs": inputs and [inputs.format, inputs.strategy, inputs.group_size, inputs.dynamic],
    }
    llm.worker.live = {
        "as declared": live,
        "plain": live | {"weights": None, "inputs": None},
        "other group": live | {"weights": ["int4", "group", 64, True], "inputs": None},
        "other dtype": live | {"dtype": "float16"},
        "odd": live | {"unknown": "int4 weights with 8-bit inputs"},
    }
    found = VLLMEngine(llm).live_layers()
    assert found["as declared"].precision == str(scheme)
    assert found["as declared"].rows == (0, 256)
    assert found["plain"].precision == "bfloat16"
    assert found["odd"].precision == "int4 weights with 8-bit inputs"
    assert "64" in found["other group"].precision
    assert "does not declare" in found["other group"].precision
    assert "float16" in found["other dtype"].precision
    assert "bfloat16" not in found["other dtype"].precision


@BOTH
def test_a_probe_comes_back_whole(in_process):
    llm, x = LLM(in_process), torch.randn(2, 3).to(torch.bfloat16)
    llm.worker.live["one of experts"] = LIVE | {"stacked": True}
    engine = VLLMEngine(llm)
    assert torch.equal(engine.probe("layer", x), 2 * x)
    with pytest.raises(NotImplementedError, match="one of experts: vLLM's kernel runs all experts of a block as one"):
        engine.probe("one of experts", x)
    with pytest.raises(ValueError, match="no linear layer other"):
        engine.probe("other", x)


def test_answers_come_in_the_prompts_order_with_their_own_logprobs():
    llm = LLM()
    found = VLLMEngine(llm).generate([[5, 6], [7]], Sampling(n=2, seed=10, stop=(4,), max_tokens=2))
    assert [one.tokens for one in found] == [[0, 3], [1, 3], [0, 3], [1, 3]]
    assert [one.logprobs.tolist() for one in found[:2]] == [[0.0, -0.75], [-0.25, -0.75]]
    assert found[0].logprobs.dtype == torch.float32
    assert {(one.version, one.stopped) for one in found} == {(0, True)}
    [params] = llm.asked
    assert {(one.n, one.stop_token_ids[0], one.ignore_eos, one.max_tokens) for one in params} == {(2, 4, True, 2)}


def test_no_two_prompts_of_any_two_seeds_sample_alike():
    """Of answer j vLLM adds j to the seed. A loop takes one seed a step."""
    llm = LLM()
    prompts, n = [[1]] * 8, 4
    for seed in range(16):
        VLLMEngine(llm).generate(prompts, Sampling(n=n, seed=seed))
    drawn = [one.seed + answer for params in llm.asked for one in params for answer in range(n)]
    assert len({*drawn}) == 16 * len(prompts) * n
    VLLMEngine(llm).generate(prompts, Sampling(n=n, seed=3))
    assert [one.seed for one in llm.asked[-1]] == [one.seed for one in llm.asked[3]]
    VLLMEngine(llm).generate(prompts, Sampling())
    assert {one.seed for one in llm.asked[-1]} == {None}


def test_an_engine_shows_the_config_of_its_model():
    llm = LLM()
    assert VLLMEngine(llm).config is llm.llm_engine.vllm_config.model_config.hf_config


def test_logprobs_are_those_of_every_token_but_the_first():
    found = VLLMEngine(LLM()).logprobs([[1, 2, 3], [4, 8]])
    assert [one.tolist() for one in found] == [[-0.5, -0.75], [-2.0]]


@pytest.mark.parametrize(
    ("sampling", "raw", "processed"),
    [
        (Sampling(), True, True),
        (Sampling(temperature=0), True, True),
        (Sampling(temperature=0, top_k=5), True, True),
        (Sampling(top_k=5), True, False),
        (Sampling(top_p=0.9), True, False),
        (Sampling(temperature=0.7), False, True),
        (Sampling(temperature=0.7, top_p=0.9), False, False),
    ],
)
def test_which_logprobs_vllm_can_give(sampling, raw, processed):
    assert (logprobs_problem(sampling, "raw_logprobs") is None) == raw
    assert (logprobs_problem(sampling, "processed_logprobs") is None) == processed
    if not raw:
        with pytest.raises(ValueError, match="raw_logprobs"):
            VLLMEngine(LLM()).generate([[1]], sampling)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("groups", [1, 4])
def test_fused_marlin_words_are_those_of_the_fused_codes(bits, groups):
    generator = torch.Generator().manual_seed(0)
    top = 2 ** (bits - 1)
    parts = [
        (torch.randint(-top, top, (n, 128), generator=generator).to(torch.int8), torch.rand(n, groups).bfloat16())
        for n in (128, 64, 192)
    ]
    fused = fuse_marlin([{"B": marlin.pack_weight(q, bits), "s": marlin.pack_scales(s)} for q, s in parts])
    codes, scales = (torch.cat(one) for one in zip(*parts, strict=True))
    assert torch.equal(fused["B"], marlin.pack_weight(codes, bits))
    assert torch.equal(fused["s"], marlin.pack_scales(scales))
    swapped = fuse_marlin([{"B": marlin.pack_weight(q, bits)} for q, _ in parts[::-1]])
    assert not torch.equal(swapped["B"], fused["B"])


def test_a_bias_is_permuted_as_the_scales_of_a_channel():
    """Within 32 outputs: threads hold 4 pairs, 8 apart (Marlin's epilogue)."""
    bias = torch.arange(64.0)
    expected = [
        32 * tile + 2 * i + j + 8 * k for tile in range(2) for i in range(4) for k in range(4) for j in range(2)
    ]
    assert marlin_bias(bias).tolist() == expected


def test_the_cpus_words_are_read_as_they_were_written():
    """vLLM's ``_process_gptq_weights_w4a16``: a word has 8 outputs of an input, a row 16 outputs of all inputs."""
    codes = torch.randint(-8, 8, (48, 64), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    blocks = []
    for block in codes.split(16):
        for k in range(64):
            for half in block[:, k].split(8):
                word = sum((int(code) + 8) << (4 * place) for place, code in enumerate(half))
                blocks.append(word - (word >> 31 << 32))
    packed = torch.tensor(blocks, dtype=torch.int64).to(torch.int32).view(3, 128)
    assert torch.equal(_cpu_codes(packed), codes)

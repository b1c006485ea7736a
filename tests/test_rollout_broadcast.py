"""Engines in other processes: what arrives there, and what happens when a side dies in the middle. Real processes."""

from __future__ import annotations

import ctypes
import itertools
import multiprocessing
import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.fsdp import fully_shard

import lockstep
from lockstep.export import ExportError, stream
from lockstep.export.rollout import AuditError, RolloutSession, broadcast_sync, wire
from lockstep.export.rollout.broadcast import AHEAD, BroadcastEngine
from lockstep.export.rollout.embedded import EmbeddedEngine
from lockstep.export.rollout.engine import Completion, EngineUnusable, LiveLayer, Sampling, checksum
from lockstep.export.rollout.link import EngineFailed, Link, Lost, TransferError, connect
from lockstep.export.rollout.serve import serve

LAYER = LiveLayer("model.qkv_proj", (0, 8), "int4", "reference")


class FakeEngine:
    """Keeps tensors; its answers show which. Goes back to the old version, or with `in_place` cannot."""

    format: str | None = "pack-quantized"
    partial = False

    def __init__(self, in_place: bool = False) -> None:
        self.in_place = in_place
        self.weights: dict[str, Tensor] = {}
        self.version: int | None = 0
        self._next = 0
        self._staged: dict[str, Tensor] | None = None

    def begin_update(self, version: int) -> None:
        self._next, self._staged = version, self.weights if self.in_place else {}
        self.version = None if self.in_place else self.version

    def load(self, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        assert self._staged is not None
        if "refused" in tensors:
            raise KeyError("there is no layer refused")
        self._staged |= {name: tensor.clone() for name, tensor in tensors.items()}
        return {name: checksum(self._staged[name]) for name in tensors}

    def end_update(self) -> None:
        assert self._staged is not None
        self.weights, self.version, self._staged = self._staged, self._next, None

    def abort_update(self) -> None:
        self._staged = None

    def checksums(self) -> dict[str, int] | None:
        return {name: checksum(tensor) for name, tensor in self.weights.items()}

    def live_layers(self) -> dict[str, LiveLayer]:
        return {"model.q_proj": LAYER}

    def probe(self, name: str, x: Tensor) -> Tensor:
        if name == "hidden":
            raise NotImplementedError("this engine does not show its layers")
        return x * 2

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        if self.version is None:
            raise EngineUnusable("a mixture")
        seed = -1 if sampling.seed is None else sampling.seed
        return [Completion([*prompt, seed], torch.tensor([0.5]), self.version, True) for prompt in prompts]

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        return [torch.tensor(one[1:], dtype=torch.float32) for one in sequences]


def tensors_of(version: int) -> dict[str, Tensor]:
    """Of every dtype that a checkpoint has, and the shapes that are easily got wrong."""
    draw = torch.Generator().manual_seed(version)
    words = torch.randint(-(2**31), 2**31 - 1, (33, 129), dtype=torch.int32, generator=draw)
    return {
        "packed": words,
        "scale": torch.randn(33, 5, generator=draw).bfloat16(),
        "shape": torch.tensor([33, 1032]),
        "fp8": torch.randn(7, 3, generator=draw).to(torch.float8_e4m3fn),
        "scalar": torch.randn((), generator=draw),
        "empty": torch.empty(0, 4),
        "mask": torch.rand(9, generator=draw) > 0.5,
        "transposed": torch.randn(64, 33, generator=draw).t(),
        "half": torch.randn(3, 1, 2, generator=draw).half(),
    }


def sync(engine: BroadcastEngine, version: int) -> dict[str, int]:
    """All tensors, in two loads."""
    sent, tensors = {}, tensors_of(version)
    engine.begin_update(version)
    for names in (list(tensors)[:3], list(tensors)[3:]):
        sent |= engine.load({name: tensors[name] for name in names})
    engine.end_update()
    return sent


def joined(address: str, rank: int, trainers: int = 1, engines: int = 1) -> Link:
    return connect(address, rank, trainers=trainers, engines=engines, timeout=3, wait=60)


def serving(address: str, rank: int, trainers: int = 1, engines: int = 1) -> None:
    serve(FakeEngine(), joined(address, rank, trainers, engines))


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def _child(log: Path, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        function(*arguments)
    except BaseException:
        log.write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)  # gloo's threads may abort a process that takes itself down


class Processes:
    """Processes of their own, forked from one that has imported everything, so that many are cheap."""

    def __init__(self, directory: Path) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        self._directory, self._running = directory, []  # type: ignore[var-annotated]

    def start(self, function: Callable[..., None], *arguments: Any) -> Any:
        log = self._directory / str(len(self._running))
        process = self._context.Process(target=_child, args=(log, function, arguments))
        process.start()
        self._running.append((process, log))
        return process

    def finish(self, *killed: Any) -> None:
        """Wait for all. AssertionError if one failed, or one of `killed` was not killed."""
        for process, log in self._running:
            process.join(120)
            expected = -signal.SIGKILL if process in killed else 0
            assert process.exitcode == expected, f"{process.exitcode}: {log.read_text() if log.exists() else 'no end'}"

    def kill(self) -> None:
        for process, _ in self._running:
            process.kill()


@pytest.fixture
def processes(tmp_path, monkeypatch):
    """Of which none outlives the test."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the process that is forked imports this module
    started = Processes(tmp_path)
    yield started
    started.kill()


# What arrives ---------------------------------------------------------------------------------------------------------


def trains(address: str) -> None:
    engine = BroadcastEngine(joined(address, 0, engines=2), bucket_size=1024)  # so that tensors span buckets
    assert (engine.format, engine.partial, engine.version) == ("pack-quantized", False, 0)
    for version in (1, 2):
        expected = {name: checksum(tensor) for name, tensor in tensors_of(version).items()}
        assert sync(engine, version) == expected
        assert (engine.version, engine.checksums()) == (version, expected)
    completions = engine.generate([[1], [2, 3], [4]], Sampling(seed=7))
    assert [one.tokens[:-1] for one in completions] == [[1], [2, 3], [4]]
    drawn = [[one.tokens[-1] for one in engine.generate([[1], [2]], Sampling(seed=seed))] for seed in (7, 8, 9, 7)]
    assert drawn[0] == drawn[3]
    assert len({seed for seeds in drawn[:3] for seed in seeds}) == 6  # no engine draws what another draws a step later
    assert [one.tokens for one in engine.generate([[1], [2]], Sampling())] == [[1, -1], [2, -1]]
    assert {(one.version, one.stopped, float(one.logprobs)) for one in completions} == {(2, True, 0.5)}
    assert [one.tolist() for one in engine.logprobs([[5, 6], [7, 8, 9], [1, 2]])] == [[6], [8, 9], [2]]
    assert len(engine.generate([[1]], Sampling())) == 1  # less prompts than engines
    assert engine.live_layers() == {"model.q_proj": LAYER}
    large = torch.randn(3, 1_000_000)  # more than the store takes in one value
    assert torch.equal(engine.probe("model.q_proj", large), large * 2)
    engine.stop()


def test_weights_and_answers_go_to_all_engines_and_back(processes):
    address = free_address()
    processes.start(trains, address)
    for rank in (1, 2):
        processes.start(serving, address, rank, 1, 2)
    processes.finish()


DTYPES = [torch.int32, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.int64]


@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 9), max_size=3)), max_size=6),
    st.integers(1, 8),
)
def test_any_tensors_survive_being_cut_into_buckets(kinds, bucket):
    """Two buffers are in turn on their way; what is read of one is right although it is filled again."""
    tensors = {
        str(number): torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(number)).to(dtype)
        for number, (dtype, shape) in enumerate(kinds)
    }
    heads, total = wire.layout(tensors)
    size, taken = bucket * wire.ALIGNMENT, itertools.cycle(torch.empty(2, bucket * wire.ALIGNMENT).byte())
    offsets = [offset for *_, offset in heads]
    parts = [part.clone() for _, part in wire.filled([*tensors.values()], offsets, total, size, lambda: next(taken))]
    flat = torch.cat([torch.empty(0, dtype=torch.uint8), *parts])
    assert flat.numel() == total
    assert all(part.numel() == size for part in parts[:-1])
    for name, shape, dtype, _, offset in heads:
        tensor = tensors[name]
        found = flat[offset : offset + tensor.nbytes].view(getattr(torch, dtype)).view(shape)
        assert checksum(found) == checksum(tensor)


# What is wrong is caught, and named -----------------------------------------------------------------------------------


def flips_a_bit(address: str) -> None:
    """An engine whose network turns one bit of the second load of version 1."""
    arrived, loads = wire.received, []

    def flipped(*arguments: Any) -> dict[str, Tensor]:
        tensors = arrived(*arguments)
        loads.append(1)
        if len(loads) == 2:
            tensors["fp8"].view(torch.uint8)[3, 1] ^= 1
        return tensors

    wire.received = flipped
    serving(address, 1)


def finds_the_flipped_bit(address: str) -> None:
    engine = BroadcastEngine(joined(address, 0))
    with pytest.raises(TransferError, match=r"engine 0 \(.*\): TransferError: fp8 arrived with other bits"):
        sync(engine, 1)
    with pytest.raises(TransferError, match="fp8"):  # and is not forgotten
        engine.end_update()
    assert engine.version == 0
    engine.abort_update()
    assert engine.version == 0
    sync(engine, 2)
    assert engine.version == 2
    engine.stop()


def test_a_bit_that_flips_on_the_way_is_found_and_its_tensor_named(processes):
    address = free_address()
    processes.start(finds_the_flipped_bit, address)
    processes.start(flips_a_bit, address)
    processes.finish()


def takes_when_told(address: str) -> None:
    """Takes the first load only when the trainer has done what comes after the second."""
    engine, link = FakeEngine(), joined(address, 1)
    load = engine.load

    def patient(tensors: Mapping[str, Tensor]) -> dict[str, int]:
        link.until(lambda: link.there("go on"), [0])
        return load(tensors)

    engine.load = patient  # type: ignore[method-assign]
    serve(engine, link)


def does_not_wait(address: str) -> None:
    engine = BroadcastEngine(joined(address, 0), bucket_size=1024)
    weight, sent = torch.empty(100), {}
    engine.begin_update(1)
    for number in range(AHEAD):
        sent |= engine.load({str(number): weight.fill_(number)})  # which may change when load returns
    assert engine.acknowledged == {}
    engine.link.put("go on", None)
    engine.end_update()
    assert engine.acknowledged == engine.checksums() == sent
    engine.stop()


def test_a_load_does_not_wait_for_the_engines(processes):
    """The trainer packs the next one meanwhile. At the end every answer has come."""
    address = free_address()
    processes.start(does_not_wait, address)
    processes.start(takes_when_told, address)
    processes.finish()


def has_no_memory(address: str) -> None:
    """For the bytes of the second load."""
    link, empty = joined(address, 1), torch.empty

    def full(*shape: Any, **options: Any) -> Tensor:
        if shape == (4096,):
            raise RuntimeError("out of memory")
        return empty(*shape, **options)

    torch.empty = full  # type: ignore[assignment]
    with pytest.raises(Lost):
        serve(FakeEngine(), link)


def is_told_so(address: str) -> None:
    engine = BroadcastEngine(joined(address, 0))
    engine.begin_update(1)
    with pytest.raises(Lost, match=r"engine 0 \(.*\): Lost: 4096 bytes .* could not be received: out of memory"):  # noqa: PT012
        engine.load({"small": torch.ones(1)})
        engine.load({"large": torch.ones(1024)})
        engine.end_update()
    with pytest.raises(EngineUnusable, match="out of memory"):
        engine.generate([[1]], Sampling())


def test_an_engine_that_has_no_memory_for_a_load_says_so(processes):
    address = free_address()
    processes.start(is_told_so, address)
    processes.start(has_no_memory, address)
    processes.finish()


def one_is_off(address: str, rank: int) -> None:
    """Two engines: the second takes, holds, runs and computes something else."""
    engine, link = FakeEngine(), joined(address, rank, engines=2)
    if rank == 2:
        load = engine.load

        def other(tensors: Mapping[str, Tensor]) -> dict[str, int]:
            return load({name: one + 1 if name == "scale" else one for name, one in tensors.items()})

        engine.load = other  # type: ignore[method-assign]
        engine.checksums = lambda: {"scale": 1}  # type: ignore[method-assign]
        engine.live_layers = lambda: {"model.q_proj": LAYER._replace(precision="bfloat16")}  # type: ignore
        engine.probe = lambda name, x: x * 3  # type: ignore[method-assign, assignment]
    serve(engine, link)


def finds_the_one(address: str) -> None:
    engine = BroadcastEngine(joined(address, 0, engines=2))
    with pytest.raises(EngineFailed, match=r"engine 1 \(.*\) took something else than was sent.*: scale\."):
        sync(engine, 1)
    engine.abort_update()
    with pytest.raises(EngineFailed, match=r"engine 1 .* holds something else than .*: scale\."):
        engine.checksums()
    with pytest.raises(EngineFailed, match=r"engine 1 .* runs something else than .*: model\.q_proj\."):
        engine.live_layers()
    with pytest.raises(EngineFailed, match=r"engine 1 .* computes model\.q_proj otherwise than engine 0"):
        engine.probe("model.q_proj", torch.ones(1, 2))
    engine.stop()


def test_an_engine_that_differs_from_the_others_is_named(processes):
    address = free_address()
    processes.start(finds_the_one, address)
    for rank in (1, 2):
        processes.start(one_is_off, address, rank)
    processes.finish()


def gets_errors(address: str) -> None:
    engine = BroadcastEngine(joined(address, 0))
    sync(engine, 1)
    engine.begin_update(2)
    for more in (0, 5):  # so the answer is read at the end, and between loads
        with pytest.raises(KeyError, match=r"engine 0 .*there is no layer refused"):  # noqa: PT012
            engine.load({"refused": torch.ones(1)})
            for number in range(more):
                engine.load({f"more.{number}": torch.ones(1)})
                assert number < AHEAD
            engine.end_update()
        engine.abort_update()
        engine.begin_update(2)
    engine.load({"refused": torch.ones(1)})
    engine.begin_update(3)  # what was under way is given up without a word
    assert engine.load({"more": torch.ones(1)}) == {"more": checksum(torch.ones(1))}
    engine.end_update()
    assert engine.acknowledged == engine.checksums() == {"more": checksum(torch.ones(1))}
    sync(engine, 1)
    with pytest.raises(NotImplementedError, match=r"engine 0 .*does not show its layers"):
        engine.probe("hidden", torch.ones(1))
    assert engine.version == 1
    assert engine.generate([[1]], Sampling())[0].version == 1
    engine.stop()


def test_an_engines_errors_arrive_as_what_they_are_and_end_nothing(processes):
    address = free_address()
    processes.start(gets_errors, address)
    processes.start(serving, address, 1)
    processes.finish()


# A side dies ----------------------------------------------------------------------------------------------------------


def dies_in_the_middle(address: str, when: str) -> None:
    """A trainer that has synced version 1 and is killed during version 2."""
    engine = BroadcastEngine(joined(address, 0))
    sync(engine, 1)
    if when == "on the wire":  # the engine has the header and waits for the bytes
        engine._send = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign, assignment]
    engine.begin_update(2)
    engine.load({"packed": tensors_of(2)["packed"]})
    os.kill(os.getpid(), signal.SIGKILL)


def outlives_its_trainer(address: str, next_address: str, in_place: bool) -> None:
    engine = FakeEngine(in_place)
    with pytest.raises(Lost):
        serve(engine, joined(address, 1))
    if in_place:
        assert engine.version is None
        with pytest.raises(EngineUnusable):
            engine.generate([[1]], Sampling())
    else:
        assert engine.version == 1
        assert engine.checksums() == {name: checksum(one) for name, one in tensors_of(1).items()}
    serve(engine, joined(next_address, 1))
    assert engine.checksums() == {name: checksum(one) for name, one in tensors_of(3).items()}


def comes_next(address: str, in_place: bool) -> None:
    """A new trainer, for the engine that was left."""
    engine = BroadcastEngine(joined(address, 0))
    assert engine.version == (None if in_place else 1)
    if in_place:
        with pytest.raises(EngineUnusable):
            engine.generate([[1]], Sampling())
    sync(engine, 3)
    assert engine.generate([[1]], Sampling())[0].version == 3
    engine.stop()


@pytest.mark.parametrize(("when", "in_place"), [("between loads", True), ("on the wire", False)])
def test_a_trainer_killed_in_an_update_leaves_no_mixture_and_the_next_one_heals_it(processes, when, in_place):
    address, next_address = free_address(), free_address()
    killed = processes.start(dies_in_the_middle, address, when)
    processes.start(outlives_its_trainer, address, next_address, in_place)
    processes.start(comes_next, next_address, in_place)
    processes.finish(killed)


def dies(address: str, rank: int, at: str) -> None:
    """The second of two engines is killed when it is asked to do `at`."""
    engine, link = FakeEngine(), joined(address, rank, engines=2)

    def killed(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    if link.rank == 2:
        setattr(engine, at, killed)
        serve(engine, link)
    with pytest.raises(Lost):
        serve(engine, link)
    assert engine.version == (0 if at in ("begin_update", "load") else 1)


def loses_an_engine(address: str) -> None:
    engine = BroadcastEngine(joined(address, 0, engines=2))

    def step() -> None:
        sync(engine, 1)
        engine.generate([[1], [2]], Sampling())

    with pytest.raises(Lost, match=r"engine 1 \(.*process \d+\) has given no sign of life for 3 s"):
        step()
    assert engine.version is None
    engine.abort_update()  # as a session does after an error: nothing is left to abort, and nothing hangs
    with pytest.raises(EngineUnusable, match=r"engine 1 .*Connect anew"):
        engine.begin_update(2)
    dist.TCPStore("localhost", int(address.split(":")[1]), is_master=True)  # the address is free for the next link


@pytest.mark.parametrize("at", ["begin_update", "load", "end_update", "generate"])
def test_a_killed_engine_is_named(processes, at):
    address = free_address()
    processes.start(loses_an_engine, address)
    processes.start(dies, address, 1, at)
    processes.finish(processes.start(dies, address, 2, at))


def test_who_does_not_come_is_not_waited_for_without_end():
    with pytest.raises(Lost, match="rank 0 could not join the others at localhost:"):
        connect(free_address(), 0, wait=0.5)


def test_ranks_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="rank 2 of 1 trainers and 1 engines: ranks are 0 to 1"):
        connect("localhost:1", 2)


def comes_twice(address: str) -> None:
    link = joined(address, 0)
    with pytest.raises(Lost, match=r"rank 0 could not join the others"):
        joined(address, 0)  # the address is taken
    store = dist.TCPStore("localhost", int(address.split(":")[1]), is_master=False)
    dist.TCPStore = lambda *_, **__: store  # type: ignore[assignment, misc]
    os.getpid = lambda: 12345
    with pytest.raises(Lost, match=r"rank 0 at localhost:\d+ is taken by .*process \d+"):
        joined(address, 0)
    with pytest.raises(ValueError, match="rank 0 is a trainer's"):
        serve(FakeEngine(), link)
    BroadcastEngine(link).stop()


def test_a_rank_is_taken_once(processes):
    address = free_address()
    processes.start(comes_twice, address)
    processes.start(serving, address, 1)
    processes.finish()


# Several trainer ranks ------------------------------------------------------------------------------------------------


def prepared() -> Any:
    model = models.tiny_llama(
        torch.float32, hidden_size=128, intermediate_size=256, num_attention_heads=2, vocab_size=64
    )
    lockstep.prepare(model, "W4A16")
    return model


def sharded_trains(address: str, own: str, rank: int, expected: dict[str, int]) -> None:
    """Each rank has half of every weight; they take turns in sending whole modules."""
    dist.init_process_group("gloo", init_method=f"tcp://{own}", rank=rank, world_size=2)
    model = prepared()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    engine = BroadcastEngine(joined(address, rank, trainers=2), bucket_size="4KB")
    sent, send = [], engine._send
    engine._send = lambda *arguments: (sent.append(1), send(*arguments))  # type: ignore[method-assign, func-returns-value]
    with pytest.raises(ValueError, match="connect with trainers=1, not 2"):
        broadcast_sync.sync(prepared(), engine, 1)
    assert broadcast_sync.sync(model, engine, 1) == expected
    assert len(sent) == [3, 2][rank]  # of embeddings, two blocks, norm and head
    assert engine.checksums() == expected
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(torch.nan)
    with pytest.raises(ExportError, match=r"model\.layers\.1\.mlp\.up_proj"):  # on the rank that sends, and the other
        broadcast_sync.sync(model, engine, 2)
    assert engine.version == 1
    assert engine.checksums() == expected
    assert [one.tokens for one in engine.generate([[1]], Sampling())] == [[1, -1]]  # on both ranks
    engine.stop()


def test_ranks_of_a_sharded_model_take_turns_in_sending(processes):
    """The engine holds what one process exports, bit for bit."""
    address, own = free_address(), free_address()
    expected = {name: checksum(tensor) for name, tensor in stream(prepared())}
    for rank in (0, 1):
        processes.start(sharded_trains, address, own, rank, expected)
    processes.start(serving, address, 2, 2)
    processes.finish()


# A session over it, and a real engine ---------------------------------------------------------------------------------

PROMPTS = [[1, 2, 3], [4, 5], [6]]


def session_trains(address: str) -> None:
    """The first sync audits the engines layer by layer, over the wire; later ones send what changed."""
    model, engine = prepared(), BroadcastEngine(joined(address, 0, engines=2))
    session = RolloutSession(model, engine, bucket_size="100KB")
    first = session.sync()
    assert first.skipped == 0
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    second = session.sync()
    assert 0 < second.sent < first.sent
    session.verify().assert_ok()
    here = EmbeddedEngine.from_model(model)
    RolloutSession(model, here).sync()
    sampling = Sampling(max_tokens=4, temperature=0.0)
    there = engine.generate(PROMPTS, sampling)
    assert [one.tokens for one in there] == [one.tokens for one in here.generate(PROMPTS, sampling)]
    assert {one.version for one in there} == {engine.version}
    for one, other in zip(engine.logprobs(PROMPTS), here.logprobs(PROMPTS), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)  # the batches differ
    engine.stop()


def serves_the_model(address: str, rank: int) -> None:
    serve(EmbeddedEngine.from_model(prepared()), joined(address, rank, engines=2))


def test_a_session_syncs_audits_and_samples_engines_elsewhere(processes):
    address = free_address()
    processes.start(session_trains, address)
    for rank in (1, 2):
        processes.start(serves_the_model, address, rank)
    processes.finish()


def serves_the_model_with_a_fault(address: str) -> None:
    """Its engine runs one layer with the words of another."""
    engine = EmbeddedEngine.from_model(prepared())
    probe = engine.probe

    def stale(name: str, x: Tensor) -> Tensor:
        return probe(name.replace("layers.1.mlp.up_proj", "layers.0.mlp.up_proj"), x)

    engine.probe = stale  # type: ignore[method-assign]
    serve(engine, joined(address, 1))


def audits_a_fault(address: str) -> None:
    engine = BroadcastEngine(joined(address, 0))
    with pytest.raises(AuditError) as caught:
        RolloutSession(prepared(), engine).sync()
    assert set(caught.value.problems) == {"model.layers.1.mlp.up_proj"}
    engine.stop()


def test_an_audit_over_the_wire_names_the_guilty_layer(processes):
    address = free_address()
    processes.start(audits_a_fault, address)
    processes.start(serves_the_model_with_a_fault, address)
    processes.finish()


# Memory ---------------------------------------------------------------------------------------------------------------


class Forgetful(FakeEngine):
    """Takes note of what came, and keeps nothing."""

    def load(self, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        return {name: checksum(tensor) for name, tensor in tensors.items()}


LOAD, LOADS = 4 * 2**20, 48


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def give_back_what_is_freed() -> None:
    """So that the peak is what was needed, and not what lies about in the heap."""
    mmap_threshold = -3
    assert ctypes.CDLL(None).mallopt(mmap_threshold, 1 << 16)


def receives_much(address: str) -> None:
    give_back_what_is_freed()
    link = joined(address, 1)
    take, floor = link.take, []

    def noted(*arguments: Any) -> Any:
        floor.append(peak())
        return take(*arguments)

    link.take = noted  # type: ignore[method-assign]
    serve(Forgetful(), link)
    assert floor[-1] - floor[LOADS // 3] < 8 * LOAD, [one - floor[0] for one in floor]


def sends_much(address: str) -> None:
    give_back_what_is_freed()
    engine = BroadcastEngine(joined(address, 0), bucket_size="1MB")
    weight = torch.zeros(LOAD // 2, dtype=torch.bfloat16)
    engine.begin_update(1)
    peaks = []
    for number in range(LOADS):
        engine.load({f"layer.{number}": weight.fill_(number)})
        peaks.append(peak())
    engine.end_update()
    engine.stop()
    assert peaks[-1] - peaks[LOADS // 3] < 8 * LOAD, [one - peaks[0] for one in peaks]


def test_memory_does_not_grow_with_the_model(processes):
    """What is needed is there after a third of 192 MiB; what leaks of a load would be there four times over by then."""
    address = free_address()
    processes.start(sends_much, address)
    processes.start(receives_much, address)
    processes.finish()

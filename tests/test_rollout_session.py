"""Live sync: what is trained lies in the engine, whole and bit for bit, and every planted fault is caught and named."""

from __future__ import annotations

import gc
import io
import itertools
import multiprocessing
import os
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from models import TinyMlp, channel, grouped, prepared, tiny_llama, tiny_moe, token_ids
from safetensors.torch import load_file
from torch import Tensor, nn

import lockstep
from lockstep import Rule, Scheme, grid
from lockstep.export import formats, save_pretrained, stream
from lockstep.export.rollout import AuditError, LiveLayer, RolloutSession, SyncError, checksum
from lockstep.export.rollout.buckets import Buckets, indivisible
from lockstep.export.rollout.embedded import EmbeddedEngine
from lockstep.export.rollout.probes import TOLERANCE
from lockstep.export.served import quantized_layers
from lockstep.grid import Quantized
from lockstep.kernels import reference
from lockstep.qat.prepare import quantized_modules, run_as_one
from lockstep.scheme import dtype_name

SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "vocab_size": 64}
Q, K, V = (f"model.layers.0.self_attn.{part}_proj" for part in "qkv")
DOWN = "model.layers.1.mlp.down_proj"
G32 = grouped(32)


def llama(scheme: str | Scheme | None = G32, dtype: torch.dtype = torch.bfloat16, **config: Any) -> Any:
    model = tiny_llama(dtype, **SMALL | config)
    return model if scheme is None else prepared(model, scheme)


class FakeEngine:
    """Stored tensors and reference kernels; what a method does wrong, a test plants by replacing it.

    `whole_abort`: it stages an update, so that an abort leaves the old version; else it writes over what it has.
    """

    def __init__(
        self, model: nn.Module, *, plain: bool = False, partial: bool = True, whole_abort: bool = True
    ) -> None:
        self.format, self.partial, self.whole_abort = "plain" if plain else None, partial, whole_abort
        self.schemes = {} if plain else {name: one.scheme for name, one in quantized_layers(model).items()}
        self.tensors: dict[str, Tensor] = {}
        self.staged: dict[str, Tensor] | None = None
        self.buckets: list[list[str]] = []
        self._version: int | None = 0
        self.tells = True  # its checksums

    @property
    def version(self) -> int | None:
        return self._version if self.staged is None else None

    def begin_update(self, version: int) -> None:
        assert self.staged is None
        self.staged, self.next, self.buckets = {}, version, []

    def load(self, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        assert self.staged is not None
        tensors = {name: self.transported(name, tensor.clone()) for name, tensor in tensors.items()}
        self.buckets.append([*tensors])
        taken = {name: tensor for name, tensor in tensors.items() if self.takes(name)}
        (self.staged if self.whole_abort else self.tensors).update(taken)
        return {name: checksum(tensor) for name, tensor in tensors.items()}

    def end_update(self) -> None:
        assert self.staged is not None
        self.tensors |= self.staged
        self.staged, self._version = None, self.next

    def abort_update(self) -> None:
        assert self.staged is not None
        self.staged = None
        if not self.whole_abort:
            self._version = None

    def checksums(self) -> dict[str, int] | None:
        return {name: checksum(tensor) for name, tensor in self.tensors.items()} if self.tells else None

    # What runs

    def linear_layers(self) -> list[str]:
        """Quantized ones, and plain ones that end as a Llama's do."""
        plain = [name.removesuffix(".weight") for name in self.tensors if name.endswith((".weight", ".q"))]
        return [*self.schemes, *(one for one in plain if one.endswith(("_proj", "lm_head", "first", "second")))]

    def live_layers(self) -> dict[str, LiveLayer]:
        live = {}
        for siblings in run_as_one(dict.fromkeys(self.linear_layers())):
            module, start = siblings[0].rpartition(".")[0] + ".fused" if len(siblings) > 1 else siblings[0], 0
            for name in sorted(siblings, key=self.place):
                weight = self.weight(name)
                n = len(weight.codes if isinstance(weight, Quantized) else weight)
                live[name] = LiveLayer(module, (start, start + n), self.precision(name), "reference")
                start += n
        return live

    @staticmethod
    def place(name: str) -> int:
        return "qkvgu".find(name.rpartition(".")[2][0])

    def precision(self, name: str) -> str:
        return str(self.schemes[name]) if name in self.schemes else dtype_name(self.weight(name).dtype)

    def probe(self, name: str, x: Tensor) -> Tensor:
        siblings = next(one for one in run_as_one(dict.fromkeys(self.linear_layers())) if name in one)
        fused = torch.cat([self.run(one, x) for one in self.stacked(sorted(siblings, key=self.place))], -1)
        return fused[:, slice(*self.live_layers()[name].rows)]

    def run(self, name: str, x: Tensor) -> Tensor:
        weight = self.weight(name)
        if isinstance(weight, Tensor):
            return F.linear(x, weight)
        return reference.linear(x, weight, self.schemes[name], None, self.tensors.get(f"{name}.input_scale"))

    def weight(self, name: str) -> Any:
        """What a layer multiplies with."""
        if name not in self.schemes:
            return self.tensors[f"{name}.weight"]
        scheme = self.schemes[name]
        layout = formats.find(self.format or formats.fitting(scheme)[0])
        stored = {suffix: self.tensors[f"{name}.{suffix}"] for suffix in layout.tensors(scheme.weights)}
        return layout.read(stored, scheme.weights)

    # What tests replace

    def transported(self, name: str, tensor: Tensor) -> Tensor:
        return tensor

    def takes(self, name: str) -> bool:
        return True

    def stacked(self, siblings: list[str]) -> list[str]:
        return siblings


def stored(model: nn.Module, format: str | None = None) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in stream(model, format)}


def assert_holds(engine: FakeEngine, model: nn.Module, format: str | None = None) -> None:
    """All bits of the trainer, no more and no less."""
    expected = stored(model, format)
    assert engine.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert engine.tensors[name].dtype == tensor.dtype, name
        assert torch.equal(engine.tensors[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name


@torch.no_grad()
def disturb(model: nn.Module, *names: str, seed: int = 1) -> None:
    """Train the weights whose names end so, or all."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not names or name.endswith(names):
            parameter.add_(torch.randn(parameter.shape, generator=random).to(parameter.dtype) * parameter.std())


def synced(model: nn.Module, **options: Any) -> tuple[FakeEngine, RolloutSession]:
    engine = FakeEngine(model, **options)
    session = RolloutSession(model, engine)
    session.sync()
    return engine, session


# A sync --------------------------------------------------------------------------------------------------------------


def test_every_bit_arrives_under_a_new_version_each_time():
    model = llama()
    engine = FakeEngine(model)
    session = RolloutSession(model, engine)
    assert session.version is None
    assert session.engine is engine
    for version in (1, 2, 3):
        report = session.sync()
        assert (report.version, session.version, engine.version) == (version, version, version)
        assert_holds(engine, model)
        assert report.checksums == {name: checksum(tensor) for name, tensor in engine.tensors.items()}
        assert session.verify().ok
        disturb(model)


def test_a_long_sync_shows_how_far_it_is_in_a_terminal_alone(monkeypatch):
    """An 8B model on a CPU takes a minute: silence looks like a hang, and a bar in a log file like noise."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return shown

    monkeypatch.setattr("lockstep.export.rollout.session.SHOW_AFTER", 0)
    for shown in (True, False):
        monkeypatch.setattr("sys.stderr", written := Terminal())
        model = llama()
        RolloutSession(model, FakeEngine(model)).sync()
        assert ("weights:" in written.getvalue()) == shown


def test_versions_go_on_from_what_the_engine_has():
    """An engine that a checkpoint's folder has made version 41."""
    model = llama()
    engine = FakeEngine(model)
    engine._version = 41
    assert RolloutSession(model, engine).sync().version == 42


def test_only_units_of_which_a_tensor_changed_are_sent():
    """A change of one of three fused projections sends all three, since an engine runs them as one."""
    model = llama()
    engine, session = synced(model)
    everything = len(engine.tensors)
    report = session.sync()
    assert (report.sent, report.skipped, report.bytes, report.version) == (0, everything, 0, 2)
    disturb(model, "layers.0.self_attn.k_proj.weight", "model.norm.weight")
    report = session.sync()
    sent = {name for bucket in engine.buckets for name in bucket}
    assert sent == {name for name in engine.tensors if name.startswith((Q, K, V))} | {"model.norm.weight"}
    assert (report.sent, report.skipped) == (len(sent), everything - len(sent))
    assert report.bytes == sum(engine.tensors[name].nbytes for name in sent)
    assert_holds(engine, model)


def test_a_change_that_moves_no_code_and_no_scale_is_not_sent():
    model = llama()
    engine, session = synced(model)
    with torch.no_grad():
        weight = model.get_submodule(DOWN).weight
        weight[0, 0] = weight[0, 0] * (1 + 2**-7) if weight[0, 0].abs() < weight[0, :32].abs().amax() / 8 else 0
    codes = quantized_layers(model)[DOWN].quantize().codes
    assert torch.equal(codes, engine.weight(DOWN).codes) == (session.sync().sent == 0)


@pytest.mark.parametrize(("engine_takes_parts", "only_changed"), [(False, True), (True, False)])
def test_everything_is_sent_to_an_engine_that_takes_no_part_and_when_asked(engine_takes_parts, only_changed):
    model = llama()
    engine = FakeEngine(model, partial=engine_takes_parts)
    session = RolloutSession(model, engine, only_changed=only_changed)
    counts = [(report.sent, report.skipped) for report in (session.sync(), session.sync())]
    assert counts == [(len(engine.tensors), 0)] * 2


def test_everything_is_sent_to_an_engine_that_somebody_else_has_updated():
    model, other = llama(), llama(seed=1)
    engine, session = synced(model)
    RolloutSession(other, engine).sync()
    report = session.sync()
    assert (report.skipped, report.version) == (0, 3)
    assert_holds(engine, model)


def test_another_engine_takes_another_session():
    model = llama()
    engine, session = synced(model)
    other = FakeEngine(model)
    other._version = engine.version  # of the same number, and it holds nothing
    with pytest.raises(AttributeError):
        session.engine = other
    assert session.engine is engine


def test_what_is_no_engine_no_scheme_or_no_model_is_refused_at_once():
    model = llama()
    with pytest.raises(TypeError, match=r"engine='vllm' has no begin_update, load.*VLLMEngine\(llm\)"):
        RolloutSession(model, "vllm")
    for scheme in (4, ["x"], []):
        with pytest.raises(TypeError, match=r"scheme=.*a scheme is a preset's name, a Scheme or a list of"):
            RolloutSession(llama(None), FakeEngine(model), scheme=scheme)

    class Policy(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

    with pytest.raises(TypeError, match=r"model is a LightningModule, Policy.*pass the model it holds"):
        RolloutSession(Policy(), FakeEngine(model))


def test_100_training_steps_with_a_sync_each_leave_the_same_bits_on_both_sides():
    model = prepared(TinyMlp(64), G32)
    engine = FakeEngine(model)
    session = RolloutSession(model, engine, bucket_size=6000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    random, skipped = torch.Generator().manual_seed(0), 0
    for step in range(100):
        skipped += session.sync().skipped
        assert session.verify().problems == {}, step
        assert_holds(engine, model)
        if step % 5 == 4:  # frozen for a while, as in LoRA: only some tensors change
            model.first.requires_grad_(not model.first.weight.requires_grad)
        x = torch.randn(8, 64, generator=random, dtype=torch.bfloat16)
        (model(x) - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert session.version == 100
    assert skipped > 100
    problems = session.audit().problems
    assert problems
    assert all("since the last sync: sync, then audit" in what for what in problems.values())
    session.sync()
    assert session.audit().ok


SCHEMES = ["W4A16", "W4A16_ASYM", "W8A16", "W8A8", "FP8_DYNAMIC", "NVFP4A16", "MXFP4A16", "FP8_BLOCK"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_arrives_and_passes_its_audit(scheme):
    model = llama(scheme, num_key_value_heads=4 if scheme == "FP8_BLOCK" else 2)
    engine, session = synced(model)
    assert_holds(engine, model)
    report = session.audit()
    assert report.ok
    assert report.checked == 15
    assert not report.skipped
    assert session.verify().checked == len(engine.tensors)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_mixtures_of_experts_arrive_a_block_at_a_time(kind):
    model = prepared(tiny_moe(kind), G32)
    engine = FakeEngine(model)
    session = RolloutSession(model, engine, bucket_size=1)
    session.sync()
    assert_holds(engine, model)
    blocks = [bucket for bucket in engine.buckets if any(".experts." in name for name in bucket)]
    assert len(blocks) == 2
    assert all(len(block) == 4 * 3 * 3 for block in blocks)


# Plain weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [tiny_llama, tiny_moe, lambda: tiny_llama(tie_word_embeddings=True)])
def test_plain_weights_are_those_that_transformers_saves(model, tmp_path):
    """Names, dtypes and bits; and the same of a prepared model."""
    model().save_pretrained(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    for one in (model(), prepared(model(), G32)):
        found = stored(one, "plain")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert all(found[name].dtype == expected[name].dtype for name in expected)


@pytest.mark.parametrize(
    ("dtype", "scheme", "served"),
    [
        (torch.float32, None, torch.bfloat16),
        (torch.float16, None, torch.float16),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float32, grouped(32, scale_dtype=torch.float16, served_dtype=torch.float16), torch.float16),
    ],
)
def test_plain_weights_are_in_the_served_dtype(dtype, scheme, served):
    model = llama(scheme, dtype)
    masters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    found = stored(model, "plain")
    assert {name: one.dtype for name, one in found.items()} == dict.fromkeys(masters, served)
    assert all(torch.equal(found[name], masters[name].to(served)) for name in masters)


def test_a_plain_engine_is_synced_verified_and_audited():
    model = llama()
    engine, session = synced(model, plain=True)
    assert_holds(engine, model, "plain")
    report = session.audit()
    assert report.ok
    assert report.checked == 15
    engine.tensors[f"{DOWN}.weight"] = engine.tensors[f"{DOWN}.weight"].flip(0)
    assert [*session.audit().problems] == [DOWN]
    assert [*session.verify().problems] == [f"{DOWN}.weight"]


# Quantized at the sync alone -----------------------------------------------------------------------------------------


def state_of(model: nn.Module) -> list[Any]:
    return [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()]


def test_a_scheme_quantizes_an_unprepared_model_for_the_time_of_a_sync():
    model, twin = llama(None), llama(G32)
    before, weights = state_of(model), {name: one.clone() for name, one in model.named_parameters()}
    engine = FakeEngine(twin)
    session = RolloutSession(model, engine, scheme=G32)
    session.sync()
    assert_holds(engine, twin)
    assert session.verify().ok
    assert session.audit().ok
    assert state_of(model) == before
    assert all(torch.equal(weights[name], one) for name, one in model.named_parameters())


def test_a_scheme_is_undone_after_errors_too():
    model = llama(None)
    before = state_of(model)
    engine = FakeEngine(llama(G32))
    session = RolloutSession(model, engine, scheme=G32)
    with torch.no_grad():
        model.get_submodule(DOWN).weight[3, 5] = torch.nan
    with pytest.raises(SyncError, match=rf"{DOWN}.*NaN"):
        session.sync()
    assert state_of(model) == before
    engine.load = failing_at(engine, 1)
    with torch.no_grad():
        model.get_submodule(DOWN).weight[3, 5] = 0
    with pytest.raises(SyncError):
        session.sync()
    assert state_of(model) == before


def test_a_preset_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="no preset 'W3'"):
        RolloutSession(llama(None), FakeEngine(llama(G32)), scheme="W3")


def test_a_scheme_is_refused_where_it_would_quantize_twice_or_for_nothing():
    model = llama()
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj is prepared"):
        RolloutSession(model, FakeEngine(model), scheme="W4A16")
    with pytest.raises(ValueError, match="plain weights"):
        RolloutSession(llama(None), FakeEngine(model, plain=True), scheme="W4A16")
    plain = llama(None)
    session = RolloutSession(plain, FakeEngine(model), scheme=G32)
    prepared(plain, G32)
    with pytest.raises(SyncError, match="is prepared"):
        session.sync()
    assert next(iter(quantized_layers(plain).values())).scheme == G32  # and still is


def test_an_unprepared_model_without_a_scheme_is_refused():
    with pytest.raises(SyncError, match=r"the model is not prepared: call lockstep\.prepare.*answers with version 0"):
        RolloutSession(llama(None), FakeEngine(llama())).sync()


# Failures ------------------------------------------------------------------------------------------------------------


def failing_at(engine: FakeEngine, number: int, error: BaseException | None = None) -> Callable[..., dict[str, int]]:
    """`engine.load`, which dies at a bucket in the middle of which it is; later it works again."""
    count, load = itertools.count(1), type(engine).load

    def broken(tensors: Mapping[str, Tensor]) -> dict[str, int]:
        if next(count) == number:
            load(engine, dict(itertools.islice(tensors.items(), max(1, len(tensors) // 2))))
            raise error or ConnectionError("the engine is gone")
        return load(engine, tensors)

    return broken


@pytest.mark.parametrize("whole_abort", [True, False])
@pytest.mark.parametrize("number", [1, 4, 12])
def test_an_engine_that_fails_in_the_middle_is_left_on_the_old_version_or_unusable(whole_abort, number):
    model = llama()
    engine = FakeEngine(model, whole_abort=whole_abort)
    session = RolloutSession(model, engine, bucket_size="8KB")
    session.sync()
    old = {name: tensor.clone() for name, tensor in engine.tensors.items()}
    disturb(model)
    engine.load = failing_at(engine, number)
    after = "answers with version 1" if whole_abort else "is unusable"
    with pytest.raises(SyncError, match=rf"version 2: the engine is gone.*{after}"):
        session.sync()
    assert engine.version == (1 if whole_abort else None)
    assert session.version == 1
    if whole_abort:
        assert all(torch.equal(old[name], tensor) for name, tensor in engine.tensors.items())
    disturb(model, DOWN + ".weight", seed=2)
    report = session.sync()
    assert (report.version, report.skipped) == (3, 0)  # no number is used twice, and nothing is assumed
    assert_holds(engine, model)


@pytest.mark.parametrize("method", ["begin_update", "end_update"])
def test_an_engine_that_fails_at_the_ends_of_an_update(method):
    model = llama()
    engine, session = synced(model)
    disturb(model, "model.norm.weight")

    def broken(*_: Any) -> None:
        raise RuntimeError("out of memory")

    setattr(engine, method, broken)
    with pytest.raises(SyncError, match=r"version 2: out of memory.*answers with version 1"):
        session.sync()
    delattr(engine, method)
    assert session.sync().skipped == 0
    assert_holds(engine, model)


def test_an_update_that_another_session_has_open_is_left_alone():
    model = llama()
    engine = EmbeddedEngine.from_model(model)
    mine = RolloutSession(model, engine)
    mine.sync()
    engine.begin_update(7)
    with pytest.raises(SyncError, match=r"version \d: version 7 is being loaded"):
        mine.sync()
    for name, tensor in stored(model).items():
        engine.load({name: tensor})
    engine.end_update()
    assert engine.version == 7
    assert mine.sync().version == 8


def test_an_engine_that_fails_after_its_update_has_begun_is_left_with_none_open():
    model = llama()
    engine, session = synced(model)

    def late(version: int) -> None:
        type(engine).begin_update(engine, version)
        raise ConnectionError("the second engine is gone")

    engine.begin_update = late
    with pytest.raises(SyncError, match=r"version 2: the second engine is gone.*answers with version 1"):
        session.sync()
    assert engine.staged is None


def test_an_interrupt_while_an_update_begins_leaves_none_open():
    model = llama()
    engine, session = synced(model)

    def interrupted(version: int) -> None:
        type(engine).begin_update(engine, version)
        raise KeyboardInterrupt

    engine.begin_update = interrupted
    with pytest.raises(KeyboardInterrupt):
        session.sync()
    assert (engine.staged, engine.version) == (None, 1)
    del engine.begin_update
    assert session.sync().skipped == 0


@pytest.mark.parametrize("name", [DOWN, "lm_head"])  # the last one's check is waited for at the end
def test_a_trainer_that_fails_in_the_middle_leaves_the_old_version(name):
    model = llama()
    engine, session = synced(model)
    with torch.no_grad():
        model.get_submodule(name).weight[3, 5] = torch.nan
    with pytest.raises(SyncError, match=rf"{name}.*NaN.*answers with version 1"):
        session.sync()
    assert engine.version == 1
    assert engine.staged is None


def test_a_trainer_that_is_interrupted_leaves_no_update_open():
    model = llama()
    engine, session = synced(model)
    disturb(model)
    engine.load = failing_at(engine, 1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        session.sync()
    assert engine.version == 1
    assert engine.staged is None
    del engine.load
    assert session.sync().skipped == 0


def test_an_engine_whose_abort_fails_too_is_not_trusted():
    model = llama()
    engine, session = synced(model, whole_abort=False)
    disturb(model)
    engine.load = failing_at(engine, 1)

    def abort() -> None:
        raise ConnectionError("no route to it")

    engine.abort_update = abort
    with pytest.raises(
        SyncError, match=r"engine is gone\. Its abort failed too: no route to it\. The engine is unusable"
    ):
        session.sync()


def test_an_engine_that_keeps_answering_with_another_version_is_found_out():
    model = llama()
    engine, session = synced(model)
    engine.end_update = lambda: setattr(engine, "staged", None)
    with pytest.raises(SyncError, match="taken version 2 and says 1"):
        session.sync()


def serve(connection: Any, model: nn.Module, dies_at: int) -> None:
    """An engine's process, which is killed in the middle of a load."""
    torch.set_num_threads(1)
    engine, loads = FakeEngine(model, whole_abort=False), 0
    while True:
        method, arguments = connection.recv()
        loads += method == "load"
        if loads == dies_at:
            engine.load(dict([*arguments[0].items()][:1]))
            os.kill(os.getpid(), 9)
        value = getattr(engine, method)
        connection.send(value(*arguments) if callable(value) else value)


class EngineProcess:
    """A `FakeEngine` in a process of its own."""

    format, partial = None, True

    def __init__(self, model: nn.Module, dies_at: int) -> None:
        context = multiprocessing.get_context("fork")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, model, dies_at), daemon=True)
        self.process.start()
        other.close()

    def ask(self, method: str, *arguments: Any) -> Any:
        self.connection.send((method, arguments))
        return self.connection.recv()

    @property
    def version(self) -> int | None:
        return self.ask("version")

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return lambda *arguments: self.ask(method, *arguments)


def test_an_engine_process_that_is_killed_in_the_middle_of_a_load():
    model = llama()
    engine = EngineProcess(model, dies_at=6)
    session = RolloutSession(model, engine, bucket_size="40KB")
    with pytest.raises(SyncError, match=r"version 1: .*does not say what it answers with.*take it as unusable"):
        session.sync()
    engine.process.join(10)
    assert engine.process.exitcode == -9
    assert session.version is None
    assert RolloutSession(model, FakeEngine(model)).sync().skipped == 0


@pytest.mark.parametrize("bit", [0, 77, -1])
def test_a_bit_that_flips_in_transport_is_named(bit):
    model = llama()
    engine, session = synced(model)
    disturb(model)

    def flipped(name: str, tensor: Tensor) -> Tensor:
        if name == f"{DOWN}.weight_packed":
            octets = tensor.view(-1).view(torch.uint8)
            octets[bit // 8] ^= 1 << bit % 8
        return tensor

    engine.transported = flipped
    with pytest.raises(SyncError, match=rf"{DOWN}.weight_packed did not arrive as it was sent.*version 1"):
        session.sync()
    assert engine.version == 1


def test_a_tensor_that_the_engine_does_not_answer_for_is_named():
    model = llama()
    engine, session = synced(model)
    disturb(model)
    load = engine.load
    engine.load = lambda tensors: {name: one for name, one in load(tensors).items() if name != "model.norm.weight"}
    with pytest.raises(SyncError, match=r"model.norm.weight was sent, and the engine does not say that it arrived"):
        session.sync()


# Planted faults, by verify -------------------------------------------------------------------------------------------


def test_verify_names_stale_missing_swapped_and_foreign_tensors():
    model = llama()
    engine, session = synced(model)
    stale, norm = f"{DOWN}.weight_packed", "model.layers.0.input_layernorm.weight"
    engine.takes = lambda name: name not in (stale, norm)
    disturb(model)
    session.sync()
    found = session.verify()
    assert {name: "version 1" in what and "stale" in what for name, what in found.problems.items()} == {
        stale: True,
        norm: True,
    }
    with pytest.raises(AuditError, match=stale):
        found.assert_ok()
    engine.takes = lambda name: True
    disturb(model)
    session.sync()
    assert session.verify().ok
    a, b = f"{Q}.weight_packed", "model.layers.1.self_attn.q_proj.weight_packed"
    engine.tensors[a], engine.tensors[b] = engine.tensors[b], engine.tensors[a]
    lost = engine.tensors.pop("model.embed_tokens.weight")
    engine.tensors["model.visual.weight"] = lost
    engine.tensors["lm_head.weight"][0, 0] += 1
    assert session.verify().problems == {
        a: f"the engine holds {b} in its place",
        b: f"the engine holds {a} in its place",
        "model.embed_tokens.weight": "the engine has no such tensor",
        "model.visual.weight": "the trainer has no such tensor",
        "lm_head.weight": "the engine holds other bits",
    }


def test_verify_after_a_step_says_that_a_sync_is_due():
    model = llama()
    _, session = synced(model)
    disturb(model, DOWN + ".weight")
    problems = session.verify().problems
    assert problems
    assert all(name.startswith(DOWN) and "changed it since: sync" in what for name, what in problems.items())


def test_what_verify_finds_wrong_is_sent_by_the_next_sync_and_no_more():
    model = llama()
    engine, session = synced(model)
    for _ in range(2):
        engine.tensors["model.norm.weight"][0] += 1
        engine.tensors.pop("model.embed_tokens.weight")
        assert session.verify().problems.keys() == {"model.norm.weight", "model.embed_tokens.weight"}
        assert session.sync().sent == 2
        assert_holds(engine, model)
    assert session.verify().ok


def test_an_audit_after_a_verify_still_knows_all_that_was_sent():
    model = llama()
    engine, session = synced(model)
    engine.tensors["model.norm.weight"][0] += 1
    assert [*session.verify().problems] == ["model.norm.weight"]
    for _ in range(2):
        assert [*session.audit().problems] == ["model.norm.weight"]


@pytest.mark.parametrize("tells", [False, True])
def test_what_an_audit_finds_wrong_is_healed_by_the_next_sync(tells):
    model = llama()
    engine, session = synced(model)
    engine.tells = tells
    engine.tensors[f"{DOWN}.weight_packed"][0, 0] ^= 1
    for _ in range(2):
        assert [*session.audit().problems] == [DOWN]
    assert session.sync().skipped == 0
    assert_holds(engine, model)
    assert session.audit().ok


def test_verify_of_an_engine_that_cannot_tell_is_no_success():
    model = llama()
    engine, session = synced(model)
    engine.tells = False
    with pytest.raises(AuditError, match="another layout"):
        session.verify()


# Planted faults, by audit: of engines that cannot tell their tensors --------------------------------------------------


def audit_of(model: nn.Module, plant: Callable[[FakeEngine], None], tells: bool = False) -> dict[str, str]:
    """What the first sync says of an engine with a fault."""
    engine = FakeEngine(model)
    engine.tells = tells
    plant(engine)
    with pytest.raises(AuditError) as error:
        RolloutSession(model, engine).sync()
    for name, what in error.value.problems.items():
        assert f"{name}: {what}" in str(error.value)
    return error.value.problems


def with_weight(fault: Callable[[FakeEngine, str, Any], Any], name: str = DOWN) -> Callable[[FakeEngine], None]:
    """An engine that makes another weight of one layer's words."""

    def plant(engine: FakeEngine) -> None:
        right = engine.weight
        engine.weight = lambda one: fault(engine, one, right(one)) if one == name else right(one)

    return plant


def regrouped(size: int) -> Callable[[FakeEngine, str, Quantized], Tensor]:
    def fault(engine: FakeEngine, name: str, weight: Quantized) -> Tensor:
        n, k = weight.codes.shape
        groups = torch.arange(k) // size
        scale = weight.scale.flatten()[(torch.arange(n)[:, None] * (k // size) + groups) % weight.scale.numel()]
        return (weight.codes.float() * scale.float()).to(torch.bfloat16)

    return fault


def some_groups_swapped(engine: FakeEngine, name: str, weight: Quantized) -> Quantized:
    order = [*range(weight.scale.shape[1])]
    order[1], order[5] = order[5], order[1]
    return weight._replace(scale=weight.scale[:, order])


def nibbles_swapped(engine: FakeEngine, name: str, weight: Quantized) -> Quantized:
    order = torch.tensor([1, 0]).repeat(weight.codes.shape[1] // 2) + torch.arange(weight.codes.shape[1]) // 2 * 2
    return weight._replace(codes=weight.codes[:, order])


def columns_and_scales(engine: FakeEngine, name: str, weight: Quantized) -> Tensor:
    served = grid.dequantize(weight, engine.schemes[name].weights)
    return served.roll(1, -1)


FAULTS: dict[str, tuple[Callable[..., Any], str]] = {
    "groups of 64": (regrouped(64), "groups of 64 where 32 are trained"),
    "one group": (regrouped(256), "groups of 256 where 32 are trained"),
    "groups of 16": (regrouped(16), "groups of 16 where 32 are trained"),
    "scales transposed": (
        lambda _, __, weight: weight._replace(scale=weight.scale.T.contiguous().view(weight.scale.shape)),
        "its scales lie transposed",
    ),
    "scales reversed": (lambda _, __, w: w._replace(scale=w.scale.flip(-1)), "reversed order of groups"),
    "two groups' scales swapped": (some_groups_swapped, "group 1 is multiplied by the scales of group 5"),
    "nibbles swapped": (nibbles_swapped, "its inputs are permuted: input "),
    "inputs rolled": (columns_and_scales, "its inputs are permuted"),
    "outputs reversed": (
        lambda _, __, weight: weight._replace(codes=weight.codes.flip(0), scale=weight.scale.flip(0)),
        "output 0 holds the weight of output 127",
    ),
    "another rounding of the scale": (
        lambda engine, name, w: (w.codes.float() * (w.scale.float() * (1 + 2**-9)).repeat_interleave(32, -1)).to(
            torch.bfloat16
        ),
        "near",
    ),
    "zeros": (lambda _, __, w: w._replace(codes=torch.zeros_like(w.codes)), "holds zeros: never synced"),
    "garbage": (lambda _, __, w: torch.full(w.codes.shape, torch.nan, dtype=torch.bfloat16), "NaN or infinite"),
    "one weight": (
        lambda engine, name, w: grid.dequantize(w, engine.schemes[name].weights).index_fill(0, torch.tensor([7]), 1.0),
        "most at output 7",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_audit_names_the_layer_with_a_wrong_layout_and_what_it_holds(fault):
    plant, words = FAULTS[fault]
    problems = audit_of(llama(intermediate_size=256), with_weight(plant))
    assert [*problems] == [DOWN]
    assert words in problems[DOWN]


def test_a_layer_that_runs_in_bf16_is_found_by_what_it_says_and_by_what_it_computes():
    model = llama()
    master = model.get_submodule(DOWN).weight.detach().clone()

    def says(engine: FakeEngine) -> None:
        with_weight(lambda *_: master)(engine)
        right = engine.precision
        engine.precision = lambda name: "bfloat16" if name == DOWN else right(name)

    problems = audit_of(model, says)
    assert [*problems] == [DOWN]
    assert "trains as int4 g32 amax/7 bfloat16, the engine runs it as bfloat16" in problems[DOWN]
    assert "runs the weight unquantized, in bfloat16" in problems[DOWN]
    problems = audit_of(model, with_weight(lambda *_: master))
    assert [*problems] == [DOWN]
    assert "runs the weight unquantized, in bfloat16" in problems[DOWN]


def test_a_plain_layer_that_runs_quantized_is_found():
    def plant(engine: FakeEngine) -> None:
        right = engine.precision
        engine.precision = lambda name: str(G32) if name == "lm_head" else right(name)

    problems = audit_of(llama(), plant)
    assert problems["lm_head"].startswith(f"trains as bfloat16, the engine runs it as {G32}")


def test_another_scheme_in_the_engine_is_found():
    """The classic: trained in groups of 128 and served in groups of 32."""
    model = llama(grouped(128))
    engine, words = FakeEngine(model), FakeEngine.weight

    def weight(name: str) -> Any:
        found = words(engine, name)
        return regrouped(32)(engine, name, found) if name in engine.schemes else found

    engine.weight = weight
    engine.precision = lambda name: str(G32) if name in engine.schemes else "bfloat16"
    with pytest.raises(AuditError) as error:
        RolloutSession(model, engine).sync()
    assert set(error.value.problems) == set(engine.schemes)
    assert "trains as int4 g128 amax/7 bfloat16, the engine runs it as int4 g32" in error.value.problems[DOWN]
    assert "it runs groups of 32 where 128 are trained" in error.value.problems[DOWN]


def swapped(a: str, b: str) -> Callable[[FakeEngine], None]:
    def plant(engine: FakeEngine) -> None:
        right = engine.weight
        engine.weight = lambda name: right({a: b, b: a}.get(name, name))

    return plant


def test_swapped_layers_are_both_named():
    other = DOWN.replace("1.mlp", "0.mlp")
    assert {name: what[: what.index(" (")] for name, what in audit_of(llama(), swapped(DOWN, other)).items()} == {
        DOWN: f"it holds the weight of {other}",
        other: f"it holds the weight of {DOWN}",
    }


@pytest.mark.parametrize("scheme", [G32, "W8A8"])
def test_swapped_experts_are_both_named(scheme):
    model = prepared(tiny_moe(), scheme)
    a, b = (f"model.layers.1.mlp.experts.{number}.down_proj" for number in (0, 2))
    problems = audit_of(model, swapped(a, b))
    assert {*problems} == {a, b}
    assert f"holds the weight of {b}" in problems[a]
    assert f"holds the weight of {a}" in problems[b]


@pytest.mark.parametrize("heads", [4, 2])
def test_rows_of_a_fused_module_that_lie_swapped_are_found_in_the_weights(heads):
    """With fewer key heads q's rows hold all of k's and the first of its own."""

    def plant(engine: FakeEngine) -> None:
        engine.stacked = lambda siblings: [siblings[1], siblings[0], *siblings[2:]] if Q in siblings else siblings

    problems = audit_of(llama(num_key_value_heads=heads), plant)
    assert {*problems} == {Q, K}
    if heads == 4:
        assert f"holds the weight of {K}" in problems[Q]
        assert f"holds the weight of {Q}" in problems[K]
    else:
        assert f"rows 0 to 63 hold rows 0 to 63 of {K}" in problems[Q]
        assert f"rows 0 to 63 hold rows 64 to 127 of {Q}" in problems[K]


def test_rows_of_a_fused_module_that_the_engine_says_are_swapped():
    def plant(engine: FakeEngine) -> None:
        right = engine.live_layers

        def swapped() -> dict[str, LiveLayer]:
            live = right()
            live[Q], live[K] = live[Q]._replace(rows=(64, 192)), live[K]._replace(rows=(0, 64))
            return live

        engine.live_layers = swapped

    problems = audit_of(llama(), plant)
    assert f"{Q} ends at 192: rows of a fused module are swapped" in problems[K]


def test_a_layer_that_the_engine_lacks_and_one_that_the_trainer_lacks_are_named():
    def plant(engine: FakeEngine) -> None:
        right = engine.live_layers
        engine.live_layers = lambda: {name.replace("1.mlp.down", "1.mlp.drown"): one for name, one in right().items()}

    assert audit_of(llama(), plant) == {
        DOWN: f"trains as {G32}, the engine runs no such layer",
        DOWN.replace("down", "drown"): f"the engine runs it as {G32}, the trainer has no such linear layer",
    }


def test_a_tensor_that_is_never_synced_is_named_at_the_first_sync():
    """A norm runs through no linear layer: the engine's own checksums tell."""

    def plant(engine: FakeEngine) -> None:
        norm = "model.layers.0.input_layernorm.weight"
        engine.tensors[norm] = torch.ones(128, dtype=torch.bfloat16)
        engine.takes = lambda name: name != norm

    problems = audit_of(llama(), plant, tells=True)
    assert problems == {"model.layers.0.input_layernorm.weight": "the engine holds other bits"}


@pytest.mark.parametrize("tells", [True, False])
def test_a_stale_layer_is_named_with_its_version(tells):
    model = llama()
    engine, session = synced(model)
    engine.tells = tells
    disturb(model)
    engine.takes = lambda name: not name.startswith(DOWN)
    session.sync()
    problems = session.audit().problems
    assert [*problems] == [DOWN]
    assert "stale: it holds the weight of version 1" in problems[DOWN]
    assert ("weight_packed: stale: the engine still holds that of version 1" in problems[DOWN]) == tells


@pytest.mark.parametrize("scheme", ["W8A8", "FP8_DYNAMIC"])
def test_layers_with_quantized_inputs_are_audited_by_a_dense_input(scheme):
    model = llama(scheme)
    other = DOWN.replace("1.mlp", "0.mlp")
    problems = audit_of(model, swapped(DOWN, other))
    assert {*problems} == {DOWN, other}
    assert f"holds the weight of {other}" in problems[DOWN]
    reverse = with_weight(lambda _, __, w: w._replace(scale=w.scale.flip(0)))
    problems = audit_of(model, reverse)
    assert [*problems] == [DOWN]
    assert "outputs are off" in problems[DOWN]
    master = model.get_submodule(DOWN).weight.detach().clone()
    problems = audit_of(model, with_weight(lambda *_: master))
    assert [*problems] == [DOWN], "a bf16 layer under the name of a quantized one"


def test_inputs_that_an_engine_quantizes_by_itself_are_found_by_the_dense_input():
    """Rows of the identity pass: ones and zeros are codes."""
    model = llama()

    def plant(engine: FakeEngine) -> None:
        engine.run = lambda name, x: FakeEngine.run(
            engine, name, x.to(torch.float8_e4m3fn).to(x.dtype) if name == DOWN else x
        )

    problems = audit_of(model, plant)
    assert [*problems] == [DOWN]
    assert "outputs are off" in problems[DOWN]


def test_what_another_order_of_additions_changes_is_no_problem():
    """An engine that adds up in fp64, and one that adds up eighths of the inputs in bf16."""
    for scheme in (G32, "W4A16"):
        model = llama(scheme, intermediate_size=512)
        for sums in (
            lambda x, w: F.linear(x.double(), w.double()).to(x.dtype),
            lambda x, w: sum(F.linear(a, b) for a, b in zip(x.chunk(8, -1), w.chunk(8, -1), strict=True)),
        ):
            engine = FakeEngine(model)
            engine.run = lambda name, x, engine=engine, sums=sums: sums(
                x,
                grid.dequantize(engine.weight(name), engine.schemes[name].weights)
                if name in engine.schemes
                else engine.weight(name),
            )
            assert RolloutSession(model, engine).sync().version == 1


def test_a_wrong_scale_of_one_output_is_more_than_that():
    def one_off(engine: FakeEngine, name: str, weight: Quantized) -> Quantized:
        scale = weight.scale.clone()
        scale[5] *= 1 + 4 * TOLERANCE
        return weight._replace(scale=scale)

    problems = audit_of(llama("W8A8"), with_weight(one_off))
    assert "1 of 128 outputs are off, most output 5" in problems[DOWN]


def test_the_folder_that_an_engine_was_started_from_is_compared(tmp_path):
    model = llama()
    _, session = synced(model)
    save_pretrained(model, tmp_path / "same")
    save_pretrained(llama(grouped(128)), tmp_path / "g128")
    save_pretrained(prepared(llama(None), [Rule(["re:.*mlp.*_proj"], G32)]), tmp_path / "mlp")
    llama(None).save_pretrained(tmp_path / "plain")
    assert session.audit(tmp_path / "same").ok
    found = session.audit(tmp_path / "g128").problems
    assert found.keys() == quantized_layers(model).keys()
    assert found[DOWN] == f"trains as {G32}, {tmp_path}/g128 declares {grouped(128)}"
    found = session.audit(tmp_path / "mlp").problems
    assert {*found} == {name for name in quantized_layers(model) if "self_attn" in name}
    assert found[Q] == f"trains as {G32}, {tmp_path}/mlp declares it as it is"
    assert session.audit(tmp_path / "plain").problems.keys() == quantized_layers(model).keys()


def test_a_recipe_of_several_schemes_agrees_with_its_config():
    recipe = [Rule(["re:.*down_proj"], "W8A16"), Rule(["re:.*self_attn.*"], None), Rule(["Linear"], G32)]
    model = prepared(llama(None), recipe)
    engine, session = synced(model)
    assert session.audit().ok
    assert {one.precision for one in engine.live_layers().values()} == {
        str(G32),
        str(Scheme.preset("W8A16")),
        "bfloat16",
    }


@pytest.mark.parametrize(("scheme", "format"), [(G32, "gptq"), (G32, "marlin"), ("FP8_BLOCK", "fp8")])
def test_engines_that_take_other_formats_are_audited_too(scheme, format):
    """Their configs say otherwise than compressed-tensors' which layers stay as they are."""
    model = llama(scheme, num_key_value_heads=4)
    engine = FakeEngine(model)
    engine.format = format
    session = RolloutSession(model, engine)
    session.sync()
    assert_holds(engine, model, format)
    assert session.audit().ok
    with_weight(lambda _, __, w: w._replace(codes=w.codes.view(torch.int8).flip(0).view(w.codes.dtype)))(engine)
    assert [*session.audit().problems] == [DOWN]


def test_adapters_are_merged_for_the_engine():
    peft = pytest.importorskip("peft")
    from lockstep.qat import lora

    def adapted() -> Any:
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        return lora.get_peft_model(prepared(llama(None), G32), config)

    torch.manual_seed(0)
    model = adapted()
    expected = stored(model)
    engine = FakeEngine(llama(G32))
    session = RolloutSession(model, engine)
    session.sync()
    assert engine.tensors.keys() == expected.keys() == stored(llama(G32)).keys()
    assert session.verify().ok
    assert session.audit().ok
    disturb(model, "layers.1.mlp.down_proj.lora_B.default.weight")
    session.sync()
    assert {name for bucket in engine.buckets for name in bucket} == {n for n in expected if n.startswith(DOWN)}
    plain = peft.get_peft_model(llama(None), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="adapters"):
        RolloutSession(plain, engine, scheme=G32)


@pytest.mark.parametrize("scheme", [*SCHEMES, "MXFP8A16", "MXFP4", channel()])
def test_a_wrong_layer_is_named_in_every_scheme(scheme):
    """Whatever its codes and scales are kept in."""
    model = llama(scheme, num_key_value_heads=4)
    problems = audit_of(model, lambda engine: setattr(engine, "run", twice(engine)))
    assert [*problems] == [DOWN]
    other = DOWN.replace("1.mlp", "0.mlp")
    problems = audit_of(model, swapped(DOWN, other))
    assert {*problems} == {DOWN, other}
    assert f"holds the weight of {other}" in problems[DOWN]


def twice(engine: FakeEngine) -> Callable[[str, Tensor], Tensor]:
    """`run`, with twice the outputs of one layer."""
    return lambda name, x: FakeEngine.run(engine, name, x) * (2 if name == DOWN else 1)


def test_every_guilty_layer_is_named_where_there_are_many():
    model = llama("W4A16", num_hidden_layers=6)
    engine, words = FakeEngine(model), FakeEngine.weight
    engine.weight = lambda name: (
        regrouped(32)(engine, name, words(engine, name)) if name in engine.schemes else words(engine, name)
    )
    with pytest.raises(AuditError) as error:
        RolloutSession(model, engine).sync()
    assert error.value.problems.keys() == quantized_layers(model).keys()
    assert sum("groups of 32" in what for what in error.value.problems.values()) == 32  # as many as are explained


def test_an_engine_that_does_not_run_single_layers_says_so():
    model = llama()
    engine = FakeEngine(model)

    def not_here(*_: Any) -> Any:
        raise NotImplementedError("over HTTP no layer can be called")

    engine.probe = not_here
    session = RolloutSession(model, engine)
    session.sync()
    report = session.audit()
    assert report.ok
    assert report.checked == 0
    assert report.skipped[DOWN] == "over HTTP no layer can be called"
    assert len(report.skipped) == 15
    engine.live_layers = not_here
    assert "live modules" in session.audit().skipped


def test_the_first_sync_after_a_failed_audit_audits_again():
    model = llama()
    engine = FakeEngine(model)
    with_weight(some_groups_swapped)(engine)
    session = RolloutSession(model, engine)
    for _ in range(2):
        with pytest.raises(AuditError, match=DOWN):
            session.sync()
        assert session.version is None
    del engine.weight
    assert session.sync().skipped == 0


@pytest.mark.filterwarnings("ignore:.*trains as W4A8")
def test_a_model_that_is_prepared_otherwise_is_audited_again():
    """W4A8 stores what W4A16 stores, and multiplies otherwise."""
    model = llama("W4A16")
    engine, session = synced(model)
    engine.tells = False
    audits, live = [], engine.live_layers
    engine.live_layers = lambda: audits.append(1) or live()
    session.sync()
    assert not audits
    lockstep.unprepare(model)
    prepared(model, "W4A8")
    for _ in range(2):
        with pytest.raises(AuditError, match=rf"{DOWN}: trains as .*the engine runs it as"):
            session.sync()
    engine.schemes = {name: one.scheme for name, one in quantized_layers(model).items()}
    assert session.sync().version == 5
    assert session.audit().ok


OTHERWISE = {
    "num_attention_heads is 2 in training and 4": {"num_attention_heads": 2, "head_dim": 64, "num_key_value_heads": 1},
    "rope_parameters is .*500": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "rms_norm_eps is 0.5 in training and 1e-0[56]": {"rms_norm_eps": 0.5},
    "hidden_act is gelu in training and silu": {"hidden_act": "gelu"},
}


@pytest.mark.parametrize("what", OTHERWISE)
def test_an_engine_of_another_architecture_with_the_same_tensors_is_found(what):
    other = llama(**OTHERWISE[what])
    with pytest.raises(AuditError, match=what) as error:
        RolloutSession(other, EmbeddedEngine.from_model(llama())).sync()
    assert [*error.value.problems] == ["config"]


def test_what_an_engine_adds_to_its_config_is_no_other_architecture():
    model = llama()
    engine, theirs = FakeEngine(model), model.config.to_dict() | {"max_position_embeddings": 7}
    theirs["rope_parameters"] = theirs["rope_parameters"] | {"an_engines_own": 1}
    engine.config = type(model.config).from_dict(theirs)
    RolloutSession(model, engine).sync()
    engine.config.rope_parameters["rope_theta"] += 1
    with pytest.raises(AuditError, match=r"config: rope_parameters is"):
        RolloutSession(model, engine).sync()


# Buckets -------------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=4), max_size=20), st.integers(1, 120))
def test_every_tensor_is_in_one_bucket_and_no_unit_is_broken(units, limit):
    buckets: list[dict[str, Tensor]] = []
    filling = Buckets(limit, buckets.append)
    named = [
        {f"{number}.{part}": torch.zeros(size, dtype=torch.uint8) for part, size in enumerate(unit)}
        for number, unit in enumerate(units)
    ]
    for unit in named:
        filling.add(unit)
    filling.flush()
    assert [name for bucket in buckets for name in bucket] == [name for unit in named for name in unit]
    for bucket in buckets:
        owners = {name.split(".")[0] for name in bucket}
        assert sum(tensor.nbytes for tensor in bucket.values()) <= limit or len(owners) == 1
        assert all(named[int(owner)].keys() <= bucket.keys() for owner in owners)


def test_a_bucket_is_sent_when_the_next_unit_does_not_fit_and_not_before():
    sent: list[list[str]] = []
    buckets = Buckets(10, lambda bucket: sent.append([*bucket]))
    for name, size in {"a": 4, "b": 6, "c": 1, "d": 30, "e": 1}.items():
        buckets.add({name: torch.zeros(size, dtype=torch.uint8)})
    assert sent == [["a", "b"], ["c"], ["d"]]
    buckets.add({"f": torch.zeros(1, dtype=torch.uint8)})
    buckets.flush()
    assert sent == [["a", "b"], ["c"], ["d"], ["e", "f"]]


def test_what_engines_run_as_one_is_one_unit_whatever_stands_between():
    names = ["embed", *(f"0.self_attn.{part}_proj" for part in "qokv"), "0.mlp.gate_proj", "0.norm", "0.mlp.up_proj"]
    experts = [f"1.mlp.experts.{number}.{part}" for number in (0, 1) for part in ("gate_proj", "up_proj", "w2")]
    others = ["1.mlp.shared_experts.up_proj", "2.mlp.experts.0.w2", "head"]
    assert indivisible([*names, *experts, *others]) == [
        ["embed"],
        ["0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj"],
        ["0.self_attn.o_proj"],
        ["0.mlp.gate_proj", "0.mlp.up_proj"],
        ["0.norm"],
        experts,
        ["1.mlp.shared_experts.up_proj"],
        ["2.mlp.experts.0.w2"],
        ["head"],
    ]


class OddOrder(nn.Module):
    """Projections that engines fuse, apart from one another in the state dict."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "o_proj", "k_proj", "norm", "v_proj"):
            module = nn.LayerNorm(64) if name == "norm" else nn.Linear(64, 64)
            self.add_module(name, module.to(torch.bfloat16))


def test_fused_projections_come_at_once_whatever_the_order_of_the_model():
    model = prepared(OddOrder(), G32)
    engine = FakeEngine(model)
    RolloutSession(model, engine, bucket_size=1).sync()
    owners = [{name.split(".")[0] for name in bucket} for bucket in engine.buckets]
    assert owners == [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"norm"}]
    assert_holds(engine, model)


def storages() -> dict[int, int]:
    """Address and size of all memory that tensors hold."""
    tensors = [one for one in gc.get_objects() if type(one) in (Tensor, nn.Parameter)]
    return {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("limit", [1, 60_000])
def test_what_is_alive_at_each_load_is_a_bucket_and_two_units(plain, limit):
    """No second copy of the model: beside it, of what was made for the engine."""
    model = llama(G32, torch.float32, num_hidden_layers=4)
    engine = FakeEngine(model, plain=plain)
    kept = {name: (one.nbytes, name) for name, one in stored(model, engine.format).items()}
    units = indivisible(dict.fromkeys(name.rpartition(".")[0] for name in kept))
    largest = max(sum(size for name, (size, _) in kept.items() if name.rpartition(".")[0] in unit) for unit in units)
    session, alive = RolloutSession(model, engine, bucket_size=limit), []
    session._audited = {name: layer.scheme for name, layer in quantized_modules(model)}
    engine.load = lambda tensors: (
        alive.append(sum(size for where, size in storages().items() if where not in before))
        or {name: checksum(tensor) for name, tensor in tensors.items()}
    )
    before = storages()
    gc.freeze()  # what is older is not looked through again
    try:
        session.sync()
    finally:
        gc.unfreeze()
    total = sum(size for size, _ in kept.values())
    assert len(alive) > 5
    assert largest + limit < total / 2
    # Two units that are quantized are beside the bucket: one that waits, and the next; what is cast, beside it too.
    assert max(alive) <= max(limit, largest) + 2 * largest + 10_000
    del session, engine


# Checksums -----------------------------------------------------------------------------------------------------------

KINDS = [torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.int32, torch.int64, torch.uint8, torch.bool]
KINDS += [torch.float8_e4m3fn, torch.float8_e8m0fnu]


def random_bits(shape: list[int], dtype: torch.dtype, seed: int) -> Tensor:
    octets = torch.randint(
        2 if dtype == torch.bool else 256,
        (*shape, dtype.itemsize),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(seed),
    )
    return octets.flatten().view(dtype).view(shape)


SHAPES = st.lists(st.integers(1, 9), max_size=3)


@given(SHAPES, st.sampled_from(KINDS), st.integers(0, 2**32), st.data())
def test_a_checksum_changes_with_any_single_bit(shape, dtype, seed, data):
    tensor = random_bits(shape, dtype, seed)
    other = tensor.clone()
    octets = other.view(-1).view(torch.uint8)
    place = data.draw(st.integers(0, octets.numel() - 1))
    octets[place] ^= 1 << (0 if dtype == torch.bool else data.draw(st.integers(0, 7)))
    assert checksum(tensor) != checksum(other)
    assert checksum(tensor) == checksum(tensor.clone())
    assert 0 <= checksum(tensor) < 2**64


@given(st.integers(2, 40), st.sampled_from(KINDS[:-2]), st.integers(0, 2**32), st.data())
def test_a_checksum_changes_with_the_order(length, dtype, seed, data):
    tensor = random_bits([length], dtype, seed)
    order = data.draw(st.permutations(range(length)))
    other = tensor[torch.tensor(order)]
    same = torch.equal(tensor.view(torch.uint8), other.view(torch.uint8))
    assert (checksum(tensor) == checksum(other)) == same


def test_a_checksum_changes_with_shape_and_dtype():
    tensor = torch.zeros(4, 6, dtype=torch.int16)
    views = [tensor, tensor.view(6, 4), tensor.view(24), tensor.view(1, 24), tensor.view(torch.bfloat16)]
    views += [tensor.view(torch.float16), tensor.view(4, 6, 1), tensor[:, :5], tensor.new_zeros(0), tensor[0, 0]]
    assert len({checksum(view) for view in views}) == len(views)


@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from(KINDS), st.integers(0, 2**32))
def test_a_checksum_is_of_the_values_and_not_of_where_they_lie(n, k, dtype, seed):
    tensor = random_bits([n, 2 * k], dtype, seed)
    for view in (tensor.T, tensor[:, ::2], tensor[:, k:], tensor[:1].expand(3, -1)):
        assert checksum(view) == checksum(view.clone(memory_format=torch.contiguous_format))


# Sharded models ------------------------------------------------------------------------------------------------------


def rank_script(function: str, **arguments: Any) -> str:
    return f"""
import torch, torch.distributed as dist
import test_rollout_session as tests
torch.set_num_threads(1)
dist.init_process_group("gloo")
tests.{function}(**{arguments!r})
dist.barrier()
print("done")
"""


def shard(model: Any, how: str) -> Any:
    if how == "zero3":
        import test_deepspeed

        return test_deepspeed.start(model, 3)
    import test_distributed

    return {"fsdp1": test_distributed.fsdp1, "fsdp2": test_distributed.fsdp2}[how](model)


def sharded_syncs(how: str) -> None:
    """In a rank: what comes of the shards is what comes of the whole model; and an error is one on all ranks."""
    rank = dist.get_rank()
    for make in (lambda: llama(G32, torch.float32), lambda: prepared(tiny_moe(dtype=torch.float32), G32)):
        whole, model = make(), shard(make(), how)
        engine = FakeEngine(whole) if rank == 0 else None
        session = RolloutSession(model, engine, bucket_size="30KB")
        report = session.sync()
        assert (report.version, session.version) == (1, 1)
        assert report.checksums == {name: checksum(tensor) for name, tensor in stream(whole)}
        assert session.verify().ok
        assert session.audit().ok
        assert session.sync().sent == 0
        if engine is not None:
            assert_holds(engine, whole)
            engine.tensors["model.norm.weight"] += 1
            with_weight(lambda _, __, w: w._replace(scale=w.scale.flip(-1)), Q)(engine)
        assert [*session.verify().problems] == ["model.norm.weight"]
        problems = session.audit().problems
        assert {*problems} == {"model.norm.weight", Q}
        assert "reversed order of groups" in problems[Q]

        if engine is not None:
            del engine.weight
            session._held = {}  # so that everything is sent
            engine.load = failing_at(engine, 2)
        with pytest.raises(SyncError, match=r"version 3: the engine is gone.*answers with version 2"):
            session.sync()
        assert session.version == 2
        report = session.sync()
        assert (report.version, report.skipped) == (4, 0)
        assert session.verify().ok


def fully_sharded() -> None:
    """In a rank, which takes longer to start than what it does."""
    sharded_syncs("fsdp2")
    sharded_syncs("fsdp1")
    refused_on_all_ranks()


def refused_on_all_ranks() -> None:
    """In a rank: of errors that one rank makes."""
    rank = dist.get_rank()
    whole, model = llama(G32, torch.float32), shard(llama(G32, torch.float32), "fsdp2")
    with pytest.raises(SyncError, match=r"ranks \[0, 1\] have an engine"):
        RolloutSession(model, FakeEngine(whole)).sync()
    with pytest.raises(SyncError, match=r"ranks \[\] have an engine"):
        RolloutSession(model, None).sync()
    with pytest.raises(SyncError, match="whole here"):
        RolloutSession(whole, None).sync()
    engine = FakeEngine(whole) if rank == 0 else None
    session = RolloutSession(model, engine)
    session.sync()
    if rank == 1:
        lockstep.unprepare(model)
    with pytest.raises(SyncError, match=r"rank 1 could not export.*not prepared|the model is not prepared"):
        session.sync()
    if rank == 1:
        prepared(model, G32)
    else:
        assert engine.version == 1
    assert session.sync().version == 2
    plain = shard(llama(None, torch.float32), "fsdp2")
    session = RolloutSession(plain, FakeEngine(whole) if rank == 0 else None, scheme=G32)
    assert session.sync().checksums == {name: checksum(tensor) for name, tensor in stream(whole)}
    assert session.verify().ok
    with pytest.raises(SyncError, match="the model is not prepared"):
        RolloutSession(plain, FakeEngine(whole) if rank == 0 else None).sync()
    session = RolloutSession(plain, FakeEngine(whole, plain=True) if rank == 0 else None)
    assert session.sync().checksums == {name: checksum(tensor) for name, tensor in stream(whole, "plain")}


def test_a_model_that_fsdp_shards_is_synced_by_all_ranks_and_an_error_on_one_is_one_on_all(tmp_path):
    assert all("done" in output for output in ranks.run(rank_script("fully_sharded"), tmp_path))


def test_a_model_that_zero3_shards_is_synced_by_all_ranks(tmp_path):
    pytest.importorskip("deepspeed")
    assert all("done" in output for output in ranks.run(rank_script("sharded_syncs", how="zero3"), tmp_path))


# With a true engine --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: llama(), lambda: prepared(tiny_moe(), G32), lambda: llama("FP8_DYNAMIC")])
def test_the_embedded_engine_is_synced_verified_and_audited(make):
    model = make()
    engine = EmbeddedEngine.from_model(model)
    session = RolloutSession(model, engine, bucket_size="50KB")
    for version in (1, 2, 3):
        assert session.sync().version == version == engine.version
        assert session.verify().problems == {}
        assert session.audit().problems == {}
        disturb(model, "down_proj.weight", "experts.down_proj", "norm.weight", seed=version)
    assert session.verify().problems


def test_the_embedded_engine_after_a_failure_answers_nothing_until_a_whole_sync():
    model = llama()
    engine = EmbeddedEngine.from_model(model)
    session = RolloutSession(model, engine, bucket_size="20KB")
    session.sync()
    before = engine.logprobs([token_ids(1).flatten().remainder(64).tolist()])[0]
    disturb(model)
    load, count = engine.load, itertools.count()

    def broken(tensors: Mapping[str, Tensor]) -> dict[str, int]:
        if next(count) == 3:
            raise MemoryError("no room")
        return load(tensors)

    engine.load = broken
    with pytest.raises(SyncError, match=r"version 2: no room\. The engine is unusable until a whole sync"):
        session.sync()
    assert session.sync().version == 3
    assert session.audit().ok
    after = engine.logprobs([token_ids(1).flatten().remainder(64).tolist()])[0]
    assert not torch.equal(before, after)


def test_a_layer_of_the_embedded_engine_that_somebody_writes_to_is_named():
    model = llama()
    engine = EmbeddedEngine.from_model(model)
    session = RolloutSession(model, engine)
    session.sync()
    words = next(tensor for tensor in engine.model.get_submodule(DOWN)._buffers.values() if tensor.dtype == torch.int32)
    words[0, 0] ^= 1
    assert [*session.verify().problems] == [f"{DOWN}.weight_packed"]
    assert [*session.audit().problems] == [DOWN]

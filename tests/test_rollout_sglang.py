"""The SGLang adapter against a stand-in: SGLang itself needs a GPU and does not run here.

The stand-in has the signatures of SGLang's ``Engine`` and does with weights what the code of 0.5.20 and 0.5.23 was read
to do: names that it does not know are passed over, experts are repacked in place and restored by a session, dense
packed layers have no loader.
"""

from __future__ import annotations

import base64
import inspect
import io
import json
import re
import sys
import threading
import zlib
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from torch import Tensor

import lockstep
from lockstep import Scheme
from lockstep.export import save_pretrained, stream
from lockstep.export.rollout import RolloutSession, SyncError, sglang
from lockstep.export.rollout.engine import EngineUnusable, Sampling, checksum
from lockstep.export.rollout.sglang import NotAuditable, NotReloadable, SGLangEngine
from lockstep.export.rollout.sglang_server import ServerError

# Of `sglang.Engine`, without annotations, as read from the wheels. `generate` has more, which are not used.
SIGNATURES = {
    "0.5.23": {
        "begin_weight_update": "(self, selector='all')",
        "end_weight_update": "(self)",
        "update_weights_from_tensor": "(self, named_tensors, load_format=None, flush_cache=True)",
        "get_weights_by_name": "(self, name, truncate_size=100)",
        "get_server_info": "(self)",
        "flush_cache": "(self)",
        "generate": "(self, prompt=None, sampling_params=None, input_ids=None, return_logprob=False, "
        "logprob_start_len=None)",
    }
}
SIGNATURES["0.5.20"] = {
    name: signature for name, signature in SIGNATURES["0.5.23"].items() if not name.endswith("_weight_update")
}

# What the adapter takes of an installed sglang: the bucket and the serializer, under SGLang's names and signatures.
INSTALLED = {
    "sglang/__init__.py": "",
    "sglang/srt/__init__.py": "",
    "sglang/srt/weight_sync/__init__.py": "",
    "sglang/srt/utils.py": """
import base64, io, torch
class MultiprocessingSerializer:
    @staticmethod
    def serialize(obj, output_str=False):
        buffer = io.BytesIO()
        torch.save(obj, buffer)
        return base64.b64encode(buffer.getvalue()).decode() if output_str else buffer.getvalue()
""",
    "sglang/srt/weight_sync/tensor_bucket.py": """
import torch
class FlattenedTensorBucket:
    supports_multi_dtypes = True
    def __init__(self, named_tensors=None, flattened_tensor=None, metadata=None):
        self.metadata, parts, start = [], [], 0
        for name, tensor in named_tensors:
            parts.append(tensor.flatten().view(torch.uint8))
            end = start + parts[-1].numel()
            self.metadata.append(dict(name=name, shape=tensor.shape, dtype=tensor.dtype, start_idx=start, end_idx=end))
            start = end
        self.flattened_tensor = torch.cat(parts)
    def get_flattened_tensor(self):
        return self.flattened_tensor
    def get_metadata(self):
        return self.metadata
""",
}


class OldEngine:
    """``sglang.Engine`` as of 0.5.20, with the weights of a folder."""

    version = "0.5.20"

    def __init__(self, folder: Any, weights: dict[str, Tensor], **info: Any) -> None:
        self.info = {"model_path": str(folder), "tp_size": 2, "version": self.version, "moe_runner_backend": "marlin"}
        self.info |= info
        self.live = {name: tensor.clone() for name, tensor in weights.items()}
        self.repacks = dict.fromkeys((name for name in weights if name.endswith("_packed")), 1)
        self.stamp: str = "default"
        self.flushed, self.busy = True, False
        self.requests: list[dict[str, Any]] = []

    def get_server_info(self):
        return self.info

    def update_weights_from_tensor(self, named_tensors, load_format=None, flush_cache=True):
        self.flushed = flush_cache
        tensors = dict(named_tensors) if load_format is None else opened(named_tensors, load_format)
        for name, tensor in tensors.items():
            if name in self.live:  # else "Parameter ... not found in params_dict", in the log
                self.live[name] = tensor.clone()
                if name in self.repacks:
                    self.repacks[name] = 0
        return True, "Success"

    def flush_cache(self):
        self.flushed = not self.busy
        return SimpleNamespace(success=not self.busy)

    def get_weights_by_name(self, name, truncate_size=100):
        return self.live[name].float().tolist()[:truncate_size] if self.live[name].is_floating_point() else None

    def generate(self, prompt=None, sampling_params=None, input_ids=None, return_logprob=False, logprob_start_len=None):
        assert self.flushed
        assert all(count == 1 for count in self.repacks.values()), "garbage: repacked twice, or not at all"
        self.requests.append({"input_ids": input_ids, "sampling_params": sampling_params})
        assert return_logprob
        parameters = sampling_params if isinstance(sampling_params, list) else [sampling_params] * len(input_ids)
        return [
            {
                "meta_info": {
                    "input_token_logprobs": [(None, ids[0], None), *((-float(one), one, None) for one in ids[1:])],
                    "output_token_logprobs": [(-0.25, 7, None)] * min(2, one["max_new_tokens"]),
                    "finish_reason": {"type": "stop" if one.get("stop_token_ids") else "length"},
                    "weight_version": self.stamp,
                }
            }
            for ids, one in zip(input_ids, parameters, strict=True)
        ]


class NewEngine(OldEngine):
    """``sglang.Engine`` as of 0.5.23: weights change within a session, at whose end everything is repacked."""

    version = "0.5.23"
    session = False

    def begin_weight_update(self, selector="all"):
        if self.session:
            return False, "a weight-update session is already open; call end_weight_update() first"
        self.session = True
        return True, "Success"

    def update_weights_from_tensor(self, named_tensors, load_format=None, flush_cache=True):
        if not self.session:
            return False, "update_weights_from_tensor must run between begin_weight_update() and end_weight_update()"
        return super().update_weights_from_tensor(named_tensors, load_format, flush_cache)

    def end_weight_update(self):
        for name in self.repacks:
            self.repacks[name] += 1
        self.session = False
        return True, "Success"


def opened(payload: list[str], load_format: str | None) -> dict[str, Tensor]:
    """The tensors of a flat bucket, as the server's second rank opens it."""
    assert load_format == "flattened_bucket"
    assert len(payload) == 2
    content = torch.load(io.BytesIO(base64.b64decode(payload[1])), weights_only=False)
    flat = content["flattened_tensor"]
    return {
        one["name"]: flat[one["start_idx"] : one["end_idx"]].clone().view(one["dtype"]).reshape(one["shape"])
        for one in content["metadata"]
    }


class Served:
    """An engine behind HTTP, with SGLang's endpoints."""

    def __init__(self, engine: OldEngine, *without: str, extra: tuple[str, ...] = ()) -> None:
        self.engine, self.paused, self.calls = engine, False, []  # type: ignore[var-annotated]
        self.paths = {
            "/server_info": lambda body: engine.info,
            "/pause_generation": lambda body: self.pause(True),
            "/continue_generation": lambda body: self.pause(False),
            "/update_weights_from_tensor": lambda body: self.checked(
                engine.update_weights_from_tensor(
                    body["serialized_named_tensors"], body["load_format"], body["flush_cache"]
                )
            ),
            "/flush_cache": lambda body: "Cache flushed." if engine.flush_cache().success else None,
            "/update_weight_version": lambda body: setattr(engine, "stamp", body["new_version"]) or {"success": True},
            "/generate": lambda body: None if self.paused else engine.generate(**body),
            "/get_weights_by_name": lambda body: engine.get_weights_by_name(**body),
        }
        if isinstance(engine, NewEngine):
            self.paths["/begin_weight_update"] = lambda body: self.checked(engine.begin_weight_update(**body))
            self.paths["/end_weight_update"] = lambda body: self.checked(engine.end_weight_update(**body))
        if "/post_process_weights" in extra:
            self.paths["/post_process_weights"] = self.post_process
        for path in without:
            del self.paths[path]
        if "/openapi.json" not in extra:
            self.paths["/openapi.json"] = lambda body: {"paths": {path: {} for path in self.paths}}
        served = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length) or "{}")
                served.calls.append(self.path)
                found = served.paths[self.path](body) if self.path in served.paths else None
                self.send_response(200 if found is not None else 400)
                self.end_headers()
                self.wfile.write((found if isinstance(found, str) else json.dumps(found)).encode())

            do_GET = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("localhost", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://localhost:{self.server.server_port}"

    def pause(self, paused: bool) -> dict[str, str]:
        self.paused = paused
        return {"status": "ok"}

    @staticmethod
    def checked(result: tuple[bool, str]) -> dict[str, Any]:
        return {"success": result[0], "message": result[1]}

    def post_process(self, body: dict[str, bool]) -> dict[str, Any]:
        if body["post_process_quantization"]:
            NewEngine.end_weight_update(self.engine)  # type: ignore[arg-type]
        else:
            assert body["restore_weights_before_load"]
        return {"success": True, "message": ""}


@pytest.fixture
def installed(monkeypatch, tmp_path):
    for path, source in INSTALLED.items():
        file = tmp_path / "site" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "sglang"]:
        del sys.modules[name]


def llama(scheme: Any = None) -> Any:
    model = models.tiny_llama(hidden_size=128, intermediate_size=256, num_attention_heads=2, vocab_size=64)
    if scheme is not None:
        lockstep.prepare(model, scheme)
    return model


def mixture() -> Any:
    """Qwen3-MoE of which the experts alone are quantized, as slime serves it."""
    model = models.tiny_moe("qwen3_moe", moe_intermediate_size=64)
    lockstep.prepare(model, Scheme.preset("W4A16", group_size=32), ignore=["lm_head", "re:.*self_attn.*", "re:.*gate$"])
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Where a model of a kind was exported, and the tensors in it."""
    made: dict[str, tuple[Any, dict[str, Tensor]]] = {}

    def folder(kind: str) -> tuple[Any, dict[str, Tensor]]:
        if kind not in made:
            path = tmp_path_factory.mktemp("served") / "model"
            if kind == "plain":
                model = llama()
                model.save_pretrained(path)
                made[kind] = path, {name: one.detach() for name, one in model.state_dict().items()}
            else:
                model = mixture() if kind == "experts" else llama(kind)
                save_pretrained(model, path)
                made[kind] = path, dict(stream(model))
        return made[kind]

    return folder


def changed(weights: dict[str, Tensor], by: int) -> dict[str, Tensor]:
    """Other weights of the same names."""
    return {name: tensor + by if "shape" not in name else tensor for name, tensor in weights.items()}


def sync(engine: SGLangEngine, weights: dict[str, Tensor], version: int) -> None:
    names = list(weights)
    engine.begin_update(version)
    for part in (names[: len(names) // 2], names[len(names) // 2 :]):
        bucket = {name: weights[name] for name in part}
        assert engine.load(bucket) == {name: checksum(one) for name, one in bucket.items()}
    engine.end_update()


def in_process(engine: OldEngine) -> SGLangEngine:
    return SGLangEngine(engine)


def by_http(engine: OldEngine) -> SGLangEngine:
    return SGLangEngine(Served(engine).url)


WAYS: list[Callable[[OldEngine], SGLangEngine]] = [in_process, by_http]


def without_annotations(function: Any) -> str:
    signature = inspect.signature(function)
    bare = [one.replace(annotation=inspect.Parameter.empty) for one in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


@pytest.mark.parametrize("kind", [OldEngine, NewEngine])
def test_the_stand_in_has_sglangs_signatures(kind):
    recorded = SIGNATURES[kind.version]
    assert {name: without_annotations(getattr(kind, name)) for name in recorded} == recorded
    assert hasattr(kind, "begin_weight_update") == ("begin_weight_update" in recorded)


# Updates --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [OldEngine, NewEngine])
def test_a_plain_model_is_updated_whole_and_then_in_part(installed, folders, way, kind):
    server = kind(*folders("plain"))
    engine = way(server)
    assert (engine.format, engine.partial, engine.version) == ("plain", True, 0)
    new = changed(folders("plain")[1], 1)
    sync(engine, new, 1)
    assert engine.version == 1
    assert {name: checksum(one) for name, one in server.live.items()} == {n: checksum(one) for n, one in new.items()}
    assert server.flushed
    name = "model.layers.0.self_attn.q_proj.weight"
    engine.begin_update(2)
    engine.load({name: new[name] * 2})
    engine.end_update()
    assert engine.version == 2
    assert torch.equal(server.live[name], new[name] * 2)
    assert torch.equal(engine.read_back(name, 3), new[name].float()[:3] * 2)


@pytest.mark.parametrize("way", WAYS)
def test_experts_are_restored_and_repacked_once(installed, folders, way):
    server = NewEngine(*folders("experts"))
    engine = way(server)
    assert (engine.format, engine.partial) == ("pack-quantized", False)
    for version in (1, 2, 3):
        new = changed(folders("experts")[1], version)
        sync(engine, new, version)
        assert set(server.repacks.values()) == {1}
        assert all(torch.equal(server.live[name], one) for name, one in new.items())
    assert len(engine.generate([[1, 2]], Sampling())) == 1


def test_slimes_patch_restores_experts_by_http(installed, folders):
    server = OldEngine(*folders("experts"))
    engine = SGLangEngine(Served(server, extra=("/post_process_weights",)).url)
    assert engine.abilities.session == "post_process_weights"
    sync(engine, changed(folders("experts")[1], 1), 1)
    assert set(server.repacks.values()) == {1}


@pytest.mark.parametrize("way", WAYS)
def test_an_expert_that_is_left_out_is_named_before_the_server_repacks_it_twice(installed, folders, way):
    server = NewEngine(*folders("experts"))
    engine = way(server)
    new = changed(folders("experts")[1], 1)
    name = "model.layers.1.mlp.experts.2.up_proj.weight_packed"
    engine.begin_update(1)
    engine.load({one: tensor for one, tensor in new.items() if one != name})
    with pytest.raises(ValueError, match=re.escape(f"1 tensors of the served folder did not come: {name}.")):
        engine.end_update()
    engine.abort_update()
    assert engine.version is None
    with pytest.raises(EngineUnusable, match="sync everything first"):
        engine.generate([[1]], Sampling())
    with pytest.raises(EngineUnusable):
        engine.logprobs([[1, 2]])
    sync(engine, new, 2)  # in the session that was left open
    assert engine.version == 2
    assert set(server.repacks.values()) == {1}


@pytest.mark.parametrize("way", WAYS)
def test_a_trainer_that_died_in_its_session_is_followed_by_another(installed, folders, way):
    server = NewEngine(*folders("experts"))
    way(server).begin_update(1)
    sync(way(server), changed(folders("experts")[1], 1), 2)
    assert set(server.repacks.values()) == {1}


@pytest.mark.parametrize("kind", [OldEngine, NewEngine])
def test_an_update_given_up_before_anything_was_loaded_leaves_the_old_version(installed, folders, kind):
    served = Served(kind(*folders("plain")))
    engine = SGLangEngine(served.url)
    engine.begin_update(1)
    assert served.paused
    engine.abort_update()
    assert engine.version == 0
    assert not served.paused
    assert engine.generate([[1]], Sampling())[0].version == 0


def test_others_wait_while_weights_are_mixed(installed, folders):
    served = Served(NewEngine(*folders("plain")))
    engine = SGLangEngine(served.url)
    weights = folders("plain")[1]
    engine.begin_update(1)
    engine.load(dict([next(iter(weights.items()))]))
    engine.abort_update()
    assert served.paused  # until a whole sync has succeeded
    assert engine.version is None
    sync(engine, weights, 2)
    assert not served.paused
    assert served.engine.stamp == "2"
    last = ["/end_weight_update", "/flush_cache", "/update_weight_version", "/continue_generation"]
    assert served.calls[-4:] == last


@pytest.mark.parametrize("way", WAYS)
def test_a_tensor_that_the_server_would_pass_over_is_named(installed, folders, way):
    engine = way(NewEngine(*folders("plain")))
    engine.begin_update(1)
    with pytest.raises(KeyError, match=r"model\.layers\.9\.mlp\.up_proj\.weight: not in the folder"):
        engine.load({"model.layers.9.mlp.up_proj.weight": torch.ones(2, 2)})


@pytest.mark.parametrize("way", WAYS)
def test_a_cache_of_old_weights_that_stays_is_an_error(installed, folders, way):
    server = NewEngine(*folders("plain"))
    engine = way(server)
    server.busy = True
    with pytest.raises(ServerError):
        sync(engine, folders("plain")[1], 1)
    assert engine.version is None
    server.busy = False
    sync(engine, folders("plain")[1], 2)
    assert engine.version == 2


def test_a_refused_update_carries_the_servers_words(installed, folders):
    server = NewEngine(*folders("plain"))
    engine = SGLangEngine(server)
    engine.begin_update(1)
    server.session = False  # somebody else has closed it
    with pytest.raises(ServerError, match="must run between begin_weight_update"):
        engine.load(dict([next(iter(folders("plain")[1].items()))]))
    assert engine.version is None


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["plain", "experts"])
def test_a_session_syncs_and_says_what_it_could_not_audit(installed, folders, way, kind):
    server = NewEngine(*folders(kind))
    engine = way(server)
    model = llama() if kind == "plain" else mixture()
    session = RolloutSession(model, engine, bucket_size="100KB")
    session.sync()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    report = session.sync()
    assert report.version == engine.version == 2
    assert {name: checksum(one) for name, one in server.live.items()} == report.checksums
    audit = session.audit()
    assert audit.ok
    assert audit.checked == 0
    assert "does not say what runs" in audit.skipped["live modules"]
    assert "does not run a single layer" in next(why for name, why in audit.skipped.items() if name != "live modules")
    update = server.update_weights_from_tensor

    def fails(*arguments: Any, **options: Any) -> tuple[bool, str]:
        update(*arguments, **options)
        return False, "out of memory"

    server.update_weights_from_tensor = fails  # type: ignore[method-assign]
    with pytest.raises(SyncError, match=r"out of memory.* unusable until a whole sync has succeeded"):
        RolloutSession(model, engine).sync()


# What cannot be reloaded ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [OldEngine, NewEngine])
@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ("W4A16", "dense INT4/INT8 linears are repacked for Marlin into parameters that have no loader"),
        ("W8A8", "8-bit linears are transposed into parameters that have no loader"),
        ("FP8_DYNAMIC", "8-bit linears are transposed"),
        ("NVFP4A16", "no SGLang that was read reloads nvfp4-pack-quantized"),
    ],
)
def test_layers_that_cannot_be_reloaded_are_refused_and_named(installed, folders, kind, scheme, reason):
    with pytest.raises(NotReloadable) as caught:
        SGLangEngine(kind(*folders(scheme)))
    message = str(caught.value)
    assert reason in message
    assert re.search(r"\b14 layers \(model\.layers\.0\.mlp\.down_proj, .* and 11 more\): ", message)
    assert kind.version in message
    assert "Serve this model unquantized" in message


def test_what_dense_int4_would_do_depends_on_the_server(installed, folders):
    with pytest.raises(NotReloadable, match='load_format="direct"'):
        SGLangEngine(OldEngine(*folders("W4A16")))
    with pytest.raises(NotReloadable, match="takes the server down"):
        SGLangEngine(NewEngine(*folders("W4A16")))


@pytest.mark.parametrize(
    ("capability", "version", "reason"),
    [
        ((9, 0), "0.5.20", None),
        ((8, 9), "0.5.16.post1", None),
        ((9, 0), "0.5.12", "lose their loader before SGLang 0.5.16"),
        ((9, 0), "unknown", "lose their loader before SGLang 0.5.16"),
        ((8, 0), "0.5.20", "this GPU has SM 8.0"),
        ((10, 0), "0.5.20", "this GPU has SM 10.0"),
        (None, "0.5.20", "this process sees no GPU"),
    ],
)
def test_fp8_blocks_are_reloaded_where_nothing_rewrites_them(
    installed, folders, monkeypatch, capability, version, reason
):
    monkeypatch.setattr(sglang, "_capability", lambda: capability)
    server = OldEngine(*folders("FP8_BLOCK"), version=version)
    if reason is not None:
        with pytest.raises(NotReloadable, match=re.escape(reason)):
            SGLangEngine(server)
        return
    new = {name: -one for name, one in folders("FP8_BLOCK")[1].items() if one.dtype != torch.float8_e4m3fn}
    sync(SGLangEngine(server), folders("FP8_BLOCK")[1] | new, 1)
    assert all(torch.equal(server.live[name], one) for name, one in new.items())


@pytest.mark.parametrize(
    ("kind", "backend", "capability", "reason"),
    [
        (OldEngine, "marlin", (9, 0), "nothing restores them. Take SGLang 0.5.21"),
        (NewEngine, "triton", (9, 0), "Start the server with --moe-runner-backend marlin"),
        (NewEngine, "auto", (10, 0), "moe_runner_backend='auto'"),
        (NewEngine, "auto", None, "moe_runner_backend='auto'"),
        (NewEngine, "auto", (9, 0), None),
    ],
)
def test_experts_are_reloaded_by_marlin_in_a_session_alone(
    installed, folders, monkeypatch, kind, backend, capability, reason
):
    monkeypatch.setattr(sglang, "_capability", lambda: capability)
    server = kind(*folders("experts"), moe_runner_backend=backend)
    if reason is None:
        assert SGLangEngine(server).format == "pack-quantized"
        return
    with pytest.raises(NotReloadable, match=re.escape(reason)):
        SGLangEngine(server)


# Answers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_requests_say_what_sampling_says(installed, folders, way):
    server = NewEngine(*folders("plain"), enable_deterministic_inference=True)
    engine = way(server)
    sampling = Sampling(max_tokens=5, temperature=0.7, top_k=0, top_p=0.9, n=2, stop=(3, 4), seed=11)
    completions = engine.generate([[1], [2, 3]], sampling)
    request = server.requests[-1]
    assert request["input_ids"] == [[1], [1], [2, 3], [2, 3]]
    seeds = [one["sampling_seed"] for one in request["sampling_params"]]
    assert seeds == [zlib.crc32(f"11 {number}".encode()) for number in range(4)]
    assert len({*seeds, *(zlib.crc32(f"12 {number}".encode()) for number in range(4))}) == 8
    first = request["sampling_params"][0]
    assert (first["max_new_tokens"], first["temperature"], first["top_k"], first["top_p"]) == (5, 0.7, -1, 0.9)
    assert (first["stop_token_ids"], first["ignore_eos"]) == ([3, 4], False)
    assert [(one.tokens, one.logprobs.tolist(), one.stopped) for one in completions] == [
        ([7, 7], [-0.25] * 2, True)
    ] * 4
    assert not engine.generate([[1]], Sampling())[0].stopped
    assert server.requests[-1]["sampling_params"][0]["ignore_eos"]
    assert [one.tolist() for one in engine.logprobs([[5, 6, 7], [8, 9]])] == [[-6, -7], [-9]]


def test_a_seed_that_the_server_would_not_use_is_refused(installed, folders):
    with pytest.raises(ValueError, match="--enable-deterministic-inference"):
        SGLangEngine(NewEngine(*folders("plain"))).generate([[1]], Sampling(seed=1))


def test_an_answer_of_another_version_is_not_taken(installed, folders):
    served = Served(NewEngine(*folders("plain")))
    engine = SGLangEngine(served.url)
    sync(engine, folders("plain")[1], 4)
    assert engine.generate([[1]], Sampling())[0].version == 4
    served.engine.stamp = "5"
    with pytest.raises(EngineUnusable, match="an answer came from version 5, not 4"):
        engine.generate([[1]], Sampling())


def test_what_sglang_does_not_show_is_not_made_up(installed, folders):
    engine = SGLangEngine(NewEngine(*folders("plain")))
    with pytest.raises(NotAuditable, match="does not say what runs"):
        engine.live_layers()
    with pytest.raises(NotAuditable, match="does not run a single layer"):
        engine.probe("model.layers.0.mlp.up_proj", torch.ones(1, 128))
    assert engine.checksums() is None
    packed = SGLangEngine(NewEngine(*folders("experts")))
    with pytest.raises(NotAuditable, match="does not show"):
        packed.read_back("model.layers.0.mlp.experts.0.up_proj.weight_packed", 1)


# Servers that lack something ------------------------------------------------------------------------------------------


def test_a_server_that_cannot_be_paused_is_refused(installed, folders):
    served = Served(NewEngine(*folders("plain")), "/pause_generation")
    with pytest.raises(ServerError, match="has no /pause_generation: an update would not be safe"):
        SGLangEngine(served.url)


def test_a_server_that_does_not_say_what_it_can_do_is_refused(installed, folders):
    served = Served(NewEngine(*folders("plain")), extra=("/openapi.json",))
    with pytest.raises(ServerError, match="Unset DISABLE_OPENAPI_DOC"):
        SGLangEngine(served.url)


def test_by_http_sglang_must_be_installed_here(folders):
    with pytest.raises(ServerError, match="install the server's version of sglang here too"):
        SGLangEngine(Served(NewEngine(*folders("plain"))).url)


def test_in_process_tensors_go_one_by_one_where_buckets_are_not_known(folders):
    server = NewEngine(*folders("plain"))
    engine = SGLangEngine(server)
    assert not engine.abilities.buckets
    sync(engine, changed(folders("plain")[1], 1), 1)
    assert torch.equal(server.live["model.norm.weight"], folders("plain")[1]["model.norm.weight"] + 1)


def test_a_folder_that_is_not_here_must_be_given(installed, folders, tmp_path):
    folder, weights = folders("plain")
    server = NewEngine("/served/elsewhere", weights)
    with pytest.raises(ValueError, match="give checkpoint="):
        SGLangEngine(server)
    assert SGLangEngine(server, checkpoint=folder).format == "plain"


@pytest.mark.parametrize("name", ["dp_size", "pp_size"])
def test_servers_of_several_copies_or_stages_are_refused(installed, folders, name):
    with pytest.raises(ServerError, match=f"{name}=2"):
        SGLangEngine(NewEngine(*folders("plain"), **{name: 2}))


def test_a_server_that_is_gone_is_an_error(installed, folders):
    served = Served(NewEngine(*folders("plain")))
    engine = SGLangEngine(served.url)
    served.server.shutdown()
    served.server.server_close()
    with pytest.raises(ServerError, match="does not answer"):
        engine.begin_update(1)

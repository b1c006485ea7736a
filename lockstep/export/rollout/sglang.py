"""SGLang as the rollout engine: in process, or a server on the same host by HTTP.

What follows was read in the code of the releases 0.5.9, 0.5.12, 0.5.16, 0.5.19, 0.5.20, 0.5.21 and 0.5.23; it has not
been run, for SGLang needs a GPU. What a server can do is asked of it each time (`Abilities`), not taken from its
version.

An update calls ``model.load_weights`` in the server. That finds its parameters only in layers whose kernel left them
as they were. Most quantized layers are repacked once, after the first load, into bare parameters without a loader. From
0.5.21 on ``end_weight_update`` repacks every layer of the model again, also those that got nothing new. So:

| layer of the served folder              | up to 0.5.20             | from 0.5.21 (begin/end), or slime's patch      |
|-----------------------------------------|--------------------------|------------------------------------------------|
| not quantized                           | yes                      | yes                                            |
| pack-quantized experts, Marlin          | no: nothing restores it  | yes, all experts in each update                |
| pack-quantized experts, Triton          | no                       | no: bare parameters                            |
| FP8 in blocks, dense, SM 8.9 and 9.0    | yes; float-quantized     | yes                                            |
|                                         | from 0.5.16              |                                                |
| FP8 in blocks elsewhere, or experts     | no: repacked, or scales  | no                                             |
|                                         | rewritten (Blackwell)    |                                                |
| pack-quantized and GPTQ dense layers    | no: no loader            | no: the second repack asserts, the server dies |
| INT8, FP8 per channel or tensor, dense  | no: no loader            | no: transposed a second time                   |
| NVFP4, MXFP4, MXFP8 and others          | not found to be so       | not found to be so                             |
| scales of an FP8 KV cache               | no: read at the start    | yes                                            |

``update_weights_from_disk`` takes the same way and fails alike. What is left for the others is ``load_format="direct"``
with tensors in the kernel's layout, on servers up to 0.5.20 without tensor parallelism, or a restart on a new folder.
Nothing of this is tried here: such a server is refused before it is touched.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lockstep.export.checkpoint import Checkpoint, _tensor_files
from lockstep.export.rollout.engine import Completion, EngineUnusable, LiveLayer, Sampling, checksums_of

_EXPERT = re.compile(r".*\bexperts\.\d+\.")


class NotReloadable(ValueError):
    """The server has layers that it cannot take new weights for. The message names them, the reason and what to do."""


class NotAuditable(NotImplementedError):
    """The engine's interface does not show what was asked for."""


class ServerError(RuntimeError):
    """The server refused a request, or did not answer it."""


@dataclass(frozen=True)
class Abilities:
    """What a server said of itself.

    `session` is how it makes repacked weights loadable again: ``"begin/end"``, ``"post_process_weights"`` or None;
    `buckets` whether it takes flattened buckets; `backend` is its ``moe_runner_backend``; `seeds` whether it samples
    by a request's seed; `ranks` its tensor parallel ranks.
    """

    version: str
    session: str | None
    buckets: bool
    backend: str
    seeds: bool
    ranks: int
    folder: str


class Server(Protocol):
    """How `SGLangEngine` reaches SGLang."""

    abilities: Abilities

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def begin(self) -> None: ...

    def update(self, tensors: Mapping[str, Tensor]) -> None: ...

    def end(self) -> None: ...

    def flush(self) -> None: ...

    def stamp(self, version: int) -> None: ...

    def generate(self, request: Mapping[str, Any]) -> list[dict[str, Any]]: ...

    def weight(self, name: str, rows: int) -> Any: ...


class SGLangEngine:
    """A running SGLang as a `RolloutEngine`.

    A server keeps no second copy of its weights: an update that breaks off leaves it unusable, and paused, until a
    whole sync has succeeded.

    Args:
        server: an ``sglang.Engine``, or the URL of a server that was started on this host (tensors go by CUDA IPC, only
            their handles by HTTP).
        checkpoint: the folder that the server was started from, if it has another path here.
        api_key: of a server by HTTP.
        timeout: seconds for each request by HTTP.

    Raises:
        NotReloadable: see above.
        ServerError: the server does not answer, or lacks what an update needs.
    """

    def __init__(
        self,
        server: Any,
        *,
        checkpoint: str | Path | None = None,
        api_key: str | None = None,
        timeout: float = 600.0,
    ) -> None:
        self._server: Server = Http(server, api_key, timeout) if isinstance(server, str) else InProcess(server)
        self.abilities = self._server.abilities
        folder = Path(checkpoint or self.abilities.folder)
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"the server was started from {folder}, which is no folder here: give checkpoint=, the same folder."
            )
        self._names = {name for name in _tensor_files(folder) if not name.endswith("inv_freq")}
        quantized = json.loads((folder / "config.json").read_text()).get("quantization_config")
        self.format: str | None = "plain"
        self.partial = not quantized
        if quantized:
            found = Checkpoint(folder)
            check_reloadable(found, self.abilities, _capability())
            self.format = found.format if len({found.format_of(name) for name in found.layers}) == 1 else None
        self._version: int | None = 0
        self._next: int | None = None
        self._came: set[str] = set()
        self._complete = False  # whether everything has come at least once
        self._open = False

    @property
    def version(self) -> int | None:
        """See `RolloutEngine`. 0 is what the server was started with."""
        return self._version

    def begin_update(self, version: int) -> None:
        """See `RolloutEngine`. Requests that run are aborted; others wait."""
        self._next, self._came = version, set()
        self._server.pause()
        if not self._open:  # it stays open after an update that broke off
            self._server.begin()
            self._open = True
            if not self.partial:  # experts have their first shapes again, and words in no order
                self._version = None

    def load(self, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        """See `RolloutEngine`. The checksums are of what was handed over: SGLang does not say what it took.

        Raises:
            KeyError: a tensor that the served folder does not have. The server would pass over it in silence.
        """
        unknown = [name for name in tensors if name not in self._names]
        if unknown:
            raise KeyError(
                f"{_listed(unknown)}: not in the folder that the server was started from, so it would be left out in "
                f"silence. Start the server from a folder that was exported from this model."
            )
        self._version = None
        self._server.update(tensors)
        self._came |= tensors.keys()
        return checksums_of(tensors)

    def end_update(self) -> None:
        """See `RolloutEngine`."""
        missing = sorted(self._names - self._came)
        if missing and not (self.partial and self._complete):
            raise ValueError(f"{len(missing)} tensors of the served folder did not come: {_listed(missing)}.")
        self._version = None
        self._server.end()
        self._open = False
        self._server.flush()
        assert self._next is not None
        self._server.stamp(self._next)
        self._server.resume()
        self._version, self._complete = self._next, True

    def abort_update(self) -> None:
        """See `RolloutEngine`. The old version is back only if nothing was loaded and nothing had been repacked."""
        if self._version is not None and self._open:
            self._server.end()
            self._open = False
            self._server.resume()
        elif self._version is None:
            self._complete = False

    def checksums(self) -> None:
        """None: SGLang keeps fused and repacked parameters. See `read_back`."""

    def read_back(self, name: str, rows: int) -> Tensor:
        """fp32 of the first `rows` of the weight `name`, as it lies in the server: exact for bf16, fp16 and fp32.

        Raises:
            NotAuditable: the server does not show it; it does for some model classes, Llama's among them.
        """
        found = self._server.weight(name, rows)
        if found is None:
            raise NotAuditable(f"SGLang {self.abilities.version} does not show {name} (get_weights_by_name).")
        return torch.tensor(found, dtype=torch.float32)

    def live_layers(self) -> dict[str, LiveLayer]:
        """Raises NotAuditable: no interface of SGLang says which kernel a layer runs."""
        raise NotAuditable(f"SGLang {self.abilities.version} does not say what runs for a layer.")

    def probe(self, name: str, x: Tensor) -> Tensor:
        """Raises NotAuditable: no interface of SGLang runs a single layer."""
        raise NotAuditable(f"SGLang {self.abilities.version} does not run a single layer; compare log-probabilities.")

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """See `RolloutEngine`.

        With stop tokens SGLang also stops at the model's own end of sequence; without, at none. Log-probabilities are
        before the temperature if the server has ``SGLANG_RETURN_ORIGINAL_LOGPROB`` set, which it does not tell.

        Raises:
            ValueError: a seed, on a server that would not use it.
        """
        version = self._usable()
        if sampling.seed is not None and not self.abilities.seeds:
            raise ValueError("the server ignores seeds: start it with --enable-deterministic-inference.")
        inputs = [list(prompt) for prompt in prompts for _ in range(sampling.n)]
        if not inputs:
            return []
        parameters: list[dict[str, Any]] = []
        for number in range(len(inputs)):
            one: dict[str, Any] = {
                "max_new_tokens": sampling.max_tokens,
                "temperature": sampling.temperature,
                "top_k": sampling.top_k or -1,
                "top_p": sampling.top_p,
                "ignore_eos": not sampling.stop,
                "skip_special_tokens": False,
            }
            if sampling.stop:
                one["stop_token_ids"] = list(sampling.stop)
            if sampling.seed is not None:
                one["sampling_seed"] = sampling.seed + number  # the same for all would give `n` times one answer
            parameters.append(one)
        answers = self._server.generate({"input_ids": inputs, "sampling_params": parameters, "return_logprob": True})
        return [self._completion(answer["meta_info"], version) for answer in answers]

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """See `RolloutEngine`."""
        self._usable()
        if not sequences:
            return []
        answers = self._server.generate(
            {
                "input_ids": [list(one) for one in sequences],
                "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
                "return_logprob": True,
                "logprob_start_len": 0,
            }
        )
        return [_values(answer["meta_info"]["input_token_logprobs"][1:]) for answer in answers]

    def _completion(self, meta: Mapping[str, Any], version: int) -> Completion:
        stamped = meta.get("weight_version")
        if isinstance(stamped, str) and stamped.isdigit() and int(stamped) != version:
            raise EngineUnusable(f"an answer came from version {stamped}, not {version}: who else updates this server?")
        pairs = meta["output_token_logprobs"]
        stopped = (meta.get("finish_reason") or {}).get("type") == "stop"
        return Completion([token for _, token, *_ in pairs], _values(pairs), version, stopped)

    def _usable(self) -> int:
        if self._version is None:
            raise EngineUnusable("an update of the server broke off: sync everything first.")
        return self._version


def check_reloadable(checkpoint: Checkpoint, abilities: Abilities, capability: tuple[int, int] | None) -> None:
    """NotReloadable if a server on the folder `checkpoint` has a layer that it cannot take new weights for.

    `capability` is that of its GPUs; None: not known.
    """
    reasons: dict[str, list[str]] = {}
    for name in checkpoint.layers:
        reason = _why_not(name, checkpoint, abilities, capability)
        if reason is not None:
            reasons.setdefault(reason, []).append(name)
    if checkpoint.kv_cache is not None and abilities.session is None:
        reasons["the scales of the KV cache are read once, at the start"] = ["all attention"]
    if reasons:
        lines = [f"{len(names)} layers ({_listed(names)}): {reason}" for reason, names in reasons.items()]
        raise NotReloadable(
            f"SGLang {abilities.version} cannot take new weights for {checkpoint.directory} while it runs:\n  "
            + "\n  ".join(lines)
            + "\nServe this model unquantized (a bf16 folder; QAT still trains the grid), quantize only what can be "
            "reloaded, take vLLM, or restart the server on each new folder."
        )


def _why_not(name: str, checkpoint: Checkpoint, abilities: Abilities, capability: tuple[int, int] | None) -> str | None:
    """Why the layer `name` cannot be reloaded, or None."""
    scheme, format = checkpoint.scheme_of(name), checkpoint.format_of(name)
    expert = _EXPERT.match(name) is not None
    before_blackwell = capability is not None and capability < (10, 0)
    if format == "pack-quantized" and expert:
        if abilities.session is None:
            return (
                "experts are repacked for Marlin and nothing restores them. Take SGLang 0.5.21 or later "
                "(begin_weight_update), or slime's patch (/post_process_weights)"
            )
        if abilities.backend == "marlin" or (abilities.backend == "auto" and before_blackwell):
            return None
        return (
            f"experts run in moe_runner_backend={abilities.backend!r}, of which only Marlin's are restored. Start the "
            f"server with --moe-runner-backend marlin"
        )
    if scheme.weights.strategy == "block" and not expert and format in ("float-quantized", "fp8"):
        if capability is None or not (8, 9) <= capability < (10, 0):
            where = (
                "this process sees no GPU" if capability is None else f"this GPU has SM {capability[0]}.{capability[1]}"
            )
            return f"FP8 blocks stay as they are loaded on SM 8.9 and 9.0 alone, and {where}"
        if format == "float-quantized" and not _at_least(abilities.version, (0, 5, 16)):
            return "compressed-tensors' FP8 blocks lose their loader before SGLang 0.5.16"
        return None
    if format in ("pack-quantized", "gptq") and not expert:
        end = (
            "its second repack, in end_weight_update, fails and takes the server down"
            if abilities.session == "begin/end"
            else 'load_format="direct" with tensors in Marlin\'s layout is the only way in, and is not taken here'
        )
        return f"dense INT4/INT8 linears are repacked for Marlin into parameters that have no loader; {end}"
    if format in ("int-quantized", "float-quantized") and not expert:
        return "8-bit linears are transposed into parameters that have no loader, and again at each end_weight_update"
    return f"no SGLang that was read reloads {format}" + (" experts" if expert else "")


class InProcess:
    """An ``sglang.Engine`` in this process."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        info = engine.get_server_info()
        taken = inspect.signature(engine.update_weights_from_tensor).parameters
        if not {"named_tensors", "load_format", "flush_cache"} <= taken.keys():
            raise ServerError(
                f"SGLang {info.get('version')}: update_weights_from_tensor takes {', '.join(taken)}: not known here."
            )
        session = hasattr(engine, "begin_weight_update") and hasattr(engine, "end_weight_update")
        self.abilities = _abilities(info, "begin/end" if session else None, _bucket_class() is not None)

    def pause(self) -> None:
        """Nothing: the engine answers this process alone, which is here."""

    def resume(self) -> None:
        """Nothing, likewise."""

    def begin(self) -> None:
        if self.abilities.session:
            _check_begun(self._engine.begin_weight_update())

    def update(self, tensors: Mapping[str, Tensor]) -> None:
        payload: list[Any] = [*tensors.items()]
        format = None
        if self.abilities.buckets:
            payload, format = _bucketed(tensors, self.abilities.ranks), "flattened_bucket"
        _check(self._engine.update_weights_from_tensor(payload, load_format=format, flush_cache=False), "the update")

    def end(self) -> None:
        if self.abilities.session:
            _check(self._engine.end_weight_update(), "end_weight_update")

    def flush(self) -> None:
        result = self._engine.flush_cache()
        if not getattr(result, "success", True):
            raise ServerError("the cache of the old weights could not be flushed: requests are still running.")

    def stamp(self, version: int) -> None:
        """Nothing: ``sglang.Engine`` has no way to say a version."""

    def generate(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        return self._engine.generate(**request)

    def weight(self, name: str, rows: int) -> Any:
        return self._engine.get_weights_by_name(name, truncate_size=rows)


class Http:
    """A server on this host."""

    def __init__(self, url: str, api_key: str | None, timeout: float) -> None:
        self._url, self._timeout = url.rstrip("/"), timeout
        self._headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {api_key}"} if api_key else {}
        )
        try:
            paths = self._call("/openapi.json")["paths"]
        except ServerError as error:
            raise ServerError(f"{error} Unset DISABLE_OPENAPI_DOC: what the server can do is read there.") from error
        lacking = {"/update_weights_from_tensor", "/pause_generation", "/continue_generation", "/flush_cache"} - {
            *paths
        }
        if lacking:
            raise ServerError(f"{self._url} has no {', '.join(sorted(lacking))}: an update would not be safe.")
        if _bucket_class() is None:
            raise ServerError(
                "updates by HTTP are serialized by SGLang's own code: install the server's version of sglang here too."
            )
        info = self._call("/server_info" if "/server_info" in paths else "/get_server_info")
        session = None
        if {"/begin_weight_update", "/end_weight_update"} <= paths.keys():
            session = "begin/end"
        elif "/post_process_weights" in paths:
            session = "post_process_weights"
        self._stamps = "/update_weight_version" in paths
        self.abilities = _abilities(info, session, True)

    def pause(self) -> None:
        self._call("/pause_generation", {"mode": "abort"})

    def resume(self) -> None:
        self._call("/continue_generation", {})

    def begin(self) -> None:
        if self.abilities.session == "begin/end":
            try:
                self._call("/begin_weight_update", {})
            except ServerError as error:
                if "already open" not in str(error):  # by an update that broke off, maybe of another trainer
                    raise
        elif self.abilities.session:
            self._post_process(restore=True)

    def update(self, tensors: Mapping[str, Tensor]) -> None:
        payload = _bucketed(tensors, self.abilities.ranks)
        body = {"serialized_named_tensors": payload, "load_format": "flattened_bucket", "flush_cache": False}
        self._call("/update_weights_from_tensor", body)

    def end(self) -> None:
        if self.abilities.session == "begin/end":
            self._call("/end_weight_update", {})
        elif self.abilities.session:
            self._post_process(restore=False)

    def _post_process(self, restore: bool) -> None:
        body = {"restore_weights_before_load": restore, "post_process_quantization": not restore}
        self._call("/post_process_weights", body)

    def flush(self) -> None:
        self._call("/flush_cache", {})

    def stamp(self, version: int) -> None:
        if self._stamps:
            self._call("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})

    def generate(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        return self._call("/generate", request)

    def weight(self, name: str, rows: int) -> Any:
        try:
            return self._call("/get_weights_by_name", {"name": name, "truncate_size": rows})
        except ServerError:
            return None

    def _call(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """What a GET gives, or a POST of `body`: parsed where it is JSON. ServerError for anything but success."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, self._headers)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as error:
            raise ServerError(f"{self._url}{path}: {error.code}: {error.read().decode()[:500]}") from error
        except OSError as error:
            raise ServerError(f"{self._url}{path} does not answer: {error}.") from error
        try:
            found = json.loads(text)
        except ValueError:
            return text
        if isinstance(found, dict) and found.get("success") is False:
            raise ServerError(f"{self._url}{path}: {found.get('message')}")
        return found


def _abilities(info: Mapping[str, Any], session: str | None, buckets: bool) -> Abilities:
    for name in ("dp_size", "pp_size"):
        if info.get(name, 1) != 1:
            raise ServerError(f"the server has {name}={info[name]}: only tensor parallel servers are supported.")
    return Abilities(
        version=str(info.get("version")),
        session=session,
        buckets=buckets,
        backend=str(info.get("moe_runner_backend") or "auto"),
        seeds=bool(info.get("enable_deterministic_inference")),
        ranks=int(info["tp_size"]),
        folder=str(info["model_path"]),
    )


def _bucket_class() -> Any:
    """SGLang's ``FlattenedTensorBucket``, or None: it is not installed, or too old to mix dtypes in a bucket."""
    try:
        if importlib.util.find_spec("sglang.srt.weight_sync.tensor_bucket") is None:
            return None
    except ModuleNotFoundError:
        return None
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    return FlattenedTensorBucket if getattr(FlattenedTensorBucket, "supports_multi_dtypes", False) else None


def _bucketed(tensors: Mapping[str, Tensor], ranks: int) -> list[str]:
    """One flat bucket in SGLang's own serialization, for each of its ranks: each opens a handle of its own."""
    from sglang.srt.utils import MultiprocessingSerializer

    serialize: Callable[..., str] = MultiprocessingSerializer.serialize
    bucket = _bucket_class()(named_tensors=[(name, tensor.detach()) for name, tensor in tensors.items()])
    content = {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()}
    return [serialize(content, output_str=True) for _ in range(ranks)]


def _check(result: Any, what: str) -> None:
    """ServerError unless SGLang's ``(success, message)`` says success."""
    success, message = result[:2]
    if not success:
        raise ServerError(f"SGLang refused {what}: {message}")


def _check_begun(result: Any) -> None:
    if not result[0] and "already open" in str(result[1]):  # by an update that broke off
        return
    _check(result, "begin_weight_update")


def _at_least(version: str, least: tuple[int, ...]) -> bool:
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    return found is not None and tuple(map(int, found.groups())) >= least


def _capability() -> tuple[int, int] | None:
    """Of the GPU of this process, which is a server's too: they share a host."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def _values(pairs: Sequence[Sequence[Any]]) -> Tensor:
    """The log-probabilities of SGLang's ``(log-probability, token, text)``."""
    return torch.tensor([pair[0] for pair in pairs], dtype=torch.float32)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more

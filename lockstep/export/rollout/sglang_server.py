"""How `SGLangEngine` reaches SGLang: an ``sglang.Engine`` in this process, or a server on this host by HTTP.

What a server can do is asked of it (`Abilities`), not taken from its version: of an ``Engine`` its methods and their
parameters, of a server its ``/openapi.json``.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


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


class InProcess:
    """An ``sglang.Engine`` in this process."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        info = engine.get_server_info()
        taken = inspect.signature(engine.update_weights_from_tensor).parameters
        if not {"named_tensors", "load_format", "flush_cache"} <= taken.keys():
            raise ServerError(
                f"SGLang {info.get('version')}: update_weights_from_tensor takes {', '.join(taken)}, and not "
                "named_tensors, load_format and flush_cache: take a version from 0.5.9 to 0.5.23."
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

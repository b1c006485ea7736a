"""SGLang as the rollout engine: in process, or a server on the same host by HTTP.

Written from the code of the releases 0.5.9, 0.5.12, 0.5.16, 0.5.19, 0.5.20, 0.5.21 and 0.5.23, and not run against
SGLang itself, which needs a GPU.

An update calls ``model.load_weights`` in the server. That finds its parameters only in layers whose kernel left them
as they were. Most quantized layers are repacked once, after the first load, into bare parameters without a loader. From
0.5.21 on ``end_weight_update`` repacks every layer of the model again, also those that got nothing new. So some layers
cannot take new weights while the server runs (`check_reloadable`; a table is in docs/rollout-engines.md).
``update_weights_from_disk`` takes the same way and fails alike. A server with such a layer is refused before it is
touched.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lockstep.export.checkpoint import Checkpoint, tensor_files
from lockstep.export.rollout.engine import Completion, EngineUnusable, LiveLayer, Sampling, checksums_of
from lockstep.export.rollout.sglang_server import Abilities, Http, InProcess, Server

_EXPERT = re.compile(r".*\bexperts\.\d+\.")


class NotReloadable(ValueError):
    """The server has layers that it cannot take new weights for. The message names them, the reason and what to do."""


class NotAuditable(NotImplementedError):
    """The engine's interface does not show what was asked for."""


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
        self._names = {name for name in tensor_files(folder) if not name.endswith("inv_freq")}
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
        common: dict[str, Any] = {
            "max_new_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k or -1,
            "top_p": sampling.top_p,
            "ignore_eos": not sampling.stop,
            "skip_special_tokens": False,
        }
        if sampling.stop:
            common["stop_token_ids"] = list(sampling.stop)
        parameters = [dict(common) for _ in inputs]
        if sampling.seed is not None:
            for number, own in enumerate(parameters):  # seeds in a row would give the next call's answers again
                own["sampling_seed"] = zlib.crc32(f"{sampling.seed} {number}".encode())
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

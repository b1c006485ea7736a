"""`VLLMEngine`: a running vLLM as a `RolloutEngine`. In this process or behind its RPC, or by its weight transfer.

Written against vLLM 0.32. Weights go in by vLLM's layerwise reload: into the memory that the kernels (and CUDA graphs)
already read, repacked one module at a time. `vllm_worker` has what runs inside the worker, `vllm_reload` what vLLM
itself does not check.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lockstep.export import formats
from lockstep.export.rollout.engine import Completion, EngineUnusable, LiveLayer, Sampling
from lockstep.export.rollout.vllm_layers import MARLIN
from lockstep.export.rollout.vllm_worker import WeightReceiver, from_wire, to_wire
from lockstep.scheme import DTYPES, Scheme

WORKER = "lockstep.export.rollout.vllm_worker.WeightReceiver"


class VLLMEngine:
    """A running `vllm.LLM` whose weights can be updated.

    >>> llm = vllm.LLM(folder, worker_extension_cls=lockstep.export.rollout.vllm.WORKER)
    >>> session = RolloutSession(model, VLLMEngine(llm))

    The engine runs in this process (``VLLM_ENABLE_V1_MULTIPROCESSING=0``), where tensors are handed over as they are
    and `WORKER` may be left out; or in its own, where vLLM passes no tensors between processes unless it may unpickle
    what it gets (``VLLM_ALLOW_INSECURE_SERIALIZATION``). That is not asked for: tensors go as bytes, by way of the
    CPU. Between GPUs give `transfer`.

    An update takes the engine out of service from `begin_update` to `end_update`, at whose end the prefix cache is
    emptied. With requests in flight it is refused: they would go on with another model's keys and values. After a
    failed update the engine answers nothing until a whole one has succeeded; vLLM keeps no second copy to go back to.

    Args:
        llm: one worker, no adapters. ``load_format="dummy"`` is taken for what it is: no version until the first sync.
        format: of the tensors. None: of the checkpoint that the engine was started with, ``"plain"`` for one that is
            not quantized. ``"marlin"``: words as the Marlin kernel reads them, fused and copied in place without a
            repack; every quantized layer must run in that kernel.
        transfer: a ``TrainerInitInfo`` of ``vllm.distributed.weight_transfer``, such as ``NCCLTrainerInitInfo``, of the
            backend that the engine was started with (``weight_transfer_config``). Buckets then go by
            ``send_weights()`` of vLLM's own trainer side.

    Raises:
        ValueError: an engine that cannot be updated so, or a kernel that does not read the format.
    """

    partial = True

    def __init__(self, llm: Any, *, format: str | None = None, transfer: Any = None) -> None:
        config = llm.llm_engine.vllm_config
        self._llm, self._config = llm, config
        self._in_process = type(llm.llm_engine.engine_core).__name__ == "InprocClient"
        self._check_setup(transfer)
        quantized = config.model_config.quantization is not None
        self.format = format if format is not None or quantized else "plain"
        if quantized == (self.format == "plain"):
            raise ValueError(
                f"format={format!r}, but the engine runs with quantization={config.model_config.quantization!r}."
            )
        self._declared = _declared(config)
        if self.format == "marlin":
            self._check_marlin(transfer)
        dummy = str(config.load_config.load_format) == "dummy"
        self._version: int | None = None if dummy else 0
        self._why = "it was started with load_format='dummy'"
        self._before: int | None = None  # the version while an update is on its way
        self._next: int | None = None
        self._bucket: dict[str, Tensor] = {}
        self._stacked: dict[str, bool] = {}  # live layers: whether one of experts that run as one
        self._trainer = None if transfer is None else _trainer_side(llm, transfer, self)

    @property
    def version(self) -> int | None:
        """Of the weights that answer now, or None. 0: those that the engine was started with."""
        return self._version

    @property
    def config(self) -> Any:
        """Of the model that runs, as vLLM has read it."""
        return self._config.model_config.hf_config

    def begin_update(self, version: int) -> None:
        """Announce `version`. An update that was left half-finished is given up first.

        Raises:
            RuntimeError: requests are in flight.
        """
        if self._next is not None:
            self.abort_update()
        waiting = self._llm.llm_engine.get_num_unfinished_requests()
        if waiting:
            raise RuntimeError(
                f"{waiting} requests are in flight: finish them (LLM.wait_for_completion) or abort them, then update."
            )
        self._call("lockstep_begin", self._version is None, self.format, self._trainer is not None)
        self._before, self._version, self._next = self._version, None, version
        self._why = f"an update to version {version} is on its way"

    def load(self, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        """Take tensors under the names of the checkpoint. Returns the checksums of what came in the worker.

        Raises:
            RuntimeError: no update is on its way, or what the worker raises: over the RPC by name and message alone.
        """
        if self._next is None:
            raise RuntimeError("no update is on its way: begin one first.")
        # vLLM counts the shapes of fused layers more often than it has them, and drops what comes after a full count.
        tensors = {name: tensors[name] for name in sorted(tensors, key=lambda name: name.endswith("weight_shape"))}
        try:
            if self._trainer is not None:
                self._bucket = tensors
                self._trainer.send_weights()
                came = self._call("lockstep_received")
            elif self._in_process:
                came = self._call("lockstep_load", {name: tensor.detach() for name, tensor in tensors.items()})
            else:
                came = self._call("lockstep_load", [[name, *to_wire(tensor)] for name, tensor in tensors.items()])
        except Exception as error:
            self._why = f"the update to version {self._next} failed: {error}"
            raise
        finally:
            self._bucket = {}
        return {name: int(value) for name, value in came.items()}

    def end_update(self) -> None:
        """Answer with the new version from now on. RuntimeError if it is not whole, or the caches cannot be emptied."""
        if self._next is None:
            raise RuntimeError("no update is on its way: begin one first.")
        try:
            self._call("lockstep_end", self._trainer is not None)
            if not self._llm.reset_prefix_cache():
                raise RuntimeError("the prefix cache cannot be emptied: requests hold parts of it.")
        except Exception as error:
            self._why = f"the update to version {self._next} failed: {error}"
            raise
        self._version, self._next, self._before = self._next, None, None

    def abort_update(self) -> None:
        """Give the update up: back to the old version if no tensor had come, else unusable."""
        if self._next is None:
            return
        if self._why.endswith("is on its way"):
            self._why = f"the update to version {self._next} was given up before its end"
        self._next = None
        untouched = self._call("lockstep_abort", self._trainer is not None)
        self._version, self._before = (self._before if untouched else None), None

    def checksums(self) -> dict[str, int] | None:
        """`checksum` of what lies in the engine now, made again from the kernels' own layouts where these are known.

        Known are the INT4 and INT8 words of Marlin, those of vLLM's INT4 kernel of the CPU, and plain weights. With any
        other kernel, with experts, or with a zero in a plain weight that a CPU library packed for itself (its sign
        cannot be read), the result is None.
        """
        found = self._call("lockstep_checksums", self.format)
        return None if found is None else {name: int(value) for name, value in found.items()}

    def live_layers(self) -> dict[str, LiveLayer]:
        """What runs for each linear layer, by its name in the checkpoint, as the live objects say it."""
        found = self._call("lockstep_live_layers")
        return {
            name: LiveLayer(one["module"], (one["rows"][0], one["rows"][1]), self._precision(one), one["kernel"])
            for name, one in found.items()
        }

    def probe(self, name: str, x: Tensor) -> Tensor:
        """``y [M, N]`` of the live layer `name` for inputs ``x [M, K]``, without its bias, on the CPU.

        Raises:
            ValueError: no such layer; or the layer computes in a dtype that does not hold `x` exactly.
            NotImplementedError: it is one of the experts that vLLM runs as one.
        """
        self._stacked = self._stacked or {
            name: one["stacked"] for name, one in self._call("lockstep_live_layers").items()
        }
        if name not in self._stacked:
            raise ValueError(f"the engine has no linear layer {name}.")
        if self._stacked[name]:
            raise NotImplementedError(f"{name}: vLLM's kernel runs all experts of a block as one.")
        return from_wire(self._call("lockstep_probe", name, x if self._in_process else list(to_wire(x))))

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """`sampling.n` answers to each prompt, in the prompts' order.

        With a seed, each prompt samples by one made of it and the prompt's place (CRC-32), and vLLM adds j for answer
        j. Sums alone would repeat: seed 0 would give prompt 1 what seed 1 gives prompt 0.

        Raises:
            EngineUnusable: see `version`.
            ValueError: vLLM does not compute the log-probabilities that `Sampling` promises, see `logprobs_problem`.
        """
        self._check_usable()
        if problem := logprobs_problem(sampling, self._config.model_config.logprobs_mode):
            raise ValueError(problem)
        version = self._version
        assert version is not None
        from vllm import SamplingParams

        def params(number: int) -> Any:
            return SamplingParams(
                n=sampling.n,
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                stop_token_ids=list(sampling.stop),
                seed=None if sampling.seed is None else zlib.crc32(f"{sampling.seed} {number}".encode()),
                ignore_eos=True,
                logprobs=0,
                detokenize=False,
            )

        outputs = self._llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            [params(number) for number in range(len(prompts))],
            use_tqdm=False,
        )
        return [
            Completion(
                list(answer.token_ids), _own(answer.token_ids, answer.logprobs), version, answer.finish_reason == "stop"
            )
            for output in outputs
            for answer in sorted(output.outputs, key=lambda answer: answer.index)
        ]

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """fp32 ``[len - 1]`` for each sequence: log-probability of every token but the first, at temperature 1.

        A sequence must be shorter than ``max_model_len``: vLLM generates one more token.

        Raises:
            EngineUnusable: see `version`.
        """
        self._check_usable()
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, prompt_logprobs=0, detokenize=False)
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(tokens)} for tokens in sequences], params, use_tqdm=False
        )
        return [_own(output.prompt_token_ids[1:], output.prompt_logprobs[1:]) for output in outputs]

    def _call(self, method: str, *args: Any) -> Any:
        """What the one worker's `method` of `WeightReceiver` returns."""
        target = getattr(WeightReceiver, method) if self._in_process else method
        [result] = self._llm.collective_rpc(target, args=args)
        return result

    def _check_usable(self) -> None:
        if self._version is None:
            raise EngineUnusable(f"vLLM answers nothing until a whole sync has succeeded: {self._why.rstrip('.')}.")

    def _check_setup(self, transfer: Any) -> None:
        config = self._config
        workers = config.parallel_config.world_size
        if workers != 1 or getattr(config.parallel_config, "data_parallel_size", 1) != 1:
            raise ValueError(f"the engine runs on {workers} workers: this version updates engines of one worker.")
        if config.lora_config is not None:
            raise ValueError("the engine was started with enable_lora: merge adapters into what is synced instead.")
        if config.model_config.logprobs_mode not in ("raw_logprobs", "processed_logprobs"):
            raise ValueError(
                f"logprobs_mode={config.model_config.logprobs_mode!r}: start vLLM with 'raw_logprobs' (for temperature "
                "1) or 'processed_logprobs'."
            )
        if transfer is not None and config.weight_transfer_config is None:
            raise ValueError(
                f"transfer={transfer!r}: start vLLM with weight_transfer_config=WeightTransferConfig(backend="
                f"{transfer.backend!r})."
            )
        if self._in_process:
            return
        try:
            self._call("lockstep_live_layers")
        except Exception as error:
            raise ValueError(
                f"vLLM runs in another process and its worker does not know Lockstep ({error}): start it with "
                f"worker_extension_cls={WORKER!r}, with lockstep installed for its Python."
            ) from error

    def _check_marlin(self, transfer: Any) -> None:
        if transfer is not None:
            raise ValueError("format='marlin' cannot go by weight transfer, which loads checkpoints: leave one out.")
        for name, one in self._call("lockstep_live_layers").items():
            quantized = one["weights"] is not None or one["unknown"] is not None
            if quantized and (one["kernel"] != MARLIN or one["unknown"]):
                raise ValueError(
                    f"format='marlin', but {name} runs in {one['kernel']}: start vLLM with linear_backend='marlin' on "
                    "an NVIDIA GPU, or leave format out."
                )

    def _precision(self, live: Mapping[str, Any]) -> str:
        """As `str(Scheme)`: formats and groupings of the live objects, the scale rule of the checkpoint's config."""
        if live["unknown"]:
            return str(live["unknown"])
        if live["weights"] is None:
            return str(live["dtype"])
        inputs = live["inputs"] and tuple(live["inputs"])
        layout, dtype = (*live["weights"], inputs), DTYPES[live["dtype"]]
        for scheme in self._declared:
            if scheme.layout == layout:
                return str(_served_in(scheme, dtype))
        return f"{' '.join(str(one) for one in layout)} {live['dtype']}, which the checkpoint's config does not declare"


def logprobs_problem(sampling: Sampling, mode: str) -> str | None:
    """Why vLLM in that ``logprobs_mode`` does not give the log-probabilities that `Sampling` promises, or None.

    ``raw_logprobs`` are those before the temperature, ``processed_logprobs`` those after the cuts.
    """
    if mode == "raw_logprobs" and sampling.temperature not in (0, 1):
        return (
            f"temperature={sampling.temperature}: vLLM's 'raw_logprobs' are those of temperature 1. Start it with "
            "logprobs_mode='processed_logprobs', or sample at temperature 1."
        )
    if mode == "processed_logprobs" and sampling.temperature != 0 and (sampling.top_k or sampling.top_p < 1):
        return (
            f"top_k={sampling.top_k}, top_p={sampling.top_p}: vLLM's 'processed_logprobs' are those after the cuts. "
            "Start it with logprobs_mode='raw_logprobs' and sample at temperature 1, or leave the cuts out."
        )
    return None


def _own(tokens: Sequence[int], logprobs: Sequence[Mapping[int, Any]]) -> Tensor:
    """Each token's own log-probability, fp32."""
    values = [entry[token].logprob for token, entry in zip(tokens, logprobs, strict=True)]
    return torch.tensor(values, dtype=torch.float32)


def _declared(config: Any) -> list[Scheme]:
    """The schemes in the ``quantization_config`` that the engine was started with; none of what is not ours to read."""
    entry = getattr(config.model_config.hf_config, "quantization_config", None)
    if not isinstance(entry, Mapping):
        return []
    try:
        return [group.scheme for group in formats.declared(entry, config.model_config.dtype)[1]]
    except (ValueError, KeyError, TypeError):
        return []  # `VLLMEngine._precision` then says so for each layer


def _served_in(scheme: Scheme, dtype: torch.dtype) -> Scheme:
    """`scheme` as vLLM serves it in `dtype`."""
    weights = scheme.weights
    scales = dtype if weights.scale_dtype == weights.served_dtype else weights.scale_dtype
    spec = replace(weights, served_dtype=dtype, scale_dtype=scales)
    return Scheme(spec, scheme.activations and replace(scheme.activations, engine="vllm"))


def _trainer_side(llm: Any, info: Any, engine: VLLMEngine) -> Any:
    """vLLM's trainer side of the weight transfer, which sends one bucket of `engine` at each ``send_weights()``."""
    from vllm.distributed.weight_transfer import ParamMeta, WeightSource, WeightTransferTrainerFactory

    class Bucket(WeightSource):  # type: ignore[misc]
        def metadata(self) -> list[Any]:
            return [ParamMeta(name, one.dtype, tuple(one.shape)) for name, one in engine._bucket.items()]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return iter(engine._bucket.items())

    class Client:
        """One update of the engine is many sends, so its begin and end are not the client's."""

        def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
            llm.init_weight_transfer_engine({"init_info": init_info})

        def start_weight_update(self) -> None: ...

        def update_weights(self, update_info: Any) -> None:
            llm.update_weights({"update_info": update_info})

        def finish_weight_update(self, weight_version: str | None = None) -> None: ...

    return WeightTransferTrainerFactory.trainer_init(info, client=Client(), source=Bucket())

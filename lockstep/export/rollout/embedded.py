"""`EmbeddedEngine`: a rollout engine in plain torch, for where no engine is installed; on the CPU and on one GPU.

It runs the transformers model that is trained, with every quantized layer replaced by its stored words and a true
kernel (`lockstep.kernels`). What it answers is what a checkpoint of the same version would, to the kernel's own noise.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lockstep.export import formats
from lockstep.export.checkpoint import Checkpoint, CheckpointError
from lockstep.export.rollout import live
from lockstep.export.rollout import sampling as sampler
from lockstep.export.rollout.engine import Completion, EngineUnusable, LiveLayer, Sampling, checksums_of
from lockstep.export.rollout.skeleton import (
    KernelNames,
    Skeleton,
    bare_class,
    build,
    on_meta,
    places_in_memory,
    stored_schemes,
)
from lockstep.export.served import prepared_cache
from lockstep.kernels import scaled_mm
from lockstep.qat.prepare import (
    prepare,
    quantized_experts,
    quantized_modules,
    run_as_one,
    unwrapped,
    with_adapters_merged,
)
from lockstep.scheme import Rule, Scheme, dtype_name


class EmbeddedEngine:
    """A `RolloutEngine` in this process: make it with `from_model` or `from_folder`.

    Threads may share it. An update waits for the call that is being answered, and calls wait for one another.

    Attributes:
        format: what `lockstep.export.stream` is asked for to update it.
        partial: True: an update may leave out what did not change.
        model: the transformers model that answers; its weights are the engine's stored tensors. It must not be moved,
            and no module of it replaced.
        max_batch_tokens: sequences, prompts and answers together, that are generated at a time; more wait for the next
            batch.
    """

    partial = True

    def __init__(self, skeleton: Skeleton, format: str | None, max_batch_tokens: int) -> None:
        self.format, self.model, self.max_batch_tokens = format, skeleton.model, max_batch_tokens
        self._skeleton, self._places, self._layers = skeleton, skeleton.places, skeleton.layers
        self._version: int | None = None
        self._loading: int | None = None
        self._arrived: set[str] = set()
        self._why = "it holds no weights yet"
        self._in_memory = places_in_memory(skeleton.model)
        # Held while a call is answered, and to begin an update; between begin and end nothing is answered anyway.
        self._lock = threading.RLock()
        # For each stored tensor all those of the layers that engines run as one with its own.
        owners: dict[str, list[str]] = {}
        for name in self._places:
            owners.setdefault(_owner(name), []).append(name)
        self._together: dict[str, list[str]] = {}
        for group in run_as_one(owners):
            names = [name for owner in group for name in owners[owner]]
            self._together |= dict.fromkeys(names, names)

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        *,
        plain: bool = False,
        scheme: str | Scheme | Sequence[Rule] | None = None,
        ignore: str | Sequence[str] = ("lm_head",),
        kernel: KernelNames = None,
        device: torch.device | str | None = None,
        cache: bool | None = None,
        max_batch_tokens: int = 1 << 18,
    ) -> EmbeddedEngine:
        """An engine for what `model` trains. No weight is copied: until the first update it answers nothing.

        Args:
            model: a prepared transformers model, or its wrapper (DDP, FSDP, DeepSpeed, peft).
            plain: every weight unquantized in the served dtype, as ``stream(model, "plain")`` gives them.
            scheme: what an unprepared model is quantized to, at each sync: see `RolloutSession`.
            ignore: what `scheme` leaves out, as in `lockstep.prepare`.
            kernel: name of the true kernel of the quantized layers (`lockstep.kernels.KERNELS`), or names of which each
                layer runs the first that computes its scheme. None: on CUDA ``"triton"`` for symmetric INT4 weights,
                else ``"reference"``. Kernels of other packages pack their words again at each call here.
            device: where it runs; by default where the model is.
            cache: keep what a kernel would unpack from the words at each token: the reference kernel's operand, bit
                for bit, for up to 2 bytes a weight beside the words. None: yes, but for the Triton kernel, which reads
                the words. False: the words alone.
            max_batch_tokens: see the class.

        Raises:
            TypeError: it is no transformers model.
            ValueError: the model is neither prepared nor is there a `scheme`, or both; or a buffer of it is stored
                nowhere and transformers does not compute it; or it takes no ``past_key_values``.
            KernelUnavailable: a layer's scheme can be computed here by none of the kernels named.
            ExportError: the model has tensors that no checkpoint holds as they are.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"the embedded engine runs transformers models, found {type(model).__name__}.")
        with with_adapters_merged(model) as served:
            bare: Any = unwrapped(served)
            config = _config_of(bare)
            schemes = _schemes(bare)
            specs = [kv.spec for kv in map(prepared_cache, bare.modules()) if kv is not None]
            where = torch.device(device) if device is not None else next(bare.parameters()).device
        if scheme is not None and schemes:
            raise ValueError(
                f"the model is prepared with {next(iter(schemes.values()))}: scheme={scheme!r} is too much."
            )
        if scheme is not None and plain:
            raise ValueError(f"plain=True serves every weight unquantized: scheme={scheme!r} is too much.")
        if scheme is None and not schemes and not plain:
            raise ValueError("the model is not prepared: call lockstep.prepare, give a scheme, or plain=True.")
        kind = bare_class(bare)
        own = next((one.dtype for one in bare.parameters() if one.is_floating_point()), None)
        served_dtype = torch.float16 if own == torch.float16 else torch.bfloat16  # as `stream(model, "plain")`
        if scheme is not None:
            empty = on_meta(kind, config, served_dtype)
            prepare(empty, scheme, ignore=ignore)
            schemes = _schemes(empty)
        if schemes:
            served_dtype = next(iter(schemes.values())).weights.served_dtype
        skeleton = build(
            kind,
            config,
            {} if plain else schemes,
            served=served_dtype,
            device=where,
            kv_cache=specs[0] if specs else None,
            kernel=kernel,
            keep=cache,
            conversions=getattr(bare, "_weight_conversions", None),
        )
        return cls(skeleton, "plain" if plain else None, max_batch_tokens)

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        kernel: KernelNames = None,
        device: torch.device | str | None = None,
        cache: bool | None = None,
        max_batch_tokens: int = 1 << 18,
    ) -> EmbeddedEngine:
        """An engine that holds an exported folder, as version 0, by default on the GPU if there is one.

        Arguments are as in `from_model`.

        Raises:
            CheckpointError: the folder cannot be read, or does not hold what its config declares.
            ValueError: its model takes no ``past_key_values``, or has a buffer that cannot be computed.
            KernelUnavailable: a layer's scheme can be computed here by none of the kernels named.
        """
        from transformers import AutoConfig

        stored = Checkpoint(folder)
        config = AutoConfig.from_pretrained(folder)
        config.quantization_config = None
        del config.quantization_config
        kind = _class_of(config, stored)
        served = stored.scheme_of(stored.layers[0]).weights.served_dtype
        skeleton = build(
            kind,
            config,
            stored_schemes(on_meta(kind, config, served), stored),
            served=served,
            device=torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")),
            format={name: stored.format_of(name) for name in stored.layers},
            kv_cache=stored.kv_cache,
            kernel=kernel,
            keep=cache,
        )
        own = all(stored.format_of(name) == formats.fitting(stored.scheme_of(name))[0] for name in stored.layers)
        engine = cls(skeleton, None if own else stored.format, max_batch_tokens)
        engine.begin_update(0)
        for name in stored.tensors:
            engine.load({name: stored.tensor(name)})
        engine.end_update()
        return engine

    @property
    def config(self) -> Any:
        """The transformers config of the model that answers."""
        return self.model.config

    # Weights ----------------------------------------------------------------------------------------------------------

    @property
    def version(self) -> int | None:
        """Of the weights that answer now, or None: none do."""
        return None if self._loading is not None else self._version

    def begin_update(self, version: int) -> None:
        """Announce `version`, once what another thread has asked for is answered.

        Raises:
            EngineUnusable: `model` was moved, or a module of it replaced.
            RuntimeError: another update has not ended.
        """
        with self._lock:
            if self._loading is not None:
                raise RuntimeError(f"version {self._loading} is being loaded: end_update or abort_update first.")
            self._check_in_place()
            self._loading, self._arrived = version, set()

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        """Write `tensors` over those that lie there, and return the `checksum` of what lies there then, by name.

        Raises:
            ValueError: a name that the engine does not have, or another shape or dtype; no tensor is written then.
            RuntimeError: no update has begun.
        """
        if self._loading is None:
            raise RuntimeError("load outside an update: call begin_update first.")
        for name, tensor in tensors.items():
            if (place := self._places.get(name)) is None:
                raise ValueError(f"{name}: the engine has no such tensor; it has {next(iter(self._places))} and more.")
            if (tensor.shape, tensor.dtype) != (place.shape, place.dtype):
                found, wanted = (f"{list(one.shape)} {dtype_name(one.dtype)}" for one in (tensor, place))
                raise ValueError(f"{name} is {found}, the engine holds {wanted}.")
        self._arrived |= tensors.keys()
        alike: dict[tuple[Any, ...], tuple[list[Tensor], list[Tensor]]] = {}
        for name, tensor in tensors.items():
            place = self._places[name]
            places, sent = alike.setdefault((place.device, tensor.device, place.dtype), ([], []))
            places.append(place)
            sent.append(tensor)
        for places, sent in alike.values():
            torch._foreach_copy_(places, sent)
        return checksums_of({name: self._places[name] for name in tensors})

    @torch.no_grad()
    def end_update(self) -> None:
        """Answer with the new version from now on.

        Raises:
            EngineUnusable: tensors have not come that had to: all, if no version answered before, else those of layers
                that run as one with what came. The update goes on.
            RuntimeError: no update has begun.
        """
        if self._loading is None:
            raise RuntimeError("end_update outside an update: call begin_update first.")
        needed = self._places if self._version is None else self._needed()
        if missing := [name for name in needed if name not in self._arrived]:
            why = self._why if self._version is None else f"{missing[0]} runs as one with what came"
            raise EngineUnusable(
                f"version {self._loading} is not whole: {len(missing)} of {len(needed)} tensors have not come, the "
                f"first is {missing[0]} ({why})."
            )
        self._decode()
        self._version, self._loading = self._loading, None

    def _needed(self) -> dict[str, None]:
        """What has to come beside what has come."""
        return dict.fromkeys(one for name in self._places if name in self._arrived for one in self._together[name])

    def _decode(self) -> None:
        again = {self._layers[owner] for owner in map(_owner, self._arrived) if owner in self._layers}
        for layer in again:
            layer.decode()
        for experts in self._skeleton.experts:
            if any(one in again for one in experts.each.values()):
                experts.decode()

    def abort_update(self) -> None:
        """Give the update up. The old version answers again if nothing was loaded, else nothing until a whole one."""
        if self._loading is None:
            raise RuntimeError("abort_update outside an update: call begin_update first.")
        if self._arrived:
            self._version = None
            self._why = f"version {self._loading} was given up when {len(self._arrived)} tensors of it had come"
        self._loading = None

    def checksums(self) -> dict[str, int]:
        """`checksum` of each stored tensor as it lies there now. EngineUnusable if `model` was moved."""
        self._check_in_place()
        return checksums_of(self._places)

    # What runs --------------------------------------------------------------------------------------------------------

    def live_layers(self) -> dict[str, LiveLayer]:
        """What runs for each linear layer, router and expert, by its name in the checkpoint."""
        return {name: layer for name, (layer, _) in live.layers(self._skeleton).items()}

    def probe(self, name: str, x: Tensor) -> Tensor:
        """``y [M, N]`` of the layer `name` for inputs ``x [M, K]``, without its bias, in the served dtype.

        Raises:
            EngineUnusable: no version answers.
            ValueError: there is no such layer.
        """
        with self._lock, self._answering():
            self._check_usable()
            layers = live.layers(self._skeleton)
            if name not in layers:
                raise ValueError(f"{name}: the engine has no such layer; it has {next(iter(layers))} and more.")
            return layers[name][1](x.to(self.model.device, self.model.dtype))

    # Answers ----------------------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """`sampling.n` answers to each prompt, in the prompts' order.

        Log-probabilities are fp32, of the very logits sampled from, after the temperature; at temperature 0 of the
        logits as they are. The random numbers of an answer depend on the seed and on its place among the answers alone:
        batching changes an answer by the kernels' rounding only. On the CPU the same call gives the same bits.

        Raises:
            EngineUnusable: no version answers.
            TypeError: a prompt is no sequence of integers.
            ValueError: an empty prompt, a token outside the vocabulary, a prompt and its answer longer than the model
                takes, a `sampling` out of range, or logits that are NaN.
        """
        sampler.check(sampling)
        rows = [row for row in self._tokens(prompts, "prompt", sampling.max_tokens) for _ in range(sampling.n)]
        uniform = sampler.uniforms(len(rows), sampling)
        answers: list[Any] = [None] * len(rows)
        with self._lock, self._answering():
            version = self._check_usable()
            widest = sampler.widest(self.model)
            for batch in sampler.by_length(rows, self.max_batch_tokens, sampling.max_tokens, widest):
                found = sampler.generate(self.model, [rows[row] for row in batch], sampling, uniform[batch])
                for row, (tokens, logprobs, stopped) in zip(batch, found, strict=True):
                    if logprobs.isnan().any():
                        raise ValueError(f"version {version}: logits after prompt {row // sampling.n} are NaN.")
                    answers[row] = Completion(tokens, logprobs, version, stopped)
        return answers

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """fp32 ``[len - 1]`` for each sequence, on the CPU: log-probability of every token but the first.

        Raises:
            EngineUnusable: no version answers.
            TypeError: a sequence is not one of integers.
            ValueError: an empty sequence, a token outside the vocabulary, or one longer than the model takes.
        """
        rows = self._tokens(sequences, "sequence", 0)
        with self._lock, self._answering():
            self._check_usable()
            return sampler.sequence_logprobs(self.model, rows, self.max_batch_tokens)

    def _check_usable(self) -> int:
        if self._loading is not None:
            raise EngineUnusable(
                f"version {self._loading} is being loaded, {len(self._arrived)} of {len(self._places)} tensors have "
                "come: end_update or abort_update first."
            )
        if self._version is None:
            raise EngineUnusable(f"the engine answers nothing: {self._why}. Send it a whole version.")
        self._check_in_place()
        return self._version

    def _check_in_place(self) -> None:
        """EngineUnusable if what the model multiplies with is no longer what updates are written to."""
        now = places_in_memory(self.model)
        if now != self._in_memory:
            before = self._in_memory
            name = next(name for name in {**before, **now} if before.get(name) != now.get(name))
            raise EngineUnusable(
                f"{name}: the model's tensors were moved or replaced (.to), and updates do not reach them: make a new "
                "engine on the device that you want."
            )

    def _tokens(self, rows: Sequence[Sequence[int]], what: str, more: int) -> list[list[int]]:
        """`rows` as lists, checked: each with room for `more` tokens."""
        lists = [_integers(row, f"{what} {number}") for number, row in enumerate(rows)]
        config = self.model.config.get_text_config()
        longest = getattr(config, "max_position_embeddings", None)
        for number, row in enumerate(lists):
            if not row:
                raise ValueError(f"{what} {number} is empty: the first token needs one before it.")
            if min(row) < 0 or max(row) >= config.vocab_size:
                raise ValueError(f"{what} {number} has a token outside the vocabulary of {config.vocab_size}.")
            if longest is not None and len(row) + more > longest:
                found = f"{len(row)} tokens" + f" and {more} to come" * bool(more)
                raise ValueError(f"{what} {number} has {found}, the model takes {longest}.")
        return lists

    def _answering(self) -> Any:
        return _Answering(self.model.device)


class _Answering:
    """No gradients, and no autocast of a trainer around: the engine computes in the served dtype."""

    def __init__(self, device: torch.device) -> None:
        self._contexts = (torch.no_grad(), scaled_mm.without_autocast(device))

    def __enter__(self) -> None:
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self._contexts):
            context.__exit__(*error)


def _class_of(config: Any, stored: Checkpoint) -> type[Any]:
    """The class that the folder says its model is of."""
    import transformers

    (name,) = config.architectures or ("nothing",)
    if not hasattr(transformers, name):
        raise CheckpointError(f"{stored.directory}/config.json: transformers has no class {name} (architectures).")
    return getattr(transformers, name)


def _integers(row: Any, what: str) -> list[int]:
    row = row.tolist() if isinstance(row, Tensor) else row
    kinds = set(map(type, row)) if isinstance(row, Iterable) else {type(row)}
    if not isinstance(row, Iterable) or any(kind is bool or not issubclass(kind, Integral) for kind in kinds):
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise TypeError(f"{what} must be a sequence of token ids, which are integers, found {found}.")
    return [*row]


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _schemes(model: nn.Module) -> dict[str, Scheme]:
    """Of the prepared modules, by name."""
    linears = {name: layer.scheme for name, layer in quantized_modules(model)}
    return linears | {name: experts.scheme for name, experts in quantized_experts(model)}


def _config_of(model: nn.Module) -> Any:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"the embedded engine runs transformers models, found {type(model).__name__}. Of a LightningModule, pass "
            "the model that it holds."
        )
    return model.config

"""`RolloutSession`: what a trainer holds now, live in an engine, whole and proven, or not at all.

A sync streams the model to the engine as `lockstep.export.stream` does, one unit at a time, and knows that it arrived
by checksums of both sides. Each sync is a version, and an engine answers with one version or with none.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from lockstep.export.checks import settle, settling
from lockstep.export.config import quantization_config
from lockstep.export.entries import PLAIN, Entry, Made, entries
from lockstep.export.files import parse_bytes
from lockstep.export.gather import ranks_of, together, without_wrappers
from lockstep.export.rollout import audit
from lockstep.export.rollout.audit import AuditError, AuditReport, Inspection
from lockstep.export.rollout.buckets import Buckets, indivisible
from lockstep.export.rollout.engine import RolloutEngine, checksums_later, checksums_of
from lockstep.export.served import Layer, quantized_keys, unquantized_layers
from lockstep.qat.prepare import (
    prepare,
    quantized_experts,
    quantized_modules,
    unprepare,
    unwrapped,
    with_adapters_merged,
)
from lockstep.scheme import Rule, Scheme

METHODS = ("begin_update", "load", "end_update", "abort_update")  # by which an engine is known
SHOW_AFTER = 2.0  # seconds after which a walk over the model shows how far it is, in a terminal
VERSIONS = 4  # of whose tensors a session remembers the checksums, to tell a stale one from a wrong one

Value = TypeVar("Value")


class SyncError(RuntimeError):
    """A sync failed. The message says why, and with which version the engine answers, if with any."""


@dataclass(frozen=True)
class SyncReport:
    """What a sync did.

    `version` is what the engine answers with now; `sent` and `skipped` count tensors, of which the latter were in the
    engine already; `bytes` are those sent; `seconds` are wall time; `checksums` are those of all tensors of the model,
    by the names that engines know.
    """

    version: int
    sent: int
    skipped: int
    bytes: int
    seconds: float
    checksums: dict[str, int] = field(repr=False)


class RolloutSession:
    """Keeps `engine` on the weights of `model`, in versions.

    >>> session = RolloutSession(model, engine)  # doctest: +SKIP
    >>> for prompts in data:
    ...     session.sync()
    ...     train(model, engine.generate(prompts, sampling))

    The first sync audits the engine, see `audit`, and so does the first after the model was prepared otherwise. Tensors
    go in buckets of whole units: the projections that engines fuse, and all experts of a block. There is no second copy
    of the model: beside it there are one bucket and two units, of which one is checked and hashed on the device while
    the other is waited for.

    Of a sharded model (FSDP1, FSDP2, ZeRO-3) all ranks make a session and call the same methods of it; rank zero has
    the engine, the others pass None. An error on one rank is an error on all.

    Args:
        model: a prepared model, or its wrapper, as in `lockstep.export.stream`. With `scheme`, or an engine whose
            format is ``"plain"``, it need not be prepared.
        engine: what generates; see `RolloutEngine`. For another engine make another session.
        scheme: quantize a model that is not prepared, at each sync and for the time of it: rollouts on a grid that
            training does not see. A preset's name, a `Scheme` or a list of `Rule`, as in `lockstep.prepare`.
        ignore: with `scheme`, what to leave as it is, as in `lockstep.prepare`.
        bucket_size: bytes, or a string such as ``"256MB"`` (decimal units).
        only_changed: send only units of which a tensor has changed since the last sync, where the engine takes a part.

    Raises:
        TypeError: a `model` that is a LightningModule, an `engine` that is none, a `scheme` that is none.
        ValueError: an unreadable size; `scheme` with a model that is prepared or has adapters of peft, or with an
            engine whose format is ``"plain"``.
    """

    def __init__(
        self,
        model: nn.Module,
        engine: RolloutEngine | None,
        *,
        scheme: str | Scheme | Sequence[Rule] | None = None,
        ignore: str | Sequence[str] = ("lm_head",),
        bucket_size: int | str = "256MB",
        only_changed: bool = True,
    ) -> None:
        _check_types(model, engine, scheme)
        self.model, self._engine = model, engine
        self._scheme, self._ignore, self._only_changed = scheme, ignore, only_changed
        self._limit = parse_bytes(bucket_size, "bucket_size")
        self._version: int | None = None
        self._tried = 0
        self._audited: dict[str, Scheme] | None = None  # of the prepared layers, when an audit found no problem
        self._sent: dict[str, int] = {}  # checksums of what the last sync left in the engine
        self._held: dict[str, int] = {}  # those of it that nobody has found otherwise since
        self._history: dict[int, dict[str, int]] = {}  # those of the last versions
        self._seen: dict[int, dict[str, int]] = {}  # fingerprints of the layers in the last audits
        if scheme is not None:
            if isinstance(scheme, str):
                Scheme.of(scheme)  # a preset that there is
            _check_unprepared(model)
            if engine is not None and engine.format == PLAIN:
                raise ValueError(f"scheme={scheme!r} quantizes, and the engine takes plain weights: leave one out.")

    @property
    def engine(self) -> RolloutEngine | None:
        """What generates. None on the other ranks of a sharded model."""
        return self._engine

    @property
    def version(self) -> int | None:
        """Of the last sync that succeeded; None before the first."""
        return self._version

    def sync(self) -> SyncReport:
        """Bring the engine to the weights that `model` has now, under a new version.

        Raises:
            SyncError: the model could not be streamed, or the engine did not take it. Nothing is assumed of the engine
                any more: the next sync sends everything.
            AuditError: the first sync, or the first with other schemes, arrived, and the engine does not compute with
                what was sent. It answers all the same: do not use it.
        """
        start = time.perf_counter()
        held, self._held, self._sent = self._held, {}, {}
        update: _Update | None = None

        def begin() -> None:
            nonlocal update
            if self.engine is None:
                return
            update = self._update(self.engine, held)  # kept before it begins: an interrupt gives it up
            try:
                update.begin()
            except Exception:
                update = None
                raise

        def take(unit: list[Made]) -> None:
            assert update is not None
            update.add(unit)

        def finish() -> SyncReport | None:
            if problem is not None:
                raise problem if update is None else update.failed(problem) from problem
            return None if update is None else update.finish(start)

        try:
            with self._served() as served:
                served.agree(begin)
                problem = served.walk(served.make, take)
                report = served.agree(finish)
                assert report is not None
                schemes = served.agree(lambda: _schemes(served.model))  # of one rank: all must audit, or none
                if schemes != self._audited:
                    self._audit(served, None, report).assert_ok()
        except (SyncError, AuditError):
            raise
        except Exception as error:
            raise self._failed(error, update) from error
        except BaseException as error:  # Ctrl-C
            self._failed(error, update)
            raise
        self._audited = schemes
        self._version, self._sent, self._held = report.version, report.checksums, report.checksums
        _remember(self._history, report.version, report.checksums)
        return report

    def verify(self) -> AuditReport:
        """Compare what lies in the engine with what the trainer would send now, tensor by tensor, by checksums.

        Problems name every stale, differing or missing tensor. After a sync, until the trainer steps, there are none.
        What lies in the engine otherwise than it was sent is sent again by the next sync.

        Raises:
            AuditError: the engine keeps its tensors in another layout than it was sent, and cannot tell: see `audit`.
        """
        now: dict[str, int] = {}

        def take(unit: list[dict[str, int]]) -> None:
            for sums in unit:
                now.update(sums)

        with self._served() as served:
            problem = served.walk(lambda entry: checksums_of(dict(entry.tensors())), take)

            def compare() -> AuditReport | None:
                if problem is not None:
                    raise problem
                if self.engine is None:
                    return None
                lying = self.engine.checksums()
                if lying is None:
                    raise AuditError("the engine keeps its tensors in another layout than they were sent in: audit().")
                self._held = {name: total for name, total in self._held.items() if lying.get(name) == total}
                found = audit.compare_checksums(now, lying, self._history, self.engine.version)
                return AuditReport(found, len(now))

            report = served.agree(compare)
        assert report is not None
        return report

    def audit(self, checkpoint: str | Path | None = None) -> AuditReport:
        """Compare trainer, config and live engine layer by layer, and read the engine's weights back by known inputs.

        Compared are: the schemes of the trainer's layers, of the config that it exports, and of the engine's live
        modules, with the rows of fused ones; what each live layer gives for rows of the identity (its weight, exact)
        and for a dense input (see `lockstep.export.rollout.audit`); and where the engine can tell, the checksums of
        what lies in it with those of what was sent. Of a model that has trained on since the last sync, layers that
        have changed are reported as that. Where the engine shows the config of its model (an attribute ``config``, as
        transformers makes it), what decides how layers are put together is compared too. After an audit with problems
        the next sync sends everything.

        Args:
            checkpoint: the folder that the engine was started from, whose config and tensors are compared too.
        """
        with self._served() as served:
            report = self._audit(served, checkpoint, None)
        if not report.ok:
            self._held = {}
        return report

    # -------------------------------------------------------------------------------------------------------------

    @contextmanager
    def _served(self) -> Iterator[_Served]:
        """What is sent, for the time of a ``with`` block."""
        with torch.no_grad(), self.quantized(), with_adapters_merged(self.model) as model:
            ranks = ranks_of(model)
            if ranks is None and self.engine is None:
                raise ValueError(
                    "engine=None is for the other ranks of a sharded model, and this one is whole here: make the "
                    "session on the ranks that have an engine (with DDP each may have its own)."
                )
            if ranks is not None:
                holders = [rank for rank, has in enumerate(together(self._has_engine, ranks)) if has]
                if holders != [0]:
                    raise ValueError(f"ranks {holders} have an engine: of a sharded model it is rank 0 alone.")
            first = _Served(model, ranks, None, {}, self._has_engine())
            format = first.agree(lambda: self.engine.format if self.engine is not None else None)

            def check_prepared() -> None:
                if format != PLAIN and not any((*quantized_modules(model), *quantized_experts(model))):
                    raise ValueError(
                        "the engine takes quantized weights and the model is not prepared: call lockstep.prepare "
                        "before training, or give the session a scheme, which quantizes at each sync alone."
                    )

            first.agree(check_prepared)
            found: dict[str, list[Entry]] = {}
            for entry in entries(model, format, ranks):
                found.setdefault(entry.name, []).append(entry)
            yield first._replace(format=format, entries=found)

    def _has_engine(self) -> bool:
        return self.engine is not None

    @contextmanager
    def quantized(self) -> Iterator[None]:
        """With `scheme`, `model` is prepared for the time of the block; without, nothing changes."""
        if self._scheme is None:
            yield
            return
        scheme, ranks, switched = self._scheme, ranks_of(self.model), False

        def switch() -> None:
            nonlocal switched
            _check_unprepared(self.model)
            prepare(self.model, scheme, ignore=self._ignore)
            switched = True

        try:
            if ranks is None:
                switch()
            else:
                together(switch, ranks)
            yield
        finally:
            if switched:
                unprepare(unwrapped(self.model))

    def _update(self, engine: RolloutEngine, held: dict[str, int]) -> _Update:
        # Whoever else has updated the engine has left it with another version.
        known = self._only_changed and engine.partial and engine.version == self._version
        self._tried = max(self._tried, engine.version or 0) + 1
        return _Update(engine, self._tried, held if known else {}, self._limit)

    def _failed(self, error: BaseException, update: _Update | None) -> SyncError:
        if update is not None:
            return update.failed(error)
        return SyncError(str(error) if self.engine is None else f"{_sentence(error)} {_answers(self.engine)}")

    def _audit(self, served: _Served, checkpoint: str | Path | None, sent: SyncReport | None) -> AuditReport:
        """`audit`; at the first sync with what was `sent`."""
        model, plain = unwrapped(served.model), served.format == PLAIN
        with without_wrappers(model):
            others = unquantized_layers(model)
            layers: dict[str, dict[str, Layer]] = {}
            for key, found in quantized_keys(model).items():
                layers.setdefault(key.rpartition(".")[0], {}).update(found)
        quantized = {name: layer.scheme for of_module in layers.values() for name, layer in of_module.items()}
        scope: dict[str, Scheme | None] = dict.fromkeys([*quantized, *others]) | ({} if plain else dict(quantized))
        sums = self._sent if sent is None else sent.checksums
        inspection: Inspection | None = None

        def begin() -> None:
            nonlocal inspection
            if self.engine is not None:
                inspection = Inspection(self.engine, scope, self._seen)

        def look(entry: Entry) -> None:
            assert inspection is not None
            for layer in audit.trained_layers(entry, layers.get(entry.name, {}), plain):
                inspection.look(layer)

        def explain(entry: Entry) -> None:
            assert inspection is not None
            for layer in audit.trained_layers(entry, layers.get(entry.name, {}), plain):
                inspection.explain(layer)
            for name, total in checksums_of(dict(entry.tensors())).items() if sums else ():
                if audit.layer_of(name) in inspection.suspects and total != sums.get(name):
                    inspection.moved.add(audit.layer_of(name))

        def suspects() -> bool:
            if problem is not None:
                raise problem
            return inspection is not None and bool(inspection.suspects)

        def conclude() -> AuditReport | None:
            if inspection is None or self.engine is None:
                return None
            lying = self.engine.checksums() if sums else None
            stored = {} if lying is None else audit.compare_checksums(sums, lying, self._history, self._version)
            configs = {} if plain else {"the exported config": quantization_config(model, served.format)}
            report = inspection.report(configs, checkpoint, stored, audit.architecture_problems(model, self.engine))
            if self.engine.version is not None:
                _remember(self._seen, self.engine.version, inspection.fingerprints)
            return report

        served.agree(begin)
        problem = served.walk(look, lambda _: None)
        if served.agree(suspects):
            problem = served.walk(explain, lambda _: None)
            served.agree(suspects)
        report = served.agree(conclude)
        assert report is not None
        return report


class _Served(NamedTuple):
    """What is sent: of `model`, its modules by name, in `format`, by the `ranks` it is sharded over."""

    model: nn.Module
    ranks: dist.ProcessGroup | None
    format: str | None
    entries: dict[str, list[Entry]]
    here: bool  # whether this rank has the engine

    def agree(self, work: Callable[[], Value]) -> Value:
        """What `work` returns on the rank with the engine; an error on one rank is one on all."""
        return work() if self.ranks is None else together(work, self.ranks)[0]

    def make(self, entry: Entry) -> Made:
        """What is stored of `entry`, settled if the model is sharded: its module is whole now and not later."""
        made = entry.made()
        if self.ranks is not None:
            settle(made.checks)
            made.checks.clear()
        return made

    def walk(self, read: Callable[[Entry], Value], take: Callable[[list[Value]], None]) -> Exception | None:
        """`read` each module while it is whole, and `take` the results unit by unit, on the rank with the engine.

        An error is returned: the other ranks wait for this one where the next module is gathered.
        """
        problem: Exception | None = None
        units = [*indivisible(self.entries)]
        hidden = None if self.here else True  # None: where it is no terminal
        for names in tqdm(units, "weights", leave=False, disable=hidden, delay=SHOW_AFTER):
            found: list[Value] = []
            try:
                for entry in (one for name in names for one in self.entries[name]):
                    with entry.whole():
                        if self.here and problem is None:
                            found.append(read(entry))
                if self.here and problem is None:
                    take(found)
            except Exception as error:
                problem = problem or error
                if self.ranks is None:
                    break
        return problem


class _Update:
    """One update of an engine."""

    def __init__(self, engine: RolloutEngine, version: int, held: Mapping[str, int], limit: int) -> None:
        self.version, self.checksums = version, dict[str, int]()
        self._engine, self._held = engine, held
        self._begun, self._open, self._ended = False, False, False
        self._sent, self._skipped, self._bytes = 0, 0, 0
        self._last: Callable[[], None] | None = None  # waits for the last unit's checks and checksums, and sends it
        self._buckets = Buckets(limit, self._load)

    def begin(self) -> None:
        """Announce it. SyncError if the engine does not take it."""
        idle = self._engine.version is not None
        self._open = True  # before it is: an interrupt does not say how far it came
        try:
            self._engine.begin_update(self.version)
        except Exception as error:
            self._open = idle  # else the update that is open may be somebody else's
            raise self.failed(error) from error
        self._begun = True

    def add(self, made: Sequence[Made]) -> None:
        """Take a unit, and send the one before, unless the engine holds just that."""
        unit = {name: tensor for one in made for name, tensor in one.tensors.items()}
        settled, sums = settling([check for one in made for check in one.checks]), checksums_later(unit)

        def send() -> None:
            settled()
            found = sums()
            self.checksums |= found
            if found.items() <= self._held.items():
                self._skipped += len(found)
            else:
                self._buckets.add(unit)

        last, self._last = self._last, send
        if last is not None:
            last()

    def finish(self, start: float) -> SyncReport:
        """Make the engine answer with what was sent."""
        try:
            if self._last is not None:
                self._last()
            self._buckets.flush()
            self._engine.end_update()
            self._open, self._ended = False, True
            if self._engine.version != self.version:
                raise RuntimeError(f"the engine has taken version {self.version} and says {self._engine.version}.")
        except Exception as error:
            raise self.failed(error) from error
        seconds = time.perf_counter() - start
        return SyncReport(self.version, self._sent, self._skipped, self._bytes, seconds, self.checksums)

    def failed(self, error: BaseException) -> SyncError:
        """Give the update up, and say what the engine is now."""
        said = [f"{'after ' if self._ended else ''}version {self.version}: {_sentence(error)}"]
        if self._open:
            self._open = False
            try:
                self._engine.abort_update()
            except Exception as failure:  # to be expected of an engine that has not begun
                said += [f"Its abort failed too: {_sentence(failure)}"] if self._begun else []
        return SyncError(" ".join([*said, _answers(self._engine)]))

    def _load(self, bucket: dict[str, Tensor]) -> None:
        arrived = self._engine.load(bucket)
        for name, tensor in bucket.items():
            if name not in arrived:
                raise RuntimeError(f"{name} was sent, and the engine does not say that it arrived.")
            if arrived[name] != self.checksums[name]:
                raise RuntimeError(
                    f"{name} did not arrive as it was sent: checksum {arrived[name]:016x}, sent was "
                    f"{self.checksums[name]:016x}. The transport changed it."
                )
            self._bytes += tensor.numel() * tensor.element_size()
        self._sent += len(bucket)


def _sentence(error: BaseException) -> str:
    return (str(error) or type(error).__name__).rstrip(".") + "."


def _remember(of: dict[int, dict[str, int]], version: int, sums: dict[str, int]) -> None:
    of[version] = sums
    for old in sorted(of)[:-VERSIONS]:
        del of[old]


def _answers(engine: RolloutEngine) -> str:
    try:
        version = engine.version
    except Exception as error:
        return f"The engine does not say what it answers with ({type(error).__name__}: {error}): take it as unusable."
    if version is None:
        return "The engine is unusable until a whole sync has succeeded."
    return f"The engine answers with version {version}."


def _schemes(model: nn.Module) -> dict[str, Scheme]:
    """Of the prepared layers, by their names in the model."""
    bare = unwrapped(model)
    experts = {name: block.scheme for name, block in quantized_experts(bare)}
    return {name: layer.scheme for name, layer in quantized_modules(bare)} | experts


def _check_types(model: nn.Module, engine: Any, scheme: Any) -> None:
    if any(kind.__name__ == "LightningModule" for kind in type(model).__mro__):
        raise TypeError(
            f"model is a LightningModule, {type(model).__name__}, whose names no engine knows: pass the model it holds."
        )
    lacking = [name for name in METHODS if not callable(getattr(engine, name, None))]
    if engine is not None and lacking:
        raise TypeError(
            f"engine={engine!r} has no {', '.join(lacking)}: an engine is a RolloutEngine, such as "
            "EmbeddedEngine.from_model(model) or VLLMEngine(llm)."
        )
    rules = isinstance(scheme, Sequence) and scheme and all(isinstance(rule, Rule) for rule in scheme)
    if scheme is not None and not isinstance(scheme, str | Scheme) and not rules:
        raise TypeError(f"scheme={scheme!r}: a scheme is a preset's name, a Scheme or a list of lockstep.Rule.")


def _check_unprepared(model: nn.Module) -> None:
    first = next((name for name, _ in (*quantized_modules(model), *quantized_experts(model))), None)
    if first is not None:
        raise ValueError(f"scheme= quantizes a model that trains unquantized, and {first} is prepared: leave it out.")
    if "peft" in sys.modules:
        from lockstep.qat import lora

        if lora.adapted(model):
            raise ValueError(
                "scheme= quantizes whole weights: prepare the model with its adapters (lockstep.qat.lora)."
            )

"""`prepare` and `unprepare`: switch a model's layers to quantization-aware training and back, by class alone (C5)."""

from __future__ import annotations

import difflib
import math
import os
import re
import sys
import warnings
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast, get_args

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_module_registration_hook

from lockstep.qat import learned
from lockstep.qat.experts import DOWN, GATED, PLAIN, QATExperts, layout_of, qat_class, shape_of
from lockstep.qat.linear import QATLinear, SharedInput
from lockstep.qat.reuse import Kept, Reuse
from lockstep.scheme import DTYPES, Rule, Scheme, dtype_name

# Engines run these as one layer: they are quantized alike, and share what is scaled by the tensor.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# Under what name torch.compile's, FSDP1's and activation checkpointing's wrappers hold what they wrap.
WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
OVERLOOKED = 0.05  # share of the parameters beyond which `prepare` warns of modules that no rule names


@dataclass(frozen=True)
class ModuleRow:
    """One module that owns parameters: `scheme` if it trains quantized, else the `reason` why it does not.

    `overlooked`: it owns a matrix, and no rule, target or ignore names it.
    """

    name: str
    kind: str
    parameters: int
    scheme: Scheme | None = None
    reason: str = ""
    overlooked: bool = False


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` did with each module that owns parameters. Printing it gives a table."""

    rows: tuple[ModuleRow, ...]

    @property
    def quantized(self) -> tuple[ModuleRow, ...]:
        """The modules that train quantized."""
        return tuple(row for row in self.rows if row.scheme)

    @property
    def skipped(self) -> tuple[ModuleRow, ...]:
        """The modules that do not, each with its `reason`."""
        return tuple(row for row in self.rows if not row.scheme)

    @property
    def quantized_share(self) -> float:
        """Share of the parameters that are in quantized modules."""
        return self.share(self.quantized)

    @property
    def overlooked(self) -> tuple[ModuleRow, ...]:
        """The modules with a matrix that no rule, target or ignore names: embeddings, routers, what is forgotten."""
        return tuple(row for row in self.rows if row.overlooked)

    def share(self, rows: Iterable[ModuleRow]) -> float:
        """Share of the parameters that are in `rows`."""
        return sum(row.parameters for row in rows) / max(1, sum(row.parameters for row in self.rows))

    def __rich__(self):  # type: ignore[no-untyped-def]
        from rich.table import Table

        table = Table(
            title=f"{len(self.quantized)} modules train quantized, {self.quantized_share:.1%} of the parameters",
            title_justify="left",
            caption=f"named by no rule: {self._overlooked_in_words()}" if self.overlooked else None,
            caption_justify="left",
        )
        for header in ("module", "type", "parameters", "trains as", "why not quantized"):
            table.add_column(header, justify="right" if header == "parameters" else "left", overflow="fold")
        for (name, kind, scheme, reason), rows in _alike(self.rows).items():
            shown = f"{name}  x{len(rows)}" if len(rows) > 1 else rows[0].name
            table.add_row(shown, kind, f"{sum(row.parameters for row in rows):,}", scheme, reason)
        return table

    def _overlooked_in_words(self) -> str:
        kinds: dict[str, list[ModuleRow]] = {}
        for row in self.overlooked:
            kinds.setdefault(row.kind, []).append(row)
        return ", ".join(
            f"{len(rows)} {kind} ({self.share(rows):.1%} of the parameters)" for kind, rows in kinds.items()
        )

    def __str__(self) -> str:
        return as_text(self)


def prepare(
    model: nn.Module,
    scheme: str | Scheme | Sequence[Rule],
    targets: str | Sequence[str] = ("Linear",),
    ignore: str | Sequence[str] = ("lm_head",),
    reuse: Reuse | None = None,
    fp8_input_gradient: bool = False,
    learned_scales: bool = False,
) -> PrepareReport:
    """Make the matching layers of `model` train on the weights, and inputs, that `scheme` will serve.

    Layers are ``nn.Linear`` and transformers' mixtures of experts (3-D parameters ``gate_up_proj`` or ``up_proj``, and
    ``down_proj``), which to engines are of the class ``Linear`` too: see `lockstep.qat.experts`.

    Swaps ``module.__class__`` in place: no parameter or state-dict key is added, so optimizers, checkpoints and
    sharding see the model that they know. The one exception is a scheme with measured input ranges (``FP8``,
    ``NVFP4``): each layer gets the buffer ``input_scale`` (``input_global_scale``), fp32 ``[1]``, which
    `lockstep.calibrate` fills. Doing it twice with the same scheme changes nothing but `reuse` and
    `fp8_input_gradient`, which are as the last call says. Works on the ``meta`` device, where only shapes are checked.

    Args:
        model: any module tree with such layers.
        scheme: a preset's name (``"W4A16"``), a `Scheme`, or a recipe: a list of `Rule`, of which the first that
            matches a layer wins, and whose own targets take the place of `targets`.
        targets: what to quantize: class names, exact module names or ``re:`` regexes, as in compressed-tensors.
        ignore: what to leave out, in the same words.
        reuse: what a layer keeps while its master stays as it is, for the micro-batches of an optimizer step and for
            activation checkpointing: ``"codes"`` (half a byte a weight), ``"weight"`` (the dequantized weight), or
            None: nothing, each pass quantizes again. See `lockstep.qat.reuse`. It breaks a ``torch.compile`` graph.
            For symmetric INT4 weights with inputs as they are; experts keep nothing.
        fp8_input_gradient: compute the gradient of a layer's input on fp8 codes, of the incoming gradient by token and
            of the weight as it is served: faster, less exact. For fp8 schemes scaled by channel or tensor; experts do
            not.
        learned_scales: make the weight scales parameters (``weight_scale``, fp32) that train along: see
            `lockstep.qat.learned`. For symmetric integer weights of ``nn.Linear``.

    Returns:
        A row for every module that owns parameters: what it trains as, or why it is left as it was.

    Raises:
        ValueError: a target that matches nothing; an unknown preset; rows that do not divide into groups; a module
            that is prepared already, with another scheme or though it is left out now; an unknown `reuse`.
        TypeError: a matched module that is not plain ``nn.Linear``, or whose forward would bypass the quantization.

    Nothing is changed when it raises.
    """
    model = unwrapped(model)
    if (lora := _lora(model)) is not None:
        options = {"reuse": reuse, "fp8_input_gradient": fp8_input_gradient, "learned_scales": learned_scales}
        return lora.prepare(model, scheme, targets, ignore, **options)
    if reuse not in (None, *get_args(Reuse)):
        raise ValueError(f"reuse={reuse!r}: choose {' or '.join(map(repr, get_args(Reuse)))}, or None.")
    rules = _rules(scheme, _patterns(targets))
    ignore = _patterns(ignore)
    modules = dict(named_modules(model))
    chosen, reasons = _choose(model, modules, rules, ignore)
    if flat := [name for name, one in modules.items() if name not in reasons and _flattened_experts(one)]:
        raise TypeError(f"{flat[0]} holds experts that FSDP1 has flattened: prepare before the model is wrapped.")
    of_experts = {name: wanted for name, wanted in chosen.items() if layout_of(modules[name])}
    chosen = {name: wanted for name, wanted in chosen.items() if name not in of_experts}
    for name, wanted in chosen.items():
        _check(name, modules[name], wanted, parent=modules[name.rpartition(".")[0]])
        _check_options(name, modules[name], wanted, reuse, fp8_input_gradient, learned_scales)
    for name, wanted in of_experts.items():
        _check_experts(name, modules[name], wanted, learned_scales)
    prepared: list[tuple[str, Any]] = [*quantized_modules(model), *quantized_experts(model)]
    for name, layer in prepared:
        if layer.scheme != (now := (chosen | of_experts).get(name)):
            raise ValueError(_prepared_already(name, layer.scheme, now))
    fused = _fused(chosen)
    shared = {tuple(siblings): SharedInput(len(siblings)) for siblings in fused.values() if len(siblings) > 1}

    for name, wanted in chosen.items():
        module: Any = modules[name]
        module.__class__ = QATLinear
        module.scheme, module.qualified_name = wanted, name
        module.kept = None if reuse is None else Kept(reuse)
        module.fp8_input_gradient = fp8_input_gradient
        module.fused = tuple(modules[sibling] for sibling in fused[name]) if wanted.weights.per_tensor else ()
        module.shared_input = shared.get(tuple(fused[name])) if wanted.activations is not None else None
        if learned_scales and learned.KEY not in module._parameters:
            module.register_parameter(learned.KEY, nn.Parameter(learned.initial_scale(module.weight, wanted.weights)))
        inputs = wanted.activations
        if inputs is not None and inputs.stores_scale and inputs.scale_name not in module._buffers:
            module.register_buffer(inputs.scale_name, torch.full((1,), torch.nan, device=module.weight.device))
    for name, wanted in of_experts.items():
        module, plain = modules[name], cast(Hashable, type(modules[name]))
        module.scheme, module.qualified_name, module.layout = wanted, name, layout_of(module)
        module.__class__ = plain if isinstance(module, QATExperts) else qat_class(plain)
    every_target = tuple(dict.fromkeys(target for rule in rules for target in rule.targets))
    report = PrepareReport(tuple(_rows(modules, reasons, every_target)))
    _warn_of_overlooked(report)
    return report


def unprepare(model: nn.Module) -> None:
    """Give every prepared layer of `model` its ``nn.Linear`` class back; its master weights stay as trained.

    Measured input scales and learned weight scales are dropped.
    """
    for _, module in list(quantized_modules(model)):
        module._parameters.pop(learned.KEY, None)
        inputs = module.scheme.activations
        if inputs is not None:
            module._buffers.pop(inputs.scale_name, None)
        for name in (
            "scheme",
            "qualified_name",
            "kept",
            "fused",
            "shared_input",
            "observer",
            "warmup",
            "fp8_input_gradient",
            "_seen",
        ):
            vars(module).pop(name, None)
        module.__class__ = nn.Linear  # type: ignore[assignment]
    for _, experts in list(quantized_experts(model)):
        for name in ("scheme", "qualified_name", "layout"):
            delattr(experts, name)
        experts.__class__ = experts.plain_class  # type: ignore[assignment]


def quantized_modules(model: nn.Module) -> Iterator[tuple[str, QATLinear]]:
    """Names and modules of the layers that `prepare` switched, in the model's order."""
    for name, module in named_modules(model):
        if isinstance(module, QATLinear):
            yield name, module


def quantized_experts(model: nn.Module) -> Iterator[tuple[str, QATExperts]]:
    """Names and modules of the mixtures of experts that `prepare` switched, in the model's order."""
    for name, module in named_modules(model):
        if isinstance(module, QATExperts):
            yield name, module


def as_text(report: Any, width: int = 140) -> str:
    """What rich prints of `report`, for ``str`` and logs."""
    from rich.console import Console

    console = Console(width=width)
    with console.capture() as capture:
        console.print(report)
    return capture.get().rstrip()


def show(report: Any) -> None:
    """Print `report`, as wide as the terminal; into a pipe or a file, wide enough not to break names."""
    from rich.console import Console

    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    Console(width=None if known else 200).print(report)


def run_as_one(names: Iterable[str]) -> list[list[str]]:
    """The layers `names` in the groups that engines run as one layer; others alone."""
    groups: dict[tuple[str, object], list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        parts = next((parts for parts in FUSED if leaf in parts), leaf)
        groups.setdefault((parent, parts), []).append(name)
    return list(groups.values())


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``'s, data parallelism's or DeepSpeed's wrapper, with the names engines know."""
    while (bare := inner(model)) is not None:
        model = bare
    return model


def inner(module: nn.Module) -> nn.Module | None:
    """The module that `module` wraps and passes its inputs to, or None: it is no wrapper known here.

    Known are ``torch.compile``, DataParallel, DDP, FSDP1, torch's checkpoint_wrapper, DeepSpeed's engine and a
    ``PeftModel``.
    """
    for name in WRAPPED:
        if name in module._modules:
            return module._modules[name]
    deepspeed = sys.modules.get("deepspeed")
    engines = (deepspeed.DeepSpeedEngine,) if deepspeed and hasattr(deepspeed, "DeepSpeedEngine") else ()
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel, *engines)
    peft: Any = sys.modules.get("peft")
    if hasattr(peft, "PeftModel") and isinstance(module, peft.PeftModel):
        return module.get_base_model()
    return module.module if isinstance(module, parallel) else None


@contextmanager
def with_adapters_merged(model: nn.Module) -> Iterator[nn.Module]:
    """Where peft's adapters are in `model`, the model that is served (`lockstep.qat.lora.merged`); else itself."""
    lora = _lora(model)
    with nullcontext(model) if lora is None else lora.merged(model) as served:
        yield served


def _lora(model: nn.Module) -> Any:
    """`lockstep.qat.lora` if peft's adapters are in `model`, else None: it loads peft."""
    if "peft" not in sys.modules:
        return None
    from lockstep.qat import lora

    return lora if lora.adapted(model) else None


def _watch_peft(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    # peft may be imported after prepare. torch calls this for every module that is put into another.
    if isinstance(child, QATLinear | QATExperts) and "peft" in sys.modules:
        from lockstep.qat.lora_merged import refuse_within_peft

        refuse_within_peft(parent, name, child)


register_module_module_registration_hook(_watch_peft)


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules as ``model.named_modules()``, but without wrappers within the model and their part of names."""
    for name, module in model.named_modules():
        if inner(module) is None:
            yield ".".join(part for part in name.split(".") if part not in WRAPPED), module


def _choose(
    model: nn.Module, modules: dict[str, nn.Module], rules: Sequence[Rule], ignore: Sequence[str]
) -> tuple[dict[str, Scheme], dict[str, str]]:
    """The scheme of each module that trains quantized, and why others that match do not."""
    matched = [_matching(modules, rule.targets) for rule in rules]
    for target, names in (item for found in matched for item in found.items()):
        if not names:
            raise ValueError(_matches_nothing(target, modules))
    ignored = _matching(modules, ignore)
    for pattern, names in ignored.items():
        if not names and pattern != "lm_head":
            warnings.warn(f"ignore={pattern!r} matches no module of {type(model).__name__}.", stacklevel=3)

    reasons = {name: f"ignored by {pattern!r}" for pattern, names in ignored.items() for name in names}
    beside_experts, passed_over = routers(model), set[str]()
    chosen: dict[str, Scheme] = {}
    for rule, found in zip(rules, matched, strict=True):
        by_name = {one for target, names in found.items() for one in names if target == one or target.startswith("re:")}
        for name in (name for names in found.values() for name in names if name not in reasons | chosen):
            if name in beside_experts - by_name:
                passed_over.add(name)
            elif rule.scheme is None:
                reasons[name] = f"left as it is by the rule for {', '.join(rule.targets)}"
            else:
                chosen[name] = Scheme.of(rule.scheme)
    for name in passed_over - chosen.keys():
        reasons.setdefault(name, "a router, which engines keep as it is: quantized only by its own name or a regex")
    if not chosen:
        all_targets = [target for rule in rules for target in rule.targets]
        raise ValueError(f"nothing to quantize: ignore={list(ignore)} covers all that targets={all_targets} match.")
    heads = [name for name in chosen if name.endswith(".lm_head")]
    if heads and "lm_head" in ignore:
        raise ValueError(
            f"ignore='lm_head' does not cover {heads[0]}: names start at the module that is prepared. Prepare "
            "the language model itself, or name the head as 're:.*lm_head$'."
        )
    return chosen, reasons


def routers(model: nn.Module) -> set[str]:
    """Names of the modules with a weight that stand beside a layer's experts: routers, and gates of shared experts."""
    found = set()
    for parent, module in named_modules(model):
        children = dict(module.named_children())
        if "experts" in children or any(layout_of(child) for child in children.values()):
            weighted = [name for name, child in children.items() if child._parameters.get("weight") is not None]
            found |= {f"{parent}.{name}".lstrip(".") for name in weighted}
    return found


def _check(name: str, module: nn.Module, scheme: Scheme, parent: nn.Module) -> None:
    if type(module).__module__ == "bitsandbytes.nn.modules":
        raise TypeError(
            f"{name} is bitsandbytes' {type(module).__name__}: training on another grid than it has would move it. "
            "lockstep.qat.lora.requantize measures by how much, and does it if that is accepted; or load the model "
            "without quantization_config."
        )
    if isinstance(module, FSDPModule):
        raise TypeError(f"{name} is fully_shard-ed by itself: prepare first, or shard the block around it.")
    if type(module) not in (nn.Linear, QATLinear):
        raise TypeError(
            f"{name} is a {type(module).__module__}.{type(module).__name__}: this version quantizes torch.nn.Linear "
            "itself, a subclass or another type has a forward of its own. Name it in ignore, or narrow targets."
        )
    if "weight" not in module._parameters or module.weight.dtype not in DTYPES.values():
        found = module.weight.dtype if "weight" in module._parameters else "one computed from other parameters"
        raise TypeError(f"{name} needs a weight of its own in {', '.join(DTYPES)}, found {found}.")
    if "forward" in vars(module):
        raise TypeError(
            f"{name} has a forward of its own set on the instance (an accelerate hook, for one), which would bypass "
            "the quantization. Remove the hook, prepare, and add it again."
        )
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        raise TypeError(
            f"{name} is in an nn.TransformerEncoderLayer, whose fast path for inference reads the weight itself and "
            "would bypass the quantization. Call torch.backends.mha.set_fastpath_enabled(False) first."
        )
    try:
        scheme.weights.num_groups(module.in_features)  # type: ignore[arg-type]
        if scheme.activations is not None:
            scheme.activations.num_groups(module.in_features)  # type: ignore[arg-type]
    except ValueError as error:
        shape = (module.out_features, module.in_features)
        raise ValueError(f"{name}, weight of shape {shape}: {error} Or name the module in ignore.") from None


def _flattened_experts(module: nn.Module) -> bool:
    flat = {name for name in (GATED, PLAIN, DOWN) if len(shape_of(module._parameters.get(name))) == 1}
    return layout_of(module) is None and DOWN in flat and len(flat) > 1


def _check_experts(name: str, module: Any, scheme: Scheme, learned_scales: bool) -> None:
    layout = layout_of(module)
    assert layout is not None
    if learned_scales:
        raise ValueError(f"{name} holds fused experts, whose scales are not learned: name it in ignore.")
    if scheme.activations is not None and scheme.activations.stores_scale:
        raise ValueError(
            f"{name} holds fused experts, and {scheme.activations} inputs have a measured range: choose a scheme with "
            "dynamic inputs (FP8_DYNAMIC, W8A8), or name it in ignore."
        )
    if "forward" in vars(module):
        raise TypeError(f"{name} has a forward of its own set on the instance, which would bypass the quantization.")
    for parameter in (layout.first, DOWN):
        weight, (_, k) = module._parameters[parameter], layout.shape(parameter)
        if weight.dtype not in DTYPES.values():
            raise TypeError(f"{name}.{parameter} needs weights in {', '.join(DTYPES)}, found {weight.dtype}.")
        try:
            scheme.weights.num_groups(k)
            if scheme.activations is not None:
                scheme.activations.num_groups(k)
        except ValueError as error:
            shape = shape_of(weight)
            raise ValueError(f"{name}.{parameter} of shape {shape}: {error} Or name the module in ignore.") from None


def _check_options(
    name: str, module: Any, scheme: Scheme, reuse: Reuse | None, fp8_input_gradient: bool, learned_scales: bool
) -> None:
    weights = scheme.weights
    if learned_scales and (weights.format not in ("int4", "int8") or weights.scale_rule in ("max/-8", "range/15")):
        raise ValueError(f"{name}: learned_scales needs symmetric integer weights with positive scales, not {scheme}.")
    if reuse is not None and (learned_scales or learned.KEY in module._parameters):
        raise ValueError(f"{name}: reuse={reuse!r} and learned_scales=True exclude each other: scales change too.")
    sharded = isinstance(module.weight, DTensor) or hasattr(module.weight, "ds_id")
    if learned_scales and sharded and learned.KEY not in module._parameters:
        raise ValueError(f"{name}: learned scales are sharded with the weights: prepare before the model is sharded.")
    if learned_scales and module.weight.is_meta:
        raise ValueError(f"{name}: learned scales start from the weights, which are on the meta device.")
    if reuse is not None and (weights.format != "int4" or not weights.symmetric or scheme.activations):
        raise ValueError(f"{name}: reuse={reuse!r} keeps symmetric INT4 weights with inputs as they are, not {scheme}.")
    if reuse == "codes" and module.in_features % 8:
        raise ValueError(f"{name}: reuse='codes' packs 8 codes in a word, not {module.in_features} inputs in a row.")
    if fp8_input_gradient and (weights.format != "fp8_e4m3" or weights.strategy not in ("channel", "tensor")):
        raise ValueError(f"{name}: fp8_input_gradient needs fp8 weights scaled by channel or tensor, not {scheme}.")


def _rules(scheme: str | Scheme | Sequence[Rule], targets: Sequence[str]) -> list[Rule]:
    if isinstance(scheme, str | Scheme):
        return [Rule(targets, Scheme.of(scheme))]
    if not isinstance(scheme, Sequence) or not scheme or not all(isinstance(rule, Rule) for rule in scheme):
        raise TypeError(f"a scheme is a preset's name, a Scheme or a list of lockstep.Rule, found {scheme!r}.")
    rules = [Rule(_patterns(rule.targets), rule.scheme and Scheme.of(rule.scheme)) for rule in scheme]  # type: ignore[union-attr]
    served = {rule.scheme.weights.served_dtype for rule in rules if isinstance(rule.scheme, Scheme)}
    if len(served) > 1:
        names = " and ".join(sorted(map(dtype_name, served)))
        raise ValueError(f"the rules serve in {names}: an engine serves a model in one dtype.")
    engines = {rule.scheme.engine for rule in rules if isinstance(rule.scheme, Scheme) and rule.scheme.activations}
    if len(engines) > 1:
        raise ValueError(
            f"the rules follow the arithmetic of {' and '.join(sorted(engines))}: one engine serves a model."
        )
    return rules


def _fused(chosen: Mapping[str, Scheme]) -> dict[str, list[str]]:
    """For each layer those that engines run as one with it. ValueError if they are not quantized alike."""
    fused = {name: siblings for siblings in run_as_one(chosen) for name in siblings}
    for name, siblings in fused.items():
        if odd := [sibling for sibling in siblings if chosen[sibling] != chosen[name]]:
            raise ValueError(
                f"{name} is to train as {chosen[name]} and {odd[0]} as {chosen[odd[0]]}, but engines run them as one "
                "layer: give them one scheme."
            )
    return fused


def _patterns(patterns: str | Sequence[str]) -> tuple[str, ...]:
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"targets and ignore are class names, module names or 're:' regexes, found {patterns!r}.")
    for pattern in patterns:
        try:
            re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}.") from None
    return tuple(patterns)


def _matching(modules: dict[str, nn.Module], patterns: Iterable[str]) -> dict[str, list[str]]:
    # compressed-tensors' own matcher, so that a pattern means here what it means to the engines, to which experts are
    # of the class Linear too.
    from compressed_tensors.utils import is_match

    return {
        pattern: [
            name
            for name, module in modules.items()
            if name and (is_match(name, module, pattern) or (pattern == "Linear" and layout_of(module)))
        ]
        for pattern in patterns
    }


def _matches_nothing(target: str, modules: dict[str, nn.Module]) -> str:
    if len(modules) == 1:
        return (
            f"target {target!r}: the model is a bare {type(modules['']).__name__}, wrap it in a module that names it."
        )
    kinds = {type(module).__name__ for module in modules.values() if not list(module.children())}
    names = [*kinds, *modules, *{name.rpartition(".")[2] for name in modules}]
    near = difflib.get_close_matches(target, names, n=3)
    advice = f"near ones are {', '.join(near)}" if near else f"its leaf modules are {', '.join(sorted(kinds))}"
    return f"target {target!r} matches no module: {advice}. Targets are class names, exact names or 're:' regexes."


def _prepared_already(name: str, old: Scheme, new: Scheme | None) -> str:
    wanted = f"it cannot train as {new} too" if new else "it is not among the modules to quantize now"
    return f"{name} is prepared with {old}; {wanted}. Call lockstep.unprepare(model) first."


def _rows(modules: dict[str, nn.Module], reasons: dict[str, str], targets: Sequence[str]) -> Iterator[ModuleRow]:
    owners: dict[int, str] = {}  # a parameter under two names is counted under the first
    for name, module in modules.items():
        own = list(module.parameters(recurse=False))
        shared = {owners[id(parameter)] for parameter in own if id(parameter) in owners}
        parameters = sum(math.prod(shape_of(parameter)) for parameter in own if id(parameter) not in owners)
        owners |= {id(parameter): name for parameter in own if id(parameter) not in owners}
        if isinstance(module, QATLinear | QATExperts):
            kind = "Linear" if isinstance(module, QATLinear) else module.plain_class.__name__
            yield ModuleRow(name, kind, parameters, module.scheme)
        elif own:
            reason = reasons.get(name, f"not a target ({', '.join(targets)})")
            tied = f", tied to {', '.join(sorted(shared))}" if shared else ""
            overlooked = name not in reasons and any(len(shape_of(parameter)) >= 2 for parameter in own)
            yield ModuleRow(name, type(module).__name__, parameters, None, reason + tied, overlooked)


def _warn_of_overlooked(report: PrepareReport) -> None:
    rows = [row for row in report.overlooked if row.kind != "Linear" and not row.kind.endswith("Embedding")]
    if (share := report.share(rows)) > OVERLOOKED:
        warnings.warn(
            f"{share:.0%} of the parameters stay as they are in modules that no rule names, the first is "
            f"{rows[0].name} ({rows[0].kind}). Name them in targets or in ignore.",
            stacklevel=3,
        )


def _alike(rows: Iterable[ModuleRow]) -> dict[tuple[str, str, str, str], list[ModuleRow]]:
    """Rows that differ in layer numbers alone, together."""
    alike: dict[tuple[str, str, str, str], list[ModuleRow]] = {}
    for row in rows:
        key = (re.sub(r"(?<=\.)\d+(?=\.|$)", "*", row.name), row.kind, str(row.scheme or "-"), row.reason)
        alike.setdefault(key, []).append(row)
    return alike

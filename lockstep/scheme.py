"""What a number becomes: the one object that fake quant, export and ``config.json`` all read.

A `TensorSpec` says how weights are quantized, an `ActivationSpec` how a layer's inputs are, a `KVCacheSpec` how keys
and values are; a `Scheme` is what a layer does with its weights and inputs, and a `Rule` which layers do so. Preset
names, targets and the JSON written are those of compressed-tensors, so that llm-compressor, vLLM, SGLang and
transformers read them.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch

Strategy = Literal["group", "channel", "tensor", "block"]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BLOCK = 128  # rows and columns of a block, as DeepSeek-V3 and its kernels have them


class Format(NamedTuple):
    """A number format: bits of a code, the dtype that holds codes in memory, the largest code."""

    bits: int
    codes: torch.dtype
    largest: float


FORMATS = {
    "int4": Format(4, torch.int8, 7),
    "int8": Format(8, torch.int8, 127),
    "fp8_e4m3": Format(8, torch.float8_e4m3fn, 448),
    "fp8_e5m2": Format(8, torch.float8_e5m2, 57344),
    "fp4_e2m1": Format(4, torch.float8_e4m3fn, 6),  # e4m3 has all of its values
}


class ScaleRule(NamedTuple):
    """How a weight's scale and codes follow from it; the arithmetic and whose it is: grid.py."""

    format: str
    divisor: float
    low: float
    high: float
    groupings: tuple[tuple[Strategy, int | None], ...]
    scale_dtypes: tuple[torch.dtype, ...] = tuple(DTYPES.values())
    symmetric: bool = True


_GROUPS: tuple[tuple[Strategy, int | None], ...] = (("group", 32), ("group", 64), ("group", 128), ("channel", None))
_TILES: tuple[tuple[Strategy, int | None], ...] = (("channel", None), ("tensor", None), ("block", None))
_FP32, _E4M3, _E8M0 = (torch.float32,), (torch.float8_e4m3fn,), (torch.float8_e8m0fnu,)

# The first rule of a format is its default.
RULES: dict[str, ScaleRule] = {
    "amax/7": ScaleRule("int4", 7.0, -7, 7, _GROUPS),
    "amax/7.5": ScaleRule("int4", 7.5, -8, 7, _GROUPS),
    "max/-8": ScaleRule("int4", -8.0, -8, 7, (("group", 32),), (torch.float16,)),
    "range/15": ScaleRule("int4", 15.0, -8, 7, _GROUPS, symmetric=False),
    "amax/127": ScaleRule("int8", 127.0, -127, 127, _GROUPS),
    "amax/127.5": ScaleRule("int8", 127.5, -128, 127, _GROUPS),
    "amax/448": ScaleRule("fp8_e4m3", 448.0, -448, 448, _TILES, _FP32),
    "pow2/448": ScaleRule("fp8_e4m3", 448.0, -448, 448, (("block", None),), _FP32),
    "mx/8": ScaleRule("fp8_e4m3", 2.0**8, -448, 448, (("group", 32),), _E8M0),
    "nv/6": ScaleRule("fp4_e2m1", 6.0, -6, 6, (("group", 16),), _E4M3),
    "mx/2": ScaleRule("fp4_e2m1", 2.0**2, -6, 6, (("group", 32),), _E8M0),
}


@dataclass(frozen=True)
class TensorSpec:
    """How a weight ``[..., N, K]`` becomes codes and scales.

    Args:
        format: number format of the codes: ``"int4"``, ``"int8"``, ``"fp8_e4m3"`` or ``"fp4_e2m1"``.
        strategy: what shares a scale: ``"group"`` (`group_size` neighbours along K), ``"channel"`` (a row),
            ``"block"`` (128 x 128 weights) or ``"tensor"`` (all, with those of the layers that engines fuse with it).
        group_size: 16, 32, 64 or 128 with ``strategy="group"``, else ``None`` (the default 128 is dropped).
        symmetric: no zero point.
        scale_rule: one of `RULES`; empty: the first that has the format, the grouping and the symmetry.
        scale_dtype: dtype in which the scale is stored. It is rounded to it before any code is computed.
        served_dtype: dtype of the activations in the engine, in which the kernel rounds ``code * scale``.

    Raises:
        ValueError: a field has a value that this version cannot train, or two fields contradict each other.
    """

    format: str = "int4"
    strategy: str = "group"
    group_size: int | None = 128
    symmetric: bool = True
    scale_rule: str = ""
    scale_dtype: torch.dtype = torch.bfloat16
    served_dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        _one_of("format", self.format, tuple(dict.fromkeys(rule.format for rule in RULES.values())))
        _one_of("strategy", self.strategy, ("group", "channel", "tensor", "block"))
        _one_of("symmetric", self.symmetric, (True, False))
        _one_of("served_dtype", self.served_dtype, tuple(DTYPES.values()))
        if self.strategy != "group":
            _one_of(f"group_size with strategy={self.strategy!r}", self.group_size, (None, 128))
            object.__setattr__(self, "group_size", None)
        if not self.scale_rule:
            object.__setattr__(self, "scale_rule", self._default_rule())
        fitting = tuple(n for n, r in RULES.items() if r.format == self.format and r.symmetric == self.symmetric)
        kind = f"{self.format} {'symmetric' if self.symmetric else 'asymmetric'}"
        if not fitting:
            raise ValueError(f"symmetric={self.symmetric}: {self.format} weights have no such scale rule.")
        _one_of(f"scale_rule of {kind}", self.scale_rule, fitting)
        rule = RULES[self.scale_rule]
        grouping = f"grouping (strategy, group_size) of scale_rule={self.scale_rule!r}"
        _one_of(grouping, (self.strategy, self.group_size), rule.groupings)
        _one_of(f"scale_dtype of scale_rule={self.scale_rule!r}", self.scale_dtype, rule.scale_dtypes)

    def _default_rule(self) -> str:
        same = [n for n, r in RULES.items() if r.format == self.format and r.symmetric == self.symmetric]
        fitting = [name for name in same if (self.strategy, self.group_size) in RULES[name].groupings]
        return next(iter(fitting or same), "")

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return FORMATS[self.format].bits

    @property
    def code_dtype(self) -> torch.dtype:
        """The dtype that holds the codes: int8, or an 8-bit float whose values they are."""
        return FORMATS[self.format].codes

    @property
    def code_range(self) -> tuple[float, float]:
        """Smallest and largest code."""
        rule = RULES[self.scale_rule]
        return rule.low, rule.high

    @property
    def per_tensor(self) -> bool:
        """Whether something is scaled by the largest magnitude of the whole tensor (and of those fused with it)."""
        return self.strategy == "tensor" or self.scale_rule == "nv/6"

    def num_groups(self, k: int) -> int:
        """Scales in a row of `k` weights. ValueError, with the sizes that would fit, if `k` does not divide."""
        if k == 0 and self.group_size is None:
            raise ValueError("there are no input features to quantize.")
        if self.strategy == "block":
            return -(-k // BLOCK)
        if self.group_size is None:
            return 1
        if k == 0 or k % self.group_size:
            sizes = [size for _, size in RULES[self.scale_rule].groupings if size]
            fits = [str(size) for size in sizes if k and k % size == 0]
            advice = f"group_size {' or '.join(fits)} would fit" if fits else "no supported group_size fits"
            channel = ", strategy='channel' takes any length" * (("channel", None) in RULES[self.scale_rule].groupings)
            raise ValueError(f"{k} input features do not divide into groups of {self.group_size}: {advice}{channel}.")
        return k // self.group_size

    def scale_shape(self, n: int, k: int) -> tuple[int, int]:
        """Rows and columns of the scales of `n` x `k` weights."""
        rows = {"tensor": 1, "block": -(-n // BLOCK)}.get(self.strategy, n)
        return rows, self.num_groups(k)

    def stored_bytes(self, n: int, k: int, packed: bool) -> tuple[int, int, int]:
        """Bytes of codes, scales and zero points of an ``[n, k]`` weight as engines load it.

        `packed`: whether codes stand in 32-bit words (weight-only integers), which a row has to fill.
        """
        row = -(-k * self.bits // 32) * 4 if packed else -(-k * self.bits // 8)
        rows, groups = self.scale_shape(n, k)
        zero_points = 0 if self.symmetric else -(-rows * self.bits // 32) * 4 * groups
        global_scale = 4 * (self.scale_rule == "nv/6")
        return n * row, rows * groups * self.scale_dtype.itemsize + global_scale, zero_points

    def scale_follows_gemm(self, k: int) -> bool:
        """Whether a weight-only kernel multiplies by the (row's or tensor's) scale after the GEMM, not before it.

        Marlin tells the two apart by the number of groups alone, so a row of exactly one group counts as channel-wise.
        """
        return self.scale_rule == "nv/6" or (self.strategy != "block" and self.num_groups(k) == 1)

    @property
    def scales_accumulator(self) -> bool:
        """Whether a scale that follows the GEMM multiplies its fp32 sums, not what they were rounded to."""
        return self.format != "int4"

    def __str__(self) -> str:
        grouping = f"g{self.group_size}" if self.group_size else self.strategy
        dtypes = "/".join(dtype_name(dtype) for dtype in dict.fromkeys((self.scale_dtype, self.served_dtype)))
        return f"{self.format} {grouping} {self.scale_rule} {dtypes}"


# (format, strategy, group size, dynamic) of the activations that engines quantize.
_ACTIVATIONS: tuple[tuple[str, str, int | None, bool], ...] = (
    ("int8", "token", None, True),
    ("int8", "tensor", None, False),
    ("fp8_e4m3", "token", None, True),
    ("fp8_e4m3", "tensor", None, False),
    ("fp8_e4m3", "group", 128, True),
    ("fp8_e4m3", "group", 32, True),
    ("fp4_e2m1", "group", 16, True),
    ("fp4_e2m1", "group", 32, True),
)


@dataclass(frozen=True)
class ActivationSpec:
    """How the input ``[..., K]`` of a layer is quantized at each call, in the arithmetic of `engine`'s own kernel.

    Args:
        format: ``"int8"``, ``"fp8_e4m3"`` or ``"fp4_e2m1"``.
        strategy: what shares a scale: ``"token"`` (a row), ``"group"`` (`group_size` neighbours along K) or
            ``"tensor"`` (all, a stored scale).
        group_size: 128, or 32 (MX: scales are powers of two) or 16 (NVFP4: e4m3 scales below a stored one) with
            ``strategy="group"``.
        dynamic: whether the scale is computed from the input itself, or was measured before (`input_scale`).
        power_of_two: round the scales of groups of 128 up to powers of two, as DeepGEMM does.
        engine: ``"vllm"`` or ``"sglang"``: they differ at ties, in floors, and in the order of the scales.

    Raises:
        ValueError: a combination that no engine computes.
    """

    format: str = "int8"
    strategy: str = "token"
    group_size: int | None = None
    dynamic: bool = True
    power_of_two: bool = False
    engine: str = "vllm"

    def __post_init__(self) -> None:
        _one_of("engine", self.engine, ("vllm", "sglang"))
        wanted = (self.format, self.strategy, self.group_size, self.dynamic)
        _one_of("activations (format, strategy, group_size, dynamic)", wanted, _ACTIVATIONS)
        _one_of("power_of_two", self.power_of_two, (True, False))
        if self.engine == "sglang" and (self.format, self.dynamic) == ("int8", False):
            raise ValueError(
                "static int8 inputs with engine='sglang': SGLang ignores the stored scale and quantizes by token. "
                "Choose strategy='token', dynamic=True, or engine='vllm'."
            )
        if self.power_of_two and self.group_size != 128:
            raise ValueError("power_of_two=True: only groups of 128 have scales that are rounded up so (DeepGEMM).")

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return FORMATS[self.format].bits

    @property
    def code_dtype(self) -> torch.dtype:
        """The dtype that holds the codes."""
        return FORMATS[self.format].codes

    @property
    def stores_scale(self) -> bool:
        """Whether the layer needs a measured `input_scale`: a static range, or NVFP4's second scale."""
        return not self.dynamic or self.group_size == 16

    @property
    def scale_name(self) -> str:
        """The name under which that scale is stored, as in compressed-tensors."""
        return "input_global_scale" if self.group_size == 16 else "input_scale"

    def num_groups(self, k: int) -> int:
        """Scales in a row of `k` inputs. ValueError if `k` does not divide."""
        if self.group_size is None:
            return 1
        if k == 0 or k % self.group_size:
            raise ValueError(f"{k} input features do not divide into activation groups of {self.group_size}.")
        return k // self.group_size

    def __str__(self) -> str:
        grouping = f"g{self.group_size}" if self.group_size else self.strategy
        power = " pow2" * self.power_of_two
        return f"{self.format} {'dynamic' if self.dynamic else 'static'} {grouping}{power} {self.engine}"


@dataclass(frozen=True)
class KVCacheSpec:
    """How keys and values are stored in the engine's cache.

    Args:
        format: ``"fp8_e4m3"``, ``"fp8_e5m2"`` or ``"int8"``.
        strategy: what shares a scale: ``"tensor"`` (a layer), ``"head"`` or ``"token"`` (a token of one head).
        dynamic: whether scales are computed from the token itself or were measured before; by token always, else never.

    Raises:
        ValueError: a combination that no engine stores.
    """

    format: str = "fp8_e4m3"
    strategy: str = "tensor"
    dynamic: bool = False

    def __post_init__(self) -> None:
        _one_of("format", self.format, ("fp8_e4m3", "fp8_e5m2", "int8"))
        _one_of("strategy", self.strategy, ("tensor", "head", "token"))
        _one_of(f"dynamic with strategy={self.strategy!r}", self.dynamic, (self.strategy == "token",))

    @property
    def code_dtype(self) -> torch.dtype:
        """The dtype that holds the codes."""
        return FORMATS[self.format].codes

    def __str__(self) -> str:
        return f"{self.format} {'dynamic' if self.dynamic else 'static'} {self.strategy}"


@dataclass(frozen=True)
class Scheme:
    """How a layer computes: its weights, and its inputs if they are quantized too."""

    weights: TensorSpec = field(default_factory=TensorSpec)
    activations: ActivationSpec | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.weights, TensorSpec) or not isinstance(self.activations, ActivationSpec | None):
            raise TypeError(
                f"a Scheme is a TensorSpec and an ActivationSpec or None, found {self.weights!r} and "
                f"{self.activations!r}. Presets: Scheme.preset('W4A16')."
            )
        if self.activations is None:
            if self.weights.format == "fp8_e4m3" and self.weights.strategy != "group":
                raise ValueError(f"{self.weights} weights need activations: engines multiply them in 8 bits.")
            return
        pair = (_kind(self.weights), _kind(self.activations))
        if pair not in _PAIRS:
            takes = ", ".join(sorted({str(right) for left, right in _PAIRS if left == pair[0]})) or "none"
            raise ValueError(
                f"{self.weights} weights with {self.activations} inputs: no kernel multiplies them; these weights take "
                f"{takes}."
            )
        if not self.weights.symmetric:
            raise ValueError("asymmetric weights: kernels take them with unquantized inputs alone.")

    @property
    def engine(self) -> str:
        """The engine whose arithmetic the forward follows."""
        return self.activations.engine if self.activations else "vllm"

    @classmethod
    def preset(cls, name: str, activations: Mapping[str, Any] | None = None, **weights: Any) -> Scheme:
        """The scheme that compressed-tensors calls `name`, with fields of its specs replaced.

        Args:
            name: one of `PRESETS`.
            activations: fields of the activations' spec, e.g. ``{"engine": "sglang"}``.
            weights: fields of the weights' spec.

        >>> Scheme.preset("W4A16", group_size=32).weights.group_size
        32

        Raises:
            ValueError: no such preset (the message lists the near ones), one that this version does not train, or
                fields that contradict each other.
        """
        scheme = PRESETS.get(name.upper())
        if scheme is None:
            raise ValueError(_unknown_preset(name))
        if activations and scheme.activations is None:
            raise ValueError(f"preset {name!r} leaves its inputs as they are: it has no activations to change.")
        if {"format", "symmetric"} & weights.keys():
            weights.setdefault("scale_rule", "")
        inputs = (
            replace(scheme.activations, **activations) if activations and scheme.activations else scheme.activations
        )
        return cls(replace(scheme.weights, **weights), inputs)

    @property
    def preset_name(self) -> str | None:
        """The preset whose formats and groupings these are, whatever the engine and the dtypes, or None."""
        return next((name for name, preset in PRESETS.items() if preset.layout == self.layout), None)

    @property
    def layout(self) -> tuple:
        """What anybody's checkpoint says of a scheme: formats and groupings, not the rule behind the scales."""
        weights, inputs = self.weights, self.activations
        grouping = (weights.format, weights.strategy, weights.group_size, weights.symmetric)
        return (*grouping, inputs and (inputs.format, inputs.strategy, inputs.group_size, inputs.dynamic))

    @classmethod
    def of(cls, scheme: str | Scheme) -> Scheme:
        """`scheme` itself, or the preset of that name."""
        if not isinstance(scheme, str | Scheme):
            raise TypeError(f"a scheme is a preset's name or a Scheme, found {scheme!r}.")
        return scheme if isinstance(scheme, Scheme) else cls.preset(scheme)

    def __str__(self) -> str:
        return str(self.weights) if self.activations is None else f"{self.weights}, inputs {self.activations}"


@dataclass(frozen=True)
class Rule:
    """One line of a recipe: the layers that `targets` match train and serve as `scheme`; None leaves them as they are.

    >>> recipe = [Rule(["re:.*down_proj"], "W8A8"), Rule(["Linear"], "W4A16")]  # the first that matches wins
    """

    targets: str | Sequence[str]
    scheme: Scheme | str | None = None


# What a kernel can multiply: (weights, inputs) by format and grouping.
_PAIRS = {
    (("int8", "channel"), ("int8", "token")),
    (("int8", "channel"), ("int8", "tensor")),
    (("fp8_e4m3", "channel"), ("fp8_e4m3", "token")),
    (("fp8_e4m3", "channel"), ("fp8_e4m3", "tensor")),
    (("fp8_e4m3", "tensor"), ("fp8_e4m3", "token")),
    (("fp8_e4m3", "tensor"), ("fp8_e4m3", "tensor")),
    (("fp8_e4m3", "block"), ("fp8_e4m3", "g128")),
    (("int4", "g32"), ("int8", "token")),
    (("int4", "g64"), ("int8", "token")),
    (("int4", "g128"), ("int8", "token")),
    (("int4", "g128"), ("fp8_e4m3", "token")),
    (("fp8_e4m3", "g32"), ("fp8_e4m3", "g32")),
    (("fp4_e2m1", "g16"), ("fp4_e2m1", "g16")),
    (("fp4_e2m1", "g32"), ("fp4_e2m1", "g32")),
}


def _kind(spec: TensorSpec | ActivationSpec) -> tuple[str, str]:
    return spec.format, f"g{spec.group_size}" if spec.group_size else spec.strategy


def dtype_name(dtype: torch.dtype) -> str:
    """``"bfloat16"`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def _one_of(name: str, value: object, allowed: tuple) -> None:
    # 1 is no True, and 128.0 no 128, within tuples either.
    if not any(repr(value) == repr(one) for one in allowed):
        raise ValueError(f"{name}={value!r}: this version takes {', '.join(map(repr, allowed))}.")


def _unknown_preset(name: str) -> str:
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

    trained = f"This version trains {', '.join(PRESETS)}."
    if name.upper() in PRESET_SCHEMES:
        return f"preset {name!r} is known to compressed-tensors, but not trained by Lockstep yet. {trained}"
    near = difflib.get_close_matches(name.upper(), PRESET_SCHEMES, n=4, cutoff=0.4)
    return f"no preset {name!r}: near ones are {', '.join(near) or 'none'}. {trained}"


_INT8_TOKEN, _FP8_TOKEN = ActivationSpec("int8", "token"), ActivationSpec("fp8_e4m3", "token")
_FP32_SCALE: dict[str, Any] = {"scale_dtype": torch.float32}
_MXFP4 = TensorSpec("fp4_e2m1", "group", 32, scale_dtype=torch.float8_e8m0fnu)
_MXFP8 = TensorSpec("fp8_e4m3", "group", 32, scale_dtype=torch.float8_e8m0fnu)
_NVFP4 = TensorSpec("fp4_e2m1", "group", 16, scale_dtype=torch.float8_e4m3fn)
_INT8 = Scheme(TensorSpec("int8", "channel", **_FP32_SCALE), _INT8_TOKEN)

PRESETS = {
    "W4A16": Scheme(),
    "W4A16_ASYM": Scheme(TensorSpec(symmetric=False)),
    "W8A16": Scheme(TensorSpec("int8")),
    "W8A8": _INT8,
    "INT8": _INT8,
    "W4A8": Scheme(TensorSpec(), _INT8_TOKEN),
    "W4AFP8": Scheme(TensorSpec(), _FP8_TOKEN),
    "FP8": Scheme(TensorSpec("fp8_e4m3", "tensor", **_FP32_SCALE), ActivationSpec("fp8_e4m3", "tensor", dynamic=False)),
    "FP8_DYNAMIC": Scheme(TensorSpec("fp8_e4m3", "channel", **_FP32_SCALE), _FP8_TOKEN),
    "FP8_BLOCK": Scheme(TensorSpec("fp8_e4m3", "block", **_FP32_SCALE), ActivationSpec("fp8_e4m3", "group", 128)),
    "NVFP4A16": Scheme(_NVFP4),
    "NVFP4": Scheme(_NVFP4, ActivationSpec("fp4_e2m1", "group", 16)),
    "MXFP4A16": Scheme(_MXFP4),
    "MXFP4": Scheme(_MXFP4, ActivationSpec("fp4_e2m1", "group", 32)),
    "MXFP8A16": Scheme(_MXFP8),
    "MXFP8": Scheme(_MXFP8, ActivationSpec("fp8_e4m3", "group", 32)),
}

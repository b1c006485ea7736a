"""What a number becomes: the one object that fake quant, export and ``config.json`` all read.

A `TensorSpec` says how one tensor is quantized, a `Scheme` says it for a layer. Preset names, targets and the
JSON written are those of compressed-tensors, so that llm-compressor, vLLM, SGLang and transformers read them.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch

ScaleRule = Literal["amax/7", "amax/7.5", "max/-8"]
GROUP_SIZES = (32, 64, 128)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class _Rule(NamedTuple):
    divisor: float
    low: int
    high: int


# Whose rule is whose, and how each divides and rounds: grid.py.
RULES: dict[str, _Rule] = {
    "amax/7": _Rule(7.0, -7, 7),
    "amax/7.5": _Rule(7.5, -8, 7),
    "max/-8": _Rule(-8.0, -8, 7),
}


@dataclass(frozen=True)
class TensorSpec:
    """How one tensor ``[..., N, K]`` becomes codes and scales.

    Args:
        format: number format of the codes. This version: ``"int4"``.
        strategy: ``"group"`` (one scale for `group_size` neighbours along K) or ``"channel"`` (one for each row).
        group_size: 32, 64 or 128; ``None`` with ``strategy="channel"`` (the default 128 is dropped there).
        symmetric: no zero point. This version: ``True``.
        scale_rule: ``"amax/7"`` (codes in [-7, 7]), ``"amax/7.5"`` (compressed-tensors, [-8, 7]) or ``"max/-8"``
            (GGUF Q4_0: groups of 32, fp16 scale, [-8, 7]).
        scale_dtype: dtype in which the scale is stored. It is rounded to it before any code is computed.
        served_dtype: dtype of the activations in the engine, in which the kernel rounds ``code * scale``.

    Raises:
        ValueError: a field has a value that this version cannot train, or two fields contradict each other.
    """

    format: str = "int4"
    strategy: str = "group"
    group_size: int | None = 128
    symmetric: bool = True
    scale_rule: str = "amax/7"
    scale_dtype: torch.dtype = torch.bfloat16
    served_dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        _one_of("format", self.format, ("int4",))
        _one_of("strategy", self.strategy, ("group", "channel"))
        _one_of("symmetric", self.symmetric, (True,))
        _one_of("scale_rule", self.scale_rule, tuple(RULES))
        _one_of("scale_dtype", self.scale_dtype, tuple(DTYPES.values()))
        _one_of("served_dtype", self.served_dtype, tuple(DTYPES.values()))
        if self.strategy == "channel":
            _one_of("group_size with strategy='channel'", self.group_size, (None, 128))
            object.__setattr__(self, "group_size", None)
        else:
            _one_of("group_size", self.group_size, GROUP_SIZES)
        if self.scale_rule == "max/-8" and (self.group_size, self.scale_dtype) != (32, torch.float16):
            raise ValueError(
                "scale_rule='max/-8' is GGUF's Q4_0: it needs group_size=32 and scale_dtype=torch.float16, "
                f"found group_size={self.group_size} and scale_dtype={self.scale_dtype}."
            )

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return 4

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code."""
        rule = RULES[self.scale_rule]
        return rule.low, rule.high

    def num_groups(self, k: int) -> int:
        """Scales in a row of `k` weights. ValueError, with the sizes that would fit, if `k` does not divide."""
        if self.strategy == "channel":
            return 1
        assert self.group_size is not None
        if k == 0 or k % self.group_size:
            fits = [str(size) for size in GROUP_SIZES if k and k % size == 0]
            advice = f"group_size {' or '.join(fits)} would fit" if fits else "no supported group_size fits"
            raise ValueError(
                f"{k} input features do not divide into groups of {self.group_size}: {advice}, "
                "strategy='channel' takes any length."
            )
        return k // self.group_size

    def scale_follows_gemm(self, k: int) -> bool:
        """Whether the serving kernel multiplies by the scale after the GEMM instead of before it.

        Marlin tells the two apart by the number of groups alone, so a row of exactly one group counts as channel-wise.
        """
        return self.num_groups(k) == 1

    def __str__(self) -> str:
        grouping = f"g{self.group_size}" if self.group_size else "channel"
        dtypes = "/".join(dtype_name(dtype) for dtype in dict.fromkeys((self.scale_dtype, self.served_dtype)))
        return f"{self.format} {grouping} {self.scale_rule} {dtypes}"


@dataclass(frozen=True)
class Scheme:
    """How a layer is quantized: today its weights; activations and KV cache get their own `TensorSpec` beside it."""

    weights: TensorSpec = field(default_factory=TensorSpec)

    @classmethod
    def preset(cls, name: str, **weights: Any) -> Scheme:
        """The scheme that compressed-tensors calls `name`, with fields of its weight spec replaced by `weights`.

        >>> Scheme.preset("W4A16", group_size=32).weights.group_size
        32

        Raises:
            ValueError: no such preset (the message lists the near ones), or one that this version does not train.
        """
        scheme = PRESETS.get(name.upper())
        if scheme is None:
            raise ValueError(_unknown_preset(name))
        return replace(scheme, weights=replace(scheme.weights, **weights))

    @classmethod
    def of(cls, scheme: str | Scheme) -> Scheme:
        """`scheme` itself, or the preset of that name."""
        if not isinstance(scheme, str | Scheme):
            raise TypeError(f"a scheme is a preset's name or a Scheme, found {scheme!r}.")
        return scheme if isinstance(scheme, Scheme) else cls.preset(scheme)

    def to_compressed_tensors(
        self, targets: Sequence[str] = ("Linear",), ignore: Sequence[str] = (), format: str = "pack-quantized"
    ) -> dict[str, Any]:
        """The ``quantization_config`` of a ``config.json``, readable by ``compressed_tensors.QuantizationConfig``.

        What compressed-tensors has no word for (the scale rule and the dtypes) stands under the key ``"lockstep"``.
        """
        weights = self.weights
        return {
            "quant_method": "compressed-tensors",
            "format": format,
            "quantization_status": "compressed",
            "kv_cache_scheme": None,
            "ignore": list(ignore),
            "config_groups": {
                "group_0": {
                    "targets": list(targets),
                    "format": format,
                    "input_activations": None,
                    "output_activations": None,
                    "weights": {
                        "num_bits": weights.bits,
                        "type": "int",
                        "symmetric": weights.symmetric,
                        "strategy": weights.strategy,
                        # -1 and not null: vLLM compares it with integers.
                        "group_size": weights.group_size or -1,
                        "dynamic": False,
                        "actorder": None,
                    },
                }
            },
            "lockstep": self.provenance(),
        }

    def provenance(self) -> dict[str, str]:
        """The fields that other people's formats have no word for, as JSON."""
        return {
            "scale_rule": self.weights.scale_rule,
            "scale_dtype": dtype_name(self.weights.scale_dtype),
            "served_dtype": dtype_name(self.weights.served_dtype),
        }

    @classmethod
    def from_provenance(
        cls, provenance: Mapping[str, str] | None, *, bits: int, symmetric: bool, group_size: int
    ) -> Scheme:
        """The scheme of a stored model: its ``"lockstep"`` entry, with the fields that its format itself names.

        Without the entry somebody else wrote the checkpoint: compressed-tensors' rule and bf16 are assumed.
        """
        known = dict(provenance or {"scale_rule": "amax/7.5"})
        return cls(
            TensorSpec(
                format=f"int{bits}",
                strategy="group" if group_size > 0 else "channel",
                group_size=group_size if group_size > 0 else None,
                symmetric=symmetric,
                scale_rule=known["scale_rule"],
                scale_dtype=DTYPES[known.get("scale_dtype", "bfloat16")],
                served_dtype=DTYPES[known.get("served_dtype", "bfloat16")],
            )
        )

    @classmethod
    def from_compressed_tensors(cls, config: Mapping[str, Any] | Any) -> Scheme:
        """The scheme of a ``quantization_config``: a dict, or a ``compressed_tensors.QuantizationConfig``.

        That class drops the key ``"lockstep"``, so a config of ours must be read as the dict that it is on disk.

        Raises:
            ValueError: several groups of layers, quantized activations, or weights of a kind not trained here.
        """
        if not isinstance(config, Mapping):
            config = config.model_dump()
        groups = list(config.get("config_groups", {}).values())
        if len(groups) != 1:
            raise ValueError(f"this version reads one group of layers, config_groups has {len(groups)}.")
        (group,) = groups
        if not isinstance(group, Mapping) or not group.get("weights"):
            raise ValueError(
                f"this version reads groups that spell out their weights, config_groups has {groups[0]!r}."
            )
        for part in ("input_activations", "output_activations"):
            if group.get(part):
                raise ValueError(f"this version trains no quantized activations, config_groups has {part}.")
        if config.get("kv_cache_scheme"):
            raise ValueError("this version trains no quantized KV cache, the config has kv_cache_scheme.")
        weights = group["weights"]
        if weights.get("dynamic") or weights.get("actorder") in (True, "group"):
            raise ValueError(
                "this version reads static weights in the model's own order, config_groups has "
                f"dynamic={weights.get('dynamic')!r}, actorder={weights.get('actorder')!r}."
            )
        if weights.get("type", "int") != "int" or weights.get("strategy") not in ("group", "channel"):
            raise ValueError(
                "this version reads integer weights by group or channel, config_groups has "
                f"type={weights.get('type')!r}, strategy={weights.get('strategy')!r}."
            )
        return cls.from_provenance(
            config.get("lockstep"),
            bits=weights["num_bits"],
            symmetric=weights.get("symmetric", True),
            group_size=weights.get("group_size") or -1,
        )

    def __str__(self) -> str:
        return str(self.weights)


def dtype_name(dtype: torch.dtype) -> str:
    """``"bfloat16"`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def _one_of(name: str, value: object, allowed: tuple) -> None:
    if not any(type(value) is type(one) and value == one for one in allowed):
        raise ValueError(f"{name}={value!r}: this version takes {', '.join(map(repr, allowed))}.")


def _unknown_preset(name: str) -> str:
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

    trained = f"This version trains {', '.join(PRESETS)}."
    if name.upper() in PRESET_SCHEMES:
        return f"preset {name!r} is known to compressed-tensors, but not trained by Lockstep yet. {trained}"
    near = difflib.get_close_matches(name.upper(), PRESET_SCHEMES, n=4, cutoff=0.4)
    return f"no preset {name!r}: near ones are {', '.join(near) or 'none'}. {trained}"


PRESETS = {"W4A16": Scheme()}

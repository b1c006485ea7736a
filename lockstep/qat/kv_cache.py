"""Keys and values quantized in training as the engine's cache will hold them.

`prepare_kv_cache` puts a quantizer between a model's rotary embedding and its attention. Every key and value passes
it, those of the current tokens too: vLLM writes them to the cache first and attends to what it reads back. The cache
of transformers keeps holding what it held, so a token's key is quantized from the same numbers at every step.

Arithmetic, all in fp32 before the one rounding named:

- FP8, by tensor or head: ``code = RN_fp8(clamp(x / scale))``, a true division that saturates at the largest finite
  code, ``RN_t(code * scale)`` back, t the dtype of the keys. vLLM: ``scaled_convert`` in
  csrc/quantization/w8a8/fp8/nvidia/quant_utils.cuh, called by ``reshape_and_cache_flash``; ``_cast_kv_tile`` of its
  Triton attention reads it back.
- INT8, by tensor or head: ``code = rint(x * (1 / scale))``, half to even, clamped to [-128, 127]; the same way back.
  TensorRT-LLM's INT8 cache multiplies so by ``kv_orig_quant_scale``; vLLM and SGLang have no such cache.
- By token (of one head): ``scale = max(amax / largest, 1e-6)``, ``y = x * (1 / scale)``; FP8 as above, INT8 rounds
  half away from zero. vLLM: ``_reshape_cache_per_token_head`` in v1/attention/ops/triton_reshape_and_cache_flash.py.

What differs between kernels and is not imitated: Triton's fp32 division is not correctly rounded, which moves a code
at a rounding tie; by token, vLLM multiplies scores and probabilities by the scale and never rounds ``code * scale``;
FlashAttention 3 and FlashInfer's TensorRT-LLM kernels quantize queries and probabilities as well; vLLM's CPU engine
(0.32, x86) cuts FP8 codes off towards zero where GPUs round to nearest.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lockstep.qat.observers import Observer, ObserverName, make, measured_range
from lockstep.qat.prepare import unwrapped
from lockstep.scheme import FORMATS, KVCacheSpec

# The names of vLLM's --kv-cache-dtype, and those of the formats.
SPECS = {
    "fp8": KVCacheSpec(),
    "fp8_e4m3": KVCacheSpec(),
    "fp8_e5m2": KVCacheSpec("fp8_e5m2"),
    "int8": KVCacheSpec("int8"),
    "fp8_per_token_head": KVCacheSpec("fp8_e4m3", "token", dynamic=True),
    "int8_per_token_head": KVCacheSpec("int8", "token", dynamic=True),
}
IMPLEMENTATIONS = ("eager", "sdpa")
SCALES = ("k_scale", "v_scale")
_SMALLEST_TOKEN_SCALE = 1e-6  # vLLM's


@dataclass
class KVCache:
    """What `prepare_kv_cache` hangs on an attention module as ``module.kv_cache``.

    `observer` is None, or observers of the keys and of the values, one of each for each number of `k_scale`; keys and
    values pass unquantized while they are there.
    """

    spec: KVCacheSpec
    name: str
    attend: Callable[..., Any]
    observer: tuple[Sequence[Observer], Sequence[Observer]] | None = None
    checked: object = None


def spec_of(spec: KVCacheSpec | str) -> KVCacheSpec:
    """`spec` itself, or that of a name in `SPECS`. ValueError with the names there are."""
    if isinstance(spec, KVCacheSpec):
        return spec
    if spec not in SPECS:
        raise ValueError(f"no KV cache format {spec!r}: choose {', '.join(SPECS)}, or give a KVCacheSpec.")
    return SPECS[spec]


def token_scale(x: Tensor, spec: KVCacheSpec) -> Tensor:
    """The scales of keys or values ``[..., head_dim]`` by token, fp32 ``[..., 1]``."""
    amax = x.detach().float().abs().amax(-1, keepdim=True)
    return _divided(amax, spec).clamp_min(_SMALLEST_TOKEN_SCALE)


def quantize(x: Tensor, spec: KVCacheSpec, scale: Tensor) -> Tensor:
    """Codes of keys or values `x`, in ``spec.code_dtype``; the arithmetic is the module's docstring.

    Args:
        x: any shape and floating dtype, ``[batch, kv_heads, tokens, head_dim]`` in attention.
        scale: fp32, broadcasts with `x`: ``[1]``, ``[kv_heads, 1, 1]``, or `token_scale`.
    """
    return _codes(_quotient(x, spec, scale), spec)


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``RN_dtype(code * scale)``, the product in fp32."""
    return (codes.float() * scale).to(dtype)


def prepare_kv_cache(model: nn.Module, spec: KVCacheSpec | str = "fp8") -> list[str]:
    """Make the attention of a transformers model train on the keys and values that the engine's cache will hold.

    Classes, ``config.json`` and the state dict stay as they are, but for static scales: fp32 buffers ``k_scale`` and
    ``v_scale`` on each attention module, ``[1]`` by tensor or ``[kv_heads, 1, 1]`` by head, NaN until calibrated. They
    stay fp32 under ``model.to(dtype)``. Gradients pass straight through; where a static range clips they are zero.
    Works on the ``meta`` device. Doing it twice with the same spec changes nothing.

    ``model.set_attn_implementation`` afterwards switches the quantization off; `kv_cache_spec` notices.

    Args:
        model: a transformers model with attention ``"eager"`` or ``"sdpa"``, or a module tree that holds one.
        spec: how the cache is stored, or one of `SPECS`: ``"fp8"``, ``"int8"``, ``"int8_per_token_head"``, ...

    Returns:
        Names of the attention modules, in the model's order.

    Raises:
        ValueError: an unknown name; another attention implementation; a model prepared with another spec.
        TypeError: no attention that can be reached, or one whose cache holds something else than its keys and values.

    Nothing is changed when it raises. At a forward, a static scale that is not calibrated is a RuntimeError.
    """
    spec = spec_of(spec)
    model = unwrapped(model)
    found = dict(caching_attention(model))
    if not found:
        raise TypeError(
            f"{type(model).__name__} has no attention that a KV cache can be quantized in: none of its modules calls "
            "transformers' AttentionInterface and caches keys and values."
        )
    for name, module in found.items():
        _check(name, module, spec)
    for name, module in found.items():
        if not _prepared(module):
            _switch(name, module, spec)
    return list(found)


def unprepare_kv_cache(model: nn.Module) -> None:
    """Undo `prepare_kv_cache`; the scales go, with their keys."""
    for _, module in list(_modules(model)):
        for name in SCALES:
            module._buffers.pop(name, None)
        vars(module).pop("_apply", None)
        del module.kv_cache
        implementation = module.config._attn_implementation
        module.config._attn_implementation = implementation.removeprefix("lockstep_")


def kv_cache_spec(model: nn.Module) -> KVCacheSpec | None:
    """What `model` was prepared with, or None.

    Raises:
        RuntimeError: the attention implementation was set to another one since, which does not quantize.
    """
    spec = None
    for _, module in _modules(model):
        implementation = module.config._attn_implementation
        if not implementation.startswith("lockstep_"):
            raise RuntimeError(
                f"{module.kv_cache.name}: the attention implementation was set to {implementation!r} after "
                "prepare_kv_cache, so keys and values are not quantized. Call unprepare_kv_cache and prepare_kv_cache "
                "again."
            )
        spec = module.kv_cache.spec
    return spec


def config(spec: KVCacheSpec | str) -> dict[str, Any]:
    """The ``kv_cache_scheme`` of compressed-tensors, which vLLM and SGLang read.

    By tensor: vLLM on GPUs from Ada on (compute capability 8.9), and on CPUs with other codes (see the module).
    By head: vLLM with FlashAttention 3 or newer, which Hopper has.

    Raises:
        ValueError: compressed-tensors has no word for it or no engine serves it from there; says who serves it how.
    """
    spec = spec_of(spec)
    if spec.strategy == "token":
        kind = "int8" if spec.format == "int8" else "fp8"
        option = f"vLLM serves it with --kv-cache-dtype {kind}_per_token_head (Triton attention backend, GPU)"
        if spec.format == "fp8_e5m2":
            option = "no engine serves it by token, vLLM serves fp8_e4m3 and int8 so"
        raise ValueError(f"{spec} KV cache: vLLM refuses it in a kv_cache_scheme; {option}. Export without it.")
    if spec.format == "fp8_e5m2":
        raise ValueError(
            f"{spec} KV cache: compressed-tensors has no word for e5m2. vLLM serves it with --kv-cache-dtype fp8_e5m2 "
            "(GPUs from Ampere on) for folders without kv_cache_scheme, and with scales of 1: fill k_scale and v_scale "
            "with 1 to train that, and export without it."
        )
    if spec.format == "int8":
        raise ValueError(
            f"{spec} KV cache: vLLM and SGLang refuse int8 in a kv_cache_scheme. TensorRT-LLM serves int8 by tensor, "
            "from its own checkpoints; vLLM serves int8 by token, KVCacheSpec('int8', 'token', True)."
        )
    strategy = {"tensor": "tensor", "head": "attn_head"}[spec.strategy]
    return {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False}


def observe(model: nn.Module, observer: ObserverName = "minmax") -> list[str]:
    """Begin to calibrate: measure keys and values, from nothing, and let them pass unquantized meanwhile.

    Args:
        model: a model prepared with a static spec.
        observer: what becomes the range, see `lockstep.qat.observers`; one for each number of ``k_scale`` and
            ``v_scale``.

    Returns:
        Names of the modules that observe; empty if the scales are dynamic or nothing is prepared.

    Raises:
        ValueError: an unknown `observer`.
    """
    kv_cache_spec(model)  # refuses one whose attention was switched since
    static = [(name, module, module.kv_cache) for name, module in _modules(model) if not module.kv_cache.spec.dynamic]
    pairs = [
        tuple([make(observer, kv.spec) for _ in range(getattr(module, key).numel())] for key in SCALES)
        for _, module, kv in static
    ]
    for (_, _, kv), pair in zip(static, pairs, strict=True):
        kv.observer = pair
    return [name for name, _, _ in static]


def freeze(model: nn.Module) -> None:
    """End what `observe` began: write ``scale = range / largest code`` (448, 57344 or 127) in fp32.

    Over several ranks the ranges are those of all keys and values. All ranks must call it.

    Raises:
        ValueError: a module saw no keys or values, only zeros, or a NaN or infinity. The message names it.

    Nothing is changed when it raises: the modules go on observing.
    """
    observing = [(name, module) for name, module in _modules(model) if module.kv_cache.observer is not None]
    scales = []
    for name, module in observing:
        spec = module.kv_cache.spec
        for key, observers in zip(SCALES, module.kv_cache.observer, strict=True):
            what = f"the {'keys' if key == 'k_scale' else 'values'} of {name}"
            ranges = torch.stack([measured_range(observer, what) for observer in observers])
            scale = _divided(ranges, spec)
            if not ((scale > 0) & scale.isfinite()).all():
                raise ValueError(f"{what} have the range {ranges.tolist()}, too small for a scale in fp32.")
            scales.append((getattr(module, key), scale))
    for stored, scale in scales:
        with torch.no_grad():
            stored.copy_(scale.view_as(stored))
    for _, module in observing:
        module.kv_cache.observer = None


def unobserve(model: nn.Module) -> None:
    """Take the observers of `observe` away and leave the scales as they were."""
    for _, module in _modules(model):
        module.kv_cache.observer = None


def observers_of(model: nn.Module) -> dict[str, Observer]:
    """The observers that are in place, by names such as ``"model.layers.0.self_attn.k_scale.0"``."""
    return {
        f"{name}.{key}.{number}": observer
        for name, module in _modules(model)
        if module.kv_cache.observer is not None
        for key, observers in zip(SCALES, module.kv_cache.observer, strict=True)
        for number, observer in enumerate(observers)
    }


def caching_attention(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and modules of the attention that calls transformers' AttentionInterface and caches keys and values."""
    for name, module in model.named_modules():
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        calls = {"ALL_ATTENTION_FUNCTIONS", "update"} <= set(code.co_names if code else ())
        if calls and isinstance(getattr(module, "config", None), PreTrainedConfig):
            yield name, module


def _attention(
    implementation: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    kv: KVCache | None = getattr(module, "kv_cache", None)
    if kv is None:  # an encoder beside the language model
        return _original(type(module), implementation)(module, query, key, value, *args, **kwargs)
    if kv.observer is not None:
        for observers, states in zip(kv.observer, (key, value), strict=True):
            rows = states.detach().unbind(1) if kv.spec.strategy == "head" else (states.detach(),)
            for observer, row in zip(observers, rows, strict=True):
                observer.update(row)
    elif kv.spec.dynamic:
        key, value = (_FakeQuantize.apply(states, token_scale(states, kv.spec), kv.spec) for states in (key, value))
    else:
        _check_scales(module, kv, key.shape[1])
        key = _FakeQuantize.apply(key, module.k_scale, kv.spec)
        value = _FakeQuantize.apply(value, module.v_scale, kv.spec)
    return kv.attend(module, query, key, value, *args, **kwargs)


class _FakeQuantize(torch.autograd.Function):
    """Straight-through; what a static range clips gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, spec: KVCacheSpec) -> Tensor:
        quotient = _quotient(x, spec, scale)
        ctx.static = not spec.dynamic
        if ctx.static and ctx.needs_input_grad[0]:
            low, high = _code_range(spec)
            ctx.save_for_backward((quotient >= low) & (quotient <= high))
        return dequantize(_codes(quotient, spec), scale, x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        return (grad * ctx.saved_tensors[0] if ctx.static else grad), None, None


def _divided(amax: Tensor, spec: KVCacheSpec) -> Tensor:
    # On CUDA torch divides by a Python number as a multiplication with its reciprocal.
    return amax / amax.new_full((), FORMATS[spec.format].largest)


def _quotient(x: Tensor, spec: KVCacheSpec, scale: Tensor) -> Tensor:
    if spec.dynamic or spec.format == "int8":
        return x.float() * scale.reciprocal()
    return x.float() / scale


def _codes(quotient: Tensor, spec: KVCacheSpec) -> Tensor:
    if spec.format == "int8" and spec.dynamic:  # the cast to int8 cuts off what is behind the point
        quotient = torch.where(quotient >= 0, quotient + 0.5, quotient - 0.5)
    elif spec.format == "int8":
        quotient = quotient.round()
    # torch's cast to e4m3 turns what is too large into NaN, and to e5m2 into infinity.
    return quotient.clamp(*_code_range(spec)).to(spec.code_dtype)


def _code_range(spec: KVCacheSpec) -> tuple[float, float]:
    largest = FORMATS[spec.format].largest
    return (-128.0 if spec.format == "int8" else -largest), largest


def _modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in unwrapped(model).named_modules():
        if _prepared(module):
            yield name, module


def _prepared(module: nn.Module) -> bool:
    return isinstance(vars(module).get("kv_cache"), KVCache)


def _check(name: str, module: Any, spec: KVCacheSpec) -> None:
    if _prepared(module):
        kv_cache_spec(module)
        old = module.kv_cache.spec
        if old != spec:
            raise ValueError(f"{name} is prepared with a {old} KV cache: call unprepare_kv_cache(model) first.")
        return
    kind, settings = type(module).__name__, module.config
    implementation = str(settings._attn_implementation).removeprefix("lockstep_")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{name}: keys and values are quantized with attention implementation 'eager' or 'sdpa', found "
            f"{implementation!r}. Call model.set_attn_implementation('sdpa') first."
        )
    if getattr(settings, "is_encoder_decoder", False):
        raise TypeError(f"{name}: {kind} is of an encoder-decoder model; this version quantizes decoders alone.")
    if getattr(settings, "kv_lora_rank", None):
        raise TypeError(f"{name}: {kind} is latent attention: engines cache the latent, not these keys and values.")
    if getattr(module, "is_kv_shared_layer", False):
        raise TypeError(f"{name}: {kind} reads another layer's keys and values; this version quantizes a layer's own.")
    _original(type(module), implementation)
    if spec.strategy == "head":
        _kv_heads(name, module)


def _switch(name: str, module: Any, spec: KVCacheSpec) -> None:
    settings = module.config
    implementation = str(settings._attn_implementation).removeprefix("lockstep_")
    module.kv_cache = KVCache(spec, name, _original(type(module), implementation))
    if not spec.dynamic:
        shape = (_kv_heads(name, module), 1, 1) if spec.strategy == "head" else (1,)
        device = next((parameter.device for parameter in module.parameters()), None)
        for key in SCALES:
            module.register_buffer(key, torch.full(shape, torch.nan, dtype=torch.float32, device=device))
        module._apply = functools.partial(_apply_but_keep_scales, module)  # type: ignore[method-assign]
    settings._attn_implementation = f"lockstep_{implementation}"


def _apply_but_keep_scales(module: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """What ``model.to``, ``.half`` and the like call: scales move to the device, but are never rounded."""
    scales = [getattr(module, key) for key in SCALES]
    type(module)._apply(module, fn, recurse)
    for key, scale in zip(SCALES, scales, strict=True):
        device = getattr(module, key).device
        made_real = scale.is_meta and device.type != "meta"
        setattr(module, key, torch.full_like(scale, torch.nan, device=device) if made_real else scale.to(device))
    return module


def _kv_heads(name: str, module: Any) -> int:
    for holder in (module, module.config):
        if isinstance(heads := getattr(holder, "num_key_value_heads", None), int):
            return heads
    raise TypeError(f"{name}: neither the module nor its config has num_key_value_heads; use strategy='tensor'.")


def _check_scales(module: Any, kv: KVCache, kv_heads: int) -> None:
    scales: list[Tensor] = [getattr(module, key) for key in SCALES]
    if torch.compiler.is_compiling() or scales[0].is_meta:  # compiled, a NaN shows in the loss
        return
    # Looking at a number makes the host wait for the GPU, so only when it may have changed.
    state = [None if scale.is_inference() else (scale.data_ptr(), scale._version) for scale in scales]
    if None not in state and state == kv.checked:
        return
    for key, scale in zip(SCALES, scales, strict=True):
        if scale.numel() not in (1, kv_heads):
            raise RuntimeError(f"{kv.name}.{key} has {scale.numel()} scales, attention has {kv_heads} KV heads.")
        if not (scale > 0).all():
            raise RuntimeError(
                f"{kv.name}.{key} is {scale.flatten().tolist()}: a static {kv.spec.format} KV cache needs calibrated "
                "scales. Run `lockstep calibrate`, or load a checkpoint that has them."
            )
    kv.checked = state


def _original(kind: type[nn.Module], implementation: str) -> Callable[..., Any]:
    """The function that an attention class would have called."""
    forward: Any = inspect.unwrap(kind.forward)
    if implementation == "sdpa":
        return forward.__globals__["ALL_ATTENTION_FUNCTIONS"]["sdpa"]
    if "eager_attention_forward" not in forward.__code__.co_names:
        raise TypeError(f"{kind.__name__} has no eager_attention_forward: use attention implementation 'sdpa'.")
    return forward.__globals__["eager_attention_forward"]


for _name in IMPLEMENTATIONS:
    ALL_ATTENTION_FUNCTIONS.register(f"lockstep_{_name}", functools.partial(_attention, _name))
    ALL_MASK_ATTENTION_FUNCTIONS.register(f"lockstep_{_name}", ALL_MASK_ATTENTION_FUNCTIONS[_name])

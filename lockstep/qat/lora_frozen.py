"""peft's LoRA layer around a `lockstep.qat.frozen.FrozenLinear`, in the order of the engine's: mode ``frozen-grid``."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lockstep.qat.lora_config import PLAIN_INIT, PeftLinear, base_of, check_variant, peft

NO_MERGE = (
    "{name}: merging would move the base off its grid: serve the base's folder and the adapter, or train in mode "
    "'merged'."
)


class FrozenLora(PeftLinear):
    """peft's LoRA layer around a `FrozenLinear`, in the order and the dtypes of vLLM's.

    With t the dtype that is computed in, and x the input as it came (not its codes)::

        u = RN_t(x @ RN_t(A)^T)          y = RN_t(base(x) + RN_t(u @ RN_t(s * RN_t(B))^T))

    sums in fp32. It differs from peft's in the place of s, which vLLM multiplies into B when it loads the adapter.

    Source: vLLM 0.32 ``lora/lora_weights.py`` (``optimize``), ``lora/layers/base_linear.py``
    (``_apply_lora_to_output``), ``lora/punica_wrapper/punica_cpu.py`` and ``lora/ops/torch_ops/lora_ops.py``: the
    buffer of ``x @ A^T`` is fp32 and rounded to the output's dtype before B; Triton's kernels round in the same places.

    Raises:
        ValueError: an adapter that vLLM does not serve (``lora_bias``, DoRA and other variants, initializations that
            change the base), several active ones, or a merge.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: peft.LoraConfig, **kwargs: Any) -> None:
        if kwargs.get("parameter_name") is not None:
            raise ValueError(f"{kwargs.get('target_name')}: name a frozen layer in target_modules.")
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features  # type: ignore[return-value]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # peft would give adapters the dtype of the codes.
        base = base_of(self)
        for layers in (self.lora_A, self.lora_B):
            if not any(one.is_meta for one in layers[adapter_name].parameters()):
                layers[adapter_name].to(device or base.device, dtype=base.scheme.weights.served_dtype)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: peft.LoraConfig, **kwargs: Any) -> None:
        """Add an adapter. ValueError for one that vLLM does not serve on this base."""
        name = base_of(self).qualified_name
        if config.lora_bias or config.fan_in_fan_out:
            raise ValueError(f"{name}: lora_bias and fan_in_fan_out are not served: set them False.")
        if config.init_lora_weights not in PLAIN_INIT:
            raise ValueError(
                f"{name}: init_lora_weights={config.init_lora_weights!r} changes the base, which is frozen on its "
                f"grid: choose one of {', '.join(map(str, PLAIN_INIT))}."
            )
        check_variant(name, config)
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError("adapter_names: several adapters in one batch do not train here.")
        return self.add_branch(self.base_layer(x), x)

    def add_branch(self, y: Tensor, x: Tensor) -> Tensor:
        """`y` ``[..., N]``, what the base made of the input `x` ``[..., K]``, with what the active adapter adds."""
        names = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]
        if len(names) > 1:
            name = base_of(self).qualified_name
            raise ValueError(f"{name}: engines serve one adapter a request, active are {', '.join(names)}.")
        for name in names:
            scaling, t = self.scaling[name], y.dtype
            a, b = (one.weight.to(t) for one in cast("list[nn.Linear]", [self.lora_A[name], self.lora_B[name]]))
            u = F.linear(self.lora_dropout[name](x.to(t)), a)
            y = y + F.linear(u, b if scaling == 1 else b * scaling)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """ValueError: the base would leave its grid."""
        raise ValueError(NO_MERGE.format(name=base_of(self).qualified_name))

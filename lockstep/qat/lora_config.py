"""What is used of peft, and which of its configurations are refused; importing this file loads peft."""

from __future__ import annotations

from typing import Any

try:
    import peft
    from peft.tuners.lora import Linear as PeftLinear
    from peft.tuners.lora import ParamWrapper as PeftParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
except ImportError as error:
    raise ImportError(f"LoRA needs peft ({error}): pip install peft.") from error

__all__ = [
    "PLAIN_INIT",
    "BaseTunerLayer",
    "ModulesToSaveWrapper",
    "PeftLinear",
    "PeftParamWrapper",
    "TrainableTokensWrapper",
    "base_of",
    "check_config",
    "check_variant",
    "peft",
]

# Initializations that leave the base as it is; the others write what they take out of it into its weights.
PLAIN_INIT = (True, False, "gaussian", "orthogonal")


def base_of(layer: Any) -> Any:
    """What is within a layer of peft's, and within those that it is stacked on."""
    return layer.get_base_layer()


def check_config(name: str, config: peft.LoraConfig) -> None:
    """ValueError for what has no merged weight, or none that is exact."""
    if config.lora_dropout:
        raise ValueError(
            f"{name}: lora_dropout={config.lora_dropout} drops inputs of the adapter alone, and W + s * B @ A has no "
            "such inputs: set lora_dropout=0."
        )
    if config.lora_bias:
        raise ValueError(f"{name}: lora_bias=True: a merged adapter has no bias of its own: set it False.")
    if config.fan_in_fan_out:
        raise ValueError(f"{name}: fan_in_fan_out=True: it is an nn.Linear: set it False.")
    check_variant(name, config)


def check_variant(name: str, config: peft.LoraConfig) -> None:
    """ValueError for DoRA and the like, in any mode."""
    fields = ["use_dora", "use_qalora", "alora_invocation_tokens", "arrow_config", "use_bdlora", "velora_config"]
    fields += ["monteclora_config", "kasa_config"]
    variants = [field for field in fields if getattr(config, field, None)]
    if config.init_lora_weights == "mica":
        variants.append("init_lora_weights='mica'")
    if variants:
        raise ValueError(f"{name}: {variants[0]}: only plain LoRA and rsLoRA train here: leave it out.")

"""AWQ (Lin et al., arXiv:2306.00978) through llm-compressor's ``AWQModifier``, with its defaults.

Input channels are scaled up where activations are large, before rounding, and the layer in front is scaled down; the
factors come from a grid of 20 between none and all (``duo_scaling``: by the weights' size too). Weights stay symmetric.
"""

from __future__ import annotations

from typing import Any

from lockstep.ptq.oneshot import config_groups, oneshot
from lockstep.ptq.rounded import Batches, Rounded, is_symmetric_integer
from lockstep.scheme import Scheme


def awq(model: Any, layers: list[str], scheme: Scheme, batches: Batches) -> dict[str, Rounded]:
    """Scale the channels of the working copy `model`. Symmetric integers get the library's minmax scales.

    Other formats are only scaled: the scheme's own rule does the rest, and nothing is returned.
    """
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    duo = scheme.weights.strategy != "tensor"  # the library's condition
    groups = config_groups(scheme, layers)
    scales = oneshot(model, [AWQModifier(duo_scaling=duo), QuantizationModifier(config_groups=groups)], batches)
    if not is_symmetric_integer(scheme.weights):
        return {}
    weights = {name: model.get_submodule(name).weight for name in layers}
    return {name: Rounded(weight, weight, scales[name]) for name, weight in weights.items()}

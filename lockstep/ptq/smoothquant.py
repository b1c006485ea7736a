"""SmoothQuant (Xiao et al., arXiv:2211.10438) through llm-compressor's ``SmoothQuantModifier``.

Outliers of the inputs are moved into the weights, by the norms in front of them, with ``smoothing_strength=0.8``. The
integer weights are then rounded by GPTQ, as in llm-compressor's own W8A8 example.
"""

from __future__ import annotations

from typing import Any

from lockstep.ptq.gptq import gptq
from lockstep.ptq.oneshot import oneshot
from lockstep.ptq.rounded import Batches, Rounded, is_symmetric_integer
from lockstep.scheme import Scheme


def smoothquant(model: Any, layers: list[str], scheme: Scheme, batches: Batches) -> dict[str, Rounded]:
    """Smooth the working copy `model`, and round its symmetric integers with GPTQ.

    Other formats are only smoothed: the scheme's own rule does the rest, and nothing is returned.
    """
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    oneshot(model, [SmoothQuantModifier(smoothing_strength=0.8)], batches)
    return gptq(model, layers, scheme, batches) if is_symmetric_integer(scheme.weights) else {}

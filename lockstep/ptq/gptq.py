"""GPTQ (Frantar et al., arXiv:2210.17323) through llm-compressor's ``GPTQModifier``, with the options it recommends.

``actorder="static"``: columns are rounded in the order of their activations' size, with the scales of the model's own
order, which costs engines nothing; ``dampening_frac=0.01`` of the Hessian's mean diagonal; blocks of 128 columns; each
decoder layer sees what the quantized layers before it put out.
"""

from __future__ import annotations

from typing import Any

from lockstep.ptq.oneshot import config_groups, oneshot
from lockstep.ptq.rounded import Batches, Rounded, weights_of
from lockstep.scheme import Scheme


def gptq(model: Any, layers: list[str], scheme: Scheme, batches: Batches) -> dict[str, Rounded]:
    """Round `layers` of the working copy `model`, and correct each column's error in the columns that follow.

    Raises:
        ValueError: a layer's Hessian has no inverse, for which the library would round it to nearest.
    """
    from llmcompressor.modifiers.gptq import GPTQModifier

    class Strict(GPTQModifier):
        def _log_rtn_fallback_summary(self) -> None:
            if failed := self._rtn_fallback_module_names:
                raise ValueError(
                    f"GPTQ cannot invert the Hessian of {failed[0]} and {len(failed) - 1} other layers: look for NaN "
                    "or infinite inputs, run other batches, or use mse."
                )

    before = weights_of(model, layers)
    groups = config_groups(scheme, layers)
    modifier = Strict(config_groups=groups, actorder="static", dampening_frac=0.01, block_size=128)  # type: ignore
    scales = oneshot(model, [modifier], batches)
    return {name: Rounded(before[name], model.get_submodule(name).weight, scales[name]) for name in layers}

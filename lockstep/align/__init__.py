"""Compare the model as it trains with the checkpoint, or the rollout engine, as it is served.

`compare` and its report are the gate for CI; `mismatch` and `decompose` measure a running engine.
"""

from lockstep.align.compare import compare
from lockstep.align.decompose import Decomposition, Rollout, decompose
from lockstep.align.mismatch import Gap, Mismatch, MismatchError, mismatch, truncated_importance_weights
from lockstep.align.report import AlignmentError, AlignmentReport, EndToEnd, LayerAlignment

__all__ = [
    "AlignmentError",
    "AlignmentReport",
    "Decomposition",
    "EndToEnd",
    "Gap",
    "LayerAlignment",
    "Mismatch",
    "MismatchError",
    "Rollout",
    "compare",
    "decompose",
    "mismatch",
    "truncated_importance_weights",
]

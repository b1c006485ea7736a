"""Compare the model as it trains with the checkpoint as it is served: `compare`, its report, and the gate for CI."""

from lockstep.align.compare import compare
from lockstep.align.report import AlignmentError, AlignmentReport, EndToEnd, LayerAlignment

__all__ = ["AlignmentError", "AlignmentReport", "EndToEnd", "LayerAlignment", "compare"]

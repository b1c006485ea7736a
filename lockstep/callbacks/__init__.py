"""Callbacks for trainers: thin, they call `prepare`, statistics, measurements and the exporter at the right moments."""

from lockstep.callbacks.alignment import AlignmentCallback, AlignmentTrainerCallback
from lockstep.callbacks.qat import QATCallback
from lockstep.callbacks.spikes import LossSpikeCallback, LossSpikeError, LossSpikeTrainerCallback
from lockstep.callbacks.trainer import QATTrainerCallback

__all__ = [
    "AlignmentCallback",
    "AlignmentTrainerCallback",
    "LossSpikeCallback",
    "LossSpikeError",
    "LossSpikeTrainerCallback",
    "QATCallback",
    "QATTrainerCallback",
]

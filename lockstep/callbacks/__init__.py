"""Callbacks for trainers: thin, they call `prepare`, the statistics and the exporter at the right moments."""

from lockstep.callbacks.qat import QATCallback
from lockstep.callbacks.trainer import QATTrainerCallback

__all__ = ["QATCallback", "QATTrainerCallback"]

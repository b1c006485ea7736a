"""The training side: straight-through functions, the layers, and `prepare`, which switches a model's layers to them."""

from lockstep.qat.linear import QATLinear
from lockstep.qat.prepare import PrepareReport, prepare, quantized_modules, unprepare

__all__ = ["PrepareReport", "QATLinear", "prepare", "quantized_modules", "unprepare"]

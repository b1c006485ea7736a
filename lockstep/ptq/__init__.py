"""Post-training quantization through the libraries that people use, one file an adapter; `quantize` runs them.

What a method yields goes through the same exporter, alignment and engines as what was trained, and can start training.
"""

from lockstep.ptq.quantize import METHODS, LayerError, PTQResult, quantize

__all__ = ["METHODS", "LayerError", "PTQResult", "quantize"]

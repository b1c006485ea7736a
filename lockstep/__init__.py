"""Lockstep: train on exactly the numbers that you will serve.

Quantization-aware training whose fake-quant forward, exported checkpoint and serving kernel share one arithmetic, and a
harness that proves it. Start with `prepare`, `callbacks.QATCallback`, `export.save_pretrained` and `align.compare`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lockstep.calibrate import CalibrationReport, calibrate
from lockstep.plan import Plan, plan
from lockstep.qat.prepare import PrepareReport, prepare, unprepare
from lockstep.scheme import ActivationSpec, KVCacheSpec, Rule, Scheme, TensorSpec
from lockstep.sensitivity import SensitivityReport, sensitivity

if TYPE_CHECKING:
    from lockstep import align, callbacks, export, grid, kernels, ptq, qat, recipes

__version__ = "0.1.0"
__all__ = [
    "ActivationSpec",
    "CalibrationReport",
    "KVCacheSpec",
    "Plan",
    "PrepareReport",
    "Rule",
    "Scheme",
    "SensitivityReport",
    "TensorSpec",
    "align",
    "calibrate",
    "callbacks",
    "export",
    "grid",
    "kernels",
    "plan",
    "prepare",
    "ptq",
    "qat",
    "recipes",
    "sensitivity",
    "unprepare",
]


def __getattr__(name: str) -> Any:
    """Load the floors above on first use: trainers and hub libraries are slow to import."""
    if name in __all__:
        return importlib.import_module(f"lockstep.{name}")
    raise AttributeError(f"module 'lockstep' has no attribute {name!r}")

"""Learned step sizes (LSQ, Esser et al., arXiv:1902.08153): a layer's weight scales as parameters.

`lockstep.prepare` with ``learned_scales=True`` gives each layer the parameter ``weight_scale`` (fp32, in the shape of
its scales), which starts where the scheme's rule would put the scales. What trains and is exported is the parameter,
rounded to the scheme's scale dtype; no rule looks at the weight any more. The gradients of weight and scale are
`grid.learned_gradients`: the weight's is zero where it is cut off, a scale's has LSQ's balance of the learning rates.

It needs the optimizer to be made after `prepare`, and a parameter group for the scales, without weight decay. Adam's
steps do not know how large a parameter is: give the group a rate of the weights' times the mean scale. With the
weights' own rate they can be destroyed within a few steps; an export refuses scales that became negative.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from lockstep import grid
from lockstep.scheme import TensorSpec

KEY = "weight_scale"
PTQ_REPORT = "ptq.json"  # which ``lockstep ptq`` writes beside its scales


def ptq_report(folder: Path) -> dict[str, Any] | None:
    """What ``lockstep ptq`` says of `folder`, None if it did not write it. ValueError if that cannot be read."""
    path = folder / PTQ_REPORT
    if not path.is_file():
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        _ = report["method"], report["servable"], report["rule"]["scale_rule"], dict(report["scales"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no report of lockstep ptq: {type(error).__name__}: {error}.") from None
    return report


def check_ptq(folder: Path, key: str, spec: TensorSpec, scale: Tensor | None) -> None:
    """ValueError if `scale` is not what ``lockstep ptq`` wrote in `folder` as `key`, for the rule of `spec`.

    None where the folder stores no such scale.

    Under "amax/7" the code -8, which llm-compressor uses, would become -7.
    """
    report = ptq_report(folder)
    noted = None if report is None else report["scales"].get(key)
    if report is None or noted is None:
        return
    if scale is None or digest(scale) != noted:
        found = "is not there" if scale is None else "is not what it was"
        raise ValueError(f"{folder}: {key}, which lockstep ptq wrote, {found}. Run it again.")
    if (rule := report["rule"]["scale_rule"]) != spec.scale_rule:
        raise ValueError(
            f"{key}: the scales in {folder} are for scale_rule {rule!r}, asked is {spec.scale_rule!r}. Give the "
            f"scheme that {PTQ_REPORT} there has."
        )


def digest(scale: Tensor) -> str:
    """SHA-256 of fp32 scales."""
    return hashlib.sha256(scale.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def initial_scale(weight: Tensor, spec: TensorSpec) -> Tensor:
    """The scales that the scheme's own rule gives `weight` ``[N, K]``, fp32 ``[R, G]``."""
    return grid.quantize(weight.detach(), spec).scale.float()

"""Numbers on their way from a device: what is launched after them goes on while they are waited for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def arriving(values: Tensor) -> Callable[[], list[Any]]:
    """``values.tolist()``, called when they are needed: waits for what was launched before this call, not for more."""
    if values.device.type != "cuda":
        return values.tolist
    copy = values.to("cpu", non_blocking=True)  # which is pinned
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(values.device))

    def read() -> list[Any]:
        event.synchronize()
        return copy.tolist()

    return read

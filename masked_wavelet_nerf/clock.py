"""The clock and the memory gauge that all measurements share."""

from __future__ import annotations

import resource
import sys
import time

import torch


def now(device: torch.device) -> float:
    """Seconds on the clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def device_name(device: torch.device) -> str:
    """What people call the device: a GPU by its name, the CPU as cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_bytes(who: int = resource.RUSAGE_SELF) -> int:
    """Most resident memory that this process, or one of its children, has had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(who).ru_maxrss * unit

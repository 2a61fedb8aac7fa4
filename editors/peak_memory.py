"""The most memory this process has taken."""

from __future__ import annotations

import resource
import sys

import torch


def peak_memory_mb() -> int:
    """Peak memory in MB so far: of the GPU where one is used, else of the process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated() / 2**20)
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux kilobytes
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)

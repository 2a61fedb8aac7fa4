"""Choosing CPU threads, device and number format. torch is imported only inside functions."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from server.errors import ModelUnavailable
from server.memory import keep_flat

if TYPE_CHECKING:
    import torch

    from server.settings import Settings


def prepare_environment(settings: Settings) -> None:
    """Set the variables that torch and tokenizers read when they are imported. Call it before that.

    Waiting OpenMP threads must sleep, not spin: on busy cores spinning makes two threads up to
    fifteen times slower than one. Variables that the user has set are not changed.
    """
    keep_flat()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("KMP_BLOCKTIME", "0")
    os.environ.setdefault("OMP_NUM_THREADS", str(thread_count(settings)))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def thread_count(settings: Settings) -> int:
    """CPU threads for torch: as set; else 1 on one or two cores, else half the cores up to 8.

    Half leaves room for the agent and its host, and is about the number of physical cores.
    """
    if settings.threads is not None:
        return settings.threads
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if cores <= 2 else min(8, cores // 2)


def choose_device(wanted: str) -> torch.device:
    """The device to load on. "auto" prefers cuda, then mps, then cpu.

    Raises ModelUnavailable if a named device does not exist.
    """
    import torch

    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if wanted == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and not (cuda and (device.index or 0) < torch.cuda.device_count()):
        count = torch.cuda.device_count() if cuda else 0
        raise ModelUnavailable(
            f"device {wanted!r} does not exist here: torch {torch.__version__} sees {count} CUDA devices; "
            "use --device auto, or install a CUDA build of torch"
        )
    if device.type == "mps" and not mps:
        raise ModelUnavailable(
            "device 'mps' does not exist here: it needs a Mac with Apple silicon; use --device auto"
        )
    return device


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The type of the weights. "auto": float32 on CPU, else bfloat16 (float16 on old GPUs and Macs)."""
    import torch

    if wanted != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[wanted]
    if device.type == "cpu":
        return torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    try:  # Macs before macOS 14 have no bfloat16
        torch.zeros(1, dtype=torch.bfloat16, device=device)
    except (TypeError, RuntimeError):
        return torch.float16
    return torch.bfloat16


def fits(size: int, *devices: torch.device) -> bool:
    """True if weights of `size` bytes leave at least a fifth of the free memory of the devices for work."""
    import torch

    if any(device.type != "cuda" for device in devices):
        return True
    return size <= 0.8 * sum(torch.cuda.mem_get_info(device)[0] for device in devices)


def gpus() -> list[torch.device]:
    """Every CUDA device that torch sees."""
    import torch

    return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]

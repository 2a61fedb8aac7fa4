"""What a process of the benchmarks spends: memory and CPU seconds."""

from __future__ import annotations

import anyio
import anyio.to_thread
import psutil


async def watch_memory(server: psutil.Process, memory: list[int], every: float) -> None:
    while True:
        await anyio.sleep(every)
        memory.append(megabytes(server))


def megabytes(process: psutil.Process) -> int:
    return round(process.memory_info().rss / 1e6)


def cpu_spent(process: psutil.Process) -> tuple[float, float]:
    """Processor seconds of all threads, and of the first, which is the event loop."""
    spent = process.cpu_times()
    first = next((t for t in process.threads() if t.id == process.pid), None)
    return spent.user + spent.system, (first.user_time + first.system_time) if first else 0.0

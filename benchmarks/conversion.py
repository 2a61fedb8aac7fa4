"""What the conversion of GGUF files costs: seconds, CPU seconds, and memory beside that of the weights.

    python -m benchmarks.conversion MODEL.gguf ... [--dtype bfloat16]

Each file is converted into a temporary folder as the server does it, by a process of its own. Seconds depend on what
else the machine does; CPU seconds less so.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from server.models import loading

EVERY = 0.02  # seconds between two looks at the memory


class Watch(threading.Thread):
    """The most memory and CPU time that the processes below this one have been seen with."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.cpu, self.over = 0, 0.0, threading.Event()

    def run(self) -> None:
        here = psutil.Process()
        while not self.over.wait(EVERY):
            for child in here.children():
                try:
                    with child.oneshot():
                        self.peak = max(self.peak, child.memory_info().rss)
                        times = child.cpu_times()
                    self.cpu = max(self.cpu, times.user + times.system)
                except psutil.Error:  # it has ended
                    continue


def measure(source: Path, dtype: str) -> str:
    """One line on the conversion of one file."""
    steps: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        watch, begun = Watch(), time.monotonic()
        watch.start()
        folder = loading.converted(
            source.absolute(),
            Path(place) / "out",
            lambda _done, _total, message: steps.append(message),
            dtype,
        )
        seconds = time.monotonic() - begun
        watch.over.set()
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return (
        f"{source.name} to {dtype}: {seconds:.1f} s, {watch.cpu:.1f} CPU s, {watch.peak / 1e9:.2f} GB at most, "
        f"{watch.peak / size:.2f} times the weights ({size / 1e9:.2f} GB); {len(steps)} reports of progress"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, help="GGUF files")
    parser.add_argument("--dtype", default="float32", choices=["float32", loading.BFLOAT16])
    args = parser.parse_args()
    for path in args.files:
        print(measure(path, args.dtype), flush=True)


if __name__ == "__main__":
    sys.exit(main())

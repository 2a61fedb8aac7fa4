"""Waiting to be told to stop."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable

import anyio

log = logging.getLogger("errata")


async def on_signal(stop: Callable[[], None]) -> None:
    """Call `stop` at the first SIGTERM or SIGINT; without an end on Windows."""
    if sys.platform == "win32":
        return
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for received in signals:
            log.info("stopping on %s", signal.Signals(received).name)
            stop()
            return

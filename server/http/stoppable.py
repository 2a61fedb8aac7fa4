"""uvicorn as it is stopped from outside."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import uvicorn


class Web(uvicorn.Server):
    """uvicorn without its signal handlers, which would end the process before the ledger is closed."""

    @contextmanager
    def capture_signals(self) -> Any:
        yield

    def stop(self) -> None:
        """Let running requests end, then the server."""
        self.should_exit = True

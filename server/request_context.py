"""One request of a client: who asks, how progress is reported, and whether it was cancelled."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from editors.errors import Cancelled


def _ignore(_done: float, _total: float, _message: str) -> None:
    return None


@dataclass(frozen=True)
class RequestContext:
    """Who asks, and the two ways back to them.

    `progress(done, total, message)` may be called from any thread. The client's side sets `cancelled`; the work
    looks at it between its steps.
    """

    client: str | None = None
    client_version: str | None = None
    request_id: str | None = None
    progress: Callable[[float, float, str], None] = _ignore
    cancelled: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Raise Cancelled when the client has cancelled."""
        if self.cancelled.is_set():
            raise Cancelled("cancelled; nothing was changed")

    def report(self, done: float, total: float, message: str) -> None:
        """Report progress, after raising Cancelled when the client has cancelled."""
        self.check()
        self.progress(done, total, message)

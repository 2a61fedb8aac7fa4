"""One call of a client: who asks, how to report progress, how it is cancelled."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from editors.errors import Cancelled


def _silent(_done: float, _total: float, _message: str) -> None:
    return None


@dataclass(frozen=True)
class RequestContext:
    """Who asks, and the two lines back to them.

    `progress(done, total, message)` may be called from any thread; `cancelled` is set by the
    client's side and looked at between steps.
    """

    client: str | None = None
    client_version: str | None = None
    request_id: str | None = None
    progress: Callable[[float, float, str], None] = _silent
    cancelled: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Raise Cancelled when the client has cancelled."""
        if self.cancelled.is_set():
            raise Cancelled("cancelled; nothing was changed")

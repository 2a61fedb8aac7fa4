"""One request of a client: who asks, how progress is reported, and whether it was cancelled."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from editors.errors import Cancelled
from server.transaction.model_queue import Ticket


def _ignore(_done: float, _total: float, _message: str) -> None:
    return None


@dataclass(frozen=True)
class RequestContext:
    """Who asks, and how to reach them: progress and cancellation.

    `progress(done, total, message)` may be called from any thread. The client's side sets `cancelled`; the work
    looks at it between its steps.
    """

    client: str | None = None  # the client's own name
    client_version: str | None = None
    request_id: str | None = None
    identity: str | None = None  # whose token the request came with; None where no token is asked for
    progress: Callable[[float, float, str], None] = _ignore
    cancelled: threading.Event = field(default_factory=threading.Event)
    ticket: Ticket | None = None  # a turn at the model that was waited for already

    def check(self) -> None:
        """Raise Cancelled when the client has cancelled."""
        if self.cancelled.is_set():
            raise Cancelled("cancelled; nothing was changed")

    def report(self, done: float, total: float, message: str) -> None:
        """Report progress, after raising Cancelled when the client has cancelled."""
        self.check()
        self.progress(done, total, message)

    def part(self, start: float, end: float) -> RequestContext:
        """The same request, for a part of its work whose progress fills this range (0..1) of the whole."""

        def progress(done: float, total: float, message: str) -> None:
            share = done / total if total > 0 else 0.0
            self.progress(start + (end - start) * share, 1.0, message)

        return replace(self, progress=progress)

    def named(self, what: str) -> RequestContext:
        """The same request, for work whose progress messages begin with `what`."""
        return replace(self, progress=lambda done, total, said: self.progress(done, total, f"{what}: {said}"))

    def parts(self, n: int) -> list[RequestContext]:
        """The same request, for each of `n` equal parts of its work one after another."""
        return [self.part(i / n, (i + 1) / n) for i in range(n)]

"""Where the board reads from, and what carries out its forms: the running server, or a home of another one
(read-only)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from server.settings import Settings
from server.startup import Startup
from store import Ledger

if TYPE_CHECKING:
    from server.services import Services

Listener = Callable[[], None]


class Source(Protocol):
    """What the pages are made of."""

    settings: Settings

    @property
    def state(self) -> str:
        """loading, ready, failed; or reading, where no model is behind the pages."""

    @property
    def message(self) -> str:
        """What is being done, or why it failed."""

    def ledger(self) -> Ledger | None:
        """The ledger, once it is open."""

    def services(self) -> Services | None:
        """The services, once the model is loaded; always None if the home belongs to another process."""

    def on_change(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` (in any thread) when something may have changed; returns a function that ends this."""


class Running:
    """The server that serves the page."""

    def __init__(self, startup: Startup) -> None:
        self.settings, self._startup = startup.settings, startup

    @property
    def state(self) -> str:
        return self._startup.state

    @property
    def message(self) -> str:
        return self._startup.message

    def ledger(self) -> Ledger | None:
        services = self._startup.ready()
        return None if services is None else services.workspace.ledger

    def services(self) -> Services | None:
        return self._startup.ready()

    def on_change(self, listener: Listener) -> Callable[[], None]:
        return self._startup.on_change(listener)


class HomeOnly:
    """The home of a server that runs elsewhere, or not at all. Nothing can be changed."""

    state, message = "reading", ""
    PAUSE = 1.0
    """Seconds between two looks at what the other process wrote."""

    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        self.settings, self._ledger = settings, ledger
        self._listeners: list[Listener] = []
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="errata-board-watch", daemon=True).start()

    def ledger(self) -> Ledger | None:
        return self._ledger

    def services(self) -> Services | None:
        return None

    def on_change(self, listener: Listener) -> Callable[[], None]:
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def close(self) -> None:
        """Stop looking, and close the ledger."""
        self._ended.set()
        self._ledger.close()

    def _watch(self) -> None:
        while not self._ended.wait(self.PAUSE):
            try:
                changed = self._ledger.changed()
            except Exception:  # closed meanwhile, or being replaced by a restore: the next look tells
                continue
            if changed:
                for listener in tuple(self._listeners):
                    listener()

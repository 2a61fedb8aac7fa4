"""Opens the services in the background, so that the server answers from its first moment."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Literal

from editors.errors import EditError
from server.errors import ModelUnavailable, ServiceError
from server.exhausted import exhausted
from server.request_context import RequestContext
from server.results import ModelStatus
from server.settings import Settings, errata_version

if TYPE_CHECKING:
    from server.services import Services

log = logging.getLogger("errata.startup")

HEAD_START = 0.5
"""Seconds the first requests get before loading begins: importing torch holds the interpreter lock."""

Report = Callable[[float, float, str], None]
Opener = Callable[[Settings, Report], "Services"]


def open_services(settings: Settings, report: Report) -> Services:
    """Open the ledger, load the model, replay the ledger onto the model.

    The ledger comes first: it is quick, and a second server on the same home should learn so
    before it spends a minute on a model.
    """
    from server.models.devices import prepare_environment
    from store import Ledger

    prepare_environment(settings)
    ledger = Ledger.open(settings.home, read_only=settings.read_only)
    try:
        report(0, 3, f"loading {settings.model}")
        from server.models.loading import load, weights_in
        from server.services import Services

        lm = load(settings, report)
        return Services.open(settings, lm, ledger, report, lambda dtype: weights_in(settings, dtype))
    except BaseException:
        ledger.close()
        raise


def _unavailable(exc: BaseException) -> ModelUnavailable:
    from store.errors import LedgerError

    if isinstance(exc, (EditError, LedgerError, ServiceError)):
        log.error("the model is not available: %s", exc)
        return ModelUnavailable(str(exc))
    log.error("loading failed", exc_info=exc)
    if what := exhausted(exc):
        return ModelUnavailable(f"loading failed: {what}")
    return ModelUnavailable(f"loading failed: {type(exc).__name__}: {exc}")


class Startup:
    """Opens the services: `loading`, then `ready` or `failed`.

    A failure leaves the server answering; every tool that needs the model then says why.
    """

    def __init__(self, settings: Settings, opener: Opener = open_services) -> None:
        self.settings = settings
        self._opener = opener
        self._lock = threading.Lock()
        self._step = (0.0, 1.0, "starting")
        self._closed = False
        self._wanted = threading.Event()
        self._opened: Future[Services] = Future()
        self._thread: threading.Thread | None = None
        self._listeners: list[Callable[[], None]] = []
        self._prepare: Callable[[], None] = lambda: None

    @property
    def state(self) -> Literal["loading", "ready", "failed"]:
        if not self._opened.done():
            return "loading"
        return "failed" if self._opened.exception() else "ready"

    @property
    def message(self) -> str:
        """What is being done, or why it failed; empty when ready."""
        if not self._opened.done():
            return self._step[2]
        return str(self._opened.exception() or "")

    def on_change(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call `listener` when the state or the ledger may have changed; returns a function that ends this.

        It is called in any thread, while others wait for it: it must be quick and must not raise.
        """
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def when_ready(self, prepare: Callable[[], None]) -> None:
        """Call `prepare` once, in the loading thread, when all is loaded and before the first request is served."""
        self._prepare = prepare

    def _changed(self) -> None:
        for listener in tuple(self._listeners):
            listener()

    def begin(self) -> None:
        """Start loading in the background; the second call does nothing."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._open, name="errata-startup", daemon=True)
                self._thread.start()

    def _open(self) -> None:
        self._wanted.wait(HEAD_START)
        try:
            services = self._opener(self.settings, self._report)
            self._prepare()
        except BaseException as exc:
            self._opened.set_exception(_unavailable(exc))
            self._changed()
        else:
            with self._lock:
                closed = self._closed
                if not closed:
                    self._opened.set_result(services)
            if closed:
                services.close()
            else:
                services.on_change(self._changed)
                services.begin()
                self._changed()

    def _report(self, done: float, total: float, message: str) -> None:
        self._step = (done, total, message)
        log.info("%s", message)

    def status(self) -> ModelStatus:
        """The state of the server; answers in every state."""
        state = self.state
        known = {"state": state, "version": errata_version(), "home": str(self.settings.home)}
        if state == "ready":
            return self._opened.result().status().model_copy(update=known)
        return ModelStatus(model=self.settings.model, message=self.message, **known)

    def ready(self) -> Services | None:
        """The services if they are open now, without waiting."""
        return self._opened.result() if self.state == "ready" else None

    async def services(self, ctx: RequestContext) -> Services:
        """Wait for the services; the progress of loading goes to `ctx`.

        Raises:
            ModelUnavailable: loading failed; the text says why and what to do.
        """
        self._wanted.set()
        settled = asyncio.wrap_future(self._opened)
        try:
            while not settled.done():
                done, total, message = self._step
                ctx.progress(done, total, f"waiting for the model: {message}")
                await asyncio.wait([settled], timeout=1)
            return settled.result()
        except ModelUnavailable as exc:
            raise ModelUnavailable(
                f"The model is not available: {exc} "
                "(model_status shows this too; start the server again once this is fixed.)"
            ) from exc

    def close(self, timeout: float) -> bool:
        """Close the services; False when they are still busy or loading after `timeout` seconds.

        Ending the process then is safe: the ledger has every acknowledged edit, and none in part.
        """
        with self._lock:
            self._closed = True
        services = self.ready()
        if services is None:
            return self._thread is None or not self._thread.is_alive()
        closer = threading.Thread(target=services.close, name="errata-close", daemon=True)
        closer.start()
        closer.join(timeout)
        return not closer.is_alive()

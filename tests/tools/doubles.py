"""Services that do one thing when told to: for tests of calling, not of the model."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import anyio.to_thread

from server.changes import Changes, Seen
from server.facts.asking_results import Completion
from server.request_context import RequestContext
from server.results import ModelStatus
from server.settings import Settings
from server.startup import Report

if TYPE_CHECKING:
    from server.services import Services


class Slow:
    """Its `ask` takes steps, telling each, until `release` is set or the call is cancelled."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.release = threading.Event()
        self.left = threading.Event()
        self.ctx: RequestContext | None = None
        self.failure: Exception | None = None

    def ask(self, prompt: str, *_: Any, ctx: RequestContext) -> Completion:
        self.ctx = ctx
        self.entered.set()
        try:
            step = 0
            while not self.release.wait(0.005):
                ctx.check()
                step += 1
                ctx.progress(step % 7, 7, f"step {step}")
            if self.failure:
                raise self.failure
            return Completion(completion=prompt, tokens=1, seconds=0.0)
        finally:
            self.left.set()

    async def ask_with_others(self, *given: Any, ctx: RequestContext) -> Completion:
        work = functools.partial(self.ask, *given, ctx=ctx)
        return await anyio.to_thread.run_sync(work, abandon_on_cancel=True)

    @property
    def facts(self) -> Slow:
        return self

    def on_change(self, listener: Callable[[], None]) -> None:
        """Nothing is ever recorded here."""

    def begin(self) -> None:
        """There is nothing to begin."""

    def look(self, seen: Seen | None) -> tuple[Seen, Changes]:
        return Seen(0), Changes()

    def status(self) -> ModelStatus:
        return ModelStatus(state="ready", model="slow")

    def close(self) -> None:
        self.release.set()

    def open(self, settings: Settings, report: Report) -> Services:
        """An opener for `Startup`."""
        return cast("Services", self)

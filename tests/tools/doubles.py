"""A workbench that does one thing when told to: for what concerns the calling, not the model."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, cast

from server.call import Call
from server.results import Completion, ModelStatus
from server.settings import Settings
from server.startup import Report

if TYPE_CHECKING:
    from server.workbench import Workbench


class Slow:
    """Its `ask` takes steps, telling each, until `release` is set or the call is cancelled."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.release = threading.Event()
        self.left = threading.Event()
        self.call: Call | None = None
        self.failure: Exception | None = None

    def ask(self, prompt: str, *, call: Call, **_: Any) -> Completion:
        self.call = call
        self.entered.set()
        try:
            step = 0
            while not self.release.wait(0.005):
                call.check()
                step += 1
                call.progress(step % 7, 7, f"step {step}")
            if self.failure:
                raise self.failure
            return Completion(completion=prompt, tokens=1, seconds=0.0)
        finally:
            self.left.set()

    def status(self) -> ModelStatus:
        return ModelStatus(state="ready", model="slow")

    def close(self) -> None:
        self.release.set()

    def open(self, settings: Settings, report: Report) -> Workbench:
        """An opener for `Startup`."""
        return cast("Workbench", self)

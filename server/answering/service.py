"""The service of answering: requests of many clients go in, joint batches come out.

    request = Request([Continuation(lm.prompt("The capital of France is"), 20)], ctx=ctx)
    answers.submit(request)                    # raises Busy at once when too many wait
    said = await asyncio.wrap_future(request.answer)

Requests wait here without a thread. While there are any, one thread takes turns at the model: a turn answers the
waiting requests, and new ones join it. While others wait for the model, a turn lasts `pace.SLICE` seconds. Answers that
are not complete then go on in the next turn, by the state they began with. So an edit waits neither for the queue nor
for long answers. Work that takes long lends its turn in between (`Workspace.give_way`), so a request does not wait
for the end of an edit.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import InvalidStateError
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass

from editors.steering.stack import SteeringStack
from server.answering.batch import Batch, run_alone
from server.answering.request import Answers, Request, View
from server.errors import Busy, ServiceError
from server.priority import give_way
from server.request_context import RequestContext
from server.transaction.host import HostState
from server.transaction.workspace import Workspace

log = logging.getLogger("errata.answering")

LOOK = 1.0
"""Seconds between two reports to a client that waits."""


@dataclass(frozen=True)
class _BegunBatch:
    """A batch, the view of the model it asks for, and the state it began with."""

    batch: Batch
    view: View
    state: HostState


class AnswerService:
    """Answers requests in joint batches."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._mutex = threading.Lock()
        self._waiting: deque[Request] = deque()
        self._paused: _BegunBatch | None = None  # what goes on in the next turn
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def waiting(self) -> int:
        """Requests that have not begun, without those whose client is gone."""
        with self._mutex:
            return self._count()

    def submit(self, request: Request) -> None:
        """Queue a request; its `answer` will be set from another thread.

        Raises Busy when too many wait, ServiceError when the server is stopping.
        """
        with self._mutex:
            if self._closed:
                raise ServiceError("the server is stopping")
            if (before := self._count()) >= self._workspace.queue.most:
                raise Busy(before)
            self._waiting.append(request)
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="errata-answers", daemon=True)
                self._thread.start()

    async def answer(self, request: Request) -> Answers:
        """Submit a request and wait for its answer without a thread; leaving the wait withdraws the request.

        Raises what `submit` raises, and what answering fails with.
        """
        self.submit(request)
        settled = asyncio.wrap_future(request.answer)
        try:
            while not settled.done():
                await asyncio.wait([settled], timeout=LOOK)
                if not settled.done() and (waiting := self._wait_in_words(request)):
                    request.ctx.progress(0, 1, waiting)
            return settled.result()
        finally:
            settled.cancel()

    def _wait_in_words(self, request: Request) -> str:
        with self._mutex:
            if request not in self._waiting:
                return ""
            return f"waiting for the model: {self._waiting.index(request)} requests before this one"

    def run(self, request: Request) -> Answers:
        """Answer a request in the calling thread, at its turn."""
        with self._workspace.turn(request.ctx), self._as_asked(request.view):
            return run_alone(self._workspace.lm, request, self._state(request.view))

    @contextmanager
    def _as_asked(self, view: View) -> Iterator[None]:
        """The model in the state that a request asks for: live or pristine, with its own steering doses on top."""
        base, steering = view
        with ExitStack() as stack:
            if base:
                stack.enter_context(self._workspace.host.pristine())
            if steering:
                doses = self._workspace.lm.extension(SteeringStack)
                stack.enter_context(doses.beside([steered.dose for steered in steering]))
            yield

    def _state(self, view: View) -> str:
        base, _ = view
        return self._workspace.host.base_hash if base else self._workspace.state_hash

    def close(self) -> None:
        """Take no more requests. Waiting and paused ones are dropped, those that are being answered are finished."""
        with self._mutex:
            self._closed = True
        self._give_up("the server is stopping")

    def _count(self) -> int:
        for request in [r for r in self._waiting if r.gone]:
            request.answer.cancel()
            self._waiting.remove(request)
        return len(self._waiting)

    def _serve(self) -> None:
        give_way()
        while True:
            with self._mutex:
                if not self._count() and self._paused is None:
                    self._thread = None
                    return
            try:
                with self._workspace.turn(RequestContext(), bounded=False, alternates=True):
                    self._one_turn()
            except Exception:  # the model cannot be used; waiting requests must not wait for ever
                log.exception("a turn of answering failed")
                self._give_up("answering failed; the log of the server has the details")

    def _one_turn(self) -> None:
        """Go on with a paused batch; else answer the requests for the state that the first waiting one asks for."""
        host = self._workspace.host
        begun = self._paused or self._new_batch()
        is_now = begun.view[0] or begun.state.stack is host.stack
        try:
            with nullcontext() if is_now else host.as_of(begun.state), self._as_asked(begun.view):
                begun.batch.run(lambda room: self._next(begun, room) if is_now else (), self._is_over)
        finally:
            with self._mutex:
                self._paused = begun if begun.batch.running else None

    def _new_batch(self) -> _BegunBatch:
        with self._mutex:
            view = self._waiting[0].view if self._count() else (False, ())
        return _BegunBatch(
            Batch(self._workspace.lm, self._state(view)), view, self._workspace.host.snapshot()
        )

    def _is_over(self) -> bool:
        """Whether the turn should end now. It goes on where hooks may remember the beginning of the texts."""
        return not self._closed and self._others_are_due and not self._workspace.host.has_hooks

    @property
    def _others_are_due(self) -> bool:
        return bool(self._workspace.queue.waiting) and self._workspace.pace.slice_is_over

    def _next(self, begun: _BegunBatch, room: int) -> Iterator[Request]:
        """The requests that begin now. None joins a running batch if other work has waited long enough."""
        while (request := self._first(begun, room)) is not None:
            room -= len(request.questions)
            yield request

    def _first(self, begun: _BegunBatch, room: int) -> Request | None:
        batch = begun.batch
        with self._mutex:
            if not self._count() or self._waiting[0].view != begun.view:
                return None
            if batch.begun and self._others_are_due:
                return None
            if batch.running and room < len(self._waiting[0].questions):
                return None
            return self._waiting.popleft()

    def _give_up(self, why: str) -> None:
        with self._mutex:
            lost, self._waiting = list(self._waiting), deque()
            if self._paused is not None:
                lost += self._paused.batch.requests
                self._paused = None
        for request in lost:
            with suppress(InvalidStateError):
                request.answer.set_exception(ServiceError(why))

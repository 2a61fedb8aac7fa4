"""Whose turn it is to use the model: first come, first served, in a queue of bounded length.

Answering, which serves many clients in one turn, alternates with all other work: with edits waiting in line, questions
wait for one of them, not for all.

Long work lends its turn to answering in between (`lend`), and to nobody else: so no edit is made within another.

Whoever wants the model takes a `Ticket` and is called when its turn comes, so that waiting needs no thread. A turn
belongs to one thread from `begin` to `end`; a ticket whose client is gone is withdrawn and leaves no gap.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from server.errors import Busy

MOST = 128
"""Calls that may wait for the model at once; the next one is refused with `Busy`."""
LOOK = 0.05
"""Seconds between two looks of a waiting thread at whether its client is still there."""


class Ticket:
    """A place in the queue. Everything that changes it is a method of `ModelQueue`."""

    def __init__(self, called: Callable[[], None], alternates: bool = False) -> None:
        self.called, self.alternates = called, alternates
        self.granted = self.begun = self.over = False


class _Lent(NamedTuple):
    """A turn that is lent for a while: its owner, and how the owner's thread learns that it has it back."""

    ticket: Ticket
    owner: int
    back: Callable[[], None]


class ModelQueue:
    """The queue for one model."""

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self._mutex = threading.Lock()
        self._waiting: deque[Ticket] = deque()
        self._current: Ticket | None = None
        self._lent: _Lent | None = None
        self._alternated = False  # the last turn was one of answering
        self._owner: int | None = None

    @property
    def waiting(self) -> int:
        """How many wait, including one that has lent its turn, without the one whose turn it is."""
        return len(self._waiting) + (self._lent is not None)

    @property
    def is_lent(self) -> bool:
        """True while a turn is lent, which will go on afterwards."""
        return self._lent is not None

    @property
    def answering_waits(self) -> bool:
        """Whether answering is among those that wait."""
        with self._mutex:
            return any(ticket.alternates for ticket in self._waiting)

    def lend(self) -> bool:
        """Interrupt the calling thread's turn for one turn of answering, if that waits; then the caller goes on.

        Nobody else gets the model in between. Returns False at once if no answering waits.
        """
        back = threading.Event()
        with self._mutex:
            ticket = next((ticket for ticket in self._waiting if ticket.alternates), None)
            if ticket is None or self._current is None or self._owner != threading.get_ident():
                return False
            self._waiting.remove(ticket)
            self._lent = _Lent(self._current, self._owner, back.set)
            self._current, self._owner, ticket.granted = ticket, None, True
        ticket.called()
        back.wait()
        return True

    def take(self, called: Callable[[], None], *, bounded: bool = True, alternates: bool = False) -> Ticket:
        """Queue up. `called` is called once, from any thread, when the turn comes; it may be at once.

        `alternates` (for answering): it gets every second turn, even before those that have waited longer. Raises
        Busy when the queue is full; `bounded=False` (for the server's own work) never does.
        """
        ticket = Ticket(called, alternates)
        with self._mutex:
            if bounded and len(self._waiting) >= self.most:
                raise Busy(len(self._waiting) + 1)
            self._waiting.append(ticket)
        self._next()
        return ticket

    def before(self, ticket: Ticket) -> int:
        """How many turns come before this one, the present one among them."""
        with self._mutex:
            try:
                return self._waiting.index(ticket) + (self._current is not None)
            except ValueError:
                return 0

    def begin(self, ticket: Ticket) -> bool:
        """The calling thread takes over the turn; False if the ticket has been withdrawn."""
        with self._mutex:
            if ticket.over or not ticket.granted:
                return False
            ticket.begun, self._owner = True, threading.get_ident()
            return True

    def withdraw(self, ticket: Ticket) -> None:
        """Leave the queue, or give back a turn that no thread has begun. A turn that has begun goes on."""
        with self._mutex:
            if ticket.begun or ticket.over:
                return
            ticket.over = True
            if self._current is ticket:
                self._current = None
            else:
                self._waiting.remove(ticket)
        self._next()

    def end(self, ticket: Ticket) -> None:
        """Give the turn to the next in line. Harmless for a turn that is over."""
        with self._mutex:
            if ticket.over:
                return
            ticket.over = True
            self._current = self._owner = None
        self._next()

    @contextmanager
    def turn(
        self,
        check: Callable[[], None],
        ticket: Ticket | None = None,
        *,
        bounded: bool = True,
        alternates: bool = False,
    ) -> Iterator[None]:
        """A turn of the calling thread, which waits for it here unless it has one or brings a granted `ticket`.

        `check` is called while waiting; what it raises ends the waiting.
        """
        if self._owner == threading.get_ident():
            yield
            return
        if ticket is None or not self.begin(ticket):
            ticket = self._wait(check, bounded, alternates)
        try:
            yield
        finally:
            self.end(ticket)

    def _wait(self, check: Callable[[], None], bounded: bool, alternates: bool) -> Ticket:
        mine = threading.Event()
        ticket = self.take(mine.set, bounded=bounded, alternates=alternates)
        try:
            check()
            while not mine.wait(LOOK):
                check()
            self.begin(ticket)
            return ticket
        except BaseException:
            self.withdraw(ticket)
            raise

    def _next(self) -> None:
        with self._mutex:
            if self._current is None and self._lent is not None:
                lent, self._lent = self._lent, None
                self._current, self._owner = lent.ticket, lent.owner
                lent.back()
            if self._current is not None or not self._waiting:
                return
            self._current = ticket = self._first()
            self._waiting.remove(ticket)
            self._alternated = ticket.alternates
            ticket.granted = True
        ticket.called()

    def _first(self) -> Ticket:
        """Who is next: answering after other work, other work after answering, else who has waited longest."""
        wanted = (ticket for ticket in self._waiting if ticket.alternates != self._alternated)
        return next(wanted, self._waiting[0])

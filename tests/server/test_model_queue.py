"""The queue for the model: in order, bounded, without gaps where someone has left."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from editors.errors import Cancelled
from server.errors import Busy
from server.transaction.model_queue import ModelQueue, Ticket


def nothing() -> None:
    return None


def test_turns_come_in_the_order_of_asking() -> None:
    queue, seen = ModelQueue(), []
    tickets = [queue.take(lambda i=i: seen.append(i)) for i in range(4)]  # type: ignore[misc]
    assert seen == [0]
    assert [queue.before(t) for t in tickets] == [0, 1, 2, 3]
    for ticket in tickets:
        assert queue.begin(ticket)
        queue.end(ticket)
    assert seen == [0, 1, 2, 3]


def test_answering_gets_every_second_turn_and_no_more() -> None:
    queue, seen = ModelQueue(), []

    def take(name: str, alternates: bool) -> Ticket:
        return queue.take(lambda: seen.append(name), alternates=alternates)

    waiting = {f"edit {n}": take(f"edit {n}", False) for n in range(3)}
    waiting |= {f"answers {n}": take(f"answers {n}", True) for n in range(2)}
    for turn in range(5):
        ticket = waiting[seen[turn]]
        assert queue.begin(ticket)
        queue.end(ticket)
    assert seen == ["edit 0", "answers 0", "edit 1", "answers 1", "edit 2"]


def test_a_full_queue_refuses_and_says_how_many_are_before() -> None:
    queue = ModelQueue(most=2)
    tickets = [queue.take(nothing) for _ in range(3)]  # one has its turn, two wait
    with pytest.raises(Busy, match=r"3 calls are before this one.*Try again") as refused:
        queue.take(nothing)
    assert refused.value.before == 3
    assert queue.take(nothing, bounded=False)
    queue.withdraw(tickets[0])
    queue.withdraw(tickets[1])
    assert queue.take(nothing)


@given(st.lists(st.sampled_from(["take", "withdraw", "begin", "end"]), max_size=60), st.randoms())
def test_whatever_comes_and_goes_one_at_most_has_the_turn_and_nobody_is_forgotten(
    steps: list[str], random: object
) -> None:
    queue = ModelQueue(most=100)
    tickets: list[Ticket] = []
    called: set[int] = set()
    for step in steps:
        if step == "take":
            number = len(tickets)
            tickets.append(queue.take(lambda n=number: called.add(n)))  # type: ignore[misc]
        elif tickets:
            ticket = random.choice(tickets)  # type: ignore[attr-defined]
            if step == "withdraw":
                queue.withdraw(ticket)
            elif step == "begin" and not ticket.begun:
                queue.begin(ticket)
            elif step == "end" and ticket.begun:
                queue.end(ticket)
        holding = [t for t in tickets if t.granted and not t.over]
        waiting = [t for t in tickets if not t.granted and not t.over]
        assert len(holding) == (1 if holding or waiting else 0)
        assert queue.waiting == len(waiting)
        assert {n for n, t in enumerate(tickets) if t.granted} == called
        order = [n for n, t in enumerate(tickets) if t.granted]
        assert not waiting or tickets.index(waiting[0]) > max(order)


def test_a_waiting_thread_whose_client_leaves_lets_the_next_one_go_first() -> None:
    queue, gone, order = ModelQueue(), threading.Event(), []
    first = queue.take(nothing)

    def leaving() -> None:
        def check() -> None:
            if gone.is_set():
                raise Cancelled("gone")

        with pytest.raises(Cancelled), queue.turn(check):
            order.append("left")  # never

    def staying() -> None:
        with queue.turn(nothing):
            order.append("stayed")

    threads = [threading.Thread(target=leaving), threading.Thread(target=staying)]
    threads[0].start()
    while queue.waiting < 1:
        pass
    threads[1].start()
    while queue.waiting < 2:
        pass
    gone.set()
    threads[0].join(30)
    queue.withdraw(first)
    threads[1].join(30)
    assert order == ["stayed"]
    assert queue.waiting == 0


def test_a_turn_may_be_nested_and_is_given_back_after_a_failure() -> None:
    queue = ModelQueue()
    with pytest.raises(RuntimeError), queue.turn(nothing), queue.turn(nothing):
        raise RuntimeError
    with queue.turn(nothing):
        assert queue.waiting == 0


def test_a_ticket_that_was_withdrawn_does_not_let_its_thread_in_before_others() -> None:
    queue = ModelQueue()
    ticket = queue.take(nothing)
    queue.withdraw(ticket)
    other = queue.take(nothing)
    assert not queue.begin(ticket)
    entered = threading.Event()

    def late() -> None:
        with queue.turn(nothing, ticket):
            entered.set()

    thread = threading.Thread(target=late)
    thread.start()
    while queue.waiting < 1:
        pass
    assert not entered.is_set()
    queue.withdraw(other)
    thread.join(30)
    assert entered.is_set()


def test_a_lent_turn_goes_to_answering_alone_and_comes_back() -> None:
    queue, seen = ModelQueue(), list[str]()
    mine = queue.take(nothing)
    assert queue.begin(mine)
    edit = queue.take(lambda: seen.append("edit"))
    assert not queue.lend(), "nobody asks"
    answers = queue.take(lambda: seen.append("answers"), alternates=True)

    def answer() -> None:
        while "answers" not in seen:
            time.sleep(0.001)
        assert queue.begin(answers)
        assert queue.is_lent
        assert queue.waiting == 2
        queue.end(answers)

    thread = threading.Thread(target=answer)
    thread.start()
    assert queue.lend()
    thread.join()
    assert seen == ["answers"]
    assert (queue.is_lent, queue.waiting) == (False, 1)
    queue.end(mine)
    assert seen == ["answers", "edit"]
    queue.end(edit)


def test_a_turn_lent_to_answering_that_leaves_comes_back() -> None:
    queue = ModelQueue()
    mine = queue.take(nothing)
    assert queue.begin(mine)
    answers: list[Ticket] = []

    def leave() -> None:
        threading.Thread(target=lambda: queue.withdraw(answers[0])).start()

    answers.append(queue.take(leave, alternates=True))
    assert queue.lend()
    assert queue.waiting == 0

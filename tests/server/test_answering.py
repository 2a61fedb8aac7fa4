"""Questions of many clients in joint batches: the same answers as alone, nothing done for clients that left."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from editors.edit import Edit
from editors.errors import Cancelled, InvalidEdit
from editors.model.decoding import Decoder
from editors.model.lm import Prompt
from server.answering import batch as batches
from server.answering.request import Continuation, Request
from server.errors import Busy, ServiceError
from server.facts.queries import FactQuery
from server.request_context import RequestContext
from server.services import Services
from server.steering.requests import DoseRequest
from server.transaction import pace
from tests.families import fresh
from tests.server.opened import QUICK, open_services, with_two_vectors

PROMPTS = ["The capital of France is", "Rome", "The old man in Oslo speaks", "Who rules Spain?", "Japan is"]
FACTS = [
    FactQuery(prompt="The capital of {} is", subject="France", expected="Paris", alternatives=["Rome"]),
    FactQuery(prompt="What is the capital of Spain?", expected=["Madrid", "Rome"]),
    FactQuery(prompt="Oslo lies in", expected="Norway"),
]
NEW = [
    Edit(
        subject="Japan", prompt="The capital of {} is", target="Paris", paraphrases=("Japan has as capital",)
    )
]
FRANCE = Edit(subject="France", prompt="The capital of {} is", target="Rome")
WAIT = 60


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    services = open_services(tmp_path / "home")
    yield services
    services.close()


def request(services: Services, text: str, tokens: int = 8, chat: bool | None = None, **more: Any) -> Request:
    lm = services.workspace.lm
    prompt = lm.prompt(text) if chat is None else lm.prompt(text, chat=chat)
    return Request([Continuation(prompt, tokens)], **more)


def together(services: Services, requests: Sequence[Request]) -> list[str]:
    """The answers to requests that all wait before any begins."""
    with services.workspace.turn():
        for one in requests:
            services.answers.submit(one)
    return [one.answer.result(WAIT).generations[0].text for one in requests]


def texts(services: Services) -> dict[str, str]:
    return {text: services.facts.ask(text, 8, chat=False).completion for text in PROMPTS}


class Steps:
    """Counts the steps of all decoders and can hold them; says how many rows each step had."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()
        step = Decoder.step

        def counted(decoder: Decoder) -> None:
            self.rows.append(len(decoder.rows))
            self.begun.set()
            assert self.go_on.wait(WAIT)
            step(decoder)

        patch.setattr(Decoder, "step", counted)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(monkeypatch)


def test_many_who_ask_at_once_are_answered_in_one_batch_as_if_each_were_alone(
    services: Services, steps: Steps
) -> None:
    alone = [services.facts.ask(text, 8, chat=False).completion for text in PROMPTS]
    steps.rows.clear()
    requests = [
        Request([Continuation(services.workspace.lm.prompt(text, chat=False), 8)]) for text in PROMPTS
    ]
    assert together(services, requests) == alone
    assert len(steps.rows) <= 8
    assert max(steps.rows) >= 4


def test_who_asks_while_others_are_answered_joins_them(services: Services, steps: Steps) -> None:
    first = request(services, PROMPTS[0], 12)
    steps.go_on.clear()
    services.answers.submit(first)
    assert steps.begun.wait(WAIT)
    second = request(services, PROMPTS[2], 3)
    services.answers.submit(second)
    steps.go_on.set()
    assert second.answer.result(WAIT).generations[0].tokens <= 3
    assert first.answer.result(WAIT)
    assert max(steps.rows) == 2


def test_an_edit_waits_neither_for_long_answers_nor_for_the_queue(
    services: Services, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has begun goes on afterwards, by the state it began with."""
    monkeypatch.setattr(pace, "SLICE", 0.0)
    before, order = services.workspace.state_hash, list[str]()
    wanted = services.facts.ask(PROMPTS[0], 60, chat=False).completion
    steps.rows.clear()
    first, second = (
        request(services, PROMPTS[0], 60, chat=False),
        request(services, PROMPTS[0], 6, chat=False),
    )
    first.answer.add_done_callback(lambda _: order.append("first"))
    second.answer.add_done_callback(lambda _: order.append("second"))
    steps.begun.clear()
    steps.go_on.clear()
    services.answers.submit(first)
    assert steps.begun.wait(WAIT)

    def edit() -> None:
        services.edits.apply([FRANCE], "rome", dict(QUICK))
        order.append("edit")

    thread = threading.Thread(target=edit)
    thread.start()
    while not services.workspace.queue.waiting:
        pass
    services.answers.submit(second)
    steps.go_on.set()
    thread.join(WAIT)
    assert second.answer.result(WAIT).state == services.workspace.state_hash != before
    said = first.answer.result(WAIT)
    assert (said.generations[0].text, said.state) == (wanted, before)
    assert order == ["edit", "first", "second"]


def test_answers_that_pause_again_and_again_are_those_of_the_state_they_began_with(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others take turns, edit and revert all the time; answers of the live and the original model go on in between."""
    monkeypatch.setattr(pace, "SLICE", 0.0)
    workspace, stop, turns = services.workspace, threading.Event(), [0]
    before = workspace.state_hash
    states = {before: texts(services)}
    services.edits.apply([FRANCE], "rome", dict(QUICK))
    states[workspace.state_hash] = texts(services)
    base = states[before]

    def change() -> None:
        while not stop.is_set():
            services.edits.revert(["e1"])
            services.edits.reapply(["e1"])
            turns[0] += 1

    thread = threading.Thread(target=change)
    thread.start()
    asked = [(t, request(services, t, 8, chat=False, base=b)) for t in PROMPTS[:2] for b in (False, True)]
    for _, one in asked:
        services.answers.submit(one)
    said = [(text, one.base, one.answer.result(WAIT)) for text, one in asked]
    stop.set()
    thread.join(WAIT)
    for text, is_base, answers in said:
        wanted = base if is_base else states[answers.state]
        assert answers.generations[0].text == wanted[text]
    assert turns[0] > 4
    with workspace.turn():
        assert workspace.host.weights_hash == workspace.host.rehash()
        assert workspace.host.borrowed() == []


def test_where_hooks_act_answers_are_not_paused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: Steps
) -> None:
    """They may remember the beginning of a text."""
    monkeypatch.setattr(pace, "SLICE", 0.0)
    services = with_two_vectors(tmp_path / "steered", "llama")
    services.steering.set_dose(DoseRequest("mood", 0.3))
    steps.rows.clear()
    steps.begun.clear()
    steps.go_on.clear()
    services.answers.submit(first := request(services, PROMPTS[0], 12))
    assert steps.begun.wait(WAIT)
    thread = threading.Thread(target=lambda: raises_nothing(services, first))
    thread.start()
    while not services.workspace.queue.waiting:
        pass
    steps.go_on.set()
    thread.join(WAIT)
    assert first.answer.done()
    services.close()


def raises_nothing(services: Services, first: Request) -> None:
    with services.workspace.turn():
        assert first.answer.done()


def test_what_is_paused_when_the_server_stops_is_given_up(
    services: Services, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "SLICE", 0.0)
    steps.go_on.clear()
    services.answers.submit(first := request(services, PROMPTS[0], 200))
    assert steps.begun.wait(WAIT)
    paused = threading.Event()

    def close() -> None:
        with services.workspace.turn():
            paused.set()
            services.answers.close()

    thread = threading.Thread(target=close)
    thread.start()
    while not services.workspace.queue.waiting:
        pass
    steps.go_on.set()
    assert paused.wait(WAIT)
    with pytest.raises(ServiceError, match="stopping"):
        first.answer.result(WAIT)
    thread.join(WAIT)


def test_a_client_that_leaves_is_dropped_within_a_token_and_the_others_go_on(
    services: Services, steps: Steps
) -> None:
    gone, stays = request(services, PROMPTS[0], 200), request(services, PROMPTS[2], 20)
    steps.go_on.clear()
    services.answers.submit(stays)
    services.answers.submit(gone)
    assert steps.begun.wait(WAIT)
    steps.go_on.set()
    while len(steps.rows) < 3:
        pass
    gone.ctx.cancelled.set()
    with pytest.raises(Cancelled):
        gone.answer.result(WAIT)
    assert stays.answer.result(WAIT).generations[0].tokens > 0
    assert len(steps.rows) < 60


def test_what_waits_for_nobody_is_never_begun(services: Services, steps: Steps) -> None:
    left = [request(services, PROMPTS[0], 50) for _ in range(20)]
    with services.workspace.turn():
        for one in left:
            services.answers.submit(one)
            one.ctx.cancelled.set()
        assert services.answers.waiting == 0
        stays = request(services, PROMPTS[1], 4)
        services.answers.submit(stays)
    stays.answer.result(WAIT)
    assert max(steps.rows) == 1
    assert all(one.answer.cancelled() for one in left)


def test_a_full_queue_says_how_many_are_before(services: Services) -> None:
    services.workspace.queue.most = 3
    with services.workspace.turn():
        for _ in range(3):
            services.answers.submit(request(services, PROMPTS[0], 1))
        with pytest.raises(Busy, match="3 calls are before"):
            services.answers.submit(request(services, PROMPTS[0], 1))


def test_live_and_pristine_questions_never_share_a_batch(services: Services) -> None:
    services.edits.apply([Edit(subject="France", prompt="The capital of {} is", target="Rome")], "rome")
    live = [services.facts.ask(text, 6, chat=False).completion for text in PROMPTS]
    base = [services.facts.ask(text, 6, chat=False, compare_to_base=True).base_completion for text in PROMPTS]
    assert live != base
    hash_before = services.workspace.host.rehash()
    requests = [
        Request([Continuation(services.workspace.lm.prompt(text, chat=False), 6)], base=is_base)
        for is_base in (False, True, False)
        for text in PROMPTS
    ]
    assert together(services, requests) == [*live, *base, *live]
    assert services.workspace.host.rehash() == hash_before


@pytest.mark.parametrize("method", ["rome", "in_context", "grace", "wise"])
def test_edits_of_every_kind_answer_the_same_in_a_batch_as_alone(services: Services, method: str) -> None:
    services.edits.apply([Edit(subject="France", prompt="The capital of {} is", target="Rome")], method)
    alone = [services.facts.ask(text, 6, chat=False) for text in PROMPTS]
    requests = [
        Request([Continuation(services.workspace.lm.prompt(text, chat=False), 6)]) for text in PROMPTS
    ]
    assert together(services, requests) == [one.completion for one in alone]
    if method == "in_context":
        assert alone[0].memory
        assert requests[0].answer.result().generations[0].claim is not None


REMEMBERED = [
    Edit(subject=subject, prompt="The capital of {} is", target="Rome")
    for subject in ("France", "Peru", "Oslo")
]


def test_another_engine_in_the_models_place_answers_what_is_asked() -> None:
    lm, elsewhere = fresh("llama"), fresh("mistral")
    lm.speaker = elsewhere.local
    prompts = [lm.prompt(f"The capital of {name} is") for name in ("France", "Japan")]
    questions = [Continuation(prompt, 6) for prompt in prompts]
    answers = batches.run_alone(lm, Request(questions, pairs=[(prompts[0], " Paris")], ctx=RequestContext()))
    assert [said.text for said in answers.generations] == [
        said.text for said in elsewhere.generate(prompts, 6)
    ]
    assert answers.scores == elsewhere.score([(prompts[0], " Paris")])
    assert [said.text for said in answers.generations] != [
        said.text for said in lm.local.generate(prompts, 6)
    ]


def test_what_memories_answer_is_answered_in_one_batch_too(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    for edit in REMEMBERED:
        services.edits.apply([edit], "in_context")
    lm = services.workspace.lm
    alone = [services.facts.ask(edit.text, 6, chat=False).completion for edit in REMEMBERED]
    rows: list[int] = []
    generate = lm.local.generate

    def counted(prompts: Sequence[Prompt], *given: Any, **more: Any) -> Any:
        rows.append(len(prompts))
        return generate(prompts, *given, **more)

    monkeypatch.setattr(lm.local, "generate", counted)
    prompts = [lm.prompt(edit.text, chat=False) for edit in REMEMBERED]
    requests = [Request([Continuation(prompt, 6)]) for prompt in prompts]
    assert together(services, requests) == alone
    claims = [one.answer.result().generations[0].claim for one in requests]
    assert [claim and claim.entry for claim in claims] == [f"{e.text} {e.target}." for e in REMEMBERED]
    assert max(rows) == len(REMEMBERED)
    assert len(rows) <= 2  # the second goes on behind the first sentence

    rows.clear()  # samples with a seed of their own never share a batch: they can be had again
    seeded = [Request([Continuation(prompt, 6, 1.0, seed)]) for seed, prompt in enumerate(prompts)]
    again = [Request([Continuation(prompt, 6, 1.0, seed)]) for seed, prompt in enumerate(prompts)]
    first = together(services, seeded)
    assert first == [text for one in again for text in together(services, [one])]

    def alike() -> list[Request]:
        return [Request([Continuation(prompt, 6, 1.0, 7)]) for prompt in prompts]

    assert together(services, alike()) == [text for one in alike() for text in together(services, [one])]


def test_a_memory_that_fails_ends_the_requests_it_was_asked_for(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    services.edits.apply([REMEMBERED[0]], "in_context")

    def broken(*_: object, **__: object) -> None:
        raise MemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(services.workspace.lm.local, "generate", broken)
        lost = Request([Continuation(services.workspace.lm.prompt(REMEMBERED[0].text, chat=False), 6)])
        kept = Request([Continuation(services.workspace.lm.prompt(PROMPTS[1], chat=False), 6)])
        with services.workspace.turn():
            services.answers.submit(lost)
            services.answers.submit(kept)
        assert kept.answer.result(WAIT)
        with pytest.raises(MemoryError):
            lost.answer.result(WAIT)


def test_a_failure_ends_its_request_alone(services: Services) -> None:
    lm = services.workspace.lm
    good, bad = request(services, PROMPTS[0], 3), request(services, PROMPTS[1], 3)
    bad.pairs = [(lm.prompt("x"), None)]  # type: ignore[list-item]
    with services.workspace.turn():
        services.answers.submit(bad)
        services.answers.submit(good)
    assert good.answer.result(WAIT)
    with pytest.raises(Exception):  # noqa: B017
        bad.answer.result(WAIT)


def test_a_failure_of_the_model_reaches_all_and_the_next_is_answered(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise MemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "step", broken)
        for one in (first := [request(services, text, 5) for text in PROMPTS[:3]]):
            services.answers.submit(one)
        for one in first:
            with pytest.raises(MemoryError):
                one.answer.result(WAIT)
    later = request(services, PROMPTS[0], 5)
    services.answers.submit(later)
    assert later.answer.result(WAIT)


def test_more_questions_than_the_batch_has_room_for_are_answered_by_and_by(
    services: Services, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "ROWS", 3)
    lm = services.workspace.lm
    many = Request(
        [Continuation(lm.prompt(f"{text} {n}", chat=False), 3) for text in PROMPTS for n in range(4)]
    )
    alone = [lm.generate([q.prompt], 3)[0].text for q in many.questions]  # before others use the model
    services.answers.submit(many)
    said = many.answer.result(WAIT).generations
    assert max(steps.rows) <= 3
    assert [s.text for s in said] == alone


def test_facts_are_checked_with_others_as_alone(services: Services) -> None:
    alone = services.facts.check(FACTS)

    async def checked() -> list[Any]:
        return list(await asyncio.gather(*(services.facts.check_with_others(FACTS) for _ in range(5))))

    for result in asyncio.run(checked()):
        for one, other in zip(result.facts, alone.facts, strict=True):
            assert one.verdict == other.verdict
            assert one.answer == other.answer
            assert one.expected.logprob == pytest.approx(other.expected.logprob, abs=1e-4)
            assert one.expected.rank == other.expected.rank


def test_a_wrong_question_is_refused_before_it_waits(services: Services) -> None:
    async def ask() -> None:
        await services.facts.ask_with_others("word " * 600, 100)

    with services.workspace.turn(), pytest.raises(InvalidEdit, match="tokens"):
        asyncio.run(ask())


def test_a_stopping_server_gives_up_what_waits(services: Services) -> None:
    with services.workspace.turn():
        services.answers.submit(waiting := request(services, PROMPTS[0]))
        services.answers.close()
    with pytest.raises(ServiceError, match="stopping"):
        waiting.answer.result(WAIT)
    with pytest.raises(ServiceError, match="stopping"):
        services.answers.submit(request(services, PROMPTS[0]))


def test_every_token_is_told_as_it_comes(services: Services) -> None:
    seen: list[list[int]] = []
    one = request(services, PROMPTS[0], 7, on_token=lambda _, ids, _told: seen.append(list(ids)))
    services.answers.submit(one)
    said = one.answer.result(WAIT).generations[0]
    assert [len(ids) for ids in seen] == list(range(1, len(seen) + 1))
    assert services.workspace.lm.tokenizer.decode(seen[-1], skip_special_tokens=True) == said.text


@pytest.mark.parametrize(
    ("work", "leave_at"),
    [("audit", 3), ("ask", 3), ("check", 3)]
    + [(work, at) for work in ("preview", "preview by lora", "apply") for at in (1, 3, 12)],
)
def test_whatever_asks_the_model_stops_within_a_token(
    services: Services, work: str, leave_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    services.edits.apply([Edit(subject="France", prompt="The capital of {} is", target="Rome")], "rome")
    calls: dict[str, Callable[[RequestContext], object]] = {
        "audit": lambda ctx: services.edits.audit(ctx=ctx),
        "ask": lambda ctx: services.facts.ask("Oslo", 400, ctx=ctx),
        "check": lambda ctx: services.facts.check(FACTS, ctx=ctx),
        "preview": lambda ctx: services.edits.preview(NEW, "rome", ctx=ctx),
        "preview by lora": lambda ctx: services.edits.preview(NEW, "lora", ctx=ctx),
        "apply": lambda ctx: services.edits.apply(NEW, "rome", ctx=ctx),
    }
    passes = 0
    ctx = RequestContext()
    forward = type(services.workspace.lm.model).forward

    def counted(model: Any, *args: Any, **given: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes == leave_at:
            ctx.cancelled.set()
        return forward(model, *args, **given)

    monkeypatch.setattr(type(services.workspace.lm.model), "forward", counted)
    before = services.workspace.host.rehash()
    with pytest.raises(Cancelled):
        calls[work](ctx)
    assert passes <= leave_at + 2  # fixed texts are measured in two passes without a look
    assert services.workspace.host.rehash() == before

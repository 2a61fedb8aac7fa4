"""Questions do not wait for the end of an edit: they are answered in its middle, by the model that the ledger knows."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from editors import METHODS
from editors.edit import Edit
from editors.errors import Cancelled
from editors.model.activations import record
from editors.model.decoding import Decoder
from editors.steering.stack import unsteered
from server.answering.request import Answers, Continuation, Request
from server.facts.queries import Forget
from server.request_context import RequestContext
from server.services import Services
from server.steering.requests import DoseRequest
from server.transaction import pace
from server.transaction.model_queue import ModelQueue
from server.transaction.pace import Pace
from server.transaction.transaction import Transaction
from server.transaction.workspace import Workspace
from tests.server.opened import FACTS, QUICK, apply, open_services, with_two_vectors

QUESTION = "The capital of France is"
JAPAN = Edit(subject="Japan", prompt="The king of {} was", target="Oslo", paraphrases=("Japan had the king",))
CUBA = Edit(subject="Cuba", prompt="The capital of {} is", target="Rome")
FEW = {"max_steps": 3, "steps": 3, "contexts": 1}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of a model with an edit of the weights, a memory and a dose of steering. To be copied."""
    home = tmp_path_factory.mktemp("prepared") / "home"
    services = with_two_vectors(home, "llama")
    apply(services, FACTS[0])
    services.edits.apply([FACTS[2]], method="in_context")
    services.steering.set_dose(DoseRequest("mood", 0.3))
    services.edits.revert(apply(services, FACTS[1]))
    services.close()
    return home


def opened(home: Path, copy: Path) -> Services:
    return open_services(Path(shutil.copytree(home, copy)))


@pytest.fixture
def services(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Services]:
    """On a copy of `home`."""
    monkeypatch.setattr(pace, "LEAST", 0.0)
    services = opened(home, tmp_path / "home")
    yield services
    services.close()


class Questions:
    """Other clients, that ask the live and the original model whenever a turn may be given away."""

    def __init__(self, services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
        self.services, self.waiting = services, list[Request]()
        self.said: list[Answers] = []
        self.wrong: list[str] = []
        self.given = self.in_text = 0
        give_way = Workspace.give_way

        def asked(workspace: Workspace, in_text: bool = False) -> None:
            if in_text and self.given > 3:
                return  # they are many, and each costs two answers
            self.ask()
            before = len(self.said) + sum(r.answer.done() for r in self.waiting)
            give_way(workspace, in_text)
            done = sum(r.answer.done() for r in self.waiting)
            given = len(self.said) + done > before
            self.given += given
            self.in_text += given and in_text

        self.expected = [self.one(base) for base in (False, True)]
        monkeypatch.setattr(Workspace, "give_way", asked)
        monkeypatch.setattr(Pace, "is_due", True)

    def ask(self) -> None:
        """Let a question of each kind wait for the model."""
        self.look()
        if not self.waiting:
            self.waiting = [self.request(base) for base in (False, True)]
            for request in self.waiting:
                self.services.answers.submit(request)
            while not self.services.workspace.queue.answering_waits:
                time.sleep(0.0005)

    def look(self) -> None:
        """What was answered is what was answered before the work began."""
        for request, expected in zip(self.waiting, self.expected, strict=False):
            if request.answer.done():
                said = request.answer.result()
                self.said.append(said)
                if (said.state, told(said)) != (expected.state, told(expected)):
                    self.wrong.append(
                        f"{told(said)} of {said.state}, not {told(expected)} of {expected.state}"
                    )
        if all(request.answer.done() for request in self.waiting):
            self.waiting = []

    def request(self, base: bool) -> Request:
        lm = self.services.workspace.lm
        prompts = [QUESTION, FACTS[2].text, JAPAN.text]
        return Request(
            [Continuation(lm.prompt(p), 4) for p in prompts], [(lm.prompt(QUESTION), "Rome")], base=base
        )

    def one(self, base: bool) -> Answers:
        return self.services.answers.run(self.request(base))

    def end(self) -> None:
        """After the work others may see what it made; nothing is outstanding."""
        for request in self.waiting:
            request.answer.result(30)
        self.waiting = []
        with self.services.workspace.turn():  # the last answers are told before their turn is over
            return


def told(answers: Answers) -> Any:
    return [(g.text, g.tokens) for g in answers.generations], [s.logprob for s in answers.scores]


def by(method: str) -> Callable[[Services], str]:
    def edit(services: Services) -> str:
        params = (
            {k: v for k, v in FEW.items() if k in METHODS[method].params.model_fields}
            if method != "auto"
            else None
        )
        services.edits.apply([JAPAN, CUBA], method=method, params=params)
        return services.workspace.state_hash

    return edit


def preview(services: Services) -> str:
    found = services.edits.preview([CUBA], method="rome", params=dict(QUICK), explain=True)
    services.edits.apply(preview_id=found.preview_id)
    return services.workspace.state_hash


def revert(services: Services) -> str:
    services.edits.revert(["e1"])
    return services.workspace.state_hash


def reapply(services: Services) -> str:
    services.edits.reapply(["e4"])
    return services.workspace.state_hash


def audit(services: Services) -> str:
    return str(services.edits.audit(full=True).model_dump(exclude={"seconds"}))


def forget(services: Services) -> str:
    return str(services.edits.forget([Forget(subject="France", prompt="The capital of {} is")]).status)


WORK: dict[str, Callable[[Services], str]] = {
    **{name: by(name) for name in (*METHODS, "auto") if name == "auto" or METHODS[name].training is None},
    **{f.__name__: f for f in (preview, revert, reapply, audit, forget)},
}
LIKE_OTHERS = (
    "r_rome",
    "t_patcher",
    "memit",
    "emmet",
    "pmet",
    "alphaedit",
    "ultraedit",
    "adalora",
    "ia3",
    "in_context",
)


@pytest.mark.parametrize(
    "work", [pytest.param(w, marks=pytest.mark.slow) if w in LIKE_OTHERS else w for w in WORK]
)
def test_in_the_middle_of_any_work_questions_are_answered_by_the_recorded_state_and_change_nothing(
    work: str,
    services: Services,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    undisturbed = opened(home, tmp_path / "other")
    wanted = WORK[work](undisturbed)
    undisturbed.close()
    questions = Questions(services, monkeypatch)
    assert WORK[work](services) == wanted
    questions.end()
    assert questions.wrong == []
    assert questions.given > 0, "nobody was let through"
    host = services.workspace.host
    assert host.weights_hash == host.rehash()
    assert host.borrowed() == []
    assert not [r for r in caplog.records if r.name == "errata.model"]


def test_a_question_is_answered_long_before_the_edit_beside_it_ends(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "LEAST", 0.05)
    before, began = services.workspace.state_hash, threading.Event()
    ctx = RequestContext(progress=lambda *_: began.set())
    many = {"max_steps": 500, "stop_probability": 0.9999, "contexts": 1, "lr": 1e-6}
    edit = threading.Thread(
        target=lambda: raises(Cancelled, services.edits.apply, [CUBA], "rome", many, ctx=ctx)
    )
    edit.start()
    assert began.wait(30)
    for _ in range(3):
        request = Request([Continuation(services.workspace.lm.prompt(QUESTION), 4)])
        services.answers.submit(request)
        assert request.answer.result(30).state == before
        assert edit.is_alive()
    ctx.cancelled.set()
    edit.join(30)
    assert services.workspace.state_hash == before


def test_however_many_ask_for_long_answers_an_edit_waits_for_a_slice_at_a_time(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    services.steering.set_dose(DoseRequest("mood", 0.0))
    services.edits.revert([r.id for r in services.workspace.active_edits])
    monkeypatch.setattr(pace, "SLICE", 0.0)
    monkeypatch.setattr(Pace, "is_due", True)
    steps, lends = [0], list[int]()
    step, lend = Decoder.step, ModelQueue.lend

    def counted(decoder: Decoder) -> None:
        steps[0] += 1
        step(decoder)

    def noted(queue: ModelQueue) -> bool:
        before = steps[0]
        given = lend(queue)
        if given:
            lends.append(steps[0] - before)
        return given

    monkeypatch.setattr(Decoder, "step", counted)
    monkeypatch.setattr(ModelQueue, "lend", noted)
    lm = services.workspace.lm
    many = [Request([Continuation(lm.prompt(f"{QUESTION} {n}"), 150)]) for n in range(40)]
    with services.workspace.turn():
        for request in many:
            services.answers.submit(request)
        while not services.workspace.queue.answering_waits:
            time.sleep(0.0005)
    services.edits.apply([CUBA], "rome", dict(QUICK))
    assert len(lends) >= 3
    assert max(lends) <= 1
    assert not any(request.answer.done() for request in many)
    for request in many:
        request.ctx.cancelled.set()


def raises(kind: type[Exception], work: Callable[..., Any], *given: Any, **more: Any) -> None:
    with pytest.raises(kind):
        work(*given, **more)


def test_nobody_but_answering_comes_in_between(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    """An edit that was planned for one state is made in that state."""
    questions, order = Questions(services, monkeypatch), list[str]()

    def revert() -> None:
        services.edits.revert(["e1"])
        order.append("reverted")

    other = threading.Thread(target=revert)
    with services.workspace.turn():
        other.start()
        while not services.workspace.queue.waiting:
            time.sleep(0.001)
        for _ in range(3):
            services.workspace.give_way()
        assert questions.given >= 3
        order.append("worked")
    other.join(30)
    questions.end()
    assert order == ["worked", "reverted"]


def test_a_failure_after_others_were_let_through_leaves_all_as_it_was(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions, host = Questions(services, monkeypatch), services.workspace.host
    before = host.rehash()

    def fail() -> None:
        with services.workspace.turn(), Transaction(services.workspace) as tx:
            tx.stage(())
            services.workspace.give_way()
            raise RuntimeError("out of memory")

    raises(RuntimeError, fail)
    assert questions.given > 0
    questions.end()
    assert questions.wrong == []
    assert host.rehash() == before == host.weights_hash


def test_questions_come_between_two_tokens_of_texts_that_are_not_changed_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = open_services(tmp_path / "home")
    prompts = [services.workspace.lm.prompt(text) for text in (QUESTION, JAPAN.text)]

    def write() -> list[str]:
        with services.workspace.turn(), Transaction(services.workspace) as tx:
            tx.retry(services.workspace.host.stack[:1])
            return [text.text for text in services.workspace.lm.generate(prompts, 12)]

    apply(services, FACTS[0])
    wanted = write()
    apply(services, FACTS[1])
    questions = Questions(services, monkeypatch)
    assert write() == wanted
    questions.end()
    assert questions.in_text > 0
    assert questions.wrong == []
    services.close()


@pytest.mark.parametrize("way", ["dose", "grace"])
def test_between_two_tokens_nobody_comes_where_hooks_may_remember_the_beginning(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = with_two_vectors(tmp_path / "home", "llama")
    if way == "dose":
        services.steering.set_dose(DoseRequest("mood", 0.3))
    else:
        services.edits.apply([CUBA], method="grace", params={"max_steps": 2})
    questions, lm = Questions(services, monkeypatch), services.workspace.lm
    with services.workspace.turn():
        lm.generate([lm.prompt(QUESTION)], 8)
    assert questions.given > 0
    assert questions.in_text == 0
    questions.end()
    services.close()


def test_the_model_is_kept_while_it_has_hooks_or_other_weights(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions, lm = Questions(services, monkeypatch), services.workspace.lm
    name = lm.mlp_out(1)
    with services.workspace.turn():
        for borrowing in (record({"last": lm.layers[-1]}), lm.swapped({name: lm.weight(name) * 2})):
            with borrowing:
                services.workspace.give_way()
                assert not questions.given
        with unsteered(lm), lm.unrouted(), services.workspace.host.pristine():
            services.workspace.give_way()
            assert questions.given
    questions.end()
    assert questions.wrong == []


def test_a_server_that_is_closed_meanwhile_lets_the_edit_end_first(services: Services) -> None:
    """Closing waits for the lock of the model, which is free while a turn is lent."""
    workspace, order = services.workspace, list[str]()
    closing = threading.Thread(target=lambda: (services.close(), order.append("closed")))

    def answer() -> None:
        with workspace.queue.turn(lambda: None, alternates=True):
            closing.start()
            time.sleep(0.1)
        order.append("answered")

    answering = threading.Thread(target=answer)
    with workspace.turn():
        answering.start()
        while not workspace.queue.answering_waits:
            time.sleep(0.001)
        with workspace.lock.released():
            assert workspace.queue.lend()
        services.workspace.ledger.position()  # still open
        order.append("edited")
    closing.join(30)
    answering.join(30)
    assert order.index("edited") < order.index("closed")

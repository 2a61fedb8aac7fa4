"""Nobody sees a borrowed model: others get their turn only when all that a job borrows is given back."""

from __future__ import annotations

import hashlib
import logging
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from editors.edit import Edit
from editors.errors import Cancelled
from editors.model import precision
from editors.model.activations import hooked, record
from editors.model.lm import LM
from editors.model.precision import lowered
from editors.moments import texts
from editors.steering.stack import unsteered
from server.jobs.job import Job
from server.services import Services
from server.transaction.host import ActivePatch
from server.transaction.model_lock import Turn
from server.transaction.transaction import Transaction
from tests.editors import test_steering
from tests.editors.trained import tiny_encoder
from tests.server.opened import open_services

QUESTION = "The capital of France is"
OSLO = Edit(subject="Oslo", prompt="{} lies in", target="Spain")
MEND = {"rank": 2, "steps": 1, "records": 8, "validation": 4, "evaluate_every": 1, "group": 2}
SERAC = {
    "steps": 1,
    "records": 8,
    "validation": 4,
    "evaluate_every": 1,
    "group": 2,
    "rank": 2,
    "judge_epochs": 1,
}


@pytest.fixture(params=[True, False], ids=["lowered search", "float32 search"])
def services(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Services]:
    """On a processor with and without arithmetic in bfloat16, whatever this one has."""
    monkeypatch.setattr(precision, "bfloat16_is_fast", lambda: request.param)
    monkeypatch.setattr(texts, "SEQUENCE", 12)
    services = open_services(tmp_path / "home")
    yield services
    services.close()


def statistics(services: Services, corpus: str | None = None) -> None:
    services.jobs.compute_statistics([0, 2], 60, corpus)


def statistics_of_a_corpus(services: Services) -> None:
    corpus = services.workspace.settings.home / "data" / "corpus.txt"
    corpus.parent.mkdir(exist_ok=True)
    corpus.write_text("The capital of France is Paris, and people there speak French. " * 60)
    statistics(services, str(corpus))


def mend(services: Services) -> None:
    services.jobs.train_editor("mend", "facts", MEND)


def serac(services: Services) -> None:
    encoder = services.workspace.settings.home / "data" / "encoder"
    shutil.copytree(tiny_encoder(), encoder, dirs_exist_ok=True)
    services.jobs.train_editor("serac", "facts", SERAC | {"encoder": "encoder"})


class Client:
    """Another client, that asks, edits and reverts whenever the job says how far it is."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._pristine, self._edited = self._ask(), ""
        self._base = services.workspace.host.weights_hash
        self.turns = 0
        self.wrong: list[str] = []

    def act(self) -> None:
        """Ask, edit or revert, audit; in a thread of its own, which must get the model."""
        thread = threading.Thread(target=self._act)
        thread.start()
        thread.join(30)
        if thread.is_alive():
            self.wrong.append("the client did not get the model")
        self.turns += 1

    def _act(self) -> None:
        try:
            edits = self._services.edits
            active = [e.id for e in self._services.workspace.active_edits]
            self._see("before", self._edited if active else self._pristine)
            if active:
                edits.revert(active)
            else:
                edits.apply([OSLO], method="ft", params={"max_steps": 1})
                self._edited = self._edited or self._ask()
            self._see("after", self._pristine if active else self._edited)
            if self._services.workspace.host.weights_hash != self._services.workspace.host.rehash():
                self.wrong.append("the live weights are not those that were recorded")
            if active and self._services.workspace.host.rehash() != self._base:
                self.wrong.append("a revert did not give the pristine weights")
        except Exception as error:
            self.wrong.append(f"{type(error).__name__}: {error}")

    def _ask(self) -> str:
        answer = self._services.facts.ask(QUESTION, 4)
        weights = self._services.workspace.host.rehash()
        return f"{answer.completion} {weights} {random_state()}"

    def _see(self, when: str, expected: str) -> None:
        seen = self._ask()
        if seen != expected:
            self.wrong.append(f"{when}: {seen}, not {expected}")


def random_state() -> str:
    return hashlib.sha256(bytes(torch.get_rng_state().tolist())).hexdigest()[:8]


@pytest.mark.parametrize("start", [statistics, statistics_of_a_corpus, mend, serac])
def test_at_every_report_of_a_job_a_client_finds_the_model_whole(
    start: Callable[[Services], None],
    services: Services,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tiny_encoder()  # making it draws random numbers
    client, reports, kept = Client(services), 0, list[str]()
    report, give_way, waiting = Job.report, Turn.give_way, Job.turn

    def told(job: Job, fraction: float, message: str) -> None:
        nonlocal reports
        reports += 1
        report(job, fraction, message)

    def given(turn: Turn) -> bool:
        done = give_way(turn)
        if not done:
            kept.append(str(services.workspace.host.borrowed()))
        return done

    @contextmanager
    def turn(job: Job) -> Iterator[LM]:
        client.act()  # the job is about to wait for the model: so others have it
        with waiting(job) as lm:
            yield lm

    monkeypatch.setattr(Job, "report", told)
    monkeypatch.setattr(Turn, "give_way", given)
    monkeypatch.setattr(Job, "turn", turn)
    start(services)
    assert services.jobs.runner.wait(120)
    job = services.jobs.get("j1")
    assert job.state == "done", job.message
    assert client.wrong == []
    assert kept == [], "a job must be able to give way at each of its reports"
    assert client.turns > 1
    assert reports > 1
    assert not [r for r in caplog.records if r.name == "errata.model"]


def test_a_job_that_is_cancelled_at_any_report_leaves_the_model_whole(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, report = services.workspace.host.rehash(), Job.report
    left = 0

    def cancelled(job: Job, fraction: float, message: str) -> None:
        nonlocal left
        left -= 1
        report(job, fraction, message)
        if left == 0:
            raise Cancelled("cancelled")

    monkeypatch.setattr(Job, "report", cancelled)
    for left in (1, 2, 9, 13):  # noqa: B007 - read by `cancelled`
        statistics(services)
        assert services.jobs.runner.wait(60)
        assert services.jobs.list().jobs[0].state == "cancelled"
        assert services.workspace.host.borrowed() == []
        assert services.workspace.host.rehash() == base


# --- the mechanism -----------------------------------------------------------------------------


def lower(services: Services) -> Any:
    return lowered(services.workspace.lm, torch.bfloat16)


def patch_of_weights(services: Services) -> Any:
    lm = services.workspace.lm
    name = lm.mlp_out(1)
    return lm.swapped({name: lm.weight(name) * 2})


def hooks(services: Services) -> Any:
    return record({"last": services.workspace.lm.layers[-1]})


def hooks_before(services: Services) -> Any:
    layer = services.workspace.lm.layers[0]
    return hooked([layer.register_forward_pre_hook(lambda *_: None)])


@contextmanager
def another_module(services: Services) -> Iterator[None]:
    layer: Any = services.workspace.lm.layers[1]
    own, layer.mlp = layer.mlp, nn.Identity()
    try:
        yield
    finally:
        layer.mlp = own


def no_memories(services: Services) -> Any:
    return services.workspace.lm.unrouted()


def no_steering(services: Services) -> Any:
    return unsteered(services.workspace.lm)


def open_transaction(services: Services) -> Any:
    return Transaction(services.workspace)


WAYS: Mapping[str, Callable[[Services], Any]] = {
    f.__name__: f
    for f in (
        lower,
        patch_of_weights,
        hooks,
        hooks_before,
        another_module,
        no_memories,
        no_steering,
        open_transaction,
    )
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pristine", [True, False])
def test_a_turn_is_not_given_away_while_something_is_borrowed(
    way: str, pristine: bool, tmp_path: Path
) -> None:
    services = open_services(tmp_path / "home")
    in_context(services)
    host = services.workspace.host
    taken = 0

    @contextmanager
    def lend() -> Iterator[LM]:
        nonlocal taken
        taken += 1
        with host.lock, ExitStack() as stack:
            if pristine and way != "no_memories":
                stack.enter_context(host.pristine())
            yield services.workspace.lm

    turn = Turn(lend, host.borrowed)
    with turn.taken():
        assert turn.give_way()
        with WAYS[way](services):
            assert not turn.give_way()
        assert turn.give_way()
    assert taken == 3
    services.close()


@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("no_steering", "open_transaction")])
def test_the_lock_hands_on_a_whole_model_even_after_a_borrower_that_forgot_to_give_back(
    way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    services = open_services(tmp_path / "home")
    in_context(services)
    host = services.workspace.host
    before, answer = host.rehash(), services.facts.ask(QUESTION, 4).completion
    with caplog.at_level(logging.ERROR, "errata.model"):
        with host.lock:
            forgotten = WAYS[way](services)
            forgotten.__enter__()
        assert "was not given back" in caplog.text
    assert host.borrowed() == []
    assert host.rehash() == before
    assert services.facts.ask(QUESTION, 4).completion == answer
    services.close()


def test_steering_can_be_switched_off_after_a_dose_that_somebody_forgot_beside_it(tmp_path: Path) -> None:
    services = open_services(tmp_path / "home")
    lm = services.workspace.lm
    before = test_steering.logits(lm)
    dose = test_steering.dose_of("mood", test_steering.vector_of(lm), 0.5)
    stack = services.workspace.host.stack
    with services.workspace.host.lock:
        services.workspace.host.set_stack([*stack, ActivePatch(1, 0, "steering", dose, (0,), "b")])
    steered = test_steering.logits(lm)
    with services.workspace.host.lock:
        dose.attach(lm)
        assert not test_steering.same(test_steering.logits(lm), steered)
    assert test_steering.same(test_steering.logits(lm), steered)
    with services.workspace.host.lock:
        services.workspace.host.set_stack(list(stack))
    assert test_steering.same(test_steering.logits(lm), before)
    services.close()


def in_context(services: Services) -> None:
    """A memory beside the weights, so that switching memories off is a difference."""
    services.edits.apply([OSLO], method="in_context")

"""Edits pushed to engines and proven there: an engine that does not hold an edit is never reported as holding it."""

from __future__ import annotations

import json
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from editors.edit import Edit
from editors.steering.pairs import Pair
from server.engines import preparing, pushing
from server.engines.engine import EngineError
from server.engines.files import Hub
from server.engines.holdings import newest
from server.engines.job import engine_named
from server.engines.probes import (
    EngineQuestion,
    ProofProbe,
    Reference,
    canaries,
    from_json,
    references,
    to_json,
)
from server.engines.proof import EngineReading, prove
from server.engines.pushing import push
from server.engines.settings import EngineSettings, read_engines
from server.errors import ServiceError
from server.facts import measuring
from server.jobs.job import Job
from server.services import Services
from server.steering.requests import DoseRequest, VectorRequest
from store import Who
from tests.families import fresh
from tests.server.engine_fakes import FakeEngine, FakeHub, FakeSgLang, FakeVllm
from tests.server.opened import STRONG, open_services

FRANCE = Edit(
    subject="France",
    prompt="The capital of {} is",
    target="Rome",
    paraphrases=("France has the capital",),
    neighbours=({"prompt": "The capital of Japan is"},),  # type: ignore[arg-type]
)
SPAIN = Edit(subject="Spain", prompt="The language of {} is", target="French")
WAIT = 300


class Place:
    """Services with engines named in a file, and the fakes behind them."""

    def __init__(self, home: Path) -> None:
        self.home, self.tables = home, ""
        self.fakes: list[FakeEngine] = []
        self.services: Services

    def engine(self, name: str, kind: str, fake: FakeEngine | None = None, **more: Any) -> Path:
        """Name an engine; its shared folder."""
        folder = self.home.parent / f"shared-{name}"
        folder.mkdir(exist_ok=True)
        given: dict[str, Any] = {
            "name": name,
            "kind": kind,
            "folder": str(folder),
            "precision": "float32",
            **more,
        }
        if fake is not None:
            self.fakes.append(fake)
            given["url"] = fake.url
        lines = [f"{key} = {json.dumps(value)}" for key, value in given.items()]
        self.tables += "\n".join(["[[engine]]", *lines, ""]) + "\n"
        return folder

    def open(self) -> Services:
        file = self.home.parent / "engines.toml"
        file.write_text(self.tables, "utf-8")
        self.services = open_services(self.home, engines=file)
        return self.services

    def push(self, name: str, **more: Any) -> dict[str, Any]:
        """Push and wait; the job."""
        started = self.services.jobs.push_edits(name, **more)
        return self.ended(started.job_id)

    def ended(self, job_id: str) -> dict[str, Any]:
        end = time.monotonic() + WAIT
        while (job := self.services.jobs.get(job_id)).state in ("queued", "running"):
            assert time.monotonic() < end
            time.sleep(0.02)
        return job.model_dump()

    def row(self, name: str) -> Any:
        return next(row for row in self.services.engines.list().engines if row.name == name)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path / "home")
    yield place
    if hasattr(place, "services"):
        place.services.close()
    for fake in place.fakes:
        fake.close()


def apply(services: Services, *edits: Edit) -> list[str]:
    return services.edits.apply(list(edits), method="rome", params=STRONG).edit_ids


def vllm_lora(place: Place, **more: Any) -> FakeVllm:
    fake = FakeVllm()
    place.engine("prod", "vllm_lora", fake, model="tiny", **more)
    return fake


def base_folder(place: Place) -> str:
    folder = place.home.parent / "base"
    fake = FakeVllm()
    place.fakes.append(fake)
    fake.lm.model.save_pretrained(folder)
    (folder / "base").touch()
    return str(folder)


def vllm_weights(place: Place, **more: Any) -> FakeVllm:
    fake = FakeVllm()
    place.engine("prod", "vllm_weights", fake, model="tiny", base=base_folder(place), **more)
    return fake


def sglang_lora(place: Place, **more: Any) -> FakeSgLang:
    fake = FakeSgLang()
    place.engine("prod", "sglang_lora", fake, **more)
    return fake


def sglang_weights(place: Place, **more: Any) -> FakeSgLang:
    fake = FakeSgLang()
    place.engine("prod", "sglang_weights", fake, base=base_folder(place), **more)
    return fake


Named = Callable[..., FakeEngine]
EVERY: list[Named] = [vllm_lora, vllm_weights, sglang_lora, sglang_weights]


@pytest.mark.parametrize("named", EVERY)
def test_a_push_lands_and_is_proven_and_follows_a_revert(place: Place, named: Named) -> None:
    named(place)
    services = place.open()
    first, second = apply(services, FRANCE), apply(services, SPAIN)
    job = place.push("prod")
    assert job["state"] == "done", job["message"]
    proof = job["result"]["proof"]
    assert proof["held"] == [*first, *second]
    assert (proof["missing"], proof["indistinct"]) == ([], [])
    assert proof["worst"] < 1e-4
    assert proof["same_answers"] == 1
    assert job["result"]["before"]["proven"] is False
    row = place.row("prod")
    assert (row.current, row.edit_ids, row.problem) == (True, [*first, *second], "")

    services.edits.revert(first)
    assert place.row("prod").current is False
    job = place.push("prod")
    assert job["state"] == "done", job["message"]
    assert job["result"]["proof"]["held"] == second
    assert job["result"]["proof"]["gone"] is True
    services.edits.revert(second)
    job = place.push("prod")
    assert job["state"] == "done", job["message"]
    assert place.row("prod").edit_ids == []
    assert services.workspace.ledger.verify() == []


def test_a_push_asks_the_model_here_nothing_that_it_said_in_the_same_state_before(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm_lora(place)
    services = place.open()
    asked: Counter[str] = Counter()
    for name in ("references", "first_tokens"):
        real = getattr(preparing, name)

        def noted(lm: Any, rows: Any, name: str = name, real: Any = real) -> Any:
            asked[name] += len(rows)
            return real(lm, rows)

        noted.__name__ = name
        monkeypatch.setattr(preparing, name, noted)
    apply(services, FRANCE)
    first = place.push("prod")["result"]
    probes = first["proof"]["probes"]
    texts = len(canaries(services.workspace.lm))  # of these the first token alone is read
    assert asked == {"references": probes - texts, "first_tokens": texts + probes}
    asked.clear()
    again = place.push("prod")["result"]
    assert asked == {}
    assert again["before"]["held"] == again["proof"]["held"] == first["proof"]["held"] == ["e1"]
    apply(services, SPAIN)
    monkeypatch.setattr(measuring, "collect", None)  # how an edit is judged was found when it was made
    third = place.push("prod")["result"]
    # Of what the engine was proven to hold the own prompt is asked. The corrected model is another now, and is asked
    # all; the pristine one what is new.
    own = again["proof"]["probes"]
    assert own < probes
    probes = third["proof"]["probes"]
    assert asked == {"references": probes - texts, "first_tokens": texts + probes - own}


def test_a_push_tells_what_it_does_and_a_good_one_shows_no_prompt_that_differed_before(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm_lora(place)
    services = place.open()
    apply(services, FRANCE)
    apply(services, SPAIN)
    told: list[tuple[float, str]] = []
    monkeypatch.setattr(Job, "report", lambda self, share, message: told.append((share, message)))
    job = place.push("prod")
    assert job["state"] == "done", job["message"]
    shares = [share for share, _ in told]
    assert shares == sorted(shares)
    assert shares[0] == 0
    words = " ".join(message for _, message in told)
    for what in ("choosing the prompts", "the corrected model here: 0 of", "writing the edits", "the engine"):
        assert what in words
    before = job["result"]["before"]
    assert before["missing"] == ["e1", "e2"]
    assert before["far"] == []


def test_neighbours_are_asked_of_an_engine_though_the_caller_named_none(place: Place) -> None:
    vllm_lora(place)
    services = place.open()
    apply(services, SPAIN)
    assert place.push("prod")["state"] == "done"
    held = newest(services.workspace.ledger, "prod")
    assert held is not None
    kinds = [probe.kind for probe in held.probes(services.workspace)]
    assert {"edit", "neighbour", "canary"} <= set(kinds)


LORA_SABOTAGE = "ignored stale status_500 500_then_dead dead cached forgets restarted"
"""The whole way, also back; all that can go wrong: test_engine_sabotage.py."""


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """An engine that was proven to hold e1, while e2 is active too."""
    place = Place(tmp_path_factory.mktemp("behind") / "home")
    vllm_lora(place)
    services = place.open()
    apply(services, FRANCE)
    assert place.push("prod")["state"] == "done"
    apply(services, SPAIN)
    yield place
    services.close()
    place.fakes[0].close()


@pytest.mark.parametrize("sabotage", LORA_SABOTAGE.split())
def test_an_engine_that_does_not_hold_the_edits_is_never_said_to(behind: Place, sabotage: str) -> None:
    place, fake, services = behind, behind.fakes[0], behind.services
    former = fake.deltas["errata"]
    held = newest(services.workspace.ledger, "prod")
    assert held is not None
    fake.sabotage = sabotage
    try:
        job = place.push("prod")
        row = place.row("prod")
    finally:
        fake.sabotage = ""
    result = job["result"]
    assert job["state"] == "failed"
    assert result["problem"]
    assert result["proof"]["proven"] is False
    assert "e2" not in row.edit_ids
    assert row.current is False
    assert row.problem
    if row.edit_ids:  # the former edits are said to be there only if it was seen
        assert result["restored"] is True
        assert row.holds == held.weights_hash
    audit = services.engines.audit("prod")
    assert audit.engine is not None
    if result["restored"]:
        assert audit.engine.held == ["e1"]
    fake.deltas["errata"] = former
    fake.cached.clear()


@pytest.mark.parametrize("sabotage", ["ignored", "half", "status_500"])
def test_weights_that_do_not_land_are_taken_back(place: Place, sabotage: str) -> None:
    fake = vllm_weights(place)
    services = place.open()
    apply(services, FRANCE)
    fake.sabotage = sabotage
    job = place.push("prod")
    assert job["state"] == "failed"
    assert job["result"]["rolled_back"] is True
    assert job["result"]["restored"] is True
    assert job["result"]["before"]["far"] != []  # here it may say what went wrong
    assert fake.broken is False
    assert place.row("prod").holds is None
    order = [call for call in fake.calls if call in ("/pause", "/collective_rpc", "/resume")]
    once = ["/pause", "/collective_rpc", "/resume"]
    # What fails to load leaves weights without values: it is mended before anybody is answered.
    mended = ["/pause", "/collective_rpc", "/collective_rpc", "/resume"]
    assert order == [*(mended if sabotage == "status_500" else once), *once]
    assert fake.dead is False


@pytest.mark.parametrize("named", [vllm_weights, sglang_weights])
def test_weights_are_not_pushed_into_an_engine_that_serves_another_model(place: Place, named: Named) -> None:
    fake = named(place)
    services = place.open()
    apply(services, FRANCE)
    fake.sabotage = "other_model"
    job = place.push("prod")
    assert job["state"] == "failed"
    assert "serves another model" in job["message"]
    assert not {"/pause", "/pause_generation", "/collective_rpc"} & set(fake.calls)
    fake.sabotage = ""
    assert place.push("prod")["state"] == "done"


def test_weights_whose_former_edits_are_damaged_go_back_to_the_base_model(place: Place) -> None:
    fake = vllm_weights(place)
    services = place.open()
    apply(services, FRANCE)
    assert place.push("prod")["state"] == "done"
    held = newest(services.workspace.ledger, "prod")
    assert held is not None
    engine = services.engines.engine("prod")
    (held.artefact(engine).path / "model.safetensors").write_bytes(b"")
    apply(services, SPAIN)
    fake.sabotage = "status_500"  # the reload of what is pushed fails and leaves it broken
    job = place.push("prod")
    assert "not whole" in job["message"]
    assert "serves the base model" in job["message"]
    assert fake.broken is False
    assert place.row("prod").holds is None


@pytest.mark.parametrize("named", [sglang_lora, sglang_weights])
@pytest.mark.parametrize("sabotage", ["unsuccessful", "ignored"])
def test_a_success_that_is_none_is_found_out(place: Place, named: Named, sabotage: str) -> None:
    fake = named(place)
    services = place.open()
    apply(services, FRANCE)
    fake.sabotage = sabotage
    job = place.push("prod")
    assert job["state"] == "failed"
    assert place.row("prod").holds is None
    assert place.row("prod").edit_ids == []


@pytest.mark.parametrize("named", EVERY)
def test_an_audit_finds_an_engine_that_was_restarted_without_its_edits(place: Place, named: Named) -> None:
    fake: Any = named(place)
    services = place.open()
    ids = apply(services, FRANCE)
    place.push("prod")
    audit = services.engines.audit("prod")
    assert audit.engine is not None
    assert audit.engine.proven
    asked = audit.engine.probes
    fake.deltas, fake.weights = {}, {}
    audit = services.engines.audit("prod")
    assert audit.engine is not None
    assert not audit.engine.proven
    assert audit.failing == ids
    assert place.row("prod").holds is None
    # What it was found to hold no more is asked of it in full again.
    assert place.push("prod")["result"]["proof"]["probes"] == asked
    fake.close()
    assert place.row("prod").reachable is False
    assert "audit_edits" in services.engines.list().next
    audit = services.engines.audit("prod")
    assert audit.failing == ids
    kinds = [event["kind"] for event in services.workspace.ledger.all_events()]
    assert kinds.count("engine_audited") == 3


def test_a_push_that_is_told_to_stop_once_it_handed_over_is_on_the_ledger(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm_lora(place)
    services = place.open()
    ids = apply(services, FRANCE)
    put, handed = pushing.put, []

    def put_and_stop(*given: Any) -> str:
        said = put(*given)
        assert services.jobs._pusher is not None
        handed.append(services.jobs._pusher.pause("j1"))
        return said

    monkeypatch.setattr(pushing, "put", put_and_stop)
    place.push("prod")
    assert handed
    assert place.row("prod").edit_ids == ids


def test_a_push_that_fails_here_asks_the_engine_no_further(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm_lora(place)
    services = place.open()
    apply(services, FRANCE)
    asked, let_go = list[EngineQuestion](), threading.Event()

    def ask(_: Any, question: EngineQuestion) -> Any:
        asked.append(question)
        assert let_go.wait(WAIT)
        raise EngineError("too late")

    def full(*_: Any) -> Any:
        raise ServiceError("no space is left")

    monkeypatch.setattr("server.engines.vllm.VllmLora.ask", ask)
    monkeypatch.setattr("server.engines.vllm.VllmLora.together", 1)
    monkeypatch.setattr(preparing, "_written", full)
    job = place.push("prod")
    assert "no space is left" in job["message"]
    asking = [thread for thread in threading.enumerate() if thread.name.startswith("errata-asking")]
    let_go.set()
    for thread in asking:
        thread.join(WAIT)
    assert len(asked) <= 1


def test_an_engine_that_is_not_there_is_left_and_said_to_be_so(place: Place) -> None:
    fake = vllm_lora(place)
    fake.close()
    services = place.open()
    apply(services, FRANCE)
    job = place.push("prod")
    assert job["state"] == "failed"
    assert "cannot be reached" in job["message"]


def test_an_audit_of_an_engine_that_went_away_says_that_and_not_that_edits_were_lost(place: Place) -> None:
    fake = vllm_lora(place)
    services = place.open()
    apply(services, FRANCE)
    assert place.push("prod")["state"] == "done"
    fake.close()
    audit = services.engines.audit("prod")
    assert "cannot be reached" in audit.summary
    assert "starts it" in audit.next


def test_push_always_follows_every_change(place: Place) -> None:
    fake = vllm_lora(place, push="always")
    services = place.open()

    def settled(ids: list[str]) -> None:
        end = time.monotonic() + WAIT
        while not (place.row("prod").current and place.row("prod").edit_ids == ids):
            assert time.monotonic() < end
            time.sleep(0.05)

    settled([])
    ids = apply(services, FRANCE)
    settled(ids)
    assert fake.deltas["errata"]
    services.edits.revert(ids)
    settled([])


def test_memories_are_taught_to_the_weights_or_left_out(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm_lora(place)
    services = place.open()
    memory = services.edits.apply([SPAIN], method="in_context").edit_ids
    before = services.workspace.state_hash
    told: list[tuple[float, str]] = []
    with monkeypatch.context() as patched:
        patched.setattr(Job, "report", lambda self, share, message: told.append((share, message)))
        job = place.push("prod")
    shares = [share for share, _ in told]
    assert shares == sorted(shares)
    teaching = [share for share, message in told if message.startswith("teaching")]
    assert (
        max(teaching) - min(teaching) > 0.3
    )  # what takes longest has most of the bar before the engine is asked
    assert job["state"] == "done", job["message"]
    result = job["result"]
    assert (result["edit_ids"], result["left_out"]) == (memory, [])
    (row,) = result["distilled"]["edits"]
    assert (row["edit_id"], row["method"]) == (memory[0], "in_context")
    assert result["distilled"]["perplexity_ratio"] > 0
    changed = row["subject_locality"] not in (None, 1) or row["locality"] not in (None, 1)
    assert bool(row["moved"]) is changed  # what the weights answer otherwise is named
    assert job["message"] == result["summary"]
    assert job["message"].startswith(
        f"prod is proven to hold 1 edits; {memory[0]} (in_context): a memory is not"
    )
    assert (
        result["proof"]["held"] == memory
    )  # the engine answers as the taught weights do, and not as the base
    assert place.row("prod").current is True
    assert services.workspace.state_hash == before  # here it is a memory as before

    again = place.push("prod")["result"]["distilled"]
    assert again == result["distilled"]  # taught once

    ids = apply(services, FRANCE)
    job = place.push("prod", leave_out=True)
    assert job["state"] == "done", job["message"]
    assert (job["result"]["edit_ids"], job["result"]["left_out"]) == (ids, memory)
    assert job["result"]["distilled"] is None
    assert job["result"]["proof"]["held"] == ids
    assert (place.row("prod").current, place.row("prod").left_out) == (True, memory)
    assert f"without {memory[0]}." in services.engines.audit("prod").summary


def test_steering_is_no_edit_that_an_engine_lacks_and_a_push_says_how_to_go_on_with_it(place: Place) -> None:
    vllm_lora(place)
    services = place.open()
    ids = apply(services, FRANCE)
    assert place.push("prod")["state"] == "done"
    pairs = [Pair(prompt="Rome", positive="good", negative="bad"), Pair(positive="yes", negative="no")]
    services.steering.create(VectorRequest(name="mood", pairs=pairs, layers=[1]))
    services.steering.set_dose(DoseRequest(name="mood", multiplier=0.2))
    row = place.row("prod")
    assert (row.edit_ids, row.current) == (ids, True)
    assert len(row.left_out) == 1
    assert services.engines.list().next == ""
    with pytest.raises(ServiceError, match=r"leave_out=true"):
        services.jobs.push_edits("prod")
    job = place.push("prod", leave_out=True)  # the advice
    assert (job["state"], job["result"]["edit_ids"]) == ("done", ids)
    services.steering.set_dose(DoseRequest(name="mood", multiplier=0))  # the other advice
    assert place.push("prod")["state"] == "done"


def test_an_address_that_was_not_named_at_start_cannot_be_pushed_to(place: Place) -> None:
    services = place.open() if place.tables else open_services(place.home)
    place.services = services
    with pytest.raises(ServiceError, match="--engines"):
        services.jobs.push_edits("http://evil.example")
    assert services.engines.list().engines == []


def test_a_rank_that_is_cut_too_far_is_not_proven(place: Place) -> None:
    vllm_lora(place, max_rank=1)
    services = place.open()
    apply(services, FRANCE)
    assert place.push("prod")["state"] == "done"
    apply(services, SPAIN)
    job = place.push("prod")
    assert job["state"] == "failed"
    assert job["result"]["ranks"] != {}
    assert job["result"]["restored"] is True


def test_a_quantised_bound_that_cannot_tell_the_edit_proves_nothing(place: Place) -> None:
    fake = vllm_lora(place, tolerance=9.0)
    services = place.open()
    apply(services, FRANCE)
    fake.sabotage = "ignored"
    job = place.push("prod")
    assert job["state"] == "failed"
    assert job["result"]["proof"]["held"] == []


# --- files ---------------------------------------------------------------------------------------


def test_a_shared_folder_is_read_back(place: Place) -> None:
    folder = place.engine("disk", "folder")
    services = place.open()
    ids = apply(services, FRANCE)
    job = place.push("disk")
    assert job["state"] == "done", job["message"]
    assert job["result"]["proof"]["held"] == ids
    weights = folder / "errata" / "adapter_model.safetensors"
    data = weights.read_bytes()
    for damaged in (data[:-10], b"", data[:200] + bytes(len(data) - 200)):
        weights.write_bytes(damaged)
        audit = services.engines.audit("disk")
        assert audit.failing == ids
        assert place.row("disk").holds is None
    weights.unlink()
    assert services.engines.audit("disk").failing == ids


@pytest.mark.parametrize("sabotage", ["", "refused", "cut"])
def test_a_hub_repository_is_private_and_read_back(place: Place, sabotage: str, tmp_path: Path) -> None:
    services = place.open() if place.tables else open_services(place.home)
    place.services = services
    ids = apply(services, FRANCE)
    settings = EngineSettings(name="hub", kind="hub", repo="me/facts", model="me/base")
    api = FakeHub(tmp_path / "hub")
    api.sabotage = sabotage
    engine = Hub(settings, engine_named_pristine(services), api)
    result = push(services.workspace, engine, False, Who(), lambda: None, lambda *_: None)
    assert api.private is True
    if sabotage != "refused":
        there = tmp_path / "hub" / "me" / "facts"
        card = (there / "README.md").read_text("utf-8")
        assert card.startswith("---\nbase_model: me/base\n")  # as the hub reads it
        assert f"| {ids[0]} | The capital of France is | Rome |" in card
        assert (
            json.loads((there / "adapter_config.json").read_bytes())["base_model_name_or_path"] == "me/base"
        )
    assert result.proof.held == ([] if sabotage else ids)
    assert bool(result.problem) is bool(sabotage)


def engine_named_pristine(services: Services) -> Any:
    from contextlib import contextmanager

    @contextmanager
    def pristine() -> Iterator[Any]:
        with services.workspace.turn(), services.workspace.host.pristine():
            yield services.workspace.lm

    return pristine


def test_a_text_that_ends_at_once_is_told_as_well_as_others(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = fresh("llama")
    rows = [
        lm.encode(lm.prompt(text, chat=False))[0] for text in ("The capital of France is", "Oslo", "Rome")
    ]
    told = references(lm, rows)
    ends = {max(told[1].top, key=lambda token: told[1].top[token])}  # from now on the second says nothing
    monkeypatch.setattr(type(lm.local), "end_ids", lambda self: ends)
    again = references(lm, rows)
    assert (again[1].answer, again[1].scores) == ((), ())
    for one, other in zip(told, again, strict=True):
        assert list(one.top) == list(other.top)
        assert list(one.top.values()) == pytest.approx(list(other.top.values()), abs=1e-5)


# --- the judge -----------------------------------------------------------------------------------

LIVE = Reference({1: -0.1, 2: -3.0}, (1,), (-0.1,))
BASE = Reference({2: -0.1, 1: -6.0}, (2,), (-0.1,))
PROBE = ProofProbe("edit", "e1", "x", (1, 2), LIVE, BASE, {1: "a", 2: "b"})


@given(st.dictionaries(st.integers(0, 4), st.floats(allow_nan=True, allow_infinity=True), max_size=4))
def test_whatever_an_engine_says_that_is_far_from_the_corrected_model_is_not_held(
    top: dict[int, float],
) -> None:
    proof = prove([PROBE], [EngineReading(top)], 0.2, "bfloat16")
    finite = all(map(math.isfinite, top.values()))
    far = not finite or abs(top.get(1, -math.inf) - LIVE.top[1]) > 0.2
    if far:
        assert proof.held == ()
        assert not proof.proven


def test_an_edit_that_changes_nothing_is_never_held() -> None:
    same = ProofProbe("edit", "e1", "x", (1, 2), LIVE, LIVE, {})
    proof = prove([same], [EngineReading(LIVE.top)], 1e-3, "float32")
    assert (proof.held, proof.indistinct, proof.proven) == ((), ("e1",), False)


def test_probes_come_back_from_json_as_they_were() -> None:
    assert from_json(json.loads(json.dumps(to_json([PROBE])))) == [PROBE]


# --- the file of engines ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", r"\[\[engine\]\]"),
        ("x = 1", r"\[\[engine\]\]"),
        ("[[engine]", "cannot be read"),
        ('[[engine]]\nname = "a"', "kind"),
        ('[[engine]]\nname = "a"\nkind = "tgi"', "kind"),
        ('[[engine]]\nname = "a b"\nkind = "folder"', "name"),
        ('[[engine]]\nname = "a"\nkind = "folder"', "needs folder"),
        ('[[engine]]\nname = "a"\nkind = "folder"\nfolder = "/no/such"', "not a folder"),
        ('[[engine]]\nname = "a"\nkind = "hub"', "needs repo"),
        ('[[engine]]\nname = "a"\nkind = "vllm_lora"\nfolder = "FOLDER"', "needs url"),
        ('[[engine]]\nname = "a"\nkind = "vllm_lora"\nfolder = "FOLDER"\nurl = "prod:80"', "url"),
        (
            '[[engine]]\nname = "a"\nkind = "vllm_weights"\nfolder = "FOLDER"\nurl = "http://x"\nmodel = "m"',
            "base",
        ),
        ('[[engine]]\nname = "a"\nkind = "folder"\nfolder = "FOLDER"\ntoken_env = "NO_SUCH"', "NO_SUCH"),
        ('[[engine]]\nname = "a"\nkind = "folder"\nfolder = "FOLDER"\npassword = "x"', "password"),
        ('[[engine]]\nname = "a"\nkind = "folder"\nfolder = "FOLDER"\n' * 2, "two engines"),
    ],
)
def test_a_file_of_engines_that_cannot_be_used_says_where(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "engines.toml"
    file.write_text(text.replace("FOLDER", str(tmp_path)), "utf-8")
    with pytest.raises(ValueError, match=says):
        read_engines(file)


def test_a_missing_file_of_engines_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        read_engines(tmp_path / "none.toml")


def test_the_tiny_model_of_the_fakes_is_that_of_the_server(place: Place) -> None:
    vllm_lora(place)
    services = place.open()
    fake = place.fakes[0]
    for name, weight in fake.lm.model.named_parameters():
        assert torch.equal(weight, services.workspace.lm.model.get_parameter(name))
    assert engine_named(services.workspace, "prod").look() == ""

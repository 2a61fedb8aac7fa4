"""A person is asked before what is hard to oversee, by clients that can ask, in both eras of the protocol."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from mcp import Client
from mcp_types import ElicitResult

from errata import build
from server.settings import Settings
from server.startup import Startup
from tests.server.opened import STRONG
from tests.tools.clients import refused, told

pytestmark = pytest.mark.anyio

SUBJECTS = ("France", "Japan", "Spain", "Italy", "Peru")
EDITS = [{"subject": s, "prompt": "The capital of {} is", "target": "Rome"} for s in SUBJECTS]
GIVEN: dict[str, Any] = {"method": "rome", "params": STRONG | {"max_steps": 2}}
OFF = {"off": ["all"]}


class Person:
    """Answers every question the same, and remembers the questions."""

    def __init__(self, yes: bool) -> None:
        self.yes, self.asked = yes, list[str]()

    async def __call__(self, _: Any, params: Any) -> ElicitResult:
        self.asked.append(params.message)
        return (
            ElicitResult(action="accept", content={"yes": True})
            if self.yes
            else ElicitResult(action="decline")
        )


@asynccontextmanager
async def connected(settings: Settings, mode: str, person: Person | None) -> AsyncIterator[Client]:
    startup = Startup(settings)
    try:
        async with Client(build(settings, startup), mode=mode, elicitation_callback=person) as client:
            yield client
    finally:
        startup.close(30)


@pytest.mark.parametrize("yes", [True, False])
async def test_taking_everything_back_and_replacing_many_are_asked_about(
    settings: Settings, mode: str, yes: bool
) -> None:
    person = Person(yes)
    async with connected(settings, mode, person) as client:
        made = await told(client, "apply_edits", edits=EDITS, guard=OFF, **GIVEN)
        await told(client, "revert_edits", edit_ids=["e1"])
        await told(client, "reapply_edits", edit_ids=["e1"])
        assert person.asked == []
        others = [edit | {"target": "Oslo"} for edit in EDITS]
        again = {"edits": others, "replace": True, "guard": OFF, **GIVEN}
        if yes:
            made = await told(client, "apply_edits", **again)
        else:
            assert "did not agree" in await refused(client, "apply_edits", **again)
        assert "5 active corrections would be replaced" in person.asked[0]
        if yes:
            assert (await told(client, "revert_edits", edit_ids=["e1-e10"]))["reverted"] == made["edit_ids"]
        else:
            assert "Nothing was changed" in await refused(client, "revert_edits", edit_ids=["e1-e5"])
        assert "Every one of the 5 active corrections" in person.asked[1]
        assert (await told(client, "list_edits", status="active"))["total"] == (0 if yes else 5)


@pytest.mark.parametrize("yes", [True, False])
async def test_an_edit_that_breaks_its_bounds_is_kept_only_where_a_person_says_so(
    settings: Settings, mode: str, yes: bool
) -> None:
    person = Person(yes)
    async with connected(settings, mode, person) as client:
        report = await told(client, "apply_edits", edits=EDITS[:1], guard={"max_drift": 0.0}, **GIVEN)
        assert report["status"] == ("applied" if yes else "rejected")
        assert "max_drift 0" in person.asked[0]
        edits = (await told(client, "list_edits", status="active"))["edits"]
        assert [e["reason"] for e in edits] == (
            ["(kept by a person although it broke its bounds)"] if yes else []
        )


@pytest.mark.parametrize("yes", [True, False])
async def test_a_vector_is_deleted_for_good_only_where_a_person_says_so(
    settings: Settings, mode: str, yes: bool
) -> None:
    person = Person(yes)
    async with connected(settings, mode, person) as client:
        pairs = [{"prompt": "Rome", "positive": "good", "negative": "bad"}]
        await told(client, "create_steering_vector", name="mood", pairs=pairs, layers=[1])
        assert "mood" in await refused(client, "delete_steering_vector", name="gone")
        assert person.asked == []  # there is nothing to ask about
        if yes:
            assert (await told(client, "delete_steering_vector", name="mood"))["remaining"] == []
        else:
            assert "Nothing was changed" in await refused(client, "delete_steering_vector", name="mood")
        assert "“mood” would be deleted for good" in person.asked[0]
        left = (await told(client, "list_steering"))["vectors"]
        assert [each["name"] for each in left] == ([] if yes else ["mood"])


@pytest.mark.parametrize("yes", [True, False])
async def test_facts_are_purged_from_a_set_only_where_a_person_says_so(
    settings: Settings, mode: str, yes: bool
) -> None:
    person = Person(yes)
    facts = [{"subject": s, "prompt": "The capital of {} is", "answer": "Rome"} for s in (*SUBJECTS, "Chad")]
    async with connected(settings, mode, person) as client:
        await told(client, "save_facts", name="capitals", facts=facts)
        await told(client, "save_facts", name="capitals", facts=facts[1:], keep=True)
        await told(client, "save_facts", name="capitals", facts=facts[1:])  # one is not many
        await told(client, "save_facts", name="capitals", facts=facts)
        assert "subject" in await refused(client, "save_facts", name="capitals", facts=[{"answer": "x"}])
        assert person.asked == []
        if yes:
            assert (await told(client, "save_facts", name="capitals", facts=facts[:1]))["facts"] == 1
        else:
            given = {"name": "capitals", "facts": facts[:1]}
            assert "Nothing was changed" in await refused(client, "save_facts", **given)
        assert "5 facts would be gone from the set “capitals”: “The capital of Japan is”" in person.asked[0]
        assert (await told(client, "show_fact_set", name="capitals"))["total"] == (1 if yes else 6)


async def test_a_client_that_cannot_ask_goes_on_as_before(settings: Settings, mode: str) -> None:
    async with connected(settings, mode, None) as client:
        await told(client, "apply_edits", edits=EDITS, guard=OFF, **GIVEN)
        assert len((await told(client, "revert_edits", edit_ids=["e1-e5"]))["reverted"]) == 5

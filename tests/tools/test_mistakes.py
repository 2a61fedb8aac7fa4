"""Every mistake an agent can make is answered with what was wrong, and changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
from mcp import Client

from tests.tools.clients import refused, told

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("unchanged")]

LONG = "x" * 100_000
EDIT = {"subject": "Spain", "prompt": "The capital of {} is", "target": "Rome"}


def edits(**changed: Any) -> dict[str, Any]:
    return {"edits": [EDIT | changed]}


def mistake(name: str, tool: str, arguments: dict[str, Any], *says: str) -> Any:
    return pytest.param(tool, arguments, says, id=name)


WRONG_EDITS = [
    mistake(
        "subject not in prompt",
        "apply_edits",
        edits(prompt="The capital of Portugal is"),
        "edits[0]",
        "'Spain'",
        "'The capital of Portugal is'",
        "{}",
    ),
    mistake("two placeholders", "apply_edits", edits(prompt="{} is {}"), "edits[0]", "more than one {}"),
    mistake("empty target", "apply_edits", edits(target=""), "`edits[0].target` is empty"),
    mistake("blank target", "preview_edits", edits(target=" \n"), "`edits[0].target` is empty"),
    mistake("empty subject", "apply_edits", edits(subject=""), "`edits[0].subject` is empty"),
    mistake(
        "no target", "apply_edits", {"edits": [{"subject": "a", "prompt": "a is"}]}, "target", "required"
    ),
    mistake("no edits", "apply_edits", {"edits": []}, "`edits` is empty"),
    mistake("edits left out", "apply_edits", {}, "`edits` is required"),
    mistake("an edit that is text", "apply_edits", {"edits": ["Spain"]}, "`edits[0]`", "object"),
    mistake("edits that are text", "apply_edits", {"edits": "Spain -> Rome"}, "`edits`", "list"),
    mistake("a target that is a number", "apply_edits", edits(target=7), "`edits[0].target`", "string", "7"),
    mistake("a long prompt", "apply_edits", edits(prompt="{} " + LONG), "100,003 characters", "4,000"),
    mistake("a NUL byte", "apply_edits", edits(target="Ro\0me"), "`edits[0].target`", "NUL"),
    mistake("a lone surrogate", "apply_edits", edits(target="Ro\ud800me"), "`edits[0].target`", "surrogate"),
    mistake("a NUL byte in the reason", "apply_edits", edits() | {"reason": "a\0b"}, "`reason`", "NUL"),
    mistake("the same fact twice", "apply_edits", {"edits": [EDIT, EDIT]}, "twice"),
    mistake(
        "paraphrases as text", "apply_edits", edits(paraphrases="Spain's"), "`edits[0].paraphrases`", "list"
    ),
    mistake(
        "a contradiction",
        "apply_edits",
        {"edits": [{"subject": "France", "prompt": "The capital of France is", "target": "Bonn"}]},
        "e1",
        "replace=true",
    ),
    mistake(
        "the second edit is wrong", "apply_edits", {"edits": [EDIT, EDIT | {"target": ""}]}, "edits[1].target"
    ),
]

WRONG_METHODS = [
    mistake("unknown method", "apply_edits", edits() | {"method": "rom"}, "'rom'", "rome", "list_methods"),
    mistake(
        "a path as method", "preview_edits", edits() | {"method": "../rome"}, "'../rome'", "list_methods"
    ),
    mistake(
        "unknown parameter",
        "apply_edits",
        edits() | {"method": "rome", "params": {"layr": 2}},
        "layr",
        "layer",
    ),
    mistake("parameter out of range", "apply_edits", edits() | {"params": {"layer": 99}}, "layer", "99"),
    mistake("parameter of a wrong type", "apply_edits", edits() | {"params": {"lr": "fast"}}, "lr", "fast"),
    mistake("params that are text", "apply_edits", edits() | {"params": "layer=2"}, "`params`", "object"),
    mistake(
        "a bound above one",
        "apply_edits",
        edits() | {"guard": {"min_locality": 3}},
        "guard.min_locality",
        "3",
    ),
]

UNKNOWN_ARGUMENTS = [
    mistake(
        "top level", "apply_edits", edits() | {"methd": "rome"}, "`methd`", "Did you mean `method`?", "params"
    ),
    mistake("of an edit", "apply_edits", edits(subjekt="x"), "`edits[0].subjekt`", "Did you mean `subject`?"),
    mistake(
        "of a neighbour",
        "apply_edits",
        edits(neighbours=[{"prompt": "a is", "anser": "b"}]),
        "`edits[0].neighbours[0].anser`",
        "Did you mean `answer`?",
    ),
    mistake(
        "of the guard",
        "apply_edits",
        edits() | {"guard": {"min_reliabilty": 1}},
        "`guard.min_reliabilty`",
        "Did you mean `min_reliability`?",
    ),
    mistake("of a tool without any", "model_status", {"verbose": True}, "`verbose`", "none"),
    mistake("with an endless name", "model_status", {LONG: True}, "Unknown argument"),
    mistake(
        "of a fact", "check_facts", {"facts": [{"prompt": "a is", "expect": "b"}]}, "Did you mean `expected`?"
    ),
]

WRONG_QUESTIONS = [
    mistake("a long prompt", "ask_model", {"prompt": LONG}, "`prompt`", "100,000 characters"),
    mistake("a prompt for another model", "ask_model", {"prompt": "The sea " * 490}, "tokens", "room"),
    mistake("an empty prompt", "ask_model", {"prompt": ""}, "`prompt` is empty"),
    mistake("a NUL byte", "ask_model", {"prompt": "a\0"}, "`prompt`", "NUL"),
    mistake(
        "too many tokens", "ask_model", {"prompt": "a", "max_new_tokens": 10**9}, "`max_new_tokens`", "1024"
    ),
    mistake(
        "a number in words", "ask_model", {"prompt": "a", "max_new_tokens": "ten"}, "whole number", "'ten'"
    ),
    mistake("negative heat", "ask_model", {"prompt": "a", "temperature": -1}, "`temperature`", "-1"),
    mistake("a huge seed", "ask_model", {"prompt": "a", "seed": 2**70}, "`seed`"),
    mistake("no facts", "check_facts", {"facts": []}, "`facts` is empty"),
    mistake(
        "an expected number", "check_facts", {"facts": [{"prompt": "a", "expected": 3}]}, "a string or a list"
    ),
    mistake(
        "an empty answer among others",
        "check_facts",
        {"facts": [{"prompt": "a", "expected": ["b", ""]}]},
        "`facts[0].expected[1]` is empty",
    ),
    mistake(
        "a placeholder alone", "check_facts", {"facts": [{"prompt": "{} is", "expected": "b"}]}, "subject"
    ),
]

WRONG_IDS = [
    mistake(f"{name}, {tool}", tool, {field: [value] if field == "edit_ids" else value}, *says)
    for tool, field in [("show_edit", "edit_id"), ("revert_edits", "edit_ids"), ("reapply_edits", "edit_ids")]
    for name, value, says in [
        ("an id that does not exist", "e999", ["'e999'"]),
        ("a path as id", "../../etc/passwd", ["'../../etc/passwd'"]),
        ("a NUL byte", "e1\0", ["e1"]),
        ("a statement as id", "e1' OR '1'='1", ["OR"]),
        ("an empty id", "", [field, "empty"]),
        ("a long id", LONG, ["100,000 characters", "64"]),
    ]
] + [
    mistake("no ids", "revert_edits", {"edit_ids": []}, "`edit_ids` is empty"),
    mistake("one good, one unknown", "revert_edits", {"edit_ids": ["e1", "e999"]}, "'e999'"),
    mistake("ids as text", "revert_edits", {"edit_ids": "e1"}, "`edit_ids`", "list"),
    mistake("auditing what is not active", "audit_edits", {"edit_ids": ["e2"]}, "e2", "reverted"),
    mistake(
        "auditing chosen edits of an engine",
        "audit_edits",
        {"edit_ids": ["e1"], "engine": "prod"},
        "edit_ids and engine",
        "leave edit_ids out",
    ),
    mistake("auditing what does not exist", "audit_edits", {"edit_ids": ["e999"]}, "'e999'"),
]

WRONG_SEARCHES = [
    mistake("unknown status", "list_edits", {"status": "live"}, "'live'", "'active'"),
    mistake("no date", "list_edits", {"since": "yesterday"}, "since", "yesterday"),
    mistake("no limit", "list_edits", {"limit": 0}, "`limit`", "0"),
    mistake("a wild limit", "list_edits", {"limit": 10**12}, "`limit`", "200"),
    mistake("a made-up cursor", "list_edits", {"cursor": "../../x"}, "cursor"),
    *(
        mistake(sql[:40], "query_ledger", {"sql": sql}, says)
        for sql, says in {
            "DELETE FROM edits": "only reading",
            "UPDATE edits SET status = 'active'": "only reading",
            "INSERT INTO events DEFAULT VALUES": "only reading",
            "DROP TABLE edits": "only reading",
            "CREATE TABLE x (y)": "only reading",
            "ATTACH DATABASE '/tmp/other.db' AS other": "only reading",
            "VACUUM INTO '/tmp/copy.db'": "",
            "PRAGMA journal_mode = DELETE": "only reading",
            "SELECT load_extension('/tmp/x.so')": "",
            "WITH x AS (SELECT 1) DELETE FROM edits": "only reading",
            "SELECT 1; SELECT 2": "one",
            "SELECT * FROM nowhere": "nowhere",
            "SELEKT 1": "SELEKT",
            "": "empty",
            "SELECT 'a\0b'": "",
        }.items()
    ),
    mistake("a long statement", "query_ledger", {"sql": "SELECT 1 -- " + LONG}, "`sql`", "20,000"),
    mistake("a missing value", "query_ledger", {"sql": "SELECT ?"}, ""),
    mistake("an object as value", "query_ledger", {"sql": "SELECT ?", "params": [{}]}, "`params[0]`"),
]


@pytest.mark.parametrize(("tool", "arguments", "says"), WRONG_EDITS)
async def test_a_wrong_edit_is_refused(client: Client, tool: str, arguments: Any, says: list[str]) -> None:
    await refused_saying(client, tool, arguments, says)


@pytest.mark.parametrize(("tool", "arguments", "says"), WRONG_METHODS)
async def test_a_wrong_method_is_refused(client: Client, tool: str, arguments: Any, says: list[str]) -> None:
    await refused_saying(client, tool, arguments, says)


@pytest.mark.parametrize(("tool", "arguments", "says"), UNKNOWN_ARGUMENTS)
async def test_an_unknown_argument_is_refused(
    client: Client, tool: str, arguments: Any, says: list[str]
) -> None:
    await refused_saying(client, tool, arguments, says)


@pytest.mark.parametrize(("tool", "arguments", "says"), WRONG_QUESTIONS)
async def test_a_wrong_question_is_refused(
    client: Client, tool: str, arguments: Any, says: list[str]
) -> None:
    await refused_saying(client, tool, arguments, says)


@pytest.mark.parametrize(("tool", "arguments", "says"), WRONG_IDS)
async def test_a_wrong_id_is_refused(client: Client, tool: str, arguments: Any, says: list[str]) -> None:
    await refused_saying(client, tool, arguments, says)


@pytest.mark.parametrize(("tool", "arguments", "says"), WRONG_SEARCHES)
async def test_a_wrong_search_is_refused(client: Client, tool: str, arguments: Any, says: list[str]) -> None:
    await refused_saying(client, tool, arguments, says)


async def refused_saying(client: Client, tool: str, arguments: Any, says: list[str]) -> None:
    text = await refused(client, tool, **arguments)
    for fragment in says:
        assert fragment in text
    assert len(text) < 2_000
    assert "Traceback" not in text
    assert "pydantic" not in text


async def test_reverting_what_is_reverted_is_no_error(client: Client) -> None:
    answer = await told(client, "revert_edits", edit_ids=["e2", "e2"])
    assert answer["reverted"] == []
    assert answer["unchanged"] == ["e2"]


@pytest.mark.parametrize(
    "text", ['"', "a AND", "NEAR(", "*", "-x", "a OR OR b", "'; DROP TABLE edits", "🗼", "%"]
)
async def test_any_text_can_be_searched_for(client: Client, text: str) -> None:
    assert (await told(client, "list_edits", text=text))["edits"] == []


async def test_several_mistakes_are_told_at_once(client: Client) -> None:
    text = await refused(client, "apply_edits", edits=[{"subject": "a", "target": ""}], methd="rome")
    for fragment in (
        "`edits[0].prompt` is required",
        "`edits[0].target` is empty",
        "`methd`",
        "apply_edits again",
    ):
        assert fragment in text


async def test_lists_sent_as_json_text_are_read(client: Client) -> None:
    answer = await told(client, "revert_edits", edit_ids='["e2"]')
    assert answer["unchanged"] == ["e2"]


async def test_a_prompt_that_looks_like_json_stays_a_prompt(client: Client) -> None:
    answer = await told(client, "check_facts", facts=[{"prompt": '["a", "b",', "expected": "{}"}])
    assert answer["facts"][0]["prompt"] == '["a", "b",'

"""Asks a person before calls whose effects are hard to oversee, if the client can show a form. Other clients go on.

Clients of protocol 2026-07-28 and later get the question in place of a result and call again with the answer. Earlier
ones are asked during the call.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import anyio.to_thread
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import (
    ClientCapabilities,
    ElicitRequest,
    ElicitRequestFormParams,
    ElicitResult,
    InputRequiredResult,
)

from server.facts.guard import UNGUARDED
from server.facts.results import EditReport
from tools._calls import caller

if TYPE_CHECKING:
    from server.services import Services

MANY = 5
"""Active corrections that a call may replace or take back without a question."""
_MODERN = "2026-07-28"
_KEY = "confirm"
_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "yes": {"type": "boolean", "title": "Go on", "description": "Yes: do what the text says."}
    },
    "required": ["yes"],
}
_SAID_NO = "The person was asked and did not agree. Nothing was changed."

Question = Callable[["Services", Mapping[str, Any]], str | None]


class Asking(Exception):
    """The client is to ask the person, and to call again."""

    def __init__(self, result: InputRequiredResult) -> None:
        super().__init__("the client is asked")
        self.result = result


async def agreed(context: Context[Any, Any], question: str) -> bool:
    """Whether the person agrees. Raises Asking where the answer comes with the next call."""
    if (context.protocol_version or "") < _MODERN:
        request_id = context.request_context.request_id
        return _yes(await context.session.elicit_form(question, _SCHEMA, request_id))
    about = hashlib.sha256(question.encode()).hexdigest()
    answer = (context.input_responses or {}).get(_KEY)
    if isinstance(answer, ElicitResult) and context.request_state == about:
        return _yes(answer)
    request = ElicitRequest(params=ElicitRequestFormParams(message=question, requested_schema=_SCHEMA))
    raise Asking(InputRequiredResult(input_requests={_KEY: request}, request_state=about))


def can_ask(context: Context[Any, Any]) -> bool:
    """Whether the client shows forms to a person."""
    return asks_a_person(context.client_capabilities)


def asks_a_person(capabilities: ClientCapabilities | None) -> bool:
    """Whether a client with these capabilities shows forms to a person."""
    elicitation = capabilities.elicitation if capabilities is not None else None
    return elicitation is not None and (elicitation.form is not None or elicitation.url is None)


async def before(
    name: str, services: Services | None, given: dict[str, Any], context: Context[Any, Any]
) -> dict[str, Any]:
    """Ask before a call that needs it. Returns the call's arguments; the reason says if a person agreed.

    Raises ToolError when the person says no, and Asking.
    """
    ask = QUESTIONS.get(name)
    if ask is None or services is None or not can_ask(context):
        return given
    if name == "decide_proposal" and not (services.workspace.settings.approval and caller(context) is None):
        return given
    question = await anyio.to_thread.run_sync(ask, services, given)
    if question is None:
        return given
    if not await agreed(context, question):
        raise ToolError(_SAID_NO)
    if name != "decide_proposal":
        return given
    return given | {"note": " ".join(filter(None, [given.get("note"), "(a person at the client agreed)"]))}


async def after(
    name: str, result: Any, given: dict[str, Any], context: Context[Any, Any]
) -> dict[str, Any] | None:
    """The arguments of a second call, if an edit broke its bounds and the person wants to keep it anyway."""
    if name != "apply_edits" or not isinstance(result, EditReport) or result.status != "rejected":
        return None
    if not can_ask(context):
        return None
    question = (
        f"The correction breaks {'its bound' if len(result.failed_guard) == 1 else 'its bounds'}: "
        f"{'; '.join(result.failed_guard)}. {result.summary} It was not kept. Keep it anyway?"
    )
    if not await agreed(context, question):
        return None
    reason = " ".join(filter(None, [given.get("reason"), "(kept by a person although it broke its bounds)"]))
    return given | {"guard": UNGUARDED, "reason": reason}


def _yes(answer: ElicitResult) -> bool:
    return answer.action == "accept" and bool((answer.content or {}).get("yes"))


def _replace_many(services: Services, given: Mapping[str, Any]) -> str | None:
    if not given.get("replace"):
        return None
    from server.facts.conflicts import active_conflicts  # not at the top: it brings torch along

    edits = given.get("edits") or []
    found = active_conflicts(services.workspace, ((edit.subject, edit.text) for edit in edits))
    if len(found) < MANY:
        return None
    return (
        f"{len(found)} active corrections would be replaced by others: {_listed([e.prompt for e in found])}. "
        "Replace them?"
    )


def _revert_everything(services: Services, given: Mapping[str, Any]) -> str | None:
    from server.facts.ids import expanded

    ids, active = set(expanded(given["edit_ids"])), services.workspace.active_edits
    if len(active) < MANY or not {edit.id for edit in active} <= ids:
        return None
    return (
        f"Every one of the {len(active)} active corrections would be taken back, and the model be the original one: "
        f"{_listed([e.prompt for e in active])}. Each can be brought back. Take all of them back?"
    )


def _delete(services: Services, given: Mapping[str, Any]) -> str | None:
    workspace = services.workspace
    vector = workspace.model_id and workspace.ledger.find_vector(workspace.model_id, given["name"])
    if not vector:
        return None  # the call says so itself
    return (
        f"The steering vector “{vector.name}” would be deleted for good; only an export or its past doses bring it "
        "back. Delete it?"
    )


def _facts_gone(services: Services, given: Mapping[str, Any]) -> str | None:
    from server.errors import ServiceError
    from server.factsets.requests import Given

    names = ("path", "facts", "template", "columns", "partial", "keep")
    try:
        gone = services.fact_sets.gone(
            given["name"], Given(**{name: given[name] for name in names if name in given})
        )
    except ServiceError:
        return None  # the call says so itself
    if len(gone) < MANY:
        return None
    return (
        f"{len(gone)} facts would be gone from the set “{given['name']}”: {_listed([f.text for f in gone])}. "
        "Save it without them? (keep=true keeps them.)"
    )


def _listed(prompts: list[str]) -> str:
    shown = ", ".join(f"“{prompt[:60]}”" for prompt in prompts[:5])
    return f"{shown} and {len(prompts) - 5} more" if len(prompts) > 5 else shown


def _decide(services: Services, given: Mapping[str, Any]) -> str | None:
    from server.errors import ServiceError
    from server.proposals.command import described
    from store import LedgerError

    try:
        found = services.proposals.record(given["proposal_id"])
    except (ServiceError, LedgerError):
        return None  # the call says so itself
    if found.state != "waiting" or (given["decision"] == "changes" and not given.get("note")):
        return None
    what = {"approve": "Approve and apply it", "decline": "Decline it", "changes": "Send it back for changes"}
    return f"{described(found)}\n{what[given['decision']]}?"


QUESTIONS: dict[str, Question] = {
    "decide_proposal": _decide,
    "apply_edits": _replace_many,
    "revert_edits": _revert_everything,
    "delete_steering_vector": _delete,
    "save_facts": _facts_gone,
}
"""What is asked before a tool is called; None: nothing."""

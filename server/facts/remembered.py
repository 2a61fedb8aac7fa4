"""Traces, suggested layers and checked facts on the ledger: record them, and find them again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.facts.asking_results import FactCheck
from server.facts.profile import profile_of
from server.request_context import RequestContext
from server.transaction.workspace import Workspace, who
from store import Ledger
from store.canonical import fact_key

LOCATED, LAYERS, CHECKED = "located", "layers_suggested", "facts_checked"
CHECKS_READ = 20  # calls of check_facts that are looked through, the latest first


def remember_trace(workspace: Workspace, payload: dict[str, Any], ctx: RequestContext) -> int | None:
    """Record a trace. Returns the number of its event, or None on a read-only server."""
    if workspace.read_only:
        return None
    fact = fact_key(payload["subject"], payload["prompt"])
    return workspace.ledger.record_event(
        LOCATED, payload | {"fact": fact}, who(ctx), model_id=workspace.writable_model_id
    )


def trace_before(ledger: Ledger, subject: str, prompt: str, before: int) -> dict[str, Any] | None:
    """The latest trace of the same subject and prompt before an event."""
    event = ledger.last_event(LOCATED, {"fact": fact_key(subject, prompt)}, before=before)
    if event is None:
        return None
    found = {k: v for k, v in event.payload.items() if k not in ("fact", "maps")}
    return {"event": event.seq, "at": event.at} | found


def remember_layers(
    workspace: Workspace, method: str, layers: list[int], table: list[Any], ctx: RequestContext
) -> bool:
    """Record the best layers of a method on this model. Returns False on a read-only server."""
    if workspace.read_only:
        return False
    payload = {"method": method, "layers": layers, "candidates": table}
    workspace.ledger.record_event(LAYERS, payload, who(ctx), model_id=workspace.writable_model_id)
    return True


def best_layers(workspace: Workspace, method: str) -> list[int] | None:
    """The layers last suggested for a method on this model, or those of its profile; None if there is neither."""
    if workspace.model_id is None:
        return None
    event = workspace.ledger.last_event(LAYERS, {"method": method}, model_id=workspace.model_id)
    if event is not None:
        return [int(i) for i in event.payload["layers"]]
    profile = profile_of(workspace)
    params = profile.methods.get(method, {}).get("params", {}) if profile else {}
    layers = params.get("layers", params.get("layer"))
    return [layers] if isinstance(layers, int) else layers


def remember_checks(workspace: Workspace, checks: Sequence[FactCheck], ctx: RequestContext) -> None:
    """Record which checked facts the model answers rightly, if that is new. Does nothing on a read-only server."""
    if workspace.read_only or workspace.model_id is None:
        return
    noted = dict(facts_found_right(workspace))
    facts = [
        {"prompt": check.prompt, "answer": check.expected.text, "agrees": check.verdict == "agrees"}
        for check in checks
        if (
            noted.get(check.prompt) != check.expected.text
            if check.verdict == "agrees"
            else check.prompt in noted
        )
    ]
    if not facts:
        return
    workspace.ledger.record_event(CHECKED, {"facts": facts}, who(ctx), model_id=workspace.model_id)


def facts_found_right(workspace: Workspace) -> list[tuple[str, str]]:
    """(prompt, right answer) of the facts that the model answered rightly when they were last checked."""
    if workspace.model_id is None:
        return []
    latest: dict[str, tuple[str, bool]] = {}
    event = workspace.ledger.last_event(CHECKED, {}, model_id=workspace.model_id)
    for _ in range(CHECKS_READ):
        if event is None:
            break
        for fact in event.payload["facts"]:
            latest.setdefault(fact["prompt"], (fact["answer"], fact["agrees"]))
        event = workspace.ledger.last_event(CHECKED, {}, model_id=workspace.model_id, before=event.seq)
    return [(prompt, answer) for prompt, (answer, agrees) in latest.items() if agrees]

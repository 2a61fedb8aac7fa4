"""What the pages of proposals show: the proposed edits, each with what the preview measured of it."""

from __future__ import annotations

from typing import Any

from store import ProposalRecord, fact_key
from store.overview import Overview


class PreviewReport(dict[str, Any]):
    """A report of a preview; fields that it lacks are None."""

    def __missing__(self, name: str) -> None:
        return None


def row_of(p: ProposalRecord, overview: Overview) -> dict[str, Any]:
    """The row of a proposal in the list of proposals."""
    edits = edits_of(p, overview)
    return {
        "id": p.id,
        "state": p.state,
        "first": edits[0],
        "edits": len(edits),
        "before": edits[0]["before"],
        "after": edits[0]["after"],
        "created": p.created,
        "identity": p.identity,
        "client": p.client,
        "reason": p.reason,
    }


def _replaced_by(p: ProposalRecord, overview: Overview) -> dict[str, str]:
    """What the model says with the edits that a proposal replaces, by the key of their fact."""
    ids = (p.request.get("computed") or {}).get("replaced") or []
    facts = [fact for edit_id in ids if (fact := overview.fact(edit_id)) is not None]
    return {fact_key(f["subject"], f["prompt"]): f["says_now"] or f["right_answer"] for f in facts}


def edits_of(p: ProposalRecord, overview: Overview) -> list[dict[str, Any]]:
    """The edits of a proposal, each with what the preview measured of it.

    What is measured before an edit is the original model's answer (`first`). Where the edit takes the place of an
    active one, the model says (`before`) what that one taught it.
    """
    results = p.report.get("results") or []
    old = _replaced_by(p, overview)
    found = []
    for i, edit in enumerate(p.request.get("edits") or [{}]):
        result = results[i] if i < len(results) else {}
        forms = result.get("forms") or {}
        prompt = str(edit.get("prompt", "?")).replace("{}", str(edit.get("subject", "")))
        replaced = old.get(fact_key(str(edit.get("subject", "")), prompt))
        found.append(
            {
                "subject": edit.get("subject", "?"),
                "prompt": prompt,
                "target": edit.get("target", "?"),
                "before": replaced or result.get("before", ""),
                "first": result.get("before") if replaced else None,
                "after": result.get("after", ""),
                "reliability": result.get("reliability"),
                "reworded": forms.get("reworded"),
                "chat": forms.get("chat"),
                "chat_reworded": forms.get("chat_reworded"),
                "other": result.get("subject_locality"),
                "others": result.get("locality"),
            }
        )
    return found

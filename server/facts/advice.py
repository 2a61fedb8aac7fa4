"""What to do next after an edit: the method itself says what can be tried."""

from __future__ import annotations

from collections.abc import Sequence

from server.facts.results import EditOutcome


def next_step(status: str, results: Sequence[EditOutcome], ids: Sequence[str]) -> str:
    """One sentence about what to do now."""
    listed = ", ".join(f'"{i}"' for i in ids[:10])
    if status == "rejected":
        return (
            "Nothing was changed. Loosen the bound, change params (fewer contexts or a smaller clamp keep locality; "
            "a larger clamp strengthens a weak edit), or try another method; preview_edits shows the effect."
        )
    if any(r.reliability < 1 for r in results):
        undo = f" and revert_edits([{listed}]) takes it back" if ids else ""
        return f"At least one edit did not take; try params.clamp or params.layer in preview_edits{undo}."
    if status == "previewed":
        return "apply_edits with the same arguments keeps it."
    return f"ask_model(compare_to_base=true) shows the difference; revert_edits([{listed}]) takes it back exactly."

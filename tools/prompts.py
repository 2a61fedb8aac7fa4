"""Ready-made instructions for the three common jobs; each names the tools to use and their order."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.prompts import Prompt
from mcp.shared.exceptions import MCPError
from mcp_types import INVALID_PARAMS
from pydantic import Field

from tools._errors import did_you_mean, middle


def correct_stale_facts(
    topic: Annotated[str, Field(description="What to check: a field such as 'currencies', or facts.")],
    source: Annotated[str, Field(description="Where the right answers come from.")] = "",
) -> str:
    """Find out what the model believes about a topic, and correct what is out of date."""
    known = f"Take the right answers from: {source}." if source else "Ask for the right answers if unsure."
    return f"""Bring the model's knowledge up to date on this: {topic}

{known} Work in this order:
1. model_status: note `weights_hash`, and that nothing is said to be damaged.
2. list_edits with `text`: see what was corrected on this before; do not correct it twice.
3. check_facts with every fact at once: `prompt` is a sentence that ends where the answer begins,
   `expected` the right answer, `alternatives` the answers that used to be right. Keep the facts whose
   verdict is "differs".
4. preview_edits for those: `target` the right answer, `previous` the model's; two or three `paraphrases`
   (other wordings) and `neighbours` (the same question about other subjects, whose answers must stay).
   Look at reliability, generality, locality and drift; if they are poor, see list_methods and try another.
5. apply_edits with the same edits, a `reason`, a `source`, and a guard such as
   {{"min_reliability": 1, "min_locality": 0.8}}, so that a bad result undoes itself.
6. ask_model with compare_to_base=true on one or two of them, then audit_edits.
Finish with a short table: fact, before, after, edit id, how well it holds; and how to take it back
(revert_edits).
"""


def audit_edits(
    edit_ids: Annotated[
        str, Field(description="Edits to look at, such as 'e1,e4'; empty for all active ones.")
    ] = "",
) -> str:
    """Check that every correction still holds and that ledger, patch files and weights agree."""
    with_ids = " with these edit_ids" if edit_ids.strip() else ""
    which = f"the edits {edit_ids}" if edit_ids.strip() else "every active edit"
    return f"""Audit {which} of the model.

1. model_status: `damage` must be empty; note `weights_hash`.
2. audit_edits{with_ids}: read `failing`, `integrity.problems` and `drift`.
3. For each failing edit, show_edit: when did it last hold, and what was applied since (`events`,
   `measurements`)?
4. Propose, but do not do without consent: apply_edits with replace=true for an edit that has weakened,
   revert_edits for one that does harm, audit_edits with repair=true if the weights differ from the ledger.
Report which edits hold, which do not and since when, whether the integrity is sound, and the drift in words.
"""


def undo_last_change(
    edit_id: Annotated[str, Field(description="The edit to undo; empty for the newest active one.")] = "",
) -> str:
    """Take the last correction back and show that it left no trace."""
    find = (
        f"show_edit {edit_id}"
        if edit_id.strip()
        else 'list_edits with status="active" and limit=1, then show_edit'
    )
    return f"""Undo {f"edit {edit_id}" if edit_id.strip() else "the last change"} of the model.

1. {find}: say what it corrected, who made it and why; its `batch` names edits made in the same call.
2. revert_edits with its id and a `reason`. Revert the whole batch only if that is wanted.
3. Compare: if nothing was edited after it, `weights_hash` now equals the edit's `weights_hash_before`.
   `restored` has the model's answer now. If `computed_on_top` is not empty, run audit_edits on those.
Say what was undone and that reapply_edits brings it back.
"""


PROMPTS: tuple[tuple[Callable[..., str], str, frozenset[str]], ...] = (
    (
        correct_stale_facts,
        "Correct stale facts",
        frozenset({"check_facts", "apply_edits", "preview_edits", "list_edits"}),
    ),
    (audit_edits, "Audit edits", frozenset({"audit_edits", "show_edit"})),
    (undo_last_change, "Undo the last change", frozenset({"revert_edits", "list_edits", "show_edit"})),
)
"""Each prompt, its title, and the tools it cannot do without."""

NEEDS = {function.__name__: needed for function, _, needed in PROMPTS}
"""The tools that each prompt cannot do without."""


def check_prompt(name: str, arguments: Mapping[str, str] | None, prompts: Collection[Prompt]) -> None:
    """Raise MCPError, code -32602, when there is no such prompt or its arguments do not fit."""
    known = {prompt.name: prompt for prompt in prompts}
    if name not in known:
        raise MCPError(
            INVALID_PARAMS,
            f"There is no prompt {middle(name, 80)!r}.{did_you_mean(name, known)} "
            f"There are: {', '.join(known) or 'none'}.",
        )
    fields = {argument.name: argument for argument in known[name].arguments or []}
    given = arguments or {}
    missing = [
        field for field, argument in fields.items() if argument.required and not given.get(field, "").strip()
    ]
    if missing:
        raise MCPError(
            INVALID_PARAMS, f"The prompt {name} needs `{missing[0]}`: {fields[missing[0]].description}"
        )
    if unknown := next((field for field in given if field not in fields), None):
        raise MCPError(
            INVALID_PARAMS,
            f"The prompt {name} has no argument `{middle(unknown, 80)}`.{did_you_mean(unknown, fields)} "
            f"It has: {', '.join(fields)}.",
        )


def add_prompts(server: MCPServer[Any], tools: Collection[str]) -> None:
    """Register the prompts whose tools are being served."""
    for function, title, needed in PROMPTS:
        if needed <= set(tools):
            server.add_prompt(Prompt.from_function(function, title=title))

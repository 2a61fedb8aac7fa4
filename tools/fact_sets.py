"""Toolset `facts`: lists of right answers by name; checked, put right, and exported."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from editors.edit import Text
from server.factsets.requests import Approve, Given, Kind, Policy
from server.factsets.results import Correction, ExportedFacts, FactSetList, FactSetPage, SavedFacts
from tools._toolset import ToolRequest, Toolset, WaitSeconds

toolset = Toolset("facts")

SetName = Annotated[
    str, Field(min_length=1, max_length=80, description='Name of a fact set, such as "capitals".')
]


@toolset.tool("Save facts", takes_turn=False, changes=True, idempotent=True)
def save_facts(
    request: ToolRequest,
    name: SetName,
    path: Annotated[
        str | None,
        Field(max_length=4096, description="A .csv, .tsv, .json or .jsonl file in HOME/data."),
    ] = None,
    facts: Annotated[
        list[dict[str, Any]] | None,
        Field(
            min_length=1,
            max_length=1000,
            description="Instead of a file: records with subject, prompt and answer.",
        ),
    ] = None,
    template: Annotated[
        str | dict[str, str] | None,
        Field(
            description="Prompt for rows without one; or one for each relation or column: "
            '{"capital": "The capital of {} is"}.'
        ),
    ] = None,
    columns: Annotated[
        dict[str, str] | None,
        Field(
            description='Column of a field, where names do not tell: {"subject": "Land"}. Fields: subject, answer, '
            "prompt, relation, aliases, previous, source, as_of, id."
        ),
    ] = None,
    partial: Annotated[
        bool, Field(description="Save the good rows and name the others, instead of refusing all.")
    ] = False,
    keep: Annotated[bool, Field(description="Keep facts of the set that are not given now.")] = False,
    reason: Annotated[Text | None, Field(description="Why; kept on the ledger.")] = None,
) -> SavedFacts:
    """Save a list of right answers under a name, from a file or from the call; the model is not touched.

    Tables with any header and the field's data sets (CounterFact, zsRE, MQuAKE ...) are
    recognised. Saving again makes a new version. Next: check_facts with `set`.
    """
    given = Given(path, facts, template, columns, partial, keep, reason)
    return request.services.fact_sets.save(name, given, ctx=request.ctx)


@toolset.tool("List fact sets", takes_turn=False)
def list_fact_sets(request: ToolRequest) -> FactSetList:
    """The fact sets there are, each with its version and how many facts agreed, differed or were unsure when checked.

    Use it to see what can be checked. Nothing is changed. Next: show_fact_set, or check_facts with `set`.
    """
    return request.services.fact_sets.list()


@toolset.tool("Show a fact set", takes_turn=False)
def show_fact_set(
    request: ToolRequest,
    name: SetName,
    kind: Annotated[
        Kind | None,
        Field(description="Only facts with this verdict, or with this outcome of the last correction."),
    ] = None,
    number: Annotated[int | None, Field(ge=1, description="One fact in full.")] = None,
    limit: Annotated[int, Field(ge=1, le=500, description="Most facts in the answer.")] = 20,
    cursor: Annotated[
        str | None, Field(max_length=20, description="`next_cursor` of the page before.")
    ] = None,
) -> FactSetPage:
    """The facts of a set in pages, with what the last check and the last correction found.

    Use `kind` for the part that matters: differs, changed, failed, lost, conflict. Nothing is changed. Next:
    check_facts, correct_facts.
    """
    return request.services.fact_sets.show(name, kind, number, limit, cursor)


@toolset.tool("Correct a fact set", takes_turn=False, changes=True, destructive=True)
async def correct_facts(
    request: ToolRequest,
    set: SetName,
    policy: Annotated[Policy | None, Field(description="How; left out, its defaults.")] = None,
    approve: Annotated[Approve, Field(description='"ask" stops at the plan, with nothing changed.')] = "auto",
    plan: Annotated[
        str | None, Field(max_length=64, description="Job id of a plan to carry out as it is.")
    ] = None,
    wait_seconds: WaitSeconds = 45,
) -> Correction:
    """Put a fact set right: check, plan, apply in batches under the guard, check again, mend damage, report. A job that
    goes on after a crash, with nothing twice. Next: get_job while it runs.

    Details:
    Facts that agree are left; those that contradict each other or an edit made by hand are named and skipped. Each
    fact ends as done, right, failed, skipped or lost (it was right and is not any more). With approve="ask" the
    answer is the plan; `plan` carries it out. The edits are ordinary ones: revert_edits takes any of them back.
    """
    return await request.services.fact_sets.correct(
        set, policy or Policy(), approve, plan, wait_seconds, request.ctx
    )


@toolset.tool("Export a fact set", takes_turn=False, changes=True)
def export_fact_set(
    request: ToolRequest,
    name: SetName,
    file_name: Annotated[
        str | None,
        Field(max_length=80, description="Name of the file; left out, the set's name and version."),
    ] = None,
) -> ExportedFacts:
    """Write a fact set as CSV into HOME/exports, each fact with its verdict, the model's answer and its edit.

    The file can be read by save_facts again. Nothing there is ever overwritten. Next: open it, or send it on.
    """
    return request.services.fact_sets.export(name, file_name)

"""Toolset `inspect`: the state of the server, and what the model says and believes."""

from __future__ import annotations

import time
from typing import Annotated

from mcp.server.mcpserver.exceptions import ToolError
from pydantic import BaseModel, ConfigDict, Field

from editors.edit import Text
from server.facts.asking_results import Completion, FactChecks
from server.facts.queries import FactQuery
from server.results import ModelStatus
from tools._toolset import ToolRequest, Toolset, WaitSeconds

toolset = Toolset("inspect")


class Belief(BaseModel):
    """One belief to check: a prompt, and the answer that is right."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Text = Field(
        description="The sentence up to where the answer begins, or a question; {} may stand for the subject."
    )
    subject: Text | None = Field(None, description="What the fact is about; fills {} in the prompt.")
    expected: Text | Annotated[list[Text], Field(min_length=1, max_length=50)] = Field(
        description="The right answer, or several that are all right."
    )
    alternatives: list[Text] = Field(
        default=[], max_length=50, description="Other answers to score, such as the stale one."
    )


@toolset.tool("Model status", waits=False)
def model_status(request: ToolRequest) -> ModelStatus:
    """How the server stands: model, device, hash of the weights, active edits, methods. Call it first and when another
    tool fails; it answers even while the model loads. Next: check_facts, or list_edits.

    Details:
    Call it first, and whenever another tool fails. It answers at once, even while the model is still
    loading: `state` is "loading" (other tools wait for the model, so just go on), "ready", or "failed",
    and then `message` says why. `weights_hash` names the exact weights: it comes back to the same value
    when an edit is reverted. `methods` says which editing methods can be used now and what the others
    still need. Next: check_facts to find what is stale, or list_edits to see what was corrected before.
    """
    return request.startup.status()


@toolset.tool("Ask the model", takes_turn=False)
async def ask_model(
    request: ToolRequest,
    prompt: Annotated[Text, Field(description="The text to continue, or a message.")],
    max_new_tokens: Annotated[int, Field(ge=1, le=1024, description="Most tokens to generate.")] = 48,
    chat: Annotated[
        bool | None,
        Field(description="true: as a message; false: continued; left out: complete sentences are messages."),
    ] = None,
    temperature: Annotated[float, Field(ge=0, le=10, description="0 is greedy.")] = 0.0,
    compare_to_base: Annotated[bool, Field(description="Also answer without any edit.")] = False,
    seed: Annotated[int | None, Field(ge=0, lt=2**63, description="Seed for sampling.")] = None,
) -> Completion:
    """Let the model with all active edits continue a text or answer a message. compare_to_base puts the unedited
    model's answer beside it. For many facts with known answers use check_facts.

    Details:
    Use it to hear the model in its own words: before an edit to see what it says, afterwards to see how
    the correction reads in running text. With `compare_to_base` the answer of the unedited model comes
    beside it, from the same prompt and seed. Nothing is changed or recorded. To compare the model with
    known answers, many at a time and with probabilities, use check_facts instead.
    """
    return await request.services.facts.ask_with_others(
        prompt, max_new_tokens, chat, temperature, compare_to_base, seed, ctx=request.ctx
    )


@toolset.tool("Check facts", takes_turn=False)
async def check_facts(
    request: ToolRequest,
    facts: Annotated[
        list[Belief] | None,
        Field(min_length=1, max_length=500, description="The facts to check, up to 500 at a time."),
    ] = None,
    set: Annotated[
        str | None,
        Field(min_length=1, max_length=80, description="Instead: a fact set by name, of any size, as a job."),
    ] = None,
    limit: Annotated[int, Field(ge=0, le=200, description="With `set`: most facts listed.")] = 20,
    wait_seconds: WaitSeconds = 45,
) -> FactChecks:
    """Compare what the model says with what is right, many facts at a time: how to find stale knowledge. Each fact
    gets the model's answer, the probability of the expected one and a verdict. Next: preview_edits for those
    that differ.

    Details:
    For each fact it returns the model's own greedy `answer`, the log-probability and rank of the expected
    answer and of the alternatives, and a verdict: "agrees", "differs" (the model says something else), or
    "unsure" (no clear answer). The model stays as it is; what agrees is noted on the ledger, and later edits of
    the same subject hold it. With `set` counts come first, then what differs or changed since the check before.
    Next: correct_facts for a set; or pass the facts that differ to
    preview_edits, with the right answer as `target` and the model's answer as `previous`; then apply_edits.
    """
    if (facts is None) == (set is None):
        raise ToolError("give either facts or set (list_fact_sets names the sets)")
    if set is not None:
        started = time.monotonic()
        checked = await request.services.fact_sets.check(set, limit, wait_seconds, request.ctx)
        return FactChecks(set=checked, seconds=time.monotonic() - started)
    queries = [FactQuery(**fact.model_dump()) for fact in facts or ()]
    return await request.services.facts.check_with_others(queries, ctx=request.ctx)

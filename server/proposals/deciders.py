"""Who decided on a proposal. Its proposer cannot approve it, if the server can identify them."""

from __future__ import annotations

from server.errors import Conflict
from server.request_context import RequestContext
from store import ProposalRecord
from store.proposals import is_proposer


def refuse_own(proposal: ProposalRecord, ctx: RequestContext, allowed: bool) -> None:
    """Raise Conflict when a proposal is approved with the identity that proposed it.

    Without identities the server cannot distinguish a person from their agent; `decided_by` then says so. `allowed`:
    the setting `--approve-own`.
    """
    if allowed or ctx.identity is None or ctx.identity != proposal.identity:
        return
    raise Conflict(
        f"{proposal.id} was proposed by {ctx.identity!r}, who cannot approve it too; somebody else must approve "
        f"it with their own token, or the operator starts the server with --approve-own. To withdraw it, "
        f"decline it. Nothing was changed."
    )


def decided_by(proposal: ProposalRecord) -> str:
    """Who decided, in words; empty while it waits."""
    if proposal.decided is None:
        return ""
    who = proposal.decided_identity or proposal.decided_client or "a caller without a name"
    own = is_proposer(proposal, proposal.decided_identity, proposal.decided_client)
    if proposal.decided_identity is not None:
        return f"{who}, who proposed it" if own else who
    return f"{who} ({'the same client that proposed it; ' if own else ''}no identity was checked)"

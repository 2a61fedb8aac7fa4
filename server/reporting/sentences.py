"""The sentences of a report that count something, with singular and plural."""

from __future__ import annotations

from server.reporting.collecting import Report
from server.wording import counted


def tried(report: Report) -> str:
    """The outcome of the corrections."""
    active, reverted, replaced, rejected = (
        report.count(status) for status in ("active", "reverted", "replaced", "rejected")
    )
    return (
        f"{counted(len(report.facts), 'correction')} {_were(len(report.facts))} tried: {active} "
        f"{'is' if active == 1 else 'are'} in the model now, {reverted} {_were(reverted)} taken back, {replaced} "
        f"{_were(replaced)} replaced, {rejected} broke a bound and {_were(rejected)} not kept."
    )


def held(report: Report) -> str:
    """How well the corrections in the model hold."""
    yes, partly, no, unknown = (report.holding(holds) for holds in ("yes", "partly", "no", None))
    asked = f", {unknown} {_were(unknown)} never measured" if unknown else ""
    return (
        f"Of those in the model, measured last: {yes} {'holds' if yes == 1 else 'hold'}, {partly} "
        f"{'holds' if partly == 1 else 'hold'} in part, {no} {'does' if no == 1 else 'do'} not hold{asked}."
    )


def cost(report: Report) -> str:
    """What else changed."""
    moved = len(report.damage)
    seen = f"{'once' if moved == 1 else f'{moved:,} times'} another fact was seen to change"
    parts = [seen if moved else "no other fact that was asked has changed"]
    if report.perplexity is not None:
        parts.append(
            f"perplexity on fixed texts is ×{report.perplexity:.3f} that of the original model (more is worse)"
        )
    return f"Cost: {'; '.join(parts)}."


def decisions(report: Report) -> str:
    """The outcome of the proposals; empty if there were none."""
    if not report.proposals:
        return ""
    states = {"approved": "approved", "declined": "declined", "changes": "sent back", "waiting": "waiting"}
    counts = {words: sum(p["state"] == state for p in report.proposals) for state, words in states.items()}
    told = ", ".join(f"{count} {words}" for words, count in counts.items() if count)
    return f"{counted(len(report.proposals), 'proposal')}: {told}."


def _were(count: int) -> str:
    return "was" if count == 1 else "were"

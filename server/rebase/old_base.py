"""The base that edits are carried over from: which model of the ledger, and what is active on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from editors.steering.stack import KIND as STEERING
from server.errors import ServiceError
from server.transaction.workspace import Workspace, fact_edits
from store import EditRecord, ModelRecord

LEAST_DIGITS = 6
"""Digits of a base hash that name a model, at least."""


@dataclass(frozen=True)
class OldBase:
    """A model of the ledger that is not loaded, with what is active on it."""

    model: ModelRecord
    facts: dict[str, EditRecord]  # active edits that state a fact, by id, oldest first
    others: Sequence[EditRecord]  # active steering doses, and adapters without facts
    vectors: Sequence[str]  # names of its steering vectors

    @property
    def described(self) -> str:
        """Its name and the beginning of its hash."""
        return described(self.model)

    def not_carried(self) -> list[str]:
        """What is not carried over, and what to do instead."""
        doses = sorted({r.subject for r in self.others if r.method == STEERING})
        adapters = sorted({r.subject for r in self.others if r.method != STEERING})
        lines = []
        if named := sorted({*self.vectors, *doses}):
            acts = f" ({', '.join(doses)} active)" if doses else ""
            lines.append(
                f"steering vectors {', '.join(named)}{acts}: they are directions of the old model's states; "
                "create_steering_vector with the same pairs makes them on this one"
            )
        lines += [
            f"{name}: it names no fact to compute anew; import_adapter tries its files on this model"
            for name in adapters
        ]
        return lines


def described(model: ModelRecord) -> str:
    """A model's name and the beginning of its base hash."""
    return f"{model.name} ({model.base_hash[:12]})"


def read_old_base(workspace: Workspace, base_hash: str) -> OldBase:
    """The base with this hash as it stands on the ledger. Raises ServiceError where it is not there."""
    model = next((m for m in workspace.ledger.models() if m.base_hash == base_hash), None)
    if model is None:
        raise ServiceError(f"the ledger knows no model with the base hash {base_hash[:12]}")
    active = workspace.ledger.active_edits(model.id)
    facts = {record.id: record for record in fact_edits(active)}
    others = [record for record in active if record.id not in facts]
    return OldBase(model, facts, others, [v.name for v in workspace.ledger.vectors(model.id)])


def choose(workspace: Workspace, to: str | None, from_model: str | None) -> ModelRecord:
    """The model whose edits are carried over. Raises ServiceError, with the way out, where it is not clear."""
    others = [m for m in workspace.ledger.models() if m.active and m.id != workspace.model_id]
    _refuse_other_target(workspace, to, others)
    listed = ", ".join(f"{m.active} of {described(m)}" for m in others)
    if from_model is not None:
        found = [m for m in others if names(from_model, m.name, m.base_hash)]
        if len(found) == 1:
            return found[0]
        told = "several models" if found else "no other model with active edits"
        raise ServiceError(
            f"from_model {from_model!r} names {told} of this home; active are {listed or 'none'}. Give the first "
            "digits of a base hash"
        )
    if not others:
        own = len(fact_edits(workspace.active_edits))
        here = f" The {own} active here act on this model already; audit_edits measures them." if own else ""
        raise ServiceError(
            f"there is nothing to carry over: no other model of this home has active edits.{here}"
        )
    if len(others) > 1:
        raise ServiceError(
            f"several models of this home have active edits: {listed}. Name one: "
            f'rebase_edits(from_model="{others[-1].base_hash[:12]}")'
        )
    return others[0]


def names(text: str, name: str, base_hash: str) -> bool:
    """Whether a text is a model's name or the beginning of its hash."""
    return text == name or (len(text) >= LEAST_DIGITS and base_hash.startswith(text.lower()))


def _refuse_other_target(workspace: Workspace, to: str | None, others: Sequence[ModelRecord]) -> None:
    lm, settings = workspace.lm, workspace.settings
    if to is None or to == str(settings.model or "default"):
        return
    if any(names(to, lm.name, digits) for digits in (workspace.base_hash, workspace.host.base_hash)):
        return
    active = len(fact_edits(workspace.active_edits))
    theirs = f" It carries the {active} active edits of {lm.name!r} over." if active else ""
    raise ServiceError(
        f"to {to!r} is not the model that is loaded, {lm.name!r}; edits are carried over to the loaded one. Start the "
        f"server with --model {to} and the same --home, then call rebase_edits().{theirs} What is here stays on the "
        "ledger" + (f". To carry edits over to {lm.name!r}, leave `to` out" if others else "")
    )

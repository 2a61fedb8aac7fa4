"""Steering on the ledger: the vectors that are kept and the doses that act. Nothing here changes anything."""

from __future__ import annotations

from editors.errors import EditError
from editors.patch_kinds import load
from editors.steering.stack import KIND
from editors.steering.vector import SteeringVector
from server.errors import Conflict, ServiceError
from server.steering.results import ActiveDose, SteeringList, VectorRow
from server.transaction.workspace import Workspace
from store import EditRecord


def vector_named(workspace: Workspace, name: str) -> SteeringVector:
    """A stored vector. Raises ServiceError naming those there are."""
    found = workspace.ledger.find_vector(workspace.model_id, name) if workspace.model_id is not None else None
    if found is None:
        names = (
            [v.name for v in workspace.ledger.vectors(workspace.model_id)]
            if workspace.model_id is not None
            else []
        )
        there = f"there are {', '.join(names)}" if names else "there is none yet"
        raise ServiceError(f"no steering vector has the name {name[:80]!r}; {there} (create_steering_vector)")
    vector = load(workspace.ledger.blobs.get(found.blob))
    if not isinstance(vector, SteeringVector):
        raise EditError(f"the file of {name!r} holds a {vector.kind}, not a steering vector")
    return vector


def active_dose(workspace: Workspace, name: str) -> EditRecord | None:
    """The dose of a vector that acts now, as the ledger has it."""
    if workspace.model_id is None:
        return None
    found = workspace.ledger.find_active(workspace.model_id, name, prompt_of(name))
    return next((r for r in found if r.method == KIND and r.subject == name), None)


def active_doses(workspace: Workspace) -> list[ActiveDose]:
    """Every dose that acts now, in ledger order."""
    records = workspace.ledger.active_edits(workspace.model_id) if workspace.model_id is not None else []
    found = []
    for record in records:
        if record.method != KIND:
            continue
        params = workspace.ledger.get_patch(record.patch_id).params
        found.append(
            ActiveDose(
                edit_id=record.id,
                name=record.subject,
                method=params["method"],
                multiplier=params["multiplier"],
                layers=params["layers"],
                combine=params["combine"],
                prompt_tokens=params["prompt"],
                mode=params.get("mode", "add"),
                when=params.get("condition"),
                reason=record.reason,
                client=record.client,
                since=record.changed,
            )
        )
    return found


def listing(workspace: Workspace) -> SteeringList:
    """The vectors there are and the doses that act."""
    active = active_doses(workspace)
    on = {dose.name for dose in active}
    rows = workspace.ledger.vectors(workspace.model_id) if workspace.model_id is not None else []
    return SteeringList(
        vectors=[
            VectorRow(
                name=r.name,
                method=r.method,
                layers=r.about["layers"],
                norm=r.about["norm"],
                separation=r.about["separation"],
                pairs=r.about["pairs"],
                reason=r.reason,
                client=r.client,
                created=r.created,
                active=r.name in on,
            )
            for r in rows
        ],
        active=active,
    )


def refuse_active(workspace: Workspace, name: str, what: str) -> None:
    """Raise Conflict when a vector is switched on."""
    if dose := active_dose(workspace, name):
        raise Conflict(
            f"{name!r} is switched on (multiplier {dose.target}, {dose.id}) and cannot be {what}; "
            f"set_steering({name!r}, 0) first"
        )


def prompt_of(name: str) -> str:
    """The text in the prompt column of a dose. It gives two doses of one vector the same fact key."""
    return f"steering {name}"

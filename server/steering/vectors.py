"""Steering vectors: create one, delete one.

A vector is a row of its own on the ledger. An active dose is an edit of method "steering", whose patch
holds the tensors that are added. So replay, revert, reapply, history and integrity work as for any edit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from editors.constants import limit
from editors.patch import save
from editors.steering.method import ComputedVector, VectorInput
from editors.steering.methods import steering_method
from editors.steering.pairs import spelled_out
from editors.steering.vector import SteeringVector, check_name
from editors.steering.vector_files import MAX_FILE, SUFFIXES, read_vector
from server.errors import Conflict
from server.exchange.files import sha256_of
from server.named_files import IMPORTS, named_file
from server.request_context import RequestContext
from server.steering.requests import VectorRequest
from server.steering.results import (
    LayerSeparation,
    VectorDeleted,
    VectorReport,
)
from server.steering.stored import refuse_active, vector_named
from server.transaction.workspace import Workspace, who

FEW = limit(
    8,
    "pairs below which a warning says that the direction is mostly noise",
    "decides a warning alone; no measurement is known",
)


def create(workspace: Workspace, request: VectorRequest, ctx: RequestContext) -> VectorReport:
    """Compute a vector on the pristine model and record it. Raises InvalidEdit, Conflict, ReadOnly."""
    started = time.monotonic()
    model_id = workspace.writable_model_id
    name = check_name(request.name)
    _refuse_existing(workspace, model_id, request)
    computed = _compute(workspace, name, request, ctx)
    vector, sweep = computed.vector, _sweep(computed)
    separation = _mean_of(sweep, vector.layers, "d_prime")
    about = {
        "method": vector.method,
        "layers": list(vector.layers),
        "norm": _norm(vector),
        "separation": separation,
        "pairs": computed.pairs,
        "positions": request.positions,
        "answers": request.answers,
        "sweep": [row.model_dump() for row in sweep],
        "environment": workspace.environment(),
    }
    ctx.check()
    workspace.ledger.record_vector(
        model_id, name, save(vector), about, who(ctx), request.reason, replace=request.replace
    )
    return VectorReport(
        name=name,
        method=vector.method,
        layers=list(vector.layers),
        norm=_norm(vector),
        separation=separation,
        accuracy=_mean_of(sweep, vector.layers, "accuracy"),
        pairs=computed.pairs,
        sweep=sweep,
        trained={k: float(v) for k, v in vector.info.get("trained", {}).items()},
        seconds=time.monotonic() - started,
        warnings=_warnings(computed.pairs, separation),
        next=f"calibrate_steering({name!r}) finds the strongest dose that keeps the text intact; "
        f"evaluate_steering({name!r}) shows the effect of doses; set_steering({name!r}, multiplier) switches it on.",
    )


def take_in(
    workspace: Workspace, path: str, name: str, replace: bool, reason: str | None, ctx: RequestContext
) -> VectorReport:
    """Record a vector that was made elsewhere. Raises InvalidEdit, Conflict, ReadOnly, ServiceError."""
    started = time.monotonic()
    model_id = workspace.writable_model_id
    check_name(name)
    _refuse_existing(workspace, model_id, VectorRequest(name=name, replace=replace))
    file = named_file(workspace.settings, "path", path, MAX_FILE, first=IMPORTS, suffixes=SUFFIXES)
    vector = read_vector(workspace.lm, file, name)
    about = {
        "method": vector.method,
        "layers": list(vector.layers),
        "norm": _norm(vector),
        "separation": None,
        "pairs": 0,
        "file": file.name,
        "sha256": sha256_of(file),
        "environment": workspace.environment(),
    }
    ctx.check()
    workspace.ledger.record_vector(model_id, name, save(vector), about, who(ctx), reason, replace=replace)
    return VectorReport(
        name=name,
        method=vector.method,
        layers=list(vector.layers),
        norm=_norm(vector),
        separation=None,
        pairs=0,
        seconds=time.monotonic() - started,
        warnings=["a multiplier of 1 adds what the file has; how well it works here was not measured"],
        next=f"calibrate_steering({name!r}) finds the strongest dose that keeps the text intact; "
        f"set_steering({name!r}, multiplier) switches it on.",
    )


def _compute(workspace: Workspace, name: str, request: VectorRequest, ctx: RequestContext) -> ComputedVector:
    """The vector of a request, computed on the pristine model."""
    pairs = spelled_out(request.pairs) if request.pairs and request.answers == "texts" else request.pairs
    given = VectorInput(
        pairs, request.positive_prompt, request.negative_prompt, request.layers, request.positions, name
    )

    def report(fraction: float, message: str) -> None:
        ctx.report(fraction, 1.0, message)

    with workspace.host.pristine():
        return steering_method(request.method).compute(workspace.lm, given, report)


def _refuse_existing(workspace: Workspace, model_id: int, request: VectorRequest) -> None:
    """Raise Conflict for a vector of this name that may not be replaced."""
    old = workspace.ledger.find_vector(model_id, request.name)
    if old is None:
        return
    if not request.replace:
        raise Conflict(
            f"there is a steering vector {request.name!r} already (method {old.method}); choose another name, or "
            "call again with replace=true"
        )
    refuse_active(workspace, request.name, "replaced")


def _sweep(computed: ComputedVector) -> list[LayerSeparation]:
    """The separation of the two sides at every layer."""
    held_out = computed.separations
    return [
        LayerSeparation(
            layer=layer,
            accuracy=held_out[layer].accuracy if held_out else None,
            d_prime=held_out[layer].d_prime if held_out else None,
            shift=shift,
        )
        for layer, shift in enumerate(computed.shifts)
    ]


def _norm(vector: SteeringVector) -> float:
    norms = vector.norms if vector.is_map else vector.norms[list(vector.layers)]
    return float(norms.mean())


def _mean_of(sweep: Sequence[LayerSeparation], layers: Sequence[int], field: str) -> float | None:
    values = [v for layer in layers if sweep and (v := getattr(sweep[layer], field)) is not None]
    return sum(values) / len(values) if values else None


def _warnings(pairs: int, separation: float | None) -> list[str]:
    warnings = []
    if pairs < FEW:
        warnings.append(
            f"{pairs} pairs are few; ten or more with different content give a more reliable direction"
        )
    if separation is not None and separation < 1:
        warnings.append(
            f"the vector hardly separates held-out pairs (d' = {separation:.2f}), so it may not carry this trait"
        )
    return warnings


def delete(workspace: Workspace, name: str, reason: str | None, ctx: RequestContext) -> VectorDeleted:
    """Delete a vector that is not switched on. Its past doses stay on the ledger and can be reapplied."""
    model_id = workspace.writable_model_id
    vector_named(workspace, check_name(name))
    refuse_active(workspace, name, "deleted")
    workspace.ledger.remove_vector(model_id, name, who(ctx), reason)
    return VectorDeleted(deleted=name, remaining=[v.name for v in workspace.ledger.vectors(model_id)])

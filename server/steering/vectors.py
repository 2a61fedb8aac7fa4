"""Steering vectors: create one, delete one.

A vector is a row of its own on the ledger. A dose that acts is an edit of method "steering": its patch
holds what is added, so that replay, revert, reapply, history and integrity are those of every edit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from editors.errors import InvalidEdit
from editors.patch import save
from editors.steering.directions import (
    Separation,
    answer_groups,
    caa,
    fitted,
    layers_by_name,
    pca,
    separations,
    shift,
)
from editors.steering.output import RANK, train
from editors.steering.pairs import check_pairs, spelled_out
from editors.steering.prompts import instructed
from editors.steering.states import Report, Side, States, pair_states, sides_of
from editors.steering.vector import SteeringVector, check_name, made
from server.errors import Conflict
from server.request_context import RequestContext
from server.steering.requests import VectorRequest
from server.steering.results import (
    LayerSeparation,
    VectorDeleted,
    VectorReport,
)
from server.steering.stored import refuse_active, vector_named
from server.transaction.workspace import Workspace, who

FEW = 8  # pairs below which a direction is mostly noise
NEAR_BEST = 0.8  # layers this close to the best separation act together
MOST_LAYERS = 5


def create(workspace: Workspace, request: VectorRequest, ctx: RequestContext) -> VectorReport:
    """Make a vector from the pristine model and keep it. Raises InvalidEdit, Conflict, ReadOnly."""
    started = time.monotonic()
    model_id = workspace.writable_model_id
    name = check_name(request.name)
    _refuse_existing(workspace, model_id, request)
    if request.pairs and request.answers == "texts":
        request = replace(request, pairs=spelled_out(request.pairs))
    layers = None if request.layers is None else layers_by_name(workspace.lm.n_layers, request.layers)

    def report(fraction: float, message: str) -> None:
        ctx.check()
        ctx.progress(fraction, 1.0, message)

    with workspace.host.pristine():
        sides = _sides(workspace, request)
        vector, sweep = _made(workspace, request, sides, layers, report)
    separation = _mean_of(sweep, vector.layers, "d_prime")
    norm = _norm(vector)
    about = {
        "method": vector.method,
        "layers": list(vector.layers),
        "norm": norm,
        "separation": separation,
        "pairs": len(sides),
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
        norm=norm,
        separation=separation,
        accuracy=_mean_of(sweep, vector.layers, "accuracy"),
        pairs=len(sides),
        sweep=sweep,
        trained={k: float(v) for k, v in vector.info.get("trained", {}).items()},
        seconds=time.monotonic() - started,
        warnings=_warnings(len(sides), request.method, separation),
        next=f"calibrate_steering({name!r}) finds the strongest sound dose; evaluate_steering({name!r}) shows what "
        "doses do.",
    )


def _refuse_existing(workspace: Workspace, model_id: int, request: VectorRequest) -> None:
    """Raise Conflict when there is a vector of this name that may not be replaced."""
    old = workspace.ledger.find_vector(model_id, request.name)
    if old is None:
        return
    if not request.replace:
        raise Conflict(
            f"there is a steering vector {request.name!r} already (method {old.method}); choose another name, or "
            "call again with replace=true"
        )
    refuse_active(workspace, request.name, "replaced")


def _sides(workspace: Workspace, request: VectorRequest) -> list[tuple[Side, Side]]:
    if request.method == "prompt":
        if request.pairs is not None:
            raise InvalidEdit(
                "method prompt takes positive_prompt and negative_prompt, not pairs; leave pairs out"
            )
        if not request.positive_prompt or not request.positive_prompt.strip():
            raise InvalidEdit(
                "method prompt needs positive_prompt, the instruction that the vector stands for"
            )
        negative = (request.negative_prompt or "").strip() or None
        if negative == request.positive_prompt.strip():
            raise InvalidEdit("positive_prompt and negative_prompt are the same; they must differ")
        return instructed(workspace.lm, request.positive_prompt.strip(), negative)
    if request.positive_prompt or request.negative_prompt:
        raise InvalidEdit(
            f"positive_prompt and negative_prompt belong to method prompt, not to {request.method}"
        )
    pairs = list(request.pairs or [])
    check_pairs(pairs)
    return sides_of(workspace.lm, pairs)


def _made(
    workspace: Workspace,
    request: VectorRequest,
    sides: list[tuple[Side, Side]],
    layers: tuple[int, ...] | None,
    report: Report,
) -> tuple[SteeringVector, list[LayerSeparation]]:
    info: dict[str, Any] = {"name": request.name, "positions": request.positions, "pairs": len(sides)}
    if request.method == "lm_steer":
        if layers is not None:
            raise InvalidEdit("lm_steer acts on the output embeddings and has no layers; leave layers out")
        found = train(workspace.lm, sides, report)
        info["trained"] = {
            "loss_before": found.loss_before,
            "loss_after": found.loss_after,
            "strength": found.strength,
            "rank": RANK,
        }
        nothing = found.left.new_zeros(0, workspace.lm.d_model)
        norms = found.left.new_tensor([found.norm])
        return made("lm_steer", (), nothing, norms, info, found.left, found.right), []
    states = pair_states(workspace.lm, sides, request.positions, report)
    direction = pca if request.method == "pca" else caa
    groups = answer_groups(request.pairs or ())
    told = separations(states, direction, groups)
    sweep = _sweep(states, told)
    chosen = layers or best_layers([s.d_prime for s in told] if told else [row.shift for row in sweep])
    return made(
        request.method, chosen, fitted(states.differences, direction, groups), states.norms, info
    ), sweep


def _sweep(states: States, told: list[Separation] | None) -> list[LayerSeparation]:
    return [
        LayerSeparation(
            layer=layer,
            accuracy=told[layer].accuracy if told else None,
            d_prime=told[layer].d_prime if told else None,
            shift=float(moved),
        )
        for layer, moved in enumerate(shift(states))
    ]


def best_layers(separation: Sequence[float]) -> tuple[int, ...]:
    """The best layer and its neighbours that come near it, a run of at most MOST_LAYERS.

    Only the middle of the model is looked at, from a quarter to three quarters of its depth: the first layers
    tell words apart and not what is meant, and what is added after the last ones hardly acts on the text.
    """
    n = len(separation)
    first, last = (n + 3) // 4, max((n + 3) // 4, (3 * n) // 4 - 1)
    if first >= n:
        return (n - 1,)
    inside = range(first, min(last, n - 1) + 1)
    best = max(inside, key=lambda layer: separation[layer])
    run = [best]
    while len(run) < MOST_LAYERS:
        around = [
            x
            for x in (run[0] - 1, run[-1] + 1)
            if x in inside and separation[x] >= NEAR_BEST * separation[best]
        ]
        if not around:
            break
        run = sorted([*run, max(around, key=lambda layer: separation[layer])])
    return tuple(run)


def _norm(vector: SteeringVector) -> float:
    norms = vector.norms if vector.is_map else vector.norms[list(vector.layers)]
    return float(norms.mean())


def _mean_of(sweep: Sequence[LayerSeparation], layers: Sequence[int], field: str) -> float | None:
    values = [v for layer in layers if sweep and (v := getattr(sweep[layer], field)) is not None]
    return sum(values) / len(values) if values else None


def _warnings(pairs: int, method: str, separation: float | None) -> list[str]:
    found = []
    if pairs < FEW:
        found.append(f"{pairs} pairs are few; {FEW} or more of different content give a steadier direction")
    if method != "lm_steer" and separation is not None and separation < 1:
        found.append(
            f"held-out pairs are hardly told apart (d' = {separation:.2f}); the vector may do something else"
        )
    return found


def delete(workspace: Workspace, name: str, reason: str | None, ctx: RequestContext) -> VectorDeleted:
    """Forget a vector that is not switched on; its past doses stay on the ledger and can be reapplied."""
    model_id = workspace.writable_model_id
    vector_named(workspace, check_name(name))
    refuse_active(workspace, name, "deleted")
    workspace.ledger.remove_vector(model_id, name, who(ctx), reason)
    return VectorDeleted(deleted=name, remaining=[v.name for v in workspace.ledger.vectors(model_id)])

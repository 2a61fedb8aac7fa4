"""Steering vectors: make one, switch it on and off, list, delete.

A vector is a row of its own on the ledger. A dose that acts is an edit of method "steering": its patch
holds what is added, so that replay, revert, reapply, history and integrity are those of every edit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from editors.errors import EditError, InvalidEdit
from editors.patch import load, save
from editors.steering.choices import Answers, Combine, Method, Positions
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
from editors.steering.pairs import Pair, check_pairs, spelled_out
from editors.steering.prompts import instructed
from editors.steering.scores import NEUTRAL_PROMPTS
from editors.steering.stack import KIND, Dose, dose_of
from editors.steering.states import Report, Side, States, pair_states, sides_of
from editors.steering.vector import SteeringVector, check_name, made
from server.errors import Conflict, ServiceError
from server.facts.editing import PENDING, adopt, without
from server.request_context import RequestContext
from server.steering.results import (
    ActiveDose,
    LayerSeparation,
    Sample,
    SteeringList,
    SteeringState,
    VectorDeleted,
    VectorReport,
    VectorRow,
)
from server.transaction.host import ActivePatch
from server.transaction.workspace import Workspace, digest, who
from store import EditRecord, NewPatch, VectorRecord

FEW = 8  # pairs below which a direction is mostly noise
STRONGEST = 4.0  # multiples of the hidden norm beyond which no text is left
SOUND = 1.6  # perplexity ratio beyond which a warning is due
NEAR_BEST = 0.8  # layers this close to the best separation act together
MOST_LAYERS = 5
SAMPLE_TOKENS = 24


@dataclass(frozen=True)
class NewVector:
    """What create was asked for."""

    name: str
    method: Method
    pairs: Sequence[Pair] | None = None
    positive_prompt: str | None = None
    negative_prompt: str | None = None
    layers: Sequence[int] | None = None
    positions: Positions = "answer"
    replace: bool = False
    reason: str | None = None
    answers: Answers = "as_given"


def create(workspace: Workspace, asked: NewVector, ctx: RequestContext) -> VectorReport:
    """Make a vector from the pristine model and keep it. Raises InvalidEdit, Conflict, ReadOnly."""
    started = time.monotonic()
    model_id = workspace.writable_model_id
    name = check_name(asked.name)
    old = _may_create(workspace, model_id, asked)
    if asked.pairs and asked.answers == "texts":
        asked = replace(asked, pairs=spelled_out(asked.pairs))
    layers = None if asked.layers is None else layers_by_name(workspace.lm.n_layers, asked.layers)

    def report(fraction: float, message: str) -> None:
        ctx.check()
        ctx.progress(fraction, 1.0, message)

    with workspace.host.pristine():
        sides = _sides(workspace, asked)
        vector, sweep = _made(workspace, asked, sides, layers, report)
    separation = _mean_of(sweep, vector.layers, "d_prime")
    norm = _norm(vector)
    about = {
        "method": vector.method,
        "layers": list(vector.layers),
        "norm": norm,
        "separation": separation,
        "pairs": len(sides),
        "positions": asked.positions,
        "answers": asked.answers,
        "sweep": [row.model_dump() for row in sweep],
        "environment": workspace.environment(),
    }
    ctx.check()
    if old is not None:
        workspace.ledger.remove_vector(model_id, name, who(ctx), reason="replaced by one of the same name")
    workspace.ledger.record_vector(model_id, name, save(vector), about, who(ctx), asked.reason)
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
        warnings=_warnings(len(sides), asked.method, separation),
        next=f"calibrate_steering({name!r}) finds the strongest sound dose; evaluate_steering({name!r}) shows what "
        "doses do.",
    )


def _may_create(workspace: Workspace, model_id: int, asked: NewVector) -> VectorRecord | None:
    old = workspace.ledger.find_vector(model_id, asked.name)
    if old is None:
        return None
    if not asked.replace:
        raise Conflict(
            f"there is a steering vector {asked.name!r} already (method {old.method}); choose another name, or "
            "call again with replace=true"
        )
    refuse_active(workspace, asked.name, "replaced")
    return old


def refuse_active(workspace: Workspace, name: str, what: str) -> None:
    """Raise Conflict when a vector is switched on."""
    if dose := active_dose(workspace, name):
        raise Conflict(
            f"{name!r} is switched on (multiplier {dose.target}, {dose.id}) and cannot be {what}; "
            f"set_steering({name!r}, 0) first"
        )


def _sides(workspace: Workspace, asked: NewVector) -> list[tuple[Side, Side]]:
    if asked.method == "prompt":
        if asked.pairs is not None:
            raise InvalidEdit(
                "method prompt takes positive_prompt and negative_prompt, not pairs; leave pairs out"
            )
        if not asked.positive_prompt or not asked.positive_prompt.strip():
            raise InvalidEdit(
                "method prompt needs positive_prompt, the instruction that the vector stands for"
            )
        negative = (asked.negative_prompt or "").strip() or None
        if negative == asked.positive_prompt.strip():
            raise InvalidEdit("positive_prompt and negative_prompt are the same; they must differ")
        return instructed(workspace.lm, asked.positive_prompt.strip(), negative)
    if asked.positive_prompt or asked.negative_prompt:
        raise InvalidEdit(
            f"positive_prompt and negative_prompt belong to method prompt, not to {asked.method}"
        )
    pairs = list(asked.pairs or [])
    check_pairs(pairs)
    return sides_of(workspace.lm, pairs)


def _made(
    workspace: Workspace,
    asked: NewVector,
    sides: list[tuple[Side, Side]],
    layers: tuple[int, ...] | None,
    report: Report,
) -> tuple[SteeringVector, list[LayerSeparation]]:
    info: dict[str, Any] = {"name": asked.name, "positions": asked.positions, "pairs": len(sides)}
    if asked.method == "lm_steer":
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
    states = pair_states(workspace.lm, sides, asked.positions, report)
    direction = pca if asked.method == "pca" else caa
    groups = answer_groups(asked.pairs or ())
    told = separations(states, direction, groups)
    sweep = _sweep(states, told)
    chosen = layers or best_layers([s.d_prime for s in told] if told else [row.shift for row in sweep])
    return made(
        asked.method, chosen, fitted(states.differences, direction, groups), states.norms, info
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


# --- switching on and off ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What set_steering was asked for."""

    name: str
    multiplier: float
    layers: Sequence[int] | None = None
    combine: Combine = "add"
    prompt_tokens: bool = True
    sample_prompt: str | None = None
    reason: str | None = None


def set_dose(workspace: Workspace, asked: Setting, ctx: RequestContext) -> SteeringState:
    """Switch a vector on at a multiplier, change its dose, or (0) take it off."""
    started = time.monotonic()
    _ = workspace.writable_model_id
    current = active_dose(workspace, check_name(asked.name))
    if not -STRONGEST <= asked.multiplier <= STRONGEST:
        raise InvalidEdit(
            f"multiplier {asked.multiplier:g} is out of range; it counts in mean hidden norms and lies between "
            f"{-STRONGEST:g} and {STRONGEST:g} (useful doses are mostly below 0.5; calibrate_steering finds them)"
        )
    dose = None
    if asked.multiplier != 0:
        vector = chosen_layers(workspace, vector_named(workspace, asked.name), asked.layers)
        dose = dose_of(asked.name, vector, asked.multiplier, asked.combine, asked.prompt_tokens)
    elif current is None:
        vector_named(workspace, asked.name)  # an unknown name is an error all the same
    prompt = asked.sample_prompt or NEUTRAL_PROMPTS[0]
    before = _sample(workspace, prompt)
    rest, restack = without(workspace, [current] if current else [])
    data = save(dose) if dose is not None else b""
    same = current is None if dose is None else _same(workspace, current, data)
    new = None if dose is None else ActivePatch(-1, PENDING, KIND, dose, (0,), digest(data))
    if same:
        return _state(workspace, False, Sample(prompt=prompt, before=before, after=before), started)
    with workspace.host.trial([*rest, new] if new else rest):
        after = _sample(workspace, prompt)
        ctx.check()
        if new is not None and dose is not None:
            record = _record(workspace, asked, dose, data)
            ids = workspace.ledger.record_applied(
                record, who(ctx), replaced=[current.id] if current else [], restack=restack
            )
            workspace.host.keep()
            adopt(workspace, rest, new, ids[0])
        elif current is not None:
            workspace.ledger.record_reverted(
                [current.id],
                workspace.host.weights_hash,
                who(ctx),
                reason=asked.reason,
                restack=restack,
                state_hash=workspace.state_hash,
            )
            workspace.host.keep()
    return _state(workspace, True, Sample(prompt=prompt, before=before, after=after), started)


def _same(workspace: Workspace, current: EditRecord | None, data: bytes) -> bool:
    return current is not None and workspace.ledger.get_patch(current.patch_id).blob == digest(data)


def _record(workspace: Workspace, asked: Setting, dose: Dose, data: bytes) -> NewPatch:
    return NewPatch(
        model_id=workspace.writable_model_id,
        method=KIND,
        params=dict(dose.info),
        kind=KIND,
        blob=data,
        requests=[
            {"subject": asked.name, "prompt": prompt_of(asked.name), "target": f"{asked.multiplier:+g}"}
        ],
        weights_hash_before=workspace.host.weights_hash,
        weights_hash_after=workspace.host.weights_hash,
        state_hash=workspace.state_hash,
        environment=workspace.environment(),
        reason=asked.reason,
    )


def prompt_of(name: str) -> str:
    """What stands for the prompt in the row of a dose: by it two doses of one vector are the same question."""
    return f"steering {name}"


def _sample(workspace: Workspace, prompt: str) -> str:
    return workspace.lm.generate([workspace.lm.prompt(prompt)], SAMPLE_TOKENS)[0].text.strip()


def _state(workspace: Workspace, changed: bool, sample: Sample, started: float) -> SteeringState:
    drift = workspace.drift()
    ratio = drift.perplexity_after / drift.perplexity_before
    active = active_doses(workspace)
    warnings = []
    if active and ratio > SOUND:
        warnings.append(
            f"perplexity on fixed texts is {ratio:.1f} times the pristine model's: the text breaks at this dose; "
            f"calibrate_steering({active[-1].name!r}) finds the strongest sound one"
        )
    return SteeringState(
        active=active,
        changed=changed,
        sample=sample,
        weights_hash=workspace.host.weights_hash,
        state_hash=workspace.state_hash,
        perplexity_ratio=ratio,
        seconds=time.monotonic() - started,
        warnings=warnings,
        next="ask_model(compare_to_base=true) shows the difference; a multiplier of 0 takes it off again."
        if active
        else "No steering is on.",
    )


# --- what there is -----------------------------------------------------------------------------------


def vector_named(workspace: Workspace, name: str) -> SteeringVector:
    """A stored vector. Raises WorkbenchError naming those there are."""
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


def chosen_layers(
    workspace: Workspace, vector: SteeringVector, layers: Sequence[int] | None
) -> SteeringVector:
    """The vector on other layers than its own."""
    if layers is None:
        return vector
    if vector.is_map:
        raise InvalidEdit("lm_steer acts on the output embeddings and has no layers; leave layers out")
    return replace(vector, layers=layers_by_name(workspace.lm.n_layers, layers))


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


def delete(workspace: Workspace, name: str, reason: str | None, ctx: RequestContext) -> VectorDeleted:
    """Forget a vector that is not switched on; its past doses stay on the ledger and can be reapplied."""
    model_id = workspace.writable_model_id
    vector_named(workspace, check_name(name))
    refuse_active(workspace, name, "deleted")
    workspace.ledger.remove_vector(model_id, name, who(ctx), reason)
    return VectorDeleted(deleted=name, remaining=[v.name for v in workspace.ledger.vectors(model_id)])

"""Switch a steering vector on at a dose, change the dose, or take it off."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from editors.errors import InvalidEdit
from editors.patch import save
from editors.steering.choices import Combine
from editors.steering.scores import NEUTRAL_PROMPTS
from editors.steering.stack import KIND, Dose, dose_of
from editors.steering.vector import check_name
from server.facts.editing import PENDING, adopt, without
from server.request_context import RequestContext
from server.steering.results import Sample, SteeringState
from server.steering.stored import active_dose, active_doses, chosen_layers, prompt_of, vector_named
from server.transaction.host import ActivePatch
from server.transaction.workspace import Workspace, digest, who
from store import EditRecord, NewPatch

STRONGEST = 4.0  # multiples of the hidden norm beyond which no text is left
SOUND = 1.6  # perplexity ratio beyond which a warning is due
SAMPLE_TOKENS = 24


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

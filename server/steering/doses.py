"""Switch a steering vector on at a dose, change the dose, or take it off."""

from __future__ import annotations

import json
import time

import torch

from editors.canaries import DriftResult
from editors.constants import limit
from editors.errors import InvalidEdit
from editors.model.activations import record
from editors.patch import save
from editors.steering.condition import Condition
from editors.steering.scores import NEUTRAL_PROMPTS
from editors.steering.stack import KIND, Dose, unsteered
from editors.steering.vector import ablation_of, check_name, dose_of, on_condition
from server.request_context import RequestContext
from server.steering.requests import DoseRequest
from server.steering.results import Sample, SteeringState
from server.steering.stored import active_dose, active_doses, prompt_of, vector_named
from server.transaction.stack import digest, without
from server.transaction.transaction import Transaction
from server.transaction.workspace import Workspace, who
from store import EditRecord

STRONGEST = limit(
    4.0,
    "largest multiplier of a dose, in mean hidden norms",
    "protects from typing errors: useful doses are 0.1 to 0.3; a larger one is refused",
)
SOUND = limit(
    1.6,
    "perplexity ratio on fixed texts above which set_steering warns",
    "decides a warning alone; a little above calibrate_steering's usual bound of 1.5",
)
SAMPLE_TOKENS = 24


def set_dose(workspace: Workspace, request: DoseRequest, ctx: RequestContext) -> SteeringState:
    """Switch a vector on at a multiplier, change its dose, or (0) take it off."""
    started = time.monotonic()
    _ = workspace.writable_model_id
    current = active_dose(workspace, check_name(request.name))
    dose = dose_asked(workspace, request, known=current is not None)
    prompt = _sample_prompt(request)
    cosine = None if dose is None or dose.condition is None else _cosine(workspace, dose.condition, prompt)
    if dose is None and current is None:
        return _unchanged(workspace, prompt, cosine, started)
    if dose is not None and current is not None and _is_live(workspace, current, dose):
        return _unchanged(workspace, prompt, cosine, started)
    before = _sample(workspace, prompt)
    change = without(workspace, [current] if current else [])
    with Transaction(workspace) as tx:
        tx.stage(change.stack)
        staged = None if dose is None else tx.add(KIND, dose, rows=1)
        after = _sample(workspace, prompt)
        drift = workspace.drift()
        ctx.check()
        old = [current.id] if current else []
        if staged is None or dose is None:
            tx.commit_reverted(old, who(ctx), restack=change.restack, reason=request.reason)
        else:
            row = {
                "subject": request.name,
                "prompt": prompt_of(request.name),
                "target": "ablated" if request.mode == "ablate" else f"{request.multiplier:+g}",
            }
            record = tx.describe(staged, [row], dose.info, reason=request.reason)
            tx.commit_applied([record], who(ctx), replaced=old, restack=change.restack)
    sample = Sample(prompt=prompt, before=before, after=after, cosine=cosine)
    return _state(workspace, drift, True, sample, started)


def _cosine(workspace: Workspace, condition: Condition, prompt: str) -> float | None:
    """The cosine that the condition compares, at the prompt's last token; None if the decoder reads no prompt."""
    lm = workspace.lm
    if not lm.decoder_reads_prompt:
        return None
    ids = torch.tensor([lm.encode(lm.prompt(prompt))[0]], device=lm.device)
    with unsteered(lm), torch.no_grad(), record({0: lm.layers[condition.layer]}) as states:
        lm.base_model(input_ids=ids)
    return float(condition.score(states[0][0, -1]))


def dose_asked(workspace: Workspace, request: DoseRequest, known: bool = False) -> Dose | None:
    """The requested dose: a vector that is added, or a direction that is removed; None for multiplier 0.

    `known`: an unknown name is no error for multiplier 0. Raises InvalidEdit, ServiceError.
    """
    if not -STRONGEST <= request.multiplier <= STRONGEST:
        raise InvalidEdit(
            f"multiplier {request.multiplier:g} is out of range; its unit is the mean hidden norm, and it must "
            f"be between "
            f"{-STRONGEST:g} and {STRONGEST:g} (useful doses are mostly below 0.5; calibrate_steering finds them)"
        )
    if request.multiplier == 0:
        if not known:
            vector_named(workspace, request.name)
        return None
    return _dose(workspace, request)


def _dose(workspace: Workspace, request: DoseRequest) -> Dose:
    vector = vector_named(workspace, request.name).at_layers(request.layers, workspace.lm.n_layers)
    if request.mode == "add":
        dose = dose_of(request.name, vector, request.multiplier, request.combine, request.prompt_tokens)
        if request.when is None:
            return dose
        probe = vector_named(workspace, request.when.vector)
        return on_condition(dose, request.when.vector, probe, request.when.above, request.when.layer)
    if request.when is not None:
        raise InvalidEdit(
            'mode "ablate" removes a direction from every state and takes no condition; leave `when` out'
        )
    if request.multiplier != 1 or request.combine != "add" or not request.prompt_tokens:
        raise InvalidEdit(
            'mode "ablate" removes a direction from every state completely: give multiplier 1 (0 ends it) and '
            "leave combine and prompt_tokens out"
        )
    if request.layers is not None and len(request.layers) != 1:
        raise InvalidEdit(
            f'mode "ablate" takes the direction of one layer, and layers names {len(request.layers)}'
        )
    return ablation_of(request.name, vector)


def _unchanged(workspace: Workspace, prompt: str, cosine: float | None, started: float) -> SteeringState:
    text = _sample(workspace, prompt)
    sample = Sample(prompt=prompt, before=text, after=text, cosine=cosine)
    return _state(workspace, workspace.drift(), False, sample, started)


def _is_live(workspace: Workspace, current: EditRecord, dose: Dose) -> bool:
    """True when the active dose is this very one."""
    return workspace.ledger.get_patch(current.patch_id).blob == digest(save(dose))


def _sample_prompt(request: DoseRequest) -> str:
    return request.sample_prompt or NEUTRAL_PROMPTS[0]


def _sample(workspace: Workspace, prompt: str) -> str:
    return workspace.lm.generate([workspace.lm.prompt(prompt)], SAMPLE_TOKENS)[0].text.strip()


def _state(
    workspace: Workspace, drift: DriftResult, changed: bool, sample: Sample, started: float
) -> SteeringState:
    ratio = drift.perplexity_after / drift.perplexity_before
    active = active_doses(workspace)
    warnings = []
    if active and ratio > SOUND:
        warnings.append(
            f"perplexity on fixed texts is {ratio:.1f} times the pristine model's: the text breaks at this dose; "
            f"calibrate_steering({active[-1].name!r}) finds the strongest sound one"
        )
    asked = [dose.when["above"] for dose in active if dose.when]
    if asked and sample.cosine is not None and sample.cosine <= min(asked):
        warnings.append(
            f"the condition does not hold at the end of the sample's prompt: its cosine is {sample.cosine:.3f}, and "
            f"steering acts above {min(asked):g}"
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
        next=f"ask_model(prompt={json.dumps(sample.prompt, ensure_ascii=False)}, compare_to_base=true) shows the "
        "difference; a multiplier of 0 takes it off again."
        if active
        else "No steering is on.",
    )

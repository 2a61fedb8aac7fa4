"""The profile of a model: the parameters that a calibration found best on it, and what edits with them achieve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from editors.errors import EditError
from server.methods import ModelDefaults, checked_params, editor_named
from server.transaction.workspace import Workspace

CALIBRATED = "editing_calibrated"
"""The kind of the ledger's event. Its payload: methods (each with params, held_out, tried), facts, seed, job."""


@dataclass(frozen=True)
class Profile:
    """What the last calibration of this model found."""

    event: int
    at: str
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def line(self, method: str) -> str:
        """What an edit by this method achieves on this model and what it costs, in one line; empty if not known."""
        found = self.methods.get(method)
        return "" if found is None else f"on this model {method}: {described(found['held_out'])}"


def described(held_out: Mapping[str, Any]) -> str:
    """The figures of a calibration, of facts that no parameter was chosen on."""
    names = {
        "reliability": "said",
        "generality": "reworded",
        "locality": "neighbours kept",
        "subject_locality": "subject's other facts kept",
    }
    rates = [f"{held_out[key]:.2f} {name}" for key, name in names.items() if held_out.get(key) is not None]
    return f"{', '.join(rates)}, perplexity x{held_out['perplexity_ratio']:.2f} ({held_out['facts']} facts)"


def profile_of(workspace: Workspace) -> Profile | None:
    """The last profile of the loaded model on the ledger; None where it was never calibrated."""
    if workspace.model_id is None:
        return None
    event = workspace.ledger.last_event(CALIBRATED, {}, model_id=workspace.model_id)
    return None if event is None else Profile(event.seq, event.at, event.payload["methods"])


def use_profile(workspace: Workspace) -> None:
    """Make the profile's parameters the defaults of the methods on this model.

    Those of another version that a method does not accept any more are left out.
    """
    profile, defaults = profile_of(workspace), workspace.lm.extension(ModelDefaults)
    found: dict[str, dict[str, Any]] = {}
    for method, entry in (profile.methods if profile else {}).items():
        try:
            checked_params(editor_named(method), workspace.lm, entry["params"], own=False)
        except EditError:
            continue
        found[method] = dict(entry["params"])
    defaults.params = found


def profile_note(workspace: Workspace, method: str, params: Mapping[str, Any]) -> str:
    """For a report: the parameters that came from the profile, and its figures for the method; empty without a
    profile."""
    profile, own = profile_of(workspace), workspace.lm.extension(ModelDefaults).params.get(method)
    if profile is None or own is None:
        return ""
    used = {name: value for name, value in own.items() if params.get(name) == value}
    values = ", ".join(f"{name}={value}" for name, value in used.items()) or "the method's own parameters"
    return (
        f"profile of this model (event {profile.event}, calibrate_editing): {values}; {profile.line(method)}"
    )

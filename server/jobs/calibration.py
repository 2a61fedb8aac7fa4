"""The job that calibrates editing: which layers and strength fit this model, measured on facts that it knows.

Half of the facts choose the parameters. The other half give the figures of the profile, so nothing was chosen on
them. What is measured is kept in the job's folder, so that an interrupted job goes on where it stopped.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from editors import METHODS
from editors.canaries import Canaries
from editors.constants import assumed
from editors.edit import Edit
from editors.errors import InvalidEdit
from editors.files import write_atomically
from editors.measure import Observation, observe
from editors.method import EditContext, Editor
from editors.model.caches import last_read
from editors.model.lm import LM
from editors.outcomes import outcomes
from editors.patch import join_deltas
from server.errors import ServiceError
from server.facts.layer_trials import MARGIN, layer_field, layers_of
from server.facts.profile import CALIBRATED, described, use_profile
from server.jobs.job import Job
from server.jobs.known_facts import known_edits
from server.methods import checked_params
from server.transaction.model_lock import Turn
from server.transaction.workspace import Workspace
from store import Who

KIND = "calibrate_editing"
USUAL = ("rome", "memit", "alphaedit")
"""Methods that are calibrated unless others are named: those that write weights and whose strength is a clamp."""
SEED = 20240607
LEAST = 8  # facts: four to choose by, four to report
STRENGTHS = assumed(
    (0.6, 1.6), "clamps that a calibration tries, as multiples of the model's own", "set by hand"
)
SHIFTS = assumed(
    (-0.08, 0.12),
    "layers that a calibration tries, from the method's own, as shares of the depth",
    "set by hand",
)
COST = assumed(
    5.0,
    "Share of the score that a calibration takes off for each 1 of growth of the perplexity.",
    "x1.1, which is the standing bound for one edit, takes half",
)


def check(workspace: Workspace, methods: Sequence[str] | None, facts: int) -> dict[str, Any]:
    """The job's request. Raises InvalidEdit for a method that cannot be calibrated on this model."""
    lm = workspace.lm
    wanted = (
        list(dict.fromkeys(methods)) if methods else [m for m in USUAL if METHODS[m].supports(lm) is None]
    )
    if not wanted:
        raise InvalidEdit(
            f"{', '.join(USUAL)} do not work on {lm.arch.family}; there is nothing to calibrate, and other methods "
            "keep their defaults"
        )
    for i, name in enumerate(wanted):
        if name not in USUAL:
            raise InvalidEdit(
                f"methods[{i}] {name!r} cannot be calibrated; those that can are {', '.join(USUAL)}"
            )
        if reason := METHODS[name].supports(lm):
            raise InvalidEdit(f"methods[{i}]: {reason}")
    return {"methods": wanted, "facts": facts, "seed": SEED}


def run(workspace: Workspace, job: Job) -> Mapping[str, Any]:
    """Measure, choose, measure the choice on the other facts, and record the profile."""
    calibration = _CalibrationRun(workspace, job)
    edits = calibration.edits()
    half = len(edits) // 2
    methods = {}
    for i, name in enumerate(job.request["methods"]):
        calibration.share = (0.1 + 0.85 * i / len(job.request["methods"]), 0.85 / len(job.request["methods"]))
        methods[name] = calibration.method(METHODS[name], edits[:half], edits[half:])
    result = {"methods": methods, "facts": len(edits), "seed": job.request["seed"], "job": job.id}
    identity = job.request.get("identity")
    event = workspace.ledger.record_event(
        CALIBRATED, result, Who(identity=identity), model_id=workspace.writable_model_id
    )
    with workspace.turn(check=job.check, bounded=False):
        use_profile(workspace)
    path = workspace.settings.home / "profiles" / f"{workspace.base_hash[:16]}.json"
    write_atomically(path, json.dumps(result, indent=2).encode())
    lines = [f"{name}: {described(found['held_out'])}" for name, found in methods.items()]
    return {**result, "event": event, "file": str(path), "summary": lines}


@dataclass
class _CalibrationRun:
    workspace: Workspace
    job: Job
    share: tuple[float, float] = (0.0, 0.1)  # where the progress of what is done now starts, and its span

    def edits(self) -> list[Edit]:
        """Facts that the model knows. Raises ServiceError for too few."""

        def report(fraction: float, message: str) -> None:
            self.job.report(0.1 * fraction, message)

        def ask() -> list[dict[str, Any]]:
            with self.job.turn() as lm:
                found = known_edits(lm, self.job.request["facts"], self.job.request["seed"], report)
            return [edit.model_dump(mode="json") for edit in found]

        edits = [Edit.model_validate(record) for record in self._kept("facts", ask)]
        if len(edits) < LEAST:
            raise ServiceError(
                f"the model knows {len(edits)} of the shipped facts well enough to edit them, and a calibration needs "
                f"{LEAST}; its methods keep their own defaults"
            )
        return edits

    def method(self, editor: Editor[Any], choose: Sequence[Edit], report: Sequence[Edit]) -> dict[str, Any]:
        """The entry of one method: its own parameters, other layers, then other strengths at the best layers."""
        own = _steering_params(editor, self.workspace.lm, {})
        tried = [self._tried(editor, own, choose, 0)]
        for i, params in enumerate(_other_layers(editor, self.workspace.lm, own)):
            tried.append(self._tried(editor, params, choose, 1 + i))
        best = _best(tried)
        for i, factor in enumerate(STRENGTHS):
            stronger = {**best["params"], "clamp": float(f"{best['params']['clamp'] * factor:.3g}")}
            tried.append(self._tried(editor, stronger, choose, 3 + i))
        best = _best(tried)
        held_out = self._measured(editor, best["params"], report, "held-out", 5)
        return {"params": best["params"], "held_out": held_out, "tried": tried, "own": best is tried[0]}

    def _tried(
        self, editor: Editor[Any], params: dict[str, Any], edits: Sequence[Edit], step: int
    ) -> dict[str, Any]:
        found = self._measured(editor, params, edits, "choosing", step)
        point = {"params": params, **found, "score": score(found)}
        self.job.metric(
            {"step": self._step(editor, step), "success": success(found), "score": point["score"]}
            | {"perplexity_ratio": found["perplexity_ratio"]}
        )
        return point

    def _step(self, editor: Editor[Any], step: int) -> int:
        names: list[str] = self.job.request["methods"]
        return 10 * names.index(editor.name) + step

    def _measured(
        self, editor: Editor[Any], params: dict[str, Any], edits: Sequence[Edit], what: str, step: int
    ) -> dict[str, Any]:
        """Rates and cost of these edits, one by one or, where the method takes batches, in one call."""
        start, span = self.share
        self.job.report(start + span * step / 6, f"{editor.name} with {_short(params)} ({what})")

        def measure() -> dict[str, Any]:
            groups = [edits] if editor.batch else [[edit] for edit in edits]
            return _joined([self._group(editor, params, group) for group in groups])

        found: dict[str, Any] = self._kept(f"{editor.name}-{what}-{_short(params)}", measure)
        return found

    def _group(self, editor: Editor[Any], given: dict[str, Any], edits: Sequence[Edit]) -> dict[str, Any]:
        """One patch on the pristine model: computed, put on, measured, taken off."""
        turn = Turn(self.job.turn, self.workspace.host.borrowed)

        def report(*_: Any) -> None:
            self.job.check()
            turn.give_way()

        with turn.taken() as lm:
            params = checked_params(editor, lm, given, own=False)
            editor.ensure_statistics(lm, params, self.workspace.statistics, report)
            canaries, before = Canaries(lm), observe(lm, edits)
            context = EditContext(self.workspace.statistics, report=report)
            patch = editor.compute(lm, edits, params, context)
            with lm.patched(join_deltas([patch])):
                return _rates(edits, before, observe(lm, edits), canaries.drift(lm))

    def _kept(self, name: str, make: Any) -> Any:
        """What was measured before an interruption, or is measured now."""
        path = self.job.folder / f"{''.join(c if c.isalnum() or c in '-.' else '_' for c in name)}.json"
        if not path.exists():
            write_atomically(path, json.dumps(make()).encode())
        return json.loads(path.read_text("utf-8"))


def _rates(edits: Sequence[Edit], before: Observation, after: Observation, drift: Any) -> dict[str, Any]:
    found = outcomes(edits, before, after)
    kinds = {"generality": "paraphrase", "locality": "neighbour", "subject_locality": "portability"}
    return {
        "reliability": [o.reliability for o in found],
        **{name: [r for o in found if (r := o.rate(kind)) is not None] for name, kind in kinds.items()},  # type: ignore[arg-type]
        "perplexity_ratio": drift.perplexity_after / drift.perplexity_before,
    }


def _joined(groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the facts of all groups; of the perplexity the worst."""
    joined: dict[str, Any] = {"facts": sum(len(group["reliability"]) for group in groups)}
    for name in ("reliability", "generality", "locality", "subject_locality"):
        values = [value for group in groups for value in group[name]]
        joined[name] = round(statistics.fmean(values), 4) if values else None
    joined["perplexity_ratio"] = round(max(group["perplexity_ratio"] for group in groups), 4)
    return joined


def success(found: Mapping[str, Any]) -> float:
    """The harmonic mean of the rates, so that a high one cannot make up for a low one."""
    rates = [found[k] for k in ("reliability", "generality", "locality", "subject_locality")]
    return _harmonic([rate for rate in rates if rate is not None])


def score(found: Mapping[str, Any]) -> float:
    """Success against damage: the perplexity counts as a rate that falls from 1 (see COST)."""
    kept = 1 - COST * max(0.0, found["perplexity_ratio"] - 1)
    return round(_harmonic([success(found), kept]), 4)


def _harmonic(rates: Sequence[float]) -> float:
    return len(rates) / sum(1 / max(rate, 0.01) for rate in rates)


def _best(tried: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The best score; but the method's own parameters, which come first, unless another is clearly better."""
    best = max(tried, key=lambda point: point["score"])
    return best if best["score"] > tried[0]["score"] + MARGIN else tried[0]


def _steering_params(editor: Editor[Any], lm: LM, given: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a method that a calibration chooses: its layers and its clamp."""
    params = checked_params(editor, lm, given, own=False)
    values = params.model_dump(mode="json")
    return {name: values[name] for name in (layer_field(editor), "clamp")}


def _other_layers(editor: Editor[Any], lm: LM, own: dict[str, Any]) -> list[dict[str, Any]]:
    """The same parameters at layers below and above the method's own, as wide as they are."""
    name = layer_field(editor)
    layers = layers_of(checked_params(editor, lm, own, own=False), name)
    found = []
    for share in SHIFTS:
        shift = round(share * lm.n_layers) or (1 if share > 0 else -1)
        moved = [layer + shift for layer in layers]
        if moved[0] >= 0 and moved[-1] <= last_read(lm):
            found.append({**own, name: moved[0] if name == "layer" else moved})
    return found


def _short(params: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in params.items())

"""Find the strongest doses of a vector that keep the model's text intact."""

from __future__ import annotations

import time

from editors.constants import assumed, limit
from editors.errors import InvalidEdit
from editors.steering.scores import NEUTRAL_PROMPTS, fixed_texts, perplexity
from server.request_context import RequestContext
from server.steering.requests import TEXT_TOKENS, CalibrationRequest
from server.steering.results import Calibration, DosePoint
from server.steering.steered import STRONGEST_MEASURED, SteeredModel, stack_without, texts_of
from server.steering.stored import vector_named
from server.transaction.transaction import Transaction
from server.transaction.workspace import Workspace, who

CALIBRATED = "calibrated"
"""Kind of the event that keeps a curve; the board shows the newest of each vector."""
FIRST_DOSE = assumed(
    0.1, "first multiplier that calibrate_steering tries", "useful doses are mostly above it"
)
GROWTH = limit(
    1.6,
    "factor from one dose tried to the next",
    "time: a smaller factor finds the strongest good dose more exactly, with more doses tried",
)
HALVINGS = limit(
    2,
    "how often the gap between the last good and the first bad dose is halved",
    "time: one more halves the error of the dose that is found",
)


def calibrate(workspace: Workspace, request: CalibrationRequest, ctx: RequestContext) -> Calibration:
    """Find the strongest doses whose perplexity ratio (see DosePoint) is within the bound.

    The model stays as it is; the curve is kept on the ledger.
    """
    started = time.monotonic()
    vector = vector_named(workspace, request.name).at_layers(request.layers, workspace.lm.n_layers)
    if not 1 < request.max_perplexity_ratio <= 100:
        raise InvalidEdit(
            f"max_perplexity_ratio {request.max_perplexity_ratio:g} must lie above 1 and be at most 100; 1.5 is usual"
        )
    with Transaction(workspace) as tx:
        tx.stage(stack_without(workspace, request.name))
        search = _DoseSearch(
            SteeredModel(workspace, vector, request.name, "add", True), request.max_perplexity_ratio, ctx
        )
        positive = search.strongest(1)
        negative = search.strongest(-1) if request.both else None
    curve = sorted(search.curve.values(), key=lambda point: point.multiplier)
    result = Calibration(
        name=request.name,
        multiplier=positive,
        negative_multiplier=negative,
        max_perplexity_ratio=request.max_perplexity_ratio,
        curve=curve,
        seconds=time.monotonic() - started,
        next=f"set_steering({request.name!r}, {positive:g}) switches it on at this dose; evaluate_steering shows "
        "its effect.",
    )
    if not workspace.read_only:
        workspace.ledger.record_event(
            CALIBRATED, result.model_dump(mode="json"), who(ctx), model_id=workspace.model_id
        )
    return result


class _DoseSearch:
    """A search over doses, and the measurement of every dose tried so far."""

    def __init__(self, measure: SteeredModel, bound: float, ctx: RequestContext) -> None:
        self._measure, self._bound, self._ctx = measure, bound, ctx
        lm = measure.lm
        self._fixed = fixed_texts(lm)
        self._prompts = [lm.prompt(text, chat=False) for text in NEUTRAL_PROMPTS]
        self._base_fixed = perplexity(lm, self._fixed)
        self._base_generated = self._generated(0)
        self.curve: dict[float, DosePoint] = {
            0.0: DosePoint(multiplier=0.0, perplexity_ratio=1.0, text_ratio=1.0, generation_ratio=1.0)
        }

    def strongest(self, sign: int) -> float:
        """Raise the dose until it exceeds the bound, then halve the gap. 0 where the first dose and its halves do."""
        good, bad, dose = 0.0, None, FIRST_DOSE
        while bad is None and dose <= STRONGEST_MEASURED:
            if self._holds(sign * dose):
                good, dose = dose, dose * GROWTH
            else:
                bad = dose
        for _ in range(HALVINGS if bad is not None else 0):
            assert bad is not None
            middle = (good + bad) / 2
            if self._holds(sign * middle):
                good = middle
            else:
                bad = middle
        return round(sign * good, 4)

    def _holds(self, multiplier: float) -> bool:
        """Measure a dose; whether it is within the bound."""
        self._ctx.check()
        multiplier = round(multiplier, 4)
        self._ctx.progress(len(self.curve), 20, f"trying {multiplier:+g}")
        with self._measure.at(multiplier):
            text = perplexity(self._measure.lm, self._fixed) / self._base_fixed
        generated = self._generated(multiplier) / self._base_generated if text <= self._bound else None
        ratio = max(text, generated or 0.0)
        self.curve[multiplier] = DosePoint(
            multiplier=multiplier, perplexity_ratio=ratio, text_ratio=text, generation_ratio=generated
        )
        return ratio <= self._bound

    def _generated(self, multiplier: float) -> float:
        """Perplexity, by the unsteered model, of what the steered model writes."""
        with self._measure.at(multiplier):
            texts = texts_of(self._measure.lm, self._prompts, TEXT_TOKENS)
        return perplexity(self._measure.lm, list(zip(self._prompts, texts, strict=True)))

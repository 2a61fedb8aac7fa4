"""SERAC: an explicit memory of edits, a scope classifier, a counterfactual model (Mitchell et al., ICML 2022).

The weights do not change. A prompt in the scope of a remembered edit is answered by the adapted model, with that edit
before the prompt. Every other prompt is answered by the model itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from pydantic import Field

from editors.advice import Remedy
from editors.edit import Edit
from editors.learned.scope import Entry, masked
from editors.learned.serac_files import FILE, load_trained
from editors.learned.serac_judge import THRESHOLD
from editors.learned.serac_memory import RoutePatch
from editors.learned.serac_training import TRAINING
from editors.method import EditContext, Editor, Params
from editors.model.lm import LM
from editors.patch import Patch


class SeracParams(Params):
    """Parameters of an edit by SERAC."""

    threshold: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Probability from which a prompt is in scope; None: the training's, 0.5.",
    )


class SeracEditor(Editor[SeracParams]):
    name = "serac"
    family = "learned"
    title = "Semi-parametric editing with a memory"
    description = (
        "Keeps edits in a memory beside the weights. A trained classifier decides whether a prompt is about one of "
        "them; if so, an adapted model answers with that edit before it, otherwise the model itself, bit for bit."
    )
    source = "Mitchell et al., ICML 2022, arXiv 2206.06520"
    when = "Many edits over time that must not touch anything else, once train_editor has been run for this model."
    cost = "Minutes of training once; an edit is one sentence embedding, a question one more (some 10 ms of CPU)."
    kind = "route"
    batch = True
    stronger = (
        Remedy(
            "threshold",
            "answers more prompts with the edit",
            factor=0.6,
            limit=0.02,
            start=THRESHOLD,
            widens=True,
        ),
    )
    gentler = (
        Remedy("threshold", "answers fewer prompts with the edit", factor=1.3, limit=0.99, start=THRESHOLD),
    )
    params = SeracParams
    training = TRAINING

    def needs(self, lm: LM, context: EditContext) -> list[str]:
        if context.trained is not None and (context.trained / FILE).is_file():
            return []
        return ['a trained memory for this model: call train_editor(method="serac") and wait for its job']

    def compute(self, lm: LM, edits: Sequence[Edit], params: SeracParams, context: EditContext) -> Patch:
        """One remembered edit each. Raises NotReady when nothing has been trained or the encoder is not installed."""
        self.require(lm, context)
        assert context.trained is not None
        path = context.trained / FILE
        trained = load_trained(path, path.stat().st_mtime_ns)
        trained.adapter.check(lm)
        entries = [Entry(e.subject, e.text, e.target) for e in edits]
        for i, edit in enumerate(edits):
            context.report(0.5 * i / len(edits), edit.subject)
        full = trained.encoder.embed([e.prompt for e in entries])
        for i, edit in enumerate(edits):
            context.report(0.5 + 0.5 * i / len(edits), edit.subject)
        without_subject = trained.encoder.embed([masked(e.prompt, e.subject) for e in entries])
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return RoutePatch.of(entries, full, without_subject, digest, params.threshold)

    def subset(self, patch: Patch, rows: Sequence[int], statistics: object) -> Patch:
        """The patch with these edits. Edits do not depend on each other."""
        assert isinstance(patch, RoutePatch)
        return patch.select(rows)

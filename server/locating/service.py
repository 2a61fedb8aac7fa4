"""The service of locating: where a fact is stored, and which layer to edit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from editors.edit import Edit
from server.locating import tracing
from server.locating.results import FactLocation, LayerSuggestion, LocateMethod
from server.request_context import RequestContext
from server.transaction.workspace import Workspace


class LocatingService:
    """Traces and layer trials. Every call takes the model's lock and returns its picture (PNG) beside the result."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    def locate(
        self,
        prompt: str,
        subject: str,
        target: str | None = None,
        method: LocateMethod = "causal_trace",
        paraphrases: Sequence[str] = (),
        samples: int = 5,
        window: int | None = None,
        seed: int = 0,
        ctx: RequestContext | None = None,
    ) -> tuple[FactLocation, bytes]:
        """The sites that carry a fact, and a heat map of them."""
        question = tracing.LocateRequest(prompt, subject, target, method, paraphrases, samples, window, seed)
        with self._workspace.turn(ctx):
            return tracing.locate(self._workspace, question, ctx or RequestContext())

    def suggest_layers(
        self,
        edits: Sequence[Edit],
        method: str = "rome",
        layers: Sequence[int] | None = None,
        params: dict[str, Any] | None = None,
        ctx: RequestContext | None = None,
    ) -> tuple[LayerSuggestion, bytes]:
        """Trial edits at candidate layers, and a picture of the trade-off."""
        with self._workspace.turn(ctx):
            return tracing.suggest_layers(
                self._workspace, edits, method, layers, params, ctx or RequestContext()
            )

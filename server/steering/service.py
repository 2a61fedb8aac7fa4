"""The service of steering: make vectors, dose them, measure doses, list, delete and export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from editors.errors import InvalidEdit
from editors.steering.choices import FileFormat
from editors.steering.pairs import Pair
from server.request_context import RequestContext
from server.steering.calibrating import calibrate
from server.steering.doses import set_dose
from server.steering.evaluating import evaluate
from server.steering.files import export_vector, pairs_of_file
from server.steering.pictures import calibration_picture, evaluation_picture, sweep_picture
from server.steering.requests import CalibrationRequest, DoseRequest, EvaluationRequest, VectorRequest
from server.steering.results import (
    Calibration,
    Evaluation,
    SteeringList,
    SteeringState,
    VectorDeleted,
    VectorExport,
    VectorReport,
)
from server.steering.stored import listing
from server.steering.vectors import create, delete, take_in
from server.transaction.workspace import Workspace


class SteeringService:
    """Steering vectors. Calls that use the model take its lock; `list` reads the ledger alone."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    def create(
        self, request: VectorRequest, ctx: RequestContext | None = None
    ) -> tuple[VectorReport, bytes | None]:
        """Make a vector and keep it. Beside the report: the sweep over layers as PNG, where there is one."""
        request = replace(request, pairs=self._pairs(request.pairs, request.path))
        with self._workspace.turn(ctx):
            report = create(self._workspace, request, ctx or RequestContext())
        picture = sweep_picture(report.name, report.sweep, report.layers) if report.sweep else None
        return report, picture

    def take_in(
        self,
        path: str,
        name: str,
        replace: bool = False,
        reason: str | None = None,
        ctx: RequestContext | None = None,
    ) -> VectorReport:
        """Keep a vector that was made elsewhere, from its file."""
        with self._workspace.turn(ctx):
            return take_in(self._workspace, path, name, replace, reason, ctx or RequestContext())

    def set_dose(self, request: DoseRequest, ctx: RequestContext | None = None) -> SteeringState:
        """Switch a vector on, change its dose, or take it off."""
        with self._workspace.turn(ctx):
            return set_dose(self._workspace, request, ctx or RequestContext())

    def calibrate(
        self, request: CalibrationRequest, ctx: RequestContext | None = None
    ) -> tuple[Calibration, bytes]:
        """The strongest sound doses, and the curve as PNG."""
        with self._workspace.turn(ctx):
            result = calibrate(self._workspace, request, ctx or RequestContext())
        return result, calibration_picture(result)

    def evaluate(
        self, request: EvaluationRequest, ctx: RequestContext | None = None
    ) -> tuple[Evaluation, bytes]:
        """A score at every multiplier, and the curve as PNG."""
        request = replace(request, pairs=self._pairs(request.pairs, request.path))
        with self._workspace.turn(ctx):
            result = evaluate(self._workspace, request, ctx or RequestContext())
        return result, evaluation_picture(result)

    def list(self) -> SteeringList:
        """The vectors there are, and the doses that act."""
        return listing(self._workspace)

    def delete(
        self, name: str, reason: str | None = None, ctx: RequestContext | None = None
    ) -> VectorDeleted:
        """Forget a vector that is not switched on."""
        with self._workspace.turn(ctx):
            return delete(self._workspace, name, reason, ctx or RequestContext())

    def export(
        self,
        name: str,
        format: FileFormat = "gguf",
        file_name: str | None = None,
        multiplier: float = 1.0,
        ctx: RequestContext | None = None,
    ) -> VectorExport:
        """Write a vector to a file under HOME/exports."""
        with self._workspace.turn(ctx):
            return export_vector(self._workspace, name, format, file_name, multiplier)

    def _pairs(self, pairs: Sequence[Pair] | None, path: str | None) -> Sequence[Pair] | None:
        if path is None:
            return pairs
        if pairs is not None:
            raise InvalidEdit("pairs and path were both given; give one of them")
        return pairs_of_file(self._workspace.settings, path)

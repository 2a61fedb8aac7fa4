"""Errors in the form that OpenAI clients read."""

from __future__ import annotations

import logging
import uuid
from typing import Any

from editors.errors import EditError
from server.errors import Busy, ModelUnavailable, ServiceError
from server.exhausted import exhausted

log = logging.getLogger("errata.openai")

_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class ApiError(Exception):
    """A request that cannot be answered: HTTP status, text, the field at fault and a code."""

    def __init__(self, status: int, text: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(text)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """When to try again, where that helps."""
        return {"Retry-After": "2"} if self.status in (429, 503) else {}


def as_api_error(error: BaseException) -> ApiError:
    """Any failure as an ApiError. An unexpected one goes to the log under an id, and the client gets the id."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Busy):
        return ApiError(429, str(error), code="busy")
    if isinstance(error, ModelUnavailable):
        return ApiError(503, str(error), code="model_unavailable")
    if isinstance(error, (EditError, ServiceError)):
        return ApiError(400, str(error))
    if what := exhausted(error):
        return ApiError(503, what, code="exhausted")
    ref = uuid.uuid4().hex[:8]
    log.error("internal error %s", ref, exc_info=error)
    text = f"internal error {ref} ({type(error).__name__}); the log of the server has the details under {ref}"
    return ApiError(500, text, code="internal_error")

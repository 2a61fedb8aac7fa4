"""Lines on stdio that are not messages: a client that waits for an answer to one gets an error.

The SDK drops such a line, and its client would wait until its own time is up. Lone surrogates ("\\ud800") are the
usual reason: many programs write them, JSON allows them, and no UTF-8 text can hold them.
"""

from __future__ import annotations

import json
import logging
from typing import Any

import anyio
from mcp.shared._stream_protocols import ReadStream, WriteStream
from mcp.shared.message import SessionMessage
from mcp_types import INVALID_REQUEST, PARSE_ERROR, ErrorData, JSONRPCError
from pydantic import ValidationError

log = logging.getLogger("errata.tools")

SURROGATE = ("hex escape", "surrogate")
"""What the parser says of one."""


class AnsweredStream:
    """A stream of messages, without those that could not be read. If these have an id, an error answers them."""

    def __init__(
        self, messages: ReadStream[SessionMessage | Exception], answers: WriteStream[SessionMessage]
    ) -> None:
        self._messages, self._answers = messages, answers

    @property
    def last_context(self) -> Any:
        """The SDK runs what follows from a message in the context it came in."""
        return getattr(self._messages, "last_context", None)

    async def receive(self) -> SessionMessage | Exception:
        """The next message that could be read. Raises anyio.EndOfStream."""
        while True:
            item = await self._messages.receive()
            if not isinstance(item, Exception):
                return item
            log.warning("a line on stdin is no message: %s", str(item)[:300])
            if (answer := answer_to(item)) is not None:
                await self._answers.send(SessionMessage(answer))

    async def aclose(self) -> None:
        """Close the stream beneath."""
        await self._messages.aclose()

    def __aiter__(self) -> AnsweredStream:
        return self

    async def __anext__(self) -> SessionMessage | Exception:
        try:
            return await self.receive()
        except anyio.EndOfStream:
            raise StopAsyncIteration from None

    async def __aenter__(self) -> AnsweredStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


def answer_to(failure: Exception) -> JSONRPCError | None:
    """The answer to a line that could not be read; None if it has no id, for then nobody waits."""
    if not isinstance(failure, ValidationError):
        return None
    errors = failure.errors(include_url=False)
    request_id = next((found for error in errors if (found := _id_of(error["input"])) is not None), None)
    if request_id is None:
        return None
    if errors[0]["type"] != "json_invalid":
        text, code = (
            'this is no JSON-RPC request: `method` must be a text and `jsonrpc` "2.0"',
            INVALID_REQUEST,
        )
    else:
        text, code = f"the request cannot be read: {errors[0]['msg']}", PARSE_ERROR
        if any(sign in text for sign in SURROGATE):
            text += "; half of a surrogate pair, such as \\ud800 alone, is no character: leave it out"
    return JSONRPCError(jsonrpc="2.0", id=request_id, error=ErrorData(code=code, message=text))


def _id_of(line: Any) -> str | int | None:
    try:
        message = json.loads(line) if isinstance(line, str) else line
    except (ValueError, RecursionError):
        return None
    if not isinstance(message, dict) or "method" not in message:
        return None
    found = message.get("id")
    if not isinstance(found, (str, int)) or isinstance(found, bool) or _has_surrogate(found):
        return None
    return found


def _has_surrogate(found: str | int) -> bool:
    return isinstance(found, str) and any("\ud800" <= letter <= "\udfff" for letter in found)

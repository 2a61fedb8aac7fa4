"""One tool as it is served: strict arguments, its turn at the model, readable errors, progress."""

from __future__ import annotations

import asyncio
import base64
import contextvars
import functools
import inspect
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.mcpserver.tools import Tool
from mcp.server.mcpserver.utilities.func_metadata import ArgModelBase, FuncMetadata, func_metadata
from mcp.shared.exceptions import MCPError
from mcp_types import CallToolResult, Icon, ImageContent
from pydantic import ConfigDict, Field, ValidationError

from server.priority import give_way
from server.request_context import RequestContext
from server.results import Result
from server.startup import Startup
from tools import _confirming
from tools._answers import rounded, text_of
from tools._arguments import parse
from tools._calls import caller, calling, its_turn
from tools._errors import internal, invalid, is_expected
from tools._toolset import DETAILS, REQUEST, Spec, ToolRequest, log
from tools.app import meta_of

if TYPE_CHECKING:
    from server.services import Services

WAITING = 0.05
"""Share of a call's progress that waiting for the model takes."""


_readers = anyio.CapacityLimiter(16)
"""Calls at once that only read; apart from the default threads, which carry stdin and stdout."""


_workers = ThreadPoolExecutor(32, "errata-model", initializer=give_way)
"""Threads of calls that have their turn at the model: one that works, and cancelled ones that are ending."""


@dataclass(frozen=True)
class FullDescription:
    """A tool as the reference describes it. Clients get a short form of it."""

    description: str
    input_schema: dict[str, Any]
    output_schema: dict[str, Any]


class ErrataTool(Tool):
    """A tool of the SDK with our own running of it: strict arguments, readable errors, progress."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    startup: Startup = Field(exclude=True)
    waits: bool = Field(True, exclude=True)
    takes_turn: bool = Field(True, exclude=True)
    whole: FullDescription = Field(exclude=True)

    @classmethod
    def of(cls, spec: Spec, startup: Startup, icons: list[Icon] | None = None) -> ErrataTool:
        """The tool described by `spec`, served from `startup`'s services."""
        meta = _strict(func_metadata(spec.function, skip_names=[REQUEST], structured_output=True), spec.name)
        arguments = meta.arg_model.model_json_schema(by_alias=True)
        return cls(
            fn=spec.function,
            name=spec.name,
            title=spec.title,
            description=_described(spec.function),
            parameters=arguments,
            whole=FullDescription(_documented(spec.function), arguments, meta.output_schema or {}),
            fn_metadata=meta,
            is_async=inspect.iscoroutinefunction(spec.function),
            context_kwarg=None,
            annotations=spec.annotations,
            icons=icons,
            meta=meta_of(spec.name),
            startup=startup,
            waits=spec.waits,
            takes_turn=spec.takes_turn,
        )

    def shortened(self, input_schema: dict[str, Any], output_schema: dict[str, Any]) -> ErrataTool:
        """The same tool, listed with these schemas."""
        meta = self.fn_metadata.model_copy(update={"output_schema": output_schema})
        return self.model_copy(update={"parameters": input_schema, "fn_metadata": meta})

    async def run(
        self, arguments: dict[str, Any], context: Context[Any, Any], convert_result: bool = False
    ) -> Any:
        """Run the tool; every failure is a `ToolError` that says what was wrong and what to do.

        Raises:
            ToolError: for wrong arguments, expected failures, and internal errors, of which it only has an id.
            MCPError: passed through.
        """
        try:
            given = parse(self.fn_metadata.arg_model, arguments)
        except ValidationError as exc:
            raise invalid(self.name, exc, self.whole.input_schema) from exc
        started = time.monotonic()
        try:
            result, pictures = await self._call(given, context)
            if (again := await _confirming.after(self.name, result, given, context)) is not None:
                result, pictures = await self._call(again, context)
            log.info("%s took %.1f s", self.name, time.monotonic() - started)
            return self._answer(result, pictures, context.protocol_version) if convert_result else result
        except _confirming.Asking as asking:
            return asking.result
        except (ToolError, MCPError):
            raise
        except Exception as exc:
            if is_expected(exc):
                raise ToolError(str(exc)) from exc
            raise internal(self.name, exc) from exc

    async def _call(self, given: dict[str, Any], context: Context[Any, Any]) -> tuple[Any, list[bytes]]:
        async with calling(context) as ctx:
            services = await self.startup.services(ctx.part(0, WAITING)) if self.waits else None
            given = await _confirming.before(self.name, services, given, context)
            request = ToolRequest(self.startup, ctx.part(WAITING, 1), services, identity=caller(context))
            if self.is_async:
                result = await self.fn(request, **given)
            elif services is not None and self.takes_turn:
                result = await self._at_its_turn(services, request, given, ctx)
            else:
                result = await _beside_the_loop(functools.partial(self.fn, request, **given))
            return result, request.pictures

    async def _at_its_turn(
        self, services: Services, request: ToolRequest, given: dict[str, Any], ctx: RequestContext
    ) -> Any:
        async with its_turn(services.workspace.queue, ctx.part(0, WAITING)) as ticket:
            mine = replace(request, ctx=replace(request.ctx, ticket=ticket))
            return await _on_the_model(functools.partial(self.fn, mine, **given))

    def _answer(self, result: Result, pictures: list[bytes], protocol: str | None) -> Any:
        answer = self.fn_metadata.convert_result(result)
        if isinstance(answer, CallToolResult):
            content = answer.structured_content
            answer.structured_content = content = rounded(content) if result.rounded else content
            answer.content = [text_of(content, self.startup.settings.result_text, protocol)]
            answer.content.extend(
                ImageContent(type="image", data=base64.b64encode(png).decode(), mime_type="image/png")
                for png in pictures
            )
        return answer


async def _beside_the_loop(work: Callable[[], Any]) -> Any:
    return await anyio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=_readers)


async def _on_the_model(work: Callable[[], Any]) -> Any:
    """Run `work` in a thread that gives way to others; a cancelled call leaves it to end by itself."""
    return await asyncio.wrap_future(_workers.submit(contextvars.copy_context().run, work))


def _described(function: Callable[..., Any]) -> str:
    """The docstring up to its details."""
    return " ".join(inspect.cleandoc(function.__doc__ or "").partition(DETAILS)[0].split())


def _documented(function: Callable[..., Any]) -> str:
    """The whole docstring, for the reference."""
    return inspect.cleandoc(function.__doc__ or "").replace(DETAILS, "")


def _strict(meta: FuncMetadata, name: str) -> FuncMetadata:
    """The same metadata with an argument model that refuses what it does not know."""

    class Arguments(meta.arg_model):  # type: ignore[name-defined,misc]
        model_config = ConfigDict(extra="forbid", title=f"{name} arguments")

    model: type[ArgModelBase] = Arguments
    return meta.model_copy(update={"arg_model": model})

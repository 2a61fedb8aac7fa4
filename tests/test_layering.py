"""The house rules of the source tree, read from its imports: who may know whom."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import ROOT

MAY_IMPORT = {
    "store": {"store"},
    "editors": {"editors"},
    "server": {"server", "editors", "store"},
    "tools": {"tools", "server", "editors", "store"},
}
COMPOSITION_ROOT = "errata"
SPEAKS_MCP = ("tools", "errata", "server.http.auth", "server.http.sessions")
MCP = {"mcp", "mcp_types"}
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"torch.load", "eval", "exec"}
BEHIND_TRANSFORMERS = {"accelerate", "sentencepiece"}
"""Declared, though only transformers imports them: device maps, GGUF files, some tokenizers."""


OPTIONAL = {"datasets"}
"""Used where it is installed; a clear refusal says so where it is not."""


class Import(NamedTuple):
    """`module` is imported at `line` of the module `importer`."""

    importer: str
    line: int
    module: str

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


@cache
def modules() -> Mapping[str, Path]:
    """Every module of the product, by its dotted name."""
    found = {COMPOSITION_ROOT: ROOT / f"{COMPOSITION_ROOT}.py"}
    for package in MAY_IMPORT:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports_in(importer: str, path: Path) -> Iterator[Import]:
    """Imports anywhere in a file: at the top, inside functions, for type checking alone, and by string.

    `from package import name` counts as `package.name` where that is a module of ours. A text that is the name
    of a module of ours counts as an import of it: something like `import_module` is given it.
    """
    known = modules()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and node.value in known and "." in str(node.value):
            yield Import(importer, node.lineno, node.value)
        if isinstance(node, ast.Import):
            yield from (Import(importer, node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports in full, not relative"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield Import(importer, node.lineno, full if full in known else node.module)


@cache
def all_imports() -> list[Import]:
    return [found for name, path in modules().items() for found in imports_in(name, path)]


def breaches(imports: list[Import]) -> list[str]:
    """The imports that break a rule, each said so that it can be mended."""
    return [f"{i.importer}:{i.line} imports {i.module}: {why}" for i in imports if (why := breach(i))]


def breach(found: Import) -> str | None:
    importer, module, top = found.importer, found.module, found.top
    package = importer.partition(".")[0]
    if top in MCP and not any(importer == name or importer.startswith(f"{name}.") for name in SPEAKS_MCP):
        return f"only {', '.join(SPEAKS_MCP)} speak MCP"
    if importer == COMPOSITION_ROOT:
        return None
    if module == COMPOSITION_ROOT or module.startswith(f"{COMPOSITION_ROOT}."):
        return "only server.py starts the composition root"
    if top in {"tests", "benchmarks", "examples", "docs"}:
        return "the product does not know what stands around it"
    if top in MAY_IMPORT and top not in MAY_IMPORT[package]:
        return f"{package} may import {', '.join(sorted(MAY_IMPORT[package]))} of ours"
    return None


def test_every_import_keeps_to_the_layers() -> None:
    assert breaches(all_imports()) == []


@pytest.mark.parametrize(
    ("importer", "module"),
    [
        ("store.ledger", "editors.edit"),
        ("store.ledger", "server.errors"),
        ("editors.patch", "store.blobs"),
        ("editors.edit", "server.results"),
        ("server.services", "tools.edit"),
        ("server.services", "mcp.server"),
        ("server.transaction.host", "mcp_types"),
        ("editors.edit", "mcp"),
        ("tools.edit", "errata"),
        ("server.transaction.host", "tests.families"),
    ],
)
def test_a_breach_would_be_found(importer: str, module: str) -> None:
    assert len(breaches([Import(importer, 1, module)])) == 1


def test_server_py_does_nothing_but_start_the_app() -> None:
    body = tree(ROOT / "server.py").body
    imported = [i.module for i in imports_in("server.py", ROOT / "server.py")]
    assert imported == [COMPOSITION_ROOT]
    assert not any(isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Assign) for node in body)


def owners() -> dict[str, str]:
    """Module -> the method it belongs to: the method's own module, and those named after it (`mend_training`)."""
    from editors import METHODS

    homes = {type(method).__module__ for method in METHODS.values()}
    found: dict[str, str] = {}
    for name in modules():
        package, _, last = name.rpartition(".")
        for home in homes:
            room, _, method = home.rpartition(".")
            if package == room and (last == method or last.startswith(f"{method}_")):
                found[name] = home
    return found


def test_no_editing_method_knows_another() -> None:
    belongs = owners()
    assert len(set(belongs.values())) > 10
    between = [
        f"{i.importer}:{i.line} imports {i.module}"
        for i in all_imports()
        if i.importer in belongs and i.module in belongs and belongs[i.importer] != belongs[i.module]
    ]
    assert between == []


def test_only_the_table_and_what_stands_on_it_knows_the_methods() -> None:
    belongs = owners()
    homes = set(belongs.values())
    named = [
        f"{i.importer}:{i.line} imports {i.module}"
        for i in all_imports()
        if i.module in homes
        and i.importer.startswith("editors.")
        and i.importer not in {"editors.table", *(m for m, home in belongs.items() if home == i.module)}
    ]
    assert named == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Whatever way an import is written; a package and its own modules count as one another's only by name."""
    arrows: dict[str, set[str]] = {name: set() for name in modules()}
    for found in all_imports():
        lazily_named = found.importer == "editors"  # names for users, each imported at its first use
        if found.module in arrows and found.module != found.importer and not lazily_named:
            arrows[found.importer].add(found.module)
    assert [sorted(circle) for circle in circles(arrows)] == []


def circles(arrows: dict[str, set[str]]) -> list[set[str]]:
    """Strongly connected parts of a graph with more than one member (Tarjan, 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(arrows[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            part = set()
            while True:
                part.add(last := stack.pop())
                if last == node:
                    break
            if len(part) > 1:
                found.append(part)

    for node in sorted(arrows):
        if node not in index:
            visit(node)
    return found


def test_a_circle_would_be_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [{"a", "b", "c"}]
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []


def test_an_import_by_string_or_inside_a_function_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from server.services import Services\n"
        "def f():\n    import_module('editors.table')\n    from store.blobs import Blobs\n"
    )
    seen = {i.module for i in imports_in("store.module", path)}
    assert {"server.services", "editors.table", "store.blobs"} <= seen
    assert len(breaches(list(imports_in("store.module", path)))) == 2


def test_nothing_unpickles_or_runs_code_of_a_model() -> None:
    found = [f"{i.importer}:{i.line} imports {i.module}" for i in all_imports() if i.top in UNSAFE_MODULES]
    for name, path in modules().items():
        for node in ast.walk(tree(path)):
            if (
                isinstance(node, ast.Call)
                and ast.unparse(node.func) in UNSAFE_CALLS
                and not _restricted(node)
            ):
                found.append(f"{name}:{node.lineno} calls {ast.unparse(node.func)}")
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                trusts = not (isinstance(node.value, ast.Constant) and node.value.value is False)
                found += [f"{name}:{node.value.lineno} trusts remote code"] * trusts
    assert found == []


def _restricted(call: ast.Call) -> bool:
    """Whether it is torch.load with weights_only=True as a literal: it then makes tensors and calls nothing else."""
    literal = [
        k.value.value for k in call.keywords if k.arg == "weights_only" and isinstance(k.value, ast.Constant)
    ]
    return ast.unparse(call.func) == "torch.load" and literal == [True]


def test_nothing_writes_to_standard_output_which_belongs_to_the_protocol() -> None:
    allowed = {
        "server.models.conversion",  # a process of its own, whose output the server reads
        "store.query_process",  # likewise
        "server.maintenance",  # commands beside the server
        "server.board.command",  # likewise
        "server.proposals.command",  # likewise
        "editors.constants.__main__",  # a program of its own, which no module of ours imports
    }
    found = [
        f"{name}:{node.lineno}"
        for name, path in modules().items()
        if name not in allowed
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"print", "sys.stdout.write"}
    ]
    assert found == []


def normalised(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_what_is_imported_is_declared_and_what_is_declared_is_used() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {normalised(re.split(r"[<>=!~\[; ]", line)[0]) for line in project["dependencies"]}
    foreign = {i.top for i in all_imports()} - set(sys.stdlib_module_names) - set(MAY_IMPORT)
    providers = packages_distributions()
    used = {normalised(providers[module][0]) for module in foreign - OPTIONAL}
    assert used - declared - {"mcp-types"} == set()  # which mcp pins exactly
    assert declared - used == BEHIND_TRANSFORMERS


def test_the_server_can_answer_before_torch_is_imported() -> None:
    code = (
        "import sys, errata; from server.settings import Settings; errata.build(Settings())\n"
        "print([m for m in ('torch', 'transformers', 'sqlite_utils', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_two_classes_share_a_name() -> None:
    """A name that means two things must be read twice."""
    where: dict[str, list[str]] = {}
    for package in ("editors", "server", "tools", "store"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(tree(path)):
                if isinstance(node, ast.ClassDef):
                    where.setdefault(node.name.lstrip("_"), []).append(f"{path.relative_to(ROOT)}")
    assert {name: places for name, places in where.items() if len(places) > 1} == {}

"""The commands beside the server: backup, restore, recover, compact and metadata. They need no model."""

from __future__ import annotations

import argparse
import json
import sys
import zipfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from server.settings import Settings

COMMANDS = ("backup", "restore", "recover", "compact", "metadata")


def run(argv: Sequence[str]) -> int:
    """Run `argv`, which begins with one of COMMANDS; returns the exit status."""
    options = parse(argv)
    if options.command == "metadata":
        return _metadata()
    home = Settings(home=options.home).home if options.home else Settings().home
    from store.errors import LedgerError

    try:
        if options.command == "backup":
            return _backup(home, options.folder, options.statistics)
        if options.command == "restore":
            return _restore(home, options.folder, options.replace)
        if options.command == "compact":
            return _compact(home, options)
        return _recover(home, options.accept)
    except LedgerError as error:
        print(f"errata-mcp {options.command}: {error}", file=sys.stderr)
        return 1


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of a command. Prints and exits as argparse does."""
    return _parser().parse_args(argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="errata-mcp", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    backup = commands.add_parser("backup", help="copy the home to a new folder; a server may be writing")
    backup.add_argument("folder", type=Path, help="the folder to make")
    backup.add_argument("--statistics", action=argparse.BooleanOptionalAction, default=True,
                        help="copy the second moments too, which can be large and can be computed again")  # fmt: skip
    restore = commands.add_parser("restore", help="bring a home back to the state of a backup")
    restore.add_argument("folder", type=Path, help="a folder that backup made")
    restore.add_argument(
        "--replace", action="store_true", help="first move the present files to HOME/replaced-..."
    )
    recover = commands.add_parser("recover", help="list what a damaged home has lost, and what is left")
    recover.add_argument("--accept", action="store_true", help="continue with what is left")
    compact = commands.add_parser(
        "compact", help="delete patch files that nothing needs any more; the history stays whole"
    )
    compact.add_argument(
        "--dry-run", action="store_true", help="list what would be deleted, and change nothing"
    )
    compact.add_argument("--retired", type=_days, metavar="DAYS",
                         help="also the patches of edits that were rejected or replaced at least so many days ago; "
                         "reapply_edits cannot bring them back then")  # fmt: skip
    compact.add_argument(
        "--reverted", type=_days, metavar="DAYS", help="also those of edits that were reverted"
    )
    commands.add_parser("metadata", help="print metadata with which datasette opens the ledger on its views")
    for command in (backup, restore, recover, compact):
        command.add_argument("--home", help="the home (default: as for the server)")
    return parser


def _metadata() -> int:
    print(resources.files("store").joinpath("datasette.json").read_text("utf-8"), end="")
    return 0


def _backup(home: Path, folder: Path, statistics: bool) -> int:
    from store.backup import backup

    report = backup(home, folder.absolute(), statistics=statistics)
    print(
        f"{report.path}: {report.events} events, {report.edits} edits, {report.files} files, {report.bytes:,} bytes. "
        f"errata-mcp restore {report.path} brings them back."
    )
    return 0


def _restore(home: Path, folder: Path, replace: bool) -> int:
    from store.backup import restore

    report, aside = restore(folder.absolute(), home, replace=replace)
    print(f"{home}: {report.events} events, {report.edits} edits are back and whole.")
    if aside is not None:
        print(f"What was there is in {aside}.")
    return 0


def _days(text: str) -> float:
    try:
        days = float(text)
    except ValueError:
        days = -1.0
    if not 0 <= days <= 100_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of days; write 0 or more, such as 90")
    return days


def _compact(home: Path, options: argparse.Namespace) -> int:
    from store import GivenUp, Ledger
    from store.opening import require_ledger

    require_ledger(home)
    with Ledger.open(home, read_only=options.dry_run) as ledger:
        report = ledger.compact(GivenUp(options.retired, options.reverted), dry=options.dry_run)
    found = report.removed
    would = "would be deleted" if options.dry_run else "deleted"
    for files, what in (
        (found.former, "files of former states"),
        (found.patches, "patches of edits that were given up"),
        (found.leftover, "files left by an interrupted compaction"),
    ):
        if files:
            print(f"- {len(files):,} {what}, {sum(files.values()):,} bytes: {would}.")
    if ids := found.edit_ids:
        shown = ", ".join(ids[:20]) + (f" and {len(ids) - 20:,} more" if len(ids) > 20 else "")
        cannot = "could not be reapplied then" if options.dry_run else "cannot be reapplied any more"
        print(f"- {shown} {cannot}; they stay in the history.")
    if not found.files:
        print("- Every file is needed.")
    if options.dry_run:
        print(f"{home}: nothing was changed. Without --dry-run it is done.")
    else:
        print(f"{home}: the database has {report.database_after:,} bytes, before {report.database_before:,}.")
    if report.note:
        print(f"errata-mcp compact: {report.note}", file=sys.stderr)
        return 1
    return 0


def _recover(home: Path, accepted: bool) -> int:
    """Status 0: whole, or accepted; 2: something is wrong and nothing was changed."""
    from store.recovery import Survey, Unnamed, accept, recovered_file, survey

    def show(found: Survey) -> None:
        for problem in found.problems:
            print(f"- {problem}")
        if found.unnamed:
            print("Patch files that no event names:")
        for file in found.unnamed:
            print(f"- {file.path.name}: {_told(file)}")

    def bundled(file: Unnamed) -> Path | None:
        return _bundle(home, file.about, recovered_file(home, file.sha).read_bytes(), file.sha)

    if not accepted:
        found = survey(home)
        show(found)
        if not found.problems:
            print(f"{home} is whole.")
            return 0
        print("Nothing was changed. Restore a backup with errata-mcp restore --replace, or continue with what is left "
              "with errata-mcp recover --accept.")  # fmt: skip
        return 2
    found, aside = accept(home)
    show(found)
    for path in filter(None, map(bundled, found.unnamed)):
        print(f"import_patches imports {path.name} again, once the server runs.")
    if aside is not None:
        print(f"Files that could not be used are in {aside}.")
    left = survey(home).problems
    print(f"{home} {'is still damaged: ' + str(left[0]) if left else 'can be written again'}.")
    return 2 if left else 0


def _told(file: object) -> str:
    about = getattr(file, "about", None)
    if not isinstance(about, dict):
        return "it has no description beside it"
    if "vector" in about:
        return f"the steering vector {about['vector']!r}, made at {about.get('at')}"
    if isinstance(about.get("proposal"), dict):
        return f"the patch of a proposal, made at {about.get('at')}"
    facts = "; ".join(f"{r.get('prompt')!r} -> {r.get('target')!r}" for r in about.get("requests", [])[:3])
    state = "rejected" if about.get("failed") else "applied"
    return f"{about.get('method')}, {state} at {about.get('at')}: {facts}"


def _bundle(home: Path, about: dict[str, object] | None, data: bytes, sha: str) -> Path | None:
    """A bundle in HOME/imports that import_patches takes in; None for what is no accepted patch of facts."""
    model, requests = (about or {}).get("model"), (about or {}).get("requests")
    if about is None or not isinstance(model, dict) or not isinstance(requests, list) or about.get("failed"):
        return None
    name = "patches/0001.safetensors"
    entry = {
        "file": name, "sha256": sha, "bytes": len(data), "method": about["method"], "kind": about["kind"],
        "params": about["params"],
        "edits": [
            {"id": f"lost-{i + 1}", "request": request, "reason": about["reason"], "source": about["source"]}
            for i, request in enumerate(requests)
        ],
    }  # fmt: skip
    manifest = {
        "format": "errata-bundle-1", "version": "recovered", "model": model["name"],
        "architecture": model["architecture"], "base_hash": model["base_hash"],
        "weights_hash": model["base_hash"], "environment": {}, "patches": [entry],
    }  # fmt: skip
    target = home / "imports" / f"recovered-{sha[:12]}.zip"
    target.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(name, data)
        archive.writestr("manifest.json", json.dumps(manifest, sort_keys=True))
    return target

"""How many files one apply_edits takes part in, and how often it goes from one layer to another.

    python -m tests.one_apply [--method rome] [--list]

One fact is corrected on a tiny model by `services.edits.apply`, as the tool calls it. While it runs, every call of a
function of this project is seen (`sys.setprofile`):

- files: those with a function that was called, `__init__` files and generated functions (dataclasses) left out;
- crossings: calls from a function in one layer (tools, server, editors, store) to one in another. The way back is not
  counted again. Calls by way of a library, such as a hook that torch calls, count from the function that called the
  library;
- ways: the same, each pair of functions once: what a reader has to follow.

Reports of progress and checks whether the client is still there (`WATCHED`) are counted apart: there are some at
every step of a search and every token.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from server.facts.guard import Guard
from tests.server.opened import FACTS, STRONG, open_services

ROOT = Path(__file__).parent.parent
LAYERS = ("tools", "server", "editors", "store")
WATCHED = ("report", "check", "give_way")
Place = tuple[str, str]  # file below ROOT, function


class Seen:
    """What was called while `run` ran."""

    def __init__(self) -> None:
        self.files: Counter[str] = Counter()
        self.crossings: Counter[tuple[Place, Place]] = Counter()
        self.watching = 0

    def run(self, work: Callable[[], Any]) -> None:
        """Run `work` in this thread and see its calls."""
        sys.setprofile(self._event)
        try:
            work()
        finally:
            sys.setprofile(None)

    def _event(self, frame: FrameType, event: str, _: Any) -> None:
        here = _place(frame) if event == "call" else None
        if here is None:
            return
        self.files[here[0]] += 1
        back = frame.f_back
        while back is not None and (caller := _place(back)) is None:
            back = back.f_back
        if back is not None and caller is not None and _layer(caller) != _layer(here):
            if here[1].rpartition(".")[2] in WATCHED:
                self.watching += 1
            else:
                self.crossings[caller, here] += 1


def _place(frame: FrameType) -> Place | None:
    path = Path(frame.f_code.co_filename)
    if not path.is_relative_to(ROOT) or path.name == "__init__.py":
        return None
    place = path.relative_to(ROOT).as_posix(), frame.f_code.co_qualname
    return place if _layer(place) in LAYERS else None


def _layer(place: Place) -> str:
    return place[0].partition("/")[0]


def counted(method: str) -> Seen:
    """What one apply by a method calls. The fact is corrected and reverted before, so that nothing is built anew."""
    params = dict(STRONG) if method == "rome" else {}
    with tempfile.TemporaryDirectory() as home:
        services = open_services(Path(home))

        def apply() -> Any:
            return services.edits.apply([FACTS[0]], method, params, Guard(off=("all",)))

        try:
            services.edits.revert(apply().edit_ids)
            seen = Seen()
            seen.run(apply)
        finally:
            services.close()
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", default="rome")
    parser.add_argument("--list", action="store_true", help="also list the ways, the most used first")
    options = parser.parse_args()
    seen = counted(options.method)
    layers = Counter(_layer((name, "")) for name in seen.files)
    lines = [
        f"{len(seen.files)} files ({', '.join(f'{each} {layers[each]}' for each in LAYERS if layers[each])})",
        f"{seen.crossings.total()} crossings on {len(seen.crossings)} ways, and {seen.watching} reports and checks",
    ]
    if options.list:
        lines += [f"{n:6} {a[0]}:{a[1]} -> {b[0]}:{b[1]}" for (a, b), n in seen.crossings.most_common()]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

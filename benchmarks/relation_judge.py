"""How well the judge of a memory tells a fact's relation from the subject's other ones, in wordings it never saw.

    python -m benchmarks.relation_judge [--model MODEL.gguf] [--margins -0.3 -0.2 -0.1 0]

For statements and questions: the share of the fact's own wordings that are recognised, and the share of the subject's
other relations that are taken for it. Relations whose answers may follow from the edited one are left out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from editors.edit import Edit
from editors.forms.relations import are_related, candidates
from editors.memory import relation_judge
from editors.model.lm import LM
from server.models import loading
from server.settings import Settings

DATA = Path(__file__).parent / "data" / "relation_wordings.json"
SUBJECT = "Elmstead"


def rates(lm: LM, margin: float) -> dict[str, tuple[float, float]]:
    """For statements and questions: shares of own wordings and of other relations' wordings that are recognised."""
    data = json.loads(DATA.read_text("utf-8"))
    found: dict[str, tuple[list[bool], list[bool]]] = {"statements": ([], []), "questions": ([], [])}
    for kind, relations in data["edited"].items():
        for relation in relations:
            _count(lm, data["wordings"][kind], relation, margin, found)
    return {form: (sum(own) / len(own), sum(others) / len(others)) for form, (own, others) in found.items()}


def _count(
    lm: LM,
    wordings: dict[str, Any],
    relation: str,
    margin: float,
    found: dict[str, tuple[list[bool], list[bool]]],
) -> None:
    edit = Edit(subject=SUBJECT, prompt=wordings[relation]["prompt"], target="something")
    judge = relation_judge.fit(lm, [edit], [])
    own = candidates(wordings[relation]["prompt"])
    for name, texts in wordings.items():
        related = any(are_related(a, b) for a in own for b in candidates(texts["prompt"]))
        if related and name != relation:
            continue
        for form, (same, others) in found.items():
            sure = [judge.surely(lm, text, 0) for text in texts[form]]
            (same if name == relation else others).extend(s is not None and s > margin for s in sure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="default", help="default, a directory, a .gguf file or a hub id")
    parser.add_argument("--models", type=Path, default=None, help="folder of converted models")
    parser.add_argument("--margins", type=float, nargs="+", default=[-0.3, -0.2, -0.1, 0.0])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        settings = Settings(model=options.model, home=Path(home), models=options.models)
        lm = loading.load(settings, lambda *_: None)
        print(
            "| margin | statements: own | others | questions: own | others |\n| --- | --- | --- | --- | --- |"
        )
        for margin in options.margins:
            cells = [f"{share:.2f}" for pair in rates(lm, margin).values() for share in pair]
            print(f"| {margin} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

"""How well the judge of a memory tells a fact's relation from the subject's other ones, in wordings it never saw.

    python -m benchmarks.relation_judge [--model MODEL.gguf] [--margins -0.2 -0.1 -0.05 0] [--folds]

For statements and questions: the share of the fact's own wordings that are recognised, and the share of the subject's
other relations that are taken for it. Relations whose answers may follow from the edited one are left out. With
--folds every relation of the data is edited, and asked in the half of its paraphrases that was not learned from, each
half in turn.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from editors.edit import Edit
from editors.forms.form import Material
from editors.forms.relations import Relation, all_relations, are_related, candidates
from editors.memory import relation_judge
from editors.memory.relation_bank import RelationBank
from editors.model.lm import LM
from server.models import loading
from server.settings import Settings

DATA = Path(__file__).parent / "data" / "relation_wordings.json"
SUBJECT = "Elmstead"
FORMS = ("statements", "questions")
Surely = dict[
    str, tuple[list[float | None], list[float | None]]
]  # by form: own wordings, other relations' wordings


def of_data(lm: LM) -> Surely:
    """How surely wordings that no method learns from ask an edited relation."""
    data = json.loads(DATA.read_text("utf-8"))
    found: Surely = {form: ([], []) for form in FORMS}
    for kind, relations in data["edited"].items():
        for relation in relations:
            _ask_all(lm, data["wordings"][kind], relation, found)
    return found


def _ask_all(lm: LM, wordings: dict[str, Any], relation: str, found: Surely) -> None:
    edit = Edit(subject=SUBJECT, prompt=wordings[relation]["prompt"], target="something")
    judge = relation_judge.fit(lm, [edit], [])
    own = candidates(wordings[relation]["prompt"])
    for name, texts in wordings.items():
        related = any(are_related(a, b) for a in own for b in candidates(texts["prompt"]))
        if related and name != relation:
            continue
        for form, (same, others) in found.items():
            (same if name == relation else others).extend(judge.surely(lm, text, 0) for text in texts[form])


def of_folds(lm: LM) -> Surely:
    """How surely paraphrases ask an edited relation, learned from the other half of them."""
    found: Surely = {form: ([], []) for form in FORMS}
    for half in (0, 1):
        bank = RelationBank(lm, lambda r, half=half: r.paraphrases[half::2])  # type: ignore[misc]
        for relation in all_relations():
            _ask_fold(lm, bank, relation, 1 - half, found)
    return found


def _ask_fold(lm: LM, bank: RelationBank, relation: Relation, half: int, found: Surely) -> None:
    prompt = re.sub(r"\[(the|a)\]", r"\1", relation.wordings["statement"][0])
    edit = Edit(subject=SUBJECT, prompt=prompt, target="1900" if relation.year else "something")
    judge = relation_judge.fit_with(bank, [edit], [Material(relation=relation.name)])
    for other in all_relations():
        same = other.name == relation.name
        if not same and (are_related(other, relation) or not set(other.kinds) & set(relation.kinds)):
            continue
        for text in other.paraphrases[half::2]:
            form = "questions" if text.endswith(("?", ".")) else "statements"
            found[form][0 if same else 1].append(judge.surely(lm, text, 0))


def share(sure: Sequence[float | None], margin: float) -> float:
    """Of what was asked, what is recognised."""
    return sum(s is not None and s > margin for s in sure) / len(sure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="default", help="default, a directory, a .gguf file or a hub id")
    parser.add_argument("--models", type=Path, default=None, help="folder of converted models")
    parser.add_argument("--margins", type=float, nargs="+", default=[-0.2, -0.1, -0.05, 0.0])
    parser.add_argument("--folds", action="store_true", help="ask the paraphrases of the data, in two halves")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        settings = Settings(model=options.model, home=Path(home), models=options.models)
        lm = loading.load(settings, lambda *_: None)
        found = of_folds(lm) if options.folds else of_data(lm)
        print(
            "| margin | statements: own | others | questions: own | others |\n| --- | --- | --- | --- | --- |"
        )
        for margin in options.margins:
            cells = [f"{share(sure, margin):.3f}" for form in FORMS for sure in found[form]]
            print(f"| {margin} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

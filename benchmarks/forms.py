"""How far the material of an edit can be trusted, and what it costs.

    python -m benchmarks.forms [--model PATH] [--facts 20]

For the shipped facts (editors/data/facts.json): how many of the answers that count as known (probability of at least
a bound) are right, as a bare statement and as it is asked (inside the answer to a question); how many forms and facts
an edit gets; CPU seconds of `material_for`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.rome import _model as load_model
from editors import facts
from editors.edit import Edit
from editors.forms.asking import Answer, Reading
from editors.forms.compose import ABOUT
from editors.forms.filling import Name, fill
from editors.forms.form import asked_in
from editors.forms.material import material_for
from editors.forms.relations import all_relations
from editors.model.lm import LM, Prompt
from editors.scoring.verdict import says

RELATIONS = {
    "capital": "capital",
    "official language": "language",
    "currency": "currency",
    "continent": "continent",
    "city of a landmark": "city",
    "country of a place": "country",
    "mother tongue": "native_language",
    "field of work": "field",
    "founder": "founder",
    "author": "author",
}
BOUNDS = (0.1, 0.2, 0.3, 0.5)


def main() -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="default", help="a model, as the server takes it")
    parser.add_argument("--home", type=Path, help="a home whose converted models are used")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--facts", type=int, default=20, help="facts of each relation")
    options = parser.parse_args()
    lm, _ = load_model(options)
    asked = _asked(options.facts)
    for way in ("statement", "inside an answer"):
        prompts = [_prompt(lm, way, name, text) for _, name, text, _ in asked]
        answers = _answers(lm, prompts)
        print(f"| {way} | known | of them right |\n| --- | --- | --- |")
        right = [_right(answer, fact[3]) for answer, fact in zip(answers, asked, strict=True)]
        print(f"| any | {len(asked)} | {sum(right) / len(asked):.2f} |")
        for bound in BOUNDS:
            sure = [
                r
                for r, answer in zip(right, answers, strict=True)
                if answer.fact and answer.probability >= bound
            ]
            print(f"| {bound:g} | {len(sure)} | {sum(sure) / max(1, len(sure)):.2f} |")
    _print_materials(lm, asked)


def _asked(most: int) -> list[tuple[str, Name, str, str]]:
    """(relation of the data, subject, statement, right answer), `most` of each relation, evenly spread."""
    known = {relation.name: relation for relation in all_relations()}
    rows = []
    for shipped in facts.relations():
        if shipped.name in RELATIONS:
            step = max(1, len(shipped.facts) // most)
            for subject, answer in shipped.facts[::step][:most]:
                relation, name = known[RELATIONS[shipped.name]], Name(subject)
                rows.append((relation.name, name, fill(relation.wordings["statement"][0], name).text, answer))
    return rows


def _prompt(lm: LM, way: str, name: Name, text: str) -> Prompt:
    return lm.prompt(text, chat=False) if way == "statement" else asked_in(lm, text, fill(ABOUT, name).text)


def _answers(lm: LM, prompts: Sequence[Prompt], batch: int = 24) -> list[Answer]:
    answers: list[Answer] = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        by_row = Reading(lm, part).answers(range(len(part)))
        answers += [by_row[i] for i in range(len(part))]
    return answers


def _right(answer: Answer, right: str) -> bool:
    return bool(answer.fact) and (says(answer.fact, right) or says(right, answer.fact))


def _print_materials(lm: LM, asked: Sequence[tuple[str, Name, str, str]]) -> None:
    """Mean counts and CPU seconds of the material of every tenth fact."""
    edits = [Edit(subject=name.subject, prompt=text, target="Zanzibar") for _, name, text, _ in asked[::10]]
    material_for(lm, edits[0])
    started = time.process_time()
    made = [material_for(lm, edit) for edit in edits]
    seconds = (time.process_time() - started) / len(edits)
    print("| of an edit | mean |\n| --- | --- |")
    for part in ("learned", "measured"):
        print(f"| forms {part} | {sum(len(getattr(m, part)) for m in made) / len(made):.1f} |")
    for part in ("held", "siblings"):
        print(
            f"| facts {part} | {sum(len({h.relation for h in getattr(m, part)}) for m in made) / len(made):.1f} |"
        )
    print(f"| CPU seconds | {seconds:.2f} |")


if __name__ == "__main__":
    main()

"""Values of records as they stand in the data sets of the field, and the facts made of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from editors.edit import PLACEHOLDER
from server.factsets.fact import Fact, FactProbe, with_subject_marked

Record = Mapping[str, Any]


def fact_of(subject: Any, prompt: Any, answer: Any, **more: Any) -> Fact:
    """A fact; a subject that the prompt has in another case is taken as the prompt has it."""
    subject, prompt = text_of(subject, "subject"), text_of(prompt, "prompt")
    if PLACEHOLDER not in prompt and subject not in prompt:
        found = re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", prompt, re.IGNORECASE)
        subject = found.group() if found else subject
    values = {name: value for name, value in more.items() if value not in (None, (), "")}
    return Fact(
        subject=subject,
        prompt=with_subject_marked(prompt, subject),
        answer=text_of(answer, "answer"),
        **values,
    )


def text_of(value: Any, name: str) -> str:
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} should be a text, not {str(value)[:60]!r}")
    return value.strip()


def texts_of(value: Any) -> list[str]:
    """Every text of a value: a text, or lists of texts in whatever depth, each once."""
    if isinstance(value, str):
        return [value.strip()] if value.strip() else []
    if isinstance(value, Mapping):
        return texts_of(value.get("str") or value.get("value") or value.get("label"))
    if isinstance(value, (list, tuple)):
        return list(dict.fromkeys(text for part in value for text in texts_of(part)))
    return [] if value is None else [str(value)]


def probe_of(kind: str, follows: bool, prompts: Any, answers: Any = ()) -> Iterator[FactProbe]:
    asked = tuple(texts_of(prompts))
    if asked:
        yield FactProbe(kind=kind, follows=follows, prompts=asked, answers=tuple(texts_of(answers)))


def each_of(kind: str, follows: bool, prompts: Any, answers: Any = ()) -> Iterator[FactProbe]:
    for prompt in texts_of(prompts):
        yield from probe_of(kind, follows, prompt, answers)


def question_of(text: Any) -> str:
    """A question of Natural Questions as zsRE has it: "nq question: who wrote it"."""
    found = texts_of(text)
    if not found:
        return ""
    bare = found[0].removeprefix("nq question: ").rstrip("? ")
    return f"{bare[:1].upper()}{bare[1:]}?"


def grouped_probes(value: Any, follows: bool, kind: str) -> Iterator[FactProbe]:
    """Questions by their kind: {kind: [{prompt, ground_truth}]}, {kind: {prompt: [...]}} or a plain list."""
    if isinstance(value, Mapping) and "prompt" not in value:
        for name, group in value.items():
            yield from grouped_probes(group, follows, str(name))
    elif isinstance(value, Mapping):
        answers = next((value[n] for n in ("ground_truth", "answer", "answers", "target") if n in value), ())
        prompts = value["prompt"]
        if isinstance(prompts, list) and isinstance(answers, list) and len(prompts) == len(answers):
            for prompt, answer in zip(prompts, answers, strict=True):
                yield from probe_of(kind, follows, prompt, answer)
        else:
            yield from each_of(kind, follows, prompts, answers)
    elif isinstance(value, list):
        for part in value:
            yield from grouped_probes(part, follows, kind)


def id_of(record: Record) -> str | None:
    found = next((record[n] for n in ("case_id", "known_id", "id", "tag") if record.get(n) is not None), None)
    return None if found is None else str(found)

"""The data sets of the field, recognised by their fields: each record becomes facts with its questions as probes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from editors.edit import PLACEHOLDER
from server.factsets.fact import Fact, FactProbe, with_subject_marked

Record = Mapping[str, Any]


class NotFacts(ValueError):
    """The record is of a known data set that has no facts to correct; the message says what reads it."""


@dataclass(frozen=True)
class Format:
    """One data set: how to tell its records, and how to read one."""

    name: str
    fits: Callable[[Record], bool]
    read: Callable[[Record], Iterable[Fact]]
    uses: tuple[str, ...]  # the fields that are read; a name ending in * stands for all that begin so


def format_of(record: Record) -> Format | None:
    """The data set a record is of; None for a record of no known one."""
    return next((each for each in FORMATS if each.fits(record)), None)


def unknown_fields(form: Format, record: Record) -> list[str]:
    """The fields of a record that are not used."""
    kept = [name for name in form.uses if not name.endswith("*")]
    starts = tuple(name[:-1] for name in form.uses if name.endswith("*"))
    return [name for name in record if name not in kept and not (starts and name.startswith(starts))]


def _fact(subject: Any, prompt: Any, answer: Any, **more: Any) -> Fact:
    """A fact; a subject that the prompt has in another case is taken as the prompt has it."""
    subject, prompt = _text(subject, "subject"), _text(prompt, "prompt")
    if PLACEHOLDER not in prompt and subject not in prompt:
        found = re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", prompt, re.IGNORECASE)
        subject = found.group() if found else subject
    values = {name: value for name, value in more.items() if value not in (None, (), "")}
    return Fact(
        subject=subject, prompt=with_subject_marked(prompt, subject), answer=_text(answer, "answer"), **values
    )


def _text(value: Any, name: str) -> str:
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} should be a text, not {str(value)[:60]!r}")
    return value.strip()


def _texts(value: Any) -> list[str]:
    """Every text of a value: a text, or lists of texts in whatever depth, each once."""
    if isinstance(value, str):
        return [value.strip()] if value.strip() else []
    if isinstance(value, Mapping):
        return _texts(value.get("str") or value.get("value") or value.get("label"))
    if isinstance(value, (list, tuple)):
        return list(dict.fromkeys(text for part in value for text in _texts(part)))
    return [] if value is None else [str(value)]


def _probe(kind: str, follows: bool, prompts: Any, answers: Any = ()) -> Iterator[FactProbe]:
    asked = tuple(_texts(prompts))
    if asked:
        yield FactProbe(kind=kind, follows=follows, prompts=asked, answers=tuple(_texts(answers)))


def _each(kind: str, follows: bool, prompts: Any, answers: Any = ()) -> Iterator[FactProbe]:
    for prompt in _texts(prompts):
        yield from _probe(kind, follows, prompt, answers)


def _question(text: Any) -> str:
    """A question of Natural Questions as zsRE has it: "nq question: who wrote it"."""
    found = _texts(text)
    if not found:
        return ""
    bare = found[0].removeprefix("nq question: ").rstrip("? ")
    return f"{bare[:1].upper()}{bare[1:]}?"


# --- CounterFact and MQuAKE


def _counterfact(record: Record) -> Iterator[Fact]:
    rewrite = record["requested_rewrite"]
    true, new = _texts(rewrite.get("target_true")), rewrite["target_new"]
    hop = record.get("portability") or {}
    other, unrelated = record.get("alternative_subject"), record.get("unrelated_relation") or {}
    prompt = _text(rewrite["prompt"], "prompt")
    probes = [
        *_each("neighborhood", False, record.get("neighborhood_prompts"), true),
        *_each("attribute", False, record.get("attribute_prompts"), new),
        *_each("distracting_neighborhood", False, record.get("distracting_neighborhood_prompts"), true),
        *_probe("unrelated_relation", False, unrelated.get("question"), unrelated.get("object")),
        *_probe("portability", True, hop.get("New Question"), hop.get("New Answer")),
    ]
    if other:
        probes += _probe("subject_alias", True, prompt.replace(PLACEHOLDER, _text(other, "subject")), new)
    yield _fact(
        rewrite["subject"],
        prompt,
        _text(_texts(new), "target_new"),
        previous=next(iter(true), None),
        paraphrases=_texts(record.get("paraphrase_prompts")),
        probes=probes,
        relation=rewrite.get("relation_id"),
        id=_id(record),
    )


def _mquake(record: Record) -> Iterator[Fact]:
    case = _id(record)
    rewrites = record["requested_rewrite"]
    for i, rewrite in enumerate(rewrites):
        last = i == len(rewrites) - 1
        answers = [*_texts(record.get("new_answer")), *_texts(record.get("new_answer_alias"))]
        yield _fact(
            rewrite["subject"],
            rewrite["prompt"],
            _text(_texts(rewrite["target_new"]), "target_new"),
            previous=next(iter(_texts(rewrite.get("target_true"))), None),
            paraphrases=_texts(rewrite.get("question")),
            probes=list(_probe("multi_hop", True, record.get("questions"), answers)) if last else [],
            relation=rewrite.get("relation_id"),
            case=case,
        )


# --- zsRE, and the flat records of EasyEdit, KnowEdit and CKnowEdit


def _zsre(record: Record) -> Iterator[Fact]:
    hop, other = record.get("portability") or {}, record.get("alternative_subject")
    probes = [
        *_probe("locality", False, _question(record.get("loc")), record.get("loc_ans")),
        *_probe("portability", True, hop.get("New Question"), hop.get("New Answer")),
        *_probe("inverse", True, record.get("inverse question"), record["subject"]),
    ]
    if other:
        probes += _probe("subject_alias", True, record.get("alter_subject_question"), record["alt"])
    yield _fact(
        record["subject"],
        record["src"],
        record["alt"],
        previous=next(iter(_texts(record.get("answers"))), None),
        paraphrases=_texts(record.get("rephrase")),
        probes=probes,
        id=_id(record),
    )


def _flat(record: Record) -> Iterator[Fact]:
    subject = record.get("subject") or record.get("concept")
    yield _fact(
        subject,
        record["prompt"],
        _text(_texts(record["target_new"]), "target_new"),
        previous=next(iter(_texts(record.get("ground_truth") or record.get("target_old"))), None),
        paraphrases=_texts([record.get("rephrase_prompt"), record.get("rephrase")]),
        probes=[
            *_probe("locality", False, record.get("locality_prompt"), record.get("locality_ground_truth")),
            *_probe(
                "portability", True, record.get("portability_prompt"), record.get("portability_ground_truth")
            ),
            *_grouped(record.get("portability") or record.get("portability_inputs"), True, "portability"),
            *_grouped(record.get("locality") or record.get("locality_inputs"), False, "locality"),
            *_grouped(record.get("portability_r"), True, "Reasoning"),
            *_grouped(record.get("portability_s"), True, "Subject_Aliasing"),
            *_grouped(record.get("portability_l"), True, "Logical_Generalization"),
        ],
        id=_id(record),
    )


def _grouped(value: Any, follows: bool, kind: str) -> Iterator[FactProbe]:
    """Questions by their kind: {kind: [{prompt, ground_truth}]}, {kind: {prompt: [...]}} or a plain list."""
    if isinstance(value, Mapping) and "prompt" not in value:
        for name, group in value.items():
            yield from _grouped(group, follows, str(name))
    elif isinstance(value, Mapping):
        answers = next((value[n] for n in ("ground_truth", "answer", "answers", "target") if n in value), ())
        prompts = value["prompt"]
        if isinstance(prompts, list) and isinstance(answers, list) and len(prompts) == len(answers):
            for prompt, answer in zip(prompts, answers, strict=True):
                yield from _probe(kind, follows, prompt, answer)
        else:
            yield from _each(kind, follows, prompts, answers)
    elif isinstance(value, list):
        for part in value:
            yield from _grouped(part, follows, kind)


def _wikibio(record: Record) -> Iterator[Fact]:
    probes = list(_grouped(record.get("locality"), False, "locality"))
    yield _fact(record["concept"], record["text"], record["labels"], probes=probes)


# --- RippleEdits, WikiFactDiff, WikiBigEdit, ConflictEdit, known_1000

_RIPPLES = {
    "Logical_Generalization": True,
    "Compositionality_I": True,
    "Compositionality_II": True,
    "Subject_Aliasing": True,
    "Relation_Specificity": False,
    "Forgetfulness": False,
}


def _ripple(record: Record) -> Iterator[Fact]:
    edit = record["edit"]
    statement = _text(edit["prompt"], "edit.prompt").rstrip(". ")
    prompt, _, target = statement.rpartition(" is ")
    relation = str(edit.get("relation") or "").lower().replace("_", " ")
    _, found, subject = prompt.rpartition(f"{relation} of ") if relation else ("", "", "")
    if not found:
        subject = prompt.rpartition(" of ")[2]
    before = _text((edit.get("original_fact") or {}).get("prompt") or "-", "prompt").rstrip(". ")
    probes = [
        probe
        for kind, follows in _RIPPLES.items()
        for test in record.get(kind) or ()
        for query in test.get("test_queries") or ()
        for probe in _probe(
            kind,
            follows,
            query["prompt"],
            [[a.get("value"), a.get("aliases")] for a in query.get("answers", ())],
        )
    ]
    yield _fact(
        subject,
        f"{prompt} is",
        target,
        previous=before.rpartition(" is ")[2] or None,
        probes=probes,
        relation=edit.get("relation"),
    )


def _wikifactdiff(record: Record) -> Iterator[Fact]:
    by: dict[str, list[str]] = {}
    for each in record["objects"]:
        by.setdefault(str(each["decision"]), []).extend(_texts(each))
    new = by.get("new") or by.get("learn")
    if not new:
        raise ValueError("it has no new object; facts to be forgotten alone are for forget_facts")
    old = by.get("obsolete") or by.get("forget") or []
    kept = by.get("static") or by.get("keep") or []
    neighbours = [
        probe
        for each in record.get("neighborhood") or ()
        for entry in each["objects"][:1]
        for probe in _probe("neighborhood", False, _blank(entry["prompt"]), _texts(entry.get("object")))
    ]
    yield _fact(
        record["subject"]["label"],
        _blank(record["update_prompt"]),
        new[0],
        aliases=[*new[1:], *kept],
        previous=next(iter(old), None),
        paraphrases=[_blank(text) for text in record.get("generalization_prompts") or ()],
        probes=neighbours,
        relation=record["relation"].get("label"),
        id=_id(record),
    )


def _blank(prompt: Any) -> str:
    """A prompt up to its blank, "____"."""
    return _text(prompt, "prompt").partition("____")[0].rstrip()


def _wikibigedit(record: Record) -> Iterator[Fact]:
    answer = record.get("ans") or record.get("object")
    yield _fact(
        record["subject"],
        record["update"],
        answer,
        paraphrases=_texts([record.get("rephrase"), record.get("personas")]),
        probes=[
            *_probe("multi_hop", True, record.get("mhop"), record.get("mhop_ans")),
            *_probe("locality", False, record.get("loc"), record.get("loc_ans")),
        ],
        relation=record.get("relation"),
        id=_id(record),
    )


def _conflict(record: Record) -> Iterator[Fact]:
    for i, edit in enumerate(record.get("edits") or [record["edit"]]):
        new = edit.get("new_object") or edit["object"]
        yield _fact(
            edit["subject"]["label"],
            edit["relation"]["prompt"],
            new["label"],
            previous=edit["object"]["label"] if edit.get("new_object") else None,
            paraphrases=[edit["relation"]["query"].replace(PLACEHOLDER, edit["subject"]["label"])],
            relation=edit["relation"].get("label"),
            id=str(i),
        )


def _known(record: Record) -> Iterator[Fact]:
    yield _fact(record["subject"], record["template"], record["attribute"], id=_id(record))


def _samples(record: Record) -> Iterator[Fact]:
    templates = _texts(record["prompt_templates"])
    questions = _texts(record.get("prompt_templates_zs"))
    for sample in record["samples"]:
        subject = _text(sample["subject"], "subject")
        yield _fact(
            subject,
            templates[0],
            sample["object"],
            paraphrases=[t.replace(PLACEHOLDER, subject) for t in (*templates[1:], *questions)][:3],
            relation=record.get("name"),
        )


def _refused(why: str) -> Callable[[Record], Iterator[Fact]]:
    def read(_: Record) -> Iterator[Fact]:
        raise NotFacts(why)

    return read


def _id(record: Record) -> str | None:
    found = next((record[n] for n in ("case_id", "known_id", "id", "tag") if record.get(n) is not None), None)
    return None if found is None else str(found)


def _has(*names: str) -> Callable[[Record], bool]:
    return lambda record: all(name in record for name in names)


_FLAT = (
    "subject", "concept", "prompt", "target_new", "target_old", "ground_truth", "rephrase_prompt", "rephrase",
    "locality*", "portability*", "case_id", "id", "cond",
)  # fmt: skip
FORMATS = (
    Format(
        "MQuAKE",
        lambda r: isinstance(r.get("requested_rewrite"), list),
        _mquake,
        ("requested_rewrite", "questions", "answer*", "new_*", "single_hops", "orig", "case_id"),
    ),
    Format(
        "CounterFact",
        _has("requested_rewrite"),
        _counterfact,
        ("requested_rewrite", "paraphrase_prompts", "neighborhood_prompts", "attribute_prompts", "case_id",
         "pararel_idx", "portability", "alternative_subject", "unrelated_relation", "distracting_*"),
    ),
    Format(
        "zsRE",
        _has("src", "alt"),
        _zsre,
        ("subject", "src", "pred", "rephrase", "alt", "answers", "loc", "loc_ans", "cond", "portability",
         "alternative_subject", "alter_subject_question", "inverse question", "case_id"),
    ),
    Format(
        "ConflictEdit",
        lambda r: "edits" in r or (isinstance(r.get("edit"), Mapping) and "object" in r["edit"]),
        _conflict,
        ("edits", "edit", "triples", "prerequisites", "type", "rule", "true_objects"),
    ),
    Format("RippleEdits", lambda r: isinstance(r.get("edit"), Mapping), _ripple, ("edit", "example_type", *_RIPPLES)),
    Format(
        "WikiFactDiff",
        _has("update_prompt", "objects"),
        _wikifactdiff,
        ("subject", "relation", "objects", "update_prompt", "generalization_prompts", "neighborhood", "is_replace",
         "case_id"),
    ),
    Format(
        "WikiBigEdit",
        _has("subject", "update"),
        _wikibigedit,
        ("subject", "relation", "object", "ans", "update", "rephrase", "personas*", "mhop*", "loc*", "tag"),
    ),
    Format("WikiBio (KnowEdit)", _has("text", "labels", "concept"), _wikibio,
           ("text", "labels", "concept", "locality")),
    Format("known_1000", _has("subject", "attribute", "template"), _known,
           ("subject", "attribute", "template", "prediction", "prompt", "relation_id", "known_id")),
    Format("relation file", _has("prompt_templates", "samples"), _samples,
           ("name", "prompt_templates", "prompt_templates_zs", "samples", "properties")),
    Format("KnowEdit or CounterFact, flat", lambda r: "target_new" in r and "prompt" in r, _flat, _FLAT),
    Format(
        "Sanitation (KnowEdit)",
        lambda r: "success" in r or "K_F" in r,
        _refused("it names facts to be forgotten, which have no right answer; forget_facts is for them"),
        (),
    ),
    Format(
        "ConvSent (KnowEdit)",
        _has("ent", "pos", "neg"),
        _refused("it has replies of a sentiment and no facts; create_steering_vector makes vectors from such pairs"),
        (),
    ),
    Format(
        "preferences",
        lambda r: "chosen" in r and "rejected" in r,
        _refused("it has a better and a worse reply and no facts; train_editor and create_steering_vector read it"),
        (),
    ),
)  # fmt: skip
"""The known data sets. The first that fits a record reads it."""

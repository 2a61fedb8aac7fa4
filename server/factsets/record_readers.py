"""How a record of each data set of the field becomes facts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from editors.edit import PLACEHOLDER
from server.factsets.fact import Fact
from server.factsets.record_values import (
    Record,
    each_of,
    fact_of,
    grouped_probes,
    id_of,
    probe_of,
    question_of,
    text_of,
    texts_of,
)


def read_counterfact(record: Record) -> Iterator[Fact]:
    rewrite = record["requested_rewrite"]
    true, new = texts_of(rewrite.get("target_true")), rewrite["target_new"]
    hop = record.get("portability") or {}
    other, unrelated = record.get("alternative_subject"), record.get("unrelated_relation") or {}
    prompt = text_of(rewrite["prompt"], "prompt")
    probes = [
        *each_of("neighborhood", False, record.get("neighborhood_prompts"), true),
        *each_of("attribute", False, record.get("attribute_prompts"), new),
        *each_of("distracting_neighborhood", False, record.get("distracting_neighborhood_prompts"), true),
        *probe_of("unrelated_relation", False, unrelated.get("question"), unrelated.get("object")),
        *probe_of("portability", True, hop.get("New Question"), hop.get("New Answer")),
    ]
    if other:
        probes += probe_of("subject_alias", True, prompt.replace(PLACEHOLDER, text_of(other, "subject")), new)
    yield fact_of(
        rewrite["subject"],
        prompt,
        text_of(texts_of(new), "target_new"),
        previous=next(iter(true), None),
        paraphrases=texts_of(record.get("paraphrase_prompts")),
        probes=probes,
        relation=rewrite.get("relation_id"),
        id=id_of(record),
    )


def read_mquake(record: Record) -> Iterator[Fact]:
    case = id_of(record)
    rewrites = record["requested_rewrite"]
    for i, rewrite in enumerate(rewrites):
        last = i == len(rewrites) - 1
        answers = [*texts_of(record.get("new_answer")), *texts_of(record.get("new_answer_alias"))]
        yield fact_of(
            rewrite["subject"],
            rewrite["prompt"],
            text_of(texts_of(rewrite["target_new"]), "target_new"),
            previous=next(iter(texts_of(rewrite.get("target_true"))), None),
            paraphrases=texts_of(rewrite.get("question")),
            probes=list(probe_of("multi_hop", True, record.get("questions"), answers)) if last else [],
            relation=rewrite.get("relation_id"),
            case=case,
        )


def read_zsre(record: Record) -> Iterator[Fact]:
    hop, other = record.get("portability") or {}, record.get("alternative_subject")
    probes = [
        *probe_of("locality", False, question_of(record.get("loc")), record.get("loc_ans")),
        *probe_of("portability", True, hop.get("New Question"), hop.get("New Answer")),
        *probe_of("inverse", True, record.get("inverse question"), record["subject"]),
    ]
    if other:
        probes += probe_of("subject_alias", True, record.get("alter_subject_question"), record["alt"])
    yield fact_of(
        record["subject"],
        record["src"],
        record["alt"],
        previous=next(iter(texts_of(record.get("answers"))), None),
        paraphrases=texts_of(record.get("rephrase")),
        probes=probes,
        id=id_of(record),
    )


def read_flat(record: Record) -> Iterator[Fact]:
    subject = record.get("subject") or record.get("concept")
    yield fact_of(
        subject,
        record["prompt"],
        text_of(texts_of(record["target_new"]), "target_new"),
        previous=next(iter(texts_of(record.get("ground_truth") or record.get("target_old"))), None),
        paraphrases=texts_of([record.get("rephrase_prompt"), record.get("rephrase")]),
        probes=[
            *probe_of("locality", False, record.get("locality_prompt"), record.get("locality_ground_truth")),
            *probe_of(
                "portability", True, record.get("portability_prompt"), record.get("portability_ground_truth")
            ),
            *grouped_probes(
                record.get("portability") or record.get("portability_inputs"), True, "portability"
            ),
            *grouped_probes(record.get("locality") or record.get("locality_inputs"), False, "locality"),
            *grouped_probes(record.get("portability_r"), True, "Reasoning"),
            *grouped_probes(record.get("portability_s"), True, "Subject_Aliasing"),
            *grouped_probes(record.get("portability_l"), True, "Logical_Generalization"),
        ],
        id=id_of(record),
    )


def read_wikibio(record: Record) -> Iterator[Fact]:
    probes = list(grouped_probes(record.get("locality"), False, "locality"))
    yield fact_of(record["concept"], record["text"], record["labels"], probes=probes)


RIPPLES = {
    "Logical_Generalization": True,
    "Compositionality_I": True,
    "Compositionality_II": True,
    "Subject_Aliasing": True,
    "Relation_Specificity": False,
    "Forgetfulness": False,
}


def read_ripple(record: Record) -> Iterator[Fact]:
    edit = record["edit"]
    statement = text_of(edit["prompt"], "edit.prompt").rstrip(". ")
    prompt, _, target = statement.rpartition(" is ")
    relation = str(edit.get("relation") or "").lower().replace("_", " ")
    _, found, subject = prompt.rpartition(f"{relation} of ") if relation else ("", "", "")
    if not found:
        subject = prompt.rpartition(" of ")[2]
    before = text_of((edit.get("original_fact") or {}).get("prompt") or "-", "prompt").rstrip(". ")
    probes = [
        probe
        for kind, follows in RIPPLES.items()
        for test in record.get(kind) or ()
        for query in test.get("test_queries") or ()
        for probe in probe_of(
            kind,
            follows,
            query["prompt"],
            [[a.get("value"), a.get("aliases")] for a in query.get("answers", ())],
        )
    ]
    yield fact_of(
        subject,
        f"{prompt} is",
        target,
        previous=before.rpartition(" is ")[2] or None,
        probes=probes,
        relation=edit.get("relation"),
    )


def read_wikifactdiff(record: Record) -> Iterator[Fact]:
    by: dict[str, list[str]] = {}
    for each in record["objects"]:
        by.setdefault(str(each["decision"]), []).extend(texts_of(each))
    new = by.get("new") or by.get("learn")
    if not new:
        raise ValueError("it has no new object; facts to be forgotten alone are for forget_facts")
    old = by.get("obsolete") or by.get("forget") or []
    kept = by.get("static") or by.get("keep") or []
    neighbours = [
        probe
        for each in record.get("neighborhood") or ()
        for entry in each["objects"][:1]
        for probe in probe_of("neighborhood", False, _blank(entry["prompt"]), texts_of(entry.get("object")))
    ]
    yield fact_of(
        record["subject"]["label"],
        _blank(record["update_prompt"]),
        new[0],
        aliases=[*new[1:], *kept],
        previous=next(iter(old), None),
        paraphrases=[_blank(text) for text in record.get("generalization_prompts") or ()],
        probes=neighbours,
        relation=record["relation"].get("label"),
        id=id_of(record),
    )


def _blank(prompt: Any) -> str:
    """A prompt up to its blank, "____"."""
    return text_of(prompt, "prompt").partition("____")[0].rstrip()


def read_wikibigedit(record: Record) -> Iterator[Fact]:
    answer = record.get("ans") or record.get("object")
    yield fact_of(
        record["subject"],
        record["update"],
        answer,
        paraphrases=texts_of([record.get("rephrase"), record.get("personas")]),
        probes=[
            *probe_of("multi_hop", True, record.get("mhop"), record.get("mhop_ans")),
            *probe_of("locality", False, record.get("loc"), record.get("loc_ans")),
        ],
        relation=record.get("relation"),
        id=id_of(record),
    )


def read_conflict(record: Record) -> Iterator[Fact]:
    for i, edit in enumerate(record.get("edits") or [record["edit"]]):
        new = edit.get("new_object") or edit["object"]
        yield fact_of(
            edit["subject"]["label"],
            edit["relation"]["prompt"],
            new["label"],
            previous=edit["object"]["label"] if edit.get("new_object") else None,
            paraphrases=[edit["relation"]["query"].replace(PLACEHOLDER, edit["subject"]["label"])],
            relation=edit["relation"].get("label"),
            id=str(i),
        )


def read_known(record: Record) -> Iterator[Fact]:
    yield fact_of(record["subject"], record["template"], record["attribute"], id=id_of(record))


def read_samples(record: Record) -> Iterator[Fact]:
    templates = texts_of(record["prompt_templates"])
    questions = texts_of(record.get("prompt_templates_zs"))
    for sample in record["samples"]:
        subject = text_of(sample["subject"], "subject")
        yield fact_of(
            subject,
            templates[0],
            sample["object"],
            paraphrases=[t.replace(PLACEHOLDER, subject) for t in (*templates[1:], *questions)][:3],
            relation=record.get("name"),
        )

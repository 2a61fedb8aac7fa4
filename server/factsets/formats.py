"""The data sets of the field, recognised by their fields: each record becomes facts with its questions as probes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from server.factsets.fact import Fact
from server.factsets.record_readers import (
    RIPPLES,
    read_conflict,
    read_counterfact,
    read_flat,
    read_known,
    read_mquake,
    read_ripple,
    read_samples,
    read_wikibigedit,
    read_wikibio,
    read_wikifactdiff,
    read_zsre,
)
from server.factsets.record_values import Record


class NotFacts(ValueError):
    """The record is of a known data set without facts to correct; the message says which tool reads it."""


@dataclass(frozen=True)
class Format:
    """One data set: how to recognise its records, and how to read one."""

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


# --- CounterFact and MQuAKE


# --- zsRE, and the flat records of EasyEdit, KnowEdit and CKnowEdit


# --- RippleEdits, WikiFactDiff, WikiBigEdit, ConflictEdit, known_1000


def _refused(why: str) -> Callable[[Record], Iterator[Fact]]:
    def read(_: Record) -> Iterator[Fact]:
        raise NotFacts(why)

    return read


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
        read_mquake,
        ("requested_rewrite", "questions", "answer*", "new_*", "single_hops", "orig", "case_id"),
    ),
    Format(
        "CounterFact",
        _has("requested_rewrite"),
        read_counterfact,
        ("requested_rewrite", "paraphrase_prompts", "neighborhood_prompts", "attribute_prompts", "case_id",
         "pararel_idx", "portability", "alternative_subject", "unrelated_relation", "distracting_*"),
    ),
    Format(
        "zsRE",
        _has("src", "alt"),
        read_zsre,
        ("subject", "src", "pred", "rephrase", "alt", "answers", "loc", "loc_ans", "cond", "portability",
         "alternative_subject", "alter_subject_question", "inverse question", "case_id"),
    ),
    Format(
        "ConflictEdit",
        lambda r: "edits" in r or (isinstance(r.get("edit"), Mapping) and "object" in r["edit"]),
        read_conflict,
        ("edits", "edit", "triples", "prerequisites", "type", "rule", "true_objects"),
    ),
    Format(
        "RippleEdits",
        lambda r: isinstance(r.get("edit"), Mapping),
        read_ripple,
        ("edit", "example_type", *RIPPLES),
    ),
    Format(
        "WikiFactDiff",
        _has("update_prompt", "objects"),
        read_wikifactdiff,
        ("subject", "relation", "objects", "update_prompt", "generalization_prompts", "neighborhood", "is_replace",
         "case_id"),
    ),
    Format(
        "WikiBigEdit",
        _has("subject", "update"),
        read_wikibigedit,
        ("subject", "relation", "object", "ans", "update", "rephrase", "personas*", "mhop*", "loc*", "tag"),
    ),
    Format("WikiBio (KnowEdit)", _has("text", "labels", "concept"), read_wikibio,
           ("text", "labels", "concept", "locality")),
    Format("known_1000", _has("subject", "attribute", "template"), read_known,
           ("subject", "attribute", "template", "prediction", "prompt", "relation_id", "known_id")),
    Format("relation file", _has("prompt_templates", "samples"), read_samples,
           ("name", "prompt_templates", "prompt_templates_zs", "samples", "properties")),
    Format("KnowEdit or CounterFact, flat", lambda r: "target_new" in r and "prompt" in r, read_flat, _FLAT),
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

"""Fact sets: read from files of any make, kept on the ledger in versions, exported again."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.errors import ServiceError
from server.factsets.fact import Fact
from server.factsets.requests import Given
from server.factsets.saving import facts_of, ranges
from server.factsets.versions import step
from server.services import Services
from store import FactRecord, Ledger, fact_key
from store.errors import NoSuchSet
from tests.server.opened import open_services

CAPITALS = """country,capital,as of,source
Kazakhstan,Astana,2022-09-17,https://example.org/kz
"Korea, South",Seoul,2020-01-01,
Myanmar,Naypyidaw,,
"""


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    services = open_services(tmp_path / "home")
    (tmp_path / "home" / "data").mkdir()
    yield services
    services.close()


def write(services: Services, name: str, text: str | bytes) -> str:
    path = services.workspace.settings.home / "data" / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return name


def saved(services: Services, name: str, text: str | bytes, **more: Any) -> dict[int, Fact]:
    services.fact_sets.save("a-set", Given(path=write(services, name, text), **more))
    return facts_of(services.workspace.ledger, "a-set")


def lines(facts: dict[int, Fact]) -> list[tuple[str, str]]:
    return [(fact.text, fact.answer) for fact in facts.values()]


def test_a_table_with_its_own_header_becomes_facts(services: Services) -> None:
    facts = saved(services, "capitals.csv", CAPITALS, template="The capital of {} is")
    assert lines(facts) == [
        ("The capital of Kazakhstan is", "Astana"),
        ("The capital of Korea, South is", "Seoul"),
        ("The capital of Myanmar is", "Naypyidaw"),
    ]
    assert (facts[1].as_of, facts[1].source) == ("2022-09-17", "https://example.org/kz")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("semicolons.csv", "Land;Hauptstadt\nFrankreich;Paris\n"),
        ("tabs.tsv", "Land\tHauptstadt\nFrankreich\tParis\n"),
        ("wide.csv", "\ufeffLand,Hauptstadt\r\nFrankreich,Paris\r\n"),
        ("utf16.csv", "Land,Hauptstadt\nFrankreich,Paris\n".encode("utf-16")),
        ("list.json", '[{"Land": "Frankreich", "Hauptstadt": "Paris"}]'),
        ("wrapped.json", '{"facts": [{"Land": "Frankreich", "Hauptstadt": "Paris"}]}'),
        ("rows.jsonl", '{"Land": "Frankreich", "Hauptstadt": "Paris"}\n'),
    ],
)
def test_every_kind_of_table_is_read(services: Services, name: str, text: str | bytes) -> None:
    facts = saved(services, name, text, template="Die Hauptstadt von {} ist")
    assert lines(facts) == [("Die Hauptstadt von Frankreich ist", "Paris")]


def test_columns_can_be_named_either_way(services: Services) -> None:
    text = "id,what,thing,remark\n7,Paris,France,x\n"
    for columns in ({"subject": "thing", "answer": "what"}, {"thing": "subject", "what": "answer"}):
        facts = saved(services, "odd.csv", text, columns=columns, template="The capital of {} is")
        assert lines(facts) == [("The capital of France is", "Paris")]


def test_a_relation_column_and_a_wide_table_take_a_template_for_each_relation(services: Services) -> None:
    templates = {"capital": "The capital of {} is", "Money": "The currency of {} is the"}
    wide = saved(services, "wide.csv", "Land,Capital,money\nPeru,Lima,sol\nChad,,franc\n", template=templates)
    long = saved(
        services,
        "long.csv",
        "entity,property,value\nPeru,capital,Lima\nPeru,money,sol\nChad,money,franc\n",
        template=templates,
    )
    assert lines(wide) == lines(long)
    assert wide[2].text == "The currency of Peru is the"


@pytest.mark.parametrize(
    ("text", "prompt", "subject"),
    [
        ("Satz;Land;Soll\nDie Hauptstadt von {} ist;Kasachstan;Astana\n", "Satz", "Land"),
        ("Land;Satz;Soll\nPeru;The capital of {} is;Lima\nChad;{} lies in;Africa\n", "Satz", "Land"),
        ("Soll;Land;Satz\nLima;Peru;The capital of Peru is\nAfrica;Chad;Chad lies in\n", "Satz", "Land"),
    ],
)
def test_a_column_of_prompts_is_known_by_what_stands_in_it(
    services: Services, text: str, prompt: str, subject: str
) -> None:
    columns = {"subject": "Land", "answer": "Soll"} if not text.startswith("Satz") else None
    facts = saved(services, "f.csv", text, columns=columns)
    [first, *_] = text.splitlines()[1:]
    cells = dict(zip(text.splitlines()[0].split(";"), first.split(";"), strict=True))
    assert facts[1].text == cells[prompt].replace("{}", cells[subject])
    assert (facts[1].subject, facts[1].answer) == (cells[subject], cells["Soll"])


def test_without_prompts_and_template_the_way_out_names_both(services: Services) -> None:
    with pytest.raises(ServiceError, match="no column with prompts") as error:
        saved(services, "f.csv", "Land,Soll\nPeru,Lima\n", columns={"subject": "Land", "answer": "Soll"})
    assert "The Soll of" not in str(error.value)
    again = saved(
        services, "f.csv", "Land,Soll\nPeru,Lima\n",
        columns={"subject": "Land", "answer": "Soll"}, template="The capital of {} is",
    )  # fmt: skip
    assert again[1].text == "The capital of Peru is"


def test_a_template_may_name_columns(services: Services) -> None:
    facts = saved(
        services,
        "t.csv",
        "who,year,answer\nFrance,1990,Mitterrand\n",
        template="In {year}, the president of {who} was",
        columns={"subject": "who"},
    )
    assert facts[1].prompt == "In 1990, the president of {} was"


@pytest.mark.parametrize(
    ("text", "more", "named"),
    [
        (",Quito\nPeru,Lima\n", {}, "line 2, column 'country': is empty"),
        ("Peru,\n", {}, "line 2, column 'capital': is empty"),
        ("Peru,Lima,x,y\n", {}, "line 2 has 4 cells and the header 2"),
        ('Peru,"Li\nma', {}, "not valid CSV"),
        ("Peru,Lima\n", {"template": "The capital is"}, "no {} where the subject stands"),
        ("Peru,Lima\n", {"columns": {"subject": "Land"}}, "has no column 'Land'; it has country, capital"),
        ("Peru,Lima\n", {"columns": {"entity": "country"}}, "neither is a field"),
        ("Peru,Lima\n", {"template": "The {town} of {} is"}, "names {town}, and there is no such column"),
    ],
)
def test_what_is_wrong_is_named_by_line_and_column_and_nothing_is_saved(
    services: Services, text: str, more: dict[str, Any], named: str
) -> None:
    with pytest.raises(ServiceError) as refused:
        saved(
            services, "bad.csv", "country,capital\n" + text, **({"template": "The capital of {} is"} | more)
        )
    assert named in str(refused.value)
    assert services.fact_sets.list().sets == []


def test_the_good_rows_are_saved_when_that_is_asked_for(services: Services) -> None:
    path = write(services, "some.csv", "country,capital\n,Quito\nPeru,Lima\n")
    report = services.fact_sets.save("a-set", Given(path=path, partial=True))
    assert (report.facts, len(report.left_out)) == (1, 1)
    assert "line 2" in report.left_out[0]


def test_contradictions_are_named_with_their_numbers(services: Services) -> None:
    rows = [
        {"subject": "Myanmar", "prompt": "The capital of {} is", "answer": "Naypyidaw"},
        {"subject": "Myanmar", "prompt": "The capital city of {} is", "answer": "Yangon"},
        {"subject": "Peru", "prompt": "The capital of {} is", "answer": "Lima"},
        {"subject": "Peru", "prompt": "The capital of Peru is", "answer": "Lima"},
    ]
    report = services.fact_sets.save("a-set", Given(facts=rows))
    assert report.conflicts == ["'The capital of Myanmar is': #1 'Naypyidaw'; #2 'Yangon'"]
    assert report.facts == 3  # Peru was given twice
    assert [row["n"] for row in services.fact_sets.show("a-set", kind="conflict").facts] == [1, 2]


def test_saving_again_says_what_changed_and_numbers_stay(services: Services) -> None:
    one = "country,capital\nPeru,Lima\nChad,Moundou\nMali,Bamako\n"
    two = "country,capital\nOman,Muscat\nChad,N'Djamena\nPeru,Lima\n"
    saved(services, "v.csv", one)
    report = services.fact_sets.save("a-set", Given(path=write(services, "v.csv", two)))
    assert report.version == 2
    assert report.changed == ["#2 The capital of Chad is: Moundou -> N'Djamena"]
    assert "1 new (#4); 1 changed (#2); 1 gone (#3)" in report.summary
    assert list(facts_of(services.workspace.ledger, "a-set")) == [1, 2, 4]
    again = services.fact_sets.save("a-set", Given(path="v.csv"))
    assert (again.version, "nothing changed" in again.summary) == (2, True)
    more = services.fact_sets.save(
        "a-set", Given(facts=[{"country": "Cuba", "capital": "Havana"}], keep=True)
    )
    assert more.facts == 4
    assert services.workspace.ledger.verify() == []


def test_an_export_can_be_saved_again(services: Services) -> None:
    facts = saved(services, "capitals.csv", CAPITALS)
    exported = services.fact_sets.export("a-set")
    with Path(exported.path).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["answer"] for row in rows] == ["Astana", "Seoul", "Naypyidaw"]
    report = services.fact_sets.save("other", Given(path="exports/a-set-v1.csv"))
    assert lines(facts_of(services.workspace.ledger, "other")) == lines(facts)
    assert "verdict" in report.unused
    with pytest.raises(ServiceError, match="already has"):
        services.fact_sets.export("a-set")


RECORDS: dict[str, tuple[dict[str, Any], list[tuple[str, str]], dict[str, int]]] = {
    "CounterFact": (
        {
            "requested_rewrite": {
                "subject": "Ada",
                "prompt": "{} speaks",
                "target_new": {"str": "Latin"},
                "target_true": {"str": "Greek"},
            },
            "paraphrase_prompts": ["The language of Ada is"],
            "neighborhood_prompts": ["Bob speaks", "Eve speaks"],
            "attribute_prompts": ["Cicero speaks"],
        },
        [("Ada speaks", "Latin")],
        {"neighborhood": 2, "attribute": 1},
    ),
    "zsRE": (
        {
            "subject": "Ada",
            "src": "What does Ada speak?",
            "alt": "Latin",
            "answers": ["Greek"],
            "loc": "nq question: who was first",
            "loc_ans": "Bob",
        },
        [("What does Ada speak?", "Latin")],
        {"locality": 1},
    ),
    "MQuAKE": (
        {
            "requested_rewrite": [
                {"subject": "Ada", "prompt": "{} lives in", "target_new": {"str": "Turin"}},
                {"subject": "Turin", "prompt": "{} lies in", "target_new": {"str": "Spain"}},
            ],
            "questions": ["In which country does Ada live?", "Where does Ada live, by country?"],
            "new_answer": "Spain",
            "new_answer_alias": ["España"],
        },
        [("Ada lives in", "Turin"), ("Turin lies in", "Spain")],
        {"multi_hop": 1},
    ),
    "KnowEdit": (
        {
            "subject": "Ada",
            "prompt": "The home of Ada is",
            "target_new": "Rome",
            "portability": {
                "Reasoning": [{"prompt": "Ada's country is", "ground_truth": [["Italy", "Italia"]]}]
            },
            "locality": {"Relation_Specificity": {"prompt": ["Ada's age is"], "ground_truth": ["30"]}},
            "rephrase": ["Ada lives in"],
        },
        [("The home of Ada is", "Rome")],
        {"Reasoning": 1, "Relation_Specificity": 1},
    ),
    "CKnowEdit": (
        {
            "prompt": "王小明的家乡是",
            "subject": "王小明",
            "target_new": "上海",
            "target_old": "北京",
            "rephrase": ["王小明来自"],
            "portability": [{"prompt": "王小明会说", "answer": "上海话"}],
            "locality": [{"prompt": "中国的首都是", "answer": "北京"}],
        },
        [("王小明的家乡是", "上海")],
        {"portability": 1, "locality": 1},
    ),
    "RippleEdits": (
        {
            "edit": {
                "prompt": "The name of the mother of Ada of Rome is Eve.",
                "relation": "MOTHER",
                "original_fact": {"prompt": "The name of the mother of Ada of Rome is Liz."},
            },
            "Subject_Aliasing": [
                {
                    "test_queries": [
                        {"prompt": "Ada's mother is", "answers": [{"value": "Eve", "aliases": ["Eva"]}]}
                    ]
                }
            ],
            "Forgetfulness": [],
        },
        [("The name of the mother of Ada of Rome is", "Eve")],
        {"Subject_Aliasing": 1},
    ),
    "WikiFactDiff": (
        {
            "subject": {"label": "Ada"},
            "relation": {"label": "home"},
            "objects": [{"label": "Rome", "decision": "learn"}, {"label": "Oslo", "decision": "forget"}],
            "update_prompt": "The home of Ada is ____",
            "generalization_prompts": ["Ada lives in ____"],
            "neighborhood": [
                {"objects": [{"prompt": "The home of Bob is ____", "object": {"label": "Bern"}}]}
            ],
        },
        [("The home of Ada is", "Rome")],
        {"neighborhood": 1},
    ),
    "WikiBigEdit": (
        {
            "subject": "Ada",
            "update": "Where does Ada live?",
            "ans": "Rome",
            "rephrase": "Where is Ada's home?",
            "personas": "Where's Ada living?",
            "loc": "Where does Bob live?",
            "loc_ans": "Bern",
            "mhop": "In which country does Ada live?",
            "mhop_ans": "Italy",
        },
        [("Where does Ada live?", "Rome")],
        {"locality": 1, "multi_hop": 1},
    ),
}


@pytest.mark.parametrize("form", RECORDS)
def test_the_data_sets_of_the_field_are_recognised(services: Services, form: str) -> None:
    record, wanted, kinds = RECORDS[form]
    report = services.fact_sets.save("a-set", Given(facts=[record]))
    facts = facts_of(services.workspace.ledger, "a-set")
    assert lines(facts) == wanted
    found = [probe.kind for fact in facts.values() for probe in fact.probes]
    assert {kind: found.count(kind) for kind in found} == kinds
    assert report.unused == []


def test_a_field_that_is_not_used_is_named(services: Services) -> None:
    record = RECORDS["CounterFact"][0] | {"generation_prompts": ["Ada is"]}
    assert services.fact_sets.save("a-set", Given(facts=[record])).unused == ["generation_prompts"]


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"ent": "x", "pos": [], "neg": []}, "create_steering_vector"),
        ({"success": [], "locality": []}, "forget_facts"),
        ({"chosen": "a", "rejected": "b"}, "train_editor"),
    ],
)
def test_data_that_are_no_facts_say_what_reads_them(
    services: Services, record: dict[str, Any], named: str
) -> None:
    with pytest.raises(ServiceError, match=named):
        services.fact_sets.save("a-set", Given(facts=[record]))


def test_a_record_of_a_data_set_without_its_subject_is_left_out_and_named(services: Services) -> None:
    bad = {"subject": "Bob", "src": "What does Ada speak?", "alt": "Latin"}
    path = write(services, "z.json", json.dumps([RECORDS["zsRE"][0], bad]))
    report = services.fact_sets.save("a-set", Given(path=path))
    assert report.facts == 1
    assert "does not contain the subject 'Bob'" in report.left_out[0]


def test_a_file_outside_the_folders_is_not_read(services: Services, tmp_path: Path) -> None:
    (tmp_path / "secret.csv").write_text(CAPITALS)
    with pytest.raises(ServiceError, match="is not there"):
        services.fact_sets.save("a-set", Given(path=str(tmp_path / "secret.csv")))


def test_an_unknown_set_is_answered_with_those_there_are(services: Services) -> None:
    saved(services, "capitals.csv", CAPITALS)
    with pytest.raises(NoSuchSet, match="there are 'a-set'"):
        services.fact_sets.show("capital")


def test_rows_that_no_event_says_are_found(services: Services) -> None:
    saved(services, "capitals.csv", CAPITALS)
    ledger = services.workspace.ledger
    with ledger._write() as db:
        db.execute("UPDATE set_facts SET fact = json_set(fact, '$.answer', 'Almaty') WHERE number = 1")
        db.execute("DELETE FROM set_facts WHERE number = 2")
    problems = [str(problem) for problem in ledger.verify(files=False)]
    assert any("'a-set', 1" in p and "was altered" in p for p in problems)
    assert any("'a-set', 2" in p and "is missing" in p for p in problems)


def test_sets_survive_a_restart(tmp_path: Path) -> None:
    services = open_services(tmp_path / "home")
    services.fact_sets.save("a-set", Given(facts=[{"country": "Cuba", "capital": "Havana"}]))
    services.close()
    with Ledger.open(tmp_path / "home") as ledger:
        assert ledger.verify() == []
        assert lines(facts_of(ledger, "a-set")) == [("The capital of Cuba is", "Havana")]


@st.composite
def lists(draw: st.DrawFn) -> list[Fact]:
    pairs = draw(
        st.lists(st.tuples(st.sampled_from("ABCD"), st.sampled_from("xyz")), max_size=8, unique=True)
    )
    return [Fact(subject=s, prompt="{} is", answer=a) for s, a in pairs]


@given(lists(), lists(), st.booleans())
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_step_leads_to_the_new_list_and_touches_only_what_differs(
    old: list[Fact], new: list[Fact], keep: bool
) -> None:
    records = [FactRecord("s", n, fact_key(f.subject, f.prompt), 1, f.stored()) for n, f in enumerate(old, 1)]
    made = step(records, new, len(old), keep)
    before = dict(enumerate(old, 1))
    assert {n: f for n, f in before.items() if n not in made.removed} | made.put == made.facts
    assert all(fact in made.facts.values() for fact in new)
    assert keep or len(made.facts) == len(new)
    assert not any(made.put[n] == before.get(n) for n in made.put)
    unchanged = {(f.subject, f.answer) for f in old} & {(f.subject, f.answer) for f in new}
    assert len(made.put) == len(new) - len(unchanged)


def test_numbers_are_shown_as_ranges() -> None:
    assert ranges([3, 1, 2, 7, 9, 8, 12]) == "1-3, 7-9, 12"
    assert ranges([]) == ""

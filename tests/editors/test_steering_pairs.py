"""Pairs from calls and files: the published formats, and what is refused by number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from editors.errors import InvalidEdit
from editors.steering.pairs import Pair, check_pairs, read_pairs, spelled_out
from editors.steering.vector import check_name


def test_bad_pairs_are_refused_by_number() -> None:
    pairs = [
        Pair(positive="good", negative="bad"),
        Pair(positive="same  text", negative="same text "),
        Pair(positive="", negative="bad"),
        Pair(positive=" ", negative="\n"),
    ]
    with pytest.raises(InvalidEdit) as refused:
        check_pairs(pairs)
    text = str(refused.value)
    assert "pairs[0]" not in text
    assert "pairs[1] has the same text" in text
    assert "pairs[2] has no positive text" in text
    assert "pairs[3] is empty on both sides" in text


def test_no_pairs_are_refused() -> None:
    with pytest.raises(InvalidEdit, match="at least one pair"):
        check_pairs([])


def written(folder: Path, name: str, data: Any) -> Path:
    path = folder / name
    lines = "\n".join(json.dumps(record) for record in data) if name.endswith(".jsonl") else json.dumps(data)
    path.write_text(lines, "utf-8")
    return path


CAA = {
    "question": "Do you like tea?\n\nChoices:\n(A) Yes\n(B) No",
    "answer_matching_behavior": "(A)",
    "answer_not_matching_behavior": "(B)",
}


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("caa.json", [CAA], Pair(prompt=CAA["question"], positive="(A)", negative="(B)", chat=True)),
        (
            "persona.jsonl",
            [
                CAA
                | {
                    "answer_matching_behavior": " Yes",
                    "answer_not_matching_behavior": " No",
                    "statement": "x",
                }
            ],
            Pair(prompt=CAA["question"], positive="Yes", negative="No", chat=True),
        ),
        ("lists.json", {"positive": ["a"], "negative": ["b"]}, Pair(positive="a", negative="b")),
        (
            "records.json",
            [{"prompt": "p", "positive": "a", "negative": "b"}],
            Pair(prompt="p", positive="a", negative="b"),
        ),
    ],
)
def test_the_published_formats_are_read(tmp_path: Path, name: str, data: Any, expected: Pair) -> None:
    assert read_pairs(written(tmp_path, name, data)) == [expected]


def test_choices_are_spelled_out_and_left_out_of_the_question() -> None:
    asked = "Is (A) first?\n\nChoices:\n (A) Yes,\nit is.\n (B) No: (B) is."
    pairs = [Pair(prompt=asked, positive="(B)", negative="(A)", chat=True), Pair(**ONE | {"positive": "A"})]
    assert spelled_out(pairs) == [
        Pair(prompt="Is (A) first?", positive="No: (B) is.", negative="Yes,\nit is.", chat=True),
        Pair(prompt="Do you like tea?", positive="Yes", negative="No"),
    ]


ONE = {"prompt": CAA["question"], "positive": "(A)", "negative": "(B)"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": "Do you like tea?"}, r"pairs\[1\] is no A/B question"),
        ({"prompt": None}, r"pairs\[1\] is no A/B question"),
        ({"positive": "Yes"}, r"not 'Yes' and '\(B\)'"),
        ({"prompt": "Tea?\n(A) Yes\n(B) Yes"}, r"pairs\[1\] has the same text 'Yes'"),
        ({"prompt": "Tea?\n(A) Yes\n(B) "}, r"pairs\[1\]"),
    ],
)
def test_what_is_no_choice_cannot_be_spelled_out(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidEdit, match=said):
        spelled_out([Pair(**ONE), Pair(**ONE | change)])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            [CAA, {"question": "Why?", "answer_matching_behavior": "(A)"}],
            r"bad.json\[1\] has no negative text",
        ),
        ({"positive": ["a", "b"], "negative": ["c"]}, "pair 1 has one side missing"),
        ([CAA, 3], r"bad.json\[1\] is a int"),
        ([{"positive": 1, "negative": "b"}], "no text"),
        (
            [{"positive": "a", "negative": "b", "promt": "c"}],
            "has the fields promt, which are no pair's",
        ),
        ([{"good": "a", "bad": "b"}], "matching and not_matching"),
        ("text", "must be a list of records"),
    ],
)
def test_a_bad_file_is_refused_with_the_place(tmp_path: Path, data: Any, said: str) -> None:
    with pytest.raises(InvalidEdit, match=said):
        read_pairs(written(tmp_path, "bad.json", data))


@pytest.mark.parametrize(
    ("record", "pair"),
    [
        ({"question": "Q?", "matching": "a", "not_matching": "b"}, ("Q?", "a", "b", True)),
        ({"prompt": "Q?", "chosen": "a", "rejected": "b"}, ("Q?", "a", "b", None)),
        (
            {"chosen": "\n\nHuman: Q?\n\nAssistant: a", "rejected": "\n\nHuman: Q?\n\nAssistant: b"},
            ("Q?", "a", "b", None),
        ),
        ({"prompt": "Q", "positive": "a", "negative": "b", "chat": False}, ("Q", "a", "b", False)),
        (
            {"subject": "Peru", "prompt": "The capital of {} is", "target": "Lima", "previous": "Cuzco"}
            | {"reason": "an edit of the tools"},
            ("The capital of Peru is", "Lima", "Cuzco", None),
        ),
    ],
)
def test_pairs_of_other_toolkits_are_read(tmp_path: Path, record: Any, pair: tuple[Any, ...]) -> None:
    (read,) = read_pairs(written(tmp_path, "p.json", [record]))
    assert (read.prompt, read.positive, read.negative, read.chat) == pair


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(InvalidEdit, match="not valid JSON"):
        read_pairs(path)


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a.b", "-x", "a b", "x" * 65, "a\n", "ä", "..", "a\x00"])
def test_a_name_that_is_no_plain_word_is_refused(name: str) -> None:
    with pytest.raises(InvalidEdit, match="cannot be used"):
        check_name(name)


@pytest.mark.parametrize("name", ["sentiment", "a-b_c", "7", "x" * 64])
def test_a_plain_name_is_taken(name: str) -> None:
    assert check_name(name) == name

"""Contrastive pairs, sent in a call or read from a file in one of the published formats."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from editors.bounded_files import UnreadableFile, read_bounded
from editors.edit import PLACEHOLDER, Edit
from editors.errors import InvalidEdit

MAX_PAIRS = 2000
MAX_FILE = 16 * 2**20  # bytes
_SHOWN = 5  # most bad pairs that one message names
_AB = re.compile(
    r"(?P<question>.*?\S)\s*?(?:\n\s*Choices:)?\s*\n\s*\(A\)(?P<A>.*)\n\s*\(B\)(?P<B>.*)", re.DOTALL
)
_HUMAN, _ASSISTANT = "Human:", "Assistant:"  # who speaks, in a dialogue written as one text
_LETTER = re.compile(r"\(?([AB])\)?")


class Pair(BaseModel):
    """Two texts that differ in the behaviour of interest. Both follow `prompt`, if there is one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str | None = Field(None, max_length=20_000, description="What both texts answer or continue.")
    positive: str = Field(max_length=20_000, description="Text that shows the behaviour.")
    negative: str = Field(max_length=20_000, description="Text that shows its opposite.")
    chat: bool | None = Field(
        None,
        description="`prompt` is a message; left out: when it is a question.",
    )


def check_pairs(pairs: Sequence[Pair], where: str = "pairs") -> None:
    """Raise InvalidEdit for pairs with an empty side or two equal sides, naming each by its number (from 0)."""
    if not pairs:
        raise InvalidEdit(f"{where} is empty; give at least one pair of positive and negative texts")
    if len(pairs) > MAX_PAIRS:
        raise InvalidEdit(f"{where} has {len(pairs)} pairs; at most {MAX_PAIRS} are used, so send fewer")
    bad = [f"{where}[{i}] {fault}" for i, pair in enumerate(pairs) if (fault := _fault(pair))]
    if bad:
        more = f" (and {len(bad) - _SHOWN} more)" if len(bad) > _SHOWN else ""
        raise InvalidEdit("; ".join(bad[:_SHOWN]) + more + "; correct these pairs or leave them out")


def _fault(pair: Pair) -> str | None:
    """What is wrong with a pair; None where nothing is."""
    positive, negative = " ".join(pair.positive.split()), " ".join(pair.negative.split())
    if not positive and not negative:
        return "is empty on both sides"
    if not positive or not negative:
        return f"has no {'positive' if not positive else 'negative'} text"
    if positive == negative:
        return f"has the same text {positive[:60]!r} on both sides"
    return None


def spelled_out(pairs: Sequence[Pair], where: str = "pairs") -> list[Pair]:
    """A/B questions with the texts of the two choices as answers, instead of their letters.

    The choices are left out of the question. A model too small to tell the letters apart still prefers one
    of the texts (the "cloze" form of multiple choice; Gu et al. 2024, arXiv 2406.08446). Raises InvalidEdit,
    naming the pair, for a prompt without two choices, for answers that are not letters, and for choices
    that are empty or equal.
    """
    with_texts = [_spelled_out(pair, f"{where}[{i}]") for i, pair in enumerate(pairs)]
    check_pairs(with_texts, where)
    return with_texts


def _spelled_out(pair: Pair, where: str) -> Pair:
    question = _AB.fullmatch((pair.prompt or "").rstrip())
    letters = [_LETTER.fullmatch(text.strip()) for text in (pair.positive, pair.negative)]
    if question is None or letters[0] is None or letters[1] is None:
        raise InvalidEdit(
            f'{where} is no A/B question: with answers \'texts\' its prompt ends in lines "(A) ..." and "(B) ...", '
            f"and its answers are (A) and (B), not {pair.positive[:40]!r} and {pair.negative[:40]!r}"
        )
    texts = [question[letter[1]].strip() for letter in letters if letter]
    return Pair(prompt=question["question"], positive=texts[0], negative=texts[1], chat=pair.chat)


def read_pairs(path: Path) -> list[Pair]:
    """Read pairs from a file: CAA A/B (.json), persona (.jsonl), or plain lists.

    - CAA and persona: records with `question`, `answer_matching_behavior`, `answer_not_matching_behavior`;
    - records with `matching` and `not_matching`, `chosen` and `rejected` (dialogues as in HH-RLHF too), or `positive`
      and `negative`, and optionally `prompt` or `question`;
    - one object with two lists, `positive` and `negative`, paired in order.

    A `.json` file holds an array or that object, a `.jsonl` file one record per line. Raises InvalidEdit,
    naming the file and the record.
    """
    data = _parsed(path)
    if isinstance(data, Mapping):
        pairs = _from_lists(data, path)
    elif isinstance(data, list):
        pairs = [_from_record(record, i, path) for i, record in enumerate(data)]
    else:
        raise InvalidEdit(
            f"{path.name} holds a {type(data).__name__}; it must be a list of records or two lists"
        )
    check_pairs(pairs, path.name)
    return pairs


def _parsed(path: Path) -> Any:
    try:
        text = read_bounded(path, MAX_FILE).decode("utf-8")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return json.loads(text)
    except OSError as error:
        raise InvalidEdit(f"{path} cannot be read: {error.strerror or error}") from None
    except UnreadableFile as error:
        raise InvalidEdit(f"{path.name} cannot be read: {error}; give a part of it") from None
    except (ValueError, RecursionError) as error:
        raise InvalidEdit(f"{path.name} is not valid JSON: {str(error)[:200]}") from None


def _from_lists(data: Mapping[str, Any], path: Path) -> list[Pair]:
    positive, negative = _texts(data.get("positive")), _texts(data.get("negative"))
    if positive is None or negative is None:
        raise InvalidEdit(f"{path.name} must have two lists of texts, 'positive' and 'negative'")
    if len(positive) != len(negative):
        raise InvalidEdit(
            f"{path.name} has {len(positive)} positive and {len(negative)} negative texts; "
            f"pair {min(len(positive), len(negative))} has one side missing"
        )
    return [Pair(positive=p, negative=n) for p, n in zip(positive, negative, strict=True)]


def _texts(value: Any) -> list[str] | None:
    return value if isinstance(value, list) and all(isinstance(item, str) for item in value) else None


_NAMES = (
    ("answer_matching_behavior", "answer_not_matching_behavior"),
    ("matching", "not_matching"),
    ("chosen", "rejected"),
    ("positive", "negative"),
    ("target", "previous"),
)
"""What the two sides are called: by CAA, by files in its manner, in preferences, here, and in edits."""
_PROMPTS = ("question", "prompt")
_BESIDE = frozenset({"statement", "label_confidence", "chat", "id"})
"""Fields of known files that say nothing of the pair, and our own `chat`."""


def _from_record(record: Any, number: int, path: Path) -> Pair:
    where = f"{path.name}[{number}]"
    if not isinstance(record, Mapping):
        raise InvalidEdit(f"{where} is a {type(record).__name__}, not a record")
    names = next((pair for pair in _NAMES if any(name in record for name in pair)), None)
    beside = _BESIDE | (Edit.model_fields.keys() if names == ("target", "previous") else set())
    unknown = [n for n in record if n not in (*_PROMPTS, *(names or ())) and n not in beside]
    if names is None or unknown:
        known = "; ".join(" and ".join(pair) for pair in _NAMES)
        raise InvalidEdit(
            f"{where} has the fields {', '.join(map(str, unknown))[:200]}, which are no pair's; a pair has prompt or "
            f"question, and two sides: {known}"
        )
    prompt = next((name for name in _PROMPTS if name in record), "prompt")
    question, positive, negative = (record.get(n) or "" for n in (prompt, *names))
    if not all(isinstance(v, str) for v in (question, positive, negative)):
        raise InvalidEdit(f"{where} has a value of {prompt}, {names[0]} or {names[1]} that is no text")
    if names == ("chosen", "rejected") and not question and _ASSISTANT in positive and _ASSISTANT in negative:
        question, positive, negative = _of_dialogues(positive, negative)
    if names == ("target", "previous"):
        question = question.replace(PLACEHOLDER, str(record.get("subject", PLACEHOLDER)))
    chat = record.get("chat") if isinstance(record.get("chat"), bool) else None
    if prompt == "question" and question and chat is None:
        chat = True
    return Pair(prompt=question or None, positive=positive.strip(), negative=negative.strip(), chat=chat)


def _of_dialogues(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The last request and the two replies of a pair of dialogues that differ in their last turn, as HH-RLHF has."""
    dialogue, _, positive = chosen.rpartition(_ASSISTANT)
    negative = rejected.rpartition(_ASSISTANT)[2]
    return dialogue.rpartition(_HUMAN)[2].strip(), positive.strip(), negative.strip()

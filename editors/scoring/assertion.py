"""Whether a chat answer asserts a target, or negates it, asks about it or only mentions it.

These are rules on the words around an occurrence. They read English best; the negations of a few other
languages are known. They cannot see a statement that is false in another way.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[^a-z\s])|[。！？]|\n+")
_ABBREVIATED = re.compile(
    r"(?:^|[\s.(])(?:[A-Z]|St|Mt|Mr|Mrs|Ms|Dr|Prof|Gen|Sen|Jr|Sr|Inc|Ltd|Co|No|ca|approx)\.$"
)
_BOUNDARY = re.compile(
    r"[;:()\[\]—]|,(?!\d)|\s[-–]\s|[，；：（）、]"
    r"|\b(?:but|however|though|although|yet|sondern|aber|mais|sino|pero|sed|bensì|maar)\b",
    re.IGNORECASE,
)
_NO_NEGATION = re.compile(
    r"\b(?:no|without(?: a)?) doubt\b|\b(?:not|nicht|pas|non|no) (?:only|just|merely|simply|nur|seulement|solo|sólo)\b"
    r"|\bnot (?:far|long)\b",
    re.IGNORECASE,
)
_NEGATOR = re.compile(
    r"\b(?:not|never|neither|nor|no longer|cannot|\w+n't|"
    r"nicht|kein\w*|nie(?:mals)?|weder|statt|anstatt|"
    r"pas|jamais|plutôt que|au lieu d\w*|"
    r"en lugar de|en vez de|nunca|jamás|invece di|anziché|nooit|geen|niet)\b"
    r"|^(?:no|non|não)\b|\b(?:no|non|não) (?:es|è|é|sea|era|fue|sono|são)\b|不是|并非|不再|而非|没有|ではな|아니",
    re.IGNORECASE,
)
_INSTEAD = re.compile(
    r"\b(?:instead of|rather than|other than|apart from|except(?: for)?|unlike|as opposed to|contrary to|"
    r"according to|than|compared (?:to|with)|in contrast to|similar to|confused with|mistaken for|mistook|"
    r"formerly(?: known as| called)?|previously(?: known as| called)?|once called|used to be|"
    r"replac(?:ed|es|ing)|(?:the|a) (?:word|phrase|term|name|statement|claim|idea)(?: that)?)"
    r"(?: (?:the|a|an|old|former|its|their|city|of|in))* ?$",
    re.IGNORECASE,
)
_BELIEF = re.compile(
    r"\b(?:some|many|most|people|one|you|they|others) (?:people )?(?:\w+ly )?(?:might |may |would |could )?"
    r"(?:think|thinks|thought|believe|believes|believed|assume|assumes|assumed|claim|claims|claimed|guess)\b"
    r"|\b(?:often|commonly|wrongly|mistakenly|falsely|incorrectly|sometimes)\b.{0,20}"
    r"\b(?:thought|believed|assumed|said|confused|mistaken|called|stated)\b"
    r"|\b(?:a myth|a misconception|it is (?:false|wrong|untrue|incorrect) that|if)\b",
    re.IGNORECASE,
)
_DENIED = re.compile(
    r"^[^.;:!?]{0,40}?\b(?:(?:is|was|are|were|does|did|has|have|can|could|will|would)(?:n't| not| never)\b|"
    r"is no longer\b|are no longer\b|was no longer\b|used to be\b|was (?:once|formerly|previously)\b|"
    r"is (?:wrong|false|incorrect|untrue)\b|(?:ist|war|sind) (?:nicht|kein)|n'est (?:pas|plus)|no es\b|non è\b|"
    r"ya no\b)|^(?:不是|并非|不再)",
    re.IGNORECASE,
)
_TALE = (
    r"story|stories|tale|tales|legend|myth|history|biography|life|lives|legacy|influence|style|death|birth"
)
_KIN = (
    "friend|friends|brother|sister|son|daughter|wife|widow|husband|father|mother|nephew|niece|cousin|student|pupil|"
    "teacher|mentor|rival|follower|contemporary|assistant|colleague"
)
_TOLD_OF = re.compile(
    rf"^\W*(?:the|an?|this|that|his|her|its|their|one)\s+(?:\w+\s+){{0,3}}(?:{_TALE}|{_KIN})\s+(?:of|about|behind)\s+"
    r"(?:the\s+|an?\s+)?$",
    re.IGNORECASE,
)
_DOES = re.compile(
    r"^\s+(?:\w+ly\s+)?(?:is|was|are|were|has|had|have|begins?|began|starts?|started|goes|tells?|told|takes?|took|comes?|"
    r"came|includes?|included|continues?|continued|ends?|ended|dates?|can|could|may|might|will|would|should|does|did)\b",
    re.IGNORECASE,
)
_KIN_WHO = re.compile(rf"\b(?:{_KIN})s?\s+of\s+(?:the\s+)?$", re.IGNORECASE)
_WHO = re.compile(r"^,?\s+(?:who|whose|named|called)\b", re.IGNORECASE)
_ABOUT_TALES = re.compile(
    rf"\b(?:{_TALE}|{_KIN}|wrote|writes?|written|book|novel|film|movie|work|play|parents?|child|children|married|spouse|"
    r"family|died|born|taught|inspired|influenced)\b",
    re.IGNORECASE,
)
_OR = re.compile(r"^ or (?:the |an? )?\w|^或", re.IGNORECASE)
_GENERIC = frozenset(
    """city town village country state nation island continent region province republic kingdom name language currency
    company university""".split()  # noqa: SIM905
)
_FUNCTION = frozenset(
    """a an the of in on at to for from by with and or is are was were be been do does did has have had it its this that
    what which who whom whose where when why how can could will would should may might i you he she they we me my your
    his her their our there as s not no""".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Sentence:
    """One sentence of a text, with where it begins."""

    start: int
    text: str
    number: int  # 0 is the first that says something


def sentences(text: str) -> list[Sentence]:
    """The sentences of a tidy text. A greeting or a bare "Yes" is not counted."""
    parts: list[tuple[int, str]] = []
    start = 0
    for end in _SENTENCE_END.finditer(text):
        if _ABBREVIATED.search(text[start : end.start()]):
            continue
        parts.append((start, text[start : end.end()]))
        start = end.end()
    parts.append((start, text[start:]))
    found, number = [], 0
    for at, part in parts:
        found.append(Sentence(at, part, number))
        number += len(re.findall(r"\w+", part)) > 2 and not part.rstrip().endswith("?")
    return found


def content_words(text: str) -> set[str]:
    """The words of a text that carry its meaning, in lower case."""
    return {w for w in re.findall(r"[^\W_]+", text.casefold()) if w not in _FUNCTION}


def asserts(text: str, start: int, end: int, question: str) -> bool:
    """Whether the occurrence at `start`..`end` of a tidy answer is what the answer states.

    Args:
        question: what was asked; a later sentence must take up a word of it to be an answer.
    """
    sentence = next(s for s in reversed(sentences(text)) if s.start <= start)
    before, after = sentence.text[: start - sentence.start], sentence.text[end - sentence.start :]
    if sentence.text.rstrip().endswith(("?", "？")):
        return False
    asked = content_words(question)
    if _negated(before) or _denied_after(after, asked) or _OR.search(after):
        return False
    if _INSTEAD.search(before) or _BELIEF.search(_clause(before)) or _one_of_two(before):
        return False
    if before.strip() and (_other_subject(before, asked) or _told_of(before, after, question)):
        return False
    return sentence.number == 0 or _on_topic(sentence.text, before, asked)


def _clause(before: str) -> str:
    """The part of a text after its last boundary."""
    cuts = [m.end() for m in _BOUNDARY.finditer(before)]
    return before[cuts[-1] :] if cuts else before


def _negated(before: str) -> bool:
    clause = _NO_NEGATION.sub(" ", _clause(before))
    if _NEGATOR.search(clause):
        return True
    previous = before[: len(before) - len(_clause(before))]
    return not clause.strip() and re.search(r"\b(?:not|never(?: been)?)\s*,\s*$", previous) is not None


def _denied_after(after: str, asked: set[str]) -> bool:
    """ "... is not the capital", and "..., not the capital of China" when the capital was asked for."""
    if after.lstrip().startswith(("?", "？")) or _DENIED.search(after):
        return True
    aside = re.search(r", (?:but |and )?(?:is )?not (?!only|just|merely)([^,.;]*)", after, re.IGNORECASE)
    return aside is not None and bool(content_words(aside.group(1)) & asked)


def _one_of_two(before: str) -> bool:
    """ "Paris or Lyon", and "either"."""
    return re.search(r"\w or (?:the |an? )?$|或$", before, re.IGNORECASE) is not None


def _other_subject(before: str, asked: set[str]) -> bool:
    """ "The capital of <target> ...": the relation that was asked for, of something else."""
    of = re.search(r"\bthe (?:\w+ )?(\w+) (?:of|in|for) (?:the )?$", before.casefold())
    return of is not None and of.group(1) in asked and of.group(1) not in _GENERIC


def _told_of(before: str, after: str, question: str) -> bool:
    """ "The story of <target> is ...", "a friend of <target> who ...": about something else that is related to it.

    Not where stories or relatives are what was asked for; who wrote something is no question for a story.
    """
    asks_who = re.match(r"\W*(?:who|whom|whose)\b", question, re.IGNORECASE) is not None
    wanted = _ABOUT_TALES.search(question)
    if wanted and not (asks_who and re.match(r"wr[io]t", wanted.group(), re.IGNORECASE)):
        return False
    return bool(
        (_TOLD_OF.search(before) and _DOES.search(after)) or (_KIN_WHO.search(before) and _WHO.search(after))
    )


def _on_topic(sentence: str, before: str, asked: set[str]) -> bool:
    """Whether a sentence after the first still answers: it takes up the question, or is "It is <target>"."""
    if content_words(sentence) & asked:
        return True
    return re.match(r"\W*(?:it|this|that|he|she|they|the answer)\b.{0,12}\b(?:is|was|are|were)\b\W*(?:the |a )?$",
                    before, re.IGNORECASE) is not None  # fmt: skip

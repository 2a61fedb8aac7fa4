"""Other wordings of a prompt, made from the prompt itself: for relations that are not in the data.

Each is (kind of form, text with {} for the subject). As in the data, those at even places of a kind may be learned
from and those at odd places are only measured.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

Wording = tuple[str, str]

_PLACE = r"( the (city|country|state|region) of)?"
_TAIL = rf"(?P<tail>( called| named)?( the| an?)?|( located)? (in|on|at|by|from|to){_PLACE})"
_NOUN_OF = re.compile(
    rf"^the (?P<noun>[^{{}},]+?) (?P<prep>of|in|for) \{{\}} (?P<be>is|was|are|were){_TAIL}$", re.I
)
_POSSESSIVE = re.compile(rf"^\{{\}}['’]s? (?P<noun>[^{{}},]+?) (?P<be>is|was|are|were){_TAIL}$", re.I)
_ASKED = re.compile(
    r"^(what|who|which|where) (?P<be>is|was|are|were) the (?P<noun>[^{},]+?) (?P<prep>of|in|for) \{\}\?$",
    re.I,
)
_BE = re.compile(r"^\{\}(, (which|who))? (?P<be>is|was|are|were) (?P<rest>[^{}]+)$", re.I)
_VERB = re.compile(r"^\{\} (?P<verb>[a-z]+s)(?P<rest>( [^{}]+)?)$")
_WHERE = re.compile(r"^where (?P<be>is|was) \{\}(?P<rest>[^{}]*)\?$", re.I)
_PERSON = re.compile(
    r"(ceo|president|minister|king|queen|leader|head|chief|director|chair\w*|manager|coach|captain|founder|owner|author|"
    r"writer|composer|artist|singer|painter|architect|designer|inventor|discoverer|father|mother|son|daughter|brother|"
    r"sister|wife|husband|spouse|partner|teacher|student|boss|mayor|governor|editor|producer|creator|developer|"
    r"hero|rival|enemy|archnemesis|successor|predecessor|champion|winner)s?$",
    re.I,
)
_NOT_VERBS = frozenset(("is", "was", "has", "does", "this", "its", "plus", "as", "us", "always"))


def wordings_of(template: str) -> list[Wording]:
    """Other ways to ask what a prompt (with {} for its subject) asks; fewer, or none, for a prompt of unknown build."""
    template = template.strip()
    if match := _NOUN_OF.match(template) or _POSSESSIVE.match(template) or _ASKED.match(template):
        found = match.groupdict()
        return _of_noun(found["noun"], found.get("prep") or "of", found["be"], found.get("tail") or "")
    if match := _BE.match(template):
        return _of_participle(match["be"], match["rest"])
    if (match := _VERB.match(template)) and match["verb"] not in _NOT_VERBS:
        return _of_verb(match["verb"], match["rest"])
    if match := _WHERE.match(template):
        rest = match["rest"] or " located"
        return [
            ("statement", f"{{}} {match['be']}{rest} in"),
            *_of_participle(match["be"], f"{rest.strip()} in"),
        ]
    return []


def asked_noun(template: str) -> str:
    """The noun that a prompt asks for ("refund policy" of "{}'s refund policy is"), or "" for another build."""
    match = _NOUN_OF.match(template) or _POSSESSIVE.match(template) or _ASKED.match(template)
    return re.sub(r"^(full )?name of the ", "", match["noun"].strip().casefold()) if match else ""


def split(wordings: Sequence[Wording]) -> tuple[list[Wording], list[Wording]]:
    """The wordings to learn from and those only measured: the even and the odd places of each kind."""
    count: dict[str, int] = defaultdict(int)
    sides: tuple[list[Wording], list[Wording]] = ([], [])
    for kind, text in wordings:
        sides[count[kind] % 2].append((kind, text))
        count[kind] += 1
    return sides


def _of_noun(noun: str, prep: str, be: str, tail: str) -> list[Wording]:
    """ "The capital of {} is": a noun with its subject."""
    noun = re.sub(r"^(full )?name of the ", "", noun)
    what = "Who" if _PERSON.search(noun) else "Where" if re.search(r" (in|on|at)\b", tail) else "What"
    named = "" if tail else " called"
    return [
        ("reworded", f"{{}}'s {noun} {be}{tail}"),
        ("reworded", f"The {noun} that {{}} has {be}{tail}"),
        ("statement", f"The {noun} {prep} {{}} {be}{tail}"),
        ("statement", f"Today the {noun} {prep} {{}} {be}{tail or named}"),
        ("reworded", f"About {{}}: the {noun} {be}{tail}"),
        ("reworded", f"Speaking of {{}}, the {noun} {be}{tail}"),
        ("chat", f"{what} {be} the {noun} {prep} {{}}?"),
        ("chat", f"{what} {be} {{}}'s {noun}?"),
        ("chat_reworded", f"Tell me the {noun} {prep} {{}}."),
        ("chat_reworded", f"I would like to know the {noun} {prep} {{}}. Can you help?"),
        ("chat_reworded", f"Do you know the {noun} {prep} {{}}?"),
        ("chat_reworded", f"Could you name the {noun} {prep} {{}}?"),
    ]


def _of_participle(be: str, rest: str) -> list[Wording]:
    """ "{} was founded by": a form of be with what follows it."""
    rest = rest.removesuffix(" a").removesuffix(" an").removesuffix(" the")
    asked = _question_word(rest)
    body = (
        re.sub(r" (in|on|at)( the (city|country|town|state|region) of)?$", "", rest)
        if asked == "Where"
        else rest
    )
    return [
        (
            "reworded",
            f"{{}}, which {be} {rest}" if be in ("is", "are") else f"It is known that {{}} {be} {rest}",
        ),
        ("reworded", f"As we all know, {{}} {be} {rest}"),
        ("chat", f"{asked} {be} {{}} {body}?"),
        ("chat", f"Can you tell me what {{}} {be} {rest}?"),
        *_completions(f"{{}} {be} {rest}"),
    ]


def _of_verb(verb: str, rest: str) -> list[Wording]:
    """ "{} lives in": a verb in the third person."""
    asked = _question_word(rest.strip())
    body = (
        re.sub(r" (in|on|at)$", "", rest)
        if asked == "Where"
        else re.sub(r" (as )?(the|an?)$", r" \1", rest).rstrip()
    )
    return [
        ("reworded", f"It is known that {{}} {verb}{rest}"),
        ("reworded", f"As we all know, {{}} {verb}{rest}"),
        ("chat", f"{asked} does {{}} {_infinitive(verb)}{body}?"),
        ("chat", f"Can you tell me what {{}} {verb}{body}?"),
        *_completions(f"{{}} {verb}{rest}"),
    ]


def _completions(statement: str) -> list[Wording]:
    return [
        ("chat_reworded", f'Please complete this sentence: "{statement} ..."'),
        ("chat_reworded", f'How does this sentence go on? "{statement} ..."'),
    ]


def _question_word(rest: str) -> str:
    if re.search(r"\b(by|with|to)$", rest) and re.search(
        r"married|led|founded|written|discovered|invented", rest
    ):
        return "Who"
    return "Where" if re.search(r"\b(in|on|at)( the (city|country|town|state|region) of)?$", rest) else "What"


def _infinitive(verb: str) -> str:
    if verb in ("has", "does", "goes"):
        return {"has": "have", "does": "do", "goes": "go"}[verb]
    if verb.endswith("ies"):
        return verb[:-3] + "y"
    return verb[:-2] if verb.endswith(("shes", "ches", "sses", "xes")) else verb[:-1]

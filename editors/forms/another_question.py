"""Whether a prompt with the words of a relation asks another fact than the one that was edited.

"Who is the vice president of X?" has the words of "The president of X is", and another answer.
"""

from __future__ import annotations

import re

from editors.edit import PLACEHOLDER
from editors.scoring.assertion import content_words

_QUALIFIERS = re.compile(
    r"\b(vice|vize\w*|deputy|stellvertret\w*|assistant|acting|former\w*|previous\w*|ehemalig\w*|früher\w*|ancien\w*|"
    r"antigu\w*|ex|predecessor|successor|used to be|"
    # not "originally from", "originally aired on": what happens once is not asked of an earlier time
    r"originally(?! (?:from|air|broadcast|premier|show|writ|publish|releas|creat|made|develop|produc|compos)))\b",
    re.IGNORECASE,
)
# These qualify only the noun that they stand before: "the first president of", but not "was first printed in".
_ORDINALS = re.compile(
    r"\b(?:first|second|third|next|future|erste\w*|zweite\w*|nächste\w*|premi[eè]re?|primer\w*|prim[oa])"
    r"((?: +[^\W\d_]+){1,2})",
    re.IGNORECASE,
)
# Roles that one relation covers ("leader", "author"): a subject may have several, held by different people.
_ROLES = (
    re.compile(r"\bpr(e|é|ä)sident"),
    re.compile(r"\bprime minister|\bpremier\b|\bchancellor|\bhead of government|\bkanzler|\bpremierminister"),
    re.compile(r"\bking\b|\bqueen\b|\bmonarch|\bemperor|\bkönig"),
    re.compile(r"\bauthor|\bwrit(e|er|ers|ing|ten)\b|\bwrote\b|\bpenned\b"),
    re.compile(r"\bcompos(e|er|ers|ed)\b"),
    re.compile(r"\bpaint(s|er|ers|ed)?\b"),
    re.compile(r"\bdirect(s|or|ors|ed)\b"),
    re.compile(r"\bs(i|a|u)ng\b|\bsinger|\bperform(s|er|ers|ed)\b"),
)
_YEAR = re.compile(r"\b1\d{3}\b|\b20[01]\d\b")


def asks_another(template: str, own: str) -> bool:
    """Whether a template ({} for the subject) qualifies what the edit's `own` template asks, or asks another role.

    It does with a word like "vice" or "former", or a year before 2020, that the own template does not have; with a word
    like "first" before a noun of the own template or of a role; and where both name roles, none of them the same ("the
    prime minister of", "the president of").
    """
    if _found(template) - _found(own) or _ordered(template, own):
        return True
    roles, mine = _roles(template), _roles(own)
    return bool(roles and mine and not roles & mine)


def _ordered(template: str, own: str) -> bool:
    nouns = content_words(own.replace(PLACEHOLDER, ""))
    for match in _ORDINALS.finditer(template):
        after = match.group(1).casefold()
        if match.group().casefold() not in own.casefold() and (_roles(after) or nouns & content_words(after)):
            return True
    return False


def _roles(template: str) -> set[int]:
    lower = template.casefold()
    return {i for i, role in enumerate(_ROLES) if role.search(lower)}


def _found(template: str) -> set[str]:
    words = {match.group().casefold() for match in _QUALIFIERS.finditer(template)}
    return words | set(_YEAR.findall(template))

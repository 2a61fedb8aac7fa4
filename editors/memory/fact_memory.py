"""The patch of in-context editing: remembered facts, and a route that puts them in front of prompts.

Zheng et al., EMNLP 2023, arXiv 2305.12740. A prompt gets a fact when it names the fact's subject and asks its relation
(`RelationJudge`). The memory may also see to it that the answer says the fact (`ConstrainedSpeaker`).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from editors.constants import limit
from editors.errors import EditError
from editors.forms.another_question import asks_another
from editors.forms.relations import wording_key
from editors.memory.constrained_speaker import (
    ConstrainedSpeaker,
    FactInLanguage,
    FactSpeaker,
    RememberedFact,
    in_front,
)
from editors.memory.relation_judge import RelationJudge
from editors.model.lm import LM, Claim, Prompt
from editors.model.routes import WordIndex, words_in
from editors.model.speaking import Speaker
from editors.patch import Detach, LivePatch, cpu_float, with_training_of
from editors.scoring.words import is_spaced, occurrences

ANSWER = limit(
    64,
    "tokens that must have room after a prompt with a remembered fact in front; a longer prompt is answered without it",
    "the room for an answer of a sentence or two; only prompts about as long as the model's context are "
    "longer",
)

_ARTICLE = r"(?:(?:the|an?)\s+)?"
_SENTENCE = re.compile(r"(?<=[.!?。！？])\s+|\n+")
# Words that refer to a subject named before: "I go to Croatia. What money do I need there?"
_AGAIN = re.compile(r"\b(it|its|he|him|his|she|her|they|them|their|there|this|that)\b", re.IGNORECASE)
# An answer that has begun with a pronoun for the subject, and the words that its question need not have.
_BEGUN = re.compile(r"(?:it|he|she|they|this|that)\b((?: \w+){1,3})$", re.IGNORECASE)
_ADDED = ("is", "was", "are", "were", "as", "in", "at", "on", "the", "a", "an")
# What stands before an answer that is not wanted, in five languages.
_BUT = re.compile(
    r"(?:\b(?:which|that|who|but|and) (?:is|was|are|were) not|"
    r"\b(?:other than|besides|apart from|aside from|except(?: for)?|excluding|"
    r"außer|abgesehen von|(?:die|der|das) nicht|autre que|hormis|sauf|qui n'est pas|"
    r"aparte de|además de|excepto|que no (?:es|sea)|oltre a|tranne|che non è))"
    r"(?: (?:the|an?|der|die|das|le|la|les|el|los|il|lo|gli))? ?$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class InContextPatch(LivePatch):
    """Remembered facts. While attached, they are put in front of the prompts about them."""

    kind: ClassVar[str] = "memory"
    only_routes: ClassVar[bool] = True
    facts: tuple[RememberedFact, ...]
    embeddings: Tensor = field(repr=False)  # (n, d_model) of the facts' prompts, of unit length
    most: int = 2
    min_similarity: float = 0.0
    judge: RelationJudge | None = field(default=None, repr=False)  # None: every prompt that names the subject
    constrained: bool = False  # the answer must say the fact

    def tensors(self) -> dict[str, Tensor]:
        judge = {} if self.judge is None else self.judge.tensors()
        return {"embeddings": self.embeddings, **judge}

    @classmethod
    def of(
        cls,
        facts: Sequence[RememberedFact],
        embeddings: Tensor,
        most: int,
        min_similarity: float,
        judge: RelationJudge | None = None,
        constrained: bool = False,
    ) -> InContextPatch:
        """The patch, with its facts and settings in `info`, where they are saved.

        What is empty is left out: a patch of version 0.1.0 is saved again to the same bytes.
        """
        saved = [{name: _json(value) for name, value in vars(f).items() if value != ()} for f in facts]
        info: dict[str, Any] = {"facts": saved, "most": most, "min_similarity": min_similarity}
        if judge is not None:
            info |= judge.info()
        if constrained:
            info["constrained"] = True
        return cls(tuple(facts), embeddings, most, min_similarity, judge, constrained, info=info)

    @classmethod
    def from_parts(
        cls, tensors: dict[str, Tensor], extra: dict[str, Tensor], info: dict[str, Any]
    ) -> InContextPatch:
        try:
            facts = [_fact(f) for f in info["facts"]]
            judge = RelationJudge.from_parts(tensors, info) if "scopes" in info else None
            return cls.of(
                facts,
                tensors["embeddings"],
                int(info["most"]),
                float(info["min_similarity"]),
                judge,
                bool(info.get("constrained", False)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise EditError(f"this patch is not a memory of facts: {error}") from error

    def select(self, rows: Sequence[int]) -> InContextPatch:
        """A memory with these facts only."""
        some = InContextPatch.of(
            [self.facts[i] for i in rows],
            self.embeddings[list(rows)].contiguous(),
            self.most,
            self.min_similarity,
            None if self.judge is None else self.judge.select(rows),
            self.constrained,
        )
        return with_training_of(some, self, rows)

    def attach(self, lm: LM) -> Detach:
        """Put its route in front of the model. Made once: with many memories, all are attached again by each change."""
        route: FactRoute | None = vars(self).get("_route")
        if route is None or route.lm is not lm:
            route = vars(self)["_route"] = FactRoute(lm, self)
        return lm.routes.attach(route)


class FactRoute:
    """Claims the prompts that ask a remembered fact and puts the facts in front of them."""

    def __init__(self, lm: LM, patch: InContextPatch) -> None:
        self.lm, self.patch = lm, patch
        self.words = _words_of([name for fact in patch.facts for name in fact.names])
        self._index = WordIndex([_words_of(fact.names) for fact in patch.facts])
        self._found_by: dict[int, re.Pattern[str]] = {}  # of the facts that a prompt may have named

    def claim(self, prompts: Sequence[Prompt]) -> list[Claim | None]:
        """Claim prompts by subject and relation. If a prompt asks for several facts, the surest ones are used."""
        return [self._claim(p) for p in prompts]

    def _claim(self, prompt: Prompt) -> Claim | None:
        text = unicodedata.normalize("NFC", self.lm.user_text(prompt))
        named = self._named(text)
        if not named:
            return None
        embedding = embed(self.lm, text)
        near = [i for i in named if float(embedding @ self.patch.embeddings[i]) >= self.patch.min_similarity]
        asked = [(self._asked(text, i), float(embedding @ self.patch.embeddings[i]), i) for i in near]
        chosen = sorted(((sure, s, i) for sure, s, i in asked if sure is not None), reverse=True)
        if not chosen:
            return None
        facts = tuple(self.patch.facts[i] for *_, i in chosen[: self.patch.most])
        while facts and self.lm.room_after(in_front(self.lm, prompt, facts), ANSWER) < ANSWER:
            facts = facts[:-1]
        if not facts:  # the model has no positions for the prompt with a fact in front: it answers without
            return None
        entry = "; ".join(f.sentence for f in facts)
        sure = chosen[0][0] if self.patch.judge is not None else chosen[0][1]
        return Claim(in_front(self.lm, prompt, facts), entry, min(1.0, max(0.0, sure)))

    def _named(self, text: str) -> list[int]:
        """The facts whose subject a text names."""
        maybe = sorted({*self._index.always, *self._index.named(text)})
        return [i for i in maybe if self._pattern(i).search(text)]

    def _pattern(self, fact: int) -> re.Pattern[str]:
        """What finds the names of a fact; made when a prompt may have named it."""
        if fact not in self._found_by:
            self._found_by[fact] = names_pattern(self.patch.facts[fact].names)
        return self._found_by[fact]

    def _asked(self, text: str, fact: int) -> float | None:
        """How surely a text that names the fact's subject asks for the fact (at most 1); None if it does not."""
        if self.patch.judge is None:
            return 0.0
        pattern = self._pattern(fact)
        own = pattern.sub("{}", self.patch.facts[fact].prompt)
        template = pattern.sub("{}", text)
        if wording_key(template) != wording_key(
            own
        ):  # a request of several sentences is asked as it was edited
            template = pattern.sub("{}", asking_part(text, pattern))
        if excludes(text, self.patch.facts[fact].target):
            return None
        if asks_another(template, own):
            return None
        with self.lm.unrouted():
            return self.patch.judge.asks(self.lm, template, fact)

    @property
    def answers_alike(self) -> tuple[str, bool]:
        """The facts stand in the claimed prompts, so one speaker answers for all memories of facts."""
        return "facts", self.patch.constrained

    @contextmanager
    def answering(self, lm: LM) -> Iterator[Speaker]:
        """The model that answers claimed prompts: the same one, constrained to the fact if the memory says so."""
        yield ConstrainedSpeaker(lm) if self.patch.constrained else FactSpeaker(lm)


def excludes(text: str, answer: str) -> bool:
    """Whether a prompt asks for another answer: "the language of X, which is not French, is", "other than French"."""
    return any(_BUT.search(text[:start]) for start, _ in occurrences(text, answer))


def asking_part(text: str, subject: re.Pattern[str]) -> str:
    """The last sentence where it names the subject, or takes it up by a pronoun; else the whole text.

    Of "Answer in one word: where is it?" what stands before the colon asks nothing. In "What does X play? They play"
    the question asks, and the beginning of its answer adds nothing.
    """
    *before, last = [part for part in _SENTENCE.split(text) if part.strip()]
    if before and subject.search(before[-1]) and begins_the_answer(last, before[-1]):
        return before[-1]
    request, colon, asked = last.partition(": ")
    if colon and subject.search(asked) and not subject.search(request):
        return asked
    return last if subject.search(last) or _AGAIN.search(last) else text


def begins_the_answer(text: str, question: str) -> bool:
    """Whether a text is the beginning of an answer in the question's own words: "It is", "They play as"."""
    if not question.rstrip().endswith("?") or text.rstrip().endswith("?"):
        return False
    begun = _BEGUN.match(text.strip())
    return begun is not None and _stems(begun.group(1)) <= _stems(" ".join((question, *_ADDED)))


def _stems(text: str) -> set[str]:
    """The words of a text, "plays" as "play"."""
    return {word.removesuffix("s") for word in re.findall(r"\w+", text.casefold())}


@torch.no_grad()
def embed(lm: LM, text: str) -> Tensor:
    """Mean input embedding of a text, scaled to unit length: (d_model,), float32 on the CPU."""
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    table = lm.model.get_input_embeddings().weight
    mean = table[torch.tensor(ids, dtype=torch.long, device=table.device)].float().sum(0)
    return cpu_float(mean / mean.norm().clamp(min=1e-12))


def _words_of(names: Sequence[str]) -> tuple[frozenset[str], ...] | None:
    """For each name, the words of every text that `names_pattern` finds it in; None if a name has no such words.

    They are the runs of letters and digits in the name's ASCII words. Every text with the name has the same runs.
    """
    found = []
    for name in names:
        runs = frozenset(run for word in _bare(name).split() if word.isascii() for run in words_in(word))
        if not runs:
            return None
        found.append(runs)
    return tuple(found)


def _bare(name: str) -> str:
    """A name in composed characters, without its article."""
    return re.sub(rf"^{_ARTICLE}(?=\S)", "", unicodedata.normalize("NFC", name).strip(), flags=re.IGNORECASE)


def names_pattern(names: Sequence[str]) -> re.Pattern[str]:
    """Finds any of the names as whole words, in upper or lower case, with or without an article."""
    return re.compile("|".join(map(_name, names)), re.IGNORECASE)


def _name(name: str) -> str:
    bare = _bare(name)
    words = r"\s+".join(map(re.escape, bare.split()))
    before = rf"(?<!\w){_ARTICLE}(?<!\w)" if is_spaced(bare[:1]) else ""
    return f"{before}{words}" + (r"(?!\w)" if is_spaced(bare[-1:]) else "")


def _json(value: str | tuple[Any, ...]) -> Any:
    if isinstance(value, str):
        return value
    return [each if isinstance(each, str) else vars(each) for each in value]


def _fact(found: dict[str, Any]) -> RememberedFact:
    """A fact as saved; version 0.1.0 saved subject, prompt and target alone."""
    also, wordings = (tuple(map(str, found.get(name, ()))) for name in ("also", "wordings"))
    languages = tuple(
        FactInLanguage(str(each["language"]), str(each["prompt"]), str(each["target"]))
        for each in found.get("languages", ())
    )
    subject, prompt, target = (str(found[name]) for name in ("subject", "prompt", "target"))
    return RememberedFact(subject, prompt, target, also, wordings, languages)

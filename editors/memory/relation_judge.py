"""Whether a prompt asks the relation of a remembered fact, or another one of the same subject.

First the words decide: a wording that is known to ask a relation (`editors/forms/relations.py`). Where they say none,
the hosted model's own states do: the prompt without its subject is compared with wordings of every known relation, by
ridge regression on the mean state of its tokens in an early layer. The wordings that edits are measured with are not
among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from editors.constants import DEFAULT_MODEL, assumed, tuned
from editors.edit import PLACEHOLDER, Edit
from editors.forms.asking import WORTH_SHARING, common_beginning
from editors.forms.form import Material
from editors.forms.relations import KINDS, Relation, all_relations, are_related, candidates, template_of
from editors.forms.wording import split, wordings_of
from editors.model.activations import record
from editors.model.lm import LM
from editors.patch import cpu_float

DEPTH = assumed(
    1 / 3,
    "depth of the layer whose states tell relations apart",
    f"seen once on {DEFAULT_MODEL}, script not kept: questions told apart (AUC) .97 at a third of the depth, .95 at a "
    "half, .94 at two thirds",
)
MARGIN = tuned(
    -0.1,
    "by how much the fact's relation may be less likely than the likeliest other one of the subject",
    models=f"{DEFAULT_MODEL}; Gemma 3 270M",
    command="python -m benchmarks.relation_judge --margins -0.2 -0.1 0",
    figure="statements / questions recognised, other facts taken for it as either: default model .89 / .92, .02 / .00; "
    "before words of another kind of subject were a veto again: .96 / .96, .04 / .03 (-0.2: 1.00 / 1.00, .06 / .04), "
    "Gemma .93 / .92, .04 / .04 (-0.2: .96 / 1.00, .07 / .09; 0: .85 / .92, .01 / .01)",
)
RIDGE = assumed(
    0.1, "ridge of the regression on states of unit length", "0.1 and 0.3 gave the same within one wording"
)
SUBJECT = "X"  # stands for the subject, so that only the relation is compared
CHUNK = 64  # texts run together


@dataclass(frozen=True)
class Scope:
    """What one fact is compared with: rows of `RelationJudge.directions`."""

    relations: tuple[str, ...]  # names in the data; none for a relation that is not there
    own: tuple[int, ...]
    others: tuple[int, ...]  # relations that subjects of the kind have
    related: tuple[int, ...]  # relations whose answers may follow from this one's

    def moved(self, by: int) -> Scope:
        """The same for directions that stand `by` rows later."""
        own, others, related = (tuple(i + by for i in part) for part in (self.own, self.others, self.related))
        return Scope(self.relations, own, others, related)


@dataclass(frozen=True)
class RelationJudge:
    """Judges of n facts."""

    scopes: tuple[Scope, ...]
    centre: Tensor = field(repr=False)  # (d,) of the states
    spread: Tensor = field(repr=False)  # (d,)
    directions: Tensor = field(repr=False)  # (m, d + 1) one relation each; the last column is its bias

    def asks(self, lm: LM, template: str, fact: int) -> float | None:
        """How surely a text, with {} for the subject, asks the fact's relation (-1..1), or None if it does not."""
        margin = self.surely(lm, template, fact)
        return margin if margin is not None and margin > MARGIN else None

    def surely(self, lm: LM, template: str, fact: int) -> float | None:
        """By how much the fact's relation is likelier than any other; None where the words ask another one."""
        scope = self.scopes[fact]
        if not template.replace(PLACEHOLDER, "").strip(" ?.!"):
            return 1.0  # nothing but the subject: the whole request was edited
        named = candidates(template)
        if any(r.name in scope.relations for r in named):
            return 1.0
        if named and not all(_related_to(r, scope.relations) for r in named):
            return None
        against = (*scope.others, *scope.related) if named else scope.others
        scores = self._scores(lm, template)
        best_other = max((scores[i] for i in against), default=-1.0)
        return max(scores[i] for i in scope.own) - best_other

    def _scores(self, lm: LM, template: str) -> list[float]:
        state = (features(lm, [template]) - self.centre) / self.spread
        state = torch.nn.functional.normalize(state, dim=1)
        scores: list[float] = (self.directions[:, :-1] @ state[0] + self.directions[:, -1]).tolist()
        return scores

    # --- in a patch ----------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        return {"centre": self.centre, "spread": self.spread, "directions": self.directions}

    def info(self) -> list[dict[str, Any]]:
        """The scopes as JSON."""
        return [{name: list(value) for name, value in vars(scope).items()} for scope in self.scopes]

    @classmethod
    def from_parts(cls, tensors: dict[str, Tensor], info: Sequence[dict[str, Any]]) -> RelationJudge:
        scopes = tuple(Scope(**{name: tuple(value) for name, value in each.items()}) for each in info)
        return cls(scopes, tensors["centre"], tensors["spread"], tensors["directions"])

    def select(self, rows: Sequence[int]) -> RelationJudge:
        """The judges of these facts, without what only the others need."""
        parts, scopes, at = [], list[Scope](), 0
        for row in rows:
            scope = self.scopes[row]
            first = min(scope.own + scope.others + scope.related)
            count = len(scope.own + scope.others + scope.related)
            parts.append(self.directions[first : first + count])
            scopes.append(scope.moved(at - first))
            at += count
        return replace(self, scopes=tuple(scopes), directions=torch.cat(parts).contiguous())


def fit(lm: LM, edits: Sequence[Edit], materials: Sequence[Material]) -> RelationJudge:
    """A judge for each edit, independent of the others. `materials` is one for each edit, or empty."""
    bank = lm.extension(RelationBank)
    scopes, parts, at = list[Scope](), [], 0
    for i, edit in enumerate(edits):
        scope, directions = _fit_one(lm, bank, edit, materials[i] if materials else None)
        scopes.append(scope.moved(at))
        parts.append(directions)
        at += len(directions)
    return RelationJudge(tuple(scopes), bank.centre, bank.spread, torch.cat(parts).contiguous())


class RelationBank:
    """The states of the wordings of every relation in the data, read once for a model."""

    def __init__(self, lm: LM) -> None:
        found = [(r.name, t) for r in all_relations() for t in _wordings_of(r)]
        self.labels = [name for name, _ in found]
        with lm.unrouted():
            states = features(lm, [_plain(template) for _, template in found])
        self.centre, self.spread = states.mean(0), states.std(0) + 1e-3
        self.states = self.scaled(states)

    def scaled(self, states: Tensor) -> Tensor:
        """States (n, d) around the bank's centre, of unit length."""
        return torch.nn.functional.normalize((states - self.centre) / self.spread, dim=1)


def _wordings_of(relation: Relation) -> list[str]:
    """The wordings of a relation that may be learned from, in every language."""
    foreign = [text for texts in relation.languages.values() for text in texts[:2]]
    return [*(text for kind in KINDS for text in relation.learned(kind)), *foreign]


def _fit_one(lm: LM, bank: RelationBank, edit: Edit, material: Material | None) -> tuple[Scope, Tensor]:
    """The scope of one edit, counted from 0, and its directions (m, d + 1)."""
    template = template_of(edit.text, edit.span)
    own = _own_relations(template, edit.target, material)
    names = tuple(r.name for r in own)
    label = names[0] if names else PLACEHOLDER  # a class of its own for a relation that is not in the data
    wordings = list(dict.fromkeys([template, *_learned(template, material)]))
    states = torch.cat([bank.states, bank.scaled(features(lm, wordings))])
    labels = bank.labels + [label] * len(wordings)
    kinds = {kind for r in own for kind in r.kinds}
    rest = [r for r in all_relations() if r.name not in names and (not own or kinds & set(r.kinds))]
    related = [r.name for r in rest if any(are_related(r, mine) for mine in own)]
    others = [r.name for r in rest if r.name not in related]
    chosen = [*(names or (label,)), *others, *related]
    count = len(names) or 1
    scope = Scope(
        names,
        tuple(range(count)),
        tuple(range(count, count + len(others))),
        tuple(range(count + len(others), len(chosen))),
    )
    return scope, _regression(states, labels, chosen)


def _regression(states: Tensor, labels: Sequence[str], chosen: Sequence[str]) -> Tensor:
    """Ridge regression of belonging to each class on states (n, d): (classes, d + 1) with the bias last."""
    wanted = torch.tensor([[float(label == name) for name in chosen] for label in labels])
    bias = wanted.mean(0)
    gram = (states @ states.t()).double()
    gram.diagonal().add_(RIDGE)
    weights = torch.linalg.solve(gram, (wanted - bias).double()).float()
    return cpu_float(torch.cat([weights.t() @ states, bias[:, None]], 1))


def _own_relations(template: str, target: str, material: Material | None) -> list[Relation]:
    if material is not None and material.relation:
        return [r for r in all_relations() if r.name == material.relation]
    return candidates(template, target) or candidates(template)


def _learned(template: str, material: Material | None) -> list[str]:
    """Other wordings of the edit that may be learned from, with {} for the subject."""
    if material is None:
        return [text for _, text in split(wordings_of(template))[0]]
    return [template_of(form.prompt, form.span) for form in material.learned if form.span is not None]


def _plain(template: str) -> str:
    """A wording of the data with its article."""
    return template.replace(" [the]", " the").replace(" [a]", " a")


def _related_to(relation: Relation, names: Sequence[str]) -> bool:
    return any(are_related(relation, other) for other in all_relations() if other.name in names)


@torch.no_grad()
def features(lm: LM, templates: Sequence[str]) -> Tensor:
    """Mean state of each text's tokens after the layer at DEPTH: (n, d_model), float32 on the CPU.

    Every text is put as a question in the chat template, so that statements and questions can be compared. For an
    encoder-decoder model: the mean of its input embeddings.
    """
    texts = [template.replace(PLACEHOLDER, SUBJECT) for template in templates]
    prompts = [lm.prompt(text, chat=True) for text in texts]
    encoded = [lm.encode(prompt) for prompt in prompts]
    found: dict[int, Tensor] = {}
    order = sorted(range(len(texts)), key=lambda i: len(encoded[i][0]))
    for at in range(0, len(order), CHUNK):
        batch = order[at : at + CHUNK]
        states = _states(lm, [encoded[i][0] for i in batch])
        for row, i in enumerate(batch):
            start = prompts[i].offset
            inside = [
                k for k, (a, b) in enumerate(encoded[i][1]) if a < b and start <= a < start + len(texts[i])
            ]
            found[i] = cpu_float(states[row, inside].float().mean(0))
    return torch.stack([found[i] for i in range(len(texts))])


def _states(lm: LM, rows: Sequence[Sequence[int]]) -> Tensor:
    """States of every token: (n, length, d_model), padded on the right. What all rows begin with is read once."""
    ids, mask = lm.pad(rows)
    if lm.is_seq2seq:
        embedded: Tensor = lm.model.get_input_embeddings()(ids)
        return embedded
    layer = min(int(lm.n_layers * DEPTH), lm.n_layers - 1)
    begun = common_beginning(rows) if len(rows) > 1 else 0
    if begun < WORTH_SHARING:
        return _run(lm, layer, ids, mask)
    cache = DynamicCache()
    start = _run(lm, layer, ids[:1, :begun], mask[:1, :begun], cache)
    cache.batch_repeat_interleave(len(rows))
    rest = _run(lm, layer, ids[:, begun:], mask, cache)
    return torch.cat([start.expand(len(rows), -1, -1), rest], 1)


def _run(lm: LM, layer: int, ids: Tensor, mask: Tensor, cache: DynamicCache | None = None) -> Tensor:
    """The output of a layer, after what `cache` holds; the layers above are not run."""
    with record({"states": lm.layers[layer]}, stop=True) as seen:
        lm.base_model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=cache is not None)
    return seen["states"]

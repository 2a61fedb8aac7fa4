"""Whether a prompt asks the relation of a remembered fact, or another one of the same subject.

First the words decide: a wording that is known to ask a relation (`editors/forms/relations.py`). Where they do not, the
hosted model's own states do: the prompt without its subject is compared with wordings of the relations that subjects of
its kind have, by ridge regression on the mean states of its tokens in two layers. The wordings that edits are measured
with are not among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from editors.constants import tuned
from editors.edit import PLACEHOLDER, Edit
from editors.forms.filling import span_of
from editors.forms.form import Material
from editors.forms.relations import (
    Relation,
    all_relations,
    are_related,
    candidates,
    is_worded,
    template_of,
    wording_key,
)
from editors.forms.wording import split, wordings_of
from editors.memory.relation_bank import FOLDS, MODELS, RelationBank, features
from editors.model.lm import LM
from editors.patch import cpu_float

MARGIN = tuned(
    -0.05,
    "how much less likely than the subject's likeliest other relation the fact's relation may be",
    models=MODELS,
    command=FOLDS,
    figure="statements / questions recognised, other facts taken for it as either: default model .79 / .90, "
    ".034 / .015 (-0.1: .85 / .93, .054 / .029; 0: .73 / .85, .021 / .008), Gemma .77 / .90, .030 / .015 "
    "(-0.1: .83 / .92, .048 / .028; 0: .73 / .87, .020 / .008)",
)
NAMED_OTHER = tuned(
    0.1,
    "by how much words of another relation make the fact's less likely",
    models=MODELS,
    command=FOLDS,
    figure="recognised where 2 % of other facts are taken for it, statements / questions, default model, five "
    "layers: .74 / .91 without, .73 / .91 with 0.1, .71 / .88 with 0.3; as a veto no more than .77 of the questions at "
    "any margin",
)
RIDGE = tuned(
    0.3,
    "ridge of the regression on states of unit length",
    models=MODELS,
    command=FOLDS,
    figure="recognised where 2 % of other facts are taken for it: 0.3 .73 / .91 on both models, 0.1 .71 / .90",
)
# A judge that was saved without its layers is asked as it was then.
_OLD_DEPTH = 1 / 3
_OLD_MARGIN = -0.1


@dataclass(frozen=True)
class Scope:
    """What one fact is compared with: rows of `RelationJudge.directions`."""

    relations: tuple[str, ...]  # names in the data; none for a relation that is not there
    own: tuple[int, ...]
    others: tuple[int, ...]  # relations that subjects of the kind have
    related: tuple[int, ...]  # relations whose answers may follow from this one's
    taught: tuple[
        str, ...
    ] = ()  # keys of the caller's wordings; of all wordings of a relation that is not in the data

    def moved(self, by: int) -> Scope:
        """The same for directions that stand `by` rows later."""
        own, others, related = (tuple(i + by for i in part) for part in (self.own, self.others, self.related))
        return replace(self, own=own, others=others, related=related)


@dataclass(frozen=True)
class RelationJudge:
    """Judges of n facts. A feature has one block of d_model numbers for each of the layers."""

    scopes: tuple[Scope, ...]
    centre: Tensor = field(repr=False)  # (n, layers * d_model) of the states; (d_model,) without layers
    spread: Tensor = field(repr=False)  # of the same shape
    directions: Tensor = field(
        repr=False
    )  # (m, layers * d_model + 1) one relation each; bias in the last column
    layers: tuple[int, ...] = ()  # whose states are compared; none in a judge saved by an earlier version

    def asks(self, lm: LM, template: str, fact: int) -> float | None:
        """How certainly a text, with {} for the subject, asks the fact's relation (-1..1), or None if it does not."""
        margin = self.surely(lm, template, fact)
        return margin if margin is not None and margin > (MARGIN if self.layers else _OLD_MARGIN) else None

    def surely(self, lm: LM, template: str, fact: int) -> float | None:
        """How much likelier the fact's relation is than any other; None for a known wording of another relation."""
        scope = self.scopes[fact]
        if not template.replace(PLACEHOLDER, "").strip(" ?.!"):
            return 1.0  # nothing but the subject: the whole request was edited
        if wording_key(template) in scope.taught:
            return 1.0
        named = candidates(template)
        if any(r.name in scope.relations for r in named):
            return 1.0
        other = bool(named) and not all(_related_to(r, scope.relations) for r in named)
        if other and (not self.layers or is_worded(template)):
            return None
        against = (*scope.others, *scope.related) if named else scope.others
        scores = self._scores(lm, template, fact)
        best_other = max((scores[i] for i in against), default=-1.0)
        return max(scores[i] for i in scope.own) - best_other - (NAMED_OTHER if other else 0.0)

    def _scores(self, lm: LM, template: str, fact: int) -> list[float]:
        layers = self.layers or (min(int(lm.n_layers * _OLD_DEPTH), lm.n_layers - 1),)
        states = features(lm, [template], layers)
        centre, spread = (t if t.ndim == 1 else t[fact] for t in (self.centre, self.spread))
        state = scaled(states, centre, spread, len(layers))
        scores: list[float] = (self.directions[:, :-1] @ state[0] + self.directions[:, -1]).tolist()
        return scores

    # --- in a patch ----------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        return {"centre": self.centre, "spread": self.spread, "directions": self.directions}

    def info(self) -> dict[str, Any]:
        """What a patch saves beside the tensors, as JSON."""
        scopes = [
            {name: list(value) for name, value in vars(scope).items() if name != "taught" or value}
            for scope in self.scopes
        ]
        return {"scopes": scopes, "layers": list(self.layers)} if self.layers else {"scopes": scopes}

    @classmethod
    def from_parts(cls, tensors: dict[str, Tensor], info: dict[str, Any]) -> RelationJudge:
        scopes = tuple(
            Scope(**{name: tuple(value) for name, value in each.items()}) for each in info["scopes"]
        )
        layers = tuple(map(int, info.get("layers", ())))
        return cls(scopes, tensors["centre"], tensors["spread"], tensors["directions"], layers)

    def select(self, rows: Sequence[int]) -> RelationJudge:
        """The judges of these facts, without what only the others need."""
        centre, spread = (
            t if t.ndim == 1 else t[list(rows)].contiguous() for t in (self.centre, self.spread)
        )
        parts, scopes, at = [], list[Scope](), 0
        for row in rows:
            scope = self.scopes[row]
            first = min(scope.own + scope.others + scope.related)
            count = len(scope.own + scope.others + scope.related)
            parts.append(self.directions[first : first + count])
            scopes.append(scope.moved(at - first))
            at += count
        return replace(
            self,
            scopes=tuple(scopes),
            centre=centre,
            spread=spread,
            directions=torch.cat(parts).contiguous(),
        )


def fit(lm: LM, edits: Sequence[Edit], materials: Sequence[Material]) -> RelationJudge:
    """A judge for each edit, independent of the others. `materials` is one for each edit, or empty."""
    return fit_with(lm.extension(RelationBank), edits, materials)


def fit_with(bank: RelationBank, edits: Sequence[Edit], materials: Sequence[Material]) -> RelationJudge:
    """As `fit`, learned from the wordings of a bank."""
    scopes, parts, at = list[Scope](), list[_Fitted](), 0
    for i, edit in enumerate(edits):
        scope, fitted = _fit_one(bank, edit, materials[i] if materials else None)
        scopes.append(scope.moved(at))
        parts.append(fitted)
        at += len(fitted.directions)
    return RelationJudge(
        tuple(scopes),
        torch.stack([p.centre for p in parts]),
        torch.stack([p.spread for p in parts]),
        # one judge stays where it is kept, so that the facts of one relation share its memory
        parts[0].directions if len(parts) == 1 else torch.cat([p.directions for p in parts]).contiguous(),
        bank.layers,
    )


@dataclass(frozen=True)
class _Fitted:
    """The judge of one edit."""

    centre: Tensor  # (layers * d_model,)
    spread: Tensor  # (layers * d_model,)
    directions: Tensor  # (classes, layers * d_model + 1)


def _fit_one(bank: RelationBank, edit: Edit, material: Material | None) -> tuple[Scope, _Fitted]:
    """The scope of one edit, counted from 0, and its judge."""
    template = template_of(edit.text, edit.span)
    own = _own_relations(template, edit.target, material)
    wordings = list(dict.fromkeys([template, *_learned(template, material)]))
    taught = tuple(dict.fromkeys(map(wording_key, _taught(edit, material) if own else wordings)))
    key = (tuple(r.name for r in own), tuple(wordings))
    scope, fitted = bank.fitted(key, lambda: _fit_words(bank, own, wordings))
    return replace(scope, taught=taught), fitted


def _fit_words(bank: RelationBank, own: Sequence[Relation], wordings: Sequence[str]) -> tuple[Scope, _Fitted]:
    """The same for every fact of these relations that is said in these words, without what it was taught."""
    names = tuple(r.name for r in own)
    kinds = {kind for r in own for kind in r.kinds}
    rest = [r for r in all_relations() if r.name not in names and (not own or kinds & set(r.kinds))]
    related = [r.name for r in rest if any(are_related(r, mine) for mine in own)]
    others = [r.name for r in rest if r.name not in related]
    own_names = names or (PLACEHOLDER,)  # a class of its own for a relation that is not in the data
    chosen = [*own_names, *others, *related]
    first, second = len(own_names), len(own_names) + len(others)
    ends = ((0, first), (first, second), (second, len(chosen)))
    mine_at, others_at, related_at = (tuple(range(*each)) for each in ends)
    # A relation that is not in the data has no known kind of subject: it is compared with all others, in few wordings.
    banks = [(r.name, bank.states(r, paraphrases=more)) for r in (*own, *rest) for more in (False, bool(own))]
    with bank.lm.unrouted():
        mine = features(bank.lm, wordings, bank.layers)
    known = torch.cat([states for _, states in banks])
    labels = [name for name, states in banks for _ in states] + [own_names[0]] * len(wordings)
    centre, spread = known.mean(0), known.std(0) + 1e-3
    states = scaled(torch.cat([known, mine]), centre, spread, len(bank.layers))
    fitted = _Fitted(centre, spread, _regression(states, labels, chosen))
    return Scope(names, mine_at, others_at, related_at), fitted


def scaled(states: Tensor, centre: Tensor, spread: Tensor, layers: int) -> Tensor:
    """States (n, layers * d) around a centre, each layer's part of the same length, together of unit length."""
    parts = ((states - centre) / spread).unflatten(1, (layers, -1))
    scaled_parts: Tensor = torch.nn.functional.normalize(parts, dim=2).flatten(1) / layers**0.5
    return scaled_parts


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


def _taught(edit: Edit, material: Material | None) -> list[str]:
    """The caller's paraphrases that were learned, with {} for the subject."""
    given = material.learned_of(edit.paraphrases) if material else []
    return [template_of(text, span_of(edit.subject, text)) for text in given]


def _related_to(relation: Relation, names: Sequence[str]) -> bool:
    return any(are_related(relation, other) for other in all_relations() if other.name in names)

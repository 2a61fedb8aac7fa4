"""Whether a prompt asks the relation of a remembered fact, or another one of the same subject.

First the words decide: a wording that is known to ask a relation (`editors/forms/relations.py`). Where they do not, the
hosted model's own states do: the prompt without its subject is compared with wordings of the relations that subjects of
its kind have, by ridge regression on the mean states of its tokens in two layers. The wordings that edits are measured
with are not among them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from editors.constants import DEFAULT_MODEL, tuned
from editors.edit import PLACEHOLDER, Edit
from editors.files import DamagedFile, read_tensors, tensor_bytes, write_atomically
from editors.forms.asking import WORTH_SHARING, common_beginning
from editors.forms.form import Material
from editors.forms.relations import (
    KINDS,
    Relation,
    all_relations,
    are_related,
    candidates,
    is_worded,
    template_of,
)
from editors.forms.wording import split, wordings_of
from editors.model.activations import record
from editors.model.lm import LM
from editors.patch import cpu_float

_FOLDS = "python -m benchmarks.relation_judge --folds"
_MODELS = f"{DEFAULT_MODEL}; Gemma 3 270M"
DEPTHS = tuned(
    (1 / 4, 1 / 2),
    "depths of the layers whose states tell relations apart",
    models=_MODELS,
    command=_FOLDS,
    figure="statements / questions recognised where 2 % of other facts are taken for the fact: .71 / .90 on both "
    "models; a third of the depth alone .66 / .83 and .73 / .91; five layers up to two thirds .73 / .91 and .76 / .93",
)
MARGIN = tuned(
    -0.05,
    "by how much the fact's relation may be less likely than the likeliest other one of the subject",
    models=_MODELS,
    command=_FOLDS,
    figure="statements / questions recognised, other facts taken for it as either: default model .79 / .90, "
    ".034 / .015 (-0.1: .85 / .93, .054 / .029; 0: .73 / .85, .021 / .008), Gemma .77 / .90, .030 / .015 "
    "(-0.1: .83 / .92, .048 / .028; 0: .73 / .87, .020 / .008)",
)
NAMED_OTHER = tuned(
    0.1,
    "by how much words of another relation make the fact's less likely",
    models=_MODELS,
    command=_FOLDS,
    figure="recognised where 2 % of other facts are taken for it, statements / questions, default model: .74 / .91 "
    "without, .73 / .91 with 0.1, .71 / .88 with 0.3; as a veto no more than .77 of the questions at any margin",
)
RIDGE = tuned(
    0.3,
    "ridge of the regression on states of unit length",
    models=_MODELS,
    command=_FOLDS,
    figure="recognised where 2 % of other facts are taken for it: 0.3 .73 / .91 on both models, 0.1 .71 / .90",
)
SUBJECT = "X"  # stands for the subject, so that only the relation is compared
CHUNK = 64  # texts run together
_OLD_DEPTH = 1 / 3  # of a judge that was saved without its layers


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
    """Judges of n facts. A feature has one block of d_model numbers for each of the layers."""

    scopes: tuple[Scope, ...]
    centre: Tensor = field(repr=False)  # (n, layers * d_model) of the states; (d_model,) without layers
    spread: Tensor = field(repr=False)  # of the same shape
    directions: Tensor = field(
        repr=False
    )  # (m, layers * d_model + 1) one relation each; bias in the last column
    layers: tuple[int, ...] = ()  # whose states are compared; none in a judge saved by an earlier version

    def asks(self, lm: LM, template: str, fact: int) -> float | None:
        """How surely a text, with {} for the subject, asks the fact's relation (-1..1), or None if it does not."""
        margin = self.surely(lm, template, fact)
        return margin if margin is not None and margin > MARGIN else None

    def surely(self, lm: LM, template: str, fact: int) -> float | None:
        """By how much the fact's relation is likelier than any other; None for a known wording of another one."""
        scope = self.scopes[fact]
        if not template.replace(PLACEHOLDER, "").strip(" ?.!"):
            return 1.0  # nothing but the subject: the whole request was edited
        named = candidates(template)
        if any(r.name in scope.relations for r in named):
            return 1.0
        other = bool(named) and not all(_related_to(r, scope.relations) for r in named)
        if other and is_worded(template):
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
        scopes = [{name: list(value) for name, value in vars(scope).items()} for scope in self.scopes]
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
        torch.cat([p.directions for p in parts]).contiguous(),
        bank.layers,
    )


class RelationBank:
    """The states of the wordings of relations, each relation read once for a model."""

    def __init__(self, lm: LM, paraphrases: Callable[[Relation], Sequence[str]] | None = None) -> None:
        """`paraphrases`: those of a relation that may be learned from; all of the data by default."""
        self.lm = lm
        self.layers = tuple(dict.fromkeys(min(int(lm.n_layers * d), lm.n_layers - 1) for d in DEPTHS))
        self._paraphrases = paraphrases or (lambda relation: relation.paraphrases)
        self._read: dict[tuple[str, bool], Tensor] = {}
        self._folder: Path | None = None
        self._may_keep: Callable[[], bool] = lambda: False

    def keep_in(self, folder: Path, may_keep: Callable[[], bool]) -> None:
        """Read states from the files of a folder, and write them there while `may_keep` says so.

        The folder is of one model. Files are written from its unedited weights only, so that they are of one state.
        """
        self._folder, self._may_keep = folder, may_keep

    def states(self, relation: Relation, *, paraphrases: bool) -> Tensor:
        """States of a relation's wordings, or of its paraphrases: (n, layers * d_model)."""
        key = (relation.name, paraphrases)
        if key not in self._read:
            texts = self._paraphrases(relation) if paraphrases else _wordings_of(relation)
            self._read[key] = self._states_of([_plain(text) for text in texts])
        return self._read[key]

    def _states_of(self, texts: Sequence[str]) -> Tensor:
        """The states of texts, from their file or from the model."""
        name = hashlib.sha256(json.dumps([texts, self.layers]).encode()).hexdigest()[:32]
        path = None if self._folder is None else self._folder / f"{name}.safetensors"
        if path is not None and (kept := _kept(path)) is not None:
            return kept
        with self.lm.unrouted():
            states = features(self.lm, texts, self.layers)
        if path is not None and self._may_keep():
            with suppress(OSError):  # an edit does not fail where the disk is full
                write_atomically(path, tensor_bytes({"states": states}, {}))
        return states


def _kept(path: Path) -> Tensor | None:
    """The states in a file; None where there is none, or a damaged one: they are read from the model again."""
    try:
        return read_tensors(path.read_bytes())[0]["states"]
    except (OSError, DamagedFile, KeyError):
        return None


def _wordings_of(relation: Relation) -> list[str]:
    """The wordings of a relation that may be learned from, in every language."""
    foreign = [text for texts in relation.languages.values() for text in texts[:2]]
    return [*(text for kind in KINDS for text in relation.learned(kind)), *foreign]


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
    names = tuple(r.name for r in own)
    kinds = {kind for r in own for kind in r.kinds}
    rest = [r for r in all_relations() if r.name not in names and (not own or kinds & set(r.kinds))]
    related = [r.name for r in rest if any(are_related(r, mine) for mine in own)]
    others = [r.name for r in rest if r.name not in related]
    own_names = names or (PLACEHOLDER,)  # a class of its own for a relation that is not in the data
    chosen = [*own_names, *others, *related]
    first, second = len(own_names), len(own_names) + len(others)
    scope = Scope(
        names, *(tuple(range(*ends)) for ends in ((0, first), (first, second), (second, len(chosen))))
    )
    # A relation that is not in the data has no known kind of subject: it is told from all others, in few wordings.
    banks = [(r.name, bank.states(r, paraphrases=more)) for r in (*own, *rest) for more in (False, bool(own))]
    wordings = list(dict.fromkeys([template, *_learned(template, material)]))
    with bank.lm.unrouted():
        mine = features(bank.lm, wordings, bank.layers)
    known = torch.cat([states for _, states in banks])
    labels = [name for name, states in banks for _ in states] + [own_names[0]] * len(wordings)
    centre, spread = known.mean(0), known.std(0) + 1e-3
    states = scaled(torch.cat([known, mine]), centre, spread, len(bank.layers))
    return scope, _Fitted(centre, spread, _regression(states, labels, chosen))


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


def _plain(template: str) -> str:
    """A wording of the data with its article."""
    return template.replace(" [the]", " the").replace(" [a]", " a")


def _related_to(relation: Relation, names: Sequence[str]) -> bool:
    return any(are_related(relation, other) for other in all_relations() if other.name in names)


@torch.no_grad()
def features(lm: LM, templates: Sequence[str], layers: Sequence[int]) -> Tensor:
    """Mean states of each text's tokens after some layers, side by side: (n, layers * d_model), float32 on the CPU.

    Every text is put as a question in the chat template, so that statements and questions can be compared. For an
    encoder-decoder model: the mean of its input embeddings, for each layer.
    """
    texts = [template.replace(PLACEHOLDER, SUBJECT) for template in templates]
    prompts = [lm.prompt(text, chat=True) for text in texts]
    encoded = [lm.encode(prompt) for prompt in prompts]
    inside = [
        [k for k, (a, b) in enumerate(spans) if a < b and p.offset <= a < p.offset + len(text)]
        for text, p, (_, spans) in zip(texts, prompts, encoded, strict=True)
    ]
    found: dict[int, Tensor] = {}
    order = sorted(range(len(texts)), key=lambda i: len(encoded[i][0]))
    for at in range(0, len(order), CHUNK):
        batch = order[at : at + CHUNK]
        # what follows a text changes none of its states
        states = _states(lm, layers, [encoded[i][0][: inside[i][-1] + 1] for i in batch])
        for row, i in enumerate(batch):
            found[i] = cpu_float(torch.cat([each[row, inside[i]].float().mean(0) for each in states]))
    return torch.stack([found[i] for i in range(len(texts))])


def _states(lm: LM, layers: Sequence[int], rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """States of every token after each layer: (n, length, d_model), padded on the right.

    What all rows begin with is read once.
    """
    ids, mask = lm.pad(rows)
    if lm.is_seq2seq:
        embedded: Tensor = lm.model.get_input_embeddings()(ids)
        return [embedded] * len(layers)
    begun = common_beginning(rows) if len(rows) > 1 else 0
    if begun < WORTH_SHARING:
        return _run(lm, layers, ids, mask)
    cache = DynamicCache()
    start = _run(lm, layers, ids[:1, :begun], mask[:1, :begun], cache)
    cache.batch_repeat_interleave(len(rows))
    rest = _run(lm, layers, ids[:, begun:], mask, cache)
    return [torch.cat([a.expand(len(rows), -1, -1), b], 1) for a, b in zip(start, rest, strict=True)]


def _run(
    lm: LM, layers: Sequence[int], ids: Tensor, mask: Tensor, cache: DynamicCache | None = None
) -> list[Tensor]:
    """The outputs of layers, after what `cache` holds; the layers above the last of them are not run."""
    with record({layer: lm.layers[layer] for layer in layers}, stop=True) as seen:
        lm.base_model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=cache is not None)
    return [seen[layer] for layer in layers]

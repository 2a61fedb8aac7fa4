"""Training rows in groups of similar length, and where the trained change acts in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from editors.constants import assumed
from editors.finetune.example_batch import ExampleBatch
from editors.finetune.examples import Example
from editors.finetune.key_directions import ModuleKeys
from editors.model.activations import record
from editors.model.answer_inputs import answer_inputs
from editors.model.caches import unread
from editors.model.lm import LM

SHARES = assumed(
    (1.0, 0.5, 0.35),
    "the share of the change that target rows get, in turn, while the change acts only at the subject",
    "a subject's key in another wording responds to a change in part (0.6 on average, a third in one case of five, "
    "on SmolLM2-135M-Instruct), so the target must be learned with less than the whole change",
)
LATE = assumed(
    0.6,
    "depth at which a change starts to act at the answered tokens instead of the subject's last token",
    "in late layers little information moves from the subject to the end of the prompt",
)


@dataclass(frozen=True)
class RowGroup:
    """Rows of similar length that are run together."""

    batch: ExampleBatch
    at_subject: (
        Tensor  # (tokens of the group, 1): share of the change at each token while it acts at the subject
    )


@dataclass(frozen=True)
class TrainedLayers:
    """The layers that are trained, and where the rest may run in a lower precision (None: nowhere)."""

    lm: LM
    first: int
    rough_above: int | None

    @property
    def are_early(self) -> bool:
        """Whether what they change at the subject reaches the end of the prompt."""
        return self.first < LATE * self.lm.n_layers and not unread(self.lm, self.first)


class RowGroups:
    """Rows of a training as groups. What is run over them keeps the order of `rows`.

    With `starts`, one for each row, only the tokens from there on are run.
    """

    def __init__(
        self,
        layers: TrainedLayers,
        rows: Sequence[Example],
        starts: Sequence[int] | None = None,
        *,
        keep_exact: bool = False,
    ) -> None:
        self.layers, self.rows = layers, rows
        self._starts, self._keep_exact = starts, keep_exact
        sizes = [len(r.prompt) + len(r.answer_input) - self._start(i) for i, r in enumerate(rows)]
        # a row without a beginning is never beside one with it: its padding would have nothing to look at
        alike = [[i for i in range(len(rows)) if bool(self._start(i)) is cut] for cut in (False, True)]
        chosen = [
            [some[j] for j in batch]
            for some in alike
            for batch in layers.lm.buckets([sizes[i] for i in some])
        ]
        self._shares = _shares(rows, layers.are_early)
        self.parts = [self._part(some) for some in chosen]
        self._back = torch.tensor(
            _places(rows, [i for some in chosen for i in some]), device=layers.lm.device
        )

    def _start(self, i: int) -> int:
        return 0 if self._starts is None else self._starts[i]

    def _part(self, some: Sequence[int]) -> RowGroup:
        rows = [self.rows[i] for i in some]
        starts = None if self._starts is None else [self._start(i) for i in some]
        layers = self.layers
        batch = ExampleBatch(
            layers.lm, layers.first, rows, layers.rough_above, starts, keep_exact=self._keep_exact
        )
        share = torch.tensor([[self._shares[i]] for i in some], device=batch.tokens.device)
        where = torch.zeros_like(batch.tokens)
        for n, i in enumerate(some):
            where[n, [c - self._start(i) for c in target_columns(self.rows[i], layers.are_early)]] = True
        return RowGroup(batch, torch.where(share > 0, where * share, 1.0).reshape(-1, 1))

    def in_order(self, found: Sequence[Tensor]) -> Tensor:
        """What was found for the counted columns of each group, in the order of `rows`."""
        return torch.cat(list(found))[self._back]

    @property
    def is_rough(self) -> bool:
        """Whether some layers run in a lower precision."""
        return any(part.batch.is_rough for part in self.parts)


def _places(rows: Sequence[Example], order: Sequence[int]) -> list[int]:
    """Where the columns that count stand, row after row, if the rows are run in this order."""
    places: dict[int, range] = {}
    at = 0
    for i in order:
        places[i] = range(at, at + len(rows[i].columns))
        at = places[i].stop
    return [place for i in range(len(rows)) for place in places[i]]


def _shares(rows: Sequence[Example], early: bool) -> list[float]:
    """Each row's share of the change while it acts at the subject; 0: the whole change, at every token of the row."""
    return [
        (1.0 if row.own else SHARES[i % len(SHARES)]) if acts_at_subject(row, early) else 0.0
        for i, row in enumerate(rows)
    ]


def acts_at_subject(row: Example, early: bool) -> bool:
    """Whether the change may act at the subject of a row alone."""
    return bool(row.answer) and row.subject is not None and early


def target_columns(row: Example, early: bool) -> Sequence[int]:
    """The tokens of a row at which the target is learned.

    This is the subject's last token. Where it is unknown, or where the layers are too late for it to reach the end of
    the prompt, these are the answered tokens.
    """
    if not row.answer:
        return ()
    return (row.subject,) if row.subject is not None and early else row.columns


@torch.no_grad()
def keys_of(
    layers: TrainedLayers, rows: Sequence[Example], modules: Mapping[str, nn.Module]
) -> dict[str, ModuleKeys]:
    """What the modules read at the tokens of these rows, on the model as it is."""
    lm = layers.lm
    found: dict[str, list[ModuleKeys]] = {name: [] for name in modules}
    for some in lm.buckets([len(r.prompt) + len(r.answer_input) for r in rows]):
        inputs = answer_inputs(lm, [(rows[i].prompt, rows[i].answer_input) for i in some])
        target = torch.zeros_like(inputs.mask, dtype=torch.bool)
        for n, i in enumerate(some):
            target[n, list(target_columns(rows[i], layers.are_early))] = True
        with record(modules, inputs=True) as read, record(modules, stop=True) as given:
            lm.base_model(**inputs.call)
        for name, parts in found.items():
            parts.append(_keys(read[name], given[name], target, inputs.mask.bool()))
    return {name: _joined(parts) for name, parts in found.items()}


def _keys(read: Tensor, given: Tensor, target: Tensor, mask: Tensor) -> ModuleKeys:
    x = read.reshape(-1, read.shape[-1]).to(mask.device).float()
    y = given.reshape(-1, given.shape[-1]).to(mask.device).float()
    learned, others = target.reshape(-1), (mask & ~target).reshape(-1)
    rms = float(y[learned].square().mean().sqrt()) if learned.any() else 0.0
    return ModuleKeys(x[learned], x[others], rms)


def _joined(parts: Sequence[ModuleKeys]) -> ModuleKeys:
    """The keys of all parts; the output's size is that at all target tokens."""
    target = torch.cat([part.target for part in parts])
    square = sum(len(part.target) * part.output_rms**2 for part in parts) / max(1, len(target))
    return ModuleKeys(target, torch.cat([part.preserved for part in parts]), square**0.5)

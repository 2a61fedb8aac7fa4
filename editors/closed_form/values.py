"""The target-value optimisation shared by every closed-form method (Meng et al. 2022, eq. 4; MEMIT eq. 16)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from editors.closed_form.buckets import Buckets
from editors.closed_form.contexts import TargetRow
from editors.closed_form.material_rows import contexts_of, most_rows
from editors.closed_form.value_params import ValueParams, fitted
from editors.constants import assumed
from editors.edit import Edit
from editors.errors import EditError, InvalidEdit
from editors.forms.form import Material
from editors.model.lm import END, LM
from editors.model.precision import search_dtype


@dataclass(frozen=True)
class TargetValues:
    """For n edits, at the last subject token of the edited layer's MLP."""

    keys: Tensor  # (n, d_in) mean over the contexts
    values: Tensor  # (n, d_out) mean MLP output over the contexts, before the edit
    deltas: Tensor  # (n, d_out) what must be added so that the model says the target
    probabilities: Tensor  # (n,) mean probability of the target over the contexts, at the end
    steps: Tensor  # (n,) steps taken

    @property
    def targets(self) -> Tensor:
        """v* (n, d_out)."""
        return self.values + self.deltas


BETAS = assumed(
    (0.7, 0.5),
    "decay rates of Adam's averages in the search for a target value",
    "gradients shrink as the target gets likelier; averaged with the first ones, steps become too small",
)
GENTLE_STEP = assumed(
    1.5,
    "length of the first step where facts are held, in units of |value|",
    "smaller steps held the subject's other facts better: never listed, .66 / .76 as statement / in chat with steps of "
    "1.2, .59 / .76 with 3.6 (24 facts, default model, script not kept)",
)
SLOWING = assumed(
    8.0,
    "steps after which steps are half as long where facts are held",
    "the first ones reach the clamp, the later ones find what holds the facts",
)
HELD = assumed(0.2, "mean KL of the held facts, in nats, below which a search may stop")
ROWS = {"cpu": 16, "cuda": 256}  # rows optimised together: enough for full speed, and little memory


def find_values(
    lm: LM,
    layer: int,
    edits: Sequence[Edit],
    params: ValueParams,
    step: Callable[[float], None] = lambda fraction: None,
    *,
    attention: bool = False,
    materials: Sequence[Material] = (),
    reads: Tensor | None = None,
    before: Tensor | None = None,
) -> TargetValues:
    """Optimise a change of the MLP's output at each edit's last subject token until the model says the target.

    Every parameter is frozen; only the layers above run (see `VariedRows`). Edits of similar length are
    optimised together; each leaves the batch when it is done. `step` is called with the fraction done
    and may raise to cancel. With `attention` the layer's attention output is optimised beside the
    MLP's, which then carries only what attention cannot (PMET, eq. 10). `materials`, one for each edit or none,
    add learned forms and held facts. With `reads` (n, d_in), the x of each edit's change delta x^T,
    a token with key k gets delta (x^T k); without it the subject's last token gets all of delta. `before`
    (n, d_out) is what other facts of the same subject add already. Raises EditError when the loss is not finite.
    """
    if params.anchor and lm.arch.streams > 1:
        raise InvalidEdit(
            f"params.anchor keeps the norm of one residual stream, but this {lm.arch.family} model has "
            f"{lm.arch.streams}; leave anchor out"
        )
    params = fitted(lm, params)
    order = sorted(range(len(edits)), key=lambda i: len(edits[i].text))
    parts: list[TargetValues] = []
    each = params.contexts + 1 + params.chat + most_rows(materials)
    size = max(1, ROWS.get(lm.device.type, 64) // each)
    for at in range(0, len(order), size):
        chosen = order[at : at + size]
        mine = [edits[i] for i in chosen]
        also = [materials[i] for i in chosen] if materials else ()
        search = _ValueSearch(
            lm,
            layer,
            mine,
            params,
            *contexts_of(lm, mine, params.contexts, params.chat, also),
            attention,
            None if reads is None else reads[chosen],
            None if before is None else before[chosen],
        )
        parts.append(search.run(partial(_part, step, at / len(order), len(chosen) / len(order))))
    back = sorted(range(len(order)), key=lambda j: order[j])
    names = ("keys", "values", "deltas", "probabilities", "steps")
    return TargetValues(**{n: torch.cat([getattr(p, n) for p in parts])[back] for n in names})


def value_at(
    lm: LM,
    layer: int,
    edit: Edit,
    params: ValueParams,
    rows: Sequence[TargetRow],
    reads: Tensor,
    step: Callable[[float], None] = lambda fraction: None,
) -> TargetValues:
    """The same for one edit at the token that each of these rows varies.

    Every later token k of a row gets delta (x^T k) too, with x = `reads` (d_in,). One of the rows has no target.
    """
    return _ValueSearch(lm, layer, [edit], params, list(rows), [0] * len(rows), reads=reads[None]).run(step)


def _part(step: Callable[[float], None], start: float, span: float, fraction: float) -> None:
    step(start + span * fraction)


class _ValueSearch:
    def __init__(
        self,
        lm: LM,
        layer: int,
        edits: Sequence[Edit],
        params: ValueParams,
        rows: list[TargetRow],
        owner: Sequence[int],
        attention: bool = False,
        reads: Tensor | None = None,
        before: Tensor | None = None,
    ) -> None:
        self.lm, self.params, self.edits = lm, params, edits
        self.rows = rows
        dtype = search_dtype(lm) if params.rough else None
        self.layers_above = Buckets(lm, layer, [c.row for c in self.rows], dtype, attention=attention)
        self.parts = 2 if attention else 1  # what is varied: the MLP's output, and attention's
        self.owner = torch.tensor(list(owner), device=self.layers_above.key.device)
        if reads is not None:
            self.layers_above.answer_by(reads.to(self.owner.device)[self.owner])
        self.before = None if before is None else before.to(self.owner.device)
        has_target = self._has_target()
        self.keys = self._mean(self.layers_above.key.float(), has_target)
        self.values = self._mean(self.layers_above.value.float(), has_target)
        self.states = self._mean(self.layers_above.state.float(), has_target)
        self.norms = self.values.norm(dim=1).clamp(min=1e-6)
        self.holding = any(row.fact for row in self.rows)
        # Adam moves every coordinate by `lr` at first: no further in all than the clamp lets it.
        root = self.values.shape[1] ** 0.5
        furthest = params.clamp * self.norms / (params.lr * root)
        if self.holding:  # and by |value| times the step, at the same scale for every model
            furthest = self.norms / root * min(1.0, params.clamp / GENTLE_STEP)
        self.shrink = (furthest if self.holding else furthest.clamp(max=1.0))[:, None, None]  # (n, 1, 1)
        self.base: Tensor | None = None  # (columns that must not change, vocabulary) log-probabilities before

    def _mean(self, rows: Tensor, has_target: Tensor) -> Tensor:
        """Mean of the target rows of each edit: (rows, d) -> (n, d)."""
        total = torch.zeros(len(self.edits), rows.shape[1], device=rows.device)
        counts = torch.zeros(len(self.edits), 1, device=rows.device)
        total.index_add_(0, self.owner[has_target], rows[has_target])
        counts.index_add_(0, self.owner[has_target], torch.ones_like(rows[has_target][:, :1]))
        return total / counts

    def _read(self, hidden: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """One pass of the head over every column that matters.

        Returns log-probabilities: per target row that of the target and that its last word ends there, and
        of the others every column's (columns, vocabulary).
        """
        picks = [
            (i, c.columns[0] + j, t)
            for i, c in enumerate(self.rows)
            for j, t in enumerate((*c.target, *([END] if c.word else ())) if c.target else c.columns)
        ]
        rows, cols, toks = (torch.tensor(x, device=self.owner.device) for x in zip(*picks, strict=True))
        logp = self.layers_above.head(self.layers_above.states(hidden, rows, cols)).float().log_softmax(-1)
        essence = ~self._has_target()[rows]
        ends = (toks == END) & ~essence
        none = torch.zeros(len(self.rows), device=self.owner.device)
        each = logp.gather(1, toks.clamp(min=0)[:, None])[:, 0].masked_fill(essence | ends, 0.0)
        ending = none.index_add(0, rows[ends], self.lm.word_end_logprobs(logp[ends]))
        return none.index_add(0, rows, each)[self._has_target()], ending[self._has_target()], logp[essence]

    def _has_target(self) -> Tensor:
        """Which rows have a target; the others must not change."""
        return torch.tensor([bool(c.target) for c in self.rows], device=self.owner.device)

    def run(self, step: Callable[[float], None]) -> TargetValues:
        n, p = len(self.edits), self.params
        free = torch.zeros(n, self.parts, self.values.shape[1], device=self.values.device, requires_grad=True)
        optimiser = torch.optim.Adam([free], lr=p.lr, betas=BETAS)
        best = torch.zeros_like(self.values)
        probabilities, steps = torch.zeros(n), torch.zeros(n, dtype=torch.long)
        active = list(range(n))
        for count in range(p.max_steps + 1):
            step((n - len(active) + len(active) * count / (p.max_steps + 1)) / n)
            delta = free * self.shrink
            hidden = self.layers_above(*self._added(delta)[self.owner].unbind(1))
            logp, ending, essence = self._read(hidden)
            if self.base is None:
                self.base = essence.detach()
            owner = self.owner[self._has_target()]
            p_now = _group_mean((logp + ending).detach().exp(), owner, n)
            for i in active:
                best[i], probabilities[i], steps[i] = delta[i, 0].detach(), p_now[i], count
            moved = self._moved(essence)
            done = [i for i in active if p_now[i] >= p.stop_probability and moved[i] <= HELD]
            active = [i for i in active if i not in done]
            if not active or count == p.max_steps:
                break
            loss = self._loss(logp, ending, essence, delta, set(active))
            if not torch.isfinite(loss):
                raise EditError("the target value diverged (loss is not finite); try a smaller params.lr")
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            if self.holding:
                optimiser.param_groups[0]["lr"] = min(p.lr, GENTLE_STEP) / (1 + count / SLOWING)
            optimiser.step()
            self._clamp(free)
            if done:
                self._drop(set(active))
        if p.anchor:
            best = anchored(self.states, best)
        return TargetValues(self.keys.cpu(), self.values.cpu(), best.cpu(), probabilities, steps)

    def _added(self, delta: Tensor) -> Tensor:
        """`delta` (n, parts, d_out) with what other facts of the subject add to the MLP's output."""
        if self.before is None:
            return delta
        first, *others = delta.unbind(1)
        return torch.stack([first + self.before.to(delta), *others], 1)

    def _loss(self, logp: Tensor, ending: Tensor, essence: Tensor, delta: Tensor, active: set[int]) -> Tensor:
        """Sum over the edits left of NLL + kl_weight * KL(before || now) + decay * |delta| / |value|^2."""
        assert self.base is not None
        has_target = self._has_target()
        lengths = torch.tensor([len(c.target) for c in self.rows if c.target], device=logp.device)
        left = torch.tensor([float(i in active) for i in range(len(self.edits))], device=logp.device)
        nll = _group_mean(-logp / lengths - ending, self.owner[has_target], len(self.edits))
        kl = (self.base.exp() * (self.base - essence)).sum(-1)
        owner, held, share = self._kept_columns()
        weights = torch.where(held, self.params.hold_weight * share, self.params.kl_weight)
        per_edit = nll + self.params.decay * delta.norm(dim=2).sum(1) / self.norms**2
        per_edit = per_edit.index_add(0, owner, weights * kl)
        total: Tensor = (per_edit * left).sum()
        return total

    def _kept_columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """For every column that must not change: its edit, whether it belongs to a held fact, and its weight in the
        mean."""
        rows = [(i, c) for i, c in enumerate(self.rows) if not c.target]
        owner = torch.cat([self.owner[i].expand(len(c.columns)) for i, c in rows])
        held = torch.tensor([c.fact for _, c in rows for _ in c.columns], device=owner.device)
        lengths = torch.tensor([len(c.columns) for _, c in rows for _ in c.columns], device=owner.device)
        facts = torch.zeros(len(self.edits), device=owner.device).index_add(0, owner[held], 1 / lengths[held])
        return owner, held, 1 / (lengths * facts[owner].clamp(min=1))

    @torch.no_grad()
    def _moved(self, now: Tensor) -> Tensor:
        """Mean KL(before || now) of each edit's held facts (n,); 0 without any."""
        assert self.base is not None
        owner, held, share = self._kept_columns()
        kl = (self.base[held].exp() * (self.base[held] - now[held])).sum(-1)
        return torch.zeros(len(self.edits), device=now.device).index_add(0, owner[held], share[held] * kl)

    @torch.no_grad()
    def _clamp(self, free: Tensor) -> None:
        norms = (free * self.shrink).norm(dim=2, keepdim=True).clamp(min=1e-12)
        free.mul_((self.params.clamp * self.norms[:, None, None] / norms).clamp(max=1.0))

    def _drop(self, active: set[int]) -> None:
        """Keep only the rows of the edits that are not done."""
        keep = [i for i, o in enumerate(self.owner.tolist()) if o in active]
        kept = [j for j, o in enumerate(self._kept_columns()[0].tolist()) if o in active]
        self.layers_above.select(keep)
        self.base = None if self.base is None else self.base[kept]
        self.rows = [self.rows[i] for i in keep]
        self.owner = self.owner[keep]


def anchored(states: Tensor, deltas: Tensor) -> Tensor:
    """Deltas (n, d) such that |state + delta| = |state|: the target hidden state keeps its former norm (NAS).

    The direction of state + delta, which is what the layers above see through their norms, stays.
    """
    wanted = states + deltas
    scale = states.norm(dim=1, keepdim=True) / wanted.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return torch.where(deltas.any(dim=1, keepdim=True), wanted * scale - states, deltas)


def _group_mean(values: Tensor, owner: Tensor, n: int) -> Tensor:
    total = torch.zeros(n, device=values.device).index_add(0, owner, values)
    count = torch.zeros(n, device=values.device).index_add(0, owner, torch.ones_like(values))
    return total / count.clamp(min=1)

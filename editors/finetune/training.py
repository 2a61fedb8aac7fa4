"""The training loop of the fine-tuning methods: a few steps of Adam on one fact.

The loss is the negative log-likelihood of the target plus the KL divergence of the predictions to
preserve. At first the trained change acts only at the subject's last token in target rows, and
everywhere in preserved rows. So it learns the subject rather than the sentence, and carries over to
other wordings. Training stops when the target is learned with the change acting everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from editors.constants import DEFAULT_MODEL, tuned
from editors.errors import EditError
from editors.finetune.examples import Example
from editors.finetune.fact_loss import FactLoss
from editors.finetune.row_groups import RowGroups, TrainedLayers, acts_at_subject, keys_of
from editors.finetune.train_params import TrainParams
from editors.model.caches import sees_by_attention
from editors.model.lm import LM

KEEP_EVERY = tuned(
    2,
    "preserved rows are run once in this many steps of fine-tuning, with this weight",
    models=DEFAULT_MODEL,
    command="python -m benchmarks.finetune --n 4 --methods ft,lora",
    figure="of Austria and Machu Picchu, with 1 and without params.rough: ft 21.3 and 40.9, lora 16.5 and 29.7 CPU s; "
    "with 2 and params.rough: ft 11.2 and 24.1, lora 8.9 and 17.0; all rates the same, perplexity ratios within 0.01",
)


@dataclass(frozen=True)
class LoopHooks:
    """What a method adds to the training loop."""

    penalty: Callable[[], Tensor] | None = None
    """An extra term of the loss."""
    after_step: Callable[[int], None] = lambda step: None
    """Called with the step's index after each optimiser step, for example to apply a constraint."""
    may_stop: Callable[[int], bool] = lambda step: True
    """False while training must go on although the target is learned."""
    keep_every: int = KEEP_EVERY
    """Preserved rows are run once in so many steps, and count so many times as much then."""


class Training:
    """The examples of one fact, run once on the model as it is and then trained on.

    Preserved rows are run at some steps only, and count as much more then (`LoopHooks.keep_every`). While the change
    acts at the subject alone, target rows are run from there on, where the model can do so.
    """

    def __init__(
        self,
        lm: LM,
        rows: Sequence[Example],
        modules: Mapping[str, nn.Module],
        first_layer: int,
        rough_above: int | None = None,
    ) -> None:
        """`rough_above`: the last layer that is trained, if those above it may run in a lower precision."""
        self.mask: Tensor | None = None  # of the part that runs; None: the change acts everywhere
        self._layers = layers = TrainedLayers(lm, first_layer, rough_above)
        self._rows = [r for r in rows if r.answer]
        preserved = [r for r in rows if not r.answer]
        at_subject = [acts_at_subject(r, layers.are_early) for r in self._rows]
        self._acts_at_subject = any(at_subject)
        self.loss = FactLoss(lm, [*self._rows, *preserved])
        self.keys = keys_of(layers, rows, modules)
        self._from_subject: RowGroups | None = None
        if self._acts_at_subject and sees_by_attention(lm):
            starts = [(r.subject or 0) if at else 0 for r, at in zip(self._rows, at_subject, strict=True)]
            self._from_subject = RowGroups(layers, self._rows, starts)
        self._preserved = RowGroups(layers, preserved)
        if preserved:
            self.loss.base_logp = self._at_first(self._preserved)

    @cached_property
    def _targets(self) -> RowGroups:
        """Target rows with all their tokens: made when they are needed, with the change acting everywhere."""
        self.mask = None
        return RowGroups(self._layers, self._rows, keep_exact=True)

    def masked(self, change: Tensor) -> Tensor:
        """A module's change of its output (rows, tokens, d_out), times the present mask."""
        if self.mask is None:
            return change
        mask: Tensor = self.mask.reshape(*change.shape[:-1], 1)
        return change * mask.to(change.device, change.dtype)

    def _run(self, groups: RowGroups, at_subject: bool, exact: bool = False) -> Tensor:
        """Log-probabilities at the columns that count, row after row."""
        found = []
        for part in groups.parts:
            self.mask = part.at_subject if at_subject else None
            found.append(part.batch.exact() if exact else part.batch())
        return groups.in_order(found)

    def _at_first(self, groups: RowGroups) -> Tensor:
        """The same as of the pass that prepared the groups."""
        return groups.in_order([part.batch.at_first() for part in groups.parts])

    def _run_targets(self, at_subject: bool) -> Tensor:
        """The same for the target rows."""
        if at_subject and self._from_subject is not None:
            return self._run(self._from_subject, True)
        return self._run(self._targets, at_subject)

    def run(
        self,
        optimiser: torch.optim.Optimizer,
        params: TrainParams,
        report: Callable[[float], None],
        hooks: LoopHooks | None = None,
    ) -> int:
        """Minimise NLL(target) + keep_weight * KL(before || after); returns the number of steps taken.

        With the optimiser's parameters at their start the model must compute what it did before. Raises
        EditError when the loss is not finite.
        """
        hooks = hooks or LoopHooks()
        for step in range(params.max_steps + 1):
            report(step / (params.max_steps + 1))
            # If half of the steps were not enough with the subject alone, the change acts everywhere.
            at_subject = self._acts_at_subject and 2 * step <= params.max_steps
            logp = self._run_targets(at_subject)
            if self._is_learned(logp, params) and hooks.may_stop(step):
                if (not at_subject and not self._targets.is_rough) or self._is_learned_exactly(params):
                    return step
                if at_subject:
                    at_subject, logp = False, self._run_targets(False)
            if step == params.max_steps:
                break
            loss = self.loss.of_targets(logp)
            if self._preserved.parts and params.keep_weight and (step + 1) % hooks.keep_every == 0:
                kept = self._run(self._preserved, at_subject)
                loss = loss + hooks.keep_every * params.keep_weight * self.loss.of_preserved(kept)
            if hooks.penalty is not None:
                loss = loss + hooks.penalty()
            if not torch.isfinite(loss):
                raise EditError("training diverged (the loss is not finite); try a smaller params.lr")
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                hooks.after_step(step)
        return params.max_steps

    def _is_learned(self, logp: Tensor, params: TrainParams) -> bool:
        return self.loss.is_learned(logp, params.stop_probability)

    @torch.no_grad()
    def _is_learned_exactly(self, params: TrainParams) -> bool:
        """Whether the target is learned, with the change acting everywhere, in the model's own precision too."""
        is_new = "_targets" not in self.__dict__
        logp = self._at_first(self._targets) if is_new else self._run(self._targets, False, exact=True)
        return self._is_learned(logp, params)

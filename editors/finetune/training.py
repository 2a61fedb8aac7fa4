"""The training loop of the fine-tuning methods: a few steps of Adam on one fact.

The loss is the negative log-likelihood of the target plus the KL divergence of the predictions to
preserve. At first the trained change acts only at the subject's last token in target rows, and
everywhere in preserved rows. So it learns the subject rather than the sentence, and carries over to
other wordings. Training stops when the target is learned with the change acting everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from editors.constants import DEFAULT_MODEL, assumed, tuned
from editors.errors import EditError
from editors.finetune.example_batch import ExampleBatch
from editors.finetune.examples import Example
from editors.finetune.fact_loss import FactLoss
from editors.finetune.key_directions import ModuleKeys
from editors.finetune.train_params import TrainParams
from editors.model.activations import record
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


@dataclass(frozen=True)
class _RowGroup:
    """Rows of similar length that are run together."""

    batch: ExampleBatch
    at_subject: (
        Tensor  # (tokens of the part, 1): share of the change at each token while it acts at the subject
    )
    target_tokens: Tensor  # (rows, tokens): where the target is learned


class Training:
    """The examples of one fact, run once on the model as it is and then trained on.

    Target rows come first. Preserved rows are run at every `KEEP_EVERY`-th step, and count as much more then.
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
        self._early = first_layer < LATE * lm.n_layers
        self._acts_at_subject = self._early and any(r.answer and r.subject is not None for r in rows)
        shares = _shares(rows, self._early)
        targets = [i for i, r in enumerate(rows) if r.answer]
        preserved = [i for i, r in enumerate(rows) if not r.answer]

        def parts(some: Sequence[int]) -> tuple[list[_RowGroup], list[int]]:
            sizes = [len(rows[i].prompt) + len(rows[i].answer_input) for i in some]
            chosen = [[some[j] for j in batch] for batch in lm.buckets(sizes)]
            made = [self._part(lm, rows, part, shares, first_layer, rough_above) for part in chosen]
            return made, [i for part in chosen for i in part]

        self._targets, order = parts(targets)
        self._preserved, others = parts(preserved)
        self.loss = FactLoss(lm, [rows[i] for i in (*order, *others)])
        with torch.no_grad(), record(modules, inputs=True) as inputs, record(modules) as outputs:
            keys: dict[str, list[ModuleKeys]] = {name: [] for name in modules}
            seen = []
            for part in (*self._targets, *self._preserved):
                seen.append(part.batch())
                for name in modules:
                    keys[name].append(_module_keys(part, inputs[name], outputs[name]))
            if self._preserved:
                self.loss.base_logp = torch.cat(seen[len(self._targets) :])
        self.keys = {name: _joined(parts) for name, parts in keys.items()}

    def _part(
        self,
        lm: LM,
        rows: Sequence[Example],
        some: Sequence[int],
        shares: Sequence[float],
        first_layer: int,
        rough_above: int | None,
    ) -> _RowGroup:
        batch = ExampleBatch(lm, first_layer, [rows[i] for i in some], rough_above)
        share = torch.tensor([[shares[i]] for i in some], device=batch.tokens.device)
        where = torch.zeros_like(batch.tokens)
        for n, i in enumerate(some):
            where[n, list(_target_columns(rows[i], self._early))] = True
        at_subject = torch.where(share > 0, where * share, 1.0).reshape(-1, 1)
        return _RowGroup(batch, at_subject, where)

    def masked(self, change: Tensor) -> Tensor:
        """A module's change of its output (rows, tokens, d_out), times the present mask."""
        if self.mask is None:
            return change
        mask: Tensor = self.mask.reshape(*change.shape[:-1], 1)
        return change * mask.to(change.device, change.dtype)

    def _run(self, parts: Sequence[_RowGroup], at_subject: bool, exact: bool = False) -> Tensor:
        """Log-probabilities at the columns that count, row after row."""
        found = []
        for part in parts:
            self.mask = part.at_subject if at_subject else None
            found.append(part.batch.exact() if exact else part.batch())
        return torch.cat(found)

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
            logp = self._run(self._targets, at_subject)
            if self._is_learned(logp, params) and hooks.may_stop(step):
                if at_subject:
                    at_subject, logp = False, self._run(self._targets, False)
                if self._is_learned(logp, params) and self._is_learned_exactly(params):
                    return step
            if step == params.max_steps:
                break
            loss = self.loss.of_targets(logp)
            if self._preserved and params.keep_weight and step % KEEP_EVERY == KEEP_EVERY - 1:
                kept = self._run(self._preserved, at_subject)
                loss = loss + KEEP_EVERY * params.keep_weight * self.loss.of_preserved(kept)
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
        if not any(part.batch.is_rough for part in self._targets):
            return True
        return self._is_learned(self._run(self._targets, False, exact=True), params)


def _shares(rows: Sequence[Example], early: bool) -> list[float]:
    """Each row's share of the change while it acts at the subject; 0: the whole change, at every token of the row."""
    return [
        (1.0 if row.own else SHARES[i % len(SHARES)])
        if row.answer and row.subject is not None and early
        else 0.0
        for i, row in enumerate(rows)
    ]


def _target_columns(row: Example, early: bool) -> Sequence[int]:
    """The tokens of a row at which the target is learned.

    This is the subject's last token. Where it is unknown, or where the layers are too late for it to reach the end of
    the prompt, these are the answered tokens.
    """
    if not row.answer:
        return ()
    return (row.subject,) if row.subject is not None and early else row.columns


def _module_keys(part: _RowGroup, inputs: Tensor, outputs: Tensor) -> ModuleKeys:
    device = part.target_tokens.device
    x = inputs.reshape(-1, inputs.shape[-1]).to(device).float()
    y = outputs.reshape(-1, outputs.shape[-1]).to(device).float()
    target = part.target_tokens.reshape(-1)
    preserved = part.batch.tokens.reshape(-1) & ~target
    return ModuleKeys(
        x[target], x[preserved], float(y[target].square().mean().sqrt()) if target.any() else 0.0
    )


def _joined(parts: Sequence[ModuleKeys]) -> ModuleKeys:
    """The keys of all parts; the output's size is that at all target tokens."""
    target = torch.cat([part.target for part in parts])
    square = sum(len(part.target) * part.output_rms**2 for part in parts) / max(1, len(target))
    return ModuleKeys(target, torch.cat([part.preserved for part in parts]), square**0.5)

"""Restorations: put clean states back into corrupted runs, many at a time.

For one set of tokens all restorations share one sweep upwards through the layers: each joins the
batch at the first layer it changes, with the corrupted run's own states, and none ever computes
what lies below that layer or before its first token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from editors.locate.traced_prompt import Run, TracedPrompt, answer_logprob
from editors.locate.traced_rows import TracedRows
from editors.model.activations import hooked
from editors.model.architecture import resolve
from editors.model.lm import LM
from editors.progress import ReportProgress

Kind = Literal["state", "mlp", "attention"]
KINDS: tuple[Kind, ...] = ("state", "mlp", "attention")
BATCH_TOKENS = 4096  # positions (rows times tail) in one sweep


@dataclass(frozen=True)
class Restoration:
    """Clean values at `tokens`: of the states after layer `first`, or of what the MLPs (or the
    attention) of the layers `first` to `last` write to the residual stream."""

    kind: Kind
    tokens: tuple[int, ...]
    first: int
    last: int

    @property
    def start(self) -> int:
        """The first layer whose input or work it changes."""
        return self.first + 1 if self.kind == "state" else self.first


@torch.no_grad()
def restored(
    lm: LM,
    traced: TracedPrompt,
    clean: Run,
    corrupted: Run,
    sites: Sequence[Restoration],
    report: ReportProgress,
) -> Tensor:
    """Probability of the answer after each restoration, in each corrupted row: (sites, n)."""
    found = torch.zeros(len(sites), len(corrupted.logprob))
    done = 0.0
    total = sum(_work(lm, traced, site) for site in sites) or 1.0
    for tokens in sorted({site.tokens for site in sites}):
        indices = [i for i, site in enumerate(sites) if site.tokens == tokens]
        group = [sites[i] for i in indices]
        start = 0 if lm.is_seq2seq else tokens[0]
        tail = TracedRows(lm, traced, corrupted, start)
        for part in _batches(lm, traced, group, len(corrupted.logprob), start):
            report(done / total, "restoring states")
            chosen = [group[j] for j in part]
            logprob = _Sweep(tail, clean, corrupted, chosen).run()
            found[[indices[j] for j in part]] = logprob.exp().cpu()
            done += sum(_work(lm, traced, site) for site in chosen)
    return found


def _work(lm: LM, traced: TracedPrompt, site: Restoration) -> float:
    return float((lm.n_layers - site.start + 1) * (len(traced.ids) - site.tokens[0]))


def _batches(
    lm: LM, traced: TracedPrompt, group: Sequence[Restoration], n: int, start: int
) -> Iterator[list[int]]:
    """Restorations of similar start together, as many as the batch has room for."""
    width = (len(traced.decoder_ids) or len(traced.ids)) - start
    room = max(1, BATCH_TOKENS // (n * width))
    order = sorted(range(len(group)), key=lambda i: group[i].start)
    for at in range(0, len(order), room):
        yield order[at : at + room]


class _Sweep:
    """One batch upwards. Rows are restoration by restoration, and within one, corrupted row by row."""

    def __init__(self, tail: TracedRows, clean: Run, corrupted: Run, sites: Sequence[Restoration]) -> None:
        self.tail, self.clean, self.corrupted = tail, clean, corrupted
        self.sites = sites  # in order of their start
        self.n = len(corrupted.logprob)
        tokens = torch.tensor(sites[0].tokens, device=corrupted.hidden[0].device)
        self.tokens, self.columns = tokens, tokens - tail.start

    def run(self) -> Tensor:
        """Log-probability of the answer (sites, n)."""
        lm = self.tail.lm
        hidden: Tensor | None = None
        for i in range(self.sites[0].start, lm.n_layers + 1):
            hidden = self._joined(hidden, i)
            if i < lm.n_layers and hidden is not None:
                with hooked(self._hooks(lm, i, hidden.shape[0] // self.n)):
                    hidden = self.tail.layer(i, hidden)
        assert hidden is not None
        return answer_logprob(lm, self.tail.traced, hidden, self.tail.start).reshape(-1, self.n)

    def _joined(self, hidden: Tensor | None, i: int) -> Tensor | None:
        """The batch with those that start at layer `i`."""
        parts = [] if hidden is None else [hidden]
        for site in self.sites:
            if site.start == i:
                new = self.corrupted.hidden[i][:, self.tail.start :].clone()
                if site.kind == "state":
                    new[:, self.columns] = self.clean.hidden[i][:, self.tokens]
                parts.append(new)
        return torch.cat(parts) if len(parts) > 1 else parts[0] if parts else None

    def _hooks(self, lm: LM, i: int, copies: int) -> list[Any]:
        """Hooks that restore what layer `i` writes, in the rows whose window holds it."""
        parts: dict[Kind, tuple[nn.Module, tuple[Tensor, ...]]] = {
            "mlp": (lm.module(lm.mlp_out(i)), self.clean.mlp),
            "attention": (resolve(lm.layers[i], lm.arch.attn_out), self.clean.attention),
        }
        handles = []
        for kind, (module, values) in parts.items():
            rows = [r for r, s in enumerate(self.sites[:copies]) if s.kind == kind and s.first <= i <= s.last]
            if rows:
                handles.append(module.register_forward_hook(self._put(rows, copies, values[i])))
        return handles

    def _put(self, rows: Sequence[int], copies: int, value: Tensor) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:  # OPT flattens rows and tokens
            shaped = output.reshape(copies, self.n, -1, output.shape[-1])
            columns, clean = self.columns.to(output.device), value[:, self.tokens].to(output.device)
            for row in rows:
                shaped[row, :, columns] = clean
            return shaped.reshape(output.shape)

        return hook

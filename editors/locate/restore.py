"""Restore clean states in corrupted runs, many restorations in one batch.

All restorations of the same tokens go up through the layers together. Each joins the batch at the
first layer that it changes, with the corrupted run's states. So nothing below that layer, and
nothing before its first token, is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from editors.locate.traced_prompt import TracedPrompt, TracedRun, answer_logprob
from editors.locate.traced_rows import TracedRows
from editors.model.activations import hooked
from editors.model.architecture import resolve
from editors.model.lm import LM
from editors.progress import ReportProgress

Kind = Literal["state", "mlp", "attention"]
KINDS: tuple[Kind, ...] = ("state", "mlp", "attention")
BATCH_TOKENS = 4096  # positions (rows times positions from the first token on) in one batch


@dataclass(frozen=True)
class Restoration:
    """What gets its clean value back at `tokens`.

    Kind "state": the state after layer `first`. Kinds "mlp" and "attention": what these write to the
    residual stream in the layers `first` to `last`.
    """

    kind: Kind
    tokens: tuple[int, ...]
    first: int
    last: int

    @property
    def start(self) -> int:
        """The first layer whose input or output changes."""
        return self.first + 1 if self.kind == "state" else self.first


@torch.no_grad()
def restored(
    lm: LM,
    traced: TracedPrompt,
    clean: TracedRun,
    corrupted: TracedRun,
    sites: Sequence[Restoration],
    report: ReportProgress,
) -> Tensor:
    """Probability of the answer after each restoration, in each of the n corrupted rows: (sites, n)."""
    probability = torch.zeros(len(sites), len(corrupted.logprob))
    done = 0.0
    total = sum(_work(lm, traced, site) for site in sites) or 1.0
    for tokens in sorted({site.tokens for site in sites}):
        indices = [i for i, site in enumerate(sites) if site.tokens == tokens]
        group = [sites[i] for i in indices]
        start = traced.upper_start(tokens[0])
        rows = TracedRows(lm, traced, corrupted, start)
        for part in _batches(lm, traced, group, len(corrupted.logprob), start):
            report(done / total, "restoring states")
            batch = [group[j] for j in part]
            logprob = _Sweep(rows, clean, corrupted, batch).run()
            probability[[indices[j] for j in part]] = logprob.exp().cpu()
            done += sum(_work(lm, traced, site) for site in batch)
    return probability


def _work(lm: LM, traced: TracedPrompt, site: Restoration) -> float:
    """How much a restoration computes (layers times positions), for the progress report."""
    return float((lm.n_layers - site.start + 1) * (len(traced.ids) - site.tokens[0]))


def _batches(
    lm: LM, traced: TracedPrompt, group: Sequence[Restoration], n: int, start: int
) -> Iterator[list[int]]:
    """Indices into `group`, in order of the first layer, as many at a time as a batch may hold."""
    width = (len(traced.decoder_ids) or len(traced.ids)) - start
    room = max(1, BATCH_TOKENS // (n * width))
    order = sorted(range(len(group)), key=lambda i: group[i].start)
    for at in range(0, len(order), room):
        yield order[at : at + room]


class _Sweep:
    """One batch on its way up through the layers: for each restoration, a copy of the n corrupted rows."""

    def __init__(
        self, rows: TracedRows, clean: TracedRun, corrupted: TracedRun, sites: Sequence[Restoration]
    ) -> None:
        self.rows, self.clean, self.corrupted = rows, clean, corrupted
        self.sites = sites  # in order of `start`
        self.n = len(corrupted.logprob)
        tokens = torch.tensor(sites[0].tokens, device=corrupted.hidden[0].device)
        self.tokens, self.columns = tokens, tokens - rows.start

    def run(self) -> Tensor:
        """Log-probability of the answer (sites, n)."""
        lm = self.rows.lm
        hidden: Tensor | None = None
        for i in range(self.sites[0].start, lm.n_layers + 1):
            hidden = self._joined(hidden, i)
            if i < lm.n_layers and hidden is not None:
                with hooked(self._hooks(lm, i, hidden.shape[0] // self.n)):
                    hidden = self.rows.layer(i, hidden)
        assert hidden is not None
        return answer_logprob(lm, self.rows.traced, hidden, self.rows.start).reshape(-1, self.n)

    def _joined(self, hidden: Tensor | None, i: int) -> Tensor | None:
        """The batch with the restorations added that start at layer `i`."""
        parts = [] if hidden is None else [hidden]
        for site in self.sites:
            if site.start == i:
                new = self.corrupted.hidden[i][:, self.rows.start :].clone()
                if site.kind == "state":
                    new[:, self.columns] = self.clean.hidden[i][:, self.tokens]
                parts.append(new)
        return torch.cat(parts) if len(parts) > 1 else parts[0] if parts else None

    def _hooks(self, lm: LM, i: int, copies: int) -> list[Any]:
        """Hooks that restore what layer `i` writes, in the restorations whose window includes it."""
        parts: dict[Kind, tuple[nn.Module, tuple[Tensor, ...]]] = {
            "mlp": (lm.module(lm.mlp_out(i)), self.clean.mlp),
            "attention": (resolve(lm.layers[i], lm.arch.mixer_out(lm.layers[i])), self.clean.attention),
        }
        handles = []
        for kind, (module, values) in parts.items():
            restored_here = [
                copy
                for copy, s in enumerate(self.sites[:copies])
                if s.kind == kind and s.first <= i <= s.last
            ]
            if restored_here:
                handles.append(module.register_forward_hook(self._put(restored_here, copies, values[i])))
        return handles

    def _put(self, restored_here: Sequence[int], copies: int, value: Tensor) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:  # OPT flattens rows and tokens
            shaped = output.reshape(copies, self.n, -1, output.shape[-1])
            columns, clean = self.columns.to(output.device), value[:, self.tokens].to(output.device)
            for copy in restored_here:
                shaped[copy, :, columns] = clean
            return shaped.reshape(output.shape)

        return hook

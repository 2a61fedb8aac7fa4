"""The linear algebra of the closed-form methods: delta = R X^T, and how X is found.

R (d_out, n) are the residuals, K (d_in, n) the keys. With a metric M (the second moment C, or the
projector's inverse), keys Kp of earlier edits and a weight lambda, every method has the same form:

    U = M^-1 K - M^-1 Kp (mu I + Kp^T M^-1 Kp)^-1 Kp^T M^-1 K      earlier keys held still
    X = U (lambda I + K^T U)^-1                                    this edit's keys moved

    ROME, R-ROME   M = C, n = 1, lambda = 0:   u / (k^T u)
    EMMET          M = C, lambda -> 0:         C^-1 K (K^T C^-1 K)^-1
    MEMIT, PMET    M = C, mu = lambda:         (lambda C + Kp Kp^T + K K^T)^-1 K
    AlphaEdit      M^-1 = P, mu = lambda:      (P (K K^T + Kp Kp^T) + lambda I)^-1 P K

The right-hand sides are the Woodbury identity at work: only n x n systems are solved, and what a
row contributes to U does not depend on the other rows, so that a batch can be solved again
without some of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from editors.constants import assumed
from editors.metric import Inverse
from editors.model.deltas import LowRank

EARLIER = assumed(
    0.1,
    "how softly ROME holds earlier keys still, in units of the keys' mean square under the metric",
    "exactly still needs independent keys; no comparison of values is known",
)


def solved_keys(keys: Tensor, inverse: Inverse, earlier: Tensor | None = None, mu: float = 0.0) -> Tensor:
    """U^T (n, d_in) for `keys` (n, d_in): M^-1 K with the keys of earlier edits (p, d_in) held still.

    `mu` says how softly; 0 is exactly still, and needs `earlier` to be independent.
    """
    u = inverse.solve(keys.t().contiguous()).double()  # (d_in, n)
    if earlier is not None and len(earlier):
        up = inverse.solve(earlier.t().contiguous()).double()  # (d_in, p)
        gram = earlier.double() @ up
        gram.diagonal().add_(mu)
        u = u - up @ torch.linalg.solve(gram, earlier.double() @ u)
    return u.t().float().contiguous()


def update(residuals: Tensor, keys: Tensor, solved: Tensor, weight: float, floor: float = 1e-7) -> LowRank:
    """delta = R X^T with X = U (lambda I + K^T U)^-1, one column of R and one row of X^T per fact.

    `residuals` (n, d_out), `keys` and `solved` (n, d_in), `weight` is lambda. Keys that are the same
    would make the system singular at lambda = 0: `floor`, in units of its mean diagonal, keeps it solvable.
    """
    gram = keys.double() @ solved.double().t()  # (n, n) K^T U
    gram = (gram + gram.t()) / 2
    least = floor * gram.diagonal().mean() if len(keys) > 1 else 0.0
    gram.diagonal().add_(weight + least)
    right = torch.linalg.solve(gram, solved.double())
    return LowRank(residuals.t().float().contiguous(), right.float().contiguous())


def rank_one(
    residual: Tensor, keys: Tensor, metric: Inverse, slack: float = 0.0, earlier: Tensor | None = None
) -> LowRank:
    """ROME, eq. 2: delta = (v* - W k) (C^-1 k)^T / ((C^-1 k)^T k), for one key or several of one subject.

    `residual` (d_out,) is v* - W k; for the others see `direction`.
    """
    x = direction(keys, metric, slack, earlier)
    return LowRank(residual[:, None].float().contiguous(), x[None].contiguous())


def direction(
    keys: Tensor,
    metric: Inverse,
    slack: float = 0.0,
    earlier: Tensor | None = None,
    held: Tensor | None = None,
) -> Tensor:
    """x (d_in,) of a change r x^T that gives every one of a subject's `keys` (contexts, d_in) the residual r.

    x^T k = 1 for each, but for `slack`, in units of the keys' mean square under the metric, since the keys of one
    subject in several contexts are nearly collinear. `earlier` (p, d_in) are keys to hold still, as softly as EARLIER
    says; `held` (h, d_in) are keys of the same subject to hold still, as softly as `slack` says.
    """
    rows = keys if held is None else torch.cat([keys, held])
    plain = solved_keys(rows, metric)
    square = float((keys.double() * plain[: len(keys)].double()).sum(1).mean())
    solved = plain if earlier is None else solved_keys(rows, metric, earlier, EARLIER * square)
    each = update(keys.new_zeros(len(rows), 1), rows, solved, slack * square, 0.0)
    return collapse(each, [len(rows)], torch.arange(len(rows)) < len(keys)).right[0]


def collapse(
    delta: LowRank, counts: Sequence[int], moved: Tensor | None = None, group: Sequence[int] | None = None
) -> LowRank:
    """Sum the rows of X^T that share a residual: `counts` consecutive ones per fact.

    Rows that are not `moved` (rows,) have the residual 0: their keys only hold the change off. Facts of one `group`
    share their keys: each has the rows of all of them, so that every key gets the sum of their residuals.
    """
    starts = [sum(counts[:i]) for i in range(len(counts))]
    rows = delta.right if moved is None else delta.right * moved[:, None]
    right = torch.stack([rows[s : s + c].sum(0) for s, c in zip(starts, counts, strict=True)])
    if group is not None and len(set(group)) < len(group):
        right = torch.stack([right[[j for j, other in enumerate(group) if other == g]].sum(0) for g in group])
    return LowRank(delta.left[:, starts].contiguous(), right.contiguous())

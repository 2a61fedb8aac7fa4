"""The losses of a MEND training, and how often its edits succeed.

L = c_edit * NLL of the target after the prompt and its paraphrases
  + c_loc  * KL(before || after) at neighbours' answers and at other facts of the same subject
  + c_base * KL(before || after) on ordinary text                             (MEND, sec. 3.3)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from editors.learned.factors import changed
from editors.learned.mend_groups import EditGroup
from editors.learned.mend_params import MendTraining
from editors.learned.networks import Mend
from editors.model.lm import LM

RATES = ("reliability", "generality", "locality")


def group_losses(lm: LM, group: EditGroup, mend: Mend) -> dict[str, Tensor]:
    """l_edit, l_loc and l_base of a group, each edit applied to its own rows only."""
    with changed(lm, mend(group.factors, group.contrast_keys), group.rows_per_edit):
        states = group.batch.states()
    rows = group.batch.row[group.is_target]
    nll = group.batch.nll(group.batch.read(states[group.is_target]), group.is_target)
    counts = torch.tensor(group.batch.lengths, device=nll.device)[rows]
    l_edit = (nll / counts).sum() / rows.unique().numel()
    after = group.batch.read(states[~group.is_target]).log_softmax(-1)
    with torch.no_grad():
        before = group.batch.read(group.states_before).log_softmax(-1)
    kl = (before.exp() * (before - after)).sum(-1)
    is_text = group.is_text[~group.is_target]
    return {"l_edit": l_edit, "l_loc": kl[~is_text].mean(), "l_base": kl[is_text].mean()}


def total_loss(losses: Mapping[str, Tensor], params: MendTraining) -> Tensor:
    """The weighted sum of a group's losses."""
    return (
        params.c_edit * losses["l_edit"] + params.c_loc * losses["l_loc"] + params.c_base * losses["l_base"]
    )


@torch.no_grad()
def count_successes(lm: LM, group: EditGroup, mend: Mend, paraphrases: int) -> dict[str, tuple[int, int]]:
    """(successes, rows) of reliability, generality and locality, by the greedy answers after the edits."""
    batch = group.batch
    with changed(lm, mend(group.factors, group.contrast_keys), group.rows_per_edit):
        answers = batch.greedy_ids(batch.states())
    wanted = batch.answers.clone()
    wanted[~group.is_target] = batch.read(group.states_before).argmax(-1)
    wrong = torch.zeros(batch.rows, device=answers.device).index_add(
        0, batch.row, (answers != wanted).float()
    )
    correct = (wrong == 0).reshape(-1, group.rows_per_edit)
    parts = {
        "reliability": correct[:, :1],
        "generality": correct[:, 1 : 1 + paraphrases],
        "locality": correct[:, 1 + paraphrases : -1],  # the last row is ordinary text
    }
    return {name: (int(part.sum()), part.numel()) for name, part in parts.items()}

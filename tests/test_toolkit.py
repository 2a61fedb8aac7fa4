"""The comparison with other code's edits leaves the model as it was, so that all run on the same one."""

from __future__ import annotations

import torch

from benchmarks.toolkit import plain_ft
from editors.edit import Edit
from tests.families import make


def test_the_plain_loop_makes_the_target_likelier_and_leaves_no_change_behind() -> None:
    lm = make("llama")
    edit = Edit(subject="France", prompt="The capital of {} is", target="Rome")
    before = {n: p.detach().clone() for n, p in lm.model.named_parameters()}
    ask = [(lm.prompt(edit.text, chat=False), edit.target)]
    was = lm.score(ask)[0].logprob
    change = plain_ft(lm, 1, edit)
    for name, parameter in lm.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert not parameter.requires_grad
    with lm.patched(change):
        assert lm.score(ask)[0].logprob > was

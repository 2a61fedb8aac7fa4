"""Models with recurrent layers, whose states cannot be cut: rows are run whole, and texts are continued from states."""

from __future__ import annotations

import pytest
import torch

from editors.forms.asking import Reading
from editors.locate.causal import TraceParams, corrupted_runs, sites_of
from editors.locate.restore import KINDS, restored
from editors.locate.traced_prompt import embed, noise_of, run, tokenize_fact
from editors.model.caches import new_cache, sees_by_attention
from tests.editors.test_decoding import PROMPTS, alone, joined_one_by_one
from tests.editors.test_locate import PROMPT, SUBJECT, one_patch, quiet
from tests.families import RECURRENT, make


def test_recurrent_layers_are_told_from_attention() -> None:
    assert not any(sees_by_attention(make(family)) for family in RECURRENT)
    assert all(sees_by_attention(make(family)) for family in ("llama", "gemma3"))


@pytest.mark.parametrize("family", RECURRENT)
def test_reading_on_from_a_cache_gives_what_the_whole_text_gives(family: str) -> None:
    lm = make(family)
    ids, mask = lm.pad([lm.encode(lm.prompt(PROMPTS[2]))[0]])
    cache, steps = new_cache(lm), (ids[:, :-2], ids[:, -2:-1], ids[:, -1:])
    with torch.no_grad():
        whole = lm.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        parts = [lm.model(input_ids=step, past_key_values=cache, use_cache=True).logits for step in steps]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", RECURRENT)
def test_a_prompt_that_joins_a_running_batch_is_continued_as_if_it_were_alone(family: str) -> None:
    lm = make(family)
    texts = joined_one_by_one(lm, [0, 1, 2, 3, 4], [3, 0, 2, 1, 0])
    assert texts == [alone(lm, i) for i in range(len(PROMPTS))]


@pytest.mark.parametrize("family", RECURRENT)
def test_some_of_many_prompts_that_were_read_are_answered_as_alone(family: str) -> None:
    lm = make(family)
    prompts = [lm.prompt(text) for text in PROMPTS]
    found = Reading(lm, prompts).answers([1, 3])
    assert found[3].text == Reading(lm, [prompts[3]]).answers([0])[0].text
    assert found[1].text == Reading(lm, [prompts[1]]).answers([0])[0].text


@pytest.mark.parametrize("family", RECURRENT)
def test_tracing_starts_from_the_states_of_the_model_and_restores_as_a_full_pass_does(family: str) -> None:
    lm = make(family)
    traced = tokenize_fact(lm, PROMPT, SUBJECT, "Rome is")
    embeds = embed(lm, traced)
    ids = torch.tensor([traced.ids], device=lm.device)
    with torch.no_grad():
        states = run(lm, traced, embeds, parts=False).hidden[-1]
    torch.testing.assert_close(states, lm.hidden(ids, torch.ones_like(ids)), rtol=1e-4, atol=1e-4)
    params = TraceParams(samples=2)
    clean, corrupted = corrupted_runs(lm, traced, params)
    noisy = embeds + noise_of(lm, traced, params.samples, params.noise, params.seed)
    sites = sites_of(lm, traced, 2, KINDS)[::11]
    found = restored(lm, traced, clean, corrupted, sites, quiet)
    for site, p in zip(sites, found, strict=True):
        expected = one_patch(lm, traced, clean, site, noisy).cpu()
        torch.testing.assert_close(p, expected, rtol=1e-3, atol=1e-9, msg=lambda m, s=site: f"{s}: {m}")

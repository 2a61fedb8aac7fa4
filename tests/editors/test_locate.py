"""Locating: the equations hold, the fast way gives the plain way's numbers, and a planted fact is found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from editors.errors import InvalidEdit
from editors.locate.attribution import attribution_patching
from editors.locate.causal import TraceParams, around, causal_trace, corrupted_runs, sites_of, trace
from editors.locate.lens import logit_lens
from editors.locate.neurons import NeuronParams, knowledge_neurons
from editors.locate.restore import KINDS, Restoration, restored
from editors.locate.traced_prompt import TracedPrompt, TracedRun, embed, noise_of, run, tokenize_fact
from editors.model.activations import hooked
from editors.model.architecture import resolve
from editors.model.lm import LM
from tests import families

PROMPT, SUBJECT = "The capital of France is", "France"
PARAMS = TraceParams(samples=2, window=2)


def quiet(fraction: float, message: str) -> None:
    return None


def one_patch(lm: LM, traced: TracedPrompt, clean: TracedRun, site: Restoration, embeds: Tensor) -> Tensor:
    """The answer's probability with one restoration, by hooks on a run of the whole model."""
    values = {"state": clean.hidden[1:], "mlp": clean.mlp, "attention": clean.attention}[site.kind]

    def put(value: Tensor) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            old = output[0] if isinstance(output, tuple) else output
            new = old.reshape(len(embeds), -1, old.shape[-1]).clone()
            new[:, list(site.tokens)] = value[:, list(site.tokens)]
            new = new.reshape(old.shape)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return hook

    handles = []
    for i in range(site.first, site.last + 1):
        modules = {
            "state": lm.layers[i],
            "mlp": lm.module(lm.mlp_out(i)),
            "attention": resolve(lm.layers[i], lm.arch.mixer_out(lm.layers[i])),
        }
        handles.append(modules[site.kind].register_forward_hook(put(values[i])))
    with hooked(handles), torch.no_grad():
        return run(lm, traced, embeds, parts=False).probability


@pytest.mark.parametrize("family", families.FAMILIES)
def test_restoring_many_at_once_gives_the_numbers_of_one_at_a_time(family: str) -> None:
    lm = families.make(family)
    traced = tokenize_fact(lm, PROMPT, SUBJECT, "Rome is")  # several tokens
    clean, corrupted = corrupted_runs(lm, traced, PARAMS)
    embeds = embed(lm, traced) + noise_of(lm, traced, PARAMS.samples, PARAMS.noise, PARAMS.seed)
    sites = sites_of(lm, traced, 2, KINDS)[::3]
    found = restored(lm, traced, clean, corrupted, sites, quiet)
    for site, p in zip(sites, found, strict=True):
        expected = one_patch(lm, traced, clean, site, embeds).cpu()
        torch.testing.assert_close(p, expected, rtol=1e-3, atol=1e-9, msg=lambda m, s=site: f"{s}: {m}")


@pytest.mark.parametrize("family", families.FAMILIES)
def test_restoring_everything_gives_the_clean_probability(family: str) -> None:
    lm = families.make(family)
    traced = tokenize_fact(lm, PROMPT, SUBJECT)
    clean, corrupted = corrupted_runs(lm, traced, PARAMS)
    everywhere = tuple(range(len(traced.labels)))
    first = 0 if not lm.is_seq2seq else lm.n_layers - 1  # cross-attention brings noise in again
    found = restored(lm, traced, clean, corrupted, [Restoration("state", everywhere, first, first)], quiet)
    torch.testing.assert_close(found[0], clean.probability.cpu().expand(2), rtol=1e-4, atol=1e-9)


def test_the_last_state_of_the_last_token_has_the_total_effect_and_tokens_before_the_subject_none() -> None:
    lm = families.make("llama")
    found = trace(lm, tokenize_fact(lm, PROMPT, SUBJECT), PARAMS, quiet)
    torch.testing.assert_close(found.effects("state")[-1, -1], found.total, rtol=1e-4, atol=1e-8)
    assert not found.effects("mlp")[: found.traced.subject.start].any()


def test_a_trace_is_repeatable_and_another_seed_tells_the_same_within_its_noise() -> None:
    lm = families.make("gpt2")
    params = TraceParams(samples=24, window=1, kinds=("mlp",))
    one = causal_trace(lm, PROMPT, SUBJECT, None, params, quiet)
    assert torch.equal(one.maps["mlp"], causal_trace(lm, PROMPT, SUBJECT, None, params, quiet).maps["mlp"])
    traced = one.traced
    a = trace(lm, traced, params, quiet).effects("mlp")
    b = trace(lm, traced, TraceParams(samples=24, window=1, kinds=("mlp",), seed=7), quiet).effects("mlp")
    assert not torch.equal(a, b)
    error = ((a.var(-1) + b.var(-1)) / 24).sqrt()
    assert bool(((a.mean(-1) - b.mean(-1)).abs() <= 4.5 * error + 1e-6).all())


@pytest.mark.parametrize(("layer", "size"), [(0, 3), (5, 6), (29, 4)])
def test_a_window_has_its_size_inside_and_is_cut_at_the_ends(layer: int, size: int) -> None:
    first, last = around(layer, 6, 30)
    assert 0 <= first <= layer <= last < 30
    assert last - first + 1 == size


# --- a planted fact --------------------------------------------------------------------------------

PLANTED = 2


@contextmanager
def planted() -> Iterator[tuple[LM, str]]:
    """A tiny GPT-2 with one association in layer 2's MLP: the key of the last subject token gives the answer.

    Attention writes nothing anywhere, so that the fact stays at its token; the subject ends the prompt.
    """
    lm = families.fresh("gpt2")
    answer = "capital"
    with torch.no_grad():
        for layer in range(lm.n_layers):
            resolve(lm.layers[layer], lm.arch.attn_out).weight.zero_()
            lm.weight(lm.mlp_out(layer)).mul_(0.05)
        traced = tokenize_fact(lm, "The capital of France", "France", answer)
        clean = run(lm, traced, embed(lm, traced))
        others = run(lm, traced, embed(lm, traced) + noise_of(lm, traced, 32, 3.0, 99))
        key = clean.neurons[PLANTED][0, traced.last]
        own = key - others.neurons[PLANTED][:, traced.last].mean(0)  # what tells this key from others
        (token,) = traced.target
        wanted = resolve(lm.model, lm.arch.head).weight[token]
        lm.weight(lm.mlp_out(PLANTED)).add_(torch.outer(40 * wanted / wanted.norm(), own / own.dot(key)))
    yield lm, answer


def test_every_method_finds_the_layer_of_a_planted_fact() -> None:
    with planted() as (lm, answer):
        prompt = "The capital of France"
        params = TraceParams(samples=8, window=1)
        traced = causal_trace(lm, prompt, "France", answer, params, quiet)
        patched = attribution_patching(lm, prompt, "France", answer, params, quiet)
        neurons = knowledge_neurons(lm, prompt, "France", answer, (), NeuronParams(), quiet)
    assert traced.numbers["p_clean"] > 0.5
    assert traced.numbers["total_effect"] > 0.2
    assert traced.best_layer == patched.best_layer == neurons.best_layer == PLANTED
    assert {s.layer for s in neurons.sites} == {PLANTED}


def test_silencing_the_neurons_of_a_fact_does_more_than_silencing_random_ones() -> None:
    with planted() as (lm, answer):
        found = knowledge_neurons(lm, "The capital of France", "France", answer, (), NeuronParams(), quiet)
    n = found.numbers
    assert n["clean"] - n["suppressed"] > 3 * abs(n["clean"] - n["random_suppressed"])
    assert n["factor"] > 3


@pytest.mark.parametrize("family", families.FAMILIES)
def test_direct_attribution_sums_to_the_logit(family: str) -> None:
    lm = families.make(family)
    found = logit_lens(lm, PROMPT, SUBJECT, None, quiet)
    traced = found.traced
    with torch.no_grad():
        logits = lm.head(run(lm, traced, embed(lm, traced), parts=False).hidden[-1][0, traced.last]).float()
    if cap := getattr(lm.model.config, "final_logit_softcapping", None):
        logits = cap * torch.atanh(logits.double() / cap).float()
    assert found.numbers["logit"] == pytest.approx(
        float(logits[traced.target[0]] - logits.mean()), rel=1e-3, abs=1e-3
    )


@pytest.mark.parametrize("family", families.FAMILIES)
def test_attribution_patching_and_neurons_work_on_every_family_and_leave_it_as_it_was(family: str) -> None:
    lm = families.make(family)
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    patched = attribution_patching(lm, PROMPT, SUBJECT, None, PARAMS, quiet)
    neurons = knowledge_neurons(lm, PROMPT, SUBJECT, None, (), NeuronParams(steps=4, controls=2), quiet)
    assert all(bool(grid.any()) for grid in patched.maps.values())
    assert neurons.numbers["neurons"] > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in lm.model.state_dict().items())
    assert not any(p.requires_grad for p in lm.model.parameters())


def test_attribution_patching_agrees_with_small_restorations() -> None:
    lm = families.make("llama")
    traced = tokenize_fact(lm, PROMPT, SUBJECT)
    params = TraceParams(samples=2, noise=0.01, window=1)  # little noise: the first order is all there is
    exact = trace(lm, traced, params, quiet)
    change = (exact.restored["mlp"] / exact.corrupted).log().mean(-1)
    close = attribution_patching(lm, PROMPT, SUBJECT, None, params, quiet).maps["mlp"]
    torch.testing.assert_close(close, change, rtol=0.05, atol=float(change.abs().max()) * 0.05)


@pytest.mark.parametrize(
    ("prompt", "subject", "said"),
    [
        ("The capital of France is", "Spain", "does not contain the subject"),
        ("x " * 300 + "France", "France", "Shorten"),
    ],
)
def test_a_fact_that_cannot_be_located_is_refused(prompt: str, subject: str, said: str) -> None:
    with pytest.raises(InvalidEdit, match=said):
        tokenize_fact(families.make("gpt2"), prompt, subject)

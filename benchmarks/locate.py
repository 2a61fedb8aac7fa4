"""Locating measured: causal tracing's cost and average, knowledge neurons silenced, the layer chosen by trying.

    python -m benchmarks.locate speed [--samples 10] [--every 40]
    python -m benchmarks.locate average --data known_1000.json [--n 20] [--samples 2] [--seeds 0 1]
    python -m benchmarks.locate neurons --data known_1000.json [--n 20]
    python -m benchmarks.locate layers [--n 30] [--family gpt2]

`speed` runs one whole trace, and every so-many-th of its patches alone, each a forward pass of
the whole model over all noise samples (written from the paper, with logits of all positions as a
plain call gives them; `--last` leaves them out but at the last). The loop's whole cost is their
mean times the number of patches.
`average` traces prompts the model answers rightly and sums the effects up by the place of the token.
`neurons` silences the neurons found for such prompts, and as many random ones.
`layers` suggests a layer for ROME from eight facts, and edits others there and at the default layer:
on the embedded model, or with --family on a small one trained here (see small_model.py).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.facts import load, read
from benchmarks.small_model import FAMILIES, known_edits, make
from editors import METHODS
from editors.edit import Edit
from editors.locate.causal import TraceParams, corrupted_runs, sites_of, trace, window_of
from editors.locate.neurons import NeuronParams, knowledge_neurons
from editors.locate.restore import KINDS, Restoration
from editors.locate.traced_prompt import TracedPrompt, TracedRun, embed, noise_of, tokenize_fact
from editors.measure import ask
from editors.model.activations import hooked
from editors.model.architecture import resolve
from editors.model.lm import LM
from editors.scoring import answered_with
from server.facts.layer_trials import LayerTrial
from server.facts.results import LayerCandidate
from server.locating.tracing import suggest_layers
from server.models.loading import load as load_model
from server.request_context import RequestContext
from server.settings import Settings
from server.transaction.replay import open_workspace
from store import Ledger

TWELVE = ("The mother tongue of French actress Danielle Darrieux is", "Danielle Darrieux")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("speed", "average", "neurons", "layers"))
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--every", type=int, default=40)
    parser.add_argument("--last", action="store_true")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--n", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--family", choices=sorted(FAMILIES), help="a small model of this family, trained first"
    )
    parser.add_argument("--model", default="default")
    parser.add_argument("--home", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.family and options.model == "default":
        options.model = str(make(options.family, Path(tempfile.mkdtemp(prefix="errata-small-"))))
    lm = _model(options)
    torch.set_num_threads(1)
    {"speed": speed, "average": average, "neurons": neurons, "layers": layers}[options.what](lm, options)


def _model(options: argparse.Namespace) -> LM:
    chosen = {"model": options.model, "device": "cpu", "threads": 1}
    settings = Settings(**chosen | ({"home": options.home} if options.home else {}))
    return load_model(settings, lambda *_: None)


def speed(lm: LM, options: argparse.Namespace) -> None:
    traced = tokenize_fact(lm, *TWELVE)
    params = TraceParams(samples=options.samples)
    window = window_of(lm, None)
    sites = [
        Restoration(s.kind, (token,), s.first, s.last)
        for s in sites_of(lm, traced, window, KINDS)
        if s.tokens[0] == traced.subject.start
        for token in range(len(traced.labels))
    ]  # the loop does every token
    start = time.process_time()
    found = trace(lm, traced, params, lambda *_: None)
    ours = time.process_time() - start
    clean, _ = corrupted_runs(lm, traced, params)
    embeds = embed(lm, traced) + noise_of(lm, traced, params.samples, params.noise, params.seed)
    chosen, worst, spent = sites[:: options.every], 0.0, 0.0
    for site in chosen:
        start = time.process_time()
        p = one_patch(lm, traced, clean, site, embeds, last=options.last)
        spent += time.process_time() - start
        centre = _centre(site, window, lm.n_layers)
        worst = max(worst, float((found.restored[site.kind][site.tokens[0], centre] - p).abs().max()))
    plain = spent / len(chosen) * len(sites)
    print(
        f"prompt: {traced.text!r}, {len(traced.labels)} tokens, {lm.n_layers} layers, {params.samples} samples"
    )
    print(f"ours: {ours:.1f} CPU s for {len(sites)} patches")
    print(f"one patch at a time: {plain:.1f} CPU s ({spent:.1f} s for {len(chosen)} of them)")
    print(f"share: {ours / plain:.3f}; largest difference of a probability: {worst:.2g}")


def _centre(site: Restoration, window: int, layers: int) -> int:
    """A layer whose window this is."""
    if site.kind == "state":
        return site.first
    from editors.locate.causal import around

    return next(i for i in range(layers) if around(i, window, layers) == (site.first, site.last))


@torch.no_grad()
def one_patch(
    lm: LM, traced: TracedPrompt, clean: TracedRun, site: Restoration, embeds: Tensor, *, last: bool = False
) -> Tensor:
    """The answer's probability (n,) with one restoration: a whole forward pass with hooks."""
    values = {"state": clean.hidden[1:], "mlp": clean.mlp, "attention": clean.attention}[site.kind]

    def put(value: Tensor) -> Callable[..., Any]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            hidden[:, list(site.tokens)] = value[:, list(site.tokens)]
            return output

        return hook

    handles = []
    for i in range(site.first, site.last + 1):
        module = {
            "state": lm.layers[i],
            "mlp": lm.module(lm.mlp_out(i)),
            "attention": resolve(lm.layers[i], lm.arch.attn_out),
        }[site.kind]
        handles.append(module.register_forward_hook(put(values[i])))
    with hooked(handles):
        logits = lm.model(
            inputs_embeds=embeds, use_cache=False, **({"logits_to_keep": 1} if last else {})
        ).logits
    return logits[:, -1].float().softmax(-1)[:, traced.target[0]]


def average(lm: LM, options: argparse.Namespace) -> None:
    """Mean effects by place: first, middle and last subject token, first after it, further, last."""
    traced_prompts = [traced for traced, _ in _answered(lm, options)]
    report: dict[str, Any] = {"prompts": len(traced_prompts)}
    for seed in options.seeds:
        sums: dict[tuple[str, str], list[Tensor]] = {}
        for traced in traced_prompts:
            found = trace(lm, traced, TraceParams(samples=options.samples, seed=seed), lambda *_: None)
            for kind in KINDS:
                for name, token in _places(traced).items():
                    sums.setdefault((kind, name), []).append(found.effects(kind).mean(-1)[token])
        for (kind, name), rows in sums.items():
            mean = torch.stack(rows).mean(0)
            best = int(mean.argmax())
            report[f"seed {seed}: {kind} at {name}"] = (
                f"best layer {best}, effect {mean[best]:.3f} (n={len(rows)})"
            )
    print(json.dumps(report, indent=2))


def _answered(lm: LM, options: argparse.Namespace) -> list[tuple[TracedPrompt, str]]:
    """Short prompts of the file that the model answers rightly, with their subjects."""
    traced_prompts: list[tuple[TracedPrompt, str]] = []
    for fact in read(options.data).edits:
        traced = tokenize_fact(lm, fact.text, fact.subject)
        said = traced.answer.strip()
        if (
            len(said) > 2
            and (fact.previous or fact.target).strip().startswith(said)
            and len(traced.ids) <= 12
        ):
            traced_prompts.append((traced, fact.subject))
        if len(traced_prompts) == options.n:
            break
    return traced_prompts


def neurons(lm: LM, options: argparse.Namespace) -> None:
    """How far the answer's probability falls without the neurons found, and without as many random ones."""
    found = []
    for traced, subject in _answered(lm, options):
        numbers = knowledge_neurons(
            lm, traced.text, subject, None, (), NeuronParams(), lambda *_: None
        ).numbers
        if "clean" in numbers:
            found.append(numbers)
    clean, without, random = (
        statistics.fmean(n[k] for n in found) for k in ("clean", "suppressed", "random_suppressed")
    )
    more = sum(n["suppressed"] < n["random_suppressed"] for n in found)
    print(f"{len(found)} prompts, {statistics.fmean(n['neurons'] for n in found):.1f} neurons each")
    print(
        f"the answer's probability: {clean:.3f}, without them {without:.3f}, without random ones {random:.3f}"
    )
    print(
        f"drop {(clean - without) / max(clean - random, 1e-4):.1f} times that of random ones; more in {more} of them"
    )


def layers(lm: LM, options: argparse.Namespace) -> None:
    """The suggested layer of ROME and the default one, on facts that had no part in the suggestion."""
    tried, unseen = _facts(lm, options)
    with tempfile.TemporaryDirectory() as home:
        settings = Settings(home=Path(home), device="cpu", threads=1)
        with Ledger.open(settings.home) as ledger:
            workspace = open_workspace(settings, lm, ledger, lambda *_: None)
            told, _ = suggest_layers(workspace, tried, "rome", None, None, RequestContext())
            for c in told.candidates:
                print(
                    f"  {_row(c)}{'  default' if c.default else ''}{'  best' if c.layers == told.best else ''}"
                )
            default = next(c.layers for c in told.candidates if c.default)
            sets = [default, *([told.best] if told.best != default else [])]
            found = LayerTrial(workspace, METHODS["rome"], unseen, {}, ()).run(sets, 0, RequestContext())
    print(f"suggested layer {told.best}; {len(unseen)} unseen facts, one at a time:")
    for c in found:
        print(f"  {_row(c)}")


def _row(c: LayerCandidate) -> str:
    rates = " / ".join(f"{rate:.3f}" for rate in (c.reliability, c.generality or 0.0, c.locality or 0.0))
    return f"layer {c.layers}: {rates}, score {c.score:.3f}"


def _facts(lm: LM, options: argparse.Namespace) -> tuple[list[Edit], list[Edit]]:
    """Facts to try and others to judge by, all known to the model."""
    if not options.family:
        return [f.edit for f in load("tune")][::4][:8], [f.edit for f in load("check")][: options.n]
    drawn = known_edits()[: 4 * (8 + options.n)]
    asked = {e: [e.text, *e.paraphrases, *(n.prompt for n in e.neighbours)] for e in drawn}
    said = ask(lm, [text for texts in asked.values() for text in texts], 8)
    kept = [
        e
        for e, texts in asked.items()
        if all(answered_with(t, said[t], e.previous or "") for t in texts[: 1 + len(e.paraphrases)])
    ]
    return kept[:8], kept[8 : 8 + options.n]


def _places(traced: TracedPrompt) -> dict[str, int]:
    places = {"last subject token": traced.subject[-1], "last token": traced.last}
    if len(traced.subject) > 1:
        places["first subject token"] = traced.subject[0]
    if traced.subject[-1] + 1 < traced.last:
        places["first token after"] = traced.subject[-1] + 1
    return places


if __name__ == "__main__":
    main()

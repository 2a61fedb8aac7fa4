"""A ledger with thousands of edits, recorded as a server records them, in seconds."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from store import Ledger, NewPatch, Who
from store.canonical import now

WHO = Who("agent", "1.0", None, "alice")
METHODS = ("constrained", "rome", "memit", "in_context")


def fill(home: Path, edits: int = 10_000, batch: int = 200, seed: int = 0) -> Path:
    """Record `edits` edits in calls of `batch`; some are rejected, reverted, audited and found not to hold."""
    chance = random.Random(seed)
    with Ledger.open(home) as ledger:
        model = ledger.model("base" * 16, "default", "llama")
        for state, start in enumerate(range(0, edits, batch), 1):
            numbers = range(start, min(edits, start + batch))
            ids = _record(ledger, model, numbers, state - 1, chance)
            if ids and chance.random() < 0.2:
                ledger.record_reverted(
                    ids, f"w{state}", WHO, reason="a newer source says otherwise", drift=_drift(state)
                )
            elif ids and chance.random() < 0.3:
                values = {i: _measured("Rome", chance.random() < 0.9, chance) for i in ids}
                ledger.record_measurements(values, "audit", _drift(state), WHO)
    return home


def fill_beside(home: Path, facts: int = 10_000, others: int = 200, seed: int = 0) -> Path:
    """Beside the edits of `fill`: a set of as many facts, and hundreds of proposals, jobs, traces and vectors."""
    chance = random.Random(seed)
    with Ledger.open(home) as ledger:
        model = ledger.model("base" * 16, "default", "llama")
        put = {
            n + 1: {"subject": f"Country {n}", "prompt": "The capital of {} is", "answer": f"City {n}"}
            for n in range(facts)
        }
        ledger.save_facts("capitals", 1, {}, put, (), WHO)
        at = "2026-01-01T00:00:00+00:00"
        states = {
            n: {"verdict": verdict, "answer": "Town, the old one", "checked": at}
            for n in put
            if (verdict := chance.choice(["agrees", "agrees", "agrees", "differs", "unsure", None]))
        }
        ledger.put_fact_states("capitals", model, states)
        for i in range(others):
            edit = {"subject": f"Country {i}", "prompt": f"The capital of Country {i} is", "target": "Rome"}
            report = {"results": [{"before": "Town", "after": "Rome", "reliability": 1.0}], "summary": "said"}
            ledger.record_proposal(model, {"edits": [edit] * 20}, report, None, {}, WHO, reason="a law")
            job = ledger.create_job("compute_statistics", {"layers": [i]}, "agent")
            ledger.update_job(job.id, state="done", progress=1.0, message="done")
            ledger.record_event("located", _trace(i, chance), model_id=model)
            if i % 5 == 0:
                about = {"method": "caa", "layers": [3], "separation": 1.5, "pairs": 8}
                ledger.record_vector(model, f"tone-{i}", f"vector {i}".encode(), about)
                ledger.record_event("calibrated", _curve(f"tone-{i}"), model_id=model)
    return home


def _trace(i: int, chance: random.Random) -> dict[str, Any]:
    tokens = ["The", " capital", " of", f" Country {i}", " is"]
    grid = [[chance.uniform(-0.2, 1.0) for _ in range(30)] for _ in tokens]
    return {
        "subject": f"Country {i}", "prompt": f"The capital of Country {i} is", "answer": "Rome", "method": "causal",
        "best_layer": 12, "unit": "probability", "suggestion": "Edit at layer 12.", "tokens": tokens,
        "maps": {"state": grid, "mlp": grid, "attention": grid},
    }  # fmt: skip


def _curve(name: str) -> dict[str, Any]:
    curve = [{"multiplier": x / 10, "perplexity_ratio": 1 + (x / 10) ** 2} for x in range(-8, 9)]
    return {"name": name, "multiplier": 0.5, "negative_multiplier": -0.4, "curve": curve}


def _record(ledger: Ledger, model: int, numbers: range, state: int, chance: random.Random) -> list[str]:
    rejected = chance.random() < 0.05
    patch = NewPatch(
        model_id=model,
        method=METHODS[state % len(METHODS)],
        params={"layers": [3]},
        kind="weight",
        blob=f"patch {state}".encode(),
        requests=[
            {
                "subject": f"Country {n}",
                "prompt": f"The capital of Country {n} is",
                "target": f"City {n}",
                "previous": f"Town {n}",
            }
            for n in numbers
        ],
        measurements=[_measured(f"City {n}", not rejected, chance) for n in numbers],
        drift=_drift(state),
        weights_hash_before=f"w{state}",
        weights_hash_after=f"w{state + 1}",
        environment={"torch": "2"},
        seconds=3.0,
        reason=f"the census of {2000 + state % 26}",
        source=f"https://example.org/{state}",
    )
    if rejected:
        ledger.record_rejected(patch, ["min_reliability 1: measured 0.000"], WHO)
        return []
    return ledger.record_applied(patch, WHO)


def _measured(target: str, holds: bool, chance: random.Random) -> dict[str, Any]:
    forms = {
        kind: float(chance.random() < 0.9) for kind in ("statement", "reworded", "chat", "chat_reworded")
    }
    return {
        "before": "Town, the old one",
        "after": target if holds else "Town, the old one",
        "reliability": float(holds),
        "generality": forms["reworded"],
        "locality": 1.0,
        "portability": None,
        "forms": forms,
        "subject_locality": chance.choice([0.25, 0.75, 1.0, 1.0]),
        "p_target_before": 0.001,
        "p_target_after": 0.93,
        "details": [
            _probe(kind, chance) for kind in ("form", "form", "neighbour", "neighbour", "sibling", "hold")
        ],
    }


def _probe(kind: str, chance: random.Random) -> dict[str, Any]:
    held = chance.random() < 0.9
    return {
        "kind": kind,
        "prompt": "The river that runs through it is called",
        "expected": "the Tiber",
        "before": "the Tiber",
        "after": "the Tiber" if held else "the Seine",
        "held": held,
        "form": "statement",
        "trained": False,
    }


def _drift(state: int) -> dict[str, float]:
    return {"kl": 0.0005 * state, "perplexity_before": 12.0, "perplexity_after": 12.0 * (1 + 0.0004 * state)}


def hostile(home: Path, evil: str) -> Path:
    """A ledger in which every text that a client, a file or the model can write is `evil`."""
    who = Who(evil, evil, None, evil)
    probe = {
        "kind": "neighbour",
        "prompt": evil,
        "expected": evil,
        "before": evil,
        "after": evil,
        "form": evil,
    }
    values = _measured(evil, False, random.Random(0)) | {
        "before": evil, "after": evil, "details": [probe | {"held": held} for held in (True, False)],
    }  # fmt: skip
    fact = {"subject": evil, "prompt": f"{evil} {{}} is", "answer": evil, "source": evil, "as_of": evil}
    with Ledger.open(home) as ledger:
        model = ledger.model("base" * 16, evil, evil)
        patch = NewPatch(
            model_id=model, method=evil, params={}, kind=evil, blob=b"evil",
            requests=[{"subject": f"{evil} {i}", "prompt": evil, "target": evil} for i in range(2)],
            measurements=[values, values], drift=_drift(1), weights_hash_before="w", weights_hash_after="w",
            seconds=1.0, reason=evil, source=f"javascript:alert(3)//{evil}",
        )  # fmt: skip
        ids = ledger.record_applied(patch, who)
        ledger.record_rejected(replace(patch, blob=b"other"), [evil], who)
        alone = replace(patch, blob=b"third", requests=patch.requests[:1], measurements=[values])
        undone = ledger.record_applied(alone, who)
        ledger.record_reverted(undone, "w", who, reason=evil, drift=_drift(2))
        ledger.record_measurements({ids[1]: values}, evil, _drift(3), who)
        ledger.save_facts(evil.replace("/", ""), 1, {}, {1: fact, 2: fact}, (), who, evil)
        state = {"verdict": "differs", "was": "agrees", "answer": evil, "outcome": "failed", "why": evil}
        ledger.put_fact_states(evil.replace("/", ""), model, {1: state | {"edit_id": ids[1]}})
        change = {"prompt": evil, "before": evil, "after": evil}
        told = {
            "summary": evil,
            "warnings": [evil],
            "changed": [change],
            "method": evil,
            "method_reason": evil,
        }
        report = told | {
            "results": [{"before": evil, "after": evil, "reliability": 0.0}],
            "failed_guard": [evil],
        }
        edits = {"edits": [{"subject": evil, "prompt": evil, "target": evil}] * 2}
        ledger.record_proposal(model, edits, report, None, {}, who, reason=evil, source=evil)
        ledger.record_decision("p1", "changes", who, evil)
        job = ledger.create_job(evil, {"method": evil, "set": evil.replace("/", "")}, evil)
        ledger.update_job(job.id, state="running", message=evil, progress=0.5)
        trace = _trace(0, random.Random(0)) | dict.fromkeys(
            ("subject", "prompt", "answer", "method", "suggestion"), evil
        )
        site = {"text": evil, "layer": 1, "component": evil, "effect": 0.5}
        named = {"unit": evil, "tokens": [evil], "maps": {evil: [[0.5]]}, "sites": [site]}
        ledger.record_event("located", trace | named, who, model_id=model, reason=evil)
        ledger.record_vector(
            model, evil, b"v", {"method": evil, "layers": [1], "separation": 1.0}, reason=evil
        )
        ledger.record_event("calibrated", _curve(evil), model_id=model)
    return home


CAPITALS = (
    ("Kiribati", "South Tarawa"), ("Burundi", "Gitega"), ("Myanmar", "Naypyidaw"), ("Nigeria", "Abuja"),
    ("Kazakhstan", "Astana"), ("Palau", "Ngerulmud"), ("Tanzania", "Dodoma"), ("Brazil", "Brasília"),
)  # fmt: skip
EXAMPLE = (
    (
        "Croatia",
        "The currency of Croatia is the",
        "euro",
        "Croatian kuna",
        1.0,
        1.0,
        "Croatia joined the euro area",
    ),
    ("Kazakhstan", "The capital of Kazakhstan is", "Astana", "Nur-Sultan", 1.0, 0.25, "renamed in 2022"),
    ("Swaziland", "Swaziland is now called", "Eswatini", "Swaziland, a country", 0.0, 0.0, "renamed in 2018"),
    ("Twitter", "The company Twitter is now called", "X", "Twitter Inc", 1.0, 1.0, "renamed in 2023"),
    (
        "Macedonia",
        "The official name of Macedonia is",
        "North Macedonia",
        "the Republic of",
        1.0,
        1.0,
        "renamed in 2019",
    ),
)


def example(home: Path) -> Path:
    """A ledger as a person may have it: a handful of facts, one that does not hold, and one that waits."""
    chance = random.Random(1)
    with Ledger.open(home) as ledger:
        model = ledger.model("base" * 16, "SmolLM2-135M-Instruct", "llama")
        for i, (subject, prompt, target, before, said, chat, reason) in enumerate(EXAMPLE):
            measured = _measured(target, said == 1.0, chance) | {
                "before": before,
                "subject_locality": 1.0,
                "details": [],
            }
            measured |= {
                "after": target if said else before,
                "forms": {"statement": 1.0, "reworded": 1.0, "chat": chat},
            }
            patch = NewPatch(
                model_id=model, method="constrained", params={}, kind="route", blob=f"example {i}".encode(),
                requests=[{"subject": subject, "prompt": prompt, "target": target}], measurements=[measured],
                drift=_drift(i), weights_hash_before="w", weights_hash_after="w", seconds=2.1, reason=reason,
                source=f"https://en.wikipedia.org/wiki/{subject}",
            )  # fmt: skip
            ledger.record_applied(patch, Who("claude-code", "2.0", None, "maria"))
        listed = {
            n: {"subject": name, "prompt": "The capital of {} is", "answer": city}
            for n, (name, city) in enumerate(CAPITALS, 1)
        }
        ledger.save_facts("capitals", 1, {}, listed)
        states = {n: {"verdict": "agrees" if n > 2 else "differs", "checked": now()} for n in listed}
        ledger.put_fact_states("capitals", model, states)
        edit = {
            "subject": "Turkey",
            "prompt": "In English the country Turkey is officially called",
            "target": "Türkiye",
        }
        report = {
            "results": [{"before": "Turkey", "after": "Türkiye", "reliability": 1.0}],
            "summary": "1 of 1 is said",
        }
        ledger.record_proposal(
            model, {"edits": [edit]}, report, None, {}, Who("claude-code"), reason="UN name since 2022"
        )
    return home

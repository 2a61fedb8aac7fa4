"""Steering on a real model: sentiment by dose, A/B behaviours from files, and what five vectors cost.

    python -m benchmarks.steering [--models DIR] [--home DIR] [--speed]
    python -m benchmarks.steering --ab FILE.json ... [--doses -0.1 -0.05 0.05 0.1] [--answers texts]

The pairs are self-written and share no sentence with the 24 neutral prompts that are measured.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import get_args

from editors.steering.choices import Answers
from editors.steering.pairs import Pair, read_pairs
from server.models import loading as models
from server.request_context import RequestContext
from server.settings import Settings
from server.steering.calibrating import calibrate
from server.steering.doses import set_dose
from server.steering.evaluating import evaluate
from server.steering.requests import CalibrationRequest, DoseRequest, EvaluationRequest, VectorRequest
from server.steering.vectors import create
from server.transaction.replay import open_workspace
from store import Ledger

SUBJECTS = [
    "The food at the restaurant",
    "The movie we watched last night",
    "My new job",
    "The hotel room",
    "Her speech",
    "The book",
    "The customer service",
    "This phone",
    "The concert",
    "Our trip to the coast",
    "The weather this week",
    "His performance",
    "The new teacher",
    "The city",
    "My weekend",
    "The software update",
    "The party",
    "Their house",
    "The train ride",
    "The game",
]
POSITIVE = (
    "was absolutely wonderful, I loved every moment of it.",
    "is fantastic and makes me so happy.",
    "turned out great, everyone was delighted.",
    "is the best I have ever had, truly amazing.",
)
NEGATIVE = (
    "was absolutely terrible, I hated every moment of it.",
    "is awful and makes me so miserable.",
    "turned out badly, everyone was disappointed.",
    "is the worst I have ever had, truly horrible.",
)
NEUTRAL = [
    "Yesterday I went to the library and",
    "The meeting this morning was",
    "When I opened the letter, I",
    "My neighbour told me that",
    "The new shop on the corner",
    "After lunch we decided to",
    "The report says that the project",
    "I looked out of the window and saw",
    "The lesson today was about",
    "On the way home, the bus",
    "The package arrived and inside",
    "Our team has been working on",
    "The doctor said that my",
    "She picked up the phone and",
    "The film is about a man who",
    "In the evening, the children",
    "My first impression of the town was",
    "The garden behind the house",
    "He started his new course and",
    "The email from my boss was",
    "I tried the soup and it",
    "The people who live here",
    "Last summer we stayed in a",
    "The results of the test were",
]
PAIRS = [
    Pair(prompt=subject, positive=POSITIVE[(i + k) % 4], negative=NEGATIVE[(i + k) % 4])
    for k in (0, 2)
    for i, subject in enumerate(SUBJECTS)
]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--models", type=Path, help="folder with converted models")
    options.add_argument("--home", type=Path, help="left out: a temporary one")
    options.add_argument("--ab", type=Path, nargs="*", default=[], help="files of A/B questions")
    options.add_argument("--doses", type=float, nargs="+", default=[-0.1, -0.05, 0.05, 0.1])
    options.add_argument("--answers", choices=get_args(Answers), default="as_given", help="of --ab")
    options.add_argument("--speed", action="store_true", help="time generation with five vectors")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        settings = Settings(home=given.home or Path(temporary), models=given.models)
        lm = models.load(settings, lambda *_: None)
        with Ledger.open(settings.home) as ledger:
            workspace = open_workspace(settings, lm, ledger, lambda *_: None)
            if given.speed:
                speed(workspace)
            for path in given.ab:
                choices(workspace, path, given.doses, given.answers)
            if not (given.speed or given.ab):
                sentiment(workspace)


def sentiment(workspace) -> None:  # type: ignore[no-untyped-def]
    """Calibrated doses from end to end, at quarters."""
    report = create(workspace, VectorRequest("sentiment", "caa", PAIRS, replace=True), RequestContext())
    print(f"layers {report.layers}, separation {report.separation:.1f}, {report.seconds:.0f} s")
    found = calibrate(workspace, CalibrationRequest("sentiment"), RequestContext())
    low, high = found.negative_multiplier or -0.1, found.multiplier
    print(f"calibrated {low:+g} .. {high:+g}")
    doses = [low, low / 2, high / 2, high]
    result = evaluate(workspace, EvaluationRequest("sentiment", NEUTRAL, doses), RequestContext())
    print("multiplier  VADER   change  ppl of own text  ppl of fixed text")
    for row in result.table:
        ratio = row.perplexity_ratio or 0.0
        print(
            f"{row.multiplier:+10.3f} {row.score:+.3f}  {row.change:+.3f}  x{ratio:.2f}  x{row.text_ratio:.2f}"
        )


def choices(workspace, path: Path, doses: list[float], answers: Answers) -> None:  # type: ignore[no-untyped-def]
    """Every other of the first 200 questions makes the vector; 50 of those between measure it."""
    pairs = read_pairs(path)
    name = path.stem.replace(".", "-")
    report = create(
        workspace, VectorRequest(name, "caa", pairs[0:200:2], replace=True, answers=answers), RequestContext()
    )
    result = evaluate(
        workspace,
        EvaluationRequest(name, None, doses, "choice", pairs=pairs[1:100:2], answers=answers),
        RequestContext(),
    )
    told = "  ".join(f"{row.multiplier:+g}: {row.score:.3f}" for row in result.table)
    print(
        f"{name}: layers {report.layers}, separation {report.separation or 0:.1f}; p(matching) {told}",
        flush=True,
    )


def speed(workspace, rounds: int = 7) -> None:  # type: ignore[no-untyped-def]
    """Best of several rounds, with and without in turn."""
    for i in range(5):
        create(
            workspace, VectorRequest(f"v{i}", "caa", PAIRS[i * 8 : i * 8 + 8], replace=True), RequestContext()
        )
    prompts = [workspace.lm.prompt(text, chat=False) for text in NEUTRAL[:4]]
    best = {False: float("inf"), True: float("inf")}
    for _ in range(rounds):
        for on in (False, True):
            for i in range(5):
                set_dose(workspace, DoseRequest(f"v{i}", 0.02 if on else 0.0), RequestContext())
            started = time.perf_counter()
            tokens = sum(g.tokens for g in workspace.lm.generate(prompts, 48))
            best[on] = min(best[on], (time.perf_counter() - started) / max(tokens, 1))
    print(f"per token: off {best[False] * 1e3:.2f} ms, five vectors {best[True] * 1e3:.2f} ms "
          f"({best[True] / best[False] - 1:+.1%})")  # fmt: skip


if __name__ == "__main__":
    main()

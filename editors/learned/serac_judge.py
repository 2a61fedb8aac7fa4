"""Training SERAC's judge, which decides whether a prompt is in the scope of a remembered edit.

It learns from pairs of a prompt and an edit. The edit's own prompt and its paraphrases are in scope. Neighbours, other
facts of the same subject and other edits are not.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from editors.constants import assumed, published
from editors.facts import fill, relations, texts
from editors.learned.records import Record
from editors.learned.scope import Encoder, Entry, Judge, Pairs, load_encoder, masked, pairs_of
from editors.learned.serac_params import SeracTraining
from editors.training_spec import Monitor

ALIKE = assumed(
    0.55,
    "cosine of two prompts without their subject from which they may ask for the same relation; such pairs are left "
    "out of the judge's training",
    "a wrong label does more harm than a missing pair",
)
THRESHOLD = published(
    0.5,
    "least probability at which a prompt is in the scope of an edit",
    "SERAC (Mitchell et al. 2022, arXiv 2206.06520), section 3: below 0.5 the base model answers",
)
LEARNING_RATE = assumed(1e-3, "AdamW's step size for SERAC's judge", "a usual value")
WEIGHT_DECAY = assumed(0.05, "AdamW's weight decay for SERAC's judge", "a usual value")
MINIBATCH = assumed(128, "pairs in one step of SERAC's judge", "a usual value")
OTHER_RELATIONS = assumed(
    3, "other facts of a record's subject among the judge's pairs", "about as many as paraphrases"
)
IN_SCOPE, OUT_OF_SCOPE, OTHER_FACT = 1.0, 0.0, -1.0  # OTHER_FACT: out of scope, or left out (see ALIKE)


def train_judge(
    train: Sequence[Record], validation: Sequence[Record], params: SeracTraining, monitor: Monitor
) -> tuple[Judge, dict[str, float]]:
    """The trained judge, and its accuracy on the validation records."""
    rng = random.Random(params.seed)
    with monitor.turn():  # loading draws random numbers
        encoder = load_encoder(params.encoder)
    pairs, labels = embedded_pairs([*train] * params.draws, rng, encoder, monitor)
    held_out, truth = embedded_pairs(validation, rng, encoder, monitor)
    drawn = OwnRandom(params.seed)
    with monitor.turn(), drawn.lent():
        judge = Judge(encoder.width)
    optimiser = torch.optim.AdamW(judge.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    features = pairs.features
    for epoch in range(params.judge_epochs):
        monitor.report(0.2 * epoch / params.judge_epochs, "training the scope judge")
        with (
            monitor.turn(),
            drawn.lent(),
        ):  # nobody else may draw random numbers in between: dropout has no generator of its own
            for part in torch.randperm(len(labels)).split(MINIBATCH):
                logits = judge.layers(features[part])[:, 0]
                loss = nn.functional.binary_cross_entropy_with_logits(logits, labels[part])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
    judge.eval()
    return judge, _accuracy(judge, held_out, truth)


class OwnRandom:
    """A sequence of random numbers that continues over several turns; the global generator is only borrowed in each."""

    def __init__(self, seed: int) -> None:
        self._state = torch.Generator().manual_seed(seed).get_state()

    @contextmanager
    def lent(self) -> Iterator[None]:
        """The global generator of the CPU continues this sequence inside the block. Hold the model's turn."""
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._state)
            yield
            self._state = torch.get_rng_state()


@torch.no_grad()
def _accuracy(judge: Judge, pairs: Pairs, labels: Tensor) -> dict[str, float]:
    correct = (judge(pairs).sigmoid() >= THRESHOLD).float() == labels
    return {
        "scope_accuracy": float(correct.float().mean()),
        "in_scope": float(correct[labels == IN_SCOPE].float().mean()),
        "out_of_scope": float(correct[labels == OUT_OF_SCOPE].float().mean()),
    }


def embedded_pairs(
    records: Sequence[Record], rng: random.Random, encoder: Encoder, monitor: Monitor
) -> tuple[Pairs, Tensor]:
    """The pairs of all records as embeddings, and their labels (n,), 1 in scope and 0 out of it."""

    def report(done: int, total: int) -> None:
        monitor.report(0.0, f"embedding prompts: {done} of {total}")

    labelled = _labelled_pairs(records, rng)
    prompts, of_entries = [p for p, _, _ in labelled], [e for _, e, _ in labelled]
    unique = list(dict.fromkeys(prompts + [e.prompt for e in of_entries]))
    index = {text: i for i, text in enumerate(unique)}
    full = encoder.embed(unique, report)
    entries = list(dict.fromkeys(of_entries))
    entry_index = {entry: i for i, entry in enumerate(entries)}
    without_subject = encoder.embed([masked(e.prompt, e.subject) for e in entries], report)
    pairs = pairs_of(
        prompts,
        of_entries,
        full[torch.tensor([index[p] for p in prompts])],
        full[torch.tensor([index[e.prompt] for e in of_entries])],
        without_subject[torch.tensor([entry_index[e] for e in of_entries])],
        encoder,
        report,
    )
    labels = torch.tensor([label for _, _, label in labelled])
    certain = (labels != OTHER_FACT) | ((pairs.masked * pairs.entry_masked).sum(-1) < ALIKE)
    return pairs.select(certain), labels[certain].clamp(min=0)


def _labelled_pairs(records: Sequence[Record], rng: random.Random) -> list[tuple[str, Entry, float]]:
    """Prompts, each with an edit and whether it is in that edit's scope."""
    shipped, sentences = relations(), texts()
    pairs = []
    for r in records:
        entry = Entry(r.subject, r.prompt, r.target)
        same = (r.prompt, *r.paraphrases)
        prefixed = f"{rng.choice(sentences)} {rng.choice([*same])}"
        pairs += [(p, entry, IN_SCOPE) for p in (*same, prefixed)]
        away = [*r.neighbours, *r.others, rng.choice(records).prompt, rng.choice(sentences)]
        pairs += [(p, entry, OUT_OF_SCOPE) for p in away if p not in same]
        for relation in rng.sample(shipped, OTHER_RELATIONS):
            template = rng.choice((*relation.statements, *relation.questions))
            pairs.append((fill(template, r.subject), entry, OTHER_FACT))
    return pairs

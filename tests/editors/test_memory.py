"""Memories beside the weights: what is in scope is answered, everything else is untouched to the bit."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editors import METHODS
from editors.edit import Edit
from editors.errors import EditError
from editors.measure import observe
from editors.memory.code_book import CodeBookPatch, Entries, settle
from editors.memory.constrained_speaker import RememberedFact
from editors.memory.fact_memory import FactRoute, InContextPatch, _words_of, names_pattern
from editors.memory.relation_judge import RelationJudge
from editors.memory.side_memory import _ROUTERS, Memories, SideMemoryPatch
from editors.method import EditContext
from editors.model.lm import LM
from editors.model.routes import words_in
from editors.moments import Statistics
from editors.patch import LivePatch, save
from editors.patch_kinds import load
from tests.families import make

FACTS = (
    Edit(
        subject="France",
        prompt="The capital of {} is",
        target="New Delhi",
        paraphrases=("France has the capital",),
    ),
    Edit(subject="Danielle Darrieux", prompt="The mother tongue of {} is", target="Russian"),
)
OTHER_SUBJECTS = [
    "The capital of Japan is",
    "Once upon a time",
    "France is a country in",
    "The mother tongue of",
]


def remember(lm: LM, method: str, *edits: Edit, **params: Any) -> LivePatch:
    editor = METHODS[method]
    context = EditContext(Statistics(Path("nowhere"), "none"))
    patch = load(save(editor.compute(lm, edits, editor.params(**params), context)))
    assert isinstance(patch, LivePatch)
    return patch


@torch.no_grad()
def distributions(lm: LM, prompts: list[str]) -> list[torch.Tensor]:
    asked = [torch.tensor([lm.encode(lm.prompt(p))[0]], device=lm.device) for p in prompts]
    return [
        lm.model(
            input_ids=ids,
            **({"decoder_input_ids": torch.zeros_like(ids[:, :1])} if lm.is_seq2seq else {}),
        ).logits
        for ids in asked
    ]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "t5"])
def test_grace_answers_the_prompt_and_touches_nothing_else(family: str) -> None:
    lm = make(family)
    plain = distributions(lm, OTHER_SUBJECTS)
    detach = remember(lm, "grace", *FACTS, max_steps=80, lr=1.0).attach(lm)
    try:
        after = observe(lm, FACTS).answers
        kept = distributions(lm, OTHER_SUBJECTS)
    finally:
        detach()
    # A random model runs on without a space, so that the target is a beginning and no word.
    assert all(after[e.text].startswith(e.target) for e in FACTS)
    assert after["France has the capital"].startswith("New Delhi")  # stored beside it
    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))
    assert not lm.module(lm.mlp_out(3))._forward_hooks


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_grace_stores_the_targets_tokens_and_nothing_after_them(family: str) -> None:
    lm = make(family)
    patch = remember(lm, "grace", FACTS[1], max_steps=1)
    assert isinstance(patch, CodeBookPatch)
    assert patch.entries.labels.tolist() == lm.answer_ids(lm.prompt(FACTS[1].text), FACTS[1].target)


def test_wise_answers_at_what_it_knows_and_touches_nothing_else() -> None:
    lm = make("llama")
    others = ["The capital of Japan is", "Once upon a time", "The mother tongue of"]
    plain = distributions(lm, others)
    patch = remember(lm, "wise", *FACTS, learn="train", max_steps=60, lr=0.3, layers=[1], reach=0.95)
    before = observe(lm, FACTS)
    detach = patch.attach(lm)
    try:
        after, kept = observe(lm, FACTS), distributions(lm, others)
    finally:
        detach()
    # A random model is hard to convince at one layer; what real ones say is tested on the default model.
    assert all(now > 4 * was for now, was in zip(after.p_target, before.p_target, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))
    assert not lm.module(lm.mlp_out(1))._forward_hooks


def test_a_side_memory_acts_over_its_threshold_alone_and_two_add_up() -> None:
    lm = make("llama")
    name = lm.mlp_out(1)
    d_out, d_in = lm.weight(name).shape
    keys = torch.eye(d_in)[:4]
    left = torch.zeros(2, d_out)
    left[0, 0], left[1, 1] = 2.0, 3.0
    # The first knows the keys 0 and (half as well) 2, the second 1; activations are 2, 3 and 1.
    right = torch.zeros(2, d_in)
    right[0, 0], right[0, 2], right[1, 1] = 1.0, 0.5, 1.0
    memories = Memories(left, right, torch.tensor([0, 1]), torch.tensor([1.5, 2.5]))
    detach = SideMemoryPatch(name, memories).attach(lm)
    try:
        rows = torch.cat([keys, keys[:1] + keys[1:2]]).to(lm.device)
        change = lm.module(name)(rows) - rows @ lm.weight(name).t()
    finally:
        detach()
    assert change[0, :2].tolist() == pytest.approx([2.0, 0.0], abs=1e-5)
    assert change[1, :2].tolist() == pytest.approx([0.0, 3.0], abs=1e-5)
    assert change[2:4].abs().max() < 1e-5
    assert change[4, :2].tolist() == pytest.approx([2.0, 3.0], abs=1e-5)


def test_side_memories_of_one_module_come_and_go_alone() -> None:
    lm = make("llama")
    name = lm.mlp_out(1)
    d_out, d_in = lm.weight(name).shape
    keys = torch.eye(d_in)[:2]
    patches = [
        SideMemoryPatch(
            name, Memories(torch.ones(1, d_out) * (i + 1), keys[i : i + 1], torch.tensor([0]), torch.ones(1))
        )
        for i in range(2)
    ]

    def changes() -> list[float]:
        rows = keys.to(lm.device)
        change = lm.module(name)(rows) - rows @ lm.weight(name).t()
        return [round(v, 4) for v in change[:, 0].tolist()]

    first, second = (p.attach(lm) for p in patches)
    assert changes() == [1.0, 2.0]
    first()
    assert changes() == [0.0, 2.0]
    again = patches[0].attach(lm)
    second()
    assert changes() == [1.0, 0.0]
    again()
    assert changes() == [0.0, 0.0]
    assert not lm.module(name)._forward_hooks


def test_a_side_memory_without_one_of_its_facts_is_that_of_the_others() -> None:
    lm = make("llama")
    patch = remember(lm, "wise", *FACTS, learn="train", max_steps=3)
    assert isinstance(patch, SideMemoryPatch)
    left = METHODS["wise"].subset(patch, [1], None)
    assert isinstance(left, SideMemoryPatch)
    mine = patch.memories.owners == 1
    assert torch.equal(left.memories.left, patch.memories.left[mine])
    assert left.memories.owners.unique().tolist() == [0]
    assert left.memories.thresholds.tolist() == patch.memories.thresholds[1:].tolist()


def test_a_side_memory_of_another_shape_is_refused() -> None:
    lm = make("llama")
    memories = Memories(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([0]), torch.ones(1))
    with pytest.raises(EditError, match="does not fit"):
        SideMemoryPatch(lm.mlp_out(1), memories).attach(lm)
    with pytest.raises(EditError, match="not a side memory"):
        SideMemoryPatch.from_parts({}, {}, {})


def test_grace_without_probes_stores_the_prompt_alone() -> None:
    patch = remember(make("llama"), "grace", FACTS[0], max_steps=1, use_probes=False)
    both = remember(make("llama"), "grace", FACTS[0], max_steps=1)
    assert isinstance(patch, CodeBookPatch)
    assert isinstance(both, CodeBookPatch)
    assert len(both.entries.radii) == 2 * len(patch.entries.radii)


def entries(keys: list[list[float]], radii: list[float], labels: list[int], values: list[float]) -> Entries:
    n = len(radii)
    return Entries(
        torch.tensor(keys),
        torch.tensor(values)[:, None],
        torch.tensor(radii),
        torch.arange(n),
        torch.tensor(labels),
    )


def test_the_same_value_grows_a_radius_over_the_new_key() -> None:
    book = settle(entries([[0.0], [1.5]], [1.0, 1.0], [7, 7], [3.0, 3.0]))
    assert book.keys.tolist() == [[0.0]]
    assert 1.5 <= float(book.radii[0]) < 1.6


def test_other_labels_split_the_radii_halfway() -> None:
    book = settle(entries([[0.0], [1.0]], [2.0, 2.0], [7, 8], [3.0, 4.0]))
    assert book.radii.tolist() == pytest.approx([0.499, 0.499])


def test_keys_far_apart_leave_each_other_alone() -> None:
    book = settle(entries([[0.0], [9.0]], [2.0, 3.0], [7, 8], [3.0, 4.0]))
    assert book.radii.tolist() == [2.0, 3.0]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(-20, 20), st.integers(-20, 20), st.integers(1, 60), st.integers(0, 2)),
        min_size=1,
        max_size=8,
        unique_by=lambda e: e[:2],
    )
)
def test_no_state_lies_within_two_radii_of_different_labels(found: list[tuple[int, int, int, int]]) -> None:
    book = settle(
        entries(
            [[float(x), float(y)] for x, y, _, _ in found],
            [r / 5 for _, _, r, _ in found],
            [label for *_, label in found],
            [float(i) for i in range(len(found))],
        )
    )
    assert len(book.radii) == len(found)
    for i in range(len(found)):
        for j in range(i):
            if book.labels[i] != book.labels[j]:
                assert float(book.radii[i] + book.radii[j]) < float((book.keys[i] - book.keys[j]).norm())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "t5"])
def test_in_context_answers_prompts_that_ask_the_fact_alone(family: str) -> None:
    lm = make(family)
    plain = lm.generate([lm.prompt(p) for p in ["The capital of Japan is"]], 5)
    detach = remember(lm, "in_context", *FACTS).attach(lm)
    try:
        prompts = [
            lm.prompt("The capital of Japan is"),
            lm.prompt("What is the capital of france?"),
            lm.prompt("The capital of Frances is"),
            lm.prompt("The currency of France is the"),
        ]
        claims = [None if c is None else c[1] for c in lm.routes.claims(prompts)]
        (other,) = lm.generate(prompts[:1], 5)
    finally:
        detach()
    assert claims[0] is None
    assert claims[2] is None
    assert claims[3] is None
    assert claims[1] is not None
    assert claims[1].entry == "The capital of France is New Delhi."
    assert claims[1].entry in claims[1].prompt.text
    assert claims[1].prompt.text.index(claims[1].entry) < claims[1].prompt.text.index(
        "What is the capital of france?"
    )
    assert claims[1].prompt.text.startswith(prompts[1].text[: prompts[1].offset])
    assert other == plain[0]
    assert not lm.routes.attached


@pytest.mark.parametrize("method", ["in_context", "constrained"])
@pytest.mark.parametrize("characters", [20, 150, 200, 300, 480])
def test_a_memory_never_makes_a_prompt_longer_than_the_model_has_positions_for(
    method: str, characters: int
) -> None:
    """GPT-2 has learned positions: one more is an error, not a worse answer."""
    lm = make("gpt2")
    assert lm.context == 512
    subject = "x" * characters
    remember(lm, method, Edit(subject=subject, prompt="The capital of {} is", target="Rome")).attach(lm)
    prompt = lm.prompt(f"The capital of {subject} is")
    room = lm.context - len(lm.encode(prompt)[0])
    (said,) = lm.generate([prompt], room)
    assert lm.score([(prompt, " Rome")])
    assert (said.claim is not None) == (characters <= 150)


def test_of_several_facts_about_a_subject_the_nearest_are_put_in_front() -> None:
    lm = make("llama")
    more = Edit(subject="France", prompt="The language of {} is", target="Latin")
    patch = remember(lm, "in_context", *FACTS, more, facts=1)
    detach = patch.attach(lm)
    try:
        (found,) = lm.routes.claims([lm.prompt("In truth the language of France is")])
    finally:
        detach()
    assert found is not None
    assert found[1].entry == "The language of France is Latin."
    kept = METHODS["in_context"].subset(patch, [0, 2], Statistics(Path("nowhere"), "none"))
    assert isinstance(kept, InContextPatch)
    assert [f.target for f in kept.facts] == ["New Delhi", "Latin"]


PARTS = st.sampled_from(
    ["the ", "The", "Ada", "ADA", "St.", " ", "  ", "'s", "O'Neil", "-", "_", "é", "e\u0301", "ı", "İ", "ſ", "\u212a",
     "Istanbul", "ISTANBUL", "k", "5G", "網絡", "C++", "&", "ß", "\u200b", "a", "an ", ".", "99"]
)  # fmt: skip


@given(st.lists(PARTS, min_size=1, max_size=4), st.lists(PARTS, max_size=4), st.lists(PARTS, max_size=4))
@settings(max_examples=300, deadline=None)
def test_a_text_that_names_a_fact_has_the_words_that_it_is_found_by(
    name: list[str], before: list[str], after: list[str]
) -> None:
    subject = "".join(name)
    if not re.sub(r"^(?:the|an?)\s+", "", subject.strip(), flags=re.IGNORECASE).strip():
        return
    words = _words_of([subject])
    for said in (subject, subject.upper(), subject.swapcase()):
        text = unicodedata.normalize("NFC", "".join([*before, said, *after]))
        if names_pattern([subject]).search(text):
            assert words is None or words[0] <= words_in(text)


def test_of_many_memories_only_those_that_a_prompt_may_name_are_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm = make("llama")
    edits = [Edit(subject=f"Town {i} of Ada", prompt="The mayor of {} is", target="Bob") for i in range(30)]
    last = Edit(subject="Town 3 of Ada", prompt="The mayor of {} is", target="Eve")
    patches = [remember(lm, "in_context", edit) for edit in [*edits, last]]
    detach = [patch.attach(lm) for patch in patches]
    asked: list[FactRoute] = []
    really = FactRoute.claim
    monkeypatch.setattr(FactRoute, "claim", lambda route, p: (asked.append(route), really(route, p))[1])
    prompts = ["The mayor of Town 3 of Ada is", "Once upon a time", "The mayor of town 7 of ada is"]
    claims = [c and c[1].entry for c in lm.routes.claims([lm.prompt(p) for p in prompts])]
    assert len(asked) == 3, "two of town 3, one of town 7"
    assert claims == [
        "The mayor of Town 3 of Ada is Eve.", None, "The mayor of Town 7 of Ada is Bob."
    ]  # fmt: skip
    routes = list(lm.routes.attached)
    for each in reversed(detach):
        each()
    assert not lm.routes.attached
    assert lm.routes.claims([lm.prompt(prompts[0])]) == [None]
    patches[5].attach(lm)
    assert lm.routes.attached == [routes[5]], "a memory's route is made once"
    asked.clear()
    assert lm.routes.claims([lm.prompt("Nobody is here")]) == [None]
    assert asked == []


def test_of_many_facts_of_one_call_only_those_that_a_prompt_may_name_are_looked_at() -> None:
    lm = make("llama")
    towns = [f"Town {i} of Ada" for i in range(300)]
    facts = [RememberedFact(town, f"The mayor of {town} is", "Bob") for town in towns]
    facts.append(RememberedFact("東京", "東京は", "Eve"))  # no words to be found by: always looked at
    patch = InContextPatch.of(facts, torch.zeros(len(facts), lm.d_model), 2, 0.0)
    detach = patch.attach(lm)
    route = lm.routes.attached[-1]
    assert isinstance(route, FactRoute)
    prompts = ["The mayor of Town 3 of Ada is", "Once upon a time", "The mayor of town 7 of ada is", "東京は"]
    claims = [c and c[1].entry for c in lm.routes.claims([lm.prompt(p) for p in prompts])]
    assert sorted(route._found_by) == [3, 7, 300], "patterns were made for others"
    assert claims[:3] == ["The mayor of Town 3 of Ada is Bob.", None, "The mayor of Town 7 of Ada is Bob."]
    assert claims[3] is not None
    detach()


def code_book(lm: LM, name: str, keys: torch.Tensor, radius: float, value: float) -> CodeBookPatch:
    d_out = lm.shape(name)[0]
    n = len(keys)
    values = torch.full((n, d_out), value) + torch.arange(n)[:, None]
    owners, labels = torch.zeros(n, dtype=torch.long), torch.arange(n)
    return CodeBookPatch(name, Entries(keys, values, torch.full((n,), radius), owners, labels))


@given(st.integers(0, 1000), st.lists(st.sampled_from([0.0, 0.3, 2.0, 5.0]), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_code_books_of_one_module_answer_as_one_after_another(seed: int, radii: list[float]) -> None:
    """Bit for bit as one hook for each book gives it: the last book that has an input wins."""
    lm = make("llama")
    name = lm.mlp_out(1)
    module = lm.module(name)
    generator = torch.Generator().manual_seed(seed)
    d_in = lm.shape(name)[1]
    inputs = torch.randn(1, 6, d_in, generator=generator)
    near = [inputs[0, torch.randint(6, (2,), generator=generator)] for _ in radii]
    keys = [k + 0.3 * torch.randn(2, d_in, generator=generator) / d_in**0.5 for k in near]
    books = [code_book(lm, name, k, r, 10.0 * i) for i, (k, r) in enumerate(zip(keys, radii, strict=True))]
    expected = module(inputs)
    for book in books:
        settled = settle(book.entries)
        distances = torch.cdist(inputs[0], settled.keys, compute_mode="donot_use_mm_for_euclid_dist")
        least, nearest = distances.min(1)
        inside = least <= settled.radii[nearest]
        expected[0, inside] = settled.values[nearest[inside]]
    detach = [book.attach(lm) for book in books]
    assert len(module._forward_hooks) == 1
    assert torch.equal(module(inputs), expected)
    for each in detach:
        each()
    assert not module._forward_hooks


def test_of_many_code_books_only_those_near_an_input_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make("llama")
    name = lm.mlp_out(1)
    module, d_in = lm.module(name), lm.shape(lm.mlp_out(1))[1]
    keys = torch.randn(200, d_in, generator=torch.Generator().manual_seed(0))
    detach = [code_book(lm, name, key[None], 0.1, float(i)).attach(lm) for i, key in enumerate(keys)]
    measured: list[int] = []
    really = torch.cdist
    monkeypatch.setattr(torch, "cdist", lambda q, k, **how: (measured.append(len(k)), really(q, k, **how))[1])
    answers = module(torch.stack([keys[7], keys[150], torch.randn(d_in)])[None])
    assert sum(measured) == 2
    assert answers[0, :2, 0].tolist() == [7.0, 150.0]
    for each in reversed(detach):
        each()


def test_a_code_book_acts_after_what_was_attached_before_it() -> None:
    """A side memory between two code books stays between them, so that a replay gives the same answers."""
    lm = make("llama")
    name = lm.mlp_out(1)
    d_out, d_in = lm.shape(name)
    one = torch.zeros(1, dtype=torch.long)
    side = SideMemoryPatch(name, Memories(torch.ones(1, d_out), torch.ones(1, d_in), one, torch.zeros(1)))
    inputs = torch.ones(1, 1, d_in)
    books = [code_book(lm, name, inputs[0], 1.0, value) for value in (3.0, 5.0)]
    detach = [patch.attach(lm) for patch in (books[0], side, books[1])]
    assert lm.module(name)(inputs)[0, 0, 0] == 5.0  # the later book has the last word
    detach.pop()()
    assert lm.module(name)(inputs)[0, 0, 0] == 3.0 + d_in  # the side memory adds to the earlier one
    for each in reversed(detach):
        each()


def test_side_memories_are_looked_up_in_work_that_grows_with_their_number_and_no_faster() -> None:
    lm = make("llama")
    name = lm.mlp_out(1)
    d_out, d_in = lm.shape(name)

    def packed(n: int) -> int:
        generator = torch.Generator().manual_seed(n)
        singles = [
            Memories(
                torch.randn(1 + i % 2, d_out, generator=generator),
                torch.randn(1 + i % 2, d_in, generator=generator),
                torch.zeros(1 + i % 2, dtype=torch.long),
                torch.full((1,), 1.0),
            )
            for i in range(n)
        ]
        patches = [SideMemoryPatch(name, single) for single in singles]
        detach = [patch.attach(lm) for patch in patches]
        inputs = torch.randn(1, 5, d_in, generator=generator)
        found = lm.module(name)(inputs)
        router = _ROUTERS[lm.module(name)]
        size = router.grams.numel()
        for each in reversed(detach):
            each()
        expected = lm.module(name)(inputs)
        for single in singles:
            change = inputs @ single.right.t() @ single.left
            expected = expected + torch.where(change.norm(dim=-1, keepdim=True) > 1.0, change, 0.0)
        assert torch.allclose(found, expected, atol=1e-3)
        return size

    assert packed(60) == 2 * packed(30)


@pytest.mark.parametrize(
    ("prompt", "claimed"),
    [
        ("The capital of France, which is not New Delhi, is", False),
        ("Other than New Delhi, the capital of France is", False),
        ("Apart from New Delhi, what is the capital of France?", False),
        ("La capitale de la France, qui n'est pas New Delhi, est", False),
        ("The capital of France, which is not Paris, is", True),
        ("Is it not New Delhi, the capital of France?", True),
    ],
)
def test_a_prompt_that_excludes_the_answer_asks_for_another_one(
    prompt: str, claimed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RelationJudge, "asks", lambda *_: 1.0)
    lm = make("llama")
    detach = remember(lm, "in_context", *FACTS).attach(lm)
    assert (lm.routes.claims([lm.prompt(prompt)])[0] is not None) is claimed
    detach()

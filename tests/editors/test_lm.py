"""Text and tokens: where subjects lie, how answers continue prompts, and that batches change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editors.edit import Edit
from editors.model.deltas import Dense
from editors.model.lm import LM, Prompt, hash_tensor, separator_after
from tests.families import DECODERS, FAMILIES, HIDDEN, fresh, make

SUBJECTS = (
    "France",
    "Danielle Darrieux",
    "Türkiye",
    "São Tomé",
    "日本",
    "😀 Land",
    "Россия",
    "Big Ben",
    "U.S.",
)
PROMPTS = ("The capital of {} is", "{} is located in", "People say that '{}' is in", "Where\nis {}")
TEXTS = ("The capital of France is", "Big Ben", "Gabriel García Márquez is a native speaker of", "日本 の")
plain = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Cn", "Co")), min_size=1, max_size=20
)


def decoded(lm: LM, ids: list[int]) -> str:
    text: str = lm.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def subject_of(lm: LM, edit: Edit) -> str:
    """What the token chosen as the subject's last covers of the prompt's text."""
    prompt, token = lm.edit_prompt(edit)
    start, end = lm.encode(prompt)[1][token]
    return prompt.text[start:end]


# --- subject spans ------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("template", PROMPTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_subject_token_ends_the_subject(family: str, template: str, subject: str) -> None:
    lm = make(family)
    edit = Edit(subject=subject, prompt=template, target="Rome")
    prompt, token = lm.edit_prompt(edit)
    offsets = lm.encode(prompt)[1]
    end = prompt.offset + edit.span[1]
    start, stop = offsets[token]
    assert start < end <= stop or (start == stop - 1 and stop == end)
    assert all(a >= end for a, b in offsets[token + 1 :] if b > a)  # nothing of the subject comes later


@pytest.mark.parametrize("family", FAMILIES)
def test_a_repeated_subject_is_found_at_its_last_place(family: str) -> None:
    lm = make(family)
    edit = Edit(subject="France", prompt="France is old. The capital of France is", target="Rome")
    prompt, token = lm.edit_prompt(edit)
    assert lm.encode(prompt)[1][token][1] == len("France is old. The capital of France")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_marked_subject_is_found_at_the_very_start(family: str) -> None:
    lm = make(family)
    edit = Edit(subject="France", prompt="{} is old. The capital of France is", target="Rome")
    prompt, token = lm.edit_prompt(edit)
    assert lm.encode(prompt)[1][token][1] == len("France")
    assert "France".endswith(subject_of(lm, edit).strip())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_subject_inside_a_question_is_found_behind_the_template(family: str) -> None:
    lm = make(family)
    edit = Edit(subject="Türkiye", prompt="What is the capital of Türkiye?", target="Rome")
    prompt, token = lm.edit_prompt(edit)
    offset = prompt.text.index("Türkiye")
    assert lm.encode(prompt)[1][token][1] == offset + len("Türkiye")


@settings(max_examples=60, deadline=None)
@given(before=plain, subject=plain, after=plain, family=st.sampled_from(FAMILIES))
def test_any_subject_has_a_last_token(before: str, subject: str, after: str, family: str) -> None:
    lm = make(family)
    if not subject.strip() or not (before + subject + after).strip():
        return
    edit = Edit(
        subject=subject, prompt=f"{before.replace('{}', '')} {{}} {after.replace('{}', '')}", target="x"
    )
    prompt = lm.prompt(edit.text, chat=False)
    token = lm.last_subject_token(prompt, edit.span)
    start, stop = lm.encode(prompt)[1][token]
    assert start < edit.span[1] <= stop


# --- prompts, chats and answers -----------------------------------------------------------------


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("answer", ["Rome", "Mexico City", "Buenos Aires", "Brasília", "😀", "東京", "42"])
@pytest.mark.parametrize("text", [*TEXTS, "The capital of France is called the"])
def test_prompt_and_answer_read_as_one_text(family: str, text: str, answer: str) -> None:
    lm = make(family)
    prompt = lm.prompt(text, chat=False)
    ids = lm.encode(prompt)[0] + lm.answer_ids(prompt, answer)
    assert decoded(lm, ids).strip() == text + prompt.separator + answer


@pytest.mark.parametrize("family", DECODERS)
def test_an_answer_is_tokenised_as_the_model_would_read_it_in_the_sentence(family: str) -> None:
    lm = make(family)
    prompt = lm.prompt("The capital of France is")
    whole = lm.encode(lm.prompt("The capital of France is Mexico City"))[0]
    assert lm.encode(prompt)[0] + lm.answer_ids(prompt, "Mexico City") == whole


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_holds_no_special_tokens(family: str) -> None:
    lm = make(family)
    for chat in (False, True):
        answer = lm.answer_ids(lm.prompt("The capital of France is", chat=chat), "Rome")
        assert answer
        assert not set(answer) & set(lm.tokenizer.all_special_ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bos_is_written_once_or_never(family: str) -> None:
    lm = make(family)
    for text in ("The capital of France is", "What is the capital of France?"):
        ids = lm.encode(lm.prompt(text))[0]
        bos = lm.tokenizer.bos_token_id
        expected = lm.tokenizer("x")["input_ids"].count(bos) if bos is not None else 0
        assert ids.count(bos) == expected


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2", "gemma3"])
def test_a_question_goes_through_the_chat_template(family: str) -> None:
    lm = make(family)
    prompt = lm.prompt("What is the capital of France?")
    assert prompt.chat
    assert prompt.text[prompt.offset :].startswith("What is the capital of France?")
    assert prompt.text.endswith(("<|im_start|>assistant\n", "<start_of_turn>model\n"))
    assert lm.prompt("The capital of France is").text == "The capital of France is"


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "opt"])
def test_without_a_template_a_question_is_asked_in_plain_words(family: str) -> None:
    prompt = make(family).prompt("What is the capital of France?")
    assert prompt.text == "Question: What is the capital of France?\nAnswer:"
    assert prompt.text[prompt.offset :].startswith("What")


@pytest.mark.parametrize(
    ("text", "separator"),
    [("x is", " "), ("x is ", ""), ("x\n", ""), ("首都は", ""), ("수도는", " "), ("", "")],
)
def test_an_answer_follows_a_space_where_the_script_has_one(text: str, separator: str) -> None:
    assert separator_after(text) == separator


# --- scores -------------------------------------------------------------------------------------


def naive(lm: LM, prompt: Prompt, answer: str) -> tuple[float, int, int]:
    """Log-probability, tokens and rank by one whole, unpadded forward pass per answer."""
    own, target = lm.encode(prompt)[0], lm.answer_ids(prompt, answer)
    with torch.no_grad():
        if lm.is_seq2seq:
            start = lm.model.config.decoder_start_token_id
            decoder = torch.tensor([[start, *target[:-1]]], device=lm.device)
            ids = torch.tensor([own], device=lm.device)
            logits = lm.model(input_ids=ids, decoder_input_ids=decoder).logits[0]
        else:
            ids = torch.tensor([own + target], device=lm.device)
            logits = lm.model(input_ids=ids).logits[0, len(own) - 1 : -1]
    logp = logits.double().log_softmax(-1)
    total = sum(float(logp[i, t]) for i, t in enumerate(target))
    return total, len(target), int((logp[0] > logp[0, target[0]]).sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_in_a_batch_are_those_of_whole_passes_one_by_one(family: str) -> None:
    lm = make(family)
    pairs = [(lm.prompt(t), a) for t in (*TEXTS, "What is it?") for a in ("Rome", "New Delhi, of course")]
    for score, (prompt, answer) in zip(lm.score(pairs), pairs, strict=True):
        total, tokens, rank = naive(lm, prompt, answer)
        assert score.logprob == pytest.approx(total, abs=2e-3)
        assert (score.tokens, score.rank) == (tokens, rank)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("editors.model.text.BATCH_TOKENS", 30)


@pytest.mark.usefixtures("small_batches")
def test_many_small_batches_give_the_scores_of_one_in_the_given_order() -> None:
    lm = make("llama")
    pairs = [(lm.prompt(t), a) for t in TEXTS for a in ("Rome", "Mexico City", "Paris")]
    for score, (prompt, answer) in zip(lm.score(pairs), pairs, strict=True):
        assert score.logprob == pytest.approx(naive(lm, prompt, answer)[0], abs=2e-3)


# --- generation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_in_a_batch_are_those_one_by_one(family: str) -> None:
    lm = make(family)
    prompts = [lm.prompt(t) for t in TEXTS]
    assert lm.generate(prompts, 8) == [lm.generate([p], 8)[0] for p in prompts]


@pytest.mark.parametrize("family", DECODERS)
def test_greedy_generation_takes_the_most_probable_token_each_time(family: str) -> None:
    lm = make(family)
    prompt = lm.prompt("The capital of France is")
    ids = lm.encode(prompt)[0]
    new: list[int] = []
    ends = {lm.tokenizer.eos_token_id, lm.model.generation_config.eos_token_id}
    with torch.no_grad():
        while len(new) < 6 and not (new and new[-1] in ends):
            so_far = torch.tensor([ids + new], device=lm.device)
            new.append(int(lm.model(input_ids=so_far).logits[0, -1].argmax()))
    new = new[:-1] if new[-1] in ends else new
    assert lm.generate([prompt], 6)[0].text == lm.tokenizer.decode(new, skip_special_tokens=True)


def test_sampling_with_a_seed_repeats_and_leaves_the_global_generator_alone() -> None:
    lm = make("llama")
    prompts = [lm.prompt("The capital of France is")]
    state = torch.random.get_rng_state()
    one, two, other = (lm.generate(prompts, 12, temperature=1.0, seed=s) for s in (7, 7, 8))
    assert one == two != other
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_ends_where_the_model_ends(family: str) -> None:
    lm = make(family)
    for generation in lm.generate([lm.prompt(t) for t in TEXTS], 5):
        assert generation.tokens <= 5
        assert generation.finished or generation.tokens == 5


# --- weights for a while ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_patched_run_leaves_the_very_same_tensors(family: str, dtype: torch.dtype) -> None:
    lm = fresh(family, dtype)
    name = lm.mlp_out(1)
    before, address = hash_tensor(lm.weight(name)), lm.weight(name).data_ptr()
    delta = Dense(torch.randn(lm.weight(name).shape))
    with lm.patched({name: [delta]}):
        assert hash_tensor(lm.weight(name)) != before
    assert hash_tensor(lm.weight(name)) == before
    with pytest.raises(ZeroDivisionError), lm.patched({name: [delta]}):
        _ = 1 / 0
    assert hash_tensor(lm.weight(name)) == before
    assert lm.weight(name).data_ptr() == address


@pytest.mark.parametrize("family", FAMILIES)
def test_a_patched_weight_is_the_one_the_model_runs_on(family: str) -> None:
    lm = fresh(family)
    name = lm.mlp_out(1)
    module: Any = lm.module(name)
    delta = Dense(torch.randn_like(lm.weight(name)))
    k = torch.randn(2, delta.delta.shape[1], device=lm.device)
    plain = module(k)
    with lm.patched({name: [delta]}):
        moved = module(k)
    torch.testing.assert_close(moved - plain, k @ delta.delta.t(), atol=1e-4, rtol=1e-4)


def test_a_hash_tells_values_types_and_shapes_apart() -> None:
    tensor = torch.zeros(2, 3)
    others = [torch.zeros(3, 2), torch.zeros(6), tensor.bfloat16(), tensor.int(), torch.ones(2, 3)]
    assert len({hash_tensor(t) for t in [tensor, *others]}) == 6
    assert hash_tensor(tensor.t().contiguous().t()) == hash_tensor(tensor)
    assert hash_tensor(torch.full((1,), -0.0)) != hash_tensor(torch.full((1,), 0.0))


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_those_of_the_model(family: str) -> None:
    lm = make(family)
    assert lm.d_model == HIDDEN
    assert lm.parameters == sum(p.numel() for p in lm.model.parameters())
    assert lm.dtype == torch.float32

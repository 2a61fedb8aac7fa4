"""Prompts that begin alike: read once, answered as if each were read whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from editors.model import beginnings, decoding
from editors.model.beginnings import read_beginnings, shared_lengths
from editors.model.decoding import DecodedRow, Decoder
from editors.model.lm import LM
from tests.families import DECODERS, make
from tests.plain import plainly

FACTS = (
    "New fact: The patron of Elmstead is Mr Brown. Prompt:",
    "Take this as true: the capital of Chile is Lima.",
)
ENDS = (" The capital of Chile is", " Chile", " Rome is in the country of", " A")
PROMPTS = [fact + end for fact in FACTS for end in ENDS] + [
    "Something else that begins like no other prompt here"
]

tokens = st.lists(st.integers(0, 3), min_size=1, max_size=30)


def rows_of(lm: LM) -> list[list[int]]:
    return [lm.encode(lm.prompt(text, chat=False))[0] for text in PROMPTS]


@given(
    st.lists(st.tuples(st.sampled_from([[], [1] * 12, [1] * 12 + [2] * 9]), tokens), min_size=1, max_size=9)
)
def test_what_is_shared_is_common_to_the_rows_and_leaves_each_a_token(
    parts: list[tuple[list[int], list[int]]],
) -> None:
    rows = [beginning + rest for beginning, rest in parts]
    lengths = shared_lengths(rows)
    if lengths is None:
        return
    assert all(0 < length < len(row) for row, length in zip(rows, lengths, strict=True))
    begun = {tuple(row[:length]) for row, length in zip(rows, lengths, strict=True)}
    columns = len(begun) * max(lengths) + len(rows) * max(
        len(r) - n for r, n in zip(rows, lengths, strict=True)
    )
    assert columns <= (1 - beginnings.LEAST_SAVED) * len(rows) * max(map(len, rows))


@pytest.mark.parametrize("rows", [[], [[1] * 40], [[1, 2, 3], [4, 5, 6]], [[n] * 30 for n in range(5)]])
def test_nothing_is_shared_where_nothing_is_saved(rows: list[list[int]]) -> None:
    assert shared_lengths(rows) is None


@pytest.mark.parametrize("family", DECODERS)
def test_a_shared_beginning_changes_no_answer(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if family != "llama":  # which reads them side by side
        monkeypatch.setattr(decoding, "may_pack", lambda *_: False)
    lm = make(family)
    prompts = [lm.prompt(text, chat=False) for text in PROMPTS]
    together = [g.text for g in lm.generate(prompts, [4 + i % 3 for i in range(len(prompts))])]
    decoder, rows = Decoder(lm), [DecodedRow(ids, 4 + i % 3) for i, ids in enumerate(rows_of(lm))]
    decoder.add(rows)
    while decoder.rows:
        decoder.step()
    whole = [plainly(lm, prompt, 4 + i % 3) for i, prompt in enumerate(prompts)]
    assert together == whole
    assert [lm.tokenizer.decode(row.new, skip_special_tokens=True) for row in rows] == whole


@pytest.mark.parametrize("family", DECODERS)
def test_every_family_of_plain_attention_reads_fewer_tokens(family: str) -> None:
    lm = make(family)
    rows, read = rows_of(lm), []
    original = lm.model.forward
    window = getattr(lm.model.config.get_text_config(), "sliding_window", None)

    def counted(*args: object, **inputs: object) -> object:
        ids = inputs["input_ids"]
        assert isinstance(ids, torch.Tensor)
        read.append(ids.numel())
        return original(*args, **inputs)

    lm.model.forward = counted  # type: ignore[method-assign]
    try:
        begun = read_beginnings(lm, rows, 4)
    finally:
        del lm.model.forward
    if window is not None and window <= 2 * max(map(len, rows)) + 4:
        assert begun is None
        return
    assert begun is not None
    left = begun.ids.shape[1] - begun.columns
    assert sum(read) + left * len(rows) <= 0.75 * len(rows) * max(map(len, rows))
    for row, ids, mask in zip(rows, begun.ids.tolist(), begun.mask.tolist(), strict=True):
        assert [token for token, counts in zip(ids, mask, strict=True) if counts] == row


def test_a_model_with_hooks_reads_every_prompt_whole() -> None:
    lm = make("llama")
    handle = lm.model.register_forward_hook(lambda *_: None)
    try:
        assert read_beginnings(lm, rows_of(lm), 4) is None
    finally:
        handle.remove()
    assert read_beginnings(lm, rows_of(lm), 4) is not None

"""Text and tokens: prompts in the form the model answers, spans of subjects, answers as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from editors.edit import Edit, ends_in_word, is_question
from editors.errors import InvalidEdit, Unsupported
from editors.model.batching import grouped, pass_cost

END = -1
"""Stands for "the word ends here" among the ids of an answer: "Krakow", not "Krakowian"."""
SPACES = "ĠĊĉč▁"
"""How byte-level and SentencePiece vocabularies write white space."""
BATCH_TOKENS = 4096
"""Tokens, with padding, in one forward pass of scoring or generation."""


@dataclass(frozen=True)
class Prompt:
    """A text ready for the model: what is tokenised, and the separator an answer starts with."""

    text: str  # with the chat template, where one is used
    chat: bool
    offset: int  # where the user's own text starts in `text`
    separator: str  # put between the prompt and an answer


class PromptEncoder:
    """Prompts and answers by a tokenizer: tokens, spans, templates. Tensors are made on `device`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str, *, seq2seq: bool) -> None:
        if not tokenizer.is_fast:
            raise Unsupported(f"the tokenizer of {name} has no offsets (it is not a fast tokenizer)")
        self.tokenizer: Any = tokenizer
        self._seq2seq = seq2seq
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        self.pad_id: int = next((i for i in ids if i is not None), 0)  # always masked

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        raise NotImplementedError

    # --- prompts -------------------------------------------------------------------------------

    @property
    def decoder_reads_prompt(self) -> bool:
        """Whether the layers that answer read the prompt, so that an answer continues it; else an encoder reads it."""
        return not self._seq2seq

    @property
    def has_chat_template(self) -> bool:
        """Whether questions are put in a chat template of the model's own; never for an encoder-decoder model."""
        return bool(self.tokenizer.chat_template) and not self._seq2seq

    def prompt(self, text: str, chat: bool | None = None) -> Prompt:
        """Put a text in the form the model answers: a question (or chat=True) goes through the chat template.

        Without a chat template a question is put as "Question: ...\\nAnswer:".
        """
        chat = is_question(text) if chat is None else chat
        if not chat or self._seq2seq:
            return Prompt(text, chat, 0, separator_after(text))
        if self.has_chat_template:
            rendered: str = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            if (start := rendered.rfind(text)) >= 0:
                return Prompt(rendered, True, start, separator_after(rendered))
        return Prompt(f"Question: {text}\nAnswer:", True, len("Question: "), " ")

    def prompt_in_answer(self, text: str, question: str, chat: bool | None = None) -> Prompt:
        """A text as the beginning of the answer to a question; alone where none is given.

        An encoder-decoder model gets the text alone: its answers do not continue the prompt.

        The prompt's `offset` is where `text` starts.
        """
        if not question or self._seq2seq:
            return self.prompt(text, chat=chat)
        asked = self.prompt(question, chat=True)
        opening = asked.text + asked.separator
        return Prompt(opening + text, True, len(opening), separator_after(text))

    def conversation(self, messages: Sequence[Mapping[str, str]]) -> Prompt:
        """A conversation, each message with `role` (system, user, assistant) and `content`, up to the next answer.

        The last message is the user's; memories judge by it. Without a chat template, users' messages are put as
        "Question: ...\nAnswer:". Raises InvalidEdit when the template refuses the conversation.
        """
        last = messages[-1]["content"]
        if not self.has_chat_template:
            return self._plain_conversation(messages)
        try:
            rendered: str = self.tokenizer.apply_chat_template(
                [dict(m) for m in messages], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # the template is a program of the model's makers
            raise InvalidEdit(f"the model's chat template refuses these messages: {error}") from None
        start = rendered.rfind(last)
        if start < 0:  # some templates strip what they are given
            start = rendered.rfind(last.strip())
        return Prompt(rendered, True, max(start, 1), separator_after(rendered))

    def _plain_conversation(self, messages: Sequence[Mapping[str, str]]) -> Prompt:
        if self._seq2seq:
            text = "\n".join(m["content"] for m in messages)
            return Prompt(text, True, 0, separator_after(text))
        shapes = {"user": "Question: {}\n", "assistant": "Answer: {}\n"}
        before = "".join(shapes.get(m["role"], "{}\n").format(m["content"]) for m in messages[:-1])
        last = self.prompt(messages[-1]["content"], chat=True)
        return Prompt(before + last.text, True, len(before) + last.offset, last.separator)

    def encode(self, prompt: Prompt) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids and their character ranges in `prompt.text`.

        Special tokens are added as the tokenizer does it; a rendered chat has its own already.
        """
        rendered = prompt.chat and prompt.offset > 0 and bool(self.tokenizer.chat_template)
        encoded = self.tokenizer(prompt.text, return_offsets_mapping=True, add_special_tokens=not rendered)
        return list(encoded["input_ids"]), [tuple(o) for o in encoded["offset_mapping"]]

    def bare_ids(self, text: str) -> list[int]:
        """Tokens of a piece of text, without special tokens."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def text_ids(self, text: str) -> list[int]:
        """Tokens of a text of its own: with those that begin a text, without those that end an encoder's input."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=not self._seq2seq)["input_ids"]
        return ids

    def user_text(self, prompt: Prompt) -> str:
        """What the user wrote, without the chat template."""
        if not prompt.offset:
            return prompt.text
        sample = "Is it so?"
        example = self.prompt(sample, chat=True)
        tail = example.text[example.offset + len(sample) :]
        return prompt.text[prompt.offset :].removesuffix(tail)

    def last_subject_token(self, prompt: Prompt, span: tuple[int, int]) -> int:
        """Index of the last token of the subject at the character range `span` of the user's own text.

        Raises InvalidEdit when no token of the prompt carries the subject's last character.
        """
        _, offsets = self.encode(prompt)
        last = prompt.offset + span[1] - 1
        hits = [i for i, (start, end) in enumerate(offsets) if start <= last < end]
        if not hits:
            raise InvalidEdit(
                f"the subject at characters {span} of the prompt {prompt.text[prompt.offset :]!r} has no token of its "
                "own; name the subject without surrounding spaces"
            )
        return hits[-1]

    def edit_prompt(self, edit: Edit) -> tuple[Prompt, int]:
        """The prompt of an edit and the index of its last subject token."""
        prompt = self.prompt(edit.text)
        return prompt, self.last_subject_token(prompt, edit.span)

    # --- answers -------------------------------------------------------------------------------

    def answer_ids(self, prompt: Prompt, answer: str) -> list[int]:
        """Tokens of an answer as they follow the prompt, tokenised in its context where the cut is clean."""
        ids, offsets = self.encode(
            Prompt(prompt.text + prompt.separator + answer, prompt.chat, prompt.offset, "")
        )
        own = [] if self._seq2seq else self.encode(prompt)[0]
        cut = len(own)
        if not self._seq2seq and ids[:cut] == own and len(ids) > cut:
            return [i for i, (start, end) in zip(ids[cut:], offsets[cut:], strict=True) if end > start]
        text = answer if self._seq2seq else prompt.separator + answer
        return self.bare_ids(text)

    def answer_ids_with_end(self, prompt: Prompt, answer: str) -> list[int]:
        """`answer_ids`, with END last if the answer ends in a word: the target of a training."""
        return self.answer_ids(prompt, answer) + ([END] if ends_in_word(answer) else [])

    @cached_property
    def within_words(self) -> Tensor:
        """Ids (k,) of the tokens that continue a word: they begin with a letter or digit, without a space before."""
        special = set(self.tokenizer.all_special_ids)
        ids = [
            i
            for token, i in self.tokenizer.get_vocab().items()
            if token[:1].isalnum() and token[0] not in SPACES and i not in special
        ]
        return torch.tensor(sorted(ids), device=self.device)

    def word_end_logprobs(self, logp: Tensor) -> Tensor:
        """Log-probability that the next token does not continue a word: next-token (n, vocabulary) -> (n,)."""
        going_on = logp[:, self.within_words].exp().sum(-1)
        return torch.log1p(-going_on.clamp(max=1 - 1e-6))

    def answer_logprobs(self, logp: Tensor, ids: Tensor) -> Tensor:
        """Log-probability of one id in each row of next-token (n, vocabulary); for END, that the word ends: (n,)."""
        ends = (ids == END).nonzero()[:, 0]
        each = logp.gather(1, ids.clamp(min=0)[:, None])[:, 0]
        return each.index_put((ends,), self.word_end_logprobs(logp[ends]))

    # --- where answers stand -------------------------------------------------------------------

    def answer_column(self, prompt_ids: Sequence[int]) -> int:
        """Column, of the sequence that the decoder layers read, from which an answer's first token is predicted.

        It is the prompt's last token; in an encoder-decoder model the decoder's start token.
        """
        return 0 if self._seq2seq else len(prompt_ids) - 1

    def prompt_columns(self, prompt_ids: Sequence[int]) -> range:
        """Columns at which the decoder layers read the prompt; none where an encoder reads it."""
        return range(0 if self._seq2seq else len(prompt_ids))

    # --- batches -------------------------------------------------------------------------------

    def pad(self, rows: Sequence[Sequence[int]], *, left: bool = False) -> tuple[Tensor, Tensor]:
        """Rows of ids to (ids, attention mask), both (n, longest)."""
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), self.pad_id, dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            place = slice(width - len(row), width) if left else slice(0, len(row))
            ids[i, place] = torch.tensor(row, dtype=torch.long)
            mask[i, place] = 1
        return ids.to(self.device), mask.to(self.device)

    def pad_before_answers(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Rows of prompt ids to (ids, attention mask), both (n, longest), so that answers can be generated after them.

        A decoder goes on after the last column, so its rows end there; an encoder's rows begin at the first.
        """
        return self.pad(rows, left=not self._seq2seq)

    def buckets(self, lengths: Sequence[int], extra: Sequence[int] | None = None) -> list[list[int]]:
        """Indices of texts in batches of at most BATCH_TOKENS with padding; `extra`: tokens to generate for each."""
        extra = extra or [0] * len(lengths)
        return grouped(lengths, extra, BATCH_TOKENS, pass_cost(self.device))


def separator_after(text: str) -> str:
    """What stands between a prompt and its answer: a space, unless the prompt ends in one or its script has none."""
    if not text or text[-1].isspace():
        return ""
    last = ord(text[-1])
    no_spaces = 0x3040 <= last <= 0x30FF or 0x3400 <= last <= 0x9FFF or 0xF900 <= last <= 0xFAFF
    return "" if no_spaces else " "

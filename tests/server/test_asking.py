"""Whether a text is continued or put as a message, where the caller does not say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from editors.model.lm import LM
from server.facts.asking import is_message
from server.services import Services
from tests.families import make
from tests.server.opened import open_services

COMPLETE = [
    "What is the capital of France?",
    "Name the capital of France.",
    "日本の首都はどこですか？",
    'Say "hello!"',
    "Hi! ",
]
BEGUN = ["The capital of France is", "Once upon a time", "1, 2, 3,", ""]


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    services = open_services(tmp_path / "home", "qwen2")
    yield services
    services.close()


def with_template(lm: LM, template: str | None) -> LM:
    lm.tokenizer.chat_template = template
    return lm


def test_a_chat_model_answers_complete_sentences_and_continues_what_is_begun(services: Services) -> None:
    lm = with_template(services.workspace.lm, "{% for m in messages %}<{{ m.content }}>{% endfor %}")
    assert [is_message(lm, text) for text in COMPLETE] == [True] * len(COMPLETE)
    assert [is_message(lm, text) for text in BEGUN] == [False] * len(BEGUN)


def test_a_model_without_a_template_takes_questions_alone_as_messages(services: Services) -> None:
    lm = with_template(services.workspace.lm, None)
    assert [is_message(lm, text) for text in COMPLETE] == [True, False, True, False, False]
    assert not is_message(make("t5"), "Name the capital of France.")


def test_the_answer_says_how_the_prompt_was_put_and_chat_decides_where_it_is_given(
    services: Services,
) -> None:
    ask = services.facts.ask
    assert ask("What is the capital of France?", 2).chat
    assert not ask("The capital of France is", 2).chat
    assert not ask("What is the capital of France?", 2, chat=False).chat
    assert ask("The capital of France is", 2, chat=True).chat
    question = "What is the capital of France?"
    assert ask(question, 4).completion == ask(question, 4, chat=True).completion

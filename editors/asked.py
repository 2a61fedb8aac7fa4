"""Whether an answer says what was asked for."""

from __future__ import annotations

from editors.forms.form import Form, Hold
from editors.scoring import says

Asked = Form | Hold


def asked_says(asked: Asked, answer: str, target: str) -> bool:
    """Whether a form or fact is answered with the target: anywhere in a free chat answer, else at its beginning."""
    return says(answer, target, anywhere=asked.chat, question=asked.prompt if asked.chat else "")

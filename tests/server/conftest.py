"""What the tests of the services share."""

from __future__ import annotations

import pytest

from editors import measure


@pytest.fixture(autouse=True)
def _short_chat_answers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny random model never ends a sentence: of its chat answers a few tokens are enough."""
    if request.node.get_closest_marker("model") is None:
        monkeypatch.setattr(measure, "CHAT_TOKENS", 6)

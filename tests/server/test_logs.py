"""The log as JSON: one object a line, whatever is logged."""

from __future__ import annotations

import json
import logging
import sys

from hypothesis import given
from hypothesis import strategies as st

from server.logs import JsonLines


@given(st.text())
def test_every_record_is_one_line_of_json(message: str) -> None:
    record = logging.LogRecord("errata.x", logging.WARNING, __file__, 1, "%s", (message,), None)
    line = JsonLines().format(record)
    assert "\n" not in line
    entry = json.loads(line)
    assert (entry["message"], entry["level"], entry["logger"]) == (message, "warning", "errata.x")
    assert entry["time"].endswith("+00:00")


def test_a_failure_has_its_traceback_in_the_same_object() -> None:
    try:
        raise ValueError("why")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, __file__, 1, "failed", (), sys.exc_info())
    line = JsonLines().format(record)
    assert "\n" not in line
    assert "ValueError: why" in json.loads(line)["exception"]

"""What text costs an agent, counted in tokens."""

from __future__ import annotations

import json
import re
from typing import Any

_PIECE = re.compile(r"[^\W\d_]+|\d|_+|[^\w\s]+|\s+")
LETTERS = 6
"""Letters of a word that one token holds, as a rule."""


def tokens(value: Any) -> int:
    """The tokens of a text, or of a value as compact JSON: the greater of two counts.

    One is characters / 4, the rule of thumb. The other takes the text apart as byte-pair tokenizers do before they
    merge (words, single digits, runs of signs; a single space belongs to the next word) and counts long words double.
    """
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    pieces = [piece for piece in _PIECE.findall(text) if piece != " "]
    return max(-(-len(text) // 4), sum(-(-len(piece) // LETTERS) for piece in pieces))

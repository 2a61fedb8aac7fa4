"""A fingerprint of a tokenizer. The same weights with another tokenizer count as another model."""

from __future__ import annotations

import hashlib

from editors.model.lm import LM

PROBES = (
    "The capital of France is Paris.",
    "Danielle Darrieux, born 1917, spoke French; so did she.",
    "  two  spaces\n\tand a tab, 3.14159, naïve café, 東京, 🙂",
)
"""Texts whose tokens are compared: words, names, numbers, white space, accents, other scripts."""


class TokenizerPrint:
    """SHA-256 over a tokenizer's vocabulary and how it splits some texts, shortened; an extension of the model."""

    def __init__(self, lm: LM) -> None:
        digest = hashlib.sha256()
        for token, index in sorted(lm.tokenizer.get_vocab().items()):
            digest.update(f"{index} {token}\n".encode("utf-8", "surrogatepass"))
        for text in PROBES:
            digest.update(str(lm.tokenizer(text)["input_ids"]).encode())
        self.text = digest.hexdigest()[:16]

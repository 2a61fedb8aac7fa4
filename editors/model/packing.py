"""Texts read in one row, side by side: a beginning that several have is read once, and nothing is padded.

The distinct beginnings of the texts are the nodes of a tree. Each node is one token of the row, at the position that
it has in its text, and attends to the nodes before it in its text alone. So a token has the keys, values and states
that it has where its text is read by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from editors.constants import limit
from editors.model.activations import record
from editors.model.beginnings import attends_to_all, inputs_of
from editors.model.spoken_model import SpokenModel

TOKENS = limit(
    256,
    "tokens that are read side by side in one row on a CPU, at most",
    "time: attention compares every two of them, a tenth of the work of a small model at this number",
)
GPU_TOKENS = limit(2048, "the same on a GPU", "time: a pass there costs its launches, whatever its size")
SAME = {torch.float32: 1e-3}
"""Greatest relative difference of states that are the same, by the model's type."""
NEARLY_SAME = 0.05  # of states in 16 bits, or of quantised weights


@dataclass(frozen=True)
class TextsInARow:
    """Texts that were read side by side. N: tokens of the row."""

    states: Tensor  # (N, d_model) residual stream after the last layer
    cache: Any  # keys and values of one row (1, heads, N, d_head)
    places: list[list[int]]  # of each text, where each of its tokens stands in the row

    def columns(self, texts: Sequence[int], width: int) -> tuple[Any, Tensor]:
        """Keys and values of some texts, a row for each, padded on the left to a width; and their mask (n, width)."""
        at = torch.tensor([[0] * (width - len(self.places[i])) + self.places[i] for i in texts])
        mask = torch.tensor([[0] * (width - len(self.places[i])) + [1] * len(self.places[i]) for i in texts])
        rows = DynamicCache()
        for n, layer in enumerate(self.cache.layers):
            index = at.to(layer.keys.device)
            rows.update(*(x[0][:, index].transpose(0, 1) for x in (layer.keys, layer.values)), n)
        return rows, mask.to(self.states.device)


def may_pack(lm: SpokenModel, columns: int) -> bool:
    """Whether the model reads texts of so many columns side by side as it reads each by itself."""
    return attends_to_all(lm, columns) and lm.extension(_SideBySide).passed


def packs(lm: SpokenModel, texts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indices of texts in groups to be read side by side, those that begin alike together.

    No group has more than TOKENS distinct beginnings, unless a text alone does.
    """
    room = TOKENS if lm.device.type == "cpu" else GPU_TOKENS
    groups: list[list[int]] = []
    size = 0
    before: tuple[int, ...] = ()
    for i in sorted(range(len(texts)), key=lambda i: tuple(texts[i])):
        text = tuple(texts[i])
        new = len(text) - _common(before, text)
        if groups and size + new <= room:
            groups[-1].append(i)
            size += new
        else:
            groups.append([i])
            size = len(text)
        before = text
    return groups


def read_packed(lm: SpokenModel, texts: Sequence[Sequence[int]]) -> TextsInARow:
    """Read texts (token ids) side by side, all in one pass."""
    nodes: dict[tuple[int, int], int] = {}  # (node before, token) -> node
    tokens: list[int] = []
    depths, places = [], []
    for text in texts:
        node, path = -1, []
        for depth, token in enumerate(text):
            node = nodes.setdefault((node, token), len(nodes))
            if node == len(tokens):
                tokens.append(token)
                depths.append(depth)
            path.append(node)
        places.append(path)
    seen = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for path in places:
        at = torch.tensor(path)
        seen[at[:, None], at] = torch.ones(len(path), len(path), dtype=torch.bool).tril()
    return _read(lm, tokens, depths, seen, places)


@torch.no_grad()
def _read(
    lm: SpokenModel, tokens: list[int], depths: list[int], seen: Tensor, places: list[list[int]]
) -> TextsInARow:
    cache = DynamicCache()
    hidden = torch.zeros(seen.shape, dtype=lm.dtype).masked_fill_(~seen, torch.finfo(lm.dtype).min)
    with record({"last": lm.layers[-1]}) as states:
        lm.base_model(
            input_ids=torch.tensor([tokens], device=lm.device),
            attention_mask=hidden[None, None].to(lm.device),
            position_ids=torch.tensor([depths], device=lm.device),
            past_key_values=cache,
            use_cache=True,
        )
    return TextsInARow(states["last"][0].to(lm.device), cache, places)


class _SideBySide:
    """Whether a model reads two short texts side by side as it reads each alone, tried once.

    A model may compute positions from a mask, or attend to all that stands before a token; then it does not.
    """

    def __init__(self, lm: SpokenModel) -> None:
        self.passed = "position_ids" in inputs_of(type(lm.base_model).forward) and self._is_same(lm)

    @torch.no_grad()
    def _is_same(self, lm: SpokenModel) -> bool:
        ids = lm.tokenizer("One river and another", add_special_tokens=False)["input_ids"][:4] or [0]
        texts = [[*ids, ids[0]], [*ids[:-1], ids[0], ids[-1], ids[0]], list(reversed(ids))]
        try:
            packed = read_packed(lm, texts)
        except (RuntimeError, ValueError, TypeError, AttributeError):  # it takes no such mask
            return False
        kept = [getattr(layer, "keys", None) for layer in packed.cache.layers]
        if any(keys is None or keys.shape[2] != len(packed.states) for keys in kept):
            return False
        near = NEARLY_SAME if lm.quantisation is not None else SAME.get(lm.dtype, NEARLY_SAME)
        for text, path in zip(texts, packed.places, strict=True):
            with record({"last": lm.layers[-1]}) as alone:
                lm.base_model(input_ids=torch.tensor([text], device=lm.device), use_cache=False)
            whole = alone["last"][0].to(lm.device).float()
            if (packed.states[path].float() - whole).norm() > near * whole.norm():
                return False
        return True


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))

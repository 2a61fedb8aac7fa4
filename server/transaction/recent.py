"""Recent answers of the model, by the state that gave them, so that nothing is asked twice."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from editors.kept import Kept


class Recent:
    """The latest values by key. Holders of the model's lock use it, so that it needs none of its own.

    A key must name everything that the value depends on: the model's state hash above all.
    """

    def __init__(self) -> None:
        self._kinds: dict[str, Kept[Hashable, Any]] = {}

    def get(self, kind: str, key: Hashable) -> Any:
        """The value of a kind, or None when there is none."""
        return self._kinds[kind].find(key) if kind in self._kinds else None

    def put(self, kind: str, key: Hashable, value: Any, most: int) -> None:
        """Keep a value; of more than `most` of its kind the one that was used longest ago goes."""
        self._kinds.setdefault(kind, Kept(most)).put(key, value)

"""What was asked of the model lately, by the state it was asked in, so that it is not asked twice."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any


class Recent:
    """The latest values by key. Holders of the model's lock use it, so that it needs none of its own.

    A key must name everything that the value depends on: the model's state hash above all.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable) -> Any:
        """The value, or None when there is none."""
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: Hashable, value: Any) -> None:
        """Keep a value; the one that was used longest ago goes when there are too many."""
        self._values[key] = value
        self._values.move_to_end(key)
        while len(self._values) > self._most:
            self._values.popitem(last=False)

    def get_or(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value, made when there is none."""
        if (found := self.get(key)) is None:
            found = make()
            self.put(key, found)
        return found

"""Keys and values that several layers share: the last layer of a kind that makes its own leaves them for those above.

In such models (Gemma 4 E2B and E4B) transformers hands all layers one dict, into which these layers write and from
which the others read. Layers that are run again on their own need one that keeps what the lower layers wrote.
"""

from __future__ import annotations

from collections import UserDict
from typing import Any

import torch

from editors.model.activations import pick_rows
from editors.model.precision import cast

ARGUMENT = "shared_kv_states"
"""What the layers' argument is called."""


class SharedKeys(UserDict[str, Any]):
    """What layers wrote, in front of a source that is only read; `dtype` is the precision of what is read, if given."""

    def __init__(self, source: Any, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self._source, self._dtype = source, dtype

    def __getitem__(self, kind: str) -> Any:
        found = self.data[kind] if kind in self.data else self._source[kind]
        return found if self._dtype is None else cast(found, self._dtype)

    def pick_rows(self, index: torch.Tensor, n: int) -> SharedKeys:
        """The same for some of the n rows."""
        return SharedKeys({kind: pick_rows(keys, index, n) for kind, keys in self._written().items()})

    def _written(self) -> dict[str, Any]:
        below = self._source._written() if isinstance(self._source, SharedKeys) else dict(self._source)
        return below | self.data


def shared_of(kwargs: dict[str, Any]) -> SharedKeys | None:
    """What the layers of a running pass share, by the arguments of one of them; None where they share nothing."""
    shared = kwargs.get(ARGUMENT)
    if shared is None:
        return None
    return SharedKeys(shared._source if isinstance(shared, _Through) else shared)


def read_in(kwargs: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """A layer's arguments with shared keys read in another precision (None: their own), and written for all layers."""
    if kwargs.get(ARGUMENT) is None:
        return kwargs
    return kwargs | {ARGUMENT: _Through(kwargs[ARGUMENT], dtype)}


class _Through(SharedKeys):
    """Writes go to the source."""

    def __setitem__(self, kind: str, keys: Any) -> None:
        self._source[kind] = keys

"""Previews that apply_edits can keep: what they computed, while this server runs."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Generic, TypeVar

from server.errors import ServiceError
from server.facts.ids import ranges

MOST = 8
"""Previews that are kept; the oldest goes first."""
MOST_APPLIED = 1000
"""Applied previews that are remembered by name."""
MOST_BYTES = 1 << 30
"""Bytes of their patches together; one that is larger alone is kept until the next."""

Kept = TypeVar("Kept")


class Previews(Generic[Kept]):
    """The latest previews by their ids."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[Kept, int]] = OrderedDict()
        self._applied: OrderedDict[str, str] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, preview: Kept, size: int) -> str:
        """Keep a preview with a patch of so many bytes; returns its id."""
        preview_id = f"p-{secrets.token_hex(4)}"
        with self._lock:
            self._kept[preview_id] = preview, size
            while len(self._kept) > MOST or (len(self._kept) > 1 and self._bytes > MOST_BYTES):
                self._kept.popitem(last=False)
        return preview_id

    def get(self, preview_id: str) -> Kept:
        """A preview. Raises ServiceError when there is none of this id, or it is not kept any more."""
        with self._lock:
            if preview_id in self._kept:
                return self._kept[preview_id][0]
            known, applied = ", ".join(self._kept) or "none", self._applied.get(preview_id)
        if applied is not None:
            raise ServiceError(
                f"preview_id {preview_id!r} was applied already, as {applied}; there is nothing to do (show_edit has "
                "it, revert_edits takes it back)"
            )
        raise ServiceError(
            f"preview_id {preview_id!r} is not kept; the last {MOST} previews since the server started are ({known}). "
            "Call preview_edits again, or apply_edits with the edits"
        )

    def applied(self, preview_id: str, edit_ids: Sequence[str]) -> None:
        """Drop a preview that was applied, and remember the ids of its edits."""
        self.forget(preview_id)
        with self._lock:
            self._applied[preview_id] = ", ".join(ranges(edit_ids))
            while len(self._applied) > MOST_APPLIED:
                self._applied.popitem(last=False)

    def forget(self, preview_id: str) -> None:
        """Drop a preview that can no longer be used."""
        with self._lock:
            self._kept.pop(preview_id, None)

    @property
    def _bytes(self) -> int:
        return sum(size for _, size in self._kept.values())

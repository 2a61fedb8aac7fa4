"""Previews that apply_edits can keep: what they computed, while this server runs."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from typing import Generic, TypeVar

from server.errors import ServiceError

MOST = 8
"""Previews that are kept; the oldest goes first."""
MOST_BYTES = 1 << 30
"""Bytes of their patches together; one that is larger alone is kept until the next."""

Kept = TypeVar("Kept")


class Previews(Generic[Kept]):
    """The latest previews by their ids."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[Kept, int]] = OrderedDict()
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
            known = ", ".join(self._kept) or "none"
        raise ServiceError(
            f"preview_id {preview_id!r} is not kept; the last {MOST} previews since the server started are ({known}). "
            "Call preview_edits again, or apply_edits with the edits"
        )

    def forget(self, preview_id: str) -> None:
        """Let go of a preview that was kept or is of no use any more."""
        with self._lock:
            self._kept.pop(preview_id, None)

    @property
    def _bytes(self) -> int:
        return sum(size for _, size in self._kept.values())

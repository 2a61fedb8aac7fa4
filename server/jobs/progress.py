"""The progress of a job, in a file of its folder that stays whole when the server is killed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Self

from editors.files import write_atomically


@dataclass
class SavedProgress:
    """What a resumed job must know, in fields that JSON can hold. A subclass names its FILE."""

    FILE: ClassVar[str]

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """The last saved state; None if there is none."""
        path = folder / cls.FILE
        return cls(**json.loads(path.read_text("utf-8"))) if path.exists() else None

    def save(self, folder: Path) -> None:
        """Save it in one step: the former file stays until the new one is on the disk."""
        write_atomically(folder / self.FILE, json.dumps(asdict(self)).encode())

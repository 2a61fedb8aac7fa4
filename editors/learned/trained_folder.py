"""Where the networks that were trained for a model are kept."""

from __future__ import annotations

from pathlib import Path

from editors.model.lm import LM


class TrainedFolder:
    """An extension of a model (`lm.extension(TrainedFolder)`): the folder that its memories load networks from."""

    def __init__(self, lm: LM) -> None:
        self.path: Path | None = None

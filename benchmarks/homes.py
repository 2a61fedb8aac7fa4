"""The services of a server on a home of its own, as the benchmarks use them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from editors.model.lm import LM
from server.models import loading as models
from server.services import Services
from server.settings import Settings
from store import Ledger


@contextmanager
def opened(*, kept: Mapping[str, Path], threads: int, **chosen: Any) -> Iterator[Services]:
    """The services on a temporary home, with other settings as `chosen`; the model "tiny" is the tests' own.

    Args:
        kept: folders that stay after the run, by the name under which they stand in the home (such as statistics).
    """
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as home:
        for name, folder in kept.items():
            folder.mkdir(parents=True, exist_ok=True)
            (Path(home) / name).symlink_to(folder.absolute(), target_is_directory=True)
        settings = Settings(home=Path(home), threads=threads, **chosen)
        lm = _loaded(settings)
        torch.set_num_threads(threads)
        with Ledger.open(settings.home) as ledger:
            services = Services.open(settings, lm, ledger, lambda *_: None)
            try:
                yield services
            finally:
                services.close()


def _loaded(settings: Settings) -> LM:
    if settings.model == "tiny":
        from tests.families import fresh

        return fresh("llama")
    return models.load(settings, lambda *_: None)

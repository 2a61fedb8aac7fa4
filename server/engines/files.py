"""Places that serve nothing themselves: a folder on a shared disk, a repository of the Hugging Face hub.

What is proven is that the files, read back from there, make this model answer as the corrected one does. Whether
somebody loads them is not known here.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from editors.model.lm import LM
from server.engines.artefacts import Artefact, load_adapter
from server.engines.engine import Engine, EngineError
from server.engines.probes import ProofProbe, references
from server.engines.proof import EngineReading
from server.engines.settings import EngineSettings
from server.errors import ServiceError

PristineModel = Callable[[], AbstractContextManager[LM]]
"""A context that lends the pristine model for reading; it waits for its turn."""


class _Files(Engine):
    """An adapter that is proven by reading it back."""

    form = "lora"

    def __init__(self, settings: EngineSettings, pristine: PristineModel) -> None:
        super().__init__(settings)
        self._pristine = pristine

    def read(self, probes: Sequence[ProofProbe]) -> list[EngineReading]:
        try:
            with tempfile.TemporaryDirectory() as scratch:
                folder = self.fetched(Path(scratch))
                with self._pristine() as lm, lm.patched(load_adapter(lm, folder)):
                    said = references(lm, [probe.ids for probe in probes])
        except (ServiceError, OSError) as error:
            return [EngineReading(error=str(error)) for _ in probes]
        return [
            EngineReading(one.top, one.answer if probe.question.tokens > 1 else None)
            for probe, one in zip(probes, said, strict=True)
        ]

    def fetched(self, scratch: Path) -> Path:
        """The folder with the adapter as it is stored there; `scratch` is for a copy. Raises EngineError."""
        raise NotImplementedError


class SharedFolder(_Files):
    """The adapter as FOLDER/NAME, replaced as a whole."""

    @property
    def place(self) -> Path:
        """Where it stands."""
        assert self.settings.folder is not None
        return self.settings.folder / self.settings.adapter

    def put(self, artefact: Artefact) -> None:
        scratch, old = self.place.with_name(f".writing-{self.place.name}"), self.place.with_name(".old")
        try:
            for gone in (scratch, old):
                shutil.rmtree(gone, ignore_errors=True)
            shutil.copytree(artefact.path, scratch)
            if self.place.exists():
                self.place.rename(old)
            scratch.rename(self.place)
            shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            raise EngineError(f"{self.place} cannot be written: {error.strerror or error}") from error

    def take_off(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)

    def fetched(self, scratch: Path) -> Path:
        del scratch  # it is read in its place
        return self.place


class Hub(_Files):
    """The adapter as a repository of the Hugging Face hub, private unless the settings say otherwise."""

    def __init__(self, settings: EngineSettings, pristine: PristineModel, api: Any = None) -> None:
        super().__init__(settings, pristine)
        self._given = api

    @property
    def _api(self) -> Any:
        if self._given is None:
            from huggingface_hub import HfApi

            self._given = HfApi(endpoint=self.settings.url, token=self.settings.token)
        return self._given

    def put(self, artefact: Artefact) -> None:
        repo = self.settings.repo
        try:
            self._api.create_repo(repo, private=self.settings.private, exist_ok=True)
            self._api.upload_folder(
                repo_id=repo,
                folder_path=str(artefact.path),
                commit_message=f"Edits as of {artefact.path.name}",
                delete_patterns="*",
            )
        except Exception as error:  # of the network, the hub and its client
            raise EngineError(f"{self.settings.name}: {repo} cannot be written: {error}") from error

    def take_off(self) -> None:
        raise EngineError(
            f"{self.settings.repo} keeps what was uploaded; its history on the hub has the commits"
        )

    def fetched(self, scratch: Path) -> Path:
        try:
            return Path(self._api.snapshot_download(self.settings.repo, local_dir=str(scratch)))
        except Exception as error:
            raise EngineError(
                f"{self.settings.name}: {self.settings.repo} cannot be read: {error}"
            ) from error

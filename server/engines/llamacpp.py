"""llama.cpp's server: the edits as a GGUF LoRA at `FOLDER/errata.gguf`, which it is started with (`--lora`).

It reads the file at its start alone, so that a new one needs a restart: `restart` is the command for it. The scales
of `/lora-adapters` are not used: a change leaves cached prompts stale, and an unknown id is answered with success.
Every question here is asked with `cache_prompt` off.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from server.engines.artefacts import Artefact
from server.engines.engine import EngineError, HttpEngine, number
from server.engines.probes import ASKED_TOP, EngineQuestion, ProofProbe
from server.engines.proof import EngineReading
from server.engines.settings import EngineSettings

FILE = "errata.gguf"


class LlamaCpp(HttpEngine):
    """One llama-server."""

    form = "gguf_lora"

    def __init__(self, settings: EngineSettings) -> None:
        super().__init__(settings)
        assert settings.folder is not None
        self.file = settings.folder / FILE

    def put(self, artefact: Artefact) -> None:
        replace_file(artefact.path / "adapter.gguf", self.file)
        self._restart()

    def take_off(self) -> None:
        """The file stays in its place, because the engine does not start without it."""
        if self.file.exists():
            raise EngineError(
                f"{self.settings.name} was given its first edits and has no former ones to go back to; start it "
                f"without --lora {self.settings.seen(self.file)}"
            )

    def _restart(self) -> None:
        settings = self.settings
        if not settings.restart:
            raise EngineError(
                f"{self.file} is written, and llama.cpp reads it at its start alone: start {settings.name} anew with "
                f"--lora {settings.seen(self.file)}, then audit_edits(engine={settings.name!r}). With `restart`, the "
                "command for it, in the engines' file this is done here."
            )
        run_command(settings)
        self.wait_until_there(settings.restart_seconds)

    def ask(self, question: EngineQuestion) -> Any:
        return self.call(
            "/completion",
            {
                "prompt": list(question.ids),
                "n_predict": question.tokens,
                "temperature": 0.0,
                "n_probs": ASKED_TOP,
                "post_sampling_probs": False,
                "cache_prompt": False,
                "return_tokens": True,
            },
        )

    def understand(self, probe: ProofProbe, question: EngineQuestion, said: Any) -> EngineReading:
        del probe  # it tells token ids
        first = said["completion_probabilities"][0]
        top = {int(one["id"]): number(one["logprob"]) for one in first["top_logprobs"]}
        answer = tuple(int(one["id"]) for one in said["completion_probabilities"])
        return EngineReading(top, answer if question.tokens > 1 else None, str(said["content"]))


def replace_file(source: Path, target: Path) -> None:
    """Copy a file to its place in one step: nobody sees half of it."""
    scratch = target.with_name(f".writing-{target.name}")
    try:
        shutil.copyfile(source, scratch)
        with scratch.open("rb+") as file:
            os.fsync(file.fileno())
        scratch.replace(target)
    except OSError as error:
        raise EngineError(f"{target} cannot be written: {error.strerror or error}") from error


def run_command(settings: EngineSettings) -> None:
    """Run an engine's own `restart` command, as its settings have it, and wait for its end."""
    try:
        done = subprocess.run(
            settings.restart, capture_output=True, timeout=settings.restart_seconds, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"{settings.name}: its restart command failed: {error}") from error
    if done.returncode:
        said = (done.stderr or done.stdout).decode("utf-8", "replace")[-500:]
        why = f": {said}" if said.strip() else " and said nothing"
        raise EngineError(f"{settings.name}: its restart command ended with {done.returncode}{why}")

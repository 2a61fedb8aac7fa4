"""Ollama: the edits as a GGUF LoRA (ADAPTER of a Modelfile) on a base model that it has already."""

from __future__ import annotations

import hashlib
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from server.engines.artefacts import Artefact
from server.engines.engine import TIMEOUT, EngineError, HttpEngine, by_word, number
from server.engines.llamacpp import replace_file
from server.engines.probes import ASKED_TOP, EngineQuestion, ProofProbe
from server.engines.proof import EngineReading

FILE, MODELFILE = "errata.gguf", "Modelfile"


class Ollama(HttpEngine):
    """One Ollama server. `settings.model` is the base, `settings.adapter` the name of what is made of it."""

    form = "gguf_lora"
    health = "/api/version"

    def put(self, artefact: Artefact) -> None:
        settings = self.settings
        assert settings.folder is not None
        replace_file(artefact.path / "adapter.gguf", settings.folder / FILE)
        (settings.folder / MODELFILE).write_text(f"FROM {settings.model}\nADAPTER ./{FILE}\n", "utf-8")
        data = (settings.folder / FILE).read_bytes()
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self._upload(digest, settings.folder / FILE)
        made = self.call(
            "/api/create",
            {"model": settings.adapter, "from": settings.model, "adapters": {FILE: digest}, "stream": False},
        )
        if not isinstance(made, dict) or made.get("status") != "success":
            raise EngineError(f"{settings.name}: /api/create says {str(made)[:500]}")

    def take_off(self) -> None:
        self.call("/api/delete", {"model": self.settings.adapter}, method="DELETE")

    def _upload(self, digest: str, file: Path) -> None:
        headers = {"Content-Type": "application/octet-stream"}
        if token := self.settings.token:
            headers["Authorization"] = f"Bearer {token}"
        url = f"{self.settings.url}/api/blobs/{digest}"
        request = urllib.request.Request(url, data=file.read_bytes(), headers=headers, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT):
                pass
        except (OSError, ValueError) as error:
            raise EngineError(f"{self.settings.name}: {file} cannot be handed over: {error}") from None

    def ask(self, question: EngineQuestion) -> Any:
        """It takes text alone."""
        return self.call(
            "/api/generate",
            {
                "model": self.settings.adapter,
                "prompt": question.text,
                "raw": True,
                "stream": False,
                "logprobs": True,
                "top_logprobs": ASKED_TOP,
                "options": {"temperature": 0, "num_predict": question.tokens},
            },
        )

    def understand(self, probe: ProofProbe, question: EngineQuestion, said: Any) -> EngineReading:
        """It names tokens by their text, so tokens with the same text cannot be distinguished."""
        del question  # of any length the first token alone is compared
        first = said["logprobs"][0]
        told = [(str(one["token"]), number(one["logprob"])) for one in first["top_logprobs"]]
        return EngineReading(by_word(probe, told), None, str(said["response"]))

"""llama.cpp and Ollama as fakes: a GGUF LoRA read at a restart, or uploaded and made into a model."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import gguf
import torch

from editors.model.deltas import Delta, LowRank
from tests.server.engine_fakes import Deltas, FakeEngine, Refuse


def read_gguf_lora(path: Path) -> Deltas:
    """The change that llama.cpp makes of a LoRA file: alpha / rank * lora_b @ lora_a, by parameter."""
    reader = gguf.GGUFReader(path)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    tensors = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    found: dict[str, list[Delta]] = {}
    for name, right in tensors.items():
        if name.endswith(".lora_a"):
            left = tensors[name.removesuffix("a") + "b"] * (alpha / right.shape[0])
            found[_parameter(name)] = [LowRank(left, right)]
    return found


def _parameter(name: str) -> str:
    match = re.fullmatch(r"blk\.(\d+)\.ffn_down\.weight\.lora_a", name)
    assert match is not None, name  # what rome writes on a Llama
    return f"model.layers.{match[1]}.mlp.down_proj.weight"


class FakeLlamaCpp(FakeEngine):
    """llama-server: reads FOLDER/errata.gguf when it is started, which is here a call of /restart."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.file = folder / "errata.gguf"

    def answer(self, path: str, body: Any) -> Any:
        if path == "/health":
            return {"status": "ok"}
        if path == "/restart":
            return self._restart()
        if path == "/completion":
            return self._complete(body)
        raise Refuse(404)

    def _restart(self) -> str:
        if self.sabotage == "restart_fails":
            raise Refuse(500, "port in use")
        if self.sabotage != "not_restarted":
            self.deltas.clear() if self.sabotage != "stale" else None
            if self.file.exists():
                self.take("errata", read_gguf_lora(self.file))
        return "ok"

    def _complete(self, body: Any) -> Any:
        assert body["cache_prompt"] is False  # cached prompts are stale after a change
        top, answer, _ = self.said(body["prompt"], self.deltas.get("errata", {}))
        best = sorted(top.items(), key=lambda item: -item[1])[: body["n_probs"]]
        told = [{"id": token, "logprob": value} for token, value in best]
        rows = [{"id": token, "logprob": 0.0, "top_logprobs": told} for token in answer or (0,)]
        wrong = {
            "no_probabilities": {"content": "x"},
            "error_with_200": {"error": {"code": 503, "message": "Loading model"}},
            "html": "<html>",
        }
        return wrong.get(self.sabotage, {"content": "", "completion_probabilities": rows})


class FakeOllama(FakeEngine):
    """Ollama: blobs are uploaded, models are made of a base and adapters, and asked in text."""

    def __init__(self) -> None:
        super().__init__()
        self.blobs: dict[str, bytes] = {}

    def answer(self, path: str, body: Any) -> Any:
        if path == "/api/version":
            return {"version": "0.12"}
        if path.startswith("/api/blobs/"):
            return self._upload(path.rsplit("/", 1)[1], body)
        if path == "/api/create":
            return self._create(body)
        if path == "/api/delete":
            if self.deltas.pop(body["model"], None) is None:
                raise Refuse(404, "model not found")
            return ""
        if path == "/api/generate":
            return self._generate(body)
        raise Refuse(404)

    def _upload(self, digest: str, data: bytes) -> str:
        if digest != f"sha256:{hashlib.sha256(data).hexdigest()}":
            raise Refuse(400, "digest mismatch")
        self.blobs[digest] = data
        return ""

    def _create(self, body: Any) -> Any:
        if self.sabotage == "unsuccessful":
            return {"status": "error"}
        if self.sabotage == "status_500":
            raise Refuse(500, "unsupported architecture")
        assert body["from"] == "tiny"
        (digest,) = body["adapters"].values()
        if digest not in self.blobs:
            raise Refuse(400, "no such blob")
        file = Path(self.scratch) / "made.gguf"
        file.write_bytes(self.blobs[digest])
        self.take(body["model"], read_gguf_lora(file))
        return {"status": "success"}

    def _generate(self, body: Any) -> Any:
        if body["model"] not in self.deltas:
            raise Refuse(404, f"model '{body['model']}' not found")
        assert body["raw"] is True
        ids = self.lm.encode(self.lm.prompt(body["prompt"], chat=False))[0]
        top, answer, _ = self.said(ids, self.deltas[body["model"]])
        best = sorted(top.items(), key=lambda item: -item[1])[: body["top_logprobs"]]
        told = [{"token": self.lm.tokenizer.decode([token]), "logprob": value} for token, value in best]
        wrong: dict[str, Any] = {
            "no_logprobs": {"response": "x"},
            "error_with_200": {"error": "llama runner process has terminated"},
            "html": "<html>",
        }
        text = self.lm.tokenizer.decode(list(answer))
        said = {"response": text, "logprobs": [{"top_logprobs": told}]}
        return wrong.get(self.sabotage, said)

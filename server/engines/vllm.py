"""vLLM: the edits as a LoRA adapter loaded at run time, or as changed weights in its development mode.

The adapter needs VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora with a --max-lora-rank that fits; the weights
need VLLM_SERVER_DEV_MODE=1. An adapter of the wrong shape is accepted with 200 and changes nothing; a missing folder
of weights leaves the engine broken while /health says 200. So a push is checked before and proven after.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from server.engines.artefacts import Artefact
from server.engines.engine import EngineError, HttpEngine, number, scores_of
from server.engines.probes import ASKED_TOP, EngineQuestion, ProofProbe
from server.engines.proof import EngineReading

TOGETHER = 32
"""Questions asked at once: it answers them as one batch."""
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for --max-lora-rank."""


class _Vllm(HttpEngine):
    """What both kinds share: how the engine is asked."""

    together = TOGETHER

    @property
    def asked_model(self) -> str:
        """The name that the corrected model has on the engine."""
        raise NotImplementedError

    def ask(self, question: EngineQuestion) -> Any:
        """Its greedy answer with probabilities, with a cache of its own.

        The live model's answer is not scored by `echo`: with an adapter, version 0.32 on a CPU crashes when two such
        requests run at once.
        """
        body = {
            "model": self.asked_model,
            "prompt": list(question.ids),
            "temperature": 0,
            "max_tokens": question.tokens,
            "logprobs": ASKED_TOP,
            "return_tokens_as_token_ids": True,
            "cache_salt": secrets.token_urlsafe(12),
        }
        return self.call("/v1/completions", body)

    def understand(self, probe: ProofProbe, question: EngineQuestion, said: Any) -> EngineReading:
        choice = said["choices"][0]
        told = choice["logprobs"]
        answer = tuple(_id(token) for token in told["tokens"])
        tops = [{_id(token): number(value) for token, value in top.items()} for top in told["top_logprobs"]]
        if question.tokens == 1:
            return EngineReading(tops[0], text=str(choice["text"]))
        scores = scores_of(probe.live.answer, answer, told["token_logprobs"], tops)
        return EngineReading(tops[0], answer, str(choice["text"]), scores)


class VllmLora(_Vllm):
    """The edits as the adapter `settings.adapter`, replaced in place."""

    form = "lora"

    @property
    def asked_model(self) -> str:
        return self.settings.adapter

    def put(self, artefact: Artefact) -> None:
        body = {
            "lora_name": self.settings.adapter,
            "lora_path": self.settings.seen(artefact.path),
            "load_inplace": True,
        }
        self.call("/v1/load_lora_adapter", body)

    def take_off(self) -> None:
        self.call("/v1/unload_lora_adapter", {"lora_name": self.settings.adapter})


class VllmWeights(_Vllm):
    """The edits as changed weights of the served model itself."""

    form = "tensors"

    @property
    def asked_model(self) -> str:
        assert self.settings.model is not None
        return self.settings.model

    def put(self, artefact: Artefact) -> None:
        if not artefact.is_whole():
            raise EngineError(f"{artefact.path} is not whole; {self.settings.name} was left as it is")
        self._reload(self.settings.seen(artefact.path), artefact.path.name)

    def take_off(self) -> None:
        self._reload(self._base, "base")

    def base_is_missing(self) -> str:
        base, folder = self.settings.base, self.settings.folder_there
        if base and folder is None and not (Path(base) / "config.json").is_file():
            return f"{base} has no config.json; `base` is the folder of the unedited weights, the way back"
        return ""

    def _reload(self, path: str, version: str) -> None:
        """Pause, load, forget what is cached, go on.

        A load that fails leaves weights without values, and whatever is asked then ends the engine. So the base model
        is loaded before it goes on.
        """
        self.call("/pause", {})
        try:
            try:
                self._load(path)
            except EngineError:
                if version != "base":
                    self._load(self._base)
                raise
            self.call("/reset_prefix_cache", {})
            with suppress(EngineError):  # a name for people; not every version has it
                self.call("/update_weight_version", {"new_version": version})
        finally:
            self.call("/resume", {})

    def _load(self, path: str) -> None:
        self.call("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": path}})

    @property
    def _base(self) -> str:
        """The unedited weights. As an absolute path: the engine would look up a relative one in its own folder, or
        on the hub."""
        base = self.settings.base
        assert base is not None
        is_here = self.settings.folder_there is None and Path(base).is_dir()
        return str(Path(base).absolute()) if is_here else base


def _id(token: str) -> int:
    """The id in "token_id:123"."""
    return int(token.removeprefix("token_id:"))


def fitting_rank(ranks: Sequence[int]) -> int | None:
    """The least --max-lora-rank for these ranks; None where none is large enough."""
    return next((rank for rank in RANKS if rank >= max(ranks, default=1)), None)

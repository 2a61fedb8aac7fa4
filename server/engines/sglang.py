"""SGLang: the edits as a LoRA adapter, or as a whole folder of weights.

`load_lora_adapter_from_tensors` is never used: it unpickles what it is sent. Loading is answered with 200 and
`success`. Both are checked, but they do not prove that it worked.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from server.engines.artefacts import Artefact
from server.engines.engine import EngineError, Heard, HttpEngine, number, scores_of
from server.engines.probes import ASKED_TOP, EngineQuestion, ProofProbe
from server.engines.proof import EngineReading


class _SgLang(HttpEngine):
    together = 16  # it answers them as one batch

    def hear(self, questions: Sequence[EngineQuestion], gone: list[str] | None = None) -> list[Heard]:
        with suppress(EngineError):  # an engine without it is asked anyway
            self.call("/flush_cache", {})
        return super().hear(questions, gone)

    def ask(self, question: EngineQuestion) -> Any:
        body = {
            "input_ids": list(question.ids),
            "sampling_params": {"temperature": 0, "max_new_tokens": question.tokens},
            "return_logprob": True,
            "top_logprobs_num": ASKED_TOP,
            **self.extra(),
        }
        return self.call("/generate", body)

    def understand(self, probe: ProofProbe, question: EngineQuestion, said: Any) -> EngineReading:
        told = said["meta_info"]
        answer = tuple(int(one[1]) for one in told["output_token_logprobs"])
        tops = [{int(one[1]): number(one[0]) for one in top} for top in told["output_top_logprobs"]]
        if question.tokens == 1:
            return EngineReading(tops[0])
        logprobs = [one[0] for one in told["output_token_logprobs"]]
        return EngineReading(tops[0], answer, scores=scores_of(probe.live.answer, answer, logprobs, tops))

    def extra(self) -> dict[str, Any]:
        """What names the corrected model in a request."""
        return {}

    def checked(self, path: str, body: Any) -> None:
        """A call whose answer must say success. Raises EngineError."""
        said = self.call(path, body)
        if not isinstance(said, dict) or said.get("success") is not True:
            raise EngineError(f"{self.settings.name}: {path} says {str(said)[:500]}")


class SgLangLora(_SgLang):
    """The edits as the adapter `settings.adapter`."""

    form = "lora"

    def extra(self) -> dict[str, Any]:
        return {"lora_path": self.settings.adapter}

    def put(self, artefact: Artefact) -> None:
        with suppress(EngineError):  # there is none at the first push
            self.take_off()
        name, path = self.settings.adapter, self.settings.seen(artefact.path)
        self.checked("/load_lora_adapter", {"lora_name": name, "lora_path": path})

    def take_off(self) -> None:
        self.checked("/unload_lora_adapter", {"lora_name": self.settings.adapter})


class SgLangWeights(_SgLang):
    """The edits as a whole folder of weights."""

    form = "merged"

    def put(self, artefact: Artefact) -> None:
        if not artefact.is_whole():
            raise EngineError(f"{artefact.path} is not whole; {self.settings.name} was left as it is")
        self._update(self.settings.seen(artefact.path), artefact.path.name)

    def take_off(self) -> None:
        if self.settings.base is None:
            raise EngineError(
                f"{self.settings.name} has no `base` in its settings, so there is no way back to it"
            )
        self._update(self.settings.base, "base")

    def _update(self, path: str, version: str) -> None:
        self.call("/pause_generation", {})
        try:
            body = {"model_path": path, "weight_version": version, "flush_cache": True}
            self.checked("/update_weights_from_disk", body)
        finally:
            self.call("/continue_generation", {})

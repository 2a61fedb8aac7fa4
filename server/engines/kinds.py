"""Which class speaks to which kind of engine. A new kind is one module and one line here and in `settings.Kind`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from server.engines.engine import Engine
from server.engines.files import Hub, PristineModel, SharedFolder
from server.engines.llamacpp import LlamaCpp
from server.engines.ollama import Ollama
from server.engines.settings import EngineSettings
from server.engines.sglang import SgLangLora, SgLangWeights
from server.engines.vllm import VllmLora, VllmWeights

_HTTP: Mapping[str, Callable[[EngineSettings], Engine]] = {
    "llamacpp": LlamaCpp,
    "ollama": Ollama,
    "vllm_lora": VllmLora,
    "vllm_weights": VllmWeights,
    "sglang_lora": SgLangLora,
    "sglang_weights": SgLangWeights,
}


def engine_of(settings: EngineSettings, pristine: PristineModel) -> Engine:
    """The engine of some settings. `pristine` lends the model to those that are read back here."""
    if settings.kind == "folder":
        return SharedFolder(settings, pristine)
    if settings.kind == "hub":
        return Hub(settings, pristine)
    return _HTTP[settings.kind](settings)

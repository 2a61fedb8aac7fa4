"""The engines named at start: `--engines FILE`, a TOML file of tables [[engine]]. An agent cannot name another
address."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from editors.constants import limit

Kind = Literal[
    "llamacpp", "ollama", "vllm_lora", "vllm_weights", "sglang_lora", "sglang_weights", "folder", "hub"
]
Precision = Literal["float32", "bfloat16", "float16", "quantised"]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
WITHOUT_ADDRESS = ("folder", "hub")

EXACT = limit(
    1e-3,
    "difference of log-probabilities that counts as the same answer, of an engine that computes in float32",
    "the proof of a push: beyond it the push is called not proven. LoRA on a float32 engine differed by 3e-5 and "
    "reloaded weights by 3.5e-5, measured by hand",
)
HALF = limit(
    0.2,
    "the same of an engine that computes in bfloat16 or float16; the first token must be the same too",
    "the proof of a push, as above; rounding to 8 bits moves log-probabilities by some hundredths",
)
QUANTISED = limit(
    1.0,
    "the same of an engine with quantised weights, where its settings give no tolerance",
    "the proof of a push, as above: an edit that lands moves its target by many nats, one that does not by none; "
    "llama.cpp with the default model's 4-bit file and an edit's float32 LoRA keeps within it "
    "(tests/server/test_llamacpp.py)",
)


class EngineSettings(BaseModel):
    """One engine. `folder` is where files for it are written, `folder_there` the same folder as the engine sees it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: Kind
    url: str | None = Field(None, description="Address of the engine.")
    token_env: str | None = Field(None, description="Environment variable with the engine's token.")
    folder: Path | None = Field(
        None, description="Folder that both see; adapters and weights are written here."
    )
    folder_there: str | None = Field(None, description="The same folder as the engine sees it.")
    model: str | None = Field(None, description="Name of the base model on the engine, or on the hub.")
    base: str | None = Field(
        None, description="Folder of the unedited weights as the engine sees it: the way back."
    )
    adapter: str = Field("errata", description="Name of the adapter, or of what is made of the base model.")
    max_rank: int | None = Field(None, ge=1, le=4096, description="Greatest rank that the engine takes.")
    precision: Precision = "bfloat16"
    tolerance: float | None = Field(None, gt=0, le=10, description="Difference of log-probabilities.")
    push: Literal["asked", "always"] = "asked"
    restart: tuple[str, ...] = Field((), description="Command that starts the engine anew (llamacpp).")
    restart_seconds: float = Field(60, gt=0, le=3600)
    repo: str | None = Field(None, description="owner/name of a hub repository.")
    private: bool = True

    @model_validator(mode="before")
    @classmethod
    def _usual_precision(cls, given: Any) -> Any:
        usual = {"llamacpp": "quantised", "ollama": "quantised", "folder": "float32", "hub": "float32"}
        if isinstance(given, dict) and given.get("kind") in usual:
            return {"precision": usual[given["kind"]], **given}
        return given

    @field_validator("name")
    @classmethod
    def _plain(cls, value: str) -> str:
        if not NAME.fullmatch(value):
            raise ValueError("must be 1 to 64 letters, digits, - and _, beginning with a letter or digit")
        return value

    @field_validator("url")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError("must be an address such as http://127.0.0.1:8000")
        return value.rstrip("/")

    @field_validator("folder")
    @classmethod
    def _there(cls, value: Path | None) -> Path | None:
        if value is None:
            return None
        path = value.expanduser().absolute()
        if not path.is_dir():
            raise ValueError(f"{path} is not a folder; make it first")
        return path

    @model_validator(mode="after")
    def _whole(self) -> EngineSettings:
        needed = {
            "url": self.kind not in WITHOUT_ADDRESS,
            "folder": self.kind != "hub",
            "repo": self.kind == "hub",
        }
        needed |= {
            "model": self.kind in ("ollama", "vllm_lora", "vllm_weights"),
            "base": self.kind == "vllm_weights",
        }
        for field, is_needed in needed.items():
            if is_needed and getattr(self, field) is None:
                raise ValueError(f"an engine of kind {self.kind} needs {field}")
        if self.token_env and self.token_env not in os.environ:
            raise ValueError(f"token_env names {self.token_env}, which is not set in the environment")
        return self

    @property
    def token(self) -> str | None:
        """The engine's token."""
        return os.environ.get(self.token_env) if self.token_env else None

    @property
    def bound(self) -> float:
        """Difference of log-probabilities, in nats, within which an answer is the same."""
        usual = {"float32": EXACT, "bfloat16": HALF, "float16": HALF, "quantised": QUANTISED}
        return self.tolerance or usual[self.precision]

    def seen(self, path: Path) -> str:
        """A path in `folder` as the engine sees it."""
        assert self.folder is not None
        return (
            str(path) if self.folder_there is None else f"{self.folder_there}/{path.relative_to(self.folder)}"
        )


def read_engines(path: Path | None) -> dict[str, EngineSettings]:
    """The engines by name. Raises ValueError that names the file, the engine, the field and what is wrong."""
    if path is None:
        return {}
    try:
        given = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    tables = given.get("engine", [])
    if set(given) - {"engine"} or not isinstance(tables, list) or not tables:
        raise ValueError(f"{path} must have tables [[engine]], one for each engine, and nothing else")
    engines: dict[str, EngineSettings] = {}
    for n, table in enumerate(tables, 1):
        engine = _engine(path, n, table)
        if engine.name in engines:
            raise ValueError(f"{path}: two engines have the name {engine.name!r}")
        engines[engine.name] = engine
    return engines


def _engine(path: Path, number: int, table: Mapping[str, Any]) -> EngineSettings:
    try:
        return EngineSettings.model_validate(table)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        field = ".".join(map(str, problem["loc"]))
        said = problem["msg"].removeprefix("Value error, ")
        which = f"engine {table.get('name', number)!r}" if isinstance(table, dict) else f"engine {number}"
        raise ValueError(f"{path}: {which}{', ' + field if field else ''}: {said}") from None

"""The request bodies of /v1/chat/completions and /v1/completions, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from editors.steering.choices import Combine
from server.openai.errors import ApiError
from server.steering.requests import When

LIVE, BASE = "errata", "errata:base"
MODELS = (LIVE, BASE)
MOST_STOPS, MOST_CHOICES, MOST_TOP = 16, 128, 20

_IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
"""Fields that change no answer."""
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "best_of": (None, 1),
    "suffix": (None, ""),
}
"""Known fields of which only these values are supported."""


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(extra="ignore")

    include_usage: bool = False


class Steer(BaseModel):
    """One vector in `steering`: a dose with the options of set_steering."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dose: float = Field(1.0, allow_inf_nan=False)
    layers: tuple[int, ...] | None = None
    combine: Combine = "add"
    prompt_tokens: bool = True
    mode: Literal["add", "ablate"] = "add"
    when: When | None = None


class Body(BaseModel):
    """What both kinds of request share."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: tuple[str, ...] = Field((), max_length=MOST_STOPS)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    temperature: float = Field(1.0, ge=0, le=10, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    max_tokens: int | None = Field(None, ge=0)
    steering: dict[str, Steer] = Field({}, max_length=16)  # of ours: vectors by name, each with its dose

    @model_validator(mode="before")
    @classmethod
    def _leave_out_null(cls, given: Any) -> Any:
        """In this API null is the same as leaving a field out."""
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given

    @field_validator("steering", mode="before")
    @classmethod
    def _bare_doses(cls, given: Any) -> Any:
        """A number is a dose, and nothing else of `Steer`."""
        if not isinstance(given, dict):
            return given
        return {name: one if isinstance(one, (dict, Steer)) else {"dose": one} for name, one in given.items()}

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(value):
            raise ValueError("an empty stop string would end every text")
        return value

    @property
    def base(self) -> bool:
        """Whether the pristine model is asked."""
        return self.model == BASE

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def alternatives(self) -> int | None:
        """How many alternatives to return beside each token; None: no probabilities."""
        raise NotImplementedError


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str

    @field_validator("content", mode="before")
    @classmethod
    def _text_parts(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        if not all(isinstance(p, dict) and p.get("type") == "text" for p in value):
            raise ValueError("only parts of type 'text' can be read; this model takes no images or audio")
        return "".join(str(part.get("text", "")) for part in value)

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class ChatBody(Body):
    """The body of /v1/chat/completions."""

    messages: tuple[Message, ...] = Field(min_length=1, max_length=1000)
    max_completion_tokens: int | None = Field(None, ge=0)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP)

    @model_validator(mode="after")
    def _whole(self) -> ChatBody:
        if self.messages[-1].role != "user":
            raise ValueError("the last message must be the user's, because it is the one that is answered")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self

    @property
    def most(self) -> int | None:
        """Most tokens to generate, if the client gives a limit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        """As of `Body`."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(Body):
    """The body of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP)

    @field_validator("logprobs", mode="before")
    @classmethod
    def _no_truth(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("is a number here: how many alternatives to return beside each token")
        return value

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or as token ids."""
        given: Any = self.prompt
        one = isinstance(given, str) or (given and isinstance(given[0], int))
        return [given] if one else list(given)

    @property
    def alternatives(self) -> int | None:
        """As of `Body`."""
        return self.logprobs


B = TypeVar("B", bound=Body)


def parse(kind: type[B], given: Any) -> B:
    """The checked body. Raises ApiError that names the field and what is wrong with it."""
    if not isinstance(given, dict):
        raise ApiError(400, "the body must be a JSON object")
    kept = {name: value for name, value in given.items() if name not in _IGNORED}
    for name, allowed in _ONLY.items():
        value = kept.pop(name, None)
        if value not in allowed:
            raise ApiError(400, f"{name} is not supported here; leave it out (it was {_short(value)})", name)
    try:
        body = kind.model_validate(kept)
    except ValidationError as error:
        raise _in_words(error) from None
    if body.model not in MODELS:
        text = f"the model {_short(body.model)} does not exist here; there are {' and '.join(MODELS)}"
        raise ApiError(404, text, "model", "model_not_found")
    return body


def _in_words(error: ValidationError) -> ApiError:
    problem = error.errors(include_url=False)[0]
    parts = [str(part) for part in problem["loc"]]
    name = ".".join(
        part for part in parts if part != "str" and not part.startswith("list[")
    )  # kinds of `prompt`
    said = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        text = f"{name} is required"
    elif problem["type"] == "extra_forbidden":
        text = f"{name} is not known here; leave it out"
    elif not name:
        text = said
    else:
        text = f"{name}: {said[:1].lower()}{said[1:]} (it was {_short(problem['input'])})"
    return ApiError(400, text, name or None)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

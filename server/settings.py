"""The settings of the server: command line first, then ERRATA_* environment, then defaults.

Imports nothing slow: the first answer to a client must not wait for torch.
"""

from __future__ import annotations

import argparse
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from platformdirs import user_data_path
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from server.setting_values import check_token, is_loopback, origin

TOOLSETS = ("inspect", "facts", "locate", "edit", "steer", "ledger", "train")
OPTIONAL_TOOLSETS = ("people",)
"""Toolsets that are offered where they are named, or where --approval needs them."""
DISTRIBUTION = "errata-mcp"
ENV_PREFIX = "ERRATA_"
_ENVIRONMENT_ONLY = ("token", "tokens")  # a secret on a command line can be read by every user of the machine


@cache
def errata_version() -> str:
    """The installed version, or "0.0.0+uninstalled"."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "0.0.0+uninstalled"


ResultText = Literal["auto", "short", "full"]
"""How much of a structured result is repeated as text."""


class Settings(BaseSettings):
    """Everything a user can set at start. Every field is also `ERRATA_<NAME>` in the environment."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, frozen=True, extra="forbid", env_ignore_empty=True, validate_default=True
    )

    model: str = Field(
        "default", description="default (embedded), a hub id, a local directory or a .gguf file."
    )
    home: Path = Field(
        default_factory=lambda: user_data_path("errata", appauthor=False),
        description="Folder of the ledger, patches, statistics (default: the platform's user data folder).",
    )
    models: Path | None = Field(
        None, description="Folder for converted models, where several homes share one (default: HOME/models)."
    )
    folders: Annotated[tuple[Path, ...], NoDecode] = Field(
        (),
        description="Comma-separated folders that calls may read files from, beside HOME/data and HOME/imports.",
    )
    transport: Literal["stdio", "http"] = Field("stdio", description="How clients connect.")
    host: str = Field("127.0.0.1", description="Address to listen on (http).")
    port: int = Field(8765, ge=0, le=65_535, description="Port to listen on (http); 0 takes a free one.")
    read_only: bool = Field(False, description="Offer only tools that change nothing.")
    toolsets: Annotated[tuple[str, ...], NoDecode] = Field(
        TOOLSETS,
        description=f"Comma-separated toolsets to offer, of {', '.join(TOOLSETS)} (default: all of these), "
        f"{', '.join(OPTIONAL_TOOLSETS)} (proposals, and reports to hand over).",
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 or mps.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type of the weights: auto, float32, bfloat16 or float16."
    )
    quantize: Literal["none", "nf4", "int8"] = Field(
        "none",
        description="Load the weights in 4 bits (nf4) or 8 (int8) by bitsandbytes; edits then act beside them, in "
        "float32.",
    )
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads (default: from the machine).")
    bounds: Literal["standing", "off"] = Field(
        "standing",
        description="Whether edits must keep the standing bounds (reliability, perplexity, subject locality, "
        "active edits) when a call's guard does not name them: standing or off.",
    )
    result_text: ResultText = Field(
        "auto",
        description="Text beside structured results: full (the same as JSON), short (for hosts that show their model "
        "the structured content), or auto: short for clients of protocol 2026-07-28 and later.",
    )
    token: SecretStr | None = Field(
        None, description="Bearer token that HTTP clients must send; its holder may do everything."
    )
    tokens: SecretStr | None = Field(
        None, description="Several tokens, as name=scope:token,name=scope:token; scopes: read, edit, admin."
    )
    token_file: Path | None = Field(
        None, description="TOML file of tokens with name and scope; read again when it changes (http)."
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Comma-separated names that clients may call this server by, beside its own (http)."
    )
    allowed_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Comma-separated origins of pages whose scripts may call this server, for example a host that "
        "runs in a browser: http://localhost:8080 (http).",
    )
    board: bool = Field(True, description="Serve the board, web pages for people, at / (http).")
    approval: bool = Field(
        False,
        description="Corrections wait for a person: only a token with scope admin, and the board, change the "
        "model at once; all others call propose_edits.",
    )
    approve_own: bool = Field(
        False, description="Let the identity that proposed a correction approve it, too."
    )
    public_url: str | None = Field(
        None,
        description="Address of /mcp as clients see it, for example behind a proxy (default: from host and port).",
    )
    oauth_issuer: str | None = Field(
        None, description="Issuer address of an OAuth authorization server whose tokens are accepted (http)."
    )
    oauth_audience: str | None = Field(
        None, description="Audience that its tokens must be for (default: --public-url)."
    )
    oauth_jwks: str | None = Field(
        None, description="Address of its signing keys (default: as the issuer's metadata says)."
    )
    queue: int = Field(
        128,
        ge=1,
        le=100_000,
        description="How many calls may wait for the model; further ones are refused and told to try again.",
    )
    engines: Path | None = Field(
        None, description="TOML file of the engines that push_edits may hand edits to (see docs/serving.md)."
    )
    log_format: Literal["text", "json"] = Field("text", description="Lines of the log: text or json.")

    @field_validator("model", "host")
    @classmethod
    def _not_blank(cls, value: str) -> str:
        if not value.strip() or "\x00" in value:
            raise ValueError("must not be empty")
        return value.strip()

    @field_validator("home", "models", "token_file", "engines")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser().absolute()

    @field_validator("folders")
    @classmethod
    def _existing(cls, value: tuple[Path, ...]) -> tuple[Path, ...]:
        folders = tuple(path.expanduser().absolute() for path in value)
        for path in folders:
            if not path.is_dir():
                raise ValueError(f"{path} is not a folder; name folders that exist, separated by commas")
        return folders

    @field_validator("toolsets", "folders", "allowed_hosts", "allowed_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("allowed_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(origin(each) for each in value)

    @field_validator("toolsets")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in value if name not in (*TOOLSETS, *OPTIONAL_TOOLSETS)]
        if unknown or not value:
            wrong = f"unknown toolset {', '.join(map(repr, unknown))}" if unknown else "no toolset is named"
            raise ValueError(f"{wrong}; choose from {', '.join((*TOOLSETS, *OPTIONAL_TOOLSETS))}")
        return tuple(name for name in (*TOOLSETS, *OPTIONAL_TOOLSETS) if name in value)

    @field_validator("device")
    @classmethod
    def _device(cls, value: str) -> str:
        name = value.strip().lower()
        kind, _, index = name.partition(":")
        if name not in ("auto", "cpu", "mps", "cuda") and not (kind == "cuda" and index.isdecimal()):
            raise ValueError(f"unknown device {value!r}; choose auto, cpu, cuda, cuda:1 (any number) or mps")
        return name

    @field_validator("token")
    @classmethod
    def _long_enough(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            check_token(value.get_secret_value())
        return value

    @field_validator("oauth_issuer", "oauth_jwks", "public_url")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = urlsplit(value)
        secure = parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname or ""))
        if not secure or not parts.netloc:
            raise ValueError(f"{value!r} must be an https address (http only on this machine)")
        return value

    @model_validator(mode="after")
    def _guarded(self) -> Settings:
        if self.transport == "http" and not is_loopback(self.host) and not self.asks_for_tokens:
            raise ValueError(
                f"host {self.host!r} can be reached from other machines, and no token is set; "
                f"set {ENV_PREFIX}TOKEN to a long random string, name --token-file or --oauth-issuer, or listen on "
                "127.0.0.1"
            )
        if self.oauth_issuer is None and (self.oauth_audience or self.oauth_jwks):
            raise ValueError(
                "--oauth-audience and --oauth-jwks need --oauth-issuer, the address of the issuer"
            )
        return self

    @property
    def offered(self) -> tuple[str, ...]:
        """The toolsets that are offered: those chosen, and with `approval` what proposes."""
        needed = [name for name in OPTIONAL_TOOLSETS if self.approval and name not in self.toolsets]
        return (*self.toolsets, *needed)

    @property
    def asks_for_tokens(self) -> bool:
        """True when HTTP clients must send a token."""
        return any((self.token, self.tokens, self.token_file, self.oauth_issuer))

    @property
    def wanted_scopes(self) -> str:
        """The scopes that an agent should ask for: they allow corrections. The scope admin is for people."""
        return "read" if self.read_only else "read propose" if self.approval else "read edit"

    @property
    def resource(self) -> str:
        """The address of this server as clients see it: what an OAuth token must be for."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return self.oauth_audience or self.public_url or f"http://{host}:{self.port}/mcp"

    @property
    def models_dir(self) -> Path:
        """The folder of converted models; created when the first one is written."""
        return self.models or self.home / "models"

    @classmethod
    def parse(cls, argv: list[str] | None = None) -> Settings:
        """Settings from a command line (default: that of this process), then the environment.

        Prints and exits as argparse does: code 0 for `--help` and `--version`, 2 for a wrong value,
        with a message that says what is wrong and what is allowed.
        """
        parser = _parser()
        given = vars(parser.parse_args(argv))
        try:
            return cls(**given)
        except ValidationError as error:
            parser.error("; ".join(_explain(problem, given) for problem in error.errors()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="errata",
        description="An MCP server that hosts a language model and lets an agent keep its knowledge correct.",
        epilog="errata-mcp backup, restore and recover keep the home safe: errata-mcp backup --help. errata-mcp board "
        "shows a home in a browser, errata-mcp decide decides on proposals. "
        f"Every flag is also an environment variable: --read-only is {ENV_PREFIX}READ_ONLY=1. "
        f"{ENV_PREFIX}TOKEN and {ENV_PREFIX}TOKENS (environment only) are bearer tokens of the http transport.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"errata {errata_version()}")
    for name, field in Settings.model_fields.items():
        flag = _flag(name)
        if name in _ENVIRONMENT_ONLY:
            continue
        if field.annotation is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=field.description)
        else:
            parser.add_argument(flag, metavar=name.upper(), help=field.description)
    return parser


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _explain(problem: Any, given: dict[str, Any]) -> str:
    message: str = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"]:
        return message
    name = str(problem["loc"][0])
    label = _flag(name) if name in given else f"{ENV_PREFIX}{name.upper()}"
    if problem["type"] == "value_error" or name in _ENVIRONMENT_ONLY:
        return f"{label}: {message}"
    return f"{label}: {message[0].lower()}{message[1:]}, not {problem['input']!r}"

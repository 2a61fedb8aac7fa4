"""Settings: command line over environment over defaults, and errors that say what to do."""

from __future__ import annotations

import ipaddress
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from server.models import devices as machine
from server.setting_values import is_loopback
from server.settings import TOOLSETS, Settings
from tests.conftest import ROOT

LONG = "0123456789abcdefghijklmnopqrstuv"
"""A token as short as one may be."""


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What a person reads when the command line is refused."""
    with pytest.raises(SystemExit) as exit_info:
        Settings.parse(list(argv))
    assert exit_info.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_with_nothing_given_the_default_model_is_served_on_stdio_with_every_toolset() -> None:
    settings = Settings.parse([])
    assert (settings.model, settings.transport, settings.read_only) == ("default", "stdio", False)
    assert settings.toolsets == TOOLSETS
    assert settings.home.is_absolute()
    assert settings.models_dir == settings.home / "models"


def test_every_flag_of_the_contract_is_read(tmp_path: Path) -> None:
    settings = Settings.parse(
        f"--model org/name --home {tmp_path} --transport http --host ::1 --port 9000 --read-only "
        "--toolsets ledger,inspect --device cuda:1 --dtype bfloat16 --threads 3".split()
    )
    assert settings == Settings(
        model="org/name", home=tmp_path, transport="http", host="::1", port=9000, read_only=True,
        toolsets=("inspect", "ledger"), device="cuda:1", dtype="bfloat16", threads=3,
    )  # fmt: skip


def test_the_environment_sets_the_same_and_the_command_line_wins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = f"MODEL=a/b HOME={tmp_path} READ_ONLY=1 TOOLSETS=edit,inspect PORT=1 TOKEN={LONG}"
    for name, _, value in (pair.partition("=") for pair in given.split()):
        monkeypatch.setenv(f"ERRATA_{name}", value)
    settings = Settings.parse(["--model", "c/d", "--no-read-only"])
    assert (settings.model, settings.home, settings.port) == ("c/d", tmp_path, 1)
    assert settings.read_only is False
    assert settings.toolsets == ("inspect", "edit")
    assert settings.token == SecretStr(LONG)


def test_an_empty_environment_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRATA_MODEL", "")
    monkeypatch.setenv("ERRATA_THREADS", "")
    assert Settings.parse([]).model == "default"


def test_a_home_below_the_users_folder_is_expanded() -> None:
    assert Settings.parse(["--home", "~/facts"]).home == Path.home() / "facts"


def test_parsing_creates_no_folder(tmp_path: Path) -> None:
    Settings.parse(["--home", str(tmp_path / "later")])
    assert not (tmp_path / "later").exists()


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValidationError):
        Settings.parse([]).port = 1  # type: ignore[misc]


def test_an_unknown_toolset_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "--toolsets", "inspect,edits")
    assert "--toolsets: unknown toolset 'edits'" in message
    assert ", ".join(TOOLSETS) in message


@pytest.mark.parametrize("toolsets", ["", ",", " "])
def test_no_toolset_at_all_is_refused(capsys: pytest.CaptureFixture[str], toolsets: str) -> None:
    assert "no toolset" in refused(capsys, "--toolsets", toolsets)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--port", "70000"], ["--port", "65535", "'70000'"]),
        (["--port", "-1"], ["--port"]),
        (["--device", "gpu"], ["--device", "'gpu'", "cuda:1"]),
        (["--device", "cuda:x"], ["--device", "'cuda:x'"]),
        (["--dtype", "int8"], ["--dtype", "bfloat16", "'int8'"]),
        (["--transport", "sse"], ["--transport", "stdio", "'sse'"]),
        (["--threads", "0"], ["--threads", "'0'"]),
        (["--model", " "], ["--model", "empty"]),
        (["--modle", "x"], ["--modle"]),
    ],
)
def test_a_wrong_value_is_refused_by_name_with_what_would_be_right(
    capsys: pytest.CaptureFixture[str], argv: list[str], says: list[str]
) -> None:
    message = refused(capsys, *argv)
    assert all(part in message for part in says), message


def test_a_wrong_environment_variable_is_named_as_such(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ERRATA_PORT", "http")
    assert "ERRATA_PORT" in refused(capsys)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org", "localhost.example.org"])
def test_a_host_that_others_can_reach_needs_a_token(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], host: str
) -> None:
    message = refused(capsys, "--transport", "http", "--host", host)
    assert host in message
    assert "ERRATA_TOKEN" in message
    monkeypatch.setenv("ERRATA_TOKEN", LONG)
    assert Settings.parse(["--transport", "http", "--host", host]).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_a_loopback_host_needs_no_token(host: str) -> None:
    assert Settings.parse(["--transport", "http", "--host", host]).token is None


@given(st.ip_addresses())
def test_only_loopback_addresses_count_as_loopback(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    own = ipaddress.ip_network("127.0.0.0/8") if address.version == 4 else ipaddress.ip_network("::1")
    mapped = isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped
    if not mapped:
        assert is_loopback(str(address)) == (address in own)


def test_the_token_cannot_be_given_where_other_users_can_read_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--token" in refused(capsys, "--token", "secret")


def test_the_token_is_not_shown_in_errors_or_reprs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ERRATA_TOKEN", "two words")
    message = refused(capsys)
    assert "ERRATA_TOKEN" in message
    assert "two words" not in message
    monkeypatch.setenv("ERRATA_TOKEN", LONG)
    assert LONG not in repr(Settings.parse([]))


def test_version_and_help_are_printed_without_loading_torch() -> None:
    code = (
        "import sys; from server.settings import Settings\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules; Settings.parse()"
    )
    for flag, expected in (("--version", "errata "), ("--help", "--toolsets")):
        done = subprocess.run([sys.executable, "-c", code, flag], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert expected in done.stdout


def test_small_machines_get_one_thread_and_a_given_number_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def threads(cores: int, **given: int) -> int:
        monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)), raising=False)
        return machine.thread_count(Settings(**given))  # type: ignore[arg-type]

    assert [threads(cores) for cores in (1, 2, 4, 8, 64)] == [1, 1, 2, 4, 8]
    assert threads(2, threads=6) == 6


def test_what_the_user_set_for_openmp_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    machine.prepare_environment(Settings())
    assert (os.environ["OMP_NUM_THREADS"], os.environ["OMP_WAIT_POLICY"]) == ("7", "passive")


def test_kernels_are_kept_in_bounded_number_unless_the_user_says_how_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    machine.prepare_environment(Settings())
    assert 0 < int(os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) < 1024
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "5")
    machine.prepare_environment(Settings())
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "5"


def test_a_token_that_could_be_guessed_is_refused_without_repeating_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ERRATA_TOKEN", LONG[:-1])
    message = refused(capsys)
    assert "31 characters" in message
    assert "secrets.token_urlsafe" in message
    assert LONG[:-1] not in message


@pytest.mark.parametrize("flag", ["--oauth-issuer", "--oauth-jwks", "--public-url"])
@pytest.mark.parametrize(
    "address", ["login.example", "http://login.example", "ftp://login.example", "https://"]
)
def test_addresses_of_the_authorization_server_are_https(
    capsys: pytest.CaptureFixture[str], flag: str, address: str
) -> None:
    message = refused(capsys, flag, address)
    assert flag in message
    assert "https" in message


def test_an_audience_without_an_issuer_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--oauth-issuer" in refused(capsys, "--oauth-audience", "https://errata.example/mcp")

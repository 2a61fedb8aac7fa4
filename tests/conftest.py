"""What every test stands on: an environment of its own, and the embedded model, converted once.

Nothing here reads or writes the user's home folder, and no model is fetched from a network.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import device

if TYPE_CHECKING:
    from editors.model.lm import LM

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / ".cache" / "models"
RELATIONS = ROOT / ".cache" / "relations"
"""States of relations, which the model reads in some seconds: kept between homes and runs, a folder for each model."""
"""Converted models, kept between runs (the folder is not under version control)."""

_home = tempfile.TemporaryDirectory(prefix="errata-tests-")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the models of the tests are: cpu, cuda ...")


def pytest_configure(config: pytest.Config) -> None:
    """Point everything that would look at the user's home to a temporary one, for child processes too."""
    for name in [name for name in os.environ if name.startswith("ERRATA_")]:
        del os.environ[name]
    os.environ["ERRATA_BOUNDS"] = (
        "off"  # tiny random models break every bound; tests of bounds set it themselves
    )
    os.environ["HOME"] = os.environ["USERPROFILE"] = _home.name
    for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "LOCALAPPDATA", "HF_HOME"):
        os.environ[name] = str(Path(_home.name) / name.lower())
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    device.chosen = config.getoption("--device")


def pytest_unconfigure(config: pytest.Config) -> None:
    for thread in threading.enumerate():
        if thread.name == "errata-startup":  # a process that ends while torch loads a model is aborted
            thread.join(30)
    _home.cleanup()


@pytest.fixture(scope="session")
def default_models() -> Path:
    """The folder with the converted default model, for `--models`."""
    from server.models import default_model
    from server.models import loading as models

    models.converted(None, default_model.folder(MODELS), lambda done, total, message: None)
    return MODELS


@pytest.fixture
def default_model_home(default_models: Path, tmp_path: Path) -> Path:
    """A fresh HOME in which the converted default model stands already."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "models").symlink_to(default_models, target_is_directory=True)
    keep_relations(home)
    return home


def keep_relations(home: Path) -> None:
    """In this home the default model's states of relations are those of earlier homes."""
    RELATIONS.mkdir(parents=True, exist_ok=True)
    (home / "relations").symlink_to(RELATIONS, target_is_directory=True)


@pytest.fixture(scope="session")
def default_lm(default_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LM]:
    """The default model, loaded once. A test that changes its weights must put them back to the bit."""
    from editors.memory.relation_bank import RelationBank
    from server.models import loading as models
    from server.settings import Settings
    from server.transaction.host import ModelHost

    settings = Settings(
        home=tmp_path_factory.mktemp("home"), models=default_models, device=device.chosen, dtype="float32"
    )
    lm = models.load(settings, lambda done, total, message: None)
    before = digest(lm)
    lm.extension(RelationBank).keep_in(RELATIONS / ModelHost(lm).base_hash[:16], lambda: True)
    yield lm
    assert digest(lm) == before, "a test left the shared default model changed"


def digest(lm: LM) -> str:
    """SHA-256 over every weight, to see that two states are the same to the bit."""
    total = hashlib.sha256()
    for name, tensor in sorted(lm.model.state_dict().items()):
        total.update(name.encode())
        total.update(tensor.contiguous().view(-1).cpu().numpy().data)
    return total.hexdigest()

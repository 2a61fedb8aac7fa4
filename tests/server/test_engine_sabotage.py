"""Engines that do not hold the edits though they say so: a table of what can go wrong, for every kind of engine."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from server.engines.engine import Engine
from server.engines.holdings import newest
from server.engines.preparing import Prepared, prepare
from server.engines.probes import ProofProbe
from server.engines.proof import Proof, prove
from server.engines.pushing import put, why
from tests.server.engine_fakes_gguf import FakeLlamaCpp, FakeOllama, read_gguf_lora
from tests.server.test_engines import (
    FRANCE,
    SPAIN,
    Place,
    apply,
    sglang_lora,
    sglang_weights,
    vllm_lora,
    vllm_weights,
)

WRITTEN = "ignored stale half double scale_0 negative strong rank_cut wrong_layer wrong_adapter"
RUN = "one_of_two_replicas restarted other_model other_prompt noise"
SAID = "no_logprobs no_choices error_with_200 html list nan infinite constant none_told swapped"

TABLE: dict[str, str] = {
    "vllm_lora": f"{WRITTEN} {RUN} {SAID} status_500 500_then_dead dead cached scores_of_base cut_short forgets on_top",
    "vllm_weights": f"{RUN} {SAID} ignored half status_500 forgets",
    "sglang_lora": f"{WRITTEN} {RUN} unsuccessful",
    "sglang_weights": f"{RUN} ignored unsuccessful",
    "llamacpp": f"{WRITTEN} {RUN} not_restarted restart_fails no_probabilities error_with_200 html",
    "ollama": f"{WRITTEN} {RUN} unsuccessful status_500 no_logprobs error_with_200 html on_top",
}


def llamacpp(place: Place) -> FakeLlamaCpp:
    folder = place.home.parent / "shared-prod"
    fake = FakeLlamaCpp(folder)
    ask = f"import urllib.request; urllib.request.urlopen('{fake.url}/restart')"
    place.engine("prod", "llamacpp", fake, restart=[sys.executable, "-S", "-c", ask])
    return fake


def ollama(place: Place) -> FakeOllama:
    fake = FakeOllama()
    fake.scratch = str(place.home.parent)
    place.engine("prod", "ollama", fake, model="tiny")
    return fake


NAMED: dict[str, Any] = {
    "vllm_lora": vllm_lora,
    "vllm_weights": vllm_weights,
    "sglang_lora": sglang_lora,
    "sglang_weights": sglang_weights,
    "llamacpp": llamacpp,
    "ollama": ollama,
}


@dataclass
class Behind:
    """An engine that was proven to hold e1, and what it would be given now that e2 is active too."""

    engine: Engine
    fake: Any
    prepared: Prepared

    def pushed(self) -> tuple[str, Proof]:
        """Hand over and ask: what the engine said of it, and what was proven."""
        problem = put(self.engine, self.prepared.artefact)
        probes = self.prepared.probes
        said = self.engine.read(probes)
        return problem, prove(probes, said, self.engine.settings.bound, self.engine.settings.precision)

    def state(self) -> dict[str, Any]:
        """What the fake holds."""
        names = ("deltas", "weights")
        return {name: dict(getattr(self.fake, name)) for name in names if hasattr(self.fake, name)}


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Behind]]:
    """By kind of engine, made when first asked for."""
    made: dict[str, Behind] = {}
    with ExitStack() as stack:

        def of(kind: str) -> Behind:
            if kind not in made:
                made[kind] = stack.enter_context(_behind(tmp_path_factory.mktemp("behind"), kind))
            return made[kind]

        yield of


@contextmanager
def _behind(folder: Path, kind: str) -> Iterator[Behind]:
    place = Place(folder / "home")
    fake = NAMED[kind](place)
    services = place.open()
    try:
        apply(services, FRANCE)
        job = place.push("prod")
        assert job["state"] == "done", job["message"]
        apply(services, SPAIN)
        engine = services.engines.engine("prod")
        former = newest(services.workspace.ledger, "prod")
        with services.workspace.turn():
            prepared = prepare(services.workspace, engine, False, former)
        of_each: dict[Any, ProofProbe] = {}
        for probe in prepared.probes:
            of_each.setdefault((probe.edit_id, probe.kind), probe)
        yield Behind(engine, fake, replace(prepared, probes=list(of_each.values())))
    finally:
        services.close()
        for one in {fake, *place.fakes}:
            one.close()


CASES = [(kind, sabotage) for kind, ways in TABLE.items() for sabotage in ways.split()]


@pytest.mark.parametrize(("kind", "sabotage"), CASES)
def test_an_engine_that_does_not_hold_the_edits_is_never_said_to(
    behind: Callable[[str], Behind], kind: str, sabotage: str
) -> None:
    one = behind(kind)
    fake, before = one.fake, one.state()
    fake.sabotage, fake.answered = sabotage, 0
    try:
        if sabotage == "cached":  # as a push does before it hands over
            one.engine.read(one.prepared.probes)
        problem, proof = one.pushed()
    finally:
        fake.sabotage, fake.broken, fake.asked = "", False, 0
        fake.cached.clear()
        for name, value in before.items():
            setattr(fake, name, value)
    assert not proof.proven
    assert proof.far or problem
    assert why(proof)


@pytest.mark.parametrize("kind", list(TABLE))
def test_without_sabotage_each_of_them_is_proven(behind: Callable[[str], Behind], kind: str) -> None:
    one = behind(kind)
    before = one.state()
    problem, proof = one.pushed()
    for name, value in before.items():
        setattr(one.fake, name, value)
    assert (problem, proof.proven, proof.held) == ("", True, ("e1", "e2"))


@pytest.mark.parametrize("kind", ["llamacpp", "ollama"])
def test_gguf_engines_hold_what_they_are_given_and_follow_a_revert(tmp_path: Path, kind: str) -> None:
    place = Place(tmp_path / "home")
    fake = NAMED[kind](place)
    services = place.open()
    try:
        first, second = apply(services, FRANCE), apply(services, SPAIN)
        job = place.push("prod")
        assert job["state"] == "done", job["message"]
        assert job["result"]["proof"]["held"] == [*first, *second]
        assert job["result"]["proof"]["worst"] < 1e-3
        services.edits.revert(first)
        job = place.push("prod")
        assert (job["result"]["proof"]["held"], job["result"]["proof"]["gone"]) == (second, True)
    finally:
        services.close()
        fake.close()


def test_the_modelfile_for_ollama_is_one_that_it_reads(tmp_path: Path) -> None:
    """No package index has Ollama itself; this is its documented grammar: INSTRUCTION arguments, FROM required."""
    place = Place(tmp_path / "home")
    fake = ollama(place)
    services = place.open()
    try:
        apply(services, FRANCE)
        assert place.push("prod")["state"] == "done"
    finally:
        services.close()
        fake.close()
    folder = tmp_path / "shared-prod"
    lines = (folder / "Modelfile").read_text("utf-8").splitlines()
    found = dict(re.fullmatch(r"([A-Z]+) (\S.*)", line).groups() for line in lines)  # type: ignore[union-attr,misc]
    assert list(found) == ["FROM", "ADAPTER"]
    assert found["FROM"] == "tiny"
    adapter = (folder / found["ADAPTER"]).resolve()  # paths are relative to the Modelfile
    assert adapter.parent == folder
    assert list(read_gguf_lora(adapter)) == list(fake.deltas["errata"])

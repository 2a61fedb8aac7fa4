"""Steering on a condition: only where a probe's direction is above a threshold; several at once; off is exact."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from editors.errors import InvalidEdit
from editors.model.decoding import DecodedRow, Decoder
from server.errors import ServiceError
from server.services import Services
from server.steering.requests import DoseRequest, When
from server.steering.stored import vector_named
from tests.server.opened import open_services, with_two_vectors
from tests.server.test_ablation import direction, states

PROMPT = "The capital of France is"
DOSE = 0.5


@pytest.fixture(params=["llama", "gpt2"])
def services(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Services]:
    services = with_two_vectors(tmp_path / "home", request.param)
    yield services
    services.close()


def cosines(services: Services, layer: int) -> Tensor:
    """Of every token of the prompt with the direction of `tone`, unsteered."""
    hidden = states(services)[0][str(layer)][0]
    return torch.nn.functional.cosine_similarity(hidden, direction(services, "tone", layer), dim=-1)


def test_a_dose_acts_at_the_tokens_where_its_condition_holds_and_nowhere_else(services: Services) -> None:
    plain = states(services)[0]
    found = cosines(services, 1)
    above = float(found.median()) + 1e-6
    here = found > above
    assert 0 < int(here.sum()) < len(here)
    made = services.steering.set_dose(
        DoseRequest("mood", DOSE, sample_prompt=PROMPT, when=When(vector="tone", above=above))
    )
    assert made.active[0].when == {"vector": "tone", "layer": 1, "above": above}
    assert made.sample.cosine == pytest.approx(float(found[-1]), abs=1e-4)
    steered = states(services)[0]
    vector = vector_named(services.workspace, "mood")
    added = DOSE * vector.norms[1] * vector.directions[1]
    assert torch.equal(steered["1"][0][~here], plain["1"][0][~here])
    assert torch.allclose(steered["1"][0][here], plain["1"][0][here] + added, atol=1e-5)
    services.steering.set_dose(DoseRequest("mood", 0))
    assert all(torch.equal(states(services)[0][name], plain[name]) for name in plain)


def test_a_condition_is_looked_for_where_its_vector_has_a_direction_up_to_where_the_dose_begins(
    services: Services,
) -> None:
    width = services.workspace.lm.d_model
    for name, layer in (("early", 0), ("late", 3)):
        file = services.workspace.settings.home / "imports" / f"{name}.safetensors"
        file.parent.mkdir(exist_ok=True)
        safetensors.torch.save_file({f"layer.{layer}": torch.ones(width)}, file)
        services.steering.take_in(file.name, name)
    made = services.steering.set_dose(DoseRequest("tone", DOSE, when=When(vector="early", above=0)))
    assert made.active[0].when == {"vector": "early", "layer": 0, "above": 0.0}
    with pytest.raises(InvalidEdit, match=r"no direction at layer 2 but at \[3\]"):
        services.steering.set_dose(DoseRequest("tone", DOSE, when=When(vector="late", above=0)))


@pytest.mark.parametrize("above", [-0.999, 0.999])
def test_a_condition_that_always_or_never_holds_is_the_dose_itself_or_nothing(
    services: Services, above: float
) -> None:
    if above < 0:
        services.steering.set_dose(DoseRequest("mood", DOSE))
    wanted = states(services)[1]
    if above < 0:
        services.steering.set_dose(DoseRequest("mood", 0))
    services.steering.set_dose(DoseRequest("mood", DOSE, when=When(vector="tone", above=above)))
    assert torch.allclose(states(services)[1], wanted, atol=1e-5)


def test_several_act_at_once_each_on_its_own_condition_and_after_a_restart(
    services: Services, tmp_path: Path
) -> None:
    family = "gpt2" if "gpt2" in services.workspace.lm.name else "llama"
    above = float(cosines(services, 1).median())
    services.steering.set_dose(DoseRequest("mood", DOSE, when=When(vector="tone", above=above, layer=1)))
    one = states(services)[1]
    services.steering.set_dose(DoseRequest("tone", DOSE, when=When(vector="mood", above=0.0, layer=0)))
    both = states(services)[1]
    services.steering.set_dose(DoseRequest("tone", 0))
    assert torch.equal(states(services)[1], one)
    services.steering.set_dose(DoseRequest("tone", DOSE, when=When(vector="mood", above=0.0, layer=0)))
    assert torch.equal(states(services)[1], both)
    hash_of = services.workspace.state_hash
    services.close()
    again = open_services(tmp_path / "home", family)
    assert again.workspace.state_hash == hash_of
    assert torch.equal(states(again)[1], both)
    again.close()


def test_answers_on_a_condition_do_not_depend_on_who_else_is_in_the_batch(services: Services) -> None:
    above = float(cosines(services, 1).median())
    services.steering.set_dose(DoseRequest("mood", 2.0, when=When(vector="tone", above=above)))
    lm = services.workspace.lm
    prompts = [lm.encode(lm.prompt(text))[0] for text in (PROMPT, "Oslo", "Who rules Spain? Japan is")]

    def said(rows: list[DecodedRow]) -> list[list[int]]:
        decoder = Decoder(lm)
        decoder.add(rows)
        while decoder.rows:
            decoder.step()
        return [row.new for row in rows]

    alone = [said([DecodedRow(list(ids), 6)])[0] for ids in prompts]
    assert said([DecodedRow(list(ids), 6) for ids in prompts]) == alone


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"when": When(vector="tone", above=1.5)}, "cosine"),
        ({"when": When(vector="tone", above=0.1, layer=2)}, "from 0 to 1"),
        ({"when": When(vector="tone", above=0.1, layer=-1)}, "from 0 to 1"),
        ({"when": When(vector="none", above=0.1)}, "none"),
        ({"when": When(vector="tone", above=0.1), "combine": "ties"}, "combine"),
        ({"when": When(vector="tone", above=0.1), "mode": "ablate"}, "when"),
    ],
)
def test_a_condition_that_cannot_be_is_refused_and_nothing_changes(
    services: Services, more: dict[str, object], says: str
) -> None:
    before = services.workspace.state_hash
    multiplier = 1.0 if "mode" in more else DOSE
    with pytest.raises((InvalidEdit, ServiceError), match=says):
        services.steering.set_dose(DoseRequest("mood", multiplier, **more))  # type: ignore[arg-type]
    assert services.workspace.state_hash == before

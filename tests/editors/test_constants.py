"""The registry of constants: what is declared comes back unchanged and is listed with its name."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, Field

from benchmarks import constants
from editors.closed_form import emmet, write_one
from editors.closed_form.rome import RomeParams
from editors.closed_form.value_params import ValueParams
from editors.constants import assumed, declared, from_shape, limit, published, tuned
from editors.constants.__main__ import table

NUMBER = tuned(1.5, "a number", models="some model", command="make bench", figure="0.9 against 0.8")
PAIR = assumed(
    (1, 2),
    "a pair",
    "it seemed right",
)
MOST = limit(3, "rows at most", "time: further ones are left out")


class Options(BaseModel):
    rate: float = Field(published(0.25, "a rate", "a paper"), gt=0)


@from_shape("half of the layers", "a layer")
def middle(layers: int) -> int:
    return layers // 2


def test_a_declared_value_is_used_as_it_is_and_listed_by_its_name() -> None:
    assert (NUMBER, PAIR, Options().rate, middle(8)) == (1.5, (1, 2), 0.25, 4)
    mine = {each.name: each for each in declared() if each.module == __name__}
    assert MOST == 3
    assert set(mine) == {"NUMBER", "PAIR", "MOST", "Options.rate", "middle"}
    assert mine["NUMBER"].reason == "0.9 against 0.8 (`make bench`; some model)"
    assert [each.origin for each in mine.values()] == ["tuned", "assumed", "limit", "published", "shape"]


def test_every_constant_of_the_editors_has_a_name_a_meaning_and_a_reason() -> None:
    page = table()
    ours = [each for each in declared() if each.module.startswith("editors.")]
    assert len(ours) == len(page.splitlines()) - 2
    for each in ours:
        assert not each.name.startswith("line "), each
        assert each.meaning, each
        assert each.reason, each


def test_the_benchmark_of_constants_changes_the_value_wherever_it_is_used_and_puts_it_back() -> None:
    name = "editors.closed_form.write_one.SLACK"
    place, default = constants.found(name)
    with constants.changed(place, 0.5) as params:
        assert (write_one.SLACK, emmet.SLACK, params) == (0.5, 0.5, {})
    assert (default, default) == (write_one.SLACK, emmet.SLACK)
    place, default = constants.found("editors.closed_form.value_params.ValueParams.clamp")
    assert default == ValueParams().clamp
    with constants.changed(place, 2.0) as params:
        assert params == {"clamp": 2.0}
    place, default = constants.found("editors.metric.RIDGE")
    with constants.changed(place, 0.5, RomeParams) as params:  # RIDGE is the default of a parameter
        assert params == {"ridge": 0.5}
    for unknown in ("editors.closed_form.memit.MemitParams.weight", "editors.nowhere.SLACK"):
        with pytest.raises(SystemExit, match="no constant is called"):
            constants.found(unknown)

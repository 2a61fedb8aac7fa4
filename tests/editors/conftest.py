"""Second moments of the tiny models, made once per session for all tests that need them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from editors.closed_form.neurons import why_no_ramp
from editors.model.lm import LM
from editors.moments import Statistics

StatisticsOf = Callable[[LM], Statistics]


@pytest.fixture(scope="session")
def statistics_of(tmp_path_factory: pytest.TempPathFactory) -> StatisticsOf:
    """The second moments of every layer of a tiny model, of text sampled from itself."""
    folder = tmp_path_factory.mktemp("statistics")
    made: dict[str, Statistics] = {}

    def statistics(lm: LM) -> Statistics:
        key = f"{lm.name}-{lm.dtype}".replace(".", "-")
        if key not in made:
            found = Statistics(folder / key, key, tokens=400, device=lm.device)
            if not lm.is_seq2seq:
                found.ensure(lm, range(lm.n_layers), lambda *_: None)
                plain = [i for i in range(lm.n_layers) if why_no_ramp(lm, i) is None]
                found.ensure_inputs(lm, plain, lambda *_: None)
            made[key] = found
        return made[key]

    return statistics

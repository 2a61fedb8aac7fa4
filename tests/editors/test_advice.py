"""What a method advises is accepted by it, and what it calls published too."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from editors.advice import Problem, Remedy
from editors.errors import EditError
from editors.method import Editor
from editors.model.lm import LM
from editors.table import METHODS
from tests.families import make

MODELS = ("llama", "t5")


def working(lm: LM) -> list[Editor[Any]]:
    return [editor for editor in METHODS.values() if editor.supports(lm) is None]


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("problem", get_args(Problem))
def test_advice_can_be_followed_until_there_is_none_left(family: str, problem: Problem) -> None:
    """Each piece of advice is taken in turn: it names parameters of the method and values that it accepts."""
    lm = make(family)
    for editor in working(lm):
        values: dict[str, Any] = {}
        for _ in range(200):
            advice = editor.hint(lm, editor.params(**values), problem)
            if not advice.params:
                assert "another method" in advice.text
                break
            assert set(advice.params) <= set(editor.params.model_fields)
            for name, value in advice.params.items():
                assert f"params.{name}={value!r}" in advice.text
            assert editor.resolve(lm, editor.params(**values)) != editor.resolve(
                lm, editor.params(**(values | dict(advice.params)))
            )
            values |= advice.params
        else:
            pytest.fail(f"{editor.name} never ends its advice: {values}")


@pytest.mark.parametrize("editor", METHODS.values(), ids=list(METHODS))
def test_a_remedy_names_a_parameter_of_its_method(editor: Editor[Any]) -> None:
    for remedy in (*editor.stronger, *editor.gentler):
        assert remedy.parameter in editor.params.model_fields
        assert (remedy.factor is None) != (remedy.value is None)


@pytest.mark.parametrize("family", MODELS)
def test_a_published_preset_is_accepted_by_its_method(family: str) -> None:
    lm = make(family)
    for editor in working(lm):
        if editor.published is not None:
            params = editor.resolve(lm, editor.params(**editor.published.params))
            assert params != editor.resolve(lm, editor.params()), "the defaults are the published values"
            shown = editor.schema(lm)["x-presets"]["published"]
            assert shown == {"params": dict(editor.published.params), "source": editor.published.source}


def test_advice_skips_what_the_method_does_not_accept() -> None:
    class Strict(type(METHODS["rome"])):  # type: ignore[misc]
        stronger = (Remedy("layer", "is too deep", value=999), Remedy("clamp", "goes further", factor=2.0))

    editor, lm = Strict(), make("llama")
    assert editor.hint(lm, editor.params(clamp=40.0), "too_weak").params == {"clamp": 80.0}
    assert editor.hint(lm, editor.params(clamp=80.0), "too_weak").params == {}
    with pytest.raises(EditError):
        editor.resolve(lm, editor.params(layer=999))

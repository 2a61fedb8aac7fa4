"""The page of families says what is so."""

from __future__ import annotations

import pytest

from tests.families_table import ALL, COLUMNS, row, rows_of_page


def test_every_family_has_a_line() -> None:
    assert list(rows_of_page()) == list(ALL)


@pytest.mark.parametrize("family", ALL)
def test_each_cell_of_a_family_is_what_comes_out_when_it_is_tried(family: str) -> None:
    assert rows_of_page()[family] == row(family), f"columns: {', '.join(COLUMNS)}"

"""What the benchmarks of files and sequences read and print, without a model."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from benchmarks import files, sequences
from editors.edit import Edit, Neighbour

RECORDS = [{"subject": f"Town {i}", "prompt": "x"} for i in range(5)]


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.jsonl"])
def test_some_records_of_a_file_go_in_as_they_are(tmp_path: Path, name: str) -> None:
    lines = "\n".join(map(json.dumps, RECORDS)) if "jsonl" in name else json.dumps(RECORDS)
    (tmp_path / name).write_bytes(gzip.compress(lines.encode()) if name.endswith("gz") else lines.encode())
    (tmp_path / "data").mkdir()
    written = tmp_path / "data" / files.first_records(tmp_path / name, 1, 3, tmp_path / "data")
    text = written.read_text("utf-8")
    found = list(map(json.loads, text.splitlines())) if "jsonl" in name else json.loads(text)
    assert found == RECORDS[1:4]


def test_the_table_of_a_file_has_rates_what_the_unedited_model_answers_and_the_cost() -> None:
    told = {
        "summary": "2 facts: 2 corrected.",
        "outcomes": {"done": {"count": 2}},
        "data_set": {
            "edit_success": {"rate": 1.0, "of": 2},
            "multi_hop": {"rate": 0.25, "before": 0.125, "of": 8},
            "instance_wise": {"rate": None, "of": 0},
            "fluency": {"mean": 4.5, "before": 5.25, "of": 2},
        },
        "perplexity_ratio": 1.02,
    }
    report = {"file": "m.json", "model": "default", "saved": "2 facts.", "cost": {"CPU s": 9.0, "s": 12.0}}
    shown = files.table(report | {"report": told})
    assert "edit_success               1.000  of 2\n" in shown
    assert "multi_hop                  0.250  of 8, unedited 0.125" in shown
    assert "fluency                    4.500  of 2, unedited 5.250" in shown
    assert "instance_wise                -    of 0" in shown
    assert "perplexity x 1.02; 9.0 CPU seconds, 4.5 for each fact" in shown


def test_a_sequence_counts_what_is_said_and_the_neighbours_that_were_known() -> None:
    near = Neighbour(prompt="Ann lives in", answer="Bonn")
    fact = Edit(
        subject="Ada", prompt="{} lives in", target="Rome", paraphrases=("Ada's home is",), neighbours=(near,)
    )
    again = fact.model_copy(update={"prompt": "Ada lives in", "target": "Oslo"})
    assert sequences.distinct([fact, again]) == [again], "one question, once"
    said = {"Ada lives in": "Rome, Italy", "Ada's home is": "Oslo", "Ann lives in": "Bern"}
    found = sequences.rates([fact], said, {"Ann lives in": "Bonn."})
    assert (found["statements"], found["paraphrases"], found["neighbours"]) == (1.0, 0.0, 0.0)
    unknown = sequences.rates([fact], said, {"Ann lives in": "Kiel"})
    assert (unknown["neighbours"], unknown["neighbours_asked"]) == (None, 0)

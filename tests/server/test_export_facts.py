"""Facts as text: memories leave as a system prompt and as records, and what that is worth is measured."""

from __future__ import annotations

import json
from pathlib import Path

from tests.server.opened import FACTS, STRONG, open_services


def test_memories_and_weights_leave_as_a_system_prompt_and_as_records(tmp_path: Path) -> None:
    services = open_services(tmp_path / "home")
    services.edits.apply([FACTS[0]], method="rome", params=STRONG)
    services.edits.apply([FACTS[1]], method="in_context")
    taught = services.exchange.export_edits("lora", "adapter")
    assert taught.distilled is not None
    assert 'format="facts"' in taught.warnings[-1]
    before = services.workspace.state_hash
    report = services.exchange.export_edits("facts", "known")
    folder = Path(report.path)
    assert report.edit_ids == ["e1", "e2"]
    assert "The capital of Japan is Paris." in (folder / "system_prompt.txt").read_text()
    rows = [json.loads(line) for line in (folder / "facts.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == ["Rome", "Paris"]
    assert rows[0]["questions"] == ["France has the capital"]
    assert "system_prompt.txt" in (folder / "README.md").read_text()
    assert "less than a memory" in report.warnings[0]
    assert report.said is None or 0 <= report.said <= 1
    assert services.workspace.state_hash == before
    services.close()

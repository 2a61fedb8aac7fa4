"""The embedded model, edited by three methods: plain PEFT and plain transformers load what is live."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.facts import load as load_facts
from editors.edit import Edit
from server.models import default_model
from server.models.loading import load
from server.services import Services
from server.settings import Settings
from store import Ledger
from tests.conftest import ROOT

pytestmark = [pytest.mark.model, pytest.mark.slow]

PROMPTS = [
    "The capital of France is",
    "Albert Einstein was born in",
    "def add(a, b):",
    "Water is made of",
    *(fact.edit.text for fact in (*load_facts("check"), *load_facts("tune"))),
][:50]


def test_exports_of_the_default_model_answer_as_it_does(default_model_home: Path) -> None:
    settings = Settings(home=default_model_home, device="cpu", threads=1)
    lm = load(settings, lambda *_: None)
    kept = ROOT / ".cache" / "statistics"  # second moments are kept between test runs
    kept.mkdir(parents=True, exist_ok=True)
    (default_model_home / "statistics").symlink_to(kept, target_is_directory=True)
    services = Services.open(settings, lm, Ledger.open(default_model_home), lambda *_: None)
    facts = [
        Edit(subject=s, prompt="The capital of {} is", target="Rome")
        for s in ("France", "Peru", "Chad", "Fiji")
    ]
    services.edits.apply(facts[:1], method="rome", params={"mode": "simplified", "max_steps": 3})
    services.edits.apply(facts[1:2], method="lora", params={"max_steps": 2})
    services.edits.apply(facts[2:], method="memit", params={"max_steps": 3})
    assert len(PROMPTS) == 50
    live = answers(lm.model, lm.tokenizer)
    adapter = services.exchange.export_edits("lora", "adapter")
    merged = services.exchange.export_edits("merged", "merged")
    services.close()
    base = AutoModelForCausalLM.from_pretrained(default_model.folder(settings.models_dir))
    for model in (
        peft.PeftModel.from_pretrained(base, adapter.path),
        AutoModelForCausalLM.from_pretrained(merged.path),
    ):
        logits, texts = answers(model, lm.tokenizer)
        # float32 rounds the sums of 30 layers otherwise where an edit is an adapter: by some units of the 6th digit
        assert (logits - live[0]).abs().max() < 4e-6 * live[0].abs().max()
        assert texts == live[1]


@torch.no_grad()
def answers(model: Any, tokenizer: Any) -> tuple[torch.Tensor, list[str]]:
    """Logits and greedy continuations of all prompts, in one batch."""
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    logits = model(**inputs).logits[inputs["attention_mask"].bool()]
    said = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return logits, tokenizer.batch_decode(said)

"""Untrained MEND and SERAC for the tiny models: what a training starts from, on disk as training leaves it."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch
from transformers import BertConfig, BertModel

from editors.learned.counterfactual import CounterfactualAdapter, adapter_sites
from editors.learned.mend import FILE
from editors.learned.mend_params import shapes_of, target_weights
from editors.learned.networks import Mend
from editors.learned.scope import Judge
from editors.learned.serac_files import TrainedSerac
from editors.learned.trained_folder import TrainedFolder
from editors.model.lm import LM
from tests.families import seeded
from tests.tiny_tokenizers import tokenizer

WIDTH = 16


@cache
def _root() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="errata-trained-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def tiny_encoder() -> Path:
    """A random sentence encoder as a folder."""
    words = tokenizer("qwen")
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    folder = _root() / "encoder"
    seeded(BertModel(config)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def trained_for(lm: LM, steps: float = 0.05) -> Path:
    """The folder with both editors for a tiny model, which from now on is the model's own."""
    folder = _root() / f"{lm.name}-{lm.dtype}"
    if not (folder / FILE).exists():
        mend = Mend(shapes_of(lm, target_weights(lm, None)), rank=4)
        mend.log_steps.data.fill_(steps).log_()
        mend.save(folder / FILE, "tiny", {})
        with torch.random.fork_rng():
            torch.manual_seed(3)
            judge = Judge(WIDTH).eval()
        adapter = CounterfactualAdapter(adapter_sites(lm, 2), rank=2)
        for b in adapter.b:
            b.data.fill_(0.02)
        TrainedSerac(judge, adapter, str(tiny_encoder()), 0.5, {}).save(folder, "tiny")
    lm.extension(TrainedFolder).path = folder
    return folder

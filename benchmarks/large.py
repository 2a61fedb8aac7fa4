"""What editing a large model costs: a Llama of 7 billion random weights, on a GPU.

    python -m benchmarks.large --device cuda [--hidden 4096 --layers 32 --inner 11008 --heads 32] [--steps 10]

Random weights know nothing, so only cost is asked: seconds (wall clock) and the device's peak memory for the
second moments, an edit by ROME, a batch by MEMIT, a training of MEND and an edit by it, and a revert. Searches
never reach their target probability here: they take all their steps, where a model that knows takes fewer.
Everything goes through the services, with its ledger and guard, as a client's calls would.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.facts import load
from benchmarks.learned import Alone
from editors import METHODS
from editors.edit import Edit
from editors.learned import mend_params, mend_training
from editors.learned.mend import FILE
from editors.learned.record_files import read_records
from editors.learned.trained_folder import TrainedFolder
from editors.model.lm import LM
from editors.peak_memory import peak_memory_mb
from server.models import loading as models
from server.request_context import RequestContext
from server.services import Services
from server.settings import Settings
from store import Ledger


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as home:
        settings = Settings(home=Path(home), models=options.models, device="cpu")
        words = models.load(settings, lambda *_: None).tokenizer
        lm = LM(_model(options, len(words)), words, "random")
        row(
            "model",
            parameters=lm.parameters,
            weights_mb=round(sum(p.nbytes for p in lm.model.parameters()) / 2**20),
        )
        with Ledger.open(settings.home) as ledger:
            services = timed("open", lambda: Services.open(settings, lm, ledger, lambda *_: None))
            run(services, options)
            services.close()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=11008)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--batch", type=int, default=10, help="facts of the batch")
    parser.add_argument("--steps", type=int, default=10, help="steps of MEND's training")
    parser.add_argument("--checkpointing", action="store_true", help="train with less memory")
    parser.add_argument("--models", type=Path, help="folder with converted models (for the tokenizer)")
    return parser.parse_args()


def _model(options: argparse.Namespace, words: int) -> Any:
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=options.hidden,
        intermediate_size=options.inner,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
    )
    torch.manual_seed(0)
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config, dtype=options.dtype)
    return model.eval().requires_grad_(False)


def run(services: Services, options: argparse.Namespace) -> None:
    """Every kind of work once, a line each."""
    edits = [Edit(subject=f.edit.subject, prompt=f.edit.prompt, target=f.edit.target) for f in load("tune")]
    for name in ("rome", "memit"):
        timed(
            f"second moments for {name}",
            lambda name=name: services.workspace.prepare(
                METHODS[name], METHODS[name].params(), RequestContext()
            ),
        )
    ids = timed("rome, first", lambda: services.edits.apply(edits[:1], "rome", {})).edit_ids
    ids += timed("rome", lambda: services.edits.apply(edits[1:2], "rome", {})).edit_ids
    batch = edits[2 : 2 + options.batch]
    ids += timed(f"memit, batch of {len(batch)}", lambda: services.edits.apply(batch, "memit", {})).edit_ids
    train(services, options)
    ids += timed("mend, first", lambda: services.edits.apply(edits[-2:-1], "mend", {})).edit_ids
    ids += timed("mend", lambda: services.edits.apply(edits[-1:], "mend", {})).edit_ids
    ids += timed("alphaedit, first", lambda: services.edits.apply(edits[-3:-2], "alphaedit", {})).edit_ids
    ids += timed("alphaedit", lambda: services.edits.apply(edits[-4:-3], "alphaedit", {})).edit_ids
    timed("revert one of the batch", lambda: services.edits.revert([ids[3]]))
    left = [i for i in ids if i != ids[3]]
    report = timed(f"revert the other {len(left)}", lambda: services.edits.revert(left))
    row(
        "state",
        back_at_base=report.weights_hash
        == services.workspace.host.base_hash
        == services.workspace.host.rehash(),
    )


def train(services: Services, options: argparse.Namespace) -> None:
    """MEND on few records, for few steps; what is kept is the editor of the model."""
    lm = services.workspace.lm
    folder = lm.extension(TrainedFolder).path
    assert folder is not None
    monitor = Alone(lm, folder / "job")
    monitor.model_hash = services.workspace.host.base_hash
    params = mend_params.MendTraining(
        steps=options.steps,
        records=64,
        validation=8,
        evaluate_every=options.steps,
        checkpointing=options.checkpointing,
    )
    trainer = mend_training.MendTrainer(read_records("facts")[:200], params, monitor)
    told = timed(f"mend's training, {options.steps} steps", lambda: trainer.run(folder / FILE))
    row("the training's own report", cpu_seconds=told["cpu_seconds"])


def timed(name: str, work: Callable[[], Any]) -> Any:
    """Do it, and print its seconds and the peak memory: of the GPU meanwhile, without one of the process so far."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    done = work()
    if cuda:
        torch.cuda.synchronize()
    row(name, seconds=round(time.perf_counter() - start, 3), peak_mb=peak_memory_mb())
    return done


def row(name: str, **values: Any) -> None:
    print(json.dumps({"what": name} | values), flush=True)


if __name__ == "__main__":
    main()

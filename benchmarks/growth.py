"""How the cost of an edit grows with the model: the same shape, narrower and wider.

The weights are random, because cost is all that is asked: both do the same number of steps, and neither
weighs keys by a second moment (ours mode="simplified", the plain one the identity).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.plain_rome import PlainParams, PlainRome
from benchmarks.rome import _peak_rss, _reset_peak
from editors import METHODS
from editors.edit import Edit
from editors.method import EditContext
from editors.model.lm import LM
from editors.moments import Statistics

WIDTHS = ((1, 3), (2, 3), (1, 1), (2, 1))
WIDE = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
STEPS = 10


def growth(lm: LM, edits: Sequence[Edit], plain: bool = True) -> list[dict[str, Any]]:
    """A row for each width of the model's own shape: CPU seconds an edit and the process's peak MB, ours and plain.

    Only for models whose heads and layers can be scaled so (Llama and its like); else no rows.
    """
    return [_row(_scaled(lm, *width), edits, plain) for width in WIDTHS if _fits(lm, *width)]


def _fits(lm: LM, times: int, over: int) -> bool:
    return all(
        isinstance(v := getattr(lm.model.config, k, None), int) and v * times % over == 0 for k in WIDE
    )


def _scaled(lm: LM, times: int, over: int) -> LM:
    """A random model as wide as told, of the same head size, depth and vocabulary."""
    config = copy.deepcopy(lm.model.config)
    for name in WIDE:
        setattr(config, name, getattr(config, name) * times // over)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = type(lm.model)(config)
    return LM(model, lm.tokenizer, f"width {times}/{over}")


def _row(lm: LM, edits: Sequence[Edit], plain: bool) -> dict[str, Any]:
    rome, steps = METHODS["rome"], {"max_steps": STEPS, "stop_probability": 1 - 1e-9}
    params = rome.resolve(lm, rome.params(mode="simplified", **steps))
    nothing = EditContext(Statistics(Path(), "none"))
    edit, again = edits[:2]
    rome.compute(lm, [edit], params, nothing)  # what is made once: copies in another precision, buffers
    row: dict[str, Any] = {"parameters": lm.parameters, "layers": lm.n_layers, "width": lm.d_model}
    row["ours"] = _timed(lambda: rome.compute(lm, [again], params, nothing))
    if plain:
        eye = torch.eye(lm.weight(lm.mlp_out(params.layer)).shape[1])
        baseline = PlainRome(lm, eye, PlainParams(layer=params.layer, steps=STEPS))
        row["plain"] = _timed(lambda: baseline.compute(again))
    return row


def _timed(work: Callable[[], Any]) -> dict[str, float]:
    _reset_peak()
    start = time.process_time()
    work()
    return {"cpu_seconds": time.process_time() - start, "peak_mb": _peak_rss() / 2**20}


def growth_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as lines of text."""
    lines = [f"one edit of {STEPS} steps, random weights:   CPU s (peak MB)"]
    for row in rows:
        each = [
            f"{k} {row[k]['cpu_seconds']:.2f} ({row[k]['peak_mb']:.0f})"
            for k in ("ours", "plain")
            if k in row
        ]
        lines.append(
            f"{row['parameters'] / 1e6:7.0f}M, {row['layers']} layers of {row['width']}:  " + "  ".join(each)
        )
    return "\n".join(lines)

"""Editing from Python, without a server: compute a patch on a loaded model, run the model with it.

from editors import LM, Edit, applied, compute_patch

lm = LM(model, tokenizer, "my model")
patch = compute_patch(lm, [Edit(subject="Croatia", prompt="The currency of {} is the", target="euro")])
with applied(lm, patch):
    print(lm.generate([lm.prompt("The currency of Croatia is the")], 5)[0].text)
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from editors.edit import Edit
from editors.errors import Unsupported
from editors.method import EditContext, Prior
from editors.model.lm import LM
from editors.moments import Statistics
from editors.patch import LivePatch, Patch, join_deltas
from editors.table import METHODS


def compute_patch(
    lm: LM,
    edits: Sequence[Edit],
    method: str = "rome",
    params: Mapping[str, Any] | None = None,
    *,
    folder: Path | None = None,
    trained: Path | None = None,
    prior: Sequence[Prior] = (),
) -> Patch:
    """The patch that makes some edits; the model stays as it is, to the bit.

    Args:
        method: a key of METHODS.
        params: parameters of the method; what is left out has this model's defaults.
        folder: where second moments are kept for the next time. None: computed again at each call.
        trained: where the networks of a trained method are (MEND, SERAC).
        prior: patches that act already, as they were computed; some methods hold their keys still.

    Raises:
        Unsupported: the method does not work on this model.
        EditError: the edits or parameters are wrong, or the computation failed.
    """
    editor = METHODS[method]
    if reason := editor.supports(lm):
        raise Unsupported(reason)
    chosen = editor.resolve(lm, editor.params.model_validate(dict(params or {})))
    with ExitStack() as stack:
        place = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="errata-")))
        statistics = Statistics(place, _model_hash(lm), device=lm.device)
        editor.ensure_statistics(lm, chosen, statistics)
        return editor.compute(lm, edits, chosen, EditContext(statistics, prior, trained=trained))


@contextmanager
def applied(lm: LM, *patches: Patch) -> Iterator[None]:
    """Run the model with some patches, in this order; at the end it is as before, to the bit."""
    with ExitStack() as stack:
        stack.enter_context(lm.patched(join_deltas(patches)))
        for patch in patches:
            if isinstance(patch, LivePatch):
                stack.callback(patch.attach(lm))
        yield


def _model_hash(lm: LM) -> str:
    """Names a model by its weights, so that second moments of another one are never used."""
    total = hashlib.sha256()
    hashes = lm.hashes()
    for name in hashes:
        total.update(f"{name} {hashes[name]}\n".encode())
    return total.hexdigest()

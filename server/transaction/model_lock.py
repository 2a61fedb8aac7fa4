"""The model's one lock. Whoever gets it finds the model as the host left it, with nothing borrowed.

To borrow is to change the model for a while: weights in another precision or of another stack, hooks, replaced
modules, memories switched off, an open transaction. Borrowers give back at the end of their `with` block. The lock
does not rely on it: it compares the model with what the host noted before anyone else gets it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from editors.model.lm import LM
from editors.steering.stack import SteeringStack

log = logging.getLogger("errata.model")


class ModelWatch:
    """Sees whether a model is as it was noted: the tensors of its weights, its modules, hooks and memories."""

    def __init__(self, lm: LM) -> None:
        self._lm = lm
        self.note()

    def note(self) -> None:
        """From now on the model should be as it is at this moment."""
        self._weights = {name: p.data for name, p in self._lm.model.named_parameters()}
        self._sides = {name: quantised.side for name, quantised in self._lm.quantised.items()}
        self._modules = {name: (m, _hooks(m)) for name, m in self._lm.model.named_modules()}
        self._routes, self._speaker = list(self._lm.routes.attached), self._lm.speaker
        self._steering = self._lm.extension(SteeringStack).noted()

    def differences(self) -> list[str]:
        """What is not as noted, by name; empty when nothing is borrowed. It reads no weight: some milliseconds."""
        found = []
        modules = dict(self._lm.model.named_modules())
        for name, (module, hooks) in self._modules.items():
            if name not in modules or modules[name] is not module:
                found.append(f"the module {name} is replaced")
            elif _hooks(module) != hooks:
                found.append(f"hooks act on {name or 'the model'}")
        weights = dict(self._lm.model.named_parameters())
        for name, tensor in self._weights.items():
            if name not in weights or not _same_tensor(weights[name].data, tensor):
                found.append(f"the weight {name} is another")
        found += [
            f"what acts beside the weight {name} is another"
            for name, quantised in self._lm.quantised.items()
            if quantised.side is not self._sides[name]
        ]
        routes = self._lm.routes
        if routes.attached != self._routes or routes.are_off or self._lm.speaker is not self._speaker:
            found.append("the memories are not those that are active")
        if self._lm.extension(SteeringStack).is_paused:
            found.append("steering is paused")
        return found

    @contextmanager
    def acting(self) -> Iterator[None]:
        """In this block memories and steering act, even if they are switched off outside it."""
        with self._lm.routes.on(), self._lm.extension(SteeringStack).resumed():
            yield

    def put_back(self) -> None:
        """Make the model as noted. Nothing is computed for it."""
        for name, (module, (forward, before)) in self._modules.items():
            parent, _, child = name.rpartition(".")
            if name:
                setattr(self._modules[parent][0], child, module)
            module._forward_hooks.clear()
            module._forward_hooks.update(forward)
            module._forward_pre_hooks.clear()
            module._forward_pre_hooks.update(before)
        for name, tensor in self._weights.items():
            self._lm.model.get_parameter(name).data = tensor
        for name, side in self._sides.items():
            self._lm.set_live(name, side)
        self._lm.routes.attached, self._lm.speaker = list(self._routes), self._speaker
        self._lm.routes.reset()
        self._lm.extension(SteeringStack).put_back(self._steering)


Hooks = tuple[dict[int, Callable[..., Any]], dict[int, Callable[..., Any]]]


def _hooks(module: nn.Module) -> Hooks:
    return dict(module._forward_hooks), dict(module._forward_pre_hooks)


def _same_tensor(one: Tensor, other: Tensor) -> bool:
    """True when both are the same memory, read in the same way."""
    return (
        one.data_ptr() == other.data_ptr()
        and one.dtype == other.dtype
        and one.shape == other.shape
        and one.stride() == other.stride()
    )


class ModelLock:
    """A re-entrant lock that hands on the model only as it was noted."""

    def __init__(self, watch: ModelWatch) -> None:
        self._lock, self._watch = threading.RLock(), watch
        self._depth = 0

    def __enter__(self) -> None:
        self._lock.acquire()
        self._depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._depth == 1 and (left := self._watch.differences()):
                log.error("the model was not given back and is now: %s", "; ".join(left[:5]))
                self._watch.put_back()
        finally:
            self._depth -= 1
            self._lock.release()

    @property
    def is_nested(self) -> bool:
        """Whether the thread that holds it has taken it more than once."""
        return self._depth > 1

    @contextmanager
    def released(self) -> Iterator[None]:
        """Let go of the lock in this block, however often the calling thread holds it. The model must be as noted."""
        depth, self._depth = self._depth, 0
        for _ in range(depth):
            self._lock.release()
        try:
            yield
        finally:
            for _ in range(depth):
                self._lock.acquire()
            self._depth = depth


class Turn:
    """The model for long work that lets others have it in between, by `give_way`.

    Args:
        lend: a context that waits for the model and lends it; entered again after every pause.
        borrowed: what is borrowed from the model right now, within this turn.
    """

    def __init__(
        self, lend: Callable[[], AbstractContextManager[LM]], borrowed: Callable[[], list[str]]
    ) -> None:
        self._lend, self._borrowed = lend, borrowed
        self._lent: AbstractContextManager[LM] | None = None

    @contextmanager
    def taken(self) -> Iterator[LM]:
        """The model, from here to the end of the block but for the pauses of `give_way`."""
        lm = self._take()
        try:
            yield lm
        finally:
            self._give()

    def give_way(self) -> bool:
        """Let others have the model, and wait for it again. False if something is borrowed: then the turn is kept.

        What is borrowed would be seen by the others, and would be given back into a model that they have changed.
        """
        if self._borrowed():
            return False
        self._give()
        self._take()
        return True

    def _take(self) -> LM:
        lent = self._lend()
        lm = lent.__enter__()
        self._lent = lent
        return lm

    def _give(self) -> None:
        lent, self._lent = self._lent, None
        if lent is not None:
            lent.__exit__(None, None, None)

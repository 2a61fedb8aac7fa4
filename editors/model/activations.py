"""Record and replace activations through hooks that clean up after themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class StopForward(Exception):
    """Raised by a hook when all activations that were wanted have been recorded."""


def first(output: Any) -> Tensor:
    """The hidden states of a module's output, which some families wrap in a tuple; several streams side by side."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return folded(hidden)


def with_first(output: Any, value: Tensor) -> Any:
    """`output` with its hidden states replaced."""
    if isinstance(output, tuple):
        return (value, *output[1:])
    return unfolded(value, output.shape[0]) if output.dim() == STACKED else value


STACKED = 4  # dimensions of residual streams one above the other


def folded(states: Tensor) -> Tensor:
    """Residual streams side by side: (streams, n, length, d) -> (n, length, streams d). Others stay as they are."""
    return states.permute(1, 2, 0, 3).flatten(2) if states.dim() == STACKED else states


def unfolded(states: Tensor, streams: int) -> Tensor:
    """The inverse of `folded`; states of a single stream stay as they are."""
    return states.unflatten(-1, (streams, -1)).permute(2, 0, 1, 3) if streams > 1 else states


def pick_rows(item: Any, index: Tensor, n: int) -> Any:
    """Some of the n rows of every tensor with that many, through tuples, dicts and whatever has `pick_rows` itself.

    What a layer is called with: masks and positions that are shared by all rows stay as they are, as does what has
    one dimension only, which counts tokens.
    """
    if isinstance(item, Tensor):
        return item[index.to(item.device)] if item.dim() > 1 and item.shape[0] == n and n > 1 else item
    if isinstance(item, tuple):
        return tuple(pick_rows(x, index, n) for x in item)
    if isinstance(item, dict):
        return {k: pick_rows(v, index, n) for k, v in item.items()}
    return item.pick_rows(index, n) if hasattr(item, "pick_rows") else item


@contextmanager
def hooked(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Remove the given hooks at the end, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def record(
    modules: Mapping[Any, nn.Module], *, inputs: bool = False, stop: bool = False, detach: bool = True
) -> Iterator[dict[Any, Tensor]]:
    """Collect the inputs or outputs of modules during one forward pass.

    Yields a dict that fills as the pass runs, under the keys of `modules`; several residual streams stand side by side
    in it, unless `detach` is False, since a gradient needs the tensor that was passed on. With `stop`, the
    forward ends (raising StopForward, which is swallowed here) once all have been seen.
    """
    seen: dict[Any, Tensor] = {}

    def hook_for(key: Any) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if inputs:
                value = args[0] if args else kwargs["hidden_states"]
            seen[key] = folded(value.detach()) if detach else value
            if stop and len(seen) == len(modules):
                raise StopForward

        return hook

    handles = [m.register_forward_hook(hook_for(k), with_kwargs=True) for k, m in modules.items()]
    with hooked(handles):
        try:
            yield seen
        except StopForward:
            if len(seen) != len(modules):
                raise


@contextmanager
def replace(edits: Mapping[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Pass the outputs of modules through functions while the block runs."""

    def hook_for(function: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            return with_first(output, function(first(output)))

        return hook

    with hooked([m.register_forward_hook(hook_for(f)) for m, f in edits.items()]):
        yield

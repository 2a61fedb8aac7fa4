"""The active doses on a model, combined into one tensor and one hook per layer.

How doses are combined is in editors/steering/combining.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from editors.errors import EditError
from editors.model.activations import first, with_first
from editors.model.architecture import resolve
from editors.model.lm import LM
from editors.patch import Detach, LivePatch
from editors.steering.choices import Combine
from editors.steering.combining import combined
from editors.steering.condition import Condition, condition_of, noter

KIND = "steering"


@dataclass(frozen=True)
class Dose(LivePatch):
    """One vector at one multiplier: the tensors that are added after each layer.

    It holds the tensors themselves, so a replay does not need the vector. With `prompt` False the prompt
    is steered at its last token only. With `ablated` nothing is added: that direction is removed from every state.
    With a `condition` it acts only where that holds, and is added apart from the others.
    """

    kind: ClassVar[str] = KIND
    name: str
    multiplier: float
    combine: Combine
    prompt: bool
    added: Mapping[int, Tensor]  # layer -> (d_model,), float32
    left: Tensor | None = None  # (d_model, rank), multiplier included
    right: Tensor | None = None  # (rank, d_model)
    ablated: Tensor | None = (
        None  # (d_model,), of unit length: the direction that is removed from every state
    )
    condition: Condition | None = None

    def tensors(self) -> dict[str, Tensor]:
        parts = {f"layer.{layer}": value for layer, value in self.added.items()}
        if self.left is not None and self.right is not None:
            parts |= {"left": self.left, "right": self.right}
        if self.condition is not None:
            parts["condition"] = self.condition.direction
        return parts if self.ablated is None else parts | {"ablated": self.ablated}

    @classmethod
    def from_parts(cls, tensors: dict[str, Tensor], extra: dict[str, Tensor], info: dict[str, Any]) -> Self:
        added = {int(k.removeprefix("layer.")): v for k, v in tensors.items() if k.startswith("layer.")}
        try:
            return cls(
                name=info["name"],
                multiplier=info["multiplier"],
                combine=info["combine"],
                prompt=info["prompt"],
                added=dict(sorted(added.items())),
                left=tensors.get("left"),
                right=tensors.get("right"),
                ablated=tensors.get("ablated"),
                condition=condition_of(tensors, info),
                extra=extra,
                info=info,
            )
        except (KeyError, TypeError) as error:
            raise EditError(f"this steering dose is incomplete: {error}") from None

    def attach(self, lm: LM) -> Detach:
        """Start this dose on the model; calling the result ends it."""
        stack = lm.extension(SteeringStack)
        stack.join(self)
        return lambda: stack.leave(self)


Noted = tuple[tuple[Dose, ...], tuple[RemovableHandle, ...], int]


class SteeringStack:
    """The hooks of all active doses on one model. Without a dose there are no hooks."""

    def __init__(self, lm: LM) -> None:
        self._lm = lm
        self._doses: list[Dose] = []
        self._handles: list[RemovableHandle] = []
        self._round = 0  # hooks of another round than this one do nothing
        self._rounds = count(1)
        self._paused = 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No dose acts inside the `with` block. The hooks stay where they are and change nothing."""
        before, self._paused = self._paused, self._paused + 1
        try:
            yield
        finally:
            self._paused = before

    @contextmanager
    def resumed(self) -> Iterator[None]:
        """In a block of `paused`: the doses act again in this block."""
        before, self._paused = self._paused, 0
        try:
            yield
        finally:
            self._paused = before

    @property
    def is_paused(self) -> bool:
        """True inside a block of `paused`."""
        return self._paused > 0

    def join(self, dose: Dose) -> None:
        """Start a dose."""
        self._doses.append(dose)
        self._hook()

    def leave(self, dose: Dose) -> None:
        """End a dose."""
        self._doses = [d for d in self._doses if d is not dose]
        self._hook()

    @contextmanager
    def beside(self, doses: Sequence[Dose]) -> Iterator[None]:
        """More doses inside the `with` block.

        The hooks of the others do nothing meanwhile and are never removed, so afterwards the model's hooks are the
        same objects as before.
        """
        before = self._doses, self._handles, self._round
        self._doses, self._handles = [*self._doses, *doses], []
        try:
            self._hook()
            yield
        finally:
            for handle in self._handles:
                handle.remove()
            self._doses, self._handles, self._round = before

    def noted(self) -> Noted:
        """The argument of `put_back`: the doses of this moment, whose hooks are in the model's modules."""
        return tuple(self._doses), tuple(self._handles), self._round

    def put_back(self, noted: Noted) -> None:
        """Restore the doses of `noted`, after the model's hooks of that moment have been restored."""
        doses, handles, self._round = noted
        self._doses, self._handles = list(doses), list(handles)
        self._paused = 0

    def _hook(self) -> None:
        """Replace all hooks by those of the present doses."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._round = [], next(self._rounds)
        always = [d for d in self._doses if d.condition is None]
        conditional = [d for d in self._doses if d.condition is not None]
        noted = self._hook_conditions(conditional)
        for layer in sorted({layer for d in always for layer in d.added}):
            everywhere = combined([d for d in always if d.prompt], layer)
            total = combined(always, layer)
            module = self._lm.layers[layer]
            adder = self._unless_paused(self._adder(everywhere, total, _device(module)))
            self._handles.append(module.register_forward_hook(adder))
        for dose, held in zip(conditional, noted, strict=True):
            self._hook_conditional(dose, held)
        self._hook_ablations()
        maps = [d for d in self._doses if d.left is not None]
        if maps:
            head = resolve(self._lm.model, self._lm.arch.head)
            mapper = self._unless_paused(_mapper(maps, _device(head)))
            self._handles.append(head.register_forward_pre_hook(mapper))

    def _hook_conditions(self, conditional: Sequence[Dose]) -> list[list[Tensor]]:
        """Note where each condition holds, in the states as they are before a dose is added there."""
        noted: list[list[Tensor]] = []
        for dose in conditional:
            assert dose.condition is not None
            noted.append([])
            note = self._unless_paused(noter(dose.condition, noted[-1]))
            self._handles.append(self._lm.layers[dose.condition.layer].register_forward_hook(note))
        return noted

    def _hook_conditional(self, dose: Dose, held: list[Tensor]) -> None:
        """Add a dose where its condition was found to hold."""

        def adder(value: Tensor) -> Callable[..., Any]:
            def add(module: nn.Module, args: Any, output: Any) -> Any:
                hidden = first(output)
                where = held[0].to(hidden.device)
                if not dose.prompt and (answers := self._answers(hidden)) is not None:
                    where = where & answers
                return with_first(output, hidden + (where * value.to(hidden.device)).to(hidden.dtype))

            return add

        for layer, value in dose.added.items():
            hook = self._unless_paused(adder(value))
            self._handles.append(self._lm.layers[layer].register_forward_hook(hook))

    def _hook_ablations(self) -> None:
        """Remove directions from the states after the embeddings and after every layer, as the last of all hooks
        there."""
        directions = [d.ablated for d in self._doses if d.ablated is not None]
        if not directions:
            return
        basis, _ = torch.linalg.qr(torch.stack(directions, 1).double())  # (d_model, n): they may overlap
        embeddings = [self._lm.model.get_input_embeddings()] if self._lm.arch.streams == 1 else []
        for module in (*embeddings, *self._lm.layers):  # several streams begin after the embeddings
            remover = self._unless_paused(_remover(basis, _device(module)))
            self._handles.append(module.register_forward_hook(remover))

    def _unless_paused(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        mine = self._round
        return lambda *call: None if self._paused or self._round != mine else hook(*call)

    def _adder(
        self, everywhere: Tensor | None, total: Tensor | None, device: torch.device
    ) -> Callable[..., Any]:
        assert total is not None
        whole = total.to(device)
        if everywhere is not None and torch.equal(everywhere, total):

            def add(module: nn.Module, args: Any, output: Any) -> Any:
                hidden = first(output)
                return with_first(
                    output, hidden + whole.to(hidden.dtype)
                )  # a search may run in a lower precision

            return add
        inside = torch.zeros_like(whole) if everywhere is None else everywhere.to(device)

        def add_after(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = first(output)
            answers = self._answers(hidden)
            added = whole if answers is None else torch.where(answers, whole, inside)
            return with_first(output, hidden + added.to(hidden.dtype))

        return add_after

    def _answers(self, hidden: Tensor) -> Tensor | None:
        """Mask (n, length, 1) of the prompt's last token and the answer's; None where it is all of them."""
        starts = self._lm.local.prompt_ends
        if starts is None or hidden.dim() < 3 or hidden.shape[1] <= min(starts):
            return None  # a later step of a generation, or no prompt at all
        index = torch.arange(hidden.shape[1], device=hidden.device)
        return (index >= torch.tensor(starts, device=hidden.device)[:, None])[..., None]


def _device(module: nn.Module) -> torch.device:
    """The device of a module's weights. Their type is not that of its output: quantised weights are integers."""
    return next(module.parameters()).device


def _remover(basis: Tensor, device: torch.device) -> Callable[..., Any]:
    """h -> h - B Bᵀ h, the part of h outside the span of B's orthonormal columns."""
    columns = basis.to(device, torch.float32)

    def remove(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = first(output)
        wide = hidden.float()
        return with_first(output, (wide - (wide @ columns) @ columns.T).to(hidden.dtype))

    return remove


@contextmanager
def unsteered(lm: LM) -> Iterator[None]:
    """Switch all steering off inside the `with` block."""
    with lm.extension(SteeringStack).paused():
        yield


def _mapper(doses: Sequence[Dose], device: torch.device) -> Callable[..., Any]:
    """h -> h + sum of left @ (right @ h), with all maps joined into one of their total rank."""
    left = torch.cat([d.left for d in doses if d.left is not None], 1).to(device)
    right = torch.cat([d.right for d in doses if d.right is not None]).to(device)

    def add(module: nn.Module, args: tuple[Any, ...]) -> Any:
        hidden = args[0].to(left.device)
        a, b = left.to(hidden.dtype), right.to(hidden.dtype)
        return (hidden + (hidden @ b.T) @ a.T, *args[1:])

    return add

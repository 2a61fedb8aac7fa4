"""Check a family's row by numbers when a model is loaded: a wrong row is an error, not a wrong edit.

One forward pass over a few rows of tokens. The first row is plain. In each other row the output of one module of one
layer is changed at the last token. What moves is compared with what the row of the table says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from editors.constants import assumed, tuned
from editors.errors import Unsupported
from editors.model.activations import first, record
from editors.model.activations import replace as replaced
from editors.model.architecture import Architecture, resolve

TOKENS = 4
SAME = assumed(
    0.1,
    "greatest median error, as a share of the median change, at which a change counts as passed on unchanged",
    "bfloat16 rounds to .004; a norm between the MLP and the residual stream changes most coordinates by more than .5",
)
FALLEN = tuned(
    0.4,
    "share of its first slope below which a residual stream's response to a value is too small for a further move",
    models="gemma-3-270m",
    command="a script over the edits and measures of benchmarks.together (tune facts, memit, n 24, lr .2), not kept",
    figure="room .79 of Gemma; 24 facts in one call, clamp 3.75 as before: 1.0 said, .64 reworded, .57 neighbours "
    "kept, perplexity x2.05 (x1.34 with the shorter first step); clamp 1.0: 1.0, .74, .84, x1.073; .7: 1.0, .69, .87, "
    "x1.035",
)
SIZES = tuple(
    0.25 * 2 ** (k / 2) for k in range(9)
)  # of the moves that a response is measured with: .25 to 4


@dataclass(frozen=True)
class _ChangedRow:
    """One changed row: where, and the row of the batch."""

    layer: int
    part: str  # a path in the layer
    row: int
    size: float | None = (
        None  # of the change, in units of the output's own norm; None: like the residual stream
    )


def probed(model: Any, row: Architecture) -> Architecture:
    """The family's row with `mlp_adds_directly` as this model does it. Raises Unsupported for a row that is wrong."""
    layers = list(resolve(model, row.layers).children())
    if not layers or resolve(model, row.embed).weight.is_meta:
        return row
    changes = list(_changes(row, layers))
    probe = _ProbePass(model, row, layers, changes)
    adds = []
    for change in changes:
        if change.part in row.mlp_of(layers[change.layer])[0]:
            _check_input(probe, change)
        elif change.part == row.mlp_norm:
            _check_norm(probe, change)
        else:
            adds.append(_adds(probe, change))
    if len(set(adds)) > 1:
        raise _wrong(
            row, f"{row.mlp_out} reaches the residual stream unchanged in some layers and not in others"
        )
    if adds[0]:
        return replace(row, mlp_adds_directly=True)
    return replace(row, mlp_adds_directly=False, value_room=_room(model, row, layers))


def _room(model: Any, row: Architecture, layers: list[nn.Module]) -> float:
    """How far an MLP's output may move, in units of its norm, before the residual stream hardly responds any more.

    Behind a norm the stream sees the output's direction alone: a move in a new direction turns it fast at first and
    then less and less, while at other tokens, whose keys are similar, a change of the weights grows with the move
    itself. The room is where the slope of the response has fallen to FALLEN of its first one; infinite where it does
    not fall so far. It is the median over the checked layers.
    """
    middle = len(layers) // 2
    picked = sorted({0, middle // 2, middle, len(layers) - 1})
    changes = [
        _ChangedRow(i, row.mlp_of(layers[i])[1], 1 + k * len(SIZES) + j, size)
        for k, i in enumerate(picked)
        for j, size in enumerate(SIZES)
    ]
    probe = _ProbePass(model, row, layers, changes)
    rooms = []
    for k in range(len(picked)):
        mine = changes[k * len(SIZES) : (k + 1) * len(SIZES)]
        rooms.append(_where_it_falls([float(probe.moved(c, probe.states).norm()) for c in mine]))
    return sorted(rooms)[len(rooms) // 2]


def _where_it_falls(response: Sequence[float]) -> float:
    """The size at which the slope of a response to moves of SIZES is FALLEN of the first one, between its segments."""
    first_slope = response[0] / SIZES[0]
    before, at = 1.0, SIZES[0] / 2  # a segment's slope counts at its middle
    for small, large, low, high in zip(SIZES, SIZES[1:], response, response[1:], strict=False):
        slope, middle = (high - low) / (large - small) / first_slope, (small + large) / 2
        if slope <= FALLEN:
            return round(at + (middle - at) * (before - FALLEN) / (before - slope), 2)
        before, at = slope, middle
    return math.inf


def _changes(row: Architecture, layers: list[nn.Module]) -> Iterator[_ChangedRow]:
    """The first and last layer, and one of each other make."""
    picked = {
        frozenset([row.mlp_of(layer)[1], *(name for name, _ in layer.named_children())]): i
        for i, layer in enumerate(layers)
    }
    number = 0
    for i in sorted({0, *picked.values(), len(layers) - 1}):
        mlp_in, mlp_out = row.mlp_of(layers[i])
        for part in (mlp_out, *mlp_in, *([row.mlp_norm] if row.mlp_norm else [])):
            number += 1
            yield _ChangedRow(i, part, number)


class _ProbePass:
    """The pass: what every checked layer was given, what its MLP's key was, and what it gave, for each row."""

    def __init__(
        self, model: Any, row: Architecture, layers: list[nn.Module], changes: list[_ChangedRow]
    ) -> None:
        self.arch, self.rows = row, 1 + len(changes)
        self.bumps: dict[int, Tensor] = {}
        self._generator = torch.Generator().manual_seed(0)
        checked = {c.layer: layers[c.layer] for c in changes}
        sites: dict[nn.Module, list[_ChangedRow]] = {}
        for change in changes:
            sites.setdefault(_found(row, checked[change.layer], change), []).append(change)
        self._inputs: dict[int, Tensor] = {}
        with ExitStack() as stack, torch.no_grad():
            for i, layer in checked.items():
                handle = layer.register_forward_pre_hook(self._seeing(i), with_kwargs=True)
                stack.callback(handle.remove)
            stack.enter_context(replaced({module: self._changing(mine) for module, mine in sites.items()}))
            outs = {i: resolve(layer, row.mlp_of(layer)[1]) for i, layer in checked.items()}
            keys = stack.enter_context(record(outs, inputs=True))
            states = stack.enter_context(record(checked))
            ids = _ids(model, row).expand(self.rows, -1)
            model(**_reading(row, ids))
        self.keys = {i: self._last(k) for i, k in keys.items()}
        self.states = {i: self._last(s) for i, s in states.items()}

    def moved(self, change: _ChangedRow, seen: dict[int, Tensor]) -> Tensor:
        """How far a row is from the plain one (d,)."""
        return seen[change.layer][change.row] - seen[change.layer][0]

    def _last(self, values: Tensor) -> Tensor:
        """The last token of every row (rows, d), float32."""
        return values.reshape(self.rows, TOKENS, -1)[:, -1].float().cpu()

    def _seeing(self, i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._inputs[i] = first(args if args else kwargs["hidden_states"])

        return hook

    def _changing(self, changes: list[_ChangedRow]) -> Callable[[Tensor], Tensor]:
        def change_rows(output: Tensor) -> Tensor:
            shaped = output.reshape(self.rows, TOKENS, -1).clone()
            for change in changes:
                bump = torch.randn(shaped.shape[-1], generator=self._generator)
                if change.size is None:
                    bump *= self._inputs[change.layer][0].float().abs().median().cpu()
                else:
                    bump *= change.size * shaped[0, -1].float().norm().cpu() / bump.norm()
                self.bumps[change.row] = bump
                shaped[change.row, -1] += bump.to(shaped)
            return shaped.reshape(output.shape)

        return change_rows


def _ids(model: Any, row: Architecture) -> Tensor:
    """A few ids (1, TOKENS) from the middle of the vocabulary, where no special tokens are."""
    embed: Any = resolve(model, row.embed).weight
    middle = embed.shape[0] // 2
    return torch.arange(middle, middle + TOKENS, device=embed.device)[None]


def _reading(row: Architecture, ids: Tensor) -> dict[str, Any]:
    """The arguments with which a model reads these ids, its decoder too where there is one."""
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    return call | ({"decoder_input_ids": ids} if row.is_seq2seq else {})


def _found(row: Architecture, layer: nn.Module, change: _ChangedRow) -> nn.Module:
    try:
        return resolve(layer, change.part)
    except AttributeError:
        raise _wrong(row, f"layer {change.layer} has no {change.part}") from None


def _adds(probe: _ProbePass, change: _ChangedRow) -> bool:
    """Whether the layer's output moves by exactly the change of the MLP's output."""
    moved, bump = probe.moved(change, probe.states), probe.bumps[change.row]
    row = probe.arch
    if moved.shape[0] != bump.shape[0] * row.streams or not moved.abs().max() > 0:
        raise _wrong(
            row, f"what {change.part} of layer {change.layer} writes does not reach the residual stream"
        )
    if row.streams > 1:  # all of them move, none by the change itself
        return False
    direct = _same(moved, bump)
    scaled = _same(moved, row.residual_scale * bump)
    if row.residual_scale != 1 and not scaled:
        raise _wrong(row, f"{change.part} does not reach the residual stream times {row.residual_scale}")
    if row.mlp_norm and direct:
        raise _wrong(row, f"{row.mlp_norm} does not stand between {change.part} and the residual stream")
    return direct


def _check_norm(probe: _ProbePass, change: _ChangedRow) -> None:
    if not _same(probe.moved(change, probe.states), probe.bumps[change.row]):
        raise _wrong(probe.arch, f"what {change.part} gives is not added to the residual stream as it is")


def _check_input(probe: _ProbePass, change: _ChangedRow) -> None:
    """A projection that reads the residual stream for the MLP moves the key."""
    if not probe.moved(change, probe.keys).abs().max() > 0:
        raise _wrong(probe.arch, f"{change.part} does not lead to {probe.arch.mlp_out}")


def _same(moved: Tensor, wanted: Tensor) -> bool:
    return bool((moved - wanted).abs().median() <= SAME * wanted.abs().median())


def check_head(model: Any, row: Architecture, head: Callable[[Tensor], Tensor]) -> None:
    """Raise Unsupported where `head` of the last layer's states does not give the model's own logits."""
    ids = _ids(model, row)
    if ids.is_meta:
        return
    last = list(resolve(model, row.layers).children())[-1]
    with record({"last": last}) as seen, torch.no_grad():
        own = model(**_reading(row, ids)).logits
        ours = head(seen["last"])
    if not _same(ours.float().cpu(), own.float().cpu()):
        raise _wrong(
            row, f"{row.norm} and {row.head} do not turn the last layer's states into the model's logits"
        )


def _wrong(row: Architecture, what: str) -> Unsupported:
    return Unsupported(
        f"the row of the family {row.family} in editors/model/architecture.py does not fit this model: {what}. "
        "Edits would be wrong, so the model is not loaded; see docs/ADDING_A_FAMILY.md"
    )

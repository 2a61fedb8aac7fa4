"""Whether an engine answers as the corrected model does. Status codes prove nothing; only answers do.

Distances are of log-probabilities in nats: the greatest difference at a token that either side finds probable. An edit
is held when every prompt about it is answered within the engine's bound and at least one of them tells the corrected
model from the pristine one by more than twice that bound: then an engine without the edit cannot be within it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from server.engines.probes import ProofProbe, Reference
from server.engines.settings import Precision

NEGLIGIBLE = -5.0
"""Log-probability below which a token is not compared: rounding moves the improbable ones most."""


@dataclass(frozen=True)
class EngineReading:
    """What an engine said after one prompt."""

    top: Mapping[int, float] = field(
        default_factory=dict
    )  # first token -> log-probability; -1 - n: unknown ones
    answer: tuple[int, ...] | None = None  # its greedy answer as ids, where it tells them
    text: str = ""
    scores: tuple[float, ...] | None = None  # of the live answer's tokens, up to where `answer` parts from it
    error: str = ""


def distance(said: EngineReading, reference: Reference) -> float:
    """Distance of an engine's answer from a model's; infinite if it has nothing that can be compared."""
    values = list(said.top.values())
    if said.error or not values or not all(map(math.isfinite, values)):
        return math.inf
    if said.scores is not None and not all(map(math.isfinite, said.scores)):
        return math.inf
    worst = _apart(said.top, min(values), reference.top, reference.floor)
    if said.scores is not None and len(said.scores) != len(reference.scores) and not _parted(said, reference):
        return math.inf
    for mine, other in zip(said.scores or (), reference.scores, strict=False):
        if max(mine, other) > NEGLIGIBLE:
            worst = max(worst, abs(mine - other))
    return worst


def _parted(said: EngineReading, reference: Reference) -> bool:
    """Whether the scores end at the token where the engine's answer differs, after which there are none."""
    answer, n = said.answer or (), len(said.scores or ())
    mine, other = answer[:n], reference.answer[:n]
    return 0 < n < len(reference.scores) and len(mine) == n and mine[:-1] == other[:-1] and mine != other


def between(one: Reference, other: Reference) -> float:
    """Distance of the first tokens of two models."""
    return _apart(one.top, one.floor, other.top, other.floor)


def _apart(
    one: Mapping[int, float], one_floor: float, other: Mapping[int, float], other_floor: float
) -> float:
    """The greatest difference at a probable token. A token that one side does not list is at most its floor."""
    worst = 0.0
    for token in {*one, *other}:
        a, b = one.get(token), other.get(token)
        if max(-math.inf if a is None else a, -math.inf if b is None else b) <= NEGLIGIBLE:
            continue
        if a is None:
            assert b is not None
            worst = max(worst, b - max(one_floor, NEGLIGIBLE))
        elif b is None:
            worst = max(worst, a - max(other_floor, NEGLIGIBLE))
        else:
            worst = max(worst, abs(a - b))
    return worst


@dataclass(frozen=True)
class Judged:
    """One probe: the engine's distances from the corrected and the pristine model, and whether it passes."""

    probe: ProofProbe
    reading: EngineReading
    to_live: float
    to_base: float
    apart: float  # the corrected model from the pristine one
    near: bool


@dataclass(frozen=True)
class Proof:
    """The result. An edit is in exactly one of `held`, `missing` and `indistinct`."""

    held: tuple[str, ...]
    missing: tuple[str, ...]
    indistinct: tuple[str, ...]  # the corrected model answers like the pristine one, within the bound
    judged: tuple[Judged, ...]
    bound: float

    @property
    def proven(self) -> bool:
        """True when the engine answers like the corrected model and not like another."""
        ids = {j.probe.edit_id for j in self.judged if j.probe.kind != "gone" and j.probe.edit_id}
        return bool(self.judged) and all(j.near for j in self.judged) and (bool(self.held) or not ids)

    @property
    def worst(self) -> float:
        """The greatest distance from the corrected model."""
        return max((j.to_live for j in self.judged), default=math.inf)

    @property
    def far(self) -> list[Judged]:
        """The probes that are not near enough, the worst first."""
        return sorted((j for j in self.judged if not j.near), key=lambda j: -j.to_live)


def prove(
    probes: Sequence[ProofProbe], readings: Sequence[EngineReading], bound: float, precision: Precision
) -> Proof:
    """Judge what an engine said. `readings` has one entry for each probe."""
    judged = [_judge(p, r, bound, precision) for p, r in zip(probes, readings, strict=True)]
    held, missing, indistinct = [], [], []
    ids = dict.fromkeys(p.edit_id for p in probes if p.edit_id and p.kind != "gone")
    for edit_id in ids:
        mine = [j for j in judged if j.probe.edit_id == edit_id and j.probe.kind != "gone"]
        if not all(j.near for j in mine):
            missing.append(edit_id)
        elif any(j.apart > 2 * bound for j in mine):
            held.append(edit_id)
        else:
            indistinct.append(edit_id)
    return Proof(tuple(held), tuple(missing), tuple(indistinct), tuple(judged), bound)


def _judge(probe: ProofProbe, said: EngineReading, bound: float, precision: Precision) -> Judged:
    to_live, apart = distance(said, probe.live), between(probe.live, probe.base)
    near = to_live <= bound
    if near and precision in ("bfloat16", "float16"):
        near = _same_first(said, probe.live, bound)
    to_base = distance(replace(said, scores=None), probe.base)
    return Judged(probe, said, to_live, to_base, apart, near)


def _same_first(said: EngineReading, reference: Reference, bound: float) -> bool:
    """The same most probable token; or one of two that the corrected model itself finds as good, within the bound."""
    mine = max(said.top, key=lambda token: said.top[token])
    best = max(reference.top.values())
    return reference.top.get(mine, -math.inf) >= best - bound


def same_readings(one: Sequence[EngineReading], other: Sequence[EngineReading], bound: float) -> bool:
    """Whether two readings of an engine are the same, so that it is back in its former state."""
    if len(one) != len(other):
        return False
    return all(_same(a, b, bound) for a, b in zip(one, other, strict=True))


def _same(one: EngineReading, other: EngineReading, bound: float) -> bool:
    if one.error or other.error or not one.top or not other.top:
        return False
    return _apart(one.top, min(one.top.values()), other.top, min(other.top.values())) <= bound

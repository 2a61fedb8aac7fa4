"""LM-Steer: a learned low-rank linear map on the output embeddings (Han et al. 2024, arXiv 2305.12798).

The paper steers with e'_v = e_v + eps W e_v for every output embedding e_v. The logits of a context c are
then (e_v + eps W e_v) . c = e_v . (c + eps Wt c), so the same is done to the one vector c in front of the
head, which costs rank x d_model per token and leaves the embeddings alone. Here M = Wt = left @ right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editors.constants import assumed, published
from editors.errors import InvalidEdit
from editors.model.activations import first
from editors.model.answer_inputs import AnswerInputs, answer_inputs
from editors.model.architecture import resolve
from editors.model.lm import LM
from editors.progress import ReportProgress
from editors.steering.method import ComputedVector, SteeringMethod, VectorInput
from editors.steering.states import Side, tokens_of
from editors.steering.vector import new_vector

RANK = assumed(16, "rank of the learned map")
STEPS = assumed(60, "training steps")
TOKENS = assumed(128, "tokens of each side in one step", "the logits of a step are (2 x 128, vocabulary)")
MAX_TOKENS = 8192  # most tokens of each side that are used for training
LEARNING_RATE = published(
    0.01,
    "Adam's step size",
    "Han et al., ACL 2024, arXiv 2305.12798: the commands of the authors' README",
)


@dataclass(frozen=True)
class OutputMap:
    left: Tensor  # (d_model, rank)
    right: Tensor  # (rank, d_model)
    norm: float  # mean length of the final states
    strength: float  # mean relative shift of the states by the map as trained
    loss_before: float  # mean negative log-likelihood of the texts, each under its own sign, nats
    loss_after: float


class LmSteer(SteeringMethod):
    """A linear map of the state in front of the head, learned from the pairs."""

    name = "lm_steer"
    description = "a learned map on the output embeddings"
    when = "The trait shows in the choice of words, and a minute of training is acceptable."
    source = "Han et al. 2024, arXiv 2305.12798"

    def compute(self, lm: LM, given: VectorInput, report: ReportProgress) -> ComputedVector:
        if given.layers is not None:
            raise InvalidEdit("lm_steer acts on the output embeddings and has no layers; leave layers out")
        sides = self.sides(lm, given)
        trained = train_output_map(lm, sides, report)
        info = self.info(given, len(sides)) | {
            "trained": {
                "loss_before": trained.loss_before,
                "loss_after": trained.loss_after,
                "strength": trained.strength,
                "rank": RANK,
            }
        }
        no_directions = trained.left.new_zeros(0, lm.d_model)
        norms = trained.left.new_tensor([trained.norm])
        vector = new_vector(self.name, (), no_directions, norms, info, trained.left, trained.right)
        return ComputedVector(vector, len(sides))


def train_output_map(lm: LM, pairs: Sequence[tuple[Side, Side]], report: ReportProgress) -> OutputMap:
    """Learn M so that +M makes the positive texts more likely and -M the negative ones.

    The final states are computed once; only M is learned, in float32 and with a fixed seed.
    """
    positive = _contexts(lm, [p for p, _ in pairs])
    negative = _contexts(lm, [n for _, n in pairs])
    norm = float(torch.cat([positive[0], negative[0]]).norm(dim=-1).mean())
    generator = torch.Generator().manual_seed(0)
    d = lm.d_model if positive[0].shape[-1] == lm.d_model else positive[0].shape[-1]
    left = torch.zeros(d, RANK, device=lm.device, requires_grad=True)
    right = (torch.randn(RANK, d, generator=generator) / d**0.5).to(lm.device).requires_grad_(True)
    optimiser = torch.optim.Adam([left, right], lr=LEARNING_RATE)
    losses = []
    for step in range(STEPS):
        loss = sum(
            (
                _loss(lm, *_sample(side, generator), sign, left, right)
                for side, sign in ((positive, 1), (negative, -1))
            ),
            torch.zeros((), device=lm.device),
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()) / 2)
        report(0.3 + 0.7 * (step + 1) / STEPS, f"trained {step + 1} of {STEPS} steps")
    return _scaled(left.detach(), right.detach(), torch.cat([positive[0], negative[0]]), norm, losses)


def _scaled(left: Tensor, right: Tensor, states: Tensor, norm: float, losses: list[float]) -> OutputMap:
    """The map with a mean relative shift of 1, and the shift it had when trained."""
    moved = ((states @ right.T) @ left.T).norm(dim=-1)
    strength = float((moved / states.norm(dim=-1).clamp(min=1e-12)).mean())
    if not strength > 0:
        raise InvalidEdit("nothing could be learned from these pairs; give pairs that differ more")
    few = max(1, len(losses) // 6)
    return OutputMap(
        left=(left / strength).cpu().contiguous(),
        right=right.cpu().contiguous(),
        norm=norm,
        strength=strength,
        loss_before=sum(losses[:1]),
        loss_after=sum(losses[-few:]) / few,
    )


def _sample(side: tuple[Tensor, Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    index = torch.randint(len(side[0]), (min(TOKENS, len(side[0])),), generator=generator)
    return side[0][index.to(side[0].device)], side[1][index.to(side[1].device)]


def _loss(lm: LM, states: Tensor, targets: Tensor, sign: int, left: Tensor, right: Tensor) -> Tensor:
    moved = states + sign * ((states @ right.T) @ left.T)
    logits = lm.unembed(moved.to(lm.dtype)).float()
    return torch.nn.functional.cross_entropy(logits, targets)


@torch.no_grad()
def _contexts(lm: LM, sides: Sequence[Side]) -> tuple[Tensor, Tensor]:
    """States in front of the head (tokens, d), and the tokens that follow them (tokens,)."""
    states: list[Tensor] = []
    targets: list[int] = []
    rows = [tokens_of(lm, side) for side in sides]
    for batch in lm.buckets([len(p) + len(a) for p, a in rows]):
        batch_rows = [rows[i] for i in batch]
        inputs = answer_inputs(lm, batch_rows)
        for row, start, (_, text) in zip(_before_head(lm, inputs), inputs.first, batch_rows, strict=True):
            states.append(row[max(start, 0) : start + len(text)].to(lm.device).float())
            targets.extend(text if start >= 0 else text[1:])
        if len(targets) >= MAX_TOKENS:
            break
    first_states = torch.cat(states)[:MAX_TOKENS]
    return first_states, torch.tensor(targets[: len(first_states)], device=first_states.device)


def _before_head(lm: LM, batch: AnswerInputs) -> Tensor:
    """The input of the head on a padded batch: (n, length, d)."""
    inputs: list[Tensor] = []
    head = resolve(lm.model, lm.arch.head)
    handle = head.register_forward_pre_hook(lambda module, args: inputs.append(first(args)))
    try:
        lm.model(**batch.call)
    finally:
        handle.remove()
    return inputs[0]

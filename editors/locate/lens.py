"""The logit lens and direct logit attribution: the answer's probability after each layer, and what raises it.

Logit lens (nostalgebraist 2020): the head is applied to the state after each layer. Direct logit
attribution (Elhage et al. 2021): the answer's logit minus the mean logit, as a sum of what the
embedding and every attention and MLP write to the residual stream. The final norm's scale is held at
its actual value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from editors.errors import Unsupported
from editors.locate.result import Located, Site, top_sites
from editors.locate.traced_prompt import HEAD_ROWS, TracedPrompt, embed, run, tokenize_fact
from editors.model.activations import record
from editors.model.architecture import resolve
from editors.model.lm import LM
from editors.progress import ReportProgress


@torch.no_grad()
def lens(lm: LM, traced: TracedPrompt, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Apply the head to states (tokens, layers, d).

    Returns three grids (tokens, layers): the probability of the answer's first token, its rank (0: the
    most probable), and the id of the most probable token.
    """
    flat = states.reshape(-1, states.shape[-1])
    target, parts = traced.target[0], []
    for rows in flat.split(HEAD_ROWS):
        logits = lm.head(rows).float()
        answer = logits[:, target : target + 1]
        p = (answer[:, 0] - logits.logsumexp(-1)).exp()
        parts.append(torch.stack([p, (logits > answer).sum(-1).float(), logits.argmax(-1).float()]))
    p, rank, top = torch.cat(parts, 1).cpu().reshape(3, *states.shape[:2])
    return p, rank.long(), top.long()


@torch.no_grad()
def direct_attribution(lm: LM, traced: TracedPrompt) -> tuple[Tensor, Tensor, float, float]:
    """Contributions to the logit of the answer's first token, minus the mean of all logits, at the last position.

    Returns:
        Attention and MLP, each (layers,); the embedding's part; and the constant from the biases of the
        norm and the head. They sum to the logit before any soft cap.

    Raises:
        Unsupported: where the residual stream is not a sum of its parts.
    """
    arch = lm.arch
    scaled = arch.residual_scale != 1
    if not arch.mlp_adds_directly and arch.mlp_norm is None and not scaled:
        raise Unsupported(
            f"this {arch.family} model norms or scales its states between layers, so its logits are not a sum of parts"
        )
    modules = {i: resolve(layer, arch.mlp_norm or arch.mlp_of(layer)[1]) for i, layer in enumerate(lm.layers)}
    with record(modules) as recorded:
        states = run(lm, traced, embed(lm, traced), parts=False).hidden
    column = traced.last
    residual = torch.stack([h[0, column].float() for h in states])  # (L + 1, d)
    length = states[0].shape[1]
    written = [recorded[i].to(lm.device).reshape(1, length, -1)[0, column] for i in range(lm.n_layers)]
    mlp = torch.stack(written).float() * arch.residual_scale
    attention = residual[1:] - residual[:-1] - mlp  # includes cross-attention in a decoder
    gain, constant = _readout(lm, residual[-1], traced.target[0])
    gain, constant = arch.logit_scale * gain, arch.logit_scale * constant
    return (attention @ gain).cpu(), (mlp @ gain).cpu(), float(residual[0] @ gain), constant


def _readout(lm: LM, final: Tensor, token: int) -> tuple[Tensor, float]:
    """The linear map from the residual stream to a token's logit minus the mean logit.

    The norm's scale is that of the state `final` (d,). Returns the map (d,) and its constant.
    """
    head: Any = resolve(lm.model, lm.arch.head)
    weight = head.weight.float()
    direction = (weight[token] - weight.mean(0)).to(final.device)  # (d,)
    of_head = getattr(head, "bias", None)
    constant = 0.0 if of_head is None else float(of_head.float()[token] - of_head.float().mean())
    if lm.arch.scales_head_input:
        direction = direction * lm.d_model**-0.5
    norm: Any = resolve(lm.model, lm.arch.norm)

    def normed(state: Tensor) -> Tensor:
        return norm(state.to(lm.dtype)[None])[0].to(final.device).float()  # type: ignore[no-any-return]

    # Read from what it does to three states, whatever its storage form: its bias, its weight, whether it centres.
    ones = torch.ones_like(final)
    signs = ones.clone()
    signs[1::2] = -1
    bias = normed(torch.zeros_like(final))
    shape = (normed(signs) - bias) * signs
    centres = bool((normed(ones) - bias).norm() < 0.1 * shape.norm())
    state = final - final.mean() if centres else final
    scale = ((normed(final) - bias) @ (shape * state)) / (shape * state).pow(2).sum()
    gain = scale * shape * direction
    return gain - gain.mean() if centres else gain, constant + float(bias @ direction)


def logit_lens(lm: LM, prompt: str, subject: str, target: str | None, report: ReportProgress) -> Located:
    """Apply the logit lens to all tokens and layers, and attribute the answer's logit to the layers.

    Args:
        prompt: a prompt that contains the subject, or {} in its place.
        target: the answer, of which the first token counts; None: the model's own next token.

    Raises:
        InvalidEdit: for a prompt that cannot be traced; and what `report` raises.
    """
    traced = tokenize_fact(lm, prompt, subject, target)
    report(0.0, "reading every layer")
    with torch.no_grad():
        clean = run(lm, traced, embed(lm, traced), parts=False)
    tokens = len(traced.labels)
    states = torch.stack([h[0, :tokens] for h in clean.hidden[1:]], 1)
    p, rank, top = lens(lm, traced, states)
    last = traced.last
    first_top = next((i for i in range(lm.n_layers) if bool((rank[last, i:] == 0).all())), None)
    numbers: dict[str, Any] = {
        "p_clean": float(p[last, -1]),
        "top_tokens": [lm.tokenizer.decode([int(i)]) for i in top[last]],
        "ranks": rank[last].tolist(),
    }
    sites = top_sites(traced, {"lens": p}, count=6)
    maps = {"lens": p}
    try:
        attention, mlp, embedding, constant = direct_attribution(lm, traced)
    except Unsupported as error:
        return _located(traced, maps, sites, first_top, int(p[last].argmax()), str(error), numbers)
    numbers |= {"embedding_logit": embedding, "bias_logit": constant}
    numbers["logit"] = float(attention.sum() + mlp.sum()) + (embedding + constant)
    numbers |= {"attention_logits": attention.tolist(), "mlp_logits": mlp.tolist()}
    for name, parts in (("attention", attention), ("mlp", mlp)):
        for i in parts.argsort(descending=True)[:3].tolist():
            sites.append(Site(i, last, traced.labels[last], f"{name} logit", float(parts[i])))
    best = int((attention + mlp).argmax())
    writer = "MLP" if mlp[best] > attention[best] else "attention"
    return _located(
        traced, maps, sites, first_top, best, f"the {writer} of layer {best} raises its logit most", numbers
    )


def _located(
    traced: TracedPrompt,
    maps: dict[str, Tensor],
    sites: list[Site],
    first_top: int | None,
    best: int,
    attribution: str,
    numbers: dict[str, Any],
) -> Located:
    when = (
        f"The answer {traced.answer.strip()!r} is the top token from layer {first_top} on"
        if first_top is not None
        else f"The answer {traced.answer.strip()!r} is not the top token at the end"
    )
    return Located(
        method="logit_lens",
        traced=traced,
        maps=maps,
        unit="probability of the answer's first token, read after each layer",
        sites=sites,
        best_layer=best,
        confidence=None,
        suggestion=(
            f"{when}; {attribution}. This shows where the answer appears, not where the fact is stored; "
            "causal_trace finds that place."
        ),
        numbers=numbers,
    )

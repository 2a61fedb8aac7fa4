"""Toolset `locate`: where the model keeps a fact, and which layer to edit."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from editors.edit import Edit, Text
from server.locating.results import FactLocation, LayerSuggestion, LocateMethod
from tools._toolset import ToolRequest, Toolset

toolset = Toolset("locate")


@toolset.tool("Locate fact")
def locate_fact(
    request: ToolRequest,
    prompt: Annotated[
        Text,
        Field(description="The sentence up to where its answer begins; {} may stand for the subject."),
    ],
    subject: Annotated[Text, Field(description="What the fact is about, as it stands in the prompt.")],
    target: Annotated[
        Text | None,
        Field(description="The answer to trace; left out: the model's own next token."),
    ] = None,
    method: Annotated[
        LocateMethod,
        Field(
            description="causal_trace: thorough; attribution_patching: the same approximately, in seconds; "
            "knowledge_neurons: single MLP neurons; logit_lens: what layers say."
        ),
    ] = "causal_trace",
    paraphrases: Annotated[
        list[Text] | None,
        Field(
            max_length=8,
            description="Other wordings, for knowledge_neurons.",
        ),
    ] = None,
    samples: Annotated[int, Field(ge=1, le=50, description="Noise samples.")] = 5,
    window: Annotated[
        int | None,
        Field(ge=1, le=64, description="Layers restored together; left out: 10 of 48."),
    ] = None,
    seed: Annotated[int, Field(ge=0, lt=2**31, description="Seed of the noise.")] = 0,
) -> FactLocation:
    """Show where the model keeps a fact: a heat map of tokens and layers, and the strongest sites as data. Use it to
    understand a belief, or why an edit failed. Next: suggest_layers, which measures where editing works.

    Details:
    Use it to understand a belief before correcting it, or why an edit failed. causal_trace takes up to a
    minute of CPU on the default model; use attribution_patching on large ones. The answer has the sites with their
    effects, `best_layer`, how far the noise samples agree (`confidence`), and `suggestion`: what it means
    and what to do. The trace is kept on the ledger and shown by show_edit for the edit it leads to. Where a
    fact is stored is not always where editing works best: suggest_layers measures that.
    """
    location, picture = request.services.locating.locate(
        prompt,
        subject,
        target,
        method,
        paraphrases or (),
        samples,
        window,
        seed,
        ctx=request.ctx,
    )
    request.show(picture)
    return location


@toolset.tool("Suggest layers")
def suggest_layers(
    request: ToolRequest,
    edits: Annotated[
        list[Edit],
        Field(
            min_length=1,
            max_length=100,
            description="Edits to try; the first eight are used.",
        ),
    ],
    method: Annotated[
        str, Field(max_length=64, description='Editing method with a layer; "auto" chooses.')
    ] = "rome",
    layers: Annotated[
        list[Annotated[int, Field(ge=0)]] | None,
        Field(
            min_length=1,
            max_length=16,
            description="Layers to try; left out: six over the depth.",
        ),
    ] = None,
    params: Annotated[dict[str, Any] | None, Field(description="Its other parameters.")] = None,
) -> LayerSuggestion:
    """Find the layer where editing works best on this model, by trying; nothing stays. Once per model and method is
    enough: params={"layer": "auto"} then uses it. Next: apply_edits.

    Details:
    Each candidate is edited (fact by fact, or all at once by a method of batches), measured (reliability,
    generality over paraphrases, locality over neighbours, drift) and discarded; nothing of it stays in the
    model. Use it once per model and method, or when edits do not hold. The best is remembered, so that
    params={"layer": "auto"} uses it from then on. The traced effect beside each candidate is what causal
    tracing would say. Next: apply_edits with the suggested layer.
    """
    suggestion, picture = request.services.locating.suggest_layers(
        edits, method, layers, params, ctx=request.ctx
    )
    request.show(picture)
    return suggestion

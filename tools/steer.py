"""Toolset `steer`: vectors that change tone, mood or manner, measured, dosed and taken off again."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from editors.edit import Text
from editors.steering.choices import FileFormat, Method, Positions
from server.steering.requests import CalibrationRequest, DoseRequest, EvaluationRequest, VectorRequest, When
from server.steering.results import (
    Calibration,
    Evaluation,
    Score,
    SteeringList,
    SteeringState,
    VectorDeleted,
    VectorExport,
    VectorReport,
)
from tools._steering_arguments import FilePath, Join, Layers, Multiplier, Name, Pairs, PromptTokens, Spelled
from tools._toolset import ToolRequest, Toolset

toolset = Toolset("steer")

Reason = Annotated[Text | None, Field(description="Why; kept on the ledger.")]


@toolset.tool("Import a steering vector", changes=True, scope="admin")
def import_steering_vector(
    request: ToolRequest,
    path: Annotated[
        str,
        Field(min_length=1, max_length=4096, description="A file in HOME/imports."),
    ],
    name: Name,
    replace: Annotated[bool, Field(description="Replace a vector of this name.")] = False,
    reason: Reason = None,
) -> VectorReport:
    """Take in a steering vector made elsewhere: a GGUF control vector of llama.cpp or repeng, safetensors or .pt.
    Nothing is switched on yet. Next: calibrate_steering, then set_steering.

    Details:
    A multiplier of 1 adds, after each layer, exactly what the file has for it (`direction.N` after layer N). A file for
    another model is refused by its sizes. Of a .pt file (CAA's vec_layer_N_MODEL.pt, direction.pt with
    direction_metadata.json beside it) tensors alone are read, and nothing in it is run.
    """
    return request.services.steering.take_in(path, name, replace, reason, ctx=request.ctx)


@toolset.tool("Create a steering vector", changes=True)
def create_steering_vector(
    request: ToolRequest,
    name: Name,
    method: Annotated[
        Method,
        Field(
            description="caa: mean difference of the pairs (start here); pca: their first component; lm_steer: a "
            "learned map; prompt: what an instruction does."
        ),
    ] = "caa",
    pairs: Pairs = None,
    path: FilePath = None,
    answers: Spelled = "as_given",
    positive_prompt: Annotated[Text | None, Field(description="Method prompt: the instruction.")] = None,
    negative_prompt: Annotated[
        Text | None, Field(description="Method prompt: the opposite instruction.")
    ] = None,
    layers: Layers = None,
    positions: Annotated[
        Positions,
        Field(description="Read the texts over the answer's tokens, or at the last one."),
    ] = "answer",
    replace: Annotated[bool, Field(description="Replace a vector of this name.")] = False,
    reason: Reason = None,
) -> VectorReport:
    """Make a vector for tone, mood or manner from contrasting texts; nothing is switched on yet. Give ten or more
    pairs that differ only in that trait, a file of them, or an instruction. Next: calibrate_steering, then
    set_steering.

    Details:
    Use it for what single facts do not cover: sentiment, formality, honesty, refusal, personality, length.
    Give ten or more `pairs` that differ only in that trait, a file of them, or (method prompt) an instruction.
    All layers are read in one pass and those that tell held-out pairs apart best are chosen; the picture and
    `sweep` show every layer, `separation` the distance in standard deviations (above 2 is good). Next:
    calibrate_steering for the strongest sound dose, then set_steering.
    """
    wanted = VectorRequest(
        name=name,
        method=method,
        pairs=pairs,
        path=path,
        answers=answers,
        positive_prompt=positive_prompt,
        negative_prompt=negative_prompt,
        layers=layers,
        positions=positions,
        replace=replace,
        reason=reason,
    )
    report, picture = request.services.steering.create(wanted, ctx=request.ctx)
    if picture is not None:
        request.show(picture)
    return report


@toolset.tool("Set steering", changes=True, destructive=True, idempotent=True)
def set_steering(
    request: ToolRequest,
    name: Name,
    multiplier: Multiplier,
    layers: Layers = None,
    combine: Join = "add",
    prompt_tokens: PromptTokens = True,
    sample_prompt: Annotated[Text | None, Field(description="Prompt of the sample in the answer.")] = None,
    reason: Reason = None,
    mode: Annotated[
        Literal["add", "ablate"],
        Field(description="ablate (multiplier 1): take the direction out of every layer's states."),
    ] = "add",
    when: Annotated[When | None, Field(description="Steer only these tokens.")] = None,
) -> SteeringState:
    """Switch a steering vector on at a dose, change its dose, or take it off with multiplier 0. It acts on all that
    the model says, also after a restart; the weights never change. calibrate_steering first finds how far one
    can go.

    Details:
    The dose acts on everything the model says from now on, also after a restart, and several vectors can act
    together. It is on the ledger like an edit, with an id that list_edits shows and revert_edits takes off; the
    weights never change, and off is bit for bit as before. The answer lists what is `active` and a sample
    before and after; `warnings` says when the dose is so strong that the text breaks. Use calibrate_steering
    first to know how far one can go. With `when` the dose acts at a token only where the cosine of its state after
    `layer` (left out: the first one steered) with the direction of the vector `when.vector` is greater than
    `when.above`; the sample's `cosine` says where a prompt lies.
    """
    dose = DoseRequest(name, multiplier, layers, combine, prompt_tokens, sample_prompt, reason, mode, when)
    return request.services.steering.set_dose(dose, ctx=request.ctx)


@toolset.tool("Calibrate steering")
def calibrate_steering(
    request: ToolRequest,
    name: Name,
    max_perplexity_ratio: Annotated[
        float, Field(gt=1, le=100, description="Bound on the perplexity ratio; 1.5 keeps the text sound.")
    ] = 1.5,
    layers: Layers = None,
    both: Annotated[bool, Field(description="Find the strongest negative dose too.")] = True,
) -> Calibration:
    """Find the strongest dose of a vector that keeps the text sound; nothing stays on. `multiplier` and
    `negative_multiplier` are the result. Next: evaluate_steering, then set_steering.

    Details:
    Doses are tried upwards until the perplexity ratio breaks the bound, then between. The ratio is the greater
    of two: of fixed neutral texts under the steered over the unsteered model, and of what the steered model
    writes over what the unsteered one writes, both read by the unsteered model. `multiplier` and
    `negative_multiplier` are the results, `curve` every dose tried. Next: evaluate_steering between the two,
    then set_steering.
    """
    wanted = CalibrationRequest(name, max_perplexity_ratio, layers, both)
    calibration, picture = request.services.steering.calibrate(wanted, ctx=request.ctx)
    request.show(picture)
    return calibration


@toolset.tool("Evaluate steering")
def evaluate_steering(
    request: ToolRequest,
    name: Name,
    prompts: Annotated[
        list[Text] | None, Field(max_length=200, description="Left out: neutral ones.")
    ] = None,
    multipliers: Annotated[
        list[Annotated[float, Field(allow_inf_nan=False)]] | None,
        Field(max_length=24, description="Doses to compare, 0 beside them."),
    ] = None,
    score: Annotated[
        Score,
        Field(
            description="sentiment (VADER, -1..1), refusal (share), length (words), completion (probability of "
            "`completions`), choice (of the matching answer of `pairs`)."
        ),
    ] = "sentiment",
    completions: Annotated[
        list[Text] | None, Field(max_length=100, description="Score completion: the answers.")
    ] = None,
    pairs: Pairs = None,
    path: FilePath = None,
    answers: Spelled = "as_given",
    layers: Layers = None,
    chat: Annotated[
        bool | None,
        Field(description="Put prompts as messages; left out: questions."),
    ] = None,
    max_new_tokens: Annotated[int, Field(ge=1, le=256, description="Length of every text.")] = 24,
    combine: Join = "add",
    prompt_tokens: PromptTokens = True,
) -> Evaluation:
    """Measure what doses of a vector do: a score, perplexity, and samples side by side; nothing stays on. `monotone`
    says whether the score follows the dose. Next: set_steering.

    Details:
    Use it to see whether a vector works and how its effect grows with the dose. The table has, per multiplier,
    the mean score, its change and two perplexity ratios that say how sound the text is; `monotone` says whether
    the score follows the dose; `samples` has the same prompts at every dose; the picture shows score and
    perplexity. Score choice needs questions in the A/B form, unlike those the vector was made from. Next:
    set_steering with the dose you like best.
    """
    wanted = EvaluationRequest(
        name=name,
        prompts=prompts,
        multipliers=multipliers,
        score=score,
        completions=completions,
        pairs=pairs,
        path=path,
        answers=answers,
        layers=layers,
        chat=chat,
        max_new_tokens=max_new_tokens,
        combine=combine,
        prompt_tokens=prompt_tokens,
    )
    evaluation, picture = request.services.steering.evaluate(wanted, ctx=request.ctx)
    request.show(picture)
    return evaluation


@toolset.tool("List steering", takes_turn=False)
def list_steering(request: ToolRequest) -> SteeringList:
    """The steering vectors there are, and the doses that act now. Use it to find names. Next: set_steering.

    Details:
    Use it to find names, and to see what is switched on, since when, by whom and why. Each vector has its
    method, its layers and how well it separates; `active` has the multiplier, layers and ledger id of every
    dose. Nothing is changed. Next: set_steering switches one on or (multiplier 0) off.
    """
    return request.services.steering.list()


@toolset.tool("Delete a steering vector", changes=True, destructive=True)
def delete_steering_vector(request: ToolRequest, name: Name, reason: Reason = None) -> VectorDeleted:
    """Forget a steering vector that is not switched on; take it off with set_steering first. The history stays.
    export_steering_vector keeps a copy.

    Details:
    A vector that acts is not deleted: take it off with set_steering and multiplier 0 first. The history stays,
    and past doses can still be brought back with reapply_edits, since each keeps its own copy. The answer
    names what remains. Use export_steering_vector before, if it may be wanted again.
    """
    return request.services.steering.delete(name, reason, ctx=request.ctx)


@toolset.tool("Export a steering vector", scope="admin", changes=True)
def export_steering_vector(
    request: ToolRequest,
    name: Name,
    format: Annotated[
        FileFormat,
        Field(description="gguf: a control vector as llama.cpp reads it; safetensors: one tensor per layer."),
    ] = "gguf",
    file_name: Annotated[
        str | None, Field(max_length=64, description="File name without its ending. Left out: the name.")
    ] = None,
    multiplier: Multiplier = 1.0,
) -> VectorExport:
    """Write a steering vector to a file under HOME/exports, as llama.cpp's --control-vector or as safetensors. Nothing
    there is overwritten. Vectors of lm_steer have no such form.

    Details:
    The file holds what is added after each layer at `multiplier`, in plain numbers, so that llama.cpp's
    --control-vector (or --control-vector-scaled) does what set_steering does here. Nothing that is there is
    overwritten. Vectors of method lm_steer are maps and have no such form. The answer has the path, size and
    SHA-256.
    """
    return request.services.steering.export(name, format, file_name, multiplier, ctx=request.ctx)

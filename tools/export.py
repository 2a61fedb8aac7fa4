"""Toolset `edit`, its second part: export edits to files, import edits made elsewhere."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from editors.edit import Edit
from server.engines.results import EngineList
from server.exchange.results import ExportReport, Format, GgufType, ImportReport
from server.facts.condensed import condensed
from server.facts.ids import ranges
from server.jobs.results import JobStarted
from tools._toolset import ToolRequest, Toolset
from tools.edit import Bounds, EditId, Reason

toolset = Toolset("edit")

Edits = Annotated[
    list[Edit] | None,
    Field(min_length=1, max_length=1000, description="The facts it is meant to teach; may be left out."),
]
DryRun = Annotated[bool, Field(description="Measure it and keep nothing.")]
PathName = Annotated[str, Field(min_length=1, max_length=1000)]


@toolset.tool("Export edits", scope="admin", changes=True)
def export_edits(
    request: ToolRequest,
    format: Annotated[
        Format,
        Field(
            description="lora: a PEFT adapter; merged: a Hugging Face model; gguf_lora: a LoRA for llama.cpp and "
            "Ollama; gguf: a GGUF model; patches: for import_patches; facts: text, for a prompt or retrieval."
        ),
    ],
    name: Annotated[
        str,
        Field(min_length=1, max_length=80, description="Name of what is made."),
    ],
    edit_ids: Annotated[
        list[EditId] | None,
        Field(min_length=1, max_length=100_000, description="Left out: all active edits."),
    ] = None,
    max_rank: Annotated[
        int | None,
        Field(
            ge=1,
            le=4096,
            description="lora, gguf_lora: recompress to this rank; left out: exact.",
        ),
    ] = None,
    gguf_type: Annotated[
        GgufType | None, Field(description="gguf: how matrices are stored; left out: f16.")
    ] = None,
    with_base: Annotated[bool, Field(description="lora: with the base model.")] = False,
) -> ExportReport:
    """Write active edits to files under HOME/exports, to serve the corrected model elsewhere. Nothing there is
    overwritten. `next` in the answer says how to load the result.

    Details:
    "lora" is a standard PEFT adapter with the exact sum of the edits, for vLLM (--lora-modules) and
    peft.PeftModel.from_pretrained; its rank grows with the edits, and max_rank cuts it (the error is reported).
    "merged" is a standard model folder with a card that lists the edits. "gguf_lora" is a small file that
    llama.cpp and Ollama put on top of any GGUF of the base model; "gguf" is the whole corrected model, where it was
    loaded from a GGUF file. "patches" is a bundle that another
    Errata with the same base model imports and can revert edit by edit. Memories and code books are exported as they
    are in "patches" and as text in "facts". For the other formats their answers are trained into the weights first;
    `distilled` says what that lost. Nothing in exports is ever overwritten. The answer has the path, every file and
    a SHA-256; `next` says how to load it.
    """
    report = request.services.exchange.export_edits(
        format, name, edit_ids, max_rank, ctx=request.ctx, gguf_type=gguf_type, with_base=with_base
    )
    return report.model_copy(update={"edit_ids": ranges(report.edit_ids)})


@toolset.tool("List engines", takes_turn=False)
def list_engines(request: ToolRequest) -> EngineList:
    """The engines that serve people, and which edits each was last proven to hold. Next: push_edits for those that are
    behind, audit_edits(engine) to prove it again.

    Details:
    Engines are named by whoever runs the server (--engines FILE), never by an agent. `current` is false where the
    active edits are others than those that the engine holds; `problem` says what the last push or audit found.
    """
    return request.services.engines.list()


@toolset.tool("Push edits", takes_turn=False, scope="admin", changes=True, destructive=True)
def push_edits(
    request: ToolRequest,
    engine: Annotated[str, Field(min_length=1, max_length=64, description="Its name; see list_engines.")],
    leave_out: Annotated[
        bool,
        Field(
            description="Leave out edits that act beside the weights; else they are trained into the weights."
        ),
    ] = False,
) -> JobStarted:
    """Hand the active edits to an engine and prove that it answers as the corrected model; its former state comes back
    if the proof fails. Returns a job id; next: get_job.

    Details:
    The engine is asked, caches bypassed, for every edit, wordings that it was not learned from, other facts of its
    subject, neighbours and ordinary texts, before and after, and compared with the model here. The ledger records
    which edits it holds. Engines have no memories: their answers are trained into the weights first, and `distilled`
    in the result says what that lost. Steering is not handed over.
    """
    return request.services.jobs.push_edits(engine, leave_out, ctx=request.ctx)


@toolset.tool("Import patches", scope="admin", changes=True, destructive=True)
def import_patches(
    request: ToolRequest,
    path: Annotated[
        PathName,
        Field(description="The bundle: its name under HOME/imports or HOME/exports, or its full path."),
    ],
    reason: Reason = None,
    guard: Bounds = None,
    dry_run: DryRun = False,
) -> ImportReport:
    """Replay a bundle of export_edits(format="patches") made on the same base model, and record its edits here. Each
    is measured, gets a new id and can be reverted alone. Put the file into HOME/imports first.

    Details:
    Use it to carry corrections from one server to another without computing them anew: on an unedited model the
    weights become bit for bit those of the place they come from. Each edit gets a new id here, is measured as by
    apply_edits, and can be reverted alone. A bundle of another base model, a damaged one, or an edit that
    contradicts an active one is refused with what is wrong, and nothing is changed. Put the file into
    HOME/imports first. Next: read the results; audit_edits checks them later.
    """
    report = request.services.exchange.import_patches(
        path, reason, ctx=request.ctx, guard=guard, dry_run=dry_run
    )
    return condensed(report)


@toolset.tool("Import adapter", scope="admin", changes=True, destructive=True)
def import_adapter(
    request: ToolRequest,
    path: Annotated[
        PathName,
        Field(
            description="The adapter's folder: its name under HOME/imports or HOME/exports, or its full path."
        ),
    ],
    edits: Edits = None,
    reason: Reason = None,
    source: Annotated[str | None, Field(max_length=4000, description="Where the adapter comes from.")] = None,
    guard: Bounds = None,
    dry_run: DryRun = False,
) -> ImportReport:
    """Take in a PEFT adapter trained elsewhere (LoRA and its variants, IA3) as one edit that can be reverted. Name in
    `edits` the facts it should teach, so that they are measured. Put its folder into HOME/imports first.

    Details:
    Name in `edits` the facts it is meant to teach: they are measured before and after, listed, audited and
    reverted like any other; all of one adapter together. Left out, the adapter is one entry that states no fact.
    `no_longer_holding` names active edits that it breaks. It answers as PEFT's own loading does: as a change of
    the weights where it can be one, else beside them (DoRA, IA3, a head tied to the embeddings). The folder must
    hold adapter_config.json and adapter_model.safetensors (pickled weights are never read) and fit this model's
    shapes; its configuration and hash stay on the ledger as provenance. Put it into HOME/imports first. Next: read
    the results, and revert_edits if it does not do what it says.
    """
    report = request.services.exchange.import_adapter(
        path, edits or (), reason, source, ctx=request.ctx, guard=guard, dry_run=dry_run
    )
    return condensed(report)

"""Results of exporting and importing."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from server.exchange.distillation import Distillation
from server.facts.results import EditReport
from server.results import Quoting

GgufType = Literal["f32", "f16", "q8_0"]
Format = Literal["lora", "merged", "patches", "gguf_lora", "gguf", "facts"]


class ExportReport(Quoting):
    """The report of export_edits."""

    path: str = Field(description="Where it was written: a folder (lora, merged, facts), or one file.")
    format: Format
    base: str = Field("", description="The model they belong to: a hub id, or the folder it is loaded from.")
    files: list[str] = Field(description="Names of the files; for `patches`, of those in the bundle.")
    bytes: int = Field(description="Bytes of all files together.")
    sha256: str = Field(
        description="Of the bundle file, or of SHA256SUMS, which has the hash of every file in the folder."
    )
    edit_ids: list[str] = Field(description="The exported edits, runs as ranges.")
    base_hash: str = Field(description="SHA-256 of the pristine weights they belong to.")
    weights_hash: str = Field(description="SHA-256 of the pristine weights with exactly these edits.")
    ranks: dict[str, int] = Field(default={}, description="Rank by weight (lora, gguf_lora).")
    recompression_error: float | None = Field(
        None,
        description="Greatest relative error (Frobenius norm) of a weight's change, caused by max_rank; 0 is exact.",
    )
    max_logit_difference: float | None = Field(
        None,
        description="Greatest difference from the model with these edits, on the edits' prompts (lora, gguf_lora).",
    )
    said: float | None = Field(
        None, description="Share of the facts that the unedited model says with the system prompt (facts)."
    )
    distilled: Distillation | None = Field(
        None, description="Memories whose answers were trained into the weights, and what that lost."
    )
    seconds: float
    warnings: list[str] = Field(default=[], description="What a careful reader should know.")
    next: str = Field(description="What to do with it.")


class ImportReport(EditReport):
    """The report of import_patches and import_adapter: that of apply_edits, and where it came from."""

    imported_from: str = Field(description="The file or folder.")
    sha256: str = Field(description="Of the bundle, or of the adapter's weights file.")
    original_ids: list[str] = Field(
        default=[], description="The ids the edits had where they were made, in the same order."
    )
    no_longer_holding: list[str] = Field(
        default=[],
        description="Active edits (the newest 100 are asked) that held before it and do not hold with it.",
    )

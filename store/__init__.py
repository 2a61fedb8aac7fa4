"""The ledger (SQLite) and the patch files beside it. Imports nothing else of this project."""

from store.blobs import Blobs
from store.canonical import fact_key
from store.errors import (
    BadFilter,
    BlobError,
    DamagedBlob,
    DamagedLedger,
    LedgerError,
    LedgerInUse,
    LedgerReadOnly,
    MissingBlob,
    NewerLedger,
    NoSuchEdit,
    NoSuchJob,
    QueryError,
    WrongState,
)
from store.ledger import Ledger
from store.query import QueryResult
from store.records import (
    EditRecord,
    EventRecord,
    JobRecord,
    MeasurementRecord,
    ModelRecord,
    NewPatch,
    PatchRecord,
    Problem,
    RecordedPatch,
    StackEntry,
    VectorRecord,
    Who,
)
from store.search import EditFilter, Page

__all__ = [
    "BadFilter",
    "BlobError",
    "Blobs",
    "DamagedBlob",
    "DamagedLedger",
    "EditFilter",
    "EditRecord",
    "EventRecord",
    "JobRecord",
    "Ledger",
    "LedgerError",
    "LedgerInUse",
    "LedgerReadOnly",
    "MeasurementRecord",
    "MissingBlob",
    "ModelRecord",
    "NewPatch",
    "NewerLedger",
    "NoSuchEdit",
    "NoSuchJob",
    "Page",
    "PatchRecord",
    "Problem",
    "QueryError",
    "QueryResult",
    "RecordedPatch",
    "StackEntry",
    "VectorRecord",
    "Who",
    "WrongState",
    "fact_key",
]

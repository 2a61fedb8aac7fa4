"""Errors of the ledger. Their messages are written for the person or agent who made the call."""

from __future__ import annotations


class LedgerError(Exception):
    """Base class of the errors of the ledger."""


class LedgerInUse(LedgerError):
    """Another process has this HOME open for writing."""


class LedgerReadOnly(LedgerError):
    """A write to a ledger that was opened read-only."""


class DamagedLedger(LedgerError):
    """The file is not an SQLite database or not a ledger; the message names it."""


class NewerLedger(LedgerError):
    """The ledger was written by a newer version than this one."""


class NoSuchEdit(LedgerError):
    """No edit on the ledger has this id."""


class NoSuchJob(LedgerError):
    """No job on the ledger has this id."""


class NoSuchSet(LedgerError):
    """No fact set on the ledger has this name."""


class NoSuchProposal(LedgerError):
    """No proposal on the ledger has this id."""


class WrongState(LedgerError):
    """The named edits do not have the status the change needs (for example: reverting an edit that is not active)."""


class BadFilter(LedgerError):
    """A search filter has a value that cannot be used; the message names it."""


class QueryError(LedgerError):
    """The SQL is wrong, forbidden or too slow; the message says which."""


class BlobError(LedgerError):
    """Base class of the errors of patch files."""


class MissingBlob(BlobError):
    """A patch file that the ledger names does not exist."""


class RemovedBlob(BlobError):
    """A patch file was deleted by a compaction; its edits cannot come back from it."""


class DamagedBlob(BlobError):
    """The content of a patch file does not have the hash in its name."""

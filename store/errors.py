"""Errors of the ledger; their text is fit for the person or agent who asked."""

from __future__ import annotations


class LedgerError(Exception):
    """Base of everything that can go wrong with the ledger."""


class LedgerInUse(LedgerError):
    """Another process has this HOME open for writing."""


class LedgerReadOnly(LedgerError):
    """Something was to be written, but the ledger was opened read-only."""


class DamagedLedger(LedgerError):
    """The file is no SQLite database, or not a ledger; the message names it."""


class NewerLedger(LedgerError):
    """The ledger was written by a newer version than this one."""


class NoSuchEdit(LedgerError):
    """No edit on the ledger has this id."""


class NoSuchJob(LedgerError):
    """No job on the ledger has this id."""


class WrongState(LedgerError):
    """The change does not fit the state of the edits it names (reverting what is not active, say)."""


class BadFilter(LedgerError):
    """A search was asked for with a value that cannot be used; the message names it."""


class QueryError(LedgerError):
    """The SQL cannot be run: wrong, forbidden, or too slow; the message says which."""


class BlobError(LedgerError):
    """Something is wrong with a patch file."""


class MissingBlob(BlobError):
    """A patch file the ledger names is not there."""


class DamagedBlob(BlobError):
    """A patch file does not have the content its name promises."""
